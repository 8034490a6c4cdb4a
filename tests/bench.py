"""Measures speed and memory: `python tests/bench.py train --preset=150m`, or `verify`, `rl`,
`memory`: a table.

The flags of a command are those of the script that it measures, so any setting can be tried.
Tables hold for the machine they were printed on, at that moment: compare within one run.
"""

import copy
import itertools
import math
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pretrain  # noqa: E402
import rl as echo  # noqa: E402  for a command is called rl
from data import UserError, toy  # noqa: E402
from data.tasks import Question  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from hostile import CHEATS, CODE  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402
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
    score_batch(written["tinygsm"], golds)  # the workers have started
    for name, completions in written.items():
        measure(name, completions, golds)
    imports = [f"import collections\n{text}" for text in written["tinygsm"][:1024]]
    measure("tinygsm, imports", imports, golds[:1024])
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
    for _ in range(cfg.max_steps or 3):  # in turns: what slows the machine slows all alike
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


def rl(argv: list[str]) -> None:
    """A step of rl.py, grpo on 256 completions of 60 tokens after prompts of 48 by a GPT of 1.2M
    random weights: the best and the median of --max_steps (5). The verifier reads what the toy's
    authors wrote, as a trained model would. Where the package trl is installed, a step of its
    GRPOTrainer too.
    """
    defaults = ["--algo=grpo", "--max_new_tokens=60", "--max_steps=5"]
    cfg = pretrain.parse_config(echo.Config, echo.PRESETS, [*defaults, *argv])
    processes, encoding = pretrain.setup_distributed(cfg.device), get_tokenizer("toy")
    shape, context = (
        dict(width=128, layers=4, heads=4),
        pretrain.autocast(cfg.dtype, processes.device),
    )
    base = pretrain.build_model(pretrain.Config(**shape), encoding.n_vocab, processes.device)
    network = echo.Policy(copy.deepcopy(base), cfg.temperature)
    policy = echo.Trainer(network, cfg.learning_rate, cfg, processes)
    reference = echo.Policy(base, cfg.temperature).requires_grad_(False)
    rng, stories = random.Random(0), toy.problems("train", 0)
    asked = [next(stories) for _ in range(cfg.prompts_per_step)]
    pairs = [(Question("", "", str(story.values[-1])), [rng.randrange(800) for _ in range(48)])
             for story in asked]  # fmt: skip
    asked, pairs = ([x for x in xs for _ in range(cfg.group_size)] for xs in (asked, pairs))
    authors, steps = (toy.write_tinygsm, toy.write_omi1, toy.write_omi2), []
    mine = [rng.choice(authors)(rng.choice((story, asked[0])), rng) for story in asked]
    mine = mine[processes.rank :: processes.world]
    written = mock.patch.object(echo, "score_batch", lambda _, *rest: score_batch(mine, *rest))
    for step in range(cfg.max_steps + 1):  # the first one warms up
        seconds, key = {"sample": 0.0, "verify": 0.0}, (cfg.seed, "bench", step)
        with context, written:
            rollout = echo.roll_out(
                network.gpt, pairs, key, cfg, False, encoding, processes, seconds
            )
        began = time.perf_counter()
        echo.learn(rollout, 0, policy, None, reference, cfg, context, processes)
        seconds["update"] = time.perf_counter() - began
        steps.append({**seconds, "total": sum(seconds.values())})
    if processes.rank > 0:
        return
    tokens = sum(map(len, rollout.completions)) / len(pairs)
    rows = {"parameters": f"{sum(p.numel() for p in base.parameters()):,}",
            "completions": f"{len(pairs)} of {tokens:.0f} tokens"}  # fmt: skip
    for name in steps[0]:
        found = sorted(step[name] for step in steps[1:])
        rows[name] = f"{found[0]:.2f} s (median {found[len(found) // 2]:.2f})"
    try:
        if processes.world == 1:
            theirs = sorted(trl_seconds(cfg, base, [ids for _, ids in pairs[:: cfg.group_size]]))
            rows["TRL's total"] = f"{theirs[0]:.2f} s (median {theirs[len(theirs) // 2]:.2f})"
    except ImportError:
        pass
    threads = torch.get_num_threads()
    show(f"rl on {processes.device}, {processes.world} rank(s), {threads} thread(s)", rows)


