"""Pretrains a GPT on a mixture of corpora: `torchrun pretrain.py`, on a CPU or on many GPUs.

Reads token files (made on first use), writes out_dir: config.json, mixture.json, metrics.jsonl,
ckpt.pt. Run it again to continue an unfinished run. `--help` lists the settings.
"""

import contextlib
import ctypes
import datetime
import difflib
import inspect
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

# OpenMP's waiting threads would spin, which costs much on a machine that does something else too
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"  # before torch is imported

import torch
import torch.distributed as dist
import torch.distributed.nn  # while there is no group: its functions would keep it alive to the end
from tqdm import tqdm

from data import UserError, cores, lock, reason
from data.files import fingerprint, nested, read_json, write_atomically, writing
from data.mixture import Mixture, parse_mix
from data.prepare import prepare
from data.tokenizer import get_tokenizer
from data.tokens import read_tokens, summary
from model import GPT, GPTConfig


@dataclass
class Config:
    preset: Literal["tiny", "narrow", "wide", "20m", "60m", "150m", "1b"] = "tiny"  # see PRESETS
    config: str = ""  # a .json of these fields, such as another run's config.json
    out_dir: str = "out/pretrain"  # the run's folder
    overwrite: bool = False  # true deletes the files in out_dir and starts afresh
    data_dir: str = "out/data"  # token files
    hub: str = ""  # a folder with the hub's layout, to read in its place
    tokenizer: Literal["toy", "gpt2"] = "toy"  # the shipped one, or GPT-2's with single digits
    mix: str = "toy-tinygsm,toy-omi1@div=sub,toy-omi2:1.3"  # NAME[:PASSES],... or NAME:PERCENT%,...
    tokens: float = 0  # budget of a mixture in percent; a mixture in passes has its own
    context: int = 256  # tokens of a sequence, at least those of a prompt and its completion
    width: int = 96  # of the residual stream
    layers: int = 2  # blocks of attention and MLP
    heads: int = 6  # of attention; width / heads must be even
    tied: bool = True  # one matrix for embedding and output
    rope_base: float = 1000.0  # of the wavelengths of the positions: above the longest
    init_std: float = 0.1  # of every weight, truncated at three of them
    batch_size: int = 8  # sequences of the global batch, all ranks together
    micro_batch_size: int = 8  # sequences of one forward pass on one rank
    learning_rate: float = 6e-3  # at the end of the warm-up
    min_learning_rate: float = 0.01  # at the end of the cosine, as a fraction of learning_rate
    warmup_steps: int = 50  # in which the learning rate rises
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # of AdamW
    weight_decay: float = 0.1  # on every weight
    grad_clip: float = 1.0  # largest norm of the gradient
    max_steps: int = 0  # steps of the run and of its schedule; 0: the whole mixture
    eval_every: int = 200  # steps between held-out losses
    save_every: int = 200  # steps between checkpoints
    log_every: int = 20  # steps between metric rows
    seed: int = 0  # of the initialisation and of the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda
    compile: bool = False  # torch.compile; needs a C++ compiler, on cuda Triton


# the study's models (OLMo's configuration); smaller ones, with an eighth of the batch
PAPER = dict(tokenizer="gpt2", context=2048, rope_base=10000.0, init_std=0.02, batch_size=512,
             micro_batch_size=16, learning_rate=1e-3, min_learning_rate=0.1, beta2=0.95,
             warmup_steps=5000, eval_every=1000, save_every=1000, compile=True)
SMALL = dict(PAPER, context=1024, batch_size=128, warmup_steps=500, eval_every=500, save_every=500)
PRESETS = {
    "tiny": {},  # from here init_std goes with 1 / sqrt(width), the learning rate with 1 / width
    "narrow": dict(width=48, heads=3, init_std=0.14),  # (arXiv 2203.03466), but not above 6e-3
    "wide": dict(width=192, heads=12, init_std=0.07, learning_rate=3e-3),
    "20m": dict(SMALL, width=256, layers=8, heads=4, learning_rate=2e-3),
    "60m": dict(SMALL, width=512, layers=8, heads=8),
    "150m": dict(PAPER, width=768, layers=12, heads=12, tied=False),
    "1b": dict(PAPER, width=2048, layers=16, heads=16, micro_batch_size=8),
}


