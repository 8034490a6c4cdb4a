"""Pretrains a GPT on a mixture of corpora: `torchrun pretrain.py`, on a CPU or on many GPUs.

Reads token files (made on first use), writes out_dir: config.json, mixture.json, metrics.jsonl,
ckpt.pt. Run it again to continue an unfinished run. `--help` lists the settings.
"""

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
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

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
from data.tokenizer import get_tokenizer
from data.tokens import read_tokens, summary
from model import GPT, GPTConfig


@dataclasses.dataclass
class Config:
    preset: Literal["tiny", "20m", "60m", "150m", "1b"] = "tiny"  # fills in what PRESETS names
    config: str = ""  # a .json of these fields, such as another run's config.json
    out_dir: str = "out/pretrain"  # the run's folder
    overwrite: bool = False  # true deletes the files in out_dir and starts afresh
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
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
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
    manifest, step, evaluation, stopping = mixture.manifest(), 0, {}, False

    def due(every: int) -> bool:
        return step > 0 and every > 0 and (step % every == 0 or step == total)

    with Run(cfg, processes, total, manifest) as run:
        if state := run.load():
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, evaluation = state["step"], state["evaluation"]
            del state  # a second copy of the weights
        if step == total == evaluation.get("step"):
            run.say(f"{run.folder} is finished: --overwrite=true starts it afresh")
            return evaluation
        run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, at step {step} of "
                f"{total}, each of {cfg.batch_size} x {cfg.context} tokens")
        content = json.dumps(manifest, indent=1).encode()
        processes.first(lambda: save(run.folder / "mixture.json", content))
        ddp, trained, started = wrap(cfg, model, context, processes), 0, time.perf_counter()
        while True:
            if due(cfg.eval_every) and evaluation.get("step") != step and not stopping:
                losses = held_out_losses(model, mixture, cfg.micro_batch_size, context, run)
                if stopping := not losses:
                    continue  # without this evaluation: who continues here begins with it
                evaluation = {"step": step, "kind": "eval", "loss": losses}
                run.write(evaluation)
                trained, started = 0, time.perf_counter()
            if due(cfg.save_every) or stopping:
                run.save({**model_state(model, cfg.tokenizer), "optimizer": optimizer.state_dict(),
                          "step": step, "evaluation": evaluation})
            if step == total or stopping:
                break
            blocks, tokens = fetch(mixture, step, processes)
            warmup = min(cfg.warmup_steps / total, 0.5)
            rate = cfg.learning_rate * schedule((step + 1) / total, warmup, cfg.min_learning_rate)
            report = train_step(ddp, optimizer, blocks, tokens, rate, cfg, context, processes)
            step, trained = step + 1, trained + tokens
            run.bar.update()
            stopping = run.stopping()
            if due(cfg.log_every):
                loss, norm = report.tolist()  # the one place where the host waits for the device
                speed = trained / (time.perf_counter() - started)
                run.write({"step": step, "kind": "train", "loss": processes.sum(loss)[0],
                           "learning_rate": rate, "grad_norm": norm,
                           "tokens": step * cfg.batch_size * cfg.context,
                           "tokens_per_second": speed})
                trained, started = 0, time.perf_counter()
            if due(cfg.keep_every):
                weights, file = model_state(model, cfg.tokenizer), f"step_{step:06d}.pt"
                processes.first(lambda: save(run.folder / file, weights))
        if stopping:
            run.say(f"stopped at step {step}: the same command continues it")
    return evaluation


def load_mixture(cfg, processes) -> Mixture:
    """The mixture of cfg, over token files that rank 0 makes where they are missing."""
    names, folder = parse_mix(cfg.mix)[0], Path(cfg.data_dir)

    def prepare_all():
        for name in names:
            print(summary(prepare(name, cfg.tokenizer, folder, cfg.hub)))

    processes.first(prepare_all)
    corpora = {name: read_tokens(folder / f"{name}-{cfg.tokenizer}.bin") for name in names}
    return Mixture(corpora, cfg.mix, cfg.tokens, cfg.context, cfg.batch_size, cfg.seed)


