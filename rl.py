"""Fine-tunes a pretrained GPT on questions with a verifiable answer:
`torchrun rl.py --algo=ppo|grpo|reinforce|ei`; `--algo=eval` only evaluates.

Reads the run of pretrain.py (--init_from) and writes out_dir: config.json, metrics.jsonl, ckpt.pt,
step_NNNNNN.pt, samples_NNNNNN.jsonl, echo.png. Run it again to continue an unfinished run.
Deviations from the textbook: a completion cut at max_new_tokens counts as ended; grpo's loss too is
a mean over tokens, and ppo's advantages are whitened; every rank holds the whole rollout (ids are
small), so that no statistic depends on their number.
"""

import copy
import dataclasses
import importlib.util
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pretrain import (  # first: it sets how threads wait, which torch reads when it is imported
    Run, autocast, check_ranges, compiled, launch, load_model, model_state, save, schedule,
    setup_distributed, update)

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

from data import UserError
from data.files import write_atomically
from data.mixture import generator, pick_prompts
from data.tasks import VERIFIERS, Question, fitting, load_run_questions
from data.tokenizer import get_tokenizer
from model import GPT, SharedPrompts, distinct, generate, token_logps
from verify import Score, score_batch, shares, summarize, table


@dataclass
class Config:
    preset: Literal["tiny", "paper"] = "tiny"  # fills in the fields that PRESETS names
    config: str = ""  # a .json of these fields, such as another run's config.json
    algo: Literal["ppo", "grpo", "reinforce", "ei", "eval"] = "ppo"  # eval: no training
    init_from: str = "out/pretrain"  # the base: a run's folder, or a .pt file of one
    out_dir: str = ""  # the run's folder; empty: out/ALGO, out/eval-TASK for eval
    overwrite: bool = False  # true deletes what is in out_dir and starts afresh
    task: str = "toy"  # toy, toy-hard, gsm8k or math; for eval also math500, aime, aime24
    eval_task: str = ""  # questions to evaluate on; empty: the test questions of task
    questions: str = ""  # json or jsonl file in place of the task's own questions
    eval_questions: str = ""  # likewise for evaluation; else a tenth of --questions is held out
    hub: str = ""  # a folder with the hub's layout, read instead of the hub
    prompts_per_step: int = 32  # questions of a rollout, all ranks together
    group_size: int = 8  # G, completions of a question
    max_new_tokens: int = 80  # longest completion
    temperature: float = 1.0  # of rollouts, and of the log-probs that are trained
    top_p: float = 1.0  # ei: nucleus of rollouts; the others train the whole distribution: 1
    minibatch_size: int = 64  # completions of an update at most, all ranks together
    micro_batch_size: int = 32  # completions of one forward pass on one rank
    epochs: int = 1  # passes over a rollout
    learning_rate: float = 3e-4  # peak, of the policy
    critic_learning_rate: float = 3e-4  # ppo: peak, of the critic
    warmup: float = 0.03  # share of the schedule in which the learning rate rises
    min_learning_rate: float = 0.1  # at the end of the cosine, as a fraction of the peak
    kl_coef: float = 0.03  # of the KL to the base; ppo: in the reward, grpo, reinforce: in the loss
    clip_eps: float = 0.2  # ppo, grpo: of the probability ratio
    gae_lambda: float = 1.0  # ppo: of generalised advantage estimation
    restart_from_base: bool = True  # ei: each round trains the base; false: the last policy
    grad_clip: float = 1.0  # largest norm of a gradient
    max_steps: int = 48  # rollouts, each with its updates; ei: rounds
    eval_every: int = 8  # steps between evaluations
    eval_k: int = 8  # samples a question for pass@k and maj@k
    eval_temperature: float = 1.0  # of those samples
    eval_top_p: float = 1.0  # nucleus of those samples
    sample_batch_size: int = 256  # completions decoded together on one rank
    time_limit: float = 1.0  # seconds that one program of a completion may run
    save_every: int = 6  # steps between checkpoints
    log_every: int = 1  # steps between metric rows
    seed: int = 0  # of the order of questions and of every sample
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda
    compile: bool = False  # torch.compile of the policy's updates; needs a C++ compiler


