"""Pretrains a GPT on a mixture of corpora: `torchrun pretrain.py`, on a CPU or on many GPUs.

Reads token files (made on first use), writes out_dir: config.json, mixture.json, metrics.jsonl,
ckpt.pt. Run it again to continue an unfinished run. The plumbing that rl.py shares
(configuration, processes, log, checkpoints) is here too. `--help` lists the settings.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import UserError
from data.mixture import Mixture, parse_mix
from data.prepare import prepare
from data.tasks import load_questions
from data.tokenizer import get_tokenizer
from data.tokens import read_tokens, summary
from model import GPT, GPTConfig, generate
from verify import FORMATS, split_format


@dataclass
class Config:
    preset: Literal["tiny", "20m", "60m", "150m", "1b"] = "tiny"  # fills in what PRESETS names
    config: str = ""  # a .json of these fields, such as another run's config.json
    out_dir: str = "out/pretrain"  # the run's folder
    overwrite: bool = False  # true deletes what is in out_dir and starts afresh
    data_dir: str = "out/data"  # token files
    hub: str = ""  # a folder with the hub's layout, to read in its place
    tokenizer: Literal["toy", "gpt2"] = "toy"  # the shipped one, or GPT-2's with single digits
    mix: str = "toy-tinygsm,toy-omi1,toy-omi2:1.3"  # NAME[:PASSES],... or NAME:PERCENT%,...
    tokens: float = 0  # budget of a mixture in percent; a mixture in passes has its own
    context: int = 256  # tokens of a sequence, at least those of a prompt and its completion
    width: int = 96  # of the residual stream
    layers: int = 2  # blocks of attention and MLP
    heads: int = 6  # of attention; width / heads must be even
    tied: bool = True  # one matrix for embedding and output
    rope_base: float = 1000.0  # longest wavelength of the positions, over 2 pi
    init_std: float = 0.1  # of every weight, truncated at three of them
    batch_size: int = 8  # sequences of the global batch, all ranks together
    micro_batch_size: int = 16  # sequences of one forward pass on one rank
    learning_rate: float = 6e-3  # at the end of the warm-up
    min_learning_rate: float = 0.1  # at the end of the cosine, as a fraction of learning_rate
    warmup_steps: int = 50  # in which the learning rate rises
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # of AdamW
    weight_decay: float = 0.1  # on every weight
    grad_clip: float = 1.0  # largest norm of the gradient
    max_steps: int = 0  # steps of the run and of its schedule; 0: the whole mixture
    eval_every: int = 200  # steps between held-out losses
    save_every: int = 200  # steps between checkpoints
    keep_every: int = 0  # steps between snapshots of the weights, step_NNNNNN.pt; 0: none
    log_every: int = 20  # steps between metric rows
    seed: int = 0  # of the initialisation and of the order of the data
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 if faster
    compile: bool = False  # torch.compile; needs a C++ compiler, on cuda Triton


# The study's models (OLMo's configuration) and its batch of 512 x 2048 tokens; smaller ones with
# an eighth of the batch, for one small GPU.
PAPER = dict(
    tokenizer="gpt2", context=2048, rope_base=10000.0, init_std=0.02, batch_size=512,
    micro_batch_size=16, learning_rate=1e-3, beta2=0.95, warmup_steps=5000, eval_every=1000,
    save_every=1000, compile=True)  # fmt: skip
SMALL = dict(PAPER, context=1024, batch_size=128, warmup_steps=500, eval_every=500, save_every=500)
PRESETS = {
    "tiny": {},
    "20m": dict(SMALL, width=256, layers=8, heads=4, learning_rate=2e-3),
    "60m": dict(SMALL, width=512, layers=8, heads=8),
    "150m": dict(PAPER, width=768, layers=12, heads=12, tied=False),
    "1b": dict(PAPER, width=2048, layers=16, heads=16, micro_batch_size=8),
}


# ---------------------------------------------------------------- configuration


def parse_config(cls, presets: dict, argv: list[str]):
    """An instance of dataclass `cls`, from its defaults < presets < --config=FILE.json < flags.

    Every preset applies whose words are all among the chosen preset and algo. Flags read
    --key=value or --key value. Raises UserError on what it does not know, with the nearest name.
    """
    if "--help" in argv or "-h" in argv:
        print(inspect.getsource(cls))
        for name, values in presets.items():
            print(f"{name}:", " ".join(f"--{key}={value}" for key, value in values.items()))
        raise SystemExit(0)
    kinds, flags, rest = typing.get_type_hints(cls), {}, list(argv)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in kinds:
            raise UserError(f"unknown argument {key}{nearest(name, kinds, '--')}; --help lists all")
        if not equals and not rest:
            raise UserError(f"{key} needs a value: {key}=VALUE")
        flags[name] = parse_value(name, value if equals else rest.pop(0), kinds[name])
    stored = read_config(flags["config"], kinds) if flags.get("config") else {}
    chosen = {{**vars(cls), **stored, **flags}.get(field) for field in ("preset", "algo")}
    values = {}
    for words, preset in presets.items():
        values |= preset if set(words.split()) <= chosen else {}
    return cls(**{**values, **stored, **flags})


def nearest(name: str, names, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def parse_value(name: str, text: str, kind):
    """`text` as int, float, bool, str or one of a Literal."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text in choices:
            return text
        close = nearest(text, choices)
        raise UserError(f"--{name}={text}: choose from {', '.join(choices)}{close}")
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name}={text}: {wanted} is needed") from None


