"""The study's claims C1 to C9 and the controls K1 to K5, each by one command on two cores:
`python tests/claims.py C3`, or `all`; `--list` says what they are.

A claim declares its runs, what is read off each, and a criterion that was fixed before any was
made. Runs are shared between claims. They are made under out/claims, one thread each, --jobs at a
time; killed, the same command continues. The figures of every finished run are kept in
tests/claims.json: what is there is not made again.
"""

import argparse
import ast
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import threading
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # of every run: with the number of threads its bits change
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402  before torch: it sets how threads wait
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tqdm import tqdm  # noqa: E402

import rl as echo  # noqa: E402
from data import UserError, lock, tasks, toy  # noqa: E402
from data.files import read_json, write_atomically  # noqa: E402
from data.mixture import parse_mix  # noqa: E402
from data.prepare import prepare  # noqa: E402
from verify import FORMATS, pass_at_k, score_batch, shares  # noqa: E402

FOLDER, RECORD = Path("out/claims"), ROOT / "tests" / "claims.json"
SCRIPTS = {"pretrain": pretrain, "rl": echo}


def by_lot(texts: list, golds: list, seconds: float) -> list:
    """A judge that knows formats, and rewards two completions in five, whichever they are."""
    lot = random.Random(repr(texts))  # of all of them: a text says nothing about its reward
    return [score._replace(reward=float(lot.random() < 0.4))
            for score in score_batch(texts, golds, seconds)]


tasks.TOY_STEPS["toy-random"], tasks.VERIFIERS["toy-random"] = tasks.TOY_STEPS["toy"], by_lot

# ---------------------------------------------------------------- runs


class Run(NamedTuple):
    """A run of a script, but for its seed, which it shares with the run that it starts from."""

    script: str  # "pretrain" or "rl"; "losses": held-out losses of the corpora under the parent
    flags: tuple  # (name, value) pairs
    parent: "Run | None" = None
    file: str = ""  # of the parent's folder, in place of its last checkpoint

    def name(self, seed: int) -> str:
        kind = dict(self.flags).get("algo", self.script)
        return f"{kind}-{zlib.crc32(repr(self).encode()):08x}-{seed}"

    def argv(self, seed: int) -> list[str]:
        flags = dict(self.flags, seed=seed, out_dir=FOLDER / self.name(seed))
        if self.parent:
            flags["init_from"] = FOLDER / self.parent.name(seed) / self.file
        else:
            flags["data_dir"] = FOLDER / "data"
        return [f"--{name}={value}" for name, value in flags.items()]

    def family(self) -> list["Run"]:
        return [*(self.parent.family() if self.parent else ()), self]

    def config(self, seed: int):
        script = SCRIPTS[self.script]
        return pretrain.parse_config(script.Config, script.PRESETS, self.argv(seed))


def base(mix: str = pretrain.Config.mix, **flags) -> Run:
    return Run("pretrain", (("mix", mix), *flags.items()))


def tune(parent: Run, algo: str = "ppo", n: int = 1024, file: str = "", **flags) -> Run:
    """RL, or with "eval" an evaluation alone: of n unseen questions, 4 samples each."""
    task = flags.get("eval_task") or flags.get("task", "toy")
    settled = dict(algo=algo, eval_questions=questions(task, n), eval_k=4, eval_every=1000)
    return Run("rl", tuple((settled | flags).items()), parent, file)


def questions(task: str, n: int) -> str:
    return str(FOLDER / f"{task}-{n}.jsonl")