ROUNDS = dict(epochs=2, max_steps=3, eval_every=1, save_every=1)  # of Expert Iteration
PAPER = dict(task="gsm8k", max_new_tokens=1024, micro_batch_size=8, eval_k=64)
PAPER |= dict(eval_temperature=0.7, eval_top_p=0.95)
PRESETS = {  # every entry applies whose words are among the chosen preset and algo
    "tiny": {},
    "tiny ei": dict(ROUNDS, prompts_per_step=512, learning_rate=1e-3),
    "paper": dict(
        PAPER, prompts_per_step=64, temperature=0.7, learning_rate=1e-6, critic_learning_rate=7e-6,
        min_learning_rate=1.0, kl_coef=0.001, gae_lambda=0.95, max_steps=1168, eval_every=117,
        save_every=50),
    "paper ei": dict(
        ROUNDS, prompts_per_step=7473, group_size=64, temperature=1.0, top_p=0.95,
        minibatch_size=256, learning_rate=1e-4, min_learning_rate=0.1),
}


def on_policy(cfg) -> bool:
    """Whether updates ask what the policy that sampled would say; imitation does not."""
    return cfg.algo in ("ppo", "grpo", "reinforce")


def check(cfg: Config) -> None:
    """Raises UserError on settings that cannot work together, before anything is loaded."""
    check_ranges(cfg)
    if cfg.algo in ("grpo", "reinforce") and cfg.group_size < 2:
        raise UserError(f"--group_size=1 gives {cfg.algo} nothing to compare: use 2 or more")
    if on_policy(cfg) and cfg.top_p != 1:
        raise UserError(f"--top_p={cfg.top_p}: {cfg.algo} trains the untruncated distribution, so "
                        "it must sample from it: use --top_p=1")
    if on_policy(cfg) and cfg.minibatch_size % cfg.group_size:
        raise UserError(f"--minibatch_size={cfg.minibatch_size} would tear groups apart: use a "
                        f"multiple of --group_size={cfg.group_size}")
    for package in ("matplotlib", "pydantic_monty"):  # better missed now than later
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is missing: pip install -r requirements.txt")


# ---------------------------------------------------------------- the algorithms
#
# algo       advantage of a token            loss of a token          extra network
# ppo        GAE from the critic, KL in r    clipped ratio + value    critic
# grpo       (r - group mean) / group std    clipped ratio + k3 KL    none, but the base for the KL
# reinforce  r - group mean                  -logp advantage + k3 KL  as grpo
# ei         1 if correct and unseen else 0  -logp                    none
#
# A loss is the sum over the tokens of a minibatch, divided by their number. Every function here is
# pure; what is of tokens is (B, T), of completions (B,) or (N,).


def k3(logp, ref_logp):
    """e^d - d - 1, d = log(ref / pi): an unbiased estimate of KL(pi, ref) where pi sampled, never
    negative (Schulman 2020). In a loss its gradient is that of KL(ref, pi), which pulls alike.
    """
    d = ref_logp - logp
    return d.exp() - d - 1


def group_advantage(reward, group_size: int, scale: bool) -> torch.Tensor:
    """r - mean of each reward (N,) within its group, divided by the group's std (arXiv 2402.03300,
    section 4.1.2) where `scale` (arXiv 2503.20783 argues against).

    A group whose rewards are all equal says nothing, and gets exact zeros.
    """
    groups = reward.view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        centered = centered / groups.std(dim=1, keepdim=True)
    differ = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    return torch.where(differ, centered, 0.0).flatten()


def first_correct(rows: list) -> torch.Tensor:
    """1 for each correct completion that its question has not had before here, else 0; (N,)."""
    seen, advantage = set(), []
    for row in rows:
        key = (tuple(row.prompt), row.completion.tobytes())
        advantage.append(float(row.score.reward == 1 and key not in seen))
        seen.add(key)
    return torch.tensor(advantage)


def token_rewards(reward, old_logp, ref_logp, mask, kl_coef: float):
    """Rewards (B, T): that of the completion (B,) on its last token, and on every one -kl_coef k1,
    k1 = log(pi / ref) (arXiv 2203.02155, equation 2). In a loss k1 would teach nothing: there its
    gradient is zero in expectation.
    """
    last = torch.arange(mask.size(1), device=mask.device) == mask.sum(dim=1)[:, None] - 1
    return reward[:, None] * last - kl_coef * (old_logp - ref_logp) * mask