def trl_seconds(cfg, gpt: GPT, prompts: list[list[int]]) -> list[float]:
    """Seconds of cfg.max_steps steps, each a rollout and its updates, of TRL's GRPOTrainer with
    cfg's settings on a Llama of the shape of `gpt`. It reads text only: token n is the word wn.
    """
    import datasets
    import tokenizers
    import transformers
    import trl

    c, ends, rng = gpt.config, [time.perf_counter()], random.Random(0)
    words = {f"w{n}": n for n in range(c.vocab_size)}
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, eos_token="w0", pad_token="w0", padding_side="left")  # fmt: skip
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=4 * c.width,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, tie_word_embeddings=c.tied,
        eos_token_id=0, pad_token_id=0))  # fmt: skip

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    asked = [{"prompt": " ".join(f"w{n}" for n in ids)} for ids in prompts]
    rollout, micro = len(prompts) * cfg.group_size, min(cfg.micro_batch_size, cfg.minibatch_size)
    updates = rollout // cfg.minibatch_size
    with tempfile.TemporaryDirectory() as folder:
        llama.save_pretrained(folder)  # its trainer reads policy and reference from there
        settings = trl.GRPOConfig(
            folder, per_device_train_batch_size=micro, steps_per_generation=rollout // micro,
            gradient_accumulation_steps=cfg.minibatch_size // micro, beta=cfg.kl_coef,
            num_generations=cfg.group_size, max_completion_length=cfg.max_new_tokens,
            max_steps=updates * (cfg.max_steps + 1), bf16=False, gradient_checkpointing=False,
            use_cpu=gpt.embed.weight.device.type == "cpu", disable_tqdm=True, report_to=[],
            save_strategy="no", logging_strategy="no")  # fmt: skip
        trl.GRPOTrainer(
            folder, lambda completions, **_: [rng.random() for _ in completions], settings,
            datasets.Dataset.from_list(asked), processing_class=tokenizer, callbacks=[Clock()],
        ).train()  # fmt: skip
    ends = ends[updates::updates]  # the first step warms up
    return [after - before for before, after in zip(ends, ends[1:])]


def activation_bytes(c: GPTConfig, rows: int, prompts: int, P: int, T: int, narrow: int) -> int:
    """What the policy's forward pass keeps for its backward pass: `rows` completions of T tokens
    that share `prompts` of P.

    A layer keeps, in numbers of C a token: the inputs of two LayerNorms, in fp32; in `narrow`
    bytes each (4, or 2 under bf16 autocast) their outputs (2), q turned (1), attention's output
    (1), gate, silu(gate), up and their product (4 x 4); for each row all its keys and values (2),
    and for the prompts themselves q, k and v as projected and k turned (4). The last LayerNorm
    keeps its input, the head its input, and all layers share the mask.
    """
    tokens, keys = prompts * P + rows * T, rows * (P + T)
    layer = tokens * (2 * 4 + 20 * narrow) + (2 * keys + 4 * prompts * P) * narrow
    return c.width * (c.layers * layer + 8 * tokens) + T * keys * narrow


def memory(argv: list[str]) -> None:
    """What rl.py needs on a GPU in bf16, for each preset of pretrain.py and each algorithm, and
    the largest batches that fit one (powers of two): computed, not measured.

    Rows are of a prompt of 256 tokens and --max_new_tokens. A tenth of a GPU is kept free for
    what comes and goes, and half a GB for CUDA.
    """
    for preset in ("20m", "60m", "150m", "1b"):
        gpt = pretrain.parse_config(pretrain.Config, pretrain.PRESETS, [f"--preset={preset}"])
        with torch.device("meta"):
            model = pretrain.build_model(gpt, 50_257, torch.device("meta"))
        c, N = model.config, sum(p.numel() for p in model.parameters())
        for algo in ("ppo", "grpo", "ei"):
            flags = ["--preset=paper", *argv, f"--algo={algo}"]
            cfg = pretrain.parse_config(echo.Config, echo.PRESETS, flags)
            tokens = min(c.context, 256 + cfg.max_new_tokens)
            critic = sum(p.numel() for p in echo.Critic(model).parameters()) * (algo == "ppo")
            # keys and values in bf16, twice while the cache is copied; logits in fp32, three times
            row = 2 * 2 * 2 * c.layers * c.width * tokens + 3 * 4 * c.vocab_size
            kept = activation_bytes(c, 1, 1, 256, tokens - 256, 2)  # no prompt is shared: the worst
            fixed = {"weights": 4 * N, "gradients": 4 * N, "AdamW": 8 * N, "critic": 16 * critic,
                     "reference": 4 * N, "bf16 copies": 2 * max(N, critic),
                     "logits of a chunk": 3 * 4 * 512 * c.vocab_size}  # fmt: skip
            micro, sample = cfg.micro_batch_size, cfg.sample_batch_size
            varying = {f"KV cache, logits of {sample} rows": sample * row,
                       f"activations of {micro} rows": micro * kept}  # fmt: skip
            rows = {name: f"{size / 1e9:6.2f} GB" for name, size in (fixed | varying).items()}
            for size in (8, 24, 48, 80):
                free = 0.9e9 * size - 0.5e9 - sum(fixed.values())
                micro = power_of_two(free / kept, cfg.minibatch_size)
                sample = power_of_two(free / row, cfg.prompts_per_step * cfg.group_size)
                flags = f"--micro_batch_size={micro} --sample_batch_size={sample}"
                rows[f"fits {size:2} GB"] = flags if min(micro, sample) else "does not fit"
            show(f"{preset}, {N / 1e6:.0f}M parameters, {algo}, rows of {tokens} tokens", rows)


def power_of_two(room: float, most: int) -> int:
    """The largest up to `room` and `most`; 0 where there is none."""
    return 1 << int(min(room, most)).bit_length() - 1 if min(room, most) >= 1 else 0


COMMANDS = {"train": train, "verify": verify, "sample": sample, "rl": rl, "memory": memory}

if __name__ == "__main__":
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        sys.exit(f"usage: python tests/bench.py {'|'.join(COMMANDS)} [--key=value ...]")
    try:
        COMMANDS[name](argv)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