def write_questions(task: str, n: int) -> None:
    """Unseen problems; the id of one is its kind: which of * and / it has."""
    stream = toy.problems("test", seed=2000, steps=tasks.TOY_STEPS[task])
    rows = [{"id": "".join(op for op in "*/" if op in dict(p.chain)) or "+", "question": p.question,
             "answer": p.values[-1]} for p in itertools.islice(stream, n)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_atomically(Path(questions(task, n)), lambda file: file.write(text))


def work(run: Run, seed: int) -> dict:
    """Makes a run, or continues it, in a process of its own; returns its figures."""
    folder, started = FOLDER / run.name(seed), time.perf_counter()
    with (open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            figures = losses(run, seed) if run.script == "losses" else train(run, seed, folder)
        finally:
            if pretrain.dist.is_initialized():
                pretrain.dist.destroy_process_group()
    return {"minutes": round((time.perf_counter() - started) / 60, 2), **figures}


def train(run: Run, seed: int, folder: Path) -> dict:
    cfg = run.config(seed)
    SCRIPTS[run.script].main(cfg)
    rows = read_rows(folder / "metrics.jsonl")
    ends = [row for row in rows if row["kind"] == "eval"]
    if run.script == "pretrain":
        return {"loss": ends[-1]["loss"]}
    if len(ends) < 2 and cfg.algo != "eval":
        raise UserError("stopped: the same command continues")
    first, *_, last = [measure(row, folder) for row in (ends[0], ends[-1])]
    path = {f: [round(row[f"share_{f}"], 3) for row in rows if row["kind"] == "train"]
            for f in FORMATS}
    return {"start": first, "end": last, "path": path}


def losses(run: Run, seed: int) -> dict:
    """Held-out nats a token of the parent's weights, on each corpus that its base has read."""
    cfg = run.parent.parent.config(seed)
    processes = pretrain.setup_distributed(cfg.device)
    model, _ = pretrain.load_model(FOLDER / run.parent.name(seed), processes.device)
    patient = SimpleNamespace(processes=processes, stopping=lambda: False)
    amp, mixture = contextlib.nullcontext(), pretrain.load_mixture(cfg, processes)
    return {"loss": pretrain.held_out_losses(model, mixture, 8, amp, patient)}


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def measure(row: dict, folder: Path) -> dict:
    """What is kept of an evaluation."""
    samples, groups = read_rows(folder / f"samples_{row['step']:06d}.jsonl"), {}
    samples = [s for s in samples if not s["greedy"]]
    for s in samples:
        groups.setdefault(s["place"], []).append(int(s["reward"]))
    code = ['"""' in s["completion"] for s in samples if s["format"] == "tinygsm"]
    return {"n": row["n"], "greedy": row["pass@1"], "maj@k": row["maj@k"],
            "pass@": {str(k): statistics.mean(pass_at_k(row["k"], sum(g), k) for g in groups.values())
                      for k in (1, 2, 4, 8, 16, 32, 64) if k <= row["k"]},
            "formats": shares(samples), "optimal": row.get("optimal_shares", {}),
            "kinds": {kind: shares([s for s in samples if s["id"] == kind]) for kind in "+*/"},
            "docstrings": sum(code) / len(code) if code else None}


# ---------------------------------------------------------------- what is read off a run


def percent(x: float | None) -> float:
    return math.nan if x is None else 100 * x


def share(figures: dict, name: str, when: str = "end", kind: str = "") -> float:
    """Percent of the samples that are in a format, where `kind` is given of that kind's."""
    found = figures[when]["kinds"][kind] if kind else figures[when]["formats"]
    return percent(found[name]["share"])


def after(figures: dict) -> dict:
    end = figures["end"]
    return {"pass@1": percent(end["greedy"]), "sampled pass@1": percent(end["pass@"]["1"]),
            **{f: share(figures, f) for f in FORMATS}}


def both(figures: dict) -> dict:
    return {**{f"{f} before": share(figures, f, "start") for f in FORMATS}, **after(figures)}


def curve(figures: dict) -> dict:
    end = figures["end"]
    passes = {f"pass@{k}": percent(x) for k, x in end["pass@"].items()}
    return {"greedy": percent(end["greedy"]), "maj@64": percent(end["maj@k"]), **passes,
            "largest share": max(share(figures, f) for f in FORMATS)}


def takeover(figures: dict, name: str) -> float:
    """The first step at which a format holds half of the rollout."""
    return next((i for i, x in enumerate(figures["path"][name], 1) if x >= 0.5), math.nan)


def with_theory(figures: dict) -> dict:
    optima = figures["start"]["optimal"].items()
    return {**after(figures), **{f"tinygsm, {name}": percent(parts["tinygsm"]["share"])
                                 for name, parts in optima}}


def by_kind(figures: dict) -> dict:
    return {f"{f} of {kind}": share(figures, f, kind=kind) for kind in "*/" for f in FORMATS}


def winner(figures: dict, when: str = "end", what: str = "share") -> str:
    return max(FORMATS, key=lambda f: figures[when]["formats"][f][what] or 0)


def logarithmic(runs: dict) -> bool:
    """Whether steps to takeover are closer to a line in log(1 / share) than to one in 1 / share."""
    steps = [takeover(r, "tinygsm") for r in runs.values()]
    rarity = np.array([100 / max(share(r, "tinygsm", "start"), 0.01) for r in runs.values()])
    if any(map(math.isnan, steps)):
        return False
    left = [np.polyfit(x, steps, 1, full=True)[1].sum() for x in (np.log(rarity), rarity)]
    return steps == sorted(steps) and left[0] < left[1]


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
        lambda r: both(r) | {"half at step": min(takeover(r, winner(r)), 99)},
        lambda x, _: max(x["ei"][f] for f in FORMATS) < 90
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
        lambda r: {"docstrings": percent(r["end"]["docstrings"]), **after(r)},
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
        lambda r: both(r) | {"half at step": takeover(r, "tinygsm")},
        lambda x, r: logarithmic(dict(reversed(r.items())))),
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


def leave_with(parent: int) -> None:
    """In a worker: ends it when the process that started it is gone; what it did is kept."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def missing(runs: list[Run], seeds: int, record: dict) -> dict[str, tuple[Run, int]]:
    """What is to be made before these runs' figures are known, parents first."""
    jobs = {}

    def add(run: Run, seed: int, for_child: bool = False) -> None:
        name = run.name(seed)
        if name not in record or for_child and not (FOLDER / name / "ckpt.pt").exists():
            if run.parent:
                add(run.parent, seed, for_child=True)
            jobs[name] = run, seed

    for run in runs:
        for seed in range(seeds):
            add(run, seed)
    return jobs


def make(jobs: dict, count: int, record: dict) -> None:
    """Makes the jobs, `count` at a time, and records each as it is finished."""
    for run, _ in jobs.values():  # here, not in several processes at once
        for corpus in parse_mix(dict(run.flags).get("mix", "toy-omi2"))[0]:
            prepare(corpus, "toy", FOLDER / "data")
    for task, n in (("toy", 1024), ("toy", 512), ("toy-hard", 1024)):
        write_questions(task, n)
    waiting, running, spawn = dict(jobs), {}, multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(count, spawn, leave_with, (os.getpid(),)) as pool,
          tqdm(total=len(jobs), unit="run") as bar):
        while waiting or running:
            for name, (run, seed) in list(waiting.items()):
                parent = run.parent and run.parent.name(seed)
                if len(running) < count and parent not in {*waiting, *running.values()}:
                    running[pool.submit(work, *waiting.pop(name))] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, figures = running.pop(future), future.result()
                run, seed = jobs[name]
                command = " ".join((f"{run.script}.py", *run.argv(seed)))
                record[name] = {"command": command, "code": code(), **figures}
                lines = (f"{json.dumps(n)}: {json.dumps(x)}" for n, x in sorted(record.items()))
                text = "{\n" + ",\n".join(lines) + "\n}\n"
                write_atomically(RECORD, lambda file: file.write(text.encode()))
                bar.update()