def build_model(cfg, vocab_size: int, device) -> GPT:
    """The model of cfg, initialised from its seed alone."""
    if cfg.width % (2 * cfg.heads):
        raise UserError(f"--width={cfg.width} must be a multiple of 2 x --heads={cfg.heads}")
    torch.manual_seed(cfg.seed)
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)[1:]}
    return GPT(GPTConfig(vocab_size, **shape)).to(device)


def build_optimizer(cfg, model):
    """AdamW; as in the study every weight decays, for there are no gains or biases to spare."""
    betas, decay = (cfg.beta1, cfg.beta2), cfg.weight_decay
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=decay, fused=True)


def wrap(cfg, model, context, processes) -> DistributedDataParallel:
    """What training steps call: the model, compiled where cfg asks for it and it works, in DDP."""
    rows = -(-cfg.batch_size // processes.world)
    if cfg.batch_size < processes.world:
        raise UserError(f"--batch_size={cfg.batch_size} is too few for {processes.world} ranks")
    blocks = torch.zeros(min(rows, cfg.micro_batch_size), cfg.context + 1, dtype=torch.long)
    module = compiled(model, blocks.to(processes.device), context) if cfg.compile else model
    # the gradients live in DDP's buckets: no second copy of them
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def compiled(model, blocks, context):
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
        print(f"going on without --compile, which fails here ({str(error).splitlines()[0]})")
        return model


def fetch(mixture, step: int, processes) -> tuple[torch.Tensor, int]:
    """This rank's blocks (b, T + 1) of a step, on its device, and the targets of all ranks' blocks.

    A GPU still works on the step before: a copy from pinned memory waits for nothing.
    """
    batch = mixture.batch(step)  # the same on every rank; each takes its rows
    mine = torch.from_numpy(batch[processes.rank :: processes.world])
    if processes.device.type == "cuda":
        mine = mine.pin_memory()
    return mine.to(processes.device, non_blocking=True), int((batch[:, 1:] >= 0).sum())


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Learning rate as a fraction of its peak: linear up to `warmup`, then cosine to `floor`.

    `progress` in (0, 1] is the share of the run that is done after this update, so the first rate
    is above 0.
    """
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train_step(ddp, optimizer, blocks, tokens: int, rate: float, cfg, context, processes):
    """One update, at learning rate `rate`, on this rank's blocks (B, T + 1).

    The loss is a sum divided by the `tokens` of all ranks, so that neither the split into
    micro-batches nor the number of ranks changes it. Returns a report (2,): this rank's part of
    the loss, and the norm of the gradient. It stays on the device: nothing waits for a GPU.
    """
    total, micro = 0.0, blocks.split(cfg.micro_batch_size)
    for i, part in enumerate(micro):
        # forward and backward both inside: DDP decides in the forward whether to reduce
        with contextlib.nullcontext() if i == len(micro) - 1 else ddp.no_sync():
            with context:
                loss = next_token_loss(ddp, part) / tokens
            (loss * processes.world).backward()  # DDP averages over ranks
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), cfg.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # else they are made anew, beside DDP's buckets
    return torch.stack((total, norm))


def next_token_loss(model, blocks):
    """Sum of the cross-entropies of blocks (B, T + 1), in nats; rows of -1 count nothing."""
    return model(blocks[:, :-1].clamp(min=0), targets=blocks[:, 1:])


@torch.no_grad()
def held_out_losses(model, mixture, micro_batch_size: int, context, run) -> dict:
    """Mean held-out loss of each corpus, in nats a token; {} as soon as a rank is told to stop."""
    losses, (rank, world, device) = {}, run.processes
    for name in mixture.names:
        blocks, total = torch.from_numpy(mixture.held_out(name)), 0.0
        for part in blocks.split(micro_batch_size * world):  # as many on every rank
            if run.stopping():
                return {}
            mine = part[rank::world].to(device)
            with context:
                total += float(next_token_loss(model, mine)) if len(mine) else 0.0
        losses[name] = run.processes.sum(total)[0] / blocks[:, 1:].numel()
    return losses


# The rest is plumbing, for both scripts, and may be skipped: command line, processes, a run's
# folder and log, checkpoints.

# ---------------------------------------------------------------- command line


def launch(main, cls, presets: dict) -> None:
    """Runs main(config) as a script: a user's mistake is one sentence, and exit status 2."""
    for stream in sys.stdout, sys.stderr:  # a terminal need not know every character
        stream.reconfigure(errors="replace", line_buffering=True)
    status, sentence = 2, ""
    try:
        return main(parse_config(cls, presets, sys.argv[1:]))
    except UserError as error:  # raised by all ranks of a machine
        sentence = str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else ""
    except KeyboardInterrupt:  # outside of a Run
        status, sentence = 130, "stopped; the same command starts again"
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if memory or "can't allocate memory" in str(error):  # on a CPU
            sentence = "out of memory: lower --micro_batch_size (rl.py: or --sample_batch_size)"
        elif "gloo" in str(error) and "by peer" in str(error):  # a connection was closed or reset
            sentence = "another process of this run has died: its message is the one to read"
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
    if "--help" in argv:
        print(inspect.getsource(cls), "presets:", json.dumps(presets, indent=1), sep="\n")
        sys.exit(0)
    kinds, texts, flags, rest = get_type_hints(cls), {}, {}, list(argv)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        texts[name.removeprefix("--")] = text if equals or not rest else rest.pop(0)
    stored = read_config(texts["config"]) if texts.get("config") else {}
    stored.pop("run", None)  # what a run says of itself
    for name, value in (stored | texts).items():
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1, 0.5) or ["help"]
            raise UserError(f"--{name} is unknown: did you mean --{close[0]}?")
        flags[name] = parse_value(name, str(value), kinds[name])
    chosen, values = {(vars(cls) | flags).get(field) for field in ("preset", "algo")}, {}
    for words, preset in presets.items():
        values |= preset if set(words.split()) <= chosen else {}
    return cls(**values | flags)