def gae(reward, value, mask, lam: float) -> tuple:
    """Generalised advantage estimation without discount (arXiv 1506.02438, equation 16); (B, T).

    delta_t = r_t + V_{t+1} - V_t, A_t = delta_t + lambda A_{t+1}; V and A are 0 behind the last
    token. Returns the advantages and the returns A_t + V_t, both zero outside the mask.
    """
    advantage = torch.zeros_like(value)
    next_advantage, next_value = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(value.size(1))):
        delta = reward[:, t] + next_value - value[:, t]
        next_advantage = advantage[:, t] = (delta + lam * next_advantage) * mask[:, t]
        next_value = value[:, t] * mask[:, t]
    return advantage, (advantage + value) * mask


def clipped(logp, old_logp, advantage, clip_eps: float) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(logp - old_logp) (arXiv 1707.06347,
    equation 7).
    """
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)


def clipped_value(value, old_value, returns, clip: float = 0.2) -> torch.Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped within `clip` of the old value
    (openai/baselines, ppo2).
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max((value - returns) ** 2, (near - returns) ** 2) / 2


def policy_loss(batch, logp, cfg):
    """The loss (B, T) of each token, of the log-probs that the policy gives it now."""
    if cfg.algo in ("ppo", "grpo"):
        loss = clipped(logp, batch.old_logp, batch.advantage, cfg.clip_eps)
    else:  # Williams 1992; of ei, imitation
        loss = -logp * batch.advantage
    if cfg.algo in ("grpo", "reinforce") and cfg.kl_coef:
        loss = loss + cfg.kl_coef * k3(logp, batch.ref_logp)
    return loss


def row_advantage(rows: list, cfg) -> torch.Tensor:
    """The advantage (N,) of all tokens of each completion; ppo makes its own for each token."""
    reward = torch.tensor([row.score.reward for row in rows])
    if cfg.algo in ("grpo", "reinforce"):
        return group_advantage(reward, cfg.group_size, scale=cfg.algo == "grpo")
    return first_correct(rows) if cfg.algo == "ei" else reward


# ---------------------------------------------------------------- rollouts


class Lab(NamedTuple):
    """What a run has at hand everywhere."""

    cfg: Config
    run: Run
    encoding: object  # of the base's tokenizer
    autocast: torch.autocast


class Stopped(Exception):
    """Some rank was told to stop: raised on all, between batches of a rollout or behind a step."""


class Row(NamedTuple):
    """One completion of a question. A rollout is a list of rows, those of a question together."""

    question: Question
    prompt: list[int]  # ids
    completion: np.ndarray  # int32 ids, up to the first end-of-text token and with it
    text: str
    score: Score
    logp: float  # of the whole completion, as the sampler saw it


def roll_out(model: GPT, asked: list, key: tuple, temperature: float, top_p: float, task: str,
             lab: Lab):
    """Rows for `asked`, a list of (question, ids) of a task, and the seconds that took. Each rank
    samples and verifies its share, all get all.

    Every completion has a random generator of its own, seeded by `key` and its place: neither the
    number of ranks nor the size of a batch changes what is sampled.
    """
    cfg, run, end, started = lab.cfg, lab.run, lab.encoding.eot_token, time.perf_counter()
    rank, world, _ = run.processes
    seeds = generator(*key).integers(2**63, size=len(asked))
    mine, completions, logps = range(rank, len(asked), world), [], []
    for first in range(0, len(mine), cfg.sample_batch_size):
        if run.stop_seen:
            break
        part = mine[first : first + cfg.sample_batch_size]
        generators = [torch.Generator().manual_seed(int(seeds[i])) for i in part]
        with lab.autocast:
            tokens, mask, logp = generate(
                model, [asked[i][1] for i in part], cfg.max_new_tokens, end, generators,
                temperature, top_p)
        kept = zip(tokens.int().cpu().numpy(), mask.cpu().numpy())
        completions += [row[real] for row, real in kept]
        logps += logp.sum(dim=1).tolist()
    if run.stopping():
        raise Stopped
    sampled = time.perf_counter()
    texts = [lab.encoding.decode(ids[ids != end].tolist(), errors="replace") for ids in completions]
    judge = VERIFIERS.get(task, score_batch)
    scores = judge(texts, [asked[i][0].gold for i in mine], cfg.time_limit)
    rows = [None] * len(asked)
    for r, share in enumerate(run.processes.gather((completions, texts, scores, logps))):
        rows[r::world] = zip(*share)
    rows = [Row(*pair, *row) for pair, row in zip(asked, rows)]
    return rows, {"sample": sampled - started, "verify": time.perf_counter() - sampled}


def describe(rows: list[Row], cfg, end: int) -> dict:
    """The metrics of a rollout itself."""
    reward = np.array([row.score.reward for row in rows]).reshape(-1, cfg.group_size)
    lengths, parts = [len(row.completion) for row in rows], [row.score._asdict() for row in rows]
    return {"reward": reward.mean(), "length": np.mean(lengths),
            "truncated": np.mean([row.completion[-1] != end for row in rows]),
            "informative": np.mean(reward.max(axis=1) > reward.min(axis=1)),
            "entropy": -sum(row.logp for row in rows) / sum(lengths),
            **{f"share_{name}": part["share"] for name, part in shares(parts).items()}}


# ---------------------------------------------------------------- networks


@dataclass
class Batch:
    """Rows of a rollout as tensors, padded on the right; T is the longest completion."""

    prompts: torch.Tensor  # (U, P) the different ones
    prompt_lengths: torch.Tensor  # (U,)
    index: torch.Tensor  # (B,) which of the prompts a row continues
    tokens: torch.Tensor  # (B, T) the completion
    mask: torch.Tensor  # (B, T) true on it, its end-of-text token included
    kept: torch.Tensor  # (n,) where the mask is true, in B * T: asking a GPU would wait for it
    reward: torch.Tensor  # (B,)
    advantage: torch.Tensor  # (B, 1), of ppo (B, T)
    sampled_logp: torch.Tensor  # (B,) of the whole completion, as the sampler saw it
    old_logp: torch.Tensor | None = None  # (B, T) of the policy that sampled
    ref_logp: torch.Tensor | None = None  # (B, T) of the base
    old_value: torch.Tensor | None = None  # (B, T) of the critic, before the updates
    returns: torch.Tensor | None = None  # (B, T) what the critic learns


def make_batch(rows: list[Row], advantage, device) -> Batch:
    """Rows as a batch; advantage (B,) is that of each."""
    tokens = pad_sequence([torch.from_numpy(row.completion) for row in rows], batch_first=True)
    length = torch.tensor([len(row.completion) for row in rows])
    mask = torch.arange(tokens.size(1)) < length[:, None]
    reward = torch.tensor([row.score.reward for row in rows])
    sampled = torch.tensor([row.logp for row in rows])
    prompts = distinct([row.prompt for row in rows])
    kept = mask.flatten().nonzero()[:, 0]
    tensors = *prompts, tokens.long(), mask, kept, reward, advantage[:, None], sampled
    return Batch(*(tensor.to(device) for tensor in tensors))


def completion_states(gpt: GPT, batch: Batch) -> torch.Tensor:
    """The hidden state (n, C) before each token of the completions that the mask keeps, row by row.

    A prompt is read once for all its completions, with its gradient.
    """
    shared = SharedPrompts(batch.prompt_lengths, batch.index)
    first = gpt.hidden(batch.prompts, shared, batch.prompt_lengths - 1)  # (U, 1, C)
    rest = gpt.hidden(batch.tokens[:, :-1], shared)  # (B, T - 1, C)
    return torch.cat((first[batch.index], rest), dim=1).flatten(0, 1)[batch.kept]


def unflatten(values, batch: Batch):
    """(n,) values of the kept tokens back in their places (B, T), zero elsewhere."""
    places = values.new_zeros(batch.mask.numel()).index_copy(0, batch.kept, values)
    return places.view(batch.mask.shape)


class Policy(nn.Module):
    """Log-probs (B, T) of the completions' tokens, in fp32 and at the sampling temperature."""

    def __init__(self, gpt: GPT, temperature: float):
        super().__init__()
        self.gpt, self.temperature = gpt, temperature

    def forward(self, batch: Batch) -> torch.Tensor:
        states, tokens = completion_states(self.gpt, batch), batch.tokens.flatten()[batch.kept]
        logp = token_logps(states, self.gpt.head.weight, tokens, self.temperature)
        return unflatten(logp, batch)