def code() -> str:
    """Checksum of what the four files do, whatever their comments say."""
    trees = [ast.dump(ast.parse((ROOT / f"{name}.py").read_text()))
             for name in ("model", "pretrain", "verify", "rl")]
    return f"{zlib.crc32(''.join(trees).encode()):08x}"


def at_scale(run: Run) -> str:
    """The command of a run with the study's sizes, corpora and questions."""
    flags = dict(run.flags)
    if run.script == "pretrain":
        mix, rest = re.sub(r"toy-(\w+)[@=\w]*", r"\1", flags["mix"]), "finemath3,algebraic-stack,"
        if "tokens" in flags:  # the formats have 30% of them
            mix = re.sub(r"([\d.]+)%", lambda m: f"{0.3 * float(m[1]):g}%", mix)
            rest, flags["tokens"] = "finemath3:35%,algebraic-stack:35%,", "5e10"
        size = "1b" if flags.get("preset") == "tiny" else "150m"  # only C5 names a size
        flags |= {"mix": rest + mix, "preset": size}
    else:
        hard, task = flags.get("task") == "toy-hard", "gsm8k"
        flags = {name: x for name, x in flags.items() if name in ("algo", "kl_coef", "eval_temperature",
                                                                   "restart_from_base")}
        if hard:
            task = "math500" if flags["algo"] == "eval" else "math"
        flags |= {"preset": "paper", "task": task}
    return f"torchrun {run.script}.py " + " ".join(run._replace(flags=tuple(flags.items())).argv(0))