def read_config(file: str, kinds: dict) -> dict:
    """The fields of a config.json; what a run adds about itself, under "run", is passed over."""
    try:
        stored = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config={file} cannot be read as JSON ({error})") from None
    stored.pop("run", None)
    for name in stored:
        if name not in kinds:
            raise UserError(f"--config={file}: unknown field {name}{nearest(name, kinds)}")
    return {name: parse_value(name, str(value), kinds[name]) for name, value in stored.items()}


def require_positive(cfg, *names: str) -> None:
    for name in names:
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be above 0")


# ---------------------------------------------------------------- processes


class Processes(typing.NamedTuple):
    rank: int
    world: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the ranks; on the CPU, so that no GPU is waited for."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value, group=None) -> list:
        """Every rank's value, in the order of the ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value, group)
        return values

    def first(self, work, group=None) -> None:
        """work() on rank 0, while the others wait in `group`; its UserError is raised on all."""
        problem = None
        try:
            if self.rank == 0:
                work()
        except UserError as error:
            problem = str(error)
        if problem := self.gather(problem, group)[0]:
            raise UserError(problem)


def setup_distributed(device: str) -> Processes:
    """Joins the process group that torchrun describes, or a group of one."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    rank, world, local, neighbours = (int(os.environ.get(*name)) for name in names)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={device} cannot be used here ({reason})") from None
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    elif world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    if place.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc hands large freed blocks back to the kernel, which then zeroes them again at every
        # allocation: keeping them (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) doubles the speed of a
        # small model.
        ctypes.CDLL(None).mallopt(-3, 32 << 20)
        ctypes.CDLL(None).mallopt(-1, 1 << 30)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    return Processes(rank, world, place)


def autocast(dtype: str, device: torch.device):
    """The autocast context of --dtype: "auto" is bfloat16 on cuda and on a CPU with AMX units."""
    if dtype == "auto":
        amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        dtype = "bfloat16" if device.type == "cuda" or amx else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def signals_restored():
    """Gives Ctrl-C and SIGTERM back to whom they belonged: a StopSignal lives as long as its run.

    A process forked later would inherit the handler, and not end when it is told to.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the loop can save first. A second one is not held back."""

    def __init__(self):
        self.seen = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.note)

    def note(self, number, frame):
        self.seen = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self, processes: Processes) -> bool:
        """Whether any rank has seen one: all ranks stop at the same step."""
        return processes.sum(self.seen)[0] > 0


def launch(main, cls, presets: dict) -> None:
    """Runs main(config) as a script: a user's mistake is one sentence, and exit status 2."""
    try:
        main(parse_config(cls, presets, sys.argv[1:]))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "peer" not in str(error):  # gloo's "Connection closed by peer"
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: another process of this run has died, see its message;"
                 " the same command continues from the last checkpoint")  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- the run's folder


def open_run(cfg, processes: Processes) -> dict | None:
    """Prepares cfg.out_dir and returns the checkpoint to continue from, None for a new run.

    Raises UserError where the folder holds a run of another configuration.
    """
    folder, file = Path(cfg.out_dir), Path(cfg.out_dir) / "config.json"
    processes.first(lambda: claim(cfg, folder, file, processes))
    checkpoint = folder / "ckpt.pt"
    return load_checkpoint(checkpoint, processes.device) if checkpoint.exists() else None


