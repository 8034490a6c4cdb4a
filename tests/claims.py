"""The study's claims C1 to C9 and controls K1 to K5, each by one command on two cores:
`python tests/claims.py C3`, or `all`; `--list` says what they are.

A claim declares runs, what is read off each, and a criterion for one seed.
Claims share runs (tests/runs.py). Killed, the same command continues; tests/claims.json keeps the
figures of every finished run: those are not made again.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import runs  # first: it settles the number of threads
import numpy as np
from matplotlib.figure import Figure

from data import UserError
from data.files import read_json
from runs import Run, base, tune
from verify import FORMATS

RECORD = Path(__file__).with_name("claims.json")

# ---------------------------------------------------------------- what is read off a run
OUTCOME = ["greedy", "pass@1", *FORMATS]
WHOLE = [f"{f} before" for f in FORMATS] + OUTCOME
NONE = {"share": 0, "accuracy": math.nan}


def number(figures: dict, column: str) -> float:
    """What a column's name says: a share or an accuracy in percent, a step, a loss in nats."""
    if "loss" in figures:
        return figures["loss"][column]
    (name, _, of), start, end = column.partition(" "), figures["start"], figures["end"]
    if name in ("docstring", "plain"):  # of tinygsm's code: the share with one, its accuracy
        return 100 * end["code"].get(name, NONE)["accuracy" if of == "right" else "share"]
    if of == "steps":  # until the format holds half of a rollout
        return next((i for i, x in enumerate(figures["path"][name], 1) if x >= 0.5), math.nan)
    if of in ("before", "right"):  # its share, its accuracy before
        return 100 * (start["formats"][name]["share" if of == "before" else "accuracy"] or 0)
    if of in ("full tilt", "re-weighting"):  # its share in theory
        return 100 * start["optimal"][of][name]["share"]
    if of in ("+", "*", "/"):  # its share of the questions that have one of * and /, or none
        return 100 * end["kinds"][of][name]["share"]
    if name in FORMATS:
        return 100 * end["formats"][name]["share"]
    return 100 * (end["pass@"][name[5:]] if name.startswith("pass@") else end[name])


def winner(line: dict, of: str = "") -> str:
    return max(FORMATS, key=lambda f: line[f + of])


def moved(line: dict) -> float:
    return sum(abs(line[f] - line[f + " before"]) for f in FORMATS)


def near_log(lines: dict) -> bool:
    """Whether steps fall with the share, nearer to a line in log(1 / share) than in 1 / share."""
    steps = [line["tinygsm steps"] for line in lines.values()]
    rarity = np.array([1 / max(line["tinygsm before"], 0.01) for line in lines.values()])
    if math.nan in steps or steps != sorted(steps, reverse=True):
        return False
    log, plain = (np.polyfit(x, steps, 1, full=True)[1] for x in (np.log(rarity), rarity))
    return log < plain


# ---------------------------------------------------------------- the claims
class Claim(NamedTuple):
    says: str
    criterion: str  # for one seed
    runs: dict[str, Run]  # a line of the table each
    columns: list[str]  # see number
    holds: Callable  # {line: {column: number}} -> bool


STUDY = base()
PPO, MIX = tune(STUDY), "toy-tinygsm{},toy-omi1@slips=0{},toy-omi2@slips=0{}:1.3"
SIZES = MIX.format("@div=sub@mul=add", "@div=sub@mul=add", "")
APART = MIX.format("@div=sub", "@mul=add", "@div=sub@mul=add")
ALIKE = MIX.format("@div=sub", "@div=sub", "@div=sub@mul=add")
HARD = dict(task="toy-hard", max_new_tokens=120)


def of_budget(*percents: float, tokens: str = "3e6") -> Run:
    """RL on a base of so many tokens, of which the formats have these percents."""
    names = "toy-tinygsm", "toy-omi1@div=sub", "toy-omi2"
    mix = ",".join(f"{name}:{x:g}%" for name, x in zip(names, percents) if x)
    return tune(base(mix, tokens=tokens))