def main(cfg: Config) -> dict:
    """Trains until the mixture (or max_steps) is used up; returns the last evaluation row."""
    check_ranges(cfg)
    processes = setup_distributed(cfg.device)
    amp = autocast(cfg.dtype, processes.device)
    mixture = load_mixture(cfg, processes)
    total = min(cfg.max_steps or mixture.steps, mixture.steps)
    if cfg.batch_size < processes.world:
        raise UserError(f"--batch_size={cfg.batch_size} is too few for {processes.world} ranks")
    model = build_model(cfg, get_tokenizer(cfg.tokenizer).n_vocab, processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(cfg.beta1, cfg.beta2),
                                  weight_decay=cfg.weight_decay, fused=True)
    manifest, step, evaluation, stopping = mixture.manifest(), 0, {}, False

    def due(every: int) -> bool:
        return step > 0 and (step % every == 0 or step == total)

    with Run(cfg, processes, total, manifest) as run:
        if state := run.load():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, evaluation = state["step"], state["evaluation"]
            del state  # a second copy of the weights
        run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, step {step}/{total}")
        if step == total == evaluation.get("step"):
            run.say(f"{run.folder} is finished: --overwrite=true starts it afresh")
            return evaluation
        content = json.dumps(manifest, indent=1).encode()
        processes.first(lambda: save(run.folder / "mixture.json", content))
        module = compiled(model, processes.device) if cfg.compile else model
        trained, started = 0, time.perf_counter()
        while True:
            if due(cfg.eval_every) and evaluation.get("step") != step and not stopping:
                losses = held_out_losses(model, mixture, cfg.micro_batch_size, amp, run)
                if stopping := not losses:
                    continue  # without this evaluation: who continues here begins with it
                evaluation = {"step": step, "kind": "eval", "loss": losses}
                run.write(evaluation)
                run.say(" ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
                trained, started = 0, time.perf_counter()
            if due(cfg.save_every) or stopping:
                run.save({**model_state(model, cfg.tokenizer), "optimizer": optimizer.state_dict(),
                          "step": step, "evaluation": evaluation})
            if step == total or stopping:
                break
            blocks, tokens = fetch(mixture, step, processes)
            warmup = min(cfg.warmup_steps / total, 0.5)
            rate = cfg.learning_rate * schedule((step + 1) / total, warmup, cfg.min_learning_rate)
            parts = blocks.split(cfg.micro_batch_size)
            report = update(optimizer, parts, lambda part: next_token_loss(module, part) / tokens,
                            rate, cfg.grad_clip, amp)
            step, trained = step + 1, trained + tokens
            run.bar.update()
            stopping = run.stopping()
            if due(cfg.log_every):
                loss, norm = map(float, report)  # here alone the host waits for the device
                speed = trained / (time.perf_counter() - started)
                run.write({"step": step, "kind": "train", "loss": processes.sum(loss)[0],
                           "learning_rate": rate, "grad_norm": norm, "tokens_per_second": speed,
                           "tokens": step * cfg.batch_size * cfg.context})
                trained, started = 0, time.perf_counter()
        if stopping:
            run.say(f"stopped at step {step}: the same command continues it")
    return evaluation


def load_mixture(cfg, processes) -> Mixture:
    """The mixture of cfg, over token files that rank 0 makes where they are missing."""
    names, folder = parse_mix(cfg.mix)[0], Path(cfg.data_dir)
    for name in names:
        processes.first(lambda: print(summary(prepare(name, cfg.tokenizer, folder, cfg.hub))))
    corpora = {name: read_tokens(folder / f"{name}-{cfg.tokenizer}.bin") for name in names}
    return Mixture(corpora, cfg.mix, cfg.tokens, cfg.context, cfg.batch_size, cfg.seed)


def build_model(cfg, vocab_size: int, device) -> GPT:
    """The model of cfg, initialised from its seed alone."""
    if cfg.width % (2 * cfg.heads):
        raise UserError(f"--width={cfg.width} must be a multiple of 2 x --heads={cfg.heads}")
    torch.manual_seed(cfg.seed)
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)[1:]}
    return GPT(GPTConfig(vocab_size, **shape)).to(device)


def compiled(model, device, dynamic=False):
    """torch.compile(model); as it is where that fails on a trifle, for want of a compiler."""
    try:
        torch.compile(torch.exp)(torch.ones(8, device=device))
        return torch.compile(model, dynamic=dynamic)
    except RuntimeError as error:  # dynamo's and inductor's errors all are
        print(f"going on without --compile, which fails here ({reason(error)})")
        return model