def claim(cfg, folder: Path, file: Path, processes: Processes) -> None:
    """Makes the folder and its config.json, or sees that they are of a run of the same cfg."""
    if cfg.overwrite and folder.exists():
        if any(folder.iterdir()) and not file.exists():
            raise UserError(f"{folder} is not a run's folder: it is not overwritten, choose "
                            "another --out_dir")  # fmt: skip
        shutil.rmtree(folder)
    ours = dataclasses.asdict(cfg)
    if not file.exists():
        content = json.dumps({**ours, "run": describe(processes)}, indent=1).encode()
        return write_atomically(file, content)
    theirs = json.loads(file.read_text())
    free = ("out_dir", "overwrite", "config", "preset", "device", "data_dir", "hub")
    differing = [k for k in ours if k not in free and ours[k] != theirs.get(k)]
    if differing:
        changes = ", ".join(f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in differing)
        raise UserError(f"{folder} holds a run with another {changes}: choose another "
                        "--out_dir, or --overwrite=true to delete that run")  # fmt: skip


def write_manifest(file: Path, manifest: dict, continues: bool) -> None:
    """Writes what the mixture holds; a run that continues must read the same tokens as before."""
    before = json.loads(file.read_text()) if continues and file.exists() else manifest
    if differing := [name for name in manifest if before.get(name) != manifest[name]]:
        raise UserError(f"the tokens of {', '.join(differing)} are not those that {file.parent} "
                        "began with: bring them back, choose another --out_dir, or "
                        "--overwrite=true to delete that run")  # fmt: skip
    write_atomically(file, json.dumps(manifest, indent=1).encode())


def describe(processes: Processes) -> dict:
    """What a run's config.json says of where it ran."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)  # fmt: skip
    return {"argv": sys.argv, "git_commit": git.stdout.strip(), "torch_version": torch.__version__,
            "device": str(processes.device), "world_size": processes.world}  # fmt: skip


@contextlib.contextmanager
def memory_for(cfg, name: str):
    """Turns running out of memory within it into the sentence that names the setting to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU has no class for it
        gpu, cpu = isinstance(error, torch.OutOfMemoryError), "can't allocate memory" in str(error)
        if not gpu and not cpu:
            raise
        sentence = f"out of memory: lower --{name}, {getattr(cfg, name)} now"
        if os.environ.get("RANK", "0") != "0":  # launch prints what happens on rank 0, or on all
            print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
        raise UserError(sentence) from None


class RunLog:
    """Appends rows to metrics.jsonl, and shows them: a bar on a terminal, lines elsewhere.

    Rank 0 alone writes. A run that continues drops the rows behind its checkpoint: they come again.
    """

    def __init__(self, cfg, processes: Processes, total: int, step: int, size: int):
        self.active, self.total = processes.rank == 0, total
        self.path = Path(cfg.out_dir) / "metrics.jsonl"
        if self.active:
            self.path.touch()
            os.truncate(self.path, size)
        hidden = None if self.active else True  # None: hidden unless on a terminal
        self.bar = tqdm(total=total, initial=step, unit="step", disable=hidden)

    def write(self, row: dict) -> None:
        if not self.active:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} could not be written ({error.strerror}): make room "
                            "and start again, the last checkpoint is intact") from None  # fmt: skip
        if row["kind"] == "train":
            scalars = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            text = " ".join(f"{k} {v:.4g}" for k, v in scalars.items())
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print(f"step {row['step']}/{self.total} {text}", flush=True)

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def size(self) -> int:
        """Bytes of metrics.jsonl so far: goes into the checkpoint."""
        return self.path.stat().st_size if self.active else 0

    def close(self) -> None:
        self.bar.close()


def write_atomically(path: Path, content) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one.

    `content` is bytes, or a function that writes to the file it is given. Raises UserError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}): make room and start again, "
                        "what was there is intact") from None  # fmt: skip