CLAIMS = {
    "C1": Claim(
        "RL converges to the format of one corpus; pass@1 gains, pass@64 stalls",
        "one format ends with 90% of samples; greedy pass@1 rises most, maj@64 less, pass@64 least",
        {"base": tune(STUDY, "eval", n=512, eval_k=64), "PPO": tune(PPO, "eval", n=512, eval_k=64)},
        ["greedy", "maj@k", *(f"pass@{2**i}" for i in range(7)), *FORMATS],
        lambda x: max(x["PPO"][f] for f in FORMATS) >= 90 and (
            rise := [x["PPO"][c] - x["base"][c] for c in ("greedy", "maj@k", "pass@64")]
        ) == sorted(rise, reverse=True)),
    "C2": Claim(
        "a KL coefficient keeps minorities at the same greedy pass@1; a small one acts as none",
        "0.001: shares within 5 points of 0's; 0.1: minorities hold 10%, greedy within 5 of 0's",
        {f"kl {kl}": PPO if kl == 0.03 else tune(STUDY, kl_coef=kl)
         for kl in (0, 0.001, 0.03, 0.1, 0.3)},
        [*OUTCOME, "tinygsm full tilt", "tinygsm re-weighting"],
        lambda x: all(abs(x["kl 0"][f] - x["kl 0.001"][f]) <= 5 for f in FORMATS)
        and max(x["kl 0.1"][f] for f in FORMATS) <= 90
        and abs(x["kl 0.1"]["greedy"] - x["kl 0"]["greedy"]) <= 5),
    "C3": Claim(
        "the format most accurate at the start wins, until a worse one is too frequent: that one "
        "wins then, and accuracy drops; what is absent never appears",
        "x1: the most accurate wins; x8: omi1, greedy 5 points below x1's; what is absent: <0.1%",
        {"omi1 x1": of_budget(34, 33, 33), "omi1 x2": of_budget(25, 50, 25),
         "omi1 x4": of_budget(17, 66, 17), "omi1 x8": of_budget(10, 80, 10),
         "no tinygsm": of_budget(0, 50, 50)},
        [*(f"{f} right" for f in FORMATS), *WHOLE],
        lambda x: winner(x["omi1 x1"]) == winner(x["omi1 x1"], " right")
        and winner(x["omi1 x8"]) == "omi1" and x["no tinygsm"]["tinygsm"] < 0.1
        and x["omi1 x8"]["greedy"] <= x["omi1 x1"]["greedy"] - 5),
    "C4": Claim(
        "more passes over TinyGSM are better after RL",
        "greedy pass@1 after RL is 5 points higher with two passes than with a quarter of one",
        {f"{n} pass": PPO if n == 1 else tune(base(STUDY.flags[0][1].replace(",", f":{n},", 1)))
         for n in (0.25, 0.5, 1, 2)} | {
         "shares of 1/4, tokens of 1": of_budget(9.77, 44.58, 45.65, tokens="3.95e+06"),
         "shares of 2, tokens of 1": of_budget(46.41, 26.47, 27.12, tokens="3.95e+06")},
        WHOLE, lambda x: x["2 pass"]["greedy"] >= x["0.25 pass"]["greedy"] + 5),
    "C5": Claim(
        "scale decides which format wins: code at the small size, prose at the large",
        "the most frequent format is code at width 48, prose at 96, each the most accurate before",
        {f"width {n}": tune(base(SIZES, preset=x)) for n, x in ((48, "narrow"), (96, "tiny"))},
        [*(f"{f} right" for f in FORMATS), *WHOLE, "text +", "text *", "text /"],
        lambda x: winner(x["width 48"]) != "text" == winner(x["width 96"])
        and all(winner(line) == winner(line, " right") for line in x.values())),
    "C6": Claim(
        "PPO and GRPO collapse the mixture, Expert Iteration shifts it mildly",
        "PPO and GRPO end with 90% in one format; EI from the base moves the shares half as far",
        {"PPO": PPO, "GRPO": tune(STUDY, "grpo"), "REINFORCE": tune(STUDY, "reinforce"),
         "EI": tune(STUDY, "ei"), "EI online": tune(STUDY, "ei", restart_from_base="false")},
        [*WHOLE, "tinygsm steps"], lambda x: moved(x["EI"]) < moved(x["PPO"]) / 2
        and all(max(x[algo][f] for f in FORMATS) >= 90 for algo in ("PPO", "GRPO"))),
    "C7": Claim(
        "RL on easy questions helps on harder ones",
        "greedy pass@1 on toy-hard rises by 5 points with RL on toy",
        {"base": tune(STUDY, "eval", **HARD), "PPO on toy": tune(PPO, "eval", **HARD)},
        OUTCOME, lambda x: x["PPO on toy"]["greedy"] >= x["base"]["greedy"] + 5),
    "C8": Claim(
        "within the winning format RL sharpens conventions",
        "the share of tinygsm's code that has a docstring moves by 10 points",
        {f"step {step}": tune(PPO, "eval", file=f"step_{step:06d}.pt")
         for step in (0, 3, 9, 21, 48)},
        ["docstring", "docstring right", "plain right", *OUTCOME],
        lambda x: abs(x["step 48"]["docstring"] - x["step 0"]["docstring"]) >= 10),
    "C9": Claim(
        "RL on harder questions helps less, even on these",
        "greedy pass@1 on toy-hard ends higher with RL on toy than with as many steps on toy-hard",
        {"base": tune(STUDY, "eval", **HARD), "PPO on toy": tune(PPO, "eval", **HARD),
         "PPO on toy-hard": tune(STUDY, **HARD)},
        OUTCOME, lambda x: x["PPO on toy"]["greedy"] > x["PPO on toy-hard"]["greedy"]),
    "K1": Claim(
        "control: a reward by lot moves no format", "no share moves by more than 15 points",
        {"reward by lot": tune(STUDY, task="toy-random", eval_task="toy")}, WHOLE,
        lambda x: all(abs(y[f] - y[f + " before"]) <= 15 for y in x.values() for f in FORMATS)),
    "K2": Claim(
        "control: RL is more than the base at a low temperature",
        "RL ends with 90% in a format that has 50% of the base's samples at none of five",
        {f"base at {t}": tune(STUDY, "eval", eval_temperature=t) for t in (0.1, 0.3, 0.5, 0.7, 1)}
        | {"PPO": PPO},
        OUTCOME, lambda x: x["PPO"][winner(x["PPO"])] >= 90
        and all(line[winner(x["PPO"])] < 50 for name, line in x.items() if name != "PPO")),
    "K3": Claim(
        "control: RL forgets: held-out loss of each corpus, in nats a token",
        "the loss of the winner's corpus rises less than the others'",
        {"base": STUDY, "PPO": Run("losses", (), PPO)},
        ["toy-tinygsm", "toy-omi1@div=sub", "toy-omi2"],
        lambda x: min(x["base"], key=lambda c: x["PPO"][c] - x["base"][c]) == "toy-tinygsm"),
    "K4": Claim(
        "a format of start share s takes over in O(log 1/s) steps (arXiv 2510.11495)",
        "from all s tinygsm comes to hold half, the later the rarer, nearer to log 1/s than to 1/s",
        {"1%": of_budget(1, 50, 49), "3%": of_budget(3, 49, 48), "10%": of_budget(10, 45, 45),
         "34%": of_budget(34, 33, 33)},
        [*WHOLE, "tinygsm steps"], near_log),
    "K5": Claim(
        "RL routes where formats are right on different problems, and collapses where one is best",
        "apart: tinygsm has 50 points more of * than of /, omi1 as many less; alike: at most 20",
        {"apart": tune(base(APART)), "alike": tune(base(ALIKE))},
        [*(f"{f} {kind}" for kind in "*/" for f in FORMATS), *OUTCOME],
        lambda x: all(sign * (x["apart"][f"{f} *"] - x["apart"][f"{f} /"]) >= 50
                      and abs(x["alike"][f"{f} *"] - x["alike"][f"{f} /"]) <= 20
                      for f, sign in (("tinygsm", 1), ("omi1", -1)))),
}


