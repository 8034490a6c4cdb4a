"""Pretrains a GPT on a mixture of corpora: `torchrun pretrain.py`, on a CPU or on many GPUs.

Reads token files (made on first use), writes out_dir: config.json, mixture.json, metrics.jsonl,
ckpt.pt. Run it again to continue an unfinished run; `--help` lists the settings. The plumbing
that rl.py shares (flags, processes, a run's folder, checkpoints) is in the second half.
"""

from __future__ import annotations  # the loop comes first, annotated with what comes later

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# OpenMP's threads spin while they wait for each other, unless told before torch is imported: what
# that gains on an idle machine is little beside what it costs on one that does something else too
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import UserError, cores, lock
from data.mixture import Mixture, parse_mix
from data.prepare import prepare
from data.tasks import load_questions
from data.tokenizer import EOT, get_tokenizer
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
    micro_batch_size: int = 8  # sequences of one forward pass on one rank
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
PAPER = dict(tokenizer="gpt2", context=2048, rope_base=10000.0, init_std=0.02, batch_size=512,
             micro_batch_size=16, learning_rate=1e-3, beta2=0.95, warmup_steps=5000,
             eval_every=1000, save_every=1000, compile=True)
SMALL = dict(PAPER, context=1024, batch_size=128, warmup_steps=500, eval_every=500, save_every=500)
PRESETS = {
    "tiny": {},
    "20m": dict(SMALL, width=256, layers=8, heads=4, learning_rate=2e-3),
    "60m": dict(SMALL, width=512, layers=8, heads=8),
    "150m": dict(PAPER, width=768, layers=12, heads=12, tied=False),
    "1b": dict(PAPER, width=2048, layers=16, heads=16, micro_batch_size=8),
}


# ---------------------------------------------------------------- pretraining