def fetch(mixture, step: int, processes):
    """This rank's blocks (b, T + 1) of a step, on its device; the number of all ranks' targets."""
    batch = mixture.batch(step)  # the same on every rank; each takes its rows
    mine = torch.from_numpy(batch[processes.rank :: processes.world])
    if processes.device.type == "cuda":
        mine = mine.pin_memory()  # its copy does not wait for the step before
    return mine.to(processes.device, non_blocking=True), int((batch[:, 1:] >= 0).sum())


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Share of the peak learning rate: linear up to `warmup`, then a cosine down to `floor`."""
    # progress in (0, 1] is the share of the run that is done after the update: no rate is 0
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def update(optimizer, parts, loss_of, rate: float, grad_clip: float, amp) -> tuple:
    """One step down the gradient of the sum of loss_of(part) over this rank's micro-batches and
    all ranks'. A loss is a sum over tokens divided by their number in the global batch, so that no
    way to split that changes the step. Returns this rank's loss and the norm of the gradient, on
    the device: nothing here waits for a GPU.
    """
    total = 0.0
    for part in parts:
        with amp:
            loss = loss_of(part)
        loss.backward()
        total = total + loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:  # after the backward pass: DDP would overlap the two, in more code
        dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # a rank without a part has a gradient to add, too
    return total, norm


def next_token_loss(model, blocks):
    """Sum of the cross-entropies of blocks (B, T + 1), in nats; rows of -1 count nothing."""
    return model(blocks[:, :-1].clamp(min=0), targets=blocks[:, 1:])


@torch.no_grad()
def held_out_losses(model, mixture, micro_batch_size: int, amp, run) -> dict:
    """Mean held-out loss of each corpus, in nats a token; {} as soon as a rank is told to stop."""
    losses, (rank, world, device) = {}, run.processes
    for name in mixture.names:
        blocks, total = torch.from_numpy(mixture.held_out(name)), 0.0
        for part in blocks.split(micro_batch_size * world):  # as many on every rank
            if run.stopping():
                return {}
            mine = part[rank::world].to(device)
            with amp:
                total += float(next_token_loss(model, mine)) if len(mine) else 0.0
        losses[name] = run.processes.sum(total)[0] / blocks[:, 1:].numel()
    return losses


# ---------------- The rest is plumbing for both scripts, and may be skipped.
def launch(main, cls, presets: dict) -> None:
    """Runs main(config) as a script: a user's mistake is one sentence, and exit status 2."""
    for stream in sys.stdout, sys.stderr:  # a terminal need not know every character
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main(parse_config(cls, presets, sys.argv[1:]))
        dist.destroy_process_group()
    except (UserError, KeyboardInterrupt, MemoryError, RuntimeError, BrokenPipeError) as error:
        text = f"{type(error).__name__}: {error}"
        memory = "out of memory: lower --micro_batch_size (rl.py: or --sample_batch_size)"
        again = "stopped: the same command starts again"
        known = {"UserError: ": str(error), "MemoryError": memory, "can't allocate memory": memory,
                 "KeyboardInterrupt": again, "BrokenPipe": again,  # the latter as behind `| head`
                 "state_dict": "weights of another model: name another run, or make it anew",
                 "by peer": "another process of this run has died: its message is the one to read"}
        sentences = [known[part] for part in known if part in text]
        if not sentences:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"{Path(sys.argv[0]).name}: {sentences[0]}", file=sys.stderr)
        sys.exit(2)


def parse_config(cls, presets: dict, argv: list):
    """An instance of `cls`: its defaults < presets < --config=FILE.json < --key=value. A preset
    applies where all its words are among the chosen preset and algo.
    """
    if "--help" in argv:
        print(inspect.getsource(cls), "presets:", json.dumps(presets, indent=1), sep="\n")
        sys.exit(0)
    kinds, texts, flags, rest = get_type_hints(cls), {}, {}, list(argv)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        texts[name.removeprefix("--")] = text if equals or not rest else rest.pop(0)
    stored = read_json(texts["config"]) if texts.get("config") else {}
    stored.pop("run", None)  # what a run says of itself
    for name, value in (stored | texts).items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1, 0.5) or ["help"]
            raise UserError(f"--{name} is unknown: did you mean --{close[0]}?")
        kind, text = kinds[name], str(value)
        choices = {"true": True, "false": False} if kind is bool else {c: c for c in get_args(kind)}
        try:
            flags[name] = choices[text.lower()] if choices else kind(text)
        except (KeyError, ValueError):
            wanted = ", ".join(choices) or {int: "a whole number", float: "a number"}[kind]
            raise UserError(f"--{name}={text} should be {wanted}") from None
    chosen, values = {(vars(cls) | flags).get(field) for field in ("preset", "algo")}, {}
    for words, preset in presets.items():
        values |= preset if set(words.split()) <= chosen else {}
    return cls(**values | flags)