# ---------------------------------------------------------------- command line
def at_scale(run: Run) -> Run:
    """A run with the study's sizes, corpora and questions."""
    flags = dict(run.flags)
    if run.script == "pretrain":
        mix, rest = re.sub(r"toy-(\w+)[@=\w]*", r"\1", flags["mix"]), "finemath3,algebraic-stack,"
        if "tokens" in flags:  # of which the three formats have 30%
            mix = re.sub(r"([\d.]+)%", lambda m: f"{0.3 * float(m[1]):g}%", mix)
            rest, flags["tokens"] = "finemath3:35%,algebraic-stack:35%,", "5e10"
        size = "1b" if flags.get("preset") == "tiny" else "150m"  # only C5 names a size
        return Run("pretrain", tuple((flags | {"mix": rest + mix, "preset": size}).items()))
    hard = "math500" if flags["algo"] == "eval" else "math"
    task = hard if flags.get("task") == "toy-hard" else "gsm8k"
    kept = ("algo", "kl_coef", "eval_temperature", "restart_from_base")
    flags = {name: flags[name] for name in kept if name in flags}
    flags |= {"preset": "paper", "task": task}
    return Run("rl", tuple(flags.items()), at_scale(run.parent), run.file)


def cell(values: np.ndarray) -> str:
    """Mean, and range over the seeds; "-" where there is none in some seed."""
    spread = f" ({values.min():.3g}-{values.max():.3g})" if len(values) > 1 else ""
    return "-" if np.isnan(values).any() else f"{values.mean():.3g}{spread}"