def main(cfg: Config) -> dict:
    """Trains until the mixture (or max_steps) is used up; returns the last evaluation row."""
    check_ranges(cfg)
    processes = setup_distributed(cfg.device)
    context = autocast(cfg.dtype, processes.device)
    mixture = load_mixture(cfg, processes)
    total = min(cfg.max_steps or mixture.steps, mixture.steps)
    model = build_model(cfg, get_tokenizer(cfg.tokenizer).n_vocab, processes.device)
    optimizer = build_optimizer(cfg, model)
    manifest = mixture.manifest()
    inputs = {name: corpus["sha256"] for name, corpus in manifest.items()}

    with Run(cfg, processes, total, inputs) as run:
        step, evaluation, stopping = 0, {}, False
        if state := run.load():
            step, evaluation = state["step"], state["evaluation"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        del state  # a second copy of the weights
        parameters = sum(p.numel() for p in model.parameters())
        run.say(f"{parameters / 1e6:.2f}M parameters, {total} steps of {cfg.batch_size} x "
                f"{cfg.context} tokens, {processes.world} rank(s) on {processes.device}")
        if step == total == evaluation.get("step"):
            run.say(f"{run.folder} is finished: --overwrite=true starts it afresh")
            return evaluation
        if step:
            run.say(f"continuing {run.folder} at step {step}")
        content = json.dumps(manifest, indent=1).encode()
        processes.first(lambda: save(run.folder / "mixture.json", content))

        def due(every: int) -> bool:
            return 0 < step and 0 < every and (step % every == 0 or step == total)

        def state() -> dict:
            progress = {"step": step, "evaluation": evaluation}
            optimizer_state = {"optimizer": optimizer.state_dict()}
            return model_state(model, cfg.tokenizer) | optimizer_state | progress

        ddp, warmup = wrap(cfg, model, context, processes), min(cfg.warmup_steps / total, 0.5)
        trained, started = 0, time.perf_counter()
        while True:
            if due(cfg.eval_every) and evaluation.get("step") != step and not stopping:
                losses = held_out_losses(model, mixture, cfg.micro_batch_size, context, run)
                stopping = not losses  # who continues here begins with this evaluation
                if losses:
                    evaluation = {"step": step, "kind": "eval", "loss": losses}
                    run.write(evaluation)
                    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                    run.say(f"step {step} held-out loss: {shown}")
                trained, started = 0, time.perf_counter()
            if stopping or step == total:
                break
            blocks, tokens = fetch(mixture, step, processes)
            rate = cfg.learning_rate * schedule((step + 1) / total, warmup, cfg.min_learning_rate)
            report = train_step(ddp, optimizer, blocks, tokens, rate, cfg, context, processes)
            step, trained = step + 1, trained + tokens
            run.bar.update()
            stopping = run.stopping()
            if due(cfg.log_every):
                loss, norm = report.tolist()  # the one place where the host waits for the device
                (loss,), seconds = processes.sum(loss), time.perf_counter() - started
                require_finite(step, loss=loss, grad_norm=norm)
                row = {"step": step, "kind": "train", "loss": loss, "learning_rate": rate,
                       "grad_norm": norm, "tokens": step * cfg.batch_size * cfg.context,
                       "tokens_per_second": trained / seconds}
                if peak := peak_flops(processes.device):
                    achieved = model.flops_per_token() * row["tokens_per_second"]
                    row["mfu"] = achieved / peak / processes.world
                run.write(row)
                trained, started = 0, time.perf_counter()
            if due(cfg.keep_every):
                weights, file = model_state(model, cfg.tokenizer), f"step_{step:06d}.pt"
                processes.first(lambda: save(run.folder / file, weights))
            if due(cfg.save_every) and step < total and not stopping:
                run.save(state())
        run.save(state())
        if evaluation.get("step") != total:
            run.say(f"stopped at step {step}: the same command continues it")
            return evaluation
    if processes.rank == 0 and cfg.tokenizer == "toy":
        print_samples(model, cfg.seed)
    return evaluation


def load_mixture(cfg: Config, processes: Processes) -> Mixture:
    """The mixture of cfg, over token files that rank 0 makes where they are missing."""
    names = list(parse_mix(cfg.mix)[0])

    def prepare_all() -> None:
        for name in names:
            print(summary(prepare(name, cfg.tokenizer, cfg.data_dir, cfg.hub)), flush=True)

    processes.first(prepare_all, patient=True)  # a corpus may take hours
    folder = Path(cfg.data_dir)
    corpora = {name: read_tokens(folder / f"{name}-{cfg.tokenizer}.bin") for name in names}
    return Mixture(corpora, cfg.mix, cfg.tokens, cfg.context, cfg.batch_size, cfg.seed)


def fetch(mixture: Mixture, step: int, processes: Processes) -> tuple[torch.Tensor, int]:
    """This rank's blocks (b, T + 1) of a step, on its device, and the targets of all ranks' blocks.

    A GPU still works on the step before: a copy from pinned memory waits for nothing.
    """
    batch = mixture.batch(step)  # the same on every rank; each takes its rows
    mine = torch.from_numpy(batch[processes.rank :: processes.world])
    if processes.device.type == "cuda":
        mine = mine.pin_memory()
    return mine.to(processes.device, non_blocking=True), int((batch[:, 1:] >= 0).sum())


def build_model(cfg: Config, vocab_size: int, device: torch.device) -> GPT:
    """The model of cfg, initialised from its seed alone."""
    if cfg.width % (2 * cfg.heads):
        raise UserError(f"--width={cfg.width} must be a multiple of 2 x --heads={cfg.heads}")
    torch.manual_seed(cfg.seed)
    shape = "context", "width", "layers", "heads", "tied", "init_std", "rope_base"
    return GPT(GPTConfig(vocab_size, **{name: getattr(cfg, name) for name in shape})).to(device)


def build_optimizer(cfg: Config, model: GPT) -> torch.optim.Optimizer:
    """AdamW; as in the study every weight decays, for there are no gains or biases to spare."""
    rates = dict(lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(model.parameters(), eps=1e-8, fused=True, **rates)


def wrap(cfg: Config, model: GPT, context, processes: Processes) -> DistributedDataParallel:
    """What training steps call: the model, compiled where cfg asks for it and it works, in DDP."""
    if cfg.batch_size < processes.world:
        raise UserError(f"--batch_size={cfg.batch_size} leaves some of {processes.world} ranks "
                        "without data")
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
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dynamo's and inductor's errors all are
        if processes.rank == 0:
            print(f"going on without --compile, which fails here ({str(error).splitlines()[0]})")
        return model


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Learning rate as a fraction of its peak: linear up to `warmup`, then cosine to `floor`.

    `progress` in (0, 1] is the share of the run that is done after this update, so the first rate
    is above 0.
    """
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def next_token_loss(model, blocks: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of blocks (B, T + 1), in nats; rows of -1 count nothing."""
    return model(blocks[:, :-1].clamp(min=0), targets=blocks[:, 1:])


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
    # to None they would be made anew, beside DDP's buckets, by the next step's first micro-batch
    optimizer.zero_grad(set_to_none=False)
    return torch.stack((loss, norm))


def accumulate(ddp, blocks, tokens: int, micro_batch_size: int, context, processes):
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


@torch.no_grad()
def held_out_losses(model, mixture: Mixture, micro_batch_size: int, context, run: Run) -> dict:
    """Mean held-out loss of each corpus, in nats a token, each rank on its part; {} once a rank
    is told to stop.
    """
    losses, (rank, world, device) = {}, run.processes
    for name in mixture.names:
        blocks, total = torch.from_numpy(mixture.held_out(name)), 0.0
        for turn in blocks.split(micro_batch_size * world):  # as many on every rank
            if run.stopping():
                return {}
            if len(mine := turn[rank::world].to(device)):
                with context:
                    total = total + next_token_loss(model, mine).double()
        losses[name] = run.processes.sum(float(total))[0] / blocks[:, 1:].numel()
    return losses


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known device (NVIDIA's data sheets)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def print_samples(model: GPT, seed: int) -> None:
    """Prints how often the model writes in each format, and one sample of each."""
    encoding, draw = get_tokenizer("toy"), torch.Generator().manual_seed(seed)
    questions = [q.question + "\n\n" for q in load_questions("toy", "test")[:96]]
    prompts = [encoding.encode_ordinary(question) for question in questions]
    room = min(128, model.config.context - max(map(len, prompts)))
    if room < 1:
        return print("no samples: the context has no room for a completion")
    tokens, mask, _ = generate(model, prompts, room, encoding.eot_token, draw)
    texts = [encoding.decode(row[kept].tolist()).removesuffix(EOT)
             for row, kept in zip(tokens, mask)]
    formats = [split_format(text)[0] for text in texts]
    for name in FORMATS:
        print(f"\n--- {name}: {formats.count(name) / len(formats):.0%} of samples at temperature 1")
        if name in formats:
            print(questions[formats.index(name)] + texts[formats.index(name)])


# The rest is plumbing, for both scripts, and may be skipped: the command line and the ranges of
# its settings, processes, a run's folder and log, checkpoints.

# ---------------------------------------------------------------- command line


def launch(main, cls, presets: dict) -> None:
    """Runs main(config) as a script: a user's mistake is one sentence, and exit status 2."""
    for stream in sys.stdout, sys.stderr:  # a terminal need not know every character
        stream.reconfigure(errors="replace", line_buffering=True)
    status, sentence = 2, ""
    try:
        return main(parse_config(cls, presets, sys.argv[1:]))
    except UserError as error:  # all ranks of a machine raise it
        sentence = str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else ""
    except KeyboardInterrupt:  # outside of a Run
        status, sentence = 130, "stopped; nothing is lost, the same command starts again"
    except (RuntimeError, MemoryError) as error:
        memory = "can't allocate memory" in str(error)  # what a CPU says
        if memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            sentence = "out of memory: lower --micro_batch_size (rl.py: or --sample_batch_size)"
        elif "gloo" in str(error) and "by peer" in str(error):  # the connection was closed or reset
            status, sentence = 1, ("another process of this run has died, see its message; the "
                                   "same command continues from the last checkpoint")
        else:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if sentence:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(status)


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
    stored = read_config(flags["config"]) if flags.get("config") else {}
    stored.pop("run", None)  # what a run says of itself
    for name, value in stored.items():
        if name not in kinds:
            raise UserError(f"{flags['config']} has a field {name}, which is no setting"
                            f"{nearest(name, kinds)}")
        stored[name] = parse_value(name, str(value), kinds[name])
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
    choices = typing.get_args(kind)
    try:
        if choices:
            return {choice: choice for choice in choices}[text]
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
        wanted = wanted or "one of " + ", ".join(choices) + nearest(text, choices)
        raise UserError(f"--{name}={text} should be {wanted}") from None


def read_config(file: str | Path) -> dict:
    """What a config.json holds."""
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        return {**stored}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read as a configuration in JSON ({error}): bring it "
                        "back, or choose another") from None


RANGES = [  # of the numbers that need not be above 0 and no more: names, test, words
    ("tokens warmup_steps weight_decay max_steps keep_every seed kl_coef eval_k eval_temperature",
     lambda x: x >= 0, "0 or more"),
    ("min_learning_rate gae_lambda", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("beta1 beta2 warmup", lambda x: 0 <= x < 1, "0 or more and below 1"),
    ("top_p eval_top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
]


def check_ranges(cfg) -> None:
    """Raises UserError where a number of cfg is out of its range: the one place that knows them."""
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            holds, words = lambda x: x > 0, "above 0"
            for names, *special in RANGES:
                holds, words = special if name in names.split() else (holds, words)
            if not (abs(value) < math.inf and holds(value)):  # false for NaN
                raise UserError(f"--{name}={value} must be a finite number, {words}")


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

    def first(self, work, patient: bool = False) -> None:
        """work() on rank 0, while the others wait, for days if patient; its UserError is raised
        on all.
        """
        days = datetime.timedelta(days=7)
        group = dist.new_group(backend="gloo", timeout=days) if patient else None
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
    if kind == "cuda" and 0 < torch.cuda.device_count() < neighbours:
        raise UserError(f"{neighbours} processes need as many GPUs, and this machine has "
                        f"{torch.cuda.device_count()}: lower --nproc_per_node")
    try:
        place = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={device} cannot be used here ({reason})") from None
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
        if world > 1:
            torch.set_num_threads(max(1, cores() // neighbours))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    return Processes(rank, world, place)


def keep_freed_memory() -> None:
    """glibc hands large freed blocks back to the kernel, which then zeroes them again at every
    allocation: keeping them doubles the speed of a small model. Without glibc, nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def autocast(dtype: str, device: torch.device, amx: bool = True):
    """The autocast context of --dtype: "auto" is bfloat16 on cuda, and on a CPU with units for it
    (AMX) unless the caller gains nothing by them.
    """
    if dtype == "auto":
        units = amx and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
        dtype = "bfloat16" if device.type == "cuda" or units else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------- the run's folder

FREE = set(  # settings that may change when a run continues: its result does not depend on them,
    "preset config out_dir overwrite data_dir hub device compile micro_batch_size "
    "sample_batch_size time_limit log_every eval_every save_every keep_every "
    "init_from questions eval_questions"  # or what they name is compared by its content
    .split())


class Run:
    """The folder of a run: `with Run(cfg, processes, total, inputs) as run`, on all ranks.

    Within it the folder is locked, and Ctrl-C and SIGTERM are noted, for the loop to save first.
    `inputs` maps what the run reads to checksums: a run continues on the same content and with the
    same settings, but for FREE. Raises UserError where the folder belongs to another run.
    """

    def __init__(self, cfg, processes: Processes, total: int, inputs: dict[str, str]):
        self.cfg, self.processes, self.total, self.inputs = cfg, processes, total, inputs
        self.folder, self.stop_seen, self.handlers = Path(cfg.out_dir), False, {}
        self.log, self.lock = self.folder / "metrics.jsonl", None
        where = {"argv": sys.argv, "torch_version": str(torch.__version__), "inputs": inputs,
                 "device": str(processes.device), "world_size": processes.world}
        self.config = {**dataclasses.asdict(cfg), "run": where}

    def __enter__(self) -> Run:
        self.processes.first(self.claim)
        if threading.current_thread() is threading.main_thread():
            for number in signal.SIGINT, signal.SIGTERM:
                self.handlers[number] = signal.signal(number, self.note)
        hidden = None if self.processes.rank == 0 else True  # None: hidden unless on a terminal
        self.bar = tqdm(total=self.total, unit="step", disable=hidden)
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    def note(self, number, frame) -> None:
        """Notes a signal. A second one is not held back, unless it is torchrun's copy of it."""
        self.stop_seen = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, self.handlers[number])

    def stopping(self) -> bool:
        """Whether any rank has seen a signal: all ranks stop at the same step."""
        return self.processes.sum(self.stop_seen)[0] > 0

    def claim(self) -> None:
        """Makes and locks the folder, and writes config.json or sees that it is of this run."""
        file, folder = self.folder / "config.json", self.folder
        theirs = read_config(file) if file.exists() else None
        strange = theirs is not None and not self.config.keys() <= theirs.keys()
        used = folder.exists() and any(folder.iterdir())
        left = (folder / "ckpt.pt").exists() or self.log.exists() and self.log.stat().st_size > 0
        if strange or theirs is None and (left or used and self.cfg.overwrite):
            raise UserError(f"{folder} is not the folder of a run of this script: it is left as "
                            "it is, choose another --out_dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_file = open(self.log, "ab")
            if not lock(lock_file):
                raise UserError(f"another process works in {folder}: wait for it, or choose "
                                "another --out_dir")
            if theirs and self.cfg.overwrite:
                for entry in folder.iterdir():  # config.json last: a kill leaves a run's folder
                    if entry.is_file() and entry not in (file, self.log):
                        entry.unlink()
                lock_file.truncate(0)
        except OSError as error:
            raise UserError(f"{folder} cannot be used ({error.strerror}): mend that, or choose "
                            "another --out_dir") from None
        if not theirs or self.cfg.overwrite:
            save(file, json.dumps(self.config, indent=1).encode())
        elif changes := self.changes(theirs):
            raise UserError(f"{folder} holds a run with another {changes}: choose another "
                            "--out_dir, or --overwrite=true to delete that run")
        self.lock = lock_file

    def changes(self, theirs: dict) -> str:
        """What must not but does differ from another config.json."""
        read = theirs["run"].get("inputs", {})
        names = [name for name in self.config if name not in FREE | {"run"}]
        changed = [f"{name} ({theirs[name]} there, {self.config[name]} here)"
                   for name in names if theirs[name] != self.config[name]]
        changed += [f"content of {name}" for name in self.inputs
                    if read.get(name) != self.inputs[name]]
        return ", ".join(changed)

    def load(self) -> dict | None:
        """The checkpoint to continue from, None for a new run; a second copy of the weights, for
        the caller to drop. Rows behind it go from the log: they come again.
        """
        file, state = self.folder / "ckpt.pt", None
        if self.processes.gather(file.exists())[0]:
            state = load_checkpoint(file, self.processes.device)
            if self.changes(state["config"]):
                raise UserError(f"{file} is of another run than its config.json: bring the right "
                                "one back, or --overwrite=true starts afresh")
            self.bar.initial = self.bar.n = state["step"]
        self.processes.first(lambda: self.cut_log(*state["log"] if state else (0, "")))
        return state

    def cut_log(self, size: int, checksum: str) -> None:
        content = self.log.read_bytes()[:size]
        if size and (len(content) < size or fingerprint(content) != checksum):
            raise UserError(f"{self.log} is not what it was when ckpt.pt was saved: bring it back, "
                            "or --overwrite=true starts afresh")
        os.truncate(self.log, size)

    def save(self, state: dict) -> None:
        """ckpt.pt, atomically. All ranks call it; what fails on rank 0 ends them all."""

        def write() -> None:
            content = self.log.read_bytes()
            log = len(content), fingerprint(content)
            save(self.folder / "ckpt.pt", {**state, "config": self.config, "log": log})

        self.processes.first(write)

    def write(self, row: dict) -> None:
        """Appends a row to metrics.jsonl; shows a training step's in the bar, or as a line."""
        if self.processes.rank > 0:
            return
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)  # JSON has no NaN
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.log} could not be written ({error.strerror}): mend that and "
                            "start again, the last checkpoint is intact") from None
        if row["kind"] == "train":
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
            text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                self.say(f"step {row['step']}/{self.total} {text}")

    def say(self, text: str) -> None:
        if self.processes.rank == 0:
            tqdm.write(text)


# ---------------------------------------------------------------- checkpoints


def save(path: Path, content) -> None:
    """Writes bytes, or a state with torch.save, beside `path`, then renames: a reader sees the old
    file or the new one. Raises UserError, also where weights are not finite.
    """
    if isinstance(content, dict):
        parts = [part for part in content.values() if isinstance(part, dict)]
        weights = [w for part in parts for w in part.values() if isinstance(w, torch.Tensor)]
        finite = all(bool(w.isfinite().all()) for w in weights)
        require_finite(content.get("step", 0), weights=0.0 if finite else math.nan)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}): mend that and start again, "
                        "what was there is intact") from None


