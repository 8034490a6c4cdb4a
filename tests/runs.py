"""Runs of both scripts for tests/claims.py: made once, killed and continued, several at a time.

They are made under out/claims, one thread each. A record keeps the figures of every finished run:
what is in it is not made again.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # of every run: with the number of threads its bits change
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402  before torch: it sets how threads wait
from tqdm import tqdm  # noqa: E402

import rl as echo  # noqa: E402
from data import UserError, lock, tasks, toy  # noqa: E402
from data.files import write_atomically  # noqa: E402
from data.mixture import parse_mix  # noqa: E402
from data.prepare import prepare  # noqa: E402
from verify import FORMATS, pass_at_k, score_batch, shares  # noqa: E402

FOLDER = Path("out/claims")
FILES = [(ROOT / f"{name}.py").read_bytes() for name in ("model", "pretrain", "verify", "rl")]
CODE = f"{zlib.crc32(b''.join(FILES)):08x}"  # whose figures they are


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
        return [f"--{name}={value}" for name, value in flags.items()]

    def family(self) -> list["Run"]:
        return [*(self.parent.family() if self.parent else ()), self]


def base(mix: str = pretrain.Config.mix, **flags) -> Run:
    return Run("pretrain", (("mix", mix), *flags.items()))


def tune(parent: Run, algo: str = "ppo", n: int = 1024, file: str = "", **flags) -> Run:
    """RL, or with "eval" an evaluation alone: of n unseen questions, 4 samples each."""
    asked = f"{FOLDER}/{flags.get('eval_task') or flags.get('task', 'toy')}-{n}.jsonl"
    settled = dict(algo=algo, eval_questions=asked, eval_k=4, eval_every=1000)
    return Run("rl", tuple((settled | flags).items()), parent, file)


def write_questions(file: Path) -> None:
    """Unseen problems, TASK-N.jsonl; the id of one is its kind: which of * and / it has."""
    task, _, n = file.stem.rpartition("-")
    stream = toy.problems("test", seed=2000, steps=tasks.TOY_STEPS[task])
    rows = [{"id": "".join(op for op in "*/" if op in dict(p.chain)) or "+", "question": p.question,
             "answer": p.values[-1]} for p in itertools.islice(stream, int(n))]
    save(file, "".join(json.dumps(row) + "\n" for row in rows))


def save(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def work(job: tuple[Run, int]) -> tuple[str, dict]:
    """Makes a run, or continues it, in a process of its own; returns its name and its figures."""
    run, seed = job
    folder = FOLDER / run.name(seed)
    with (open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        try:
            figures = losses(run, seed) if run.script == "losses" else train(run, seed, folder)
        finally:
            if pretrain.dist.is_initialized():
                pretrain.dist.destroy_process_group()
    command = f"{run.script}.py {' '.join(run.argv(seed))}"
    text = json.dumps({"command": command, "code": CODE, **figures})
    return folder.name, json.loads(text, parse_float=lambda x: round(float(x), 4))


def config(run: Run, seed: int):
    script = {"pretrain": pretrain, "rl": echo}[run.script]
    argv = run.argv(seed) + [f"--data_dir={FOLDER}/data"] * (run.script == "pretrain")
    return script.main, pretrain.parse_config(script.Config, script.PRESETS, argv)


def train(run: Run, seed: int, folder: Path) -> dict:
    main, cfg = config(run, seed)
    main(cfg)
    rows = read_rows(folder / "metrics.jsonl")
    ends = [row for row in rows if row["kind"] == "eval"]
    step = pretrain.load_checkpoint(folder / "ckpt.pt")["step"]
    if not ends or ends[-1]["step"] < step or step == 0 and dict(run.flags)["algo"] != "eval":
        raise UserError("stopped: the same command continues")
    if run.script == "pretrain":
        speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "train"]
        seconds = rows[-2]["tokens"] / statistics.harmonic_mean(speeds)
        return {"minutes": seconds / 60, "loss": ends[-1]["loss"]}
    minutes = sum(sum(row["seconds"].values()) for row in rows) / 60
    first, last = (measure(row, folder) for row in (ends[0], ends[-1]))
    path = {f: [round(row[f"share_{f}"], 3) for row in rows if row["kind"] == "train"]
            for f in FORMATS}
    return {"minutes": minutes, "start": first, "end": last, "path": path}


def losses(run: Run, seed: int) -> dict:
    """Held-out nats a token of the parent's weights, on each corpus that its base has read."""
    _, cfg = config(run.family()[0], seed)
    processes = pretrain.setup_distributed(cfg.device)
    model, _ = pretrain.load_model(FOLDER / run.parent.name(seed), processes.device)
    patient = SimpleNamespace(processes=processes, stopping=lambda: False)
    amp, mixture = contextlib.nullcontext(), pretrain.load_mixture(cfg, processes)
    return {"minutes": 0, "loss": pretrain.held_out_losses(model, mixture, 8, amp, patient)}


