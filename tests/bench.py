"""Measures speed and memory: `python tests/bench.py train --preset=150m`, or `verify`, `rl`,
`memory`: a table.

The flags of a command are those of the script that it measures, so any setting can be tried.
Tables hold for the machine they were printed on, at that moment: compare within one run.
"""

import contextlib
import copy
import itertools
import math
import random
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain  # noqa: E402  before torch: it sets how threads wait
import torch  # noqa: E402

import rl as echo  # noqa: E402  for a command is called rl
from data import toy  # noqa: E402
from data.tasks import Question  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from hostile import CHEATS, CODE  # noqa: E402
from model import generate  # noqa: E402
from verify import score_batch  # noqa: E402

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def show(title: str, rows: dict[str, str], processes=None) -> None:
    """Prints one table of two columns, on rank 0; the title says on what it was measured."""
    if processes:
        threads = torch.get_num_threads()
        title += f" on {processes.device}, {processes.world} rank(s), {threads} thread(s)"
    width = max(map(len, rows))
    if not processes or processes.rank == 0:
        print(title, *(f"  {name:{width}}  {value}" for name, value in rows.items()), sep="\n")


def best_and_median(values) -> tuple[float, float]:
    """Of all but the first one, which warms up."""
    values = sorted(values[1:])
    return values[0], values[len(values) // 2]


def peak_memory(device: torch.device) -> float:
    """Bytes: what torch has held on a GPU, or the process on a CPU; NaN where no one counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return math.nan


def train(cfg, processes) -> None:
    """pretrain.py's own step on random tokens: the best and the median of --max_steps."""
    device, vocab_size = processes.device, vocabulary(cfg.tokenizer)
    model = pretrain.build_model(cfg, vocab_size, device)
    context = pretrain.autocast(cfg.dtype, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    module = pretrain.compiled(model, device) if cfg.compile else model
    rows = len(range(processes.rank, cfg.batch_size, processes.world))
    blocks = torch.randint(vocab_size, (rows, cfg.context + 1), device=device)
    tokens, seconds = cfg.batch_size * cfg.context, []
    for _ in range(1 + cfg.max_steps):
        started = time.perf_counter()
        _, norm = pretrain.update(
            optimizer, blocks.split(cfg.micro_batch_size),
            lambda part: pretrain.next_token_loss(module, part) / tokens, 1e-3, 1.0, context)
        norm.item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    best, median = best_and_median(seconds)
    N, looked_up = (sum(p.numel() for p in part.parameters()) for part in (model, model.embed))
    # forward and backward, 6N + 12 L C T a token (arXiv 2204.02311, B); no product looks up
    multiplied = 6 * (N - looked_up * (not cfg.tied)) + 12 * cfg.layers * cfg.width * cfg.context
    flops = multiplied * tokens / best
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)  # of a rank, in bf16
    show(f"train --preset={cfg.preset}", {
        "parameters": f"{N:,}",
        "step": f"{cfg.batch_size} x {cfg.context} tokens, {cfg.micro_batch_size} rows at a time",
        "tokens/s": f"{tokens / best:,.0f} (median {tokens / median:,.0f})",
        "GFLOP/s": f"{flops / 1e9:,.1f} with attention, "
                   f"{6 * N * tokens / best / 1e9:,.1f} as 6 x parameters",
        "MFU": f"{flops / peak / processes.world:.1%}" if peak else "not known",
        "peak memory": f"{peak_memory(device) / 1e9:.2f} GB",
    }, processes)


def vocabulary(tokenizer: str) -> int:
    """Its size; GPT-2's without fetching it."""
    return 50_257 if tokenizer == "gpt2" else get_tokenizer(tokenizer).n_vocab


AUTHORS = toy.write_tinygsm, toy.write_omi1, toy.write_omi2
LOOP = "def simple_math_problem() -> int:\n    while True:\n        pass"
LATEX = [  # an answer and another spelling of it, for every n
    (r"\frac{N\sqrt{2}}{2}", r"\frac{N}{\sqrt{2}}"), (r"(x+N)^2 - N^2", r"x^2 + 2 \cdot N x"),
    (r"\left(N, \frac{\pi}{2}\right)", r"(N, \pi/2)"), (r"N\sqrt{13}", r"\sqrt{13 \cdot N^2}"),
    (r"(-\infty, N) \cup [N+3, \infty)", r"x < N \text{ or } x \ge N+3"),
    (r"N\frac{2}{3}", r"\frac{3 \cdot N + 2}{3}"),
    (r"\begin{pmatrix} N \\ \frac{1}{2} \end{pmatrix}", r"\begin{pmatrix}N\\0.5\end{pmatrix}"),
]


def verify(cfg, processes) -> None:
    """Completions a second through score_batch, by format, and what loops for ever cost a batch."""
    count = 4096
    stories, rng = list(itertools.islice(toy.problems("train", 0), count)), random.Random(0)
    golds = [str(story.values[-1]) for story in stories]
    tinygsm, omi1, omi2 = ([write(story, rng) for story in stories] for write in AUTHORS)
    sides = [[side.replace("N", str(n)) for side in LATEX[n % len(LATEX)]] for n in range(count)]
    latex = [f"So it is \\boxed{{{prediction}}}." for prediction, _ in sides]
    hostile = [*CODE.values(), *CHEATS.values()]
    rows = {"": " completions  per second  seconds    right"}
    score_batch(tinygsm, golds)  # the workers have started
    for name, completions, golds in (
        ("tinygsm", tinygsm, golds), ("omi1", omi1, golds), ("omi2", omi2, golds),
        ("tinygsm, imports", ["import collections\n" + text for text in tinygsm[:1024]], golds),
        ("text, LaTeX", latex, [gold for _, gold in sides]),
        ("tinygsm, 512", tinygsm[:512], golds),
        ("tinygsm, 10 of 512 loop", [*tinygsm[:251], *[LOOP] * 10, *tinygsm[261:512]], golds),
        ("hostile, none that loops", hostile, ["42"] * len(hostile)),
    ):
        began, n = time.perf_counter(), len(completions)
        right = sum(score.reward for score in score_batch(completions, golds[:n]))
        seconds = time.perf_counter() - began
        rows[name] = f"{n:12,}{n / seconds:12,.0f}{seconds:9.2f}{right / n:9.1%}"
    show("verify: completions scored", rows)


def sample(cfg, processes) -> None:
    """Tokens a second of model.generate on random weights, best of --max_steps rounds.

    256 prompts of 48 tokens. Mixed lengths: each token ends its completion with the probability
    at which the mean length is 30% of the limit; only tokens up to the end count."""
    device, V, B, P = processes.device, vocabulary(cfg.tokenizer), 256, 48
    model = pretrain.build_model(cfg, V, device).eval()
    model.head.bias = torch.nn.Parameter(torch.zeros(V, device=device))
    prompts = torch.randint(1, V, (B, P)).tolist()  # 0 is what ends a completion
    rows = {}
    for N, eos in ((64, -1), (160, -1), (64, 0), (160, 0)):
        p, seconds = 3.2 / N, []
        model.head.bias.data[0] = math.log((V - 1) * p / (1 - p)) if eos == 0 else 0.0
        for _ in range(cfg.max_steps):
            generators = [torch.Generator().manual_seed(i) for i in range(B)]
            began = time.perf_counter()
            with pretrain.autocast(cfg.dtype, device):
                tokens = int(generate(model, prompts, N, eos, generators)[1].sum())
            seconds.append(time.perf_counter() - began)
        rows[f"{N} {'at most' if eos == 0 else 'tokens'}"] = (
            f"{tokens / min(seconds):9,.0f} tokens/s, mean length {tokens / B:5.1f}")
    N = sum(p.numel() for p in model.parameters())
    show(f"sample: {B} prompts of {P} tokens, {N:,} parameters", rows, processes)


def rl(cfg, processes) -> None:
    """A step of rl.py on 256 completions after prompts of 48 tokens, by a GPT of random weights:
    the best and the median of --max_steps. The verifier reads what the toy's authors wrote, as a
    trained model would.
    """
    encoding, shape = get_tokenizer("toy"), pretrain.Config(width=128, layers=4, heads=4)
    base = pretrain.build_model(shape, encoding.n_vocab, processes.device)
    nothing = mock.Mock(processes=processes, stop_seen=False, **{"stopping.return_value": False})
    lab = echo.Lab(cfg, nothing, encoding, pretrain.autocast(cfg.dtype, processes.device))
    policy = echo.Trainer(echo.Policy(copy.deepcopy(base), cfg.temperature), 1e-4)
    critic = cfg.algo == "ppo" and echo.Trainer(echo.Critic(base), 1e-4)
    reference, rng = echo.Policy(base, cfg.temperature), random.Random(0)
    stories = list(itertools.islice(toy.problems("train", 0), cfg.prompts_per_step))
    asked = [(Question("", "", str(story.values[-1])), [rng.randrange(800) for _ in range(48)])
             for story in stories]
    asked = [pair for pair in asked for _ in range(cfg.group_size)]  # one prompt for a group
    mine = [rng.choice(AUTHORS)(rng.choice((story, stories[0])), rng)
            for story in stories for _ in range(cfg.group_size)][processes.rank :: processes.world]
    echo.score_batch, steps = lambda _, *rest: score_batch(mine, *rest), []
    for step in range(cfg.max_steps + 1):
        key = cfg.seed, "bench", step
        rows, seconds = echo.roll_out(
            policy.module.gpt, asked, key, cfg.temperature, 1.0, cfg.task, lab)
        began = time.perf_counter()
        echo.learn(rows, 0, policy, critic, reference, lab)
        seconds["update"] = time.perf_counter() - began
        steps.append({**seconds, "total": sum(seconds.values())})
    length = sum(len(row.completion) for row in rows) / len(rows)
    found = {"parameters": f"{sum(p.numel() for p in base.parameters()):,}",
             "completions": f"{len(rows)} of {length:.0f} tokens"}
    for name in steps[0]:
        best, median = best_and_median([step[name] for step in steps])
        found[name] = f"{best:.2f} s (median {median:.2f})"
    show(f"rl --algo={cfg.algo}", found, processes)


def memory(cfg, processes) -> None:
    """What rl.py needs on a GPU in bf16, for each preset of pretrain.py and each algorithm, and
    the largest batches that fit one (powers of two): computed, not measured.

    Rows are of a prompt of 256 tokens and --max_new_tokens. A tenth of a GPU is kept free for
    what comes and goes, and half a GB for CUDA. A layer keeps for the backward pass, in numbers
    of C a token: the inputs of two LayerNorms, in fp32; in bf16 their outputs (2), q turned (1),
    attention's output (1), gate, silu(gate), up and their product (4 x 4), all keys and values
    (2); and for the prompt q, k and v as projected and k turned (4). The last LayerNorm keeps its
    input, the head its input, and all layers share the mask."""
    def power_of_two(room: float, most: int) -> int:  # up to both; 0 where there is none
        return (1 << int(max(0, min(room, most))).bit_length()) >> 1

    for preset in ("20m", "60m", "150m", "1b"):
        gpt = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [f"--preset={preset}"])
        with torch.device("meta"):
            model = pretrain.build_model(gpt, 50_257, "meta")
        c, N = model.config, sum(p.numel() for p in model.parameters())
        for algo in ("ppo", "grpo", "ei"):
            flags = [*sys.argv[1:], f"--algo={algo}"]
            cfg = pretrain.parse_config(echo.Config, echo.PRESETS, flags)
            tokens = min(c.context, 256 + cfg.max_new_tokens)
            critic = sum(p.numel() for p in echo.Critic(model).parameters()) * (algo == "ppo")
            # keys and values in bf16, twice while the cache is copied; logits in fp32, three times
            row = 2 * 2 * 2 * c.layers * c.width * tokens + 3 * 4 * c.vocab_size
            layer = tokens * (2 * 4 + (20 + 2) * 2) + 4 * 256 * 2  # no prompt is shared: the worst
            kept = c.width * (c.layers * layer + 8 * tokens) + (tokens - 256) * tokens * 2
            fixed = {"weights": 4 * N, "gradients": 4 * N, "AdamW": 8 * N, "critic": 16 * critic,
                     "reference": 4 * N, "bf16 copies": 2 * max(N, critic),
                     "logits of a chunk": 3 * 4 * 2048 * c.vocab_size}
            micro, sample = cfg.micro_batch_size, cfg.sample_batch_size
            parts = fixed | {f"KV cache, logits of {sample} rows": sample * row,
                             f"activations of {micro} rows": micro * kept}
            rows = {name: f"{size / 1e9:6.2f} GB" for name, size in parts.items()}
            for size in (8, 24, 48, 80):
                free = 0.9e9 * size - 0.5e9 - sum(fixed.values())
                micro = power_of_two(free / kept, cfg.minibatch_size)
                sample = power_of_two(free / row, cfg.prompts_per_step * cfg.group_size)
                flags = f"--micro_batch_size={micro} --sample_batch_size={sample}"
                rows[f"fits {size:2} GB"] = flags if min(micro, sample) else "does not fit"
            show(f"{preset}, {N / 1e6:.0f}M parameters, {algo}, rows of {tokens} tokens", rows)


COMMANDS = {  # what it runs, the script whose flags it takes, and its own defaults for them
    "train": (train, pretrain, "--max_steps=10"),
    "verify": (verify, pretrain, ""),
    "sample": (sample, pretrain, "--width=128 --layers=4 --heads=4 --init_std=0.02 --max_steps=3"),
    "rl": (rl, echo, "--algo=grpo --max_new_tokens=60 --max_steps=5"),
    "memory": (memory, echo, "--preset=paper"),
}

if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        sys.exit(f"usage: python tests/bench.py {'|'.join(COMMANDS)} [--key=value ...]")
    command, script, defaults = COMMANDS[name]
    sys.argv[1:] = [*defaults.split(), *argv]
    pretrain.launch(lambda cfg: command(cfg, pretrain.setup_distributed(cfg.device)),
                    script.Config, script.PRESETS)