def parse_value(name: str, text: str, kind):
    """`text` as int, float, bool, str or one of a Literal."""
    choices = {"true": True, "false": False} if kind is bool else {c: c for c in get_args(kind)}
    try:
        return choices[text.lower()] if choices else kind(text)
    except (KeyError, ValueError):
        wanted = ", ".join(choices) or {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name}={text} should be {wanted}") from None


def read_config(file) -> dict:
    """What a config.json holds."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no configuration in JSON ({error}): bring it back, or choose "
                        "another") from None


RANGES = {  # of the numbers that are not just above 0
    "tokens warmup_steps weight_decay max_steps keep_every seed": "0 <= x < inf",
    "kl_coef eval_k eval_temperature": "0 <= x < inf",
    "beta1 beta2 warmup": "0 <= x < 1",
    "min_learning_rate gae_lambda": "0 <= x <= 1",
    "top_p eval_top_p": "0 < x <= 1",
}


def check_ranges(cfg) -> None:
    """Raises UserError where a number of cfg is out of its range: the one place that knows them."""
    for name, x in vars(cfg).items():
        rule = next((r for names, r in RANGES.items() if name in names.split()), "0 < x < inf")
        if type(x) in (int, float) and not eval(rule, {"x": x, "inf": math.inf}):  # nor is NaN
            raise UserError(f"--{name}={x} is out of its range: {rule}")


# ---------------------------------------------------------------- processes


class Processes(NamedTuple):
    rank: int
    world: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the ranks; on the CPU, so that no GPU is waited for."""
        total = torch.tensor(values, dtype=torch.float64)
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
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if torch.cuda.device_count() < neighbours:
            raise UserError(f"--device=cuda: {neighbours} process(es) need a GPU each, and torch "
                            f"sees {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")
    elif neighbours > 1:
        torch.set_num_threads(max(1, cores() // neighbours))
    # glibc hands large freed blocks back to the kernel, which zeroes them again at every
    # allocation: keeping them doubles the speed of a small model
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    if not dist.is_initialized():
        group = {"timeout": datetime.timedelta(days=7)}  # while rank 0 makes a corpus
        if "RANK" not in os.environ:
            group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **group)
    return Processes(dist.get_rank(), dist.get_world_size(), place)


def autocast(dtype: str, device, amx: bool = True):
    """The autocast context of --dtype: "auto" is bfloat16 on cuda, and on a CPU with units for it
    (AMX) unless the caller gains nothing by them.
    """
    fast = device.type == "cuda" or amx and torch.cpu.get_capabilities().get("amx_bf16", False)
    enabled = dtype == "bfloat16" or dtype == "auto" and fast
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---------------------------------------------------------------- the run's folder

FREE = (  # what may change when a run continues, for its result does not depend on it
    "run preset config out_dir overwrite data_dir hub device compile micro_batch_size "
    "sample_batch_size time_limit log_every eval_every save_every keep_every "
    "init_from questions eval_questions").split()  # of these the content is compared


class Run:
    """The folder of a run: `with Run(cfg, processes, total, inputs) as run`, on all ranks.

    Within it the folder is locked, and Ctrl-C and SIGTERM are noted, for the loop to save first.
    `inputs` names what the run reads: it continues on the same content and with the same settings,
    but for FREE. Raises UserError where the folder belongs to another run.
    """

    def __init__(self, cfg, processes, total: int, inputs: dict):
        self.processes, self.total, self.overwrite = processes, total, cfg.overwrite
        self.folder, self.stop_seen = Path(cfg.out_dir), False
        self.log, self.checkpoint = self.folder / "metrics.jsonl", self.folder / "ckpt.pt"
        inputs = {f"content of {name}": fingerprint(value) for name, value in inputs.items()}
        where = {"argv": sys.argv, "torch_version": str(torch.__version__), "inputs": inputs,
                 "device": str(processes.device), "world_size": processes.world}
        self.config = dataclasses.asdict(cfg) | {"run": where}

    def __enter__(self):
        with contextlib.ExitStack() as held:
            self.processes.first(lambda: held.enter_context(self.claim()))
            hidden = self.processes.rank > 0 or None  # None: hidden unless on a terminal
            self.bar = held.enter_context(tqdm(total=self.total, unit="step", disable=hidden))
            if threading.current_thread() is threading.main_thread():
                for number in signal.SIGINT, signal.SIGTERM:
                    held.callback(signal.signal, number, signal.signal(number, self.note))
            self.held = held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.held.close()

    def note(self, number, frame) -> None:
        """Notes a signal. A second one is not held back, unless it is torchrun's copy of it."""
        self.stop_seen = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)

    def stopping(self) -> bool:
        """Whether any rank has seen a signal: all ranks stop at the same step."""
        return self.processes.sum(self.stop_seen)[0] > 0

    def claim(self):
        """Makes the folder and its config.json, or sees that they are this run's; returns the
        locked log.
        """
        folder, file, instead = self.folder, self.folder / "config.json", "choose another --out_dir"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            used = {entry for entry in folder.iterdir() if entry.stat().st_size}
            theirs = read_config(file) if file in used else {}
            run = "inputs" in theirs.get("run", {})
            if not run and used & (used if self.overwrite else {file, self.log, self.checkpoint}):
                raise UserError(f"{folder} is not the folder of a run: {instead}")
            log = open(self.log, "ab")
            if not lock(log):
                raise UserError(f"another process works in {folder}: wait for it, or {instead}")
            for entry in used - {file, self.log} if self.overwrite else ():
                if entry.is_file():
                    entry.unlink()
        if self.overwrite or not run:
            save(file, json.dumps(self.config, indent=1).encode())
        elif changes := self.changes(theirs):
            raise UserError(f"{folder} holds a run with another {changes}: {instead}, or "
                            "--overwrite=true to delete that run")
        return log

    def changes(self, theirs: dict) -> str:
        """What differs between this run's config.json and `theirs`, and must not."""
        ours, theirs = (config | config["run"]["inputs"] for config in (self.config, theirs))
        return ", ".join(f"{name} ({theirs.get(name)} there, {ours[name]} here)" for name in ours
                         if name not in FREE and theirs.get(name) != ours[name])

    def load(self) -> dict | None:
        """The checkpoint to continue from, None for a new run; a second copy of the weights, for
        the caller to drop. Rows behind it go from the log: they come again.
        """
        state, size = None, 0
        if self.checkpoint.exists():
            state = load_checkpoint(self.checkpoint, self.processes.device)
            size, self.bar.initial, self.bar.n = state["log_size"], state["step"], state["step"]
        self.processes.first(lambda: self.cut_log(size))
        return state

    def cut_log(self, size: int) -> None:
        if self.log.stat().st_size < size:
            raise UserError(f"{self.log} is shorter than when ckpt.pt was saved: bring it back, or "
                            "--overwrite=true starts afresh")
        os.truncate(self.log, size)

    def save(self, state: dict) -> None:
        """ckpt.pt, atomically. All ranks call it; what fails on rank 0 ends them all."""
        state["config"], state["log_size"] = self.config, self.log.stat().st_size
        self.processes.first(lambda: save(self.checkpoint, state))

    def write(self, row: dict) -> None:
        """Appends a row to metrics.jsonl, and shows it: a training step's in the bar, if there is
        one. Raises UserError on a number that is not finite.
        """
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            raise UserError(f"{DIVERGED}: {row}") from None
        if self.processes.rank == 0:
            with writing(self.log), open(self.log, "a") as file:
                print(line, file=file)
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)))
        if row["kind"] == "train":
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                self.say(text)

    def say(self, text: str) -> None:
        if self.processes.rank == 0:
            tqdm.write(text)


