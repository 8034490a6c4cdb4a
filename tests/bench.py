"""Measures speed and memory: `python tests/bench.py train --preset=150m`, or `verify`: a table.

The flags of a command are those of the script that it measures, so any setting can be tried.
Tables hold for the machine they were printed on, at that moment: compare within one run.
"""

import itertools
import math
import random
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain  # noqa: E402
from data import UserError, toy  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from hostile import CHEATS, CODE  # noqa: E402
from model import generate  # noqa: E402
from verify import score_batch  # noqa: E402


def show(title: str, rows: dict[str, str]) -> None:
    """Prints one table of two columns."""
    width = max(map(len, rows))
    print(title, *(f"  {name:{width}}  {value}" for name, value in rows.items()), sep="\n")


def peak_memory(device: torch.device) -> float:
    """Bytes: what torch has held on a GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if MAC else 1024)


MAC = sys.platform == "darwin"  # which counts bytes where Linux counts KiB


def train(argv: list[str]) -> None:
    """pretrain.py's own step on random tokens: the best and the median of --max_steps (10)."""
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, argv)
    processes = pretrain.setup_distributed(cfg.device)
    context, vocab_size = pretrain.autocast(cfg.dtype, processes.device), vocabulary(cfg.tokenizer)
    model = pretrain.build_model(cfg, vocab_size, processes.device)
    optimizer = pretrain.build_optimizer(cfg, model)
    ddp = pretrain.wrap(cfg, model, context, processes)
    rows = len(range(processes.rank, cfg.batch_size, processes.world))
    blocks = torch.randint(vocab_size, (rows, cfg.context + 1), device=processes.device)
    tokens, seconds = cfg.batch_size * cfg.context, []
    for _ in range(1 + (cfg.max_steps or 10)):  # the first one warms up
        started = time.perf_counter()
        report = pretrain.train_step(ddp, optimizer, blocks, tokens, 1e-3, cfg, context, processes)
        report.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    best, median = min(seconds[1:]), sorted(seconds[1:])[len(seconds[1:]) // 2]
    N, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()
    peak = pretrain.peak_flops(processes.device)
    if processes.rank > 0:
        return
    place = f"{processes.device}, {processes.world} rank(s), {torch.get_num_threads()} thread(s)"
    show(f"train --preset={cfg.preset} on {place}", {
        "parameters": f"{N:,}",
        "step": f"{cfg.batch_size} x {cfg.context} tokens, {cfg.micro_batch_size} rows at a time",
        "tokens/s": f"{tokens / best:,.0f} (median {tokens / median:,.0f})",
        "GFLOP/s": f"{flops * tokens / best / 1e9:,.1f} with attention, "
                   f"{6 * N * tokens / best / 1e9:,.1f} as 6 x parameters",
        "MFU": f"{flops * tokens / best / peak / processes.world:.1%}" if peak else "not known",
        "peak memory": f"{peak_memory(processes.device) / 1e9:.2f} GB",
    })  # fmt: skip


def vocabulary(tokenizer: str) -> int:
    """Its size; GPT-2's without fetching it."""
    return 50_257 if tokenizer == "gpt2" else get_tokenizer(tokenizer).n_vocab


LOOP = "def simple_math_problem() -> int:\n    while True:\n        pass"
LATEX = [  # an answer and another spelling of it, for every n
    (r"\frac{N\sqrt{2}}{2}", r"\frac{N}{\sqrt{2}}"), (r"(x+N)^2 - N^2", r"x^2 + 2 \cdot N x"),
    (r"\left(N, \frac{\pi}{2}\right)", r"(N, \pi/2)"), (r"N\sqrt{13}", r"\sqrt{13 \cdot N^2}"),
    (r"(-\infty, N) \cup [N+3, \infty)", r"x < N \text{ or } x \ge N+3"),
    (r"N\frac{2}{3}", r"\frac{3 \cdot N + 2}{3}"),
    (r"\begin{pmatrix} N \\ \frac{1}{2} \end{pmatrix}", r"\begin{pmatrix}N\\0.5\end{pmatrix}"),
]  # fmt: skip


def verify(argv: list[str]) -> None:
    """Completions a second through score_batch, by format, and what loops for ever cost a batch."""
    count = 4096
    stories, rng = list(itertools.islice(toy.problems("train", 0), count)), random.Random(0)
    golds = [str(story.values[-1]) for story in stories]
    rows = {"": " completions  per second  seconds    right"}

    def measure(name: str, completions: list[str], golds: list[str]) -> None:
        began = time.perf_counter()
        right = sum(score.reward for score in score_batch(completions, golds))
        seconds = time.perf_counter() - began
        speed = f"{len(completions) / seconds:12,.0f}"
        rows[name] = f"{len(completions):12,}{speed}{seconds:9.2f}{right / len(completions):9.1%}"

    written = {write.__name__.removeprefix("write_"): [write(story, rng) for story in stories]
               for write in (toy.write_tinygsm, toy.write_omi1, toy.write_omi2)}  # fmt: skip
    score_batch(written["tinygsm"], golds)  # the servers have started
    for name, completions in written.items():
        measure(name, completions, golds)
    pairs = [[side.replace("N", str(n)) for side in LATEX[n % len(LATEX)]] for n in range(count)]
    measure("text, LaTeX", [f"So it is \\boxed{{{p}}}." for p, _ in pairs], [g for _, g in pairs])
    few = written["tinygsm"][:502]
    measure("tinygsm, 512", written["tinygsm"][:512], golds[:512])
    measure("tinygsm, 10 of 512 loop", [*few[:251], *[LOOP] * 10, *few[251:]],
            [*golds[:251], *["0"] * 10, *golds[251:502]])  # fmt: skip
    hostile = [*CODE.values(), *CHEATS.values()]
    measure("hostile, none that loops", hostile, ["42"] * len(hostile))
    show("verify: completions scored", rows)


def sample(argv: list[str]) -> None:
    """Tokens a second of model.generate on random weights, best of --max_steps (3) rounds; and of
    the package transformers where it is installed: a Llama of the same shape, asked the same.

    256 prompts of 48 tokens. Mixed lengths: each token ends its completion with the probability
    at which the mean length is 30% of the limit; only tokens up to the end count.
    """
    shape = ["--width=128", "--layers=4", "--heads=4", "--init_std=0.02"]  # 1.2M parameters
    cfg = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, shape + argv)
    device = pretrain.setup_distributed(cfg.device).device
    V, B, P = vocabulary(cfg.tokenizer), 256, 48
    model = pretrain.build_model(cfg, V, device).eval()
    model.head.bias = torch.nn.Parameter(torch.zeros(V, device=device))
    prompts = torch.randint(1, V, (B, P), device=device)  # 0 is what ends a completion

    def ours(N: int, eos: int) -> int:
        seeds = [torch.Generator().manual_seed(i) for i in range(B)]
        return int(generate(model, prompts.tolist(), N, eos, seeds)[1].sum())

    engines = {"model.generate": (model.head, ours)}
    try:
        import transformers

        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=V, hidden_size=cfg.width, intermediate_size=4 * cfg.width,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, eos_token_id=None,
            tie_word_embeddings=cfg.tied)).to(device).eval()  # fmt: skip
        llama.lm_head.bias = torch.nn.Parameter(torch.zeros(V, device=device))

        def theirs(N: int, eos: int) -> int:
            ends = {} if eos < 0 else {"eos_token_id": eos, "pad_token_id": eos}
            ids = llama.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                                 top_k=0, max_new_tokens=N, **ends)[:, P:]  # fmt: skip
            return int(((ids == eos).cumsum(1) - (ids == eos).long() == 0).sum())

        engines["transformers"] = llama.lm_head, theirs
    except ImportError:
        pass

    speeds, lengths = {}, {}
    for _ in range(
        cfg.max_steps or 3
    ):  # in turns: what else the machine does slows all of them alike
        for N, eos in ((64, -1), (160, -1), (64, 0), (160, 0)):
            for name, (head, run) in engines.items():
                p = 3.2 / N
                head.bias.data[0] = math.log((V - 1) * p / (1 - p)) if eos == 0 else 0.0
                began = time.perf_counter()
                with pretrain.autocast(cfg.dtype, device):
                    tokens = run(N, eos)
                row = f"{name}, {N} {'at most' if eos == 0 else 'tokens'}"
                speeds.setdefault(row, []).append(tokens / (time.perf_counter() - began))
                lengths.setdefault(row, []).append(tokens / B)
    N = sum(p.numel() for p in model.parameters())
    show(f"sample: {B} prompts of {P} tokens, {N:,} parameters, {device}, "
         f"{torch.get_num_threads()} thread(s)",
         {row: f"{max(s):9,.0f} tokens/s, mean length {sum(lengths[row]) / len(s):5.1f}"
          for row, s in speeds.items()})  # fmt: skip


COMMANDS = {"train": train, "verify": verify, "sample": sample}

if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        sys.exit(f"usage: python tests/bench.py {'|'.join(COMMANDS)} [--key=value ...]")
    try:
        COMMANDS[name](argv)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