def save_checkpoint(path: Path, state: dict) -> None:
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device) -> dict:
    """What save_checkpoint wrote; unpickles tensors and plain types only."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `torchrun pretrain.py` first, or name "
                        "another run") from None  # fmt: skip
    except Exception:  # zipfile, pickle and torch each have errors of their own for a damaged file
        raise UserError(f"{path} is not a readable checkpoint: delete it, or name "
                        "another") from None  # fmt: skip


def model_state(model: GPT, tokenizer: str) -> dict:
    """What load_model needs."""
    return {"model": model.state_dict(), "gpt": dataclasses.asdict(model.config),
            "tokenizer": tokenizer}  # fmt: skip


def restore(path: Path, state: dict, **parts) -> None:
    """Loads state[name] into each part, a module or an optimizer."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} holds a model of another architecture: name another, or start "
                        "afresh with --overwrite=true") from None  # fmt: skip


def load_model(path: str | Path, device) -> tuple[GPT, str]:
    """The model of a run's folder or of a .pt file, and the name of its tokenizer."""
    path = Path(path)
    path = path / "ckpt.pt" if path.suffix != ".pt" else path
    state = load_checkpoint(path, device)
    try:
        model, tokenizer = GPT(GPTConfig(**state["gpt"])).to(device), state["tokenizer"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is no checkpoint of this code: pretrain it again") from None
    restore(path, state, model=model)
    return model, tokenizer


# ---------------------------------------------------------------- pretraining


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Learning rate as a fraction of its peak: linear up to `warmup`, then cosine to `floor`.

    `progress` in (0, 1] is the share of the run that is done after this update, so the first rate
    is above 0.
    """
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def load_mixture(cfg: Config, processes: Processes) -> Mixture:
    """The mixture of cfg, over token files that rank 0 makes where they are missing."""
    names = list(parse_mix(cfg.mix)[0])
    # a corpus may take hours: the other ranks wait in a group that lets them
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def prepare_all() -> None:
        for name in names:
            print(summary(prepare(name, cfg.tokenizer, cfg.data_dir, cfg.hub)), flush=True)

    processes.first(prepare_all, patient)
    folder = Path(cfg.data_dir)
    corpora = {name: read_tokens(folder / f"{name}-{cfg.tokenizer}.bin") for name in names}
    return Mixture(corpora, cfg.mix, cfg.tokens, cfg.context, cfg.batch_size, cfg.seed)


def fetch(mixture: Mixture, step: int, processes: Processes) -> tuple[torch.Tensor, int]:
    """This rank's blocks (b, T + 1) of a step, on its device, and the targets of all ranks' blocks.

    Called while the device still works on the step before: a copy from pinned memory waits for
    nothing.
    """
    batch = mixture.batch(step)  # the same on every rank; each takes its rows
    mine = torch.from_numpy(batch[processes.rank :: processes.world])
    if processes.device.type == "cuda":
        mine = mine.pin_memory()
    return mine.to(processes.device, non_blocking=True), int((batch[:, 1:] >= 0).sum())


def build_model(cfg: Config, vocab_size: int, device: torch.device) -> GPT:
    """The model of cfg, initialised from its seed alone."""
    torch.manual_seed(cfg.seed)
    fields = [field.name for field in dataclasses.fields(GPTConfig)][1:]
    try:
        return GPT(GPTConfig(vocab_size, *(getattr(cfg, f) for f in fields))).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_optimizer(cfg: Config, model: GPT) -> torch.optim.Optimizer:
    groups, betas = model.param_groups(cfg.weight_decay), (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=1e-8, fused=True)


def wrap(cfg: Config, model: GPT, context, processes: Processes) -> DistributedDataParallel:
    """What training steps call: the model, compiled where cfg asks for it and it works, in DDP."""
    rows = min(cfg.micro_batch_size, -(-cfg.batch_size // processes.world))
    blocks = torch.zeros(rows, cfg.context + 1, dtype=torch.long, device=processes.device)
    module = compiled(model, blocks, context, processes) if cfg.compile else model
    # the gradients live in DDP's buckets: no second copy of them
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def compiled(model: GPT, blocks: torch.Tensor, context, processes: Processes):
    """torch.compile(model), tried on one forward and backward pass of `blocks` (B, T + 1).

    Where that fails, for want of a compiler as a rule, a sentence and the model as it is.
    """
    try:
        faster = torch.compile(model, dynamic=False)
        with context:
            loss = next_token_loss(faster, blocks)
        loss.backward()
        model.zero_grad()
        return faster
    except RuntimeError as error:  # dynamo's and inductor's errors all are
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if processes.rank == 0:
            print(f"going on without --compile, which fails here ({str(error).splitlines()[0]})")
        return model


def next_token_loss(model, blocks: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of blocks (B, T + 1), in nats; rows of -1 count nothing."""
    return model(blocks[:, :-1].clamp(min=0), targets=blocks[:, 1:])


def accumulate(ddp, blocks: torch.Tensor, tokens: int, micro_batch_size: int, context, processes):
    """Adds up the gradient of this rank's blocks (B, T + 1), over the `tokens` of all ranks.

    Returns this rank's part of the loss. DDP averages over ranks where the loss is a sum over
    them, hence the factor world.
    """
    loss, micro = 0.0, blocks.split(micro_batch_size)
    for i, part in enumerate(micro):
        # forward and backward both inside: DDP decides in the forward whether to reduce
        with contextlib.nullcontext() if i == len(micro) - 1 else ddp.no_sync():
            with context:
                part_loss = next_token_loss(ddp, part) / tokens
            (part_loss * processes.world).backward()
        loss = loss + part_loss.detach()
    return loss


def train_step(ddp, optimizer, blocks, tokens: int, rate: float, cfg, context, processes):
    """One update, at learning rate `rate`, on this rank's blocks (B, T + 1) of `tokens` targets.

    Returns a report (2,): this rank's part of the loss, and the norm of the gradient. It stays on
    the device: nothing here waits for a GPU.
    """
    loss = accumulate(ddp, blocks, tokens, cfg.micro_batch_size, context, processes)
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, norm))


