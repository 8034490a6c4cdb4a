"""The study's claims C1 to C9 and controls K1 to K5, each by one command on two cores:
`python tests/claims.py C3`, or `all`; `--list` says what they are.

A claim declares runs, what is read off each, and a criterion that was fixed before any was made.
Claims share runs (tests/runs.py). Killed, the same command continues; tests/claims.json keeps the
figures of every finished run: those are not made again.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import runs  # first: it settles the number of threads
import numpy as np
from matplotlib.figure import Figure

from data import UserError, lock
from data.files import read_json
from runs import Run, base, tune
from verify import FORMATS

RECORD = Path(__file__).with_name("claims.json")

# ---------------------------------------------------------------- what is read off a run, in percent
def share(figures: dict, name: str, when: str = "end") -> float:
    return 100 * figures[when]["formats"][name]["share"]


def after(figures: dict) -> dict:
    end = figures["end"]
    return {"pass@1": 100 * end["greedy"], "sampled": 100 * end["pass@"]["1"],
            **{f: share(figures, f) for f in FORMATS}}


def both(figures: dict) -> dict:
    return {**{f"{f} before": share(figures, f, "start") for f in FORMATS}, **after(figures)}


def curve(figures: dict) -> dict:
    end = figures["end"]
    passes = {f"pass@{k}": 100 * x for k, x in end["pass@"].items()}
    return {"greedy": 100 * end["greedy"], "maj@64": 100 * end["maj@k"], **passes,
            "largest share": max(share(figures, f) for f in FORMATS)}


def with_theory(figures: dict) -> dict:
    optima = figures["start"]["optimal"].items()
    return after(figures) | {f"tinygsm, {name}": 100 * parts["tinygsm"]["share"]
                             for name, parts in optima}


def by_kind(figures: dict) -> dict:
    kinds = figures["end"]["kinds"]
    return {f"{f} of {kind}": 100 * kinds[kind][f]["share"] for kind in "*/" for f in FORMATS}


def with_steps(name: str = "") -> Callable:
    """The first step at which a format, or the one that wins, holds half of the rollout."""

    def columns(figures: dict) -> dict:
        path = figures["path"][name or winner(figures)]
        step = next((i for i, x in enumerate(path, 1) if x >= 0.5), math.nan)
        return both(figures) | {"half at step": step}

    return columns


def winner(figures: dict, when: str = "end", what: str = "share") -> str:
    return max(FORMATS, key=lambda f: figures[when]["formats"][f][what] or 0)


def logarithmic(lines: dict) -> bool:
    """Whether steps are sorted, and nearer to a line in log(1 / share) than to one in 1 / share."""
    steps = [line["half at step"] for line in lines.values()]
    rarity = np.array([1 / max(line["tinygsm before"], 0.01) for line in lines.values()])
    if any(map(math.isnan, steps)):
        return False
    off = [np.polyfit(x, steps, 1, full=True)[1].sum() for x in (np.log(rarity), rarity)]
    return steps == sorted(steps, reverse=True) and off[0] < off[1]


# ---------------------------------------------------------------- the claims
class Claim(NamedTuple):
    says: str
    criterion: str  # in words, for one seed
    runs: dict[str, Run]  # a line of the table each
    columns: Callable  # the figures of a run -> the numbers of its line
    holds: Callable  # of one seed: ({label: numbers}, {label: figures}) -> bool


STUDY = base()
PPO, CODE = tune(STUDY), "toy-tinygsm{0},toy-omi1@slips=0{1},toy-omi2@slips=0{2}:1.3"
SIZES = CODE.format("@div=sub@mul=add", "@div=sub@mul=add", "")
APART = CODE.format("@div=sub", "@mul=add", "@div=sub@mul=add")
ALIKE = CODE.format("@div=sub", "@div=sub", "@div=sub@mul=add")


def of_budget(*shares: float) -> Run:
    """RL on a base of 3M tokens, of which the formats have these percents."""
    names = "toy-tinygsm", "toy-omi1@div=sub", "toy-omi2"
    mix = ",".join(f"{name}:{share:g}%" for name, share in zip(names, shares) if share)
    return tune(base(mix, tokens="3e6"))


def of_passes(passes: float, tokens: float = 0) -> Run:
    """RL on a base of so many passes over toy-tinygsm; of the same shares and a budget of tokens."""
    amounts = [1.193 * passes, 1.361, 1.394]  # millions of tokens of the three corpora
    if tokens:
        a, b = (round(100 * x / sum(amounts), 2) for x in amounts[:2])
        mix = f"toy-tinygsm:{a:g}%,toy-omi1@div=sub:{b:g}%,toy-omi2:{round(100 - a - b, 2):g}%"
        return tune(base(mix, tokens=f"{tokens:g}"))
    return tune(base(f"toy-tinygsm:{passes:g},toy-omi1@div=sub,toy-omi2:1.3"))


CLAIMS = {
    "C1": Claim(
        "RL converges to the format of one corpus; pass@1 gains, pass@64 stalls",
        "after RL one format holds at least 90% of samples; from base to RL, greedy pass@1 rises "
        "most, then maj@64, and pass@64 least",
        {name: tune(run, "eval", n=512, eval_k=64) for name, run in (("base", STUDY), ("PPO", PPO))},
        curve, lambda x, _: x["PPO"]["largest share"] >= 90 and (
            rise := [x["PPO"][c] - x["base"][c] for c in ("greedy", "maj@64", "pass@64")]
        ) == sorted(rise, reverse=True)),
    "C2": Claim(
        "a KL coefficient keeps minority formats at comparable pass@1; a small one acts as none",
        "shares at 0.001 are within 5 points of those at 0; at 0.1 the minorities hold 10% or more, "
        "and greedy pass@1 is within 5 points of that at 0",
        {f"kl {kl}": tune(STUDY, kl_coef=kl) if kl != 0.03 else PPO
         for kl in (0, 0.001, 0.03, 0.1, 0.3)},
        with_theory, lambda x, _: all(abs(x["kl 0"][f] - x["kl 0.001"][f]) <= 5 for f in FORMATS)
        and max(x["kl 0.1"][f] for f in FORMATS) <= 90
        and x["kl 0.1"]["pass@1"] >= x["kl 0"]["pass@1"] - 5),
    "C3": Claim(
        "the format that is the most accurate at the start wins, until a worse one is too frequent: "
        "then that one wins and accuracy drops; what is absent never appears",
        "omi1 x1: the most accurate wins; omi1 x8: omi1 wins, and pass@1 is 5 points or more below "
        "x1's; without tinygsm its share stays below 0.1%",
        {"omi1 x1": of_budget(34, 33, 33), "omi1 x2": of_budget(25, 50, 25),
         "omi1 x4": of_budget(17, 66, 17), "omi1 x8": of_budget(10, 80, 10),
         "no tinygsm": of_budget(0, 50, 50)},
        both, lambda x, r: winner(r["omi1 x1"]) == winner(r["omi1 x1"], "start", "accuracy")
        and winner(r["omi1 x8"]) == "omi1" and x["no tinygsm"]["tinygsm"] < 0.1
        and x["omi1 x8"]["pass@1"] <= x["omi1 x1"]["pass@1"] - 5),
    "C4": Claim(
        "more passes over TinyGSM are better after RL",
        "greedy pass@1 after RL at 2 passes is 5 points or more above that at a quarter of one",
        {"1/4 pass": of_passes(0.25), "1/2": of_passes(0.5), "1": PPO, "2": of_passes(2),
         "1/4, 3.95M tokens": of_passes(0.25, 3.95e6), "2, 3.95M tokens": of_passes(2, 3.95e6)},
        both, lambda x, _: x["2"]["pass@1"] >= x["1/4 pass"]["pass@1"] + 5),
    "C5": Claim(
        "scale decides which format wins: code at the small size, prose at the large",
        "width 48 ends with more than half of the samples in code, width 96 in prose",
        {"width 48": tune(base(SIZES, preset="narrow")), "width 96": tune(base(SIZES, preset="tiny"))},
        both, lambda x, _: x["width 48"]["text"] < 50 < x["width 96"]["text"]),
    "C6": Claim(
        "PPO and GRPO collapse the mixture, Expert Iteration shifts it mildly",
        "PPO and GRPO end with 90% or more in one format, EI from the base with less than 90%",
        {"ppo": PPO, "grpo": tune(STUDY, "grpo"), "reinforce": tune(STUDY, "reinforce"),
         "ei": tune(STUDY, "ei"), "ei, online": tune(STUDY, "ei", restart_from_base="false")},
        with_steps(), lambda x, _: max(x["ei"][f] for f in FORMATS) < 90
        <= min(max(x[algo][f] for f in FORMATS) for algo in ("ppo", "grpo"))),
    "C7": Claim(
        "RL on easy questions helps on harder ones",
        "greedy pass@1 on toy-hard rises by 5 points or more with RL on toy",
        {name: tune(run, "eval", task="toy-hard", max_new_tokens=120)
         for name, run in (("base", STUDY), ("PPO on toy", PPO))},
        after, lambda x, _: x["PPO on toy"]["pass@1"] >= x["base"]["pass@1"] + 5),
    "C8": Claim(
        "within the winning format RL sharpens conventions",
        "the share of docstrings in tinygsm's code moves by 10 points or more from base to step 48",
        {f"step {step}": tune(PPO, "eval", file=f"step_{step:06d}.pt")
         for step in (0, 3, 9, 21, 48)},
        lambda r: {"docstrings": 100 * r["end"]["docstrings"], **after(r)},
        lambda x, _: abs(x["step 48"]["docstrings"] - x["step 0"]["docstrings"]) >= 10),
    "C9": Claim(
        "RL on harder questions helps less, on these too",
        "with equal steps, greedy pass@1 on toy-hard ends higher after RL on toy than on toy-hard",
        {"base": tune(STUDY, "eval", task="toy-hard", max_new_tokens=120),
         "PPO on toy": tune(PPO, "eval", task="toy-hard", max_new_tokens=120),
         "PPO on toy-hard": tune(STUDY, task="toy-hard", max_new_tokens=120)},
        after, lambda x, _: x["PPO on toy"]["pass@1"] > x["PPO on toy-hard"]["pass@1"]),
    "K1": Claim(
        "control: a reward by lot, of the base's mean, moves no format",
        "no share moves by more than 15 points",
        {"reward by lot": tune(STUDY, task="toy-random", eval_task="toy")},
        both, lambda x, _: all(abs(line[f] - line[f"{f} before"]) <= 15
                               for line in x.values() for f in FORMATS)),
    "K2": Claim(
        "control: RL is more than sampling the base at a low temperature",
        "at no temperature has the base 50% in the format that RL ends in with 90%",
        {f"base at {t}": tune(STUDY, "eval", eval_temperature=t) for t in (0.1, 0.3, 0.5, 0.7, 1)}
        | {"PPO": PPO},
        after, lambda x, r: x["PPO"][winner(r["PPO"])] >= 90 and all(
            line[winner(r["PPO"])] < 50 for name, line in x.items() if name != "PPO")),
    "K3": Claim(
        "control: what RL forgets: held-out loss of each corpus, in nats a token",
        "the loss of the winner's corpus rises less than that of either other",
        {"base": STUDY, "PPO": Run("losses", (), PPO)},
        lambda r: {re.split("-|@", name)[1]: x for name, x in r["loss"].items()},
        lambda x, _: min(rise := {f: x["PPO"][f] - x["base"][f] for f in x["base"]},
                         key=rise.get) == "tinygsm"),
    "K4": Claim(
        "a format of start share s takes over after O(log 1/s) steps (arXiv 2510.11495)",
        "tinygsm comes to hold half of the rollout from every start, the later the rarer, and the "
        "steps are nearer to a line in log 1/s than to one in 1/s",
        {"1%": of_budget(1, 50, 49), "3%": of_budget(3, 49, 48), "10%": of_budget(10, 45, 45),
         "34%": of_budget(34, 33, 33)},
        with_steps("tinygsm"), lambda x, _: logarithmic(x)),
    "K5": Claim(
        "where each format is right on other problems RL routes, it collapses where one is best",
        "misconceptions apart: tinygsm's share of the problems with * is 50 points above that of "
        "those with /, omi1's below; alike: neither differs by 20 points",
        {"apart": tune(base(APART)), "alike": tune(base(ALIKE))},
        lambda r: by_kind(r) | after(r), lambda x, _: all(
            sign * (x["apart"][f"{f} of *"] - x["apart"][f"{f} of /"]) >= 50
            and abs(x["alike"][f"{f} of *"] - x["alike"][f"{f} of /"]) <= 20
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
    task = "gsm8k"
    if flags.get("task") == "toy-hard":
        task = "math500" if flags["algo"] == "eval" else "math"
    kept = ("algo", "kl_coef", "eval_temperature", "restart_from_base")
    flags = {name: x for name, x in flags.items() if name in kept}
    return Run("rl", tuple(flags.items()) + (("preset", "paper"), ("task", task)),
               at_scale(run.parent), run.file)


def cell(values: list[float]) -> str:
    """Mean, and range over the seeds."""
    if known := [x for x in values if not math.isnan(x)]:
        spread = f" ({min(known):.3g}-{max(known):.3g})" if len(known) > 1 else ""
        return f"{statistics.mean(known):.3g}{spread}" + "?" * (len(values) - len(known))
    return "-"


def report(name: str, seeds: int, record: dict, markdown: bool) -> None:
    """Prints a claim's table and its verdicts, and draws it."""
    claim = CLAIMS[name]
    found = [{label: record[run.name(seed)] for label, run in claim.runs.items()}
             for seed in range(seeds)]
    lines = [{label: claim.columns(x) for label, x in of_seed.items()} for of_seed in found]
    columns = list(dict.fromkeys(column for line in lines[0].values() for column in line))
    values = {label: [[line[label].get(column, math.nan) for line in lines] for column in columns]
              for label in claim.runs}
    held = [bool(claim.holds(*pair)) for pair in zip(lines, found)]
    family = {run for leaf in claim.runs.values() for run in leaf.family()}
    minutes = sum(record[run.name(seed)]["minutes"] for run in family for seed in range(seeds))
    verdict = f"holds in {sum(held)} of {seeds} seeds; {minutes:.0f} minutes of one thread"
    rows = [["", *columns], *([label, *map(cell, values[label])] for label in values)]
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        print(f"\n**{name}: {claim.says}.** {verdict}.\n")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        widths = [max(map(len, column)) for column in zip(*rows)]
        print(f"\n{name}: {claim.says}\n")
        print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
        print(f"\ncriterion: {claim.criterion}\nverdict: {verdict}"
              f" ({', '.join(f'{i}: {x}' for i, x in enumerate(held))})")
    if {x["code"] for of_seed in found for x in of_seed.values()} != {runs.code()}:
        print("note: not all of these runs were made by the four files as they are now")
    draw(name, np.array(list(values.values())), list(values), columns)