def read_rows(file: Path) -> list[dict]:
    return list(map(json.loads, file.read_text().splitlines()))


def measure(row: dict, folder: Path) -> dict:
    """What is kept of an evaluation."""
    samples, groups = read_rows(folder / f"samples_{row['step']:06d}.jsonl"), {}
    samples = [s for s in samples if not s["greedy"]]
    for s in samples:
        groups.setdefault(s["place"], []).append(int(s["reward"]))
    passes = {str(k): statistics.mean(pass_at_k(row["k"], sum(g), k) for g in groups.values())
              for k in (1, 2, 4, 8, 16, 32, 64) if k <= row["k"]}
    code = [{**s, "format": "docstring" if '"""' in s["completion"] else "plain"}
            for s in samples if s["format"] == "tinygsm"]
    return {"n": row["n"], "greedy": row["pass@1"], "maj@k": row["maj@k"], "pass@": passes,
            "formats": shares(samples), "optimal": row.get("optimal_shares", {}),
            "kinds": {kind: shares([s for s in samples if s["id"] == kind]) for kind in "+*/"},
            "code": {name: x for name, x in shares(code).items() if name not in FORMATS}}


def leave_with(parent: int) -> None:
    """In a worker: ends it when the process that started it is gone; its checkpoint is kept."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make(wanted: list[Run], seeds: int, count: int, record: dict, file: Path) -> None:
    """Makes the runs that the record lacks, `count` at a time; writes it as each is finished."""
    jobs = {}

    def need(run: Run, seed: int, for_child: bool = False) -> None:
        name = run.name(seed)
        if name not in record or for_child and not (FOLDER / name / "ckpt.pt").exists():
            if run.parent:
                need(run.parent, seed, for_child=True)
            jobs[name] = run, seed

    for run, seed in itertools.product(wanted, range(seeds)):
        need(run, seed)
    if not jobs:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as held, tqdm(total=len(jobs), unit="run") as bar:
        if not lock(held):
            raise UserError(f"another process works in {FOLDER}: wait for it")
        for flags in {run.flags: dict(run.flags) for run, _ in jobs.values()}.values():
            for corpus in parse_mix(flags["mix"])[0] if "mix" in flags else ():
                prepare(corpus, "toy", FOLDER / "data")  # once, not in several processes
            if "eval_questions" in flags:
                write_questions(Path(flags["eval_questions"]))
        with multiprocessing.get_context("spawn").Pool(count, leave_with, (os.getpid(),)) as pool:
            for depth in (1, 2, 3):  # parents before their children
                level = [job for job in jobs.values() if len(job[0].family()) == depth]
                for name, figures in pool.imap_unordered(work, level):
                    record[name] = figures
                    lines = (f"{json.dumps(n)}: {json.dumps(x)}" for n, x in sorted(record.items()))
                    save(file, "{\n" + ",\n".join(lines) + "\n}\n")
                    bar.update()