def read(reports: list[torch.Tensor], step: int) -> tuple[float, float]:
    """Empties the reports of the steps up to `step`, and returns the last one's loss and norm.

    Raises UserError at the first step that is not finite. Every save comes after a reading, and
    the norm is the same on all ranks: so bad weights are never saved, and all ranks stop.
    """
    values = torch.stack(reports).tolist()  # the one place where the host waits for the device
    for i, (loss, norm) in enumerate(values, step - len(values) + 1):
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(f"the loss is {loss}, the gradient's norm {norm} at step {i}: lower "
                            "--learning_rate; the last checkpoint is kept")  # fmt: skip
    reports.clear()
    return values[-1]


@torch.no_grad()
def held_out_losses(model, mixture: Mixture, micro_batch_size: int, context, processes) -> dict:
    """Mean held-out loss of each corpus, in nats a token, each rank on its part."""
    losses = {}
    for name in mixture.names:
        mine = mixture.held_out(name)[processes.rank :: processes.world]
        blocks = torch.from_numpy(mine).to(processes.device)
        with context:
            parts = blocks.split(micro_batch_size) if len(blocks) else ()
            total = float(sum(next_token_loss(model, part).double() for part in parts))
        total, tokens = processes.sum(total, blocks[:, 1:].numel())
        losses[name] = total / tokens
    return losses