def draw(name: str, values: np.ndarray, lines: list, places: list) -> None:
    """Means and ranges of values (lines, places, seeds)."""
    if name != "C1":  # it has a curve for each run, the others a line for each column
        values, lines, places = values.swapaxes(0, 1), places, lines
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, mean = figure.subplots(), values.mean(axis=2)
    ranges = mean - values.min(axis=2), values.max(axis=2) - mean
    for i, line in enumerate(lines):
        axes.errorbar(places, mean[i], [side[i] for side in ranges], label=line, marker="o")
    axes.set(title=f"{name}: {CLAIMS[name].says}"[:90], ylabel="percent, or as named")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend(fontsize="small")
    figure.savefig(runs.FOLDER / f"{name}.png", dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="say what the claims are")
    parser.add_argument("--markdown", action="store_true", help="tables as the README has them")
    parser.add_argument("--scale", choices=["toy", "paper"], default="toy",
                        help="paper: print the commands at the study's size instead")
    args = parser.parse_args(argv)
    names = list(CLAIMS) if "all" in args.claims else args.claims
    if unknown := set(names) - {*CLAIMS}:
        raise UserError(f"unknown claim {', '.join(unknown)}: choose from {', '.join(CLAIMS)}, all")
    chosen = [run for name in names for run in CLAIMS[name].runs.values()]
    if args.list or not names:
        print("\n".join(f"{name}  {claim.says}" for name, claim in CLAIMS.items()))
    elif args.scale == "paper":
        family = [at_scale(run) for leaf in chosen for run in leaf.family() if run.script != "losses"]
        for run in dict.fromkeys(family):
            print(f"torchrun {run.script}.py", *run.argv(0))
    else:
        record = read_json(RECORD) if RECORD.exists() else {}
        runs.FOLDER.mkdir(parents=True, exist_ok=True)
        if jobs := runs.missing(chosen, args.seeds, record):
            with open(runs.FOLDER / "lock", "w") as file:
                if not lock(file):
                    raise UserError(f"another process works in {runs.FOLDER}: wait for it")
                runs.make(jobs, args.jobs, record, RECORD)
        for name in names:
            report(name, args.seeds, record, args.markdown)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, KeyboardInterrupt) as error:
        print(str(error) or "stopped: the same command continues", file=sys.stderr)
        sys.exit(2)