def require_finite(step: int, **values: float) -> None:
    """Raises UserError where a value is not: what it came from must not be saved."""
    if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
        raise UserError(f"{' and '.join(wrong)} not finite by step {step}, the last checkpoint is "
                        "kept: start again with a lower --learning_rate and another --out_dir")


def fingerprint(value) -> str:
    """A short checksum of a model's weights, or of plain data."""
    digest = hashlib.sha256()
    if isinstance(value, torch.nn.Module):
        for name, weight in value.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().numpy())
    else:
        digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def load_checkpoint(path: Path, device) -> dict:
    """A state that `save` wrote; unpickles tensors and plain types only."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return {**state}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `torchrun pretrain.py` first, or name "
                        "another run") from None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # zipfile, pickle and torch each have errors of their own for a damaged file
        raise UserError(f"{path} is not a readable checkpoint: delete it, or name "
                        "another") from None


def model_state(model: GPT, tokenizer: str) -> dict:
    """What load_model needs."""
    return {"model": model.state_dict(), "gpt": dataclasses.asdict(model.config),
            "tokenizer": tokenizer}


def load_model(path: str | Path, device) -> tuple[GPT, str]:
    """The model of a run's folder or of a .pt file, and the name of its tokenizer."""
    path = Path(path)
    path = path / "ckpt.pt" if path.suffix != ".pt" else path
    state = load_checkpoint(path, "cpu")
    try:
        model = GPT(GPTConfig(**state["gpt"]))
        model.load_state_dict(state["model"])
        return model.to(device), state["tokenizer"]
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} is no checkpoint of this code: pretrain it again") from None


if __name__ == "__main__":
    launch(main, Config, PRESETS)