RANGES = [  # names, what holds for them, in words; every other number is above 0
    ("tokens warmup_steps weight_decay max_steps seed kl_coef eval_temperature",
     lambda x: 0 <= x < 2**63, "0 or more, and less than 2^63"),
    ("beta1 beta2 warmup", lambda x: 0 <= x < 1, "0 or more and below 1"),
    ("min_learning_rate gae_lambda", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("top_p eval_top_p learning_rate critic_learning_rate", lambda x: 0 < x <= 1,
     "above 0 and at most 1"),
]


def check_ranges(cfg) -> None:
    """Raises UserError where a number of cfg is out of its range: the one place that knows them."""
    for name, x in vars(cfg).items():
        holds, words = next((rule for names, *rule in RANGES if name in names.split()),
                            (lambda x: 0 < x < math.inf, "a finite number above 0"))
        if type(x) in (int, float) and not holds(x):  # nor does anything hold for NaN
            raise UserError(f"--{name}={x} must be {words}")


class Processes(NamedTuple):
    rank: int
    world: int
    device: torch.device

    def sum(self, *values: float) -> list:
        """Each value, added up over the ranks; on the CPU, so that no GPU is waited for."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """Every rank's value, in the order of the ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, work) -> None:
        """work() on rank 0, while the others wait; all raise its UserError."""
        problem = None
        try:
            if self.rank == 0:
                work()
        except UserError as error:
            problem = str(error)
        if problem := self.gather(problem)[0]:
            raise UserError(problem)


def setup_distributed(device: str) -> Processes:
    """Joins the process group that torchrun describes, or a group of one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
    place = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda and torch.cuda.device_count() < neighbours:
        raise UserError(f"--device=cuda: {torch.cuda.device_count()} GPUs for {neighbours} ranks")
    if cuda:
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    elif neighbours > 1:
        torch.set_num_threads(max(1, cores() // neighbours))
    # large freed blocks that glibc keeps are not zeroed again: twice the speed of a small model
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    if not dist.is_initialized():
        group = {"timeout": datetime.timedelta(days=7)}  # rank 0 may make a corpus first
        if "RANK" not in os.environ:
            group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **group)
    return Processes(dist.get_rank(), dist.get_world_size(), place)


def autocast(dtype: str, device):
    """bfloat16 or nothing; "auto": bfloat16 on cuda."""
    wanted = "bfloat16" if dtype == "auto" and device.type == "cuda" else dtype
    return torch.autocast(device.type, torch.bfloat16, wanted == "bfloat16")


FREE = (  # what may change when a run continues: no result depends on it, or `inputs` has it
    "run preset config out_dir overwrite data_dir hub init_from questions eval_questions "
    "micro_batch_size sample_batch_size time_limit compile log_every eval_every save_every"
).split()
DIVERGED = ("not all numbers are finite, and the last checkpoint is kept: start again with a lower "
            "--learning_rate and another --out_dir")


class Run:
    """A run's folder, cfg.out_dir. Within `with Run(...) as run`, on all ranks, it is locked, and
    Ctrl-C and SIGTERM are noted, for the loop to save first. A run continues with the same
    settings, but for FREE, and the same content of `inputs`, its weights or data by their names.
    """

    def __init__(self, cfg, processes, total: int, inputs: dict):
        self.processes, self.total, self.overwrite = processes, total, cfg.overwrite
        self.folder, self.stop_seen, self.held = Path(cfg.out_dir), False, contextlib.ExitStack()
        self.log, self.checkpoint = self.folder / "metrics.jsonl", self.folder / "ckpt.pt"
        inputs = {f"content of {name}": fingerprint(value) for name, value in inputs.items()}
        where = {"argv": sys.argv, "torch_version": str(torch.__version__), "inputs": inputs,
                 "device": str(processes.device), "world_size": processes.world}
        self.config = asdict(cfg) | {"run": where}

    def __enter__(self):
        self.processes.first(self.claim)
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, lambda *_: setattr(self, "stop_seen", True))
                self.held.callback(signal.signal, number, before)
        hidden = self.processes.rank > 0 or None  # None: hidden unless on a terminal
        self.bar = self.held.enter_context(tqdm(total=self.total, unit="step", disable=hidden))
        return self

    def __exit__(self, *error):
        self.held.close()

    def stopping(self) -> bool:
        """Whether any rank has seen a signal: all ranks stop at the same step."""
        return self.processes.sum(self.stop_seen)[0] > 0

    def claim(self) -> None:
        """Locks the folder, and makes it this run's, or sees that it is."""
        file, instead = self.folder / "config.json", "choose another --out_dir"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            used = {x for x in self.folder.iterdir() if x.suffix != ".tmp" and x.stat().st_size}
            theirs = read_json(file) if file in used else {}
            known = nested(theirs, "run", "inputs")
            if used and not known:
                raise UserError(f"{self.folder} is not empty and not of a run like this: {instead}")
            log = open(self.log, "ab")
            if not lock(log):
                raise UserError(f"another process works in {self.folder}: wait, or {instead}")
            for entry in used - {file, self.log} if self.overwrite else ():
                if entry.is_file():
                    entry.unlink()
        ours, theirs = self.config | self.config["run"]["inputs"], theirs | known
        changes = [f"{name} ({theirs.get(name)} there, {ours[name]} here)" for name in ours
                   if name not in FREE and theirs.get(name) != ours[name]]
        if self.overwrite or not known:
            save(file, json.dumps(self.config, indent=1).encode())
        elif changes:
            raise UserError(f"{self.folder} holds a run with another {', '.join(changes)}: "
                            f"{instead}, or --overwrite=true to delete that run")
        self.held.enter_context(log)

    def load(self):
        """The checkpoint to continue from, or None; rows behind it leave the log, to come again."""
        state = {"log_size": 0, "step": 0}
        if there := any(self.processes.gather(self.checkpoint.exists())):
            state = load_checkpoint(self.checkpoint, "log_size")
        self.bar.initial = self.bar.n = state["step"]
        self.processes.first(lambda: self.cut_log(state["log_size"]))
        return state if there else None

    def cut_log(self, size):
        if self.log.stat().st_size < size:
            raise UserError(f"{self.log} is cut: bring it back, or --overwrite=true starts afresh")
        os.truncate(self.log, size)

    def save(self, state: dict) -> None:
        """ckpt.pt, atomically. All ranks call it; what fails on rank 0 ends them all."""
        self.processes.first(lambda: save(self.checkpoint, {
            **state, "config": self.config, "log_size": self.log.stat().st_size}))

    def write(self, row: dict):
        """Appends a row to metrics.jsonl, and shows it if of a training step. Raises UserError."""
        line = json.dumps(row)
        if "NaN" in line or "Infinity" in line:
            raise UserError(f"{DIVERGED}: {line}")
        if self.processes.rank == 0:
            with writing(self.log), open(self.log, "a") as file:
                print(line, file=file)
        if row["kind"] == "train":
            numbers = ((k, x) for k, x in row.items() if isinstance(x, (int, float)))
            self.say(" ".join(f"{name} {x:.4g}" for name, x in numbers))

    def say(self, text):
        try:
            self.processes.rank or tqdm.write(text)
        except BrokenPipeError:  # as behind `| tee` at Ctrl-C: stop as if told to, behind a save
            self.stop_seen = True


def save(path: Path, content) -> None:
    """Writes bytes, or a state whose weights are finite, atomically. Raises UserError."""
    if isinstance(content, bytes):
        return write_atomically(path, lambda file: file.write(content))
    for part in ("model", "critic"):
        if not all(weight.isfinite().all() for weight in content.get(part, {}).values()):
            raise UserError(f"{DIVERGED}: weights of the {part}")
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, key="model") -> dict:
    """A state that `save` wrote, with `key`; unpickles tensors and plain types only."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "gpt": GPTConfig(**state["gpt"]), key: state[key]}
    except Exception as error:  # zipfile, pickle and torch have their own for a damaged file
        why = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise UserError(f"{path} {why}: name another, or make it anew") from None


def model_state(model, tokenizer: str) -> dict:
    """What load_model needs."""
    return {"model": model.state_dict(), "gpt": asdict(model.config), "tokenizer": tokenizer}


def load_model(path, device) -> tuple:
    """The model of a run's folder or of a .pt file, and the name of its tokenizer."""
    state = load_checkpoint(Path(path) / "ckpt.pt" if Path(path).is_dir() else path)
    model = GPT(state["gpt"])
    model.load_state_dict(state["model"])
    return model.to(device), state["tokenizer"]


if __name__ == "__main__":
    launch(main, Config, PRESETS)