def print_samples(model: GPT, tokenizer: str, log: RunLog, seed: int) -> None:
    """Prints how often the model writes in each format, and one sample of each."""
    encoding, count = get_tokenizer(tokenizer), 96
    questions = load_questions("toy", "test")[:count]
    prompts = [encoding.encode_ordinary(q.question + "\n\n") for q in questions]
    room = model.config.context - max(map(len, prompts))
    if room < 1:
        return log.say("no samples: the context has no room for a completion")
    generator = torch.Generator().manual_seed(seed)
    tokens, mask, _ = generate(model, prompts, min(room, 256), encoding.eot_token, generator)
    texts = [encoding.decode([i for i in row[kept].tolist() if i != encoding.eot_token])
             for row, kept in zip(tokens, mask)]  # fmt: skip
    formats = [split_format(text)[0] for text in texts]
    for name in FORMATS:
        share = formats.count(name) / len(formats)
        log.say(f"\n--- {name}: {share:.0%} of {len(formats)} samples at temperature 1")
        if name in formats:
            first = formats.index(name)
            log.say(f"{questions[first].question}\n\n{texts[first]}")


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known device (NVIDIA's data sheets)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


@signals_restored()
def main(cfg: Config) -> dict:
    """Trains until the mixture (or max_steps) is used up; returns the last evaluation row."""
    require_positive(cfg, "batch_size", "micro_batch_size", "learning_rate", "context", "width",
                     "layers", "heads", "eval_every", "save_every", "log_every")  # fmt: skip
    processes = setup_distributed(cfg.device)
    stop, context = StopSignal(), autocast(cfg.dtype, processes.device)
    if cfg.batch_size < processes.world:
        raise UserError(f"--batch_size={cfg.batch_size} leaves some of {processes.world} ranks "
                        "without data")  # fmt: skip
    mixture = load_mixture(cfg, processes)
    total = min(cfg.max_steps or mixture.steps, mixture.steps)
    model = build_model(cfg, get_tokenizer(cfg.tokenizer).n_vocab, processes.device)
    optimizer = build_optimizer(cfg, model)
    step, evaluation, metrics_size, folder = 0, {}, 0, Path(cfg.out_dir)
    state, manifest = open_run(cfg, processes), mixture.manifest()
    processes.first(lambda: write_manifest(folder / "mixture.json", manifest, bool(state)))
    if state:
        step, evaluation, metrics_size = state["step"], state["evaluation"], state["metrics_size"]
        restore(folder / "ckpt.pt", state, model=model, optimizer=optimizer)
    del state  # a second copy of the weights
    log = RunLog(cfg, processes, total, step, metrics_size)
    parameters = sum(p.numel() for p in model.parameters())
    log.say(f"{parameters / 1e6:.2f}M parameters, {total} steps of {cfg.batch_size} x "
            f"{cfg.context} tokens, {processes.world} rank(s) on {processes.device}")  # fmt: skip
    if step == total:
        log.say(f"{cfg.out_dir} is finished: --overwrite=true starts it afresh")
        return evaluation
    if step:
        log.say(f"continuing {cfg.out_dir} at step {step}")
    ddp, warmup = wrap(cfg, model, context, processes), min(cfg.warmup_steps / total, 0.5)
    batch, reports, trained, started = fetch(mixture, step, processes), [], 0, time.perf_counter()
    while step < total:
        rate = schedule((step + 1) / total, warmup, cfg.min_learning_rate) * cfg.learning_rate
        with memory_for(cfg, "micro_batch_size"):
            reports.append(train_step(ddp, optimizer, *batch, rate, cfg, context, processes))
        step, trained = step + 1, trained + batch[1]
        batch = fetch(mixture, step, processes) if step < total else None
        log.bar.update()
        stopping = stop.agreed(processes)
        due = {every: getattr(cfg, every) and (step % getattr(cfg, every) == 0 or step == total)
               for every in ("log_every", "eval_every", "save_every", "keep_every")}  # fmt: skip
        if stopping or any(due.values()):
            loss, grad_norm = read(reports, step)
        if due["log_every"]:
            speed = trained / (time.perf_counter() - started)
            row = {"step": step, "kind": "train", "loss": processes.sum(loss)[0],
                   "learning_rate": rate, "grad_norm": grad_norm,
                   "tokens": step * cfg.batch_size * cfg.context,
                   "tokens_per_second": speed}  # fmt: skip
            if peak := peak_flops(processes.device):
                row["mfu"] = speed * model.flops_per_token() / peak / processes.world
            log.write(row)
            started, trained = time.perf_counter(), 0
        if due["eval_every"]:
            losses = held_out_losses(model, mixture, cfg.micro_batch_size, context, processes)
            evaluation = {"step": step, "kind": "eval", "loss": losses}
            log.write(evaluation)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            log.say(f"step {step} held-out loss: {shown}")
            started, trained = time.perf_counter(), 0
        if due["keep_every"]:
            weights, file = model_state(model, cfg.tokenizer), folder / f"step_{step:06d}.pt"
            processes.first(lambda: save_checkpoint(file, weights))
        if due["save_every"] or stopping:
            state = {**model_state(model, cfg.tokenizer), "optimizer": optimizer.state_dict(),
                     "step": step, "config": dataclasses.asdict(cfg), "evaluation": evaluation,
                     "metrics_size": log.size()}  # fmt: skip
            processes.first(lambda: save_checkpoint(folder / "ckpt.pt", state))
        if stopping and step < total:
            log.say(f"stopped at step {step}: the same command continues it")
            log.close()
            return evaluation
    log.close()
    if processes.rank == 0:
        print_samples(model, cfg.tokenizer, log, cfg.seed)
    dist.barrier()
    return evaluation


if __name__ == "__main__":
    launch(main, Config, PRESETS)