def report(claim: str, seeds: int, record: dict, markdown: bool) -> None:
    """Prints a claim's table and its verdicts, and draws it."""
    says, criterion, lines, columns, holds = CLAIMS[claim]
    figures = [{line: record[run.name(i)] for line, run in lines.items()} for i in range(seeds)]
    numbers = [{line: {column: number(x, column) for column in columns}
                for line, x in of_seed.items()} for of_seed in figures]
    values = np.array([[[of_seed[line][column] for of_seed in numbers] for column in columns]
                       for line in lines])
    held = [str(bool(holds(of_seed))) for of_seed in numbers]
    names = {run.name(i) for x in lines.values() for run in x.family() for i in range(seeds)}
    minutes = sum(record[name]["minutes"] for name in names)
    verdict = f"holds in {held.count('True')} of {seeds} seeds; {minutes:.0f} minutes of a thread"
    rows = [["", *columns], *([line, *map(cell, x)] for line, x in zip(lines, values))]
    if markdown:
        text = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        print(f"\n**{claim}: {says}.** {verdict}.\n", *text, sep="\n")
    else:
        widths = [max(map(len, column)) for column in zip(*rows)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        print(f"\n{claim}: {says}\n", *text, sep="\n")
        print(f"\ncriterion: {criterion}\nverdict: {verdict} ({', '.join(held)})")
    if {x["code"] for of_seed in figures for x in of_seed.values()} != {runs.CODE}:
        print("note: not all of these runs were made by the four files as they are now")
    draw(claim, values, list(lines), columns)


def draw(name: str, values: np.ndarray, lines: list, columns: list) -> None:
    """Means and ranges of values (lines, columns, seeds): of C1 a curve for each line, over k."""
    shown = [i for i, column in enumerate(columns) if (
        "pass@" in column if name == "C1" else column.split()[-1] not in ("before", "right"))]
    values, columns = values[:, shown], [columns[i] for i in shown]
    if name != "C1":  # a curve for each column, over the lines
        values, lines, columns = values.swapaxes(0, 1), columns, lines
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, mean = figure.subplots(), values.mean(axis=2)
    ranges = np.stack((mean - values.min(axis=2), values.max(axis=2) - mean), axis=1)
    for line, x, spread in zip(lines, mean, ranges):
        axes.errorbar(columns, x, spread, label=line, marker="o", capsize=3)
    says = re.split("[;,:]", CLAIMS[name].says)[0]
    axes.set(title=f"{name}: {says}", ylabel="percent, or as named; bars: lowest, highest seed")
    axes.legend()
    runs.FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(runs.FOLDER / f"{name}.png", dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("claims", nargs="*", help=f"{', '.join(CLAIMS)}, or all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="say what the claims are")
    parser.add_argument("--markdown", action="store_true", help="tables in markdown")
    parser.add_argument("--scale", choices=["paper"], help="print commands of the study's size")
    args = parser.parse_args(argv)
    names = list(CLAIMS) if "all" in args.claims else args.claims
    if unknown := set(names) - {*CLAIMS}:
        raise UserError(f"unknown claim {', '.join(unknown)}: choose from {', '.join(CLAIMS)}, all")
    if args.list or not names:
        return print("\n".join(f"{name}  {claim.says}" for name, claim in CLAIMS.items()))
    family = {name: [run for leaf in CLAIMS[name].runs.values() for run in leaf.family()]
              for name in names}
    if args.scale:
        needed = [run for name in names if name not in ("K1", "K5")  # they need the toy's world
                  for run in family[name] if run.script != "losses"]
        scaled = dict.fromkeys(map(at_scale, needed))
        return print("\n".join(f"torchrun {x.script}.py {' '.join(x.argv(0))}" for x in scaled))
    record = read_json(RECORD) if RECORD.exists() else {}
    for name in names:
        runs.make(family[name], args.seeds, args.jobs, record, RECORD)
        report(name, args.seeds, record, args.markdown)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, KeyboardInterrupt) as error:
        print(str(error) or "stopped: the same command continues", file=sys.stderr)
        sys.exit(2)