# ---------------------------------------------------------------- checkpoints

DIVERGED = ("not all numbers are finite, and the last checkpoint is kept: start again with a lower "
            "--learning_rate and another --out_dir")


@contextlib.contextmanager
def writing(path: Path):
    """What fails while `path` is written becomes a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}): mend that and start again, "
                        "what was there is intact") from None


def save(path: Path, content) -> None:
    """Writes bytes, or a state with torch.save, beside `path`, then renames: a reader sees the old
    file or the new one. Raises UserError, also where weights are not finite.
    """
    temporary, state = path.with_name(path.name + ".tmp"), isinstance(content, dict)
    for part in ("model", "critic") if state else ():
        if not all(w.isfinite().all() for w in content.get(part, {}).values()):
            raise UserError(f"{DIVERGED}: weights of the {part}")
    with writing(path):
        with open(temporary, "wb") as file:
            torch.save(content, file) if state else file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        os.replace(temporary, path)


def fingerprint(value) -> str:
    """A short checksum of a model's weights, or of plain data."""
    if isinstance(value, torch.nn.Module):
        value = {name: hashlib.sha256(weight.cpu().numpy()).hexdigest()
                 for name, weight in value.state_dict().items()}
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def load_checkpoint(path: Path, device) -> dict:
    """A state that `save` wrote; unpickles tensors and plain types only."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `torchrun pretrain.py` first, or name "
                        "another run") from None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # zipfile, pickle and torch each have errors of their own for a damaged file
        raise UserError(f"{path} is not a readable checkpoint: delete it, or name "
                        "another") from None


def model_state(model, tokenizer: str) -> dict:
    """What load_model needs."""
    return {"model": model.state_dict(), "gpt": dataclasses.asdict(model.config),
            "tokenizer": tokenizer}


def load_model(path, device) -> tuple[GPT, str]:
    """The model of a run's folder or of a .pt file, and the name of its tokenizer."""
    file = Path(path) if str(path).endswith(".pt") else Path(path) / "ckpt.pt"
    state = load_checkpoint(file, "cpu")
    try:
        model, tokenizer = GPT(GPTConfig(**state["gpt"])), state["tokenizer"]
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{file} is no checkpoint of this code: pretrain it again") from None
    return model.to(device), tokenizer


if __name__ == "__main__":
    launch(main, Config, PRESETS)