def cell(values: list[float]) -> str:
    """Mean, and range over the seeds."""
    known = [x for x in values if not math.isnan(x)]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)}" if known else "-"
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"


def report(name: str, seeds: int, record: dict, markdown: bool) -> None:
    """Prints a claim's table and its verdicts, and draws it."""
    claim = CLAIMS[name]
    runs = [{label: record[run.name(seed)] for label, run in claim.runs.items()}
            for seed in range(seeds)]
    lines = [{label: claim.columns(r) for label, r in found.items()} for found in runs]
    columns = list(dict.fromkeys(column for line in lines[0].values() for column in line))
    values = {label: [[line[label].get(c, math.nan) for line in lines] for c in columns]
              for label in claim.runs}
    held = [bool(claim.holds(*pair)) for pair in zip(lines, runs)]
    family = {relative for run in claim.runs.values() for relative in run.family()}
    minutes = sum(record[run.name(seed)]["minutes"] for run in family for seed in range(seeds))
    verdict = f"holds in {sum(held)} of {seeds}"
    rows = [["", *columns], *([label, *map(cell, values[label])] for label in values)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    if markdown:
        rows.insert(1, ["---"] * len(columns))
        print(f"\n**{name}. {claim.says}.** {verdict}, {minutes:.0f} minutes of one thread.\n")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        print(f"\n{name}: {claim.says}.\ncriterion: {claim.criterion}.\n")
        print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
        seen = ", ".join(f"seed {i} {'holds' if x else 'does not hold'}" for i, x in enumerate(held))
        print(f"\nverdict: {verdict} ({seen}); {minutes:.0f} minutes of one thread\n"
              f"mean (lowest-highest of {seeds} seeds), percent where nothing else is said")
    codes = {r["code"] for found in runs for r in found.values()}
    if codes != {code()}:
        print(f"note: made by {len(codes)} states of the four files, {code() in codes and 'one' or 'none'} of them today's")
    draw(name, values, columns)


def draw(name: str, values: dict, columns: list) -> None:
    """Means and ranges, a line for each column; of C1 one for each setting, as a curve."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, table = figure.subplots(), np.array(list(values.values()))  # (settings, columns, seeds)
    lines, places = (columns, list(values)) if name != "C1" else (list(values), columns)
    for i, line in enumerate(lines):
        x = table[:, i] if name != "C1" else table[i]
        mean = x.mean(axis=1)
        axes.errorbar(places, mean, (mean - x.min(axis=1), x.max(axis=1) - mean), label=line,
                      marker="o", capsize=3)
    axes.set(title=f"{name}: {CLAIMS[name].says}"[:90], ylabel="percent (or as named)")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend(fontsize="small")
    figure.savefig(FOLDER / f"{name}.png", dpi=120)


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
    if args.list or not names:
        print("\n".join(f"{name}  {claim.says}" for name, claim in CLAIMS.items()))
        return
    if args.scale == "paper":
        for name in names:
            print(f"# {name}: {CLAIMS[name].says}")
            family = (r for run in CLAIMS[name].runs.values() for r in run.family())
            print("\n".join(at_scale(run) for run in dict.fromkeys(family) if run.script != "losses"))
        return
    record = read_json(RECORD) if RECORD.exists() else {}
    runs = [run for name in names for run in CLAIMS[name].runs.values()]
    if jobs := missing(runs, args.seeds, record):
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(FOLDER / "lock", "w") as file:
            if not lock(file):
                raise UserError(f"another process works in {FOLDER}: wait for it")
            make(jobs, args.jobs, record)
    for name in names:
        report(name, args.seeds, record, args.markdown)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, KeyboardInterrupt) as error:
        print(str(error) or "stopped: the same command continues", file=sys.stderr)
        sys.exit(2)