class Critic(nn.Module):
    """Values (B, T) of the states before each token: a copy of the base, with another head."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_(True)  # a copy of a frozen one is frozen
        self.gpt.head = nn.Linear(gpt.config.width, 1).to(gpt.embed.weight)
        for weight in self.gpt.head.parameters():
            nn.init.zeros_(weight)

    def forward(self, batch: Batch) -> torch.Tensor:
        value = self.gpt.head(completion_states(self.gpt, batch))  # (n, 1)
        return unflatten(value.float()[:, 0], batch)


# ---------------------------------------------------------------- updates


class Trainer:
    """A network and its optimiser."""

    def __init__(self, module: nn.Module, peak: float):
        self.module, self.called, self.peak = module, module, peak
        for p in module.parameters():
            p.grad = torch.zeros_like(p)  # so that a rank without rows has one to add
        settings = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.optimizer = torch.optim.AdamW(module.parameters(), peak, **settings)

    def update(self, batches: list[Batch], loss, tokens: int, rate: float, lab: Lab):
        """One step on the mean of loss(batch) (B, T) over the `tokens` of a minibatch, of which
        this rank has some batches. Returns the norm of the gradient, on the device.
        """
        return update(self.optimizer, batches,
                      lambda batch: (loss(batch) * batch.mask).sum() / tokens,
                      rate * self.peak, lab.cfg.grad_clip, lab.autocast)[1]


def make_minibatches(rows: list[Row], step: int, lab: Lab) -> list[tuple[list[Batch], int]]:
    """The rollout, shuffled and dealt evenly into minibatches: of each, this rank's batches, and
    the number of all ranks' tokens. Groups stay whole, so that a prompt is read once for all its
    completions; ei takes single completions, those that it learns from.
    """
    cfg, processes, advantage = lab.cfg, lab.run.processes, row_advantage(rows, lab.cfg)
    groups = np.arange(len(rows)).reshape(-1, 1 if cfg.algo == "ei" else cfg.group_size)
    if cfg.algo == "ei":
        groups = groups[advantage.numpy() > 0]
    groups = generator(cfg.seed, "minibatches", step).permutation(groups)
    minibatches = []
    for part in np.array_split(groups, max(1, math.ceil(groups.size / cfg.minibatch_size))):
        mine = np.array_split(part, processes.world)[processes.rank].flatten().tolist()
        mine.sort(key=lambda i: len(rows[i].completion))  # little padding in a micro-batch
        size = cfg.micro_batch_size
        batches = [make_batch([rows[i] for i in some], advantage[some], processes.device)
                   for some in (mine[at : at + size] for at in range(0, len(mine), size))]
        minibatches.append((batches, sum(len(rows[i].completion) for i in part.flatten())))
    return minibatches


@torch.no_grad()
def look_back(batches: list[Batch], policy: Trainer, critic, reference: Policy, lab: Lab) -> dict:
    """Fills in what the networks say at the time of sampling; returns metrics.

    The very batches that are trained on give the very bits: the first ratio is 1 exactly.
    """
    cfg, processes, count = lab.cfg, lab.run.processes, 0
    kl = difference = torch.zeros((), device=processes.device)
    for batch in batches:
        with lab.autocast:
            with torch.set_grad_enabled(cfg.compile):  # compiled without gradient, its bits differ
                batch.old_logp = policy.called(batch).detach()
            batch.ref_logp = reference(batch)
            batch.old_value = critic.module(batch) if critic else None
        kl = kl + (batch.old_logp - batch.ref_logp).sum()  # k1 of whole completions
        gap = (batch.old_logp.sum(dim=1) - batch.sampled_logp).abs().max()
        difference, count = torch.maximum(difference, gap), count + len(batch.reward)
    total, n = processes.sum(float(kl), count)
    metrics = {"kl": total / n, "sampler_logp_diff": max(processes.gather(float(difference)))}
    return metrics | (estimate_advantages(batches, lab) if critic else {})


def estimate_advantages(batches: list[Batch], lab: Lab) -> dict:
    """ppo: GAE, whitened over the tokens of the whole rollout; returns how the critic does."""
    cfg, processes = lab.cfg, lab.run.processes
    for b in batches:
        reward = token_rewards(b.reward, b.old_logp, b.ref_logp, b.mask, cfg.kl_coef)
        b.advantage, b.returns = gae(reward, b.old_value, b.mask, cfg.gae_lambda)

    def moments(values) -> tuple:
        """Mean and variance over the tokens of all ranks; all values are 0 outside the mask."""
        x = torch.cat([values(b).flatten() for b in batches] or [torch.zeros(0)]).double()
        total, square, n = processes.sum(
            float(x.sum()), float((x**2).sum()), sum(len(b.kept) for b in batches))
        return total / n, max(square / n - (total / n) ** 2, 0.0)

    mean, variance = moments(lambda b: b.advantage)
    for b in batches:
        b.advantage = (b.advantage - mean) / (variance**0.5 + 1e-8)
    value, _ = moments(lambda b: b.old_value)
    _, spread = moments(lambda b: b.returns)
    _, left = moments(lambda b: b.returns - b.old_value)
    return {"value": value, "explained_variance": 1 - left / spread if spread > 1e-12 else 0.0}


def learn(rows: list[Row], step: int, policy: Trainer, critic, reference, lab: Lab) -> dict:
    """All updates of a rollout, epochs x minibatches; returns the metrics of the training row."""
    cfg, processes, metrics = lab.cfg, lab.run.processes, {}
    minibatches = make_minibatches(rows, step, lab)
    if on_policy(cfg):
        metrics = look_back([batch for batches, _ in minibatches for batch in batches],
                            policy, critic, reference, lab)
    updates, norms, critic_norms, seen = cfg.epochs * len(minibatches), [], [], []

    def loss_of_policy(batch: Batch) -> torch.Tensor:
        logp = policy.called(batch)
        if on_policy(cfg):  # on the device: nothing here waits for it
            off = ((logp.detach() - batch.old_logp).exp() - 1).abs() * batch.mask
            seen.append(torch.stack(((off > cfg.clip_eps).sum(), batch.mask.sum(), off.max())))
        return policy_loss(batch, logp, cfg)

    def loss_of_critic(batch: Batch) -> torch.Tensor:
        return clipped_value(critic.called(batch), batch.old_value, batch.returns)

    for done in range(updates):
        if not on_policy(cfg) and lab.run.stopping():  # a round has too many to wait for
            raise KeyboardInterrupt  # and saves no weights that are between two rounds
        batches, tokens = minibatches[done % len(minibatches)]
        share = (done + 1) / updates  # the schedule is that of the run, or of a round from the base
        progress = share if restarts(cfg) else (step + share) / cfg.max_steps
        rate = schedule(progress, cfg.warmup, cfg.min_learning_rate)
        if tokens:
            norms.append(policy.update(batches, loss_of_policy, tokens, rate, lab))
        if critic:
            critic_norms.append(critic.update(batches, loss_of_critic, tokens, rate, lab))
    found = torch.stack([*norms, *critic_norms]).tolist() if norms else [0.0]
    if not all(map(math.isfinite, found)):
        raise UserError(f"the gradient is not finite at step {step + 1}: lower --learning_rate in "
                        "another --out_dir; the last checkpoint here is kept")
    if on_policy(cfg):
        outside, total, _ = processes.sum(*(sum(seen).tolist() if seen else [0] * 3))
        first = max((float(s[2]) for s in seen[: len(minibatches[0][0])]), default=0.0)
        metrics["clip_fraction"] = outside / total
        metrics["ratio_max_dev"] = max(processes.gather(first))
    return {**metrics, "grad_norm": max(found[: max(1, len(norms))]), "lr": rate * policy.peak}


def restarts(cfg) -> bool:
    return cfg.algo == "ei" and cfg.restart_from_base


# ---------------------------------------------------------------- evaluation


def evaluate(model: GPT, pairs: list, n: int, step: int, lab: Lab) -> tuple:
    """The evaluation row of a model on (question, ids) pairs, and the samples; n counts questions
    that were left out too.
    """
    cfg, end, samples, seconds = lab.cfg, lab.encoding.eot_token, [], Counter()
    task = cfg.eval_task or cfg.task
    for greedy in (True, False):
        count = 1 if greedy else cfg.eval_k
        asked = [pair for pair in pairs for _ in range(count)]
        key, temperature = (cfg.seed, "eval", greedy), 0.0 if greedy else cfg.eval_temperature
        rows, took = roll_out(model, asked, key, temperature, cfg.eval_top_p, task, lab)
        seconds.update(took)  # adds
        samples += [{**row.question._asdict(), "completion": row.text, **row.score._asdict(),
                     "greedy": greedy, "length": len(row.completion), "place": i // count,
                     "truncated": bool(row.completion[-1] != end)} for i, row in enumerate(rows)]
    # questions are told apart by their place: the id of a file may be anything
    found = summarize([{**sample, "id": sample["place"]} for sample in samples], n)
    length, cut = (float(np.mean([s[f] for s in samples])) for f in ("length", "truncated"))
    if on_policy(cfg):
        found["optimal_shares"] = optimal_shares(samples[len(pairs) :], cfg.kl_coef)
    return {"step": step, "kind": "eval", "task": task, **found,
            "too_long": n - len(pairs), "mean_length": length, "truncated": cut,
            "seconds": seconds}, samples


def optimal_shares(samples: list[dict], beta: float) -> dict[str, dict]:
    """Shares of the formats where E[r] - beta KL is largest, from samples of the base: over all
    policies, where each of a question's samples weighs e^(r / beta) (arXiv 2510.20817); over those
    that only re-weigh formats, where it weighs e^(accuracy of its format / beta).
    """
    beta, found = max(beta, 0.002), shares(samples)  # e^500 is a number
    place, reward, formats = (
        np.array([sample[key] for sample in samples]) for key in ("place", "reward", "format"))
    tilt = np.exp(reward / beta)
    weights = {"full tilt": tilt / np.bincount(place, tilt)[place],
               "re-weighting": np.exp([found[f]["accuracy"] / beta for f in formats])}
    return {name: {f: {"share": float(np.average(formats == f, weights=weight))}
                   for f in found} for name, weight in weights.items()}


def publish(folder: Path, samples: list[dict], rows: list[dict]) -> None:
    """Writes the last evaluation's samples, and echo.png, which shows all of them: above pass@1,
    maj@k and pass@k against steps, below the shares of the formats, stacked.
    """
    from matplotlib.figure import Figure

    last, steps = rows[-1], [row["step"] for row in rows]
    lines = b"".join(json.dumps(sample).encode() + b"\n" for sample in samples)
    save(folder / f"samples_{last['step']:06d}.jsonl", lines)
    figure = Figure(figsize=(7, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for name in ("pass@k", "maj@k", "pass@1", "sampled_pass@1"):
        top.plot(steps, [row[name] for row in rows], marker="o", label=name)
    top.set(ylabel="share of questions", ylim=(0, 1),
            title=f"{last['task']}, {last['n']} questions, k = {last['k']}")
    top.legend()
    parts = [row["sampled_formats"] for row in rows]
    areas = [[part.get(name, {"share": 0})["share"] for part in parts] for name in parts[-1]]
    bottom.stackplot(steps, *areas, labels=parts[-1])
    bottom.set(ylabel="share of samples", xlabel="RL step", ylim=(0, 1),
               xlim=(0, max(1, steps[-1])))
    bottom.legend(loc="lower left")
    write_atomically(folder / "echo.png", lambda file: figure.savefig(file, dpi=120))


# ---------------------------------------------------------------- the run


def snapshot_steps(total: int) -> set[int]:
    """Where step_NNNNNN.pt is kept: 0 and up to 15 steps, logarithmically spaced, to total > 0."""
    return {0} | {round(total ** (i / 14)) for i in range(15)} if total else set()


def main(cfg: Config) -> dict:
    """Trains for max_steps rollouts, or only evaluates; returns the last evaluation, or {}."""
    check(cfg)
    name = f"eval-{cfg.eval_task or cfg.task}" if cfg.algo == "eval" else cfg.algo
    cfg = dataclasses.replace(cfg, out_dir=cfg.out_dir or f"out/{name}")
    processes, total = setup_distributed(cfg.device), 0 if cfg.algo == "eval" else cfg.max_steps
    train_set, test_set = load_run_questions(cfg.task, cfg.eval_task, cfg.questions,
                                             cfg.eval_questions, cfg.hub, total > 0)
    base, tokenizer = load_model(cfg.init_from, processes.device)
    encoding, room = get_tokenizer(tokenizer), base.config.context
    train = fitting("train", train_set, encoding, room, cfg.max_new_tokens)
    test = fitting("test", test_set, encoding, room, cfg.max_new_tokens)
    policy = Trainer(Policy(copy.deepcopy(base), cfg.temperature), cfg.learning_rate)
    critic = cfg.algo == "ppo" and Trainer(Critic(base), cfg.critic_learning_rate)
    model, reference = policy.module.gpt, Policy(base, cfg.temperature)
    if cfg.compile:  # dynamic: no two batches have the same shape
        policy.called = compiled(policy.module, processes.device, dynamic=True)
    parts = {"model": model, "optimizer": policy.optimizer}
    if critic:
        parts |= {"critic": critic.module, "critic_optimizer": critic.optimizer}

    inputs = {"base": base, "train questions": train_set, "test questions": test_set}
    with Run(cfg, processes, total, inputs) as run:
        step, evaluations = 0, []
        lab = Lab(cfg, run, encoding, autocast(cfg.dtype, processes.device))
        if state := run.load():
            step, evaluations = state["step"], state["evaluations"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            del state  # a second copy of the weights
            if evaluations and evaluations[-1]["step"] == total:
                run.say(f"{run.folder} is finished: --overwrite=true starts it afresh")
                return evaluations[-1]
            run.say(f"continuing {run.folder} at step {step}")

        def save_run() -> None:
            states = {name: part.state_dict() for name, part in parts.items()}
            run.save({**model_state(model, tokenizer), **states, "step": step,
                      "evaluations": evaluations})

        try:
            while True:
                if step in snapshot_steps(total):
                    processes.first(lambda: save(run.folder / f"step_{step:06d}.pt",
                                                 model_state(model, tokenizer)))
                due = step % cfg.eval_every == 0 or step == total
                if due and step not in (row["step"] for row in evaluations):
                    row, samples = evaluate(model, test, len(test_set), step, lab)
                    evaluations.append(row)
                    run.write(row)
                    processes.first(lambda: publish(run.folder, samples, evaluations))
                if step == total:
                    break
                picked = pick_prompts(len(train), step, cfg.prompts_per_step, cfg.seed)
                asked = [train[i] for i in picked for _ in range(cfg.group_size)]
                rows, seconds = roll_out(model, asked, (cfg.seed, "rollout", step),
                                         cfg.temperature, cfg.top_p, cfg.task, lab)
                started = time.perf_counter()
                if restarts(cfg):
                    model.load_state_dict(base.state_dict())
                    policy.optimizer.state.clear()
                metrics = learn(rows, step, policy, critic, reference, lab)
                seconds["train"] = time.perf_counter() - started
                step += 1
                run.bar.update()
                if step % cfg.log_every == 0 or step == total:
                    metrics = describe(rows, cfg, encoding.eot_token) | metrics
                    run.write({"step": step, "kind": "train", **metrics, "seconds": seconds})
                if run.stopping():
                    raise Stopped
                if step % cfg.save_every == 0:
                    save_run()
        except Stopped:
            save_run()
            run.say(f"stopped at step {step}: the same command continues it; what was sampled of a "
                    "rollout that is not finished (of ei: a round) is sampled again")
            return {}
        save_run()
        first, last = evaluations[0], evaluations[-1]
        run.say(f"\n{cfg.algo} on {last['task']}, {last['n']} questions, 95% intervals; "
                f"{run.folder}/echo.png\n")
        columns = {f"step {row['step']}": row for row in (first, last)}
        for name, parts in first.get("optimal_shares", {}).items():
            columns[name] = dict(summarize([]), sampled_formats=parts)
        run.say(table(columns))
        return last


if __name__ == "__main__":
    launch(main, Config, PRESETS)
