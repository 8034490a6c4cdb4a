"""Fine-tunes a pretrained GPT on questions with a verifiable answer: `torchrun rl.py
--algo=ppo|grpo|ei`.

Reads the run of pretrain.py (--init_from), writes out_dir: config.json, metrics.jsonl, ckpt.pt,
step_NNNNNN.pt, samples_NNNNNN.jsonl and echo.png. `--algo=eval` only evaluates. Run it again to
continue an unfinished run. Deviations from the textbook: a completion cut at max_new_tokens
counts as ended, with reward 0 unless it holds the answer; a minibatch is of whole groups, so that
a prompt is read once for all its completions (ei: of single ones); every rank holds the whole
rollout (ids are small), so no statistic depends on their number.
"""

import contextlib
import copy
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from data import UserError
from data.mixture import generator
from data.tasks import Question, load_questions
from data.tokenizer import get_tokenizer
from model import GPT, SharedPrompts, distinct, generate
from pretrain import (Processes, RunLog, StopSignal, autocast, launch, load_model, memory_for,
                      model_state, open_run, parse_config, require_positive, restore,
                      save_checkpoint, schedule, setup_distributed, signals_restored,
                      write_atomically)  # fmt: skip
from verify import FORMATS, score_batch, start_servers, summarize, table


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
    top_p: float = 1.0  # nucleus of rollouts; ppo and grpo train the whole distribution: 1
    minibatch_size: int = 64  # completions of an update, all ranks together
    micro_batch_size: int = 32  # completions of one forward pass on one rank
    epochs: int = 1  # passes over a rollout
    learning_rate: float = 3e-4  # peak, of the policy
    critic_learning_rate: float = 3e-4  # peak, of ppo's critic
    warmup: float = 0.03  # share of the schedule in which the learning rate rises
    min_learning_rate: float = 0.1  # at the end of the cosine, as a fraction of the peak
    kl_coef: float = 0.03  # of the KL to the base
    kl_in: Literal["auto", "reward", "loss"] = "auto"  # auto: ppo's token rewards, others' loss
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"  # auto: k1 in rewards, k3 in the loss
    entropy_coef: float = 0.0  # of a bonus for the entropy at each token
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # see token_weights
    scale_rewards: bool = True  # grpo: by the group's std, so that hard and easy questions count
    whiten: bool = True  # ppo: advantages of mean 0 and std 1 over the rollout
    clip_eps: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the change of ppo's values; 0: not clipped
    gamma: float = 1.0  # discount a token
    gae_lambda: float = 0.95  # of generalised advantage estimation
    restart_from_base: bool = True  # ei: each round trains the base; false: the last policy
    grad_clip: float = 1.0  # largest norm of a gradient
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    max_steps: int = 36  # rollouts, each with its updates; ei: rounds
    eval_every: int = 6  # steps between evaluations
    eval_k: int = 8  # samples a question for pass@k and maj@k
    eval_temperature: float = 1.0  # of those samples
    eval_top_p: float = 1.0  # nucleus of those samples
    sample_batch_size: int = 256  # completions decoded together on one rank
    time_limit: float = 1.0  # seconds that one program of a completion may run
    save_every: int = 6  # steps between checkpoints
    log_every: int = 1  # steps between metric rows
    seed: int = 0  # of the order of questions and of every sample
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda
    compile: bool = False  # torch.compile of the policy's updates; needs a C++ compiler

    def __post_init__(self):
        if self.kl_in == "auto":
            self.kl_in = "reward" if self.algo == "ppo" else "loss"
        if self.kl_estimator == "auto":
            self.kl_estimator = "k1" if self.kl_in == "reward" else "k3"


PRESETS = {  # every entry applies whose words are among the chosen preset and algo
    "tiny": {},
    "tiny ei": dict(
        prompts_per_step=512, epochs=2, learning_rate=1e-3, max_steps=3,
        eval_every=1, save_every=1),
    "paper": dict(
        task="gsm8k", prompts_per_step=64, group_size=8, max_new_tokens=1024, temperature=0.7,
        minibatch_size=64, micro_batch_size=8, learning_rate=1e-6, critic_learning_rate=7e-6,
        min_learning_rate=1.0, kl_coef=0.001, max_steps=1168, eval_every=117, eval_k=64,
        eval_temperature=0.7, eval_top_p=0.95, save_every=50),
    "paper ei": dict(
        prompts_per_step=7473, group_size=64, temperature=1.0, top_p=0.95, minibatch_size=256,
        min_learning_rate=0.1, epochs=2, learning_rate=1e-4, max_steps=3, eval_every=1,
        save_every=1),
}  # fmt: skip


USED_BY = {  # settings that not every --algo reads, and those that do
    "prompts_per_step group_size temperature minibatch_size micro_batch_size epochs learning_rate"
    " warmup min_learning_rate entropy_coef loss_norm grad_clip beta1 beta2 max_steps eval_every"
    " save_every log_every compile": "ppo grpo reinforce ei",
    "kl_coef kl_in kl_estimator": "ppo grpo reinforce",
    "clip_eps": "ppo grpo",
    "critic_learning_rate value_clip gamma gae_lambda whiten": "ppo",
    "scale_rewards": "grpo",
    "top_p restart_from_base": "ei",
}  # fmt: skip


# ---------------------------------------------------------------- rollouts


class Rollout(NamedTuple):
    """N completions, those of one question side by side."""

    prompts: list  # N lists of ids
    completions: list  # N lists of ids, up to the first end-of-text token and with it
    texts: list
    scores: list  # N of verify.Score
    logps: list  # N lists of the log-probs that the sampler saw


def fitting(
    questions: list[Question], encoding, context: int, room: int
) -> list[tuple[Question, list[int]]]:
    """Each question with its prompt's ids, but for those that leave less than `room` tokens of
    the context.
    """
    pairs = [(q, encoding.encode_ordinary(q.question + "\n\n")) for q in questions]
    return [(q, ids) for q, ids in pairs if len(ids) + room <= context]


def pick_prompts(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of `count` questions a step asks: each once an epoch, in the epoch's own order."""
    orders, picked = {}, []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, count)
        if epoch not in orders:
            orders[epoch] = generator(seed, "prompts", epoch).permutation(count)
        picked.append(int(orders[epoch][place]))
    return picked


def roll_out(model: GPT, pairs: list, key: tuple, cfg, greedy: bool, encoding, processes: Processes,
             seconds: dict) -> Rollout:  # fmt: skip
    """A completion of each (question, prompt) of pairs. Each rank samples and verifies its share,
    all get all.

    Every completion has a random generator of its own, seeded by `key` and its place: neither the
    number of ranks nor the size of a batch changes what is sampled.
    """
    seeds = generator(*key).integers(2**63, size=len(pairs))
    mine = range(processes.rank, len(pairs), processes.world)
    completions, logps, started = [], [], time.perf_counter()
    for first in range(0, len(mine), cfg.sample_batch_size):
        part = mine[first : first + cfg.sample_batch_size]
        with memory_for(cfg, "sample_batch_size"):
            tokens, mask, logp = generate(
                model, [pairs[i][1] for i in part], cfg.max_new_tokens, encoding.eot_token,
                [torch.Generator().manual_seed(int(seeds[i])) for i in part],
                0.0 if greedy else cfg.temperature, cfg.top_p,
            )  # fmt: skip
        mask = mask.cpu()
        completions += [row[kept].tolist() for row, kept in zip(tokens.cpu(), mask)]
        logps += [row[kept].tolist() for row, kept in zip(logp.cpu(), mask)]
    sampled = time.perf_counter()
    ends = encoding.eot_token
    texts = [
        encoding.decode([i for i in ids if i != ends], errors="replace") for ids in completions
    ]
    scores = score_batch(texts, [pairs[i][0].gold for i in mine], cfg.time_limit)
    whole = [None] * len(pairs)
    for rank, share in enumerate(processes.gather(list(zip(completions, texts, scores, logps)))):
        whole[rank :: processes.world] = share
    seconds["sample"] += sampled - started
    seconds["verify"] += time.perf_counter() - sampled
    return Rollout([ids for _, ids in pairs], *map(list, zip(*whole)))


@dataclass
class Batch:
    """Rows of a rollout as tensors, padded on the right; what is per token is (B, T), T the
    longest completion.
    """

    prompts: torch.Tensor  # (U, P) the different ones, padded on the right too
    prompt_lengths: torch.Tensor  # (U,)
    index: torch.Tensor  # (B,) which of the prompts a row continues
    tokens: torch.Tensor  # (B, T) the completion
    mask: torch.Tensor  # (B, T) true on it, its end-of-text token included
    reward: torch.Tensor  # (B,)
    advantage: torch.Tensor  # (B, T), or (B, 1) before it is spread over the tokens
    sampled_logp: torch.Tensor | None = None  # (B, T) as the sampler saw it
    weight: torch.Tensor | None = None  # (B, 1) of each token in the minibatch's loss
    old_logp: torch.Tensor | None = None  # (B, T) of the policy that sampled
    ref_logp: torch.Tensor | None = None  # (B, T) of the base
    old_value: torch.Tensor | None = None  # (B, T) of the critic, before the updates
    returns: torch.Tensor | None = None  # (B, T) what the critic learns


def make_batch(rollout: Rollout, rows: list[int], advantage, weight, device) -> Batch:
    """The given rows of a rollout. No rows at all give one that is masked out: every rank has
    work for DDP.
    """
    picked = rows or [0]
    completions = [torch.tensor(rollout.completions[i]) for i in picked]
    tokens = pad_sequence(completions, batch_first=True)
    length = torch.tensor([len(c) for c in completions]) * bool(rows)
    mask = torch.arange(tokens.size(1)) < length[:, None]
    reward = torch.tensor([rollout.scores[i].reward for i in picked])
    logps = pad_sequence([torch.tensor(rollout.logps[i]) for i in picked], batch_first=True)
    advantage, weight = advantage[picked][:, None], weight[picked][:, None]
    prompts = distinct([rollout.prompts[i] for i in picked])
    tensors = *prompts, tokens, mask, reward, advantage, logps, weight
    return Batch(*(tensor.to(device) for tensor in tensors))


# ---------------------------------------------------------------- networks


def completion_states(gpt: GPT, batch: Batch) -> torch.Tensor:
    """The hidden state before each token of the completions that the mask keeps, (n, C), row by
    row.
    """
    shared = SharedPrompts(batch.prompt_lengths, batch.index)
    first = gpt.hidden(batch.prompts, shared, batch.prompt_lengths - 1)  # (U, 1, C)
    rest = gpt.hidden(batch.tokens[:, :-1], shared)  # (B, T - 1, C)
    return torch.cat((first[batch.index], rest), dim=1)[batch.mask]


def unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n,) values of the kept tokens back in their places (B, T), zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class TokenLogps(torch.autograd.Function):
    """log p[token] and the entropy of p = softmax(z), z = hidden @ weight.T / temperature; (n,).

    hidden (n, C), weight (V, C), tokens (n,); at least fp32, whatever the autocast. Logits exist
    for one chunk of tokens at a time: the backward pass computes them again, which costs no more
    than to write and read them. Gradients at z: onehot - p, and -p (log p + entropy).
    """

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature: float, train_entropy: bool):
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.temperature, ctx.train_entropy = temperature, train_entropy
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy = hidden.new_empty((2, len(hidden)), dtype=exact)
        for i, _, _, y, logps in TokenLogps.chunks(ctx, hidden, weight, tokens):
            logp[i] = logps.gather(1, y)[:, 0]
            entropy[i] = -torch.linalg.vecdot(logps.exp(), logps)
        ctx.save_for_backward(hidden, weight, tokens, entropy)
        if not train_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        hidden, weight, tokens, entropy = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i, x, w, y, logps in TokenLogps.chunks(ctx, hidden, weight, tokens):
            scale = -d_logp[i, None]
            if ctx.train_entropy:
                scale = scale - d_entropy[i, None] * (logps + entropy[i, None])
            d_logits = logps.exp_().mul_(scale).scatter_add_(1, y, d_logp[i, None])
            d_logits = d_logits.div_(ctx.temperature).to(x.dtype)  # (chunk, V)
            d_hidden[i] = (d_logits @ w).to(d_hidden.dtype)
            d_weight += d_logits.t() @ x
        return d_hidden, d_weight, None, None, None

    @staticmethod
    def chunks(ctx, hidden, weight, tokens, size: int = 512):
        """For `size` tokens at a time: their slice, states, the weight, ids (size, 1) and all
        log-probs (size, V).
        """
        hidden, weight = (t.to(ctx.dtype or t.dtype) for t in (hidden, weight))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        for first in range(0, len(hidden), size):
            i = slice(first, first + size)
            logits = nn.functional.linear(hidden[i], weight).to(exact)
            logps = logits.div_(ctx.temperature).log_softmax(dim=-1)
            del logits  # not kept while the caller works
            yield i, hidden[i], weight, tokens[i, None], logps


class Policy(nn.Module):
    """Log-probs (B, T) of the completions' tokens, in fp32 and at the sampling temperature, and
    entropies, with a gradient where they are trained.
    """

    def __init__(self, gpt: GPT, temperature: float, train_entropy: bool = False):
        super().__init__()
        self.gpt, self.temperature, self.train_entropy = gpt, temperature, train_entropy

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states = completion_states(self.gpt, batch)  # (n, C)
        tokens = batch.tokens[batch.mask]  # (n,)
        # not compiled: the number of tokens, so that of chunks, changes from batch to batch
        apply = torch.compiler.disable(TokenLogps.apply)
        logp, entropy = apply(
            states, self.gpt.head.weight, tokens, self.temperature, self.train_entropy
        )
        return unflatten(logp, batch.mask), unflatten(entropy, batch.mask)


class Critic(nn.Module):
    """Values (B, T) of the states before each token: a copy of the base with a head of one
    output.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = copy.deepcopy(gpt)
        self.gpt.head = nn.Linear(gpt.config.width, 1, bias=False).to(gpt.embed.weight)
        nn.init.zeros_(self.gpt.head.weight)

    def forward(self, batch: Batch) -> torch.Tensor:
        return unflatten(
            self.gpt.head(completion_states(self.gpt, batch)).float()[:, 0], batch.mask
        )


# ---------------------------------------------------------------- the algorithms
#
# algo       advantage of a token            loss per token           extra network
# ppo        GAE from the critic, KL in r    clipped ratio + value    critic
# grpo       (r - group mean) / group std    clipped ratio + k3 KL    none
# reinforce  r - group mean                  -logp advantage + k3 KL  none
# ei         1 if correct and unseen else 0  -logp                    none


def kl_estimate(logp, ref_logp, kind: str) -> torch.Tensor:
    """An estimate of the KL to the base at each token, of d = ref_logp - logp (Schulman 2020).

    k1 = -d, unbiased; k2 = d^2 / 2, biased, of low variance; k3 = e^d - d - 1, unbiased, never
    negative. In the loss the gradient of k1 is zero in expectation; that of k2 is the KL's.
    """
    d = ref_logp - logp
    return {"k1": lambda: -d, "k2": lambda: d**2 / 2, "k3": lambda: d.exp() - d - 1}[kind]()


def token_rewards(batch: Batch, cfg) -> torch.Tensor:
    """Rewards (B, T): the score on the last token, and -kl_coef KL on every one where the KL is
    in the reward (arXiv 2203.02155, equation 2).
    """
    length = batch.mask.sum(dim=1)
    last = torch.arange(batch.mask.size(1), device=batch.mask.device) == length[:, None] - 1
    reward = batch.reward[:, None] * last
    if cfg.kl_coef and cfg.kl_in == "reward":
        kl = kl_estimate(batch.old_logp, batch.ref_logp, cfg.kl_estimator)
        reward = reward - cfg.kl_coef * kl * batch.mask
    return reward


def gae(reward, value, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16); all (B, T), zero outside
    the mask.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}; V and A are 0
    behind the last token. Returns the advantages, and the returns A_t + V_t.
    """
    advantage = torch.zeros_like(value)
    following, following_value = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    for t in reversed(range(value.size(1))):
        delta = reward[:, t] + gamma * following_value - value[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        following_value = value[:, t] * mask[:, t]
        advantage[:, t] = following
    return advantage, (advantage + value) * mask


def group_advantage(reward: torch.Tensor, group_size: int, scale: bool) -> torch.Tensor:
    """r - mean of each reward within its group, divided by the group's std (arXiv 2402.03300,
    section 4.1.2) where `scale` (arXiv 2503.20783 argues against); (N,) -> (N,).

    A group whose rewards are all equal says nothing, and gets exact zeros.
    """
    groups = reward.view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if scale:
        centered = centered / groups.std(dim=1, keepdim=True).clamp(min=1e-6)
    differ = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    return torch.where(differ, centered, 0.0).flatten()


def first_correct(rollout: Rollout) -> torch.Tensor:
    """1 for each correct completion that its question has not had before in this rollout, else 0;
    (N,).
    """
    seen, advantage = set(), []
    for prompt, completion, score in zip(rollout.prompts, rollout.completions, rollout.scores):
        key = (tuple(prompt), tuple(completion))
        advantage.append(float(score.reward == 1 and key not in seen))
        seen.add(key)
    return torch.tensor(advantage)


def clipped(logp, old_logp, advantage, clip_eps: float) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(logp - old_logp) (arXiv 1707.06347,
    equation 7).
    """
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)


def clipped_value_loss(value, old_value, returns, clip: float) -> torch.Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2, V_clipped within `clip` of the old value
    (openai/baselines ppo2);
    (V - R)^2 / 2 where clip is 0.
    """
    near = old_value + (value - old_value).clamp(-clip, clip) if clip else value
    return torch.max((value - returns) ** 2, (near - returns) ** 2) / 2


def clipped_loss(batch: Batch, logp, cfg) -> torch.Tensor:
    return clipped(logp, batch.old_logp, batch.advantage, cfg.clip_eps) + kl_loss(batch, logp, cfg)


def reinforce_loss(batch: Batch, logp, cfg) -> torch.Tensor:
    """-logp A, the policy gradient without ratio and clip (Williams 1992)."""
    return -logp * batch.advantage + kl_loss(batch, logp, cfg)


def kl_loss(batch: Batch, logp, cfg):
    if not cfg.kl_coef or cfg.kl_in != "loss":
        return 0.0
    return cfg.kl_coef * kl_estimate(logp, batch.ref_logp, cfg.kl_estimator)


def imitation_loss(batch: Batch, logp, cfg) -> torch.Tensor:
    return -logp * batch.advantage


class Algorithm(NamedTuple):
    advantage: Callable  # (rollout, cfg) -> (N,), one number for all tokens of a completion
    loss: Callable  # (batch, logp, cfg) -> (B, T)
    critic: bool  # whether a critic refines the advantage to one for each token
    on_policy: bool  # whether the loss compares with the policy that sampled


def rewards(rollout: Rollout) -> torch.Tensor:
    return torch.tensor([score.reward for score in rollout.scores])


def group_relative(rollout: Rollout, cfg) -> torch.Tensor:
    return group_advantage(rewards(rollout), cfg.group_size, cfg.scale_rewards)


def group_centered(rollout: Rollout, cfg) -> torch.Tensor:
    return group_advantage(rewards(rollout), cfg.group_size, False)


ALGORITHMS = {
    "ppo": Algorithm(lambda rollout, cfg: rewards(rollout), clipped_loss, True, True),
    "grpo": Algorithm(group_relative, clipped_loss, False, True),
    "reinforce": Algorithm(group_centered, reinforce_loss, False, True),
    "ei": Algorithm(lambda rollout, cfg: first_correct(rollout), imitation_loss, False, False),
}


# ---------------------------------------------------------------- updates


class Trainer:
    """A network, its DDP wrapper and its optimiser."""

    def __init__(self, module: nn.Module, peak: float, cfg, processes: Processes):
        self.module, self.peak, self.cfg, self.processes = module, peak, cfg, processes
        # dynamic: no two batches have the same shape
        self.called = torch.compile(module, dynamic=True) if cfg.compile else module
        # the gradients live in DDP's buckets: no second copy of them
        self.ddp = DistributedDataParallel(self.called, gradient_as_bucket_view=True)
        self.reset()

    def reset(self) -> None:
        betas = (self.cfg.beta1, self.cfg.beta2)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), self.peak, betas, weight_decay=0.0, fused=True
        )

    def update(self, batches: list[Batch], token_loss: Callable, rate: float, context) -> float:
        """One optimiser step on the sum of batch.weight x token_loss(batch) (B, T) over the tokens
        of all ranks' batches.

        Returns the norm of the gradient. DDP averages over ranks what is a sum over them: hence
        the factor world.
        """
        for i, batch in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else self.ddp.no_sync():
                with context:
                    loss = token_loss(batch)
                (loss * batch.weight * batch.mask).sum().mul(self.processes.world).backward()
        norm = clip_grad_norm_(self.module.parameters(), self.cfg.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.peak
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def token_weights(lengths: list[int], cfg) -> list[float]:
    """For completions of these lengths, a whole minibatch, the weight of each of their tokens in
    its loss: the ONE normaliser, whatever the micro-batches and the ranks.

    token: every token weighs the same (DAPO, arXiv 2503.14476); sequence: every completion does
    (arXiv 2402.03300); constant: as token, but whatever the lengths (arXiv 2503.20783).
    """
    rows = len(lengths)
    return {"token": [1 / sum(lengths)] * rows, "sequence": [1 / (rows * n) for n in lengths],
            "constant": [1 / (rows * cfg.max_new_tokens)] * rows}[cfg.loss_norm]  # fmt: skip


def split_minibatches(rollout: Rollout, advantage: torch.Tensor, step: int, cfg, processes) -> list:
    """The rollout's rows, shuffled and dealt into minibatches: for each, this rank's batches.

    Completions that Expert Iteration does not learn from are left out. Where only the advantage
    has a gradient, those without one are skipped: they count in the normaliser still.
    """
    algorithm, draw = ALGORITHMS[cfg.algo], generator(cfg.seed, "minibatches", step)
    if algorithm.on_policy:  # whole groups: a prompt is read once for all its completions
        order = draw.permutation(np.arange(len(advantage)).reshape(-1, cfg.group_size)).flatten()
    else:
        order = draw.permutation(advantage.nonzero()[:, 0].numpy())
    skips = not algorithm.critic and not cfg.kl_coef and not cfg.entropy_coef
    length, weight = [len(ids) for ids in rollout.completions], torch.zeros(len(advantage))
    minibatches = []
    for first in range(0, len(order), cfg.minibatch_size):
        whole = order[first : first + cfg.minibatch_size].tolist()
        weight[whole] = torch.tensor(token_weights([length[i] for i in whole], cfg))
        kept = [i for i in whole if advantage[i] or not skips]
        # neighbours together, so that no group is torn apart for the ranks
        mine = np.array_split(np.array(kept, dtype=int), processes.world)[processes.rank].tolist()
        mine.sort(key=length.__getitem__)  # little padding in a micro-batch
        size = cfg.micro_batch_size
        parts = [mine[i : i + size] for i in range(0, len(mine), size)] or [[]]
        minibatches.append([make_batch(rollout, part, advantage, weight, processes.device)
                            for part in parts])  # fmt: skip
    return minibatches


@torch.no_grad()
def prepare_batches(
    batches: list[Batch], policy, critic, reference, cfg, context, processes
) -> dict:
    """Fills in the quantities of the time of sampling, with the very batches that are trained on.

    The same rows in the same shape give the same bits: the first ratio is 1 exactly. Returns
    metrics.
    """
    with context:
        for batch in batches:
            with torch.set_grad_enabled(cfg.compile):  # compiled without gradient, its bits differ
                batch.old_logp = policy.called(batch)[0].detach()
            batch.ref_logp = reference(batch)[0] if cfg.kl_coef else None
            batch.old_value = critic.module(batch) if critic else None
    differences = [((b.old_logp - b.sampled_logp) * b.mask).abs().max() for b in batches]
    metrics = {"sampler_logp_diff": max(processes.gather(float(max(differences))))}
    if cfg.kl_coef:
        kl = sum(float((kl_estimate(b.old_logp, b.ref_logp, "k3") * b.mask).sum()) for b in batches)
        total, tokens = processes.sum(kl, sum(int(b.mask.sum()) for b in batches))
        metrics["kl"] = total / max(1, tokens)
    if critic:
        metrics["explained_variance"] = estimate_advantages(batches, cfg, processes)
    return metrics


def estimate_advantages(batches: list[Batch], cfg, processes: Processes) -> float:
    """PPO: GAE, whitened over the tokens of the whole rollout where cfg says so; returns the
    critic's explained variance.
    """
    sums = np.zeros(7)
    for b in batches:
        reward = token_rewards(b, cfg)
        b.advantage, b.returns = gae(reward, b.old_value, b.mask, cfg.gamma, cfg.gae_lambda)
        a, r, error = b.advantage[b.mask], b.returns[b.mask], (b.returns - b.old_value)[b.mask]
        sums += [float(x.double().sum()) for x in (a, a**2, r, r**2, error, error**2)] + [len(a)]
    *moments, n = processes.sum(*sums)
    mean, square, r_mean, r_square, e_mean, e_square = (m / n for m in moments)
    std = max(square - mean**2, 0) ** 0.5
    for b in batches if cfg.whiten else ():
        b.advantage = (b.advantage - mean) / (std + 1e-8) * b.mask
    return_variance = r_square - r_mean**2
    return 1 - (e_square - e_mean**2) / return_variance if return_variance > 1e-12 else 0.0


def token_means(sums: dict, processes: Processes) -> dict:
    """Each of the sums over the "tokens" of all ranks."""
    totals = dict(zip(sums, processes.sum(*sums.values())))
    tokens = max(1.0, totals.pop("tokens"))
    return {name: total / tokens for name, total in totals.items()}


def progress(step: int, share: float, cfg) -> float:
    """The share of the schedule that is behind a `share` of step's updates: that of the run, or
    of the round where each starts from the base again.
    """
    return share if restarts(cfg) else (step + share) / cfg.max_steps


def learn(rollout, step: int, policy: Trainer, critic, reference, cfg, context, processes) -> dict:
    """All updates of a rollout, epochs x minibatches; returns the metrics of the training row."""
    algorithm, metrics = ALGORITHMS[cfg.algo], {}
    advantage = algorithm.advantage(rollout, cfg)
    minibatches = split_minibatches(rollout, advantage, step, cfg, processes)
    if algorithm.on_policy:
        batches = [batch for parts in minibatches for batch in parts]
        metrics = prepare_batches(batches, policy, critic, reference, cfg, context, processes)
    sums = {"entropy": 0.0, "clip_fraction": 0.0, "kl_previous": 0.0, "tokens": 0.0}
    first_deviation = 0.0
    updates, done, norms = cfg.epochs * len(minibatches), 0, [0.0]

    def policy_loss(batch: Batch) -> torch.Tensor:
        nonlocal first_deviation
        logp, entropy = policy.ddp(batch)
        with torch.no_grad():
            sums["tokens"] += float(batch.mask.sum())
            sums["entropy"] += float(entropy.sum())
            if algorithm.on_policy:
                deviation = ((logp - batch.old_logp).exp() - 1).abs() * batch.mask
                sums["clip_fraction"] += float((deviation > cfg.clip_eps).sum())
                sums["kl_previous"] += float(kl_estimate(logp, batch.old_logp, "k3").sum())
                if done == 0:
                    first_deviation = max(first_deviation, float(deviation.max()))
        loss = algorithm.loss(batch, logp, cfg)
        return loss - cfg.entropy_coef * entropy if cfg.entropy_coef else loss

    def value_loss(batch: Batch) -> torch.Tensor:
        return clipped_value_loss(critic.ddp(batch), batch.old_value, batch.returns, cfg.value_clip)

    for _ in range(cfg.epochs):
        for parts in minibatches:
            behind = progress(step, (done + 1) / updates, cfg)
            rate = schedule(behind, cfg.warmup, cfg.min_learning_rate)
            norms.append(policy.update(parts, policy_loss, rate, context))
            if critic:
                critic.update(parts, value_loss, rate, context)
            done += 1
    metrics |= token_means(sums, processes)
    metrics["ratio_max_dev"] = max(processes.gather(first_deviation))
    if not all(map(math.isfinite, norms)):
        raise UserError(f"the gradient is not finite at step {step}: "
                        "lower --learning_rate; the last checkpoint is kept")  # fmt: skip
    return {**metrics, "grad_norm": max(norms), "lr": policy.optimizer.param_groups[0]["lr"]}


def advice(rows: list[dict]) -> list[str]:
    """What a practitioner would say of a run's training rows, where something is off."""
    first, last = rows[0], rows[-1]
    often, other = ("always", "harder") if last["reward"] == 1 else ("never", "easier")
    signs = {
        f"no question had both right and wrong completions, the base {often} succeeds: take {other}"
        " questions, a larger --group_size or another base":
            not any(row["informative"] for row in rows),
        f"the policy is {last.get('kl', 0):.1f} nats a token away from the base: raise --kl_coef "
        "or lower --learning_rate": last.get("kl", 0) > 1,
        "entropy is gone, nothing new is tried any more: lower --learning_rate, or raise --kl_coef "
        "or --entropy_coef": last["entropy"] < 0.01 < first["entropy"],
        f"{last['truncated']:.0%} of the completions are cut: raise --max_new_tokens":
            last["truncated"] > 0.5,
    }  # fmt: skip
    return [sentence for sentence, holds in signs.items() if holds]


def restarts(cfg) -> bool:
    return cfg.algo == "ei" and cfg.restart_from_base


def describe_rollout(rollout: Rollout, cfg, eot: int) -> dict:
    """The metrics of a rollout itself."""
    groups = rewards(rollout).view(-1, cfg.group_size)
    lengths = [len(ids) for ids in rollout.completions]
    formats = [score.format for score in rollout.scores]
    return {"reward": float(groups.mean()), "length": sum(lengths) / len(lengths),
            "truncated": sum(ids[-1] != eot for ids in rollout.completions) / len(lengths),
            "informative": float((groups.amax(1) > groups.amin(1)).float().mean()),
            **{f"share_{f}": formats.count(f) / len(formats) for f in FORMATS}}  # fmt: skip


# ---------------------------------------------------------------- evaluation


def evaluate(
    model: GPT, pairs: list, n: int, step: int, cfg, encoding, processes: Processes
) -> tuple[dict, list]:
    """The evaluation row of a model on (question, prompt) pairs, and the samples; n counts
    questions left out too.
    """
    settings = dataclasses.replace(cfg, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p)
    seconds, samples = {"sample": 0.0, "verify": 0.0}, []
    for greedy, repeated in (
        (True, pairs),
        (False, [pair for pair in pairs for _ in range(cfg.eval_k)]),
    ):
        if not repeated:
            continue
        rollout = roll_out(
            model,
            repeated,
            (cfg.seed, "eval", greedy),
            settings,
            greedy,
            encoding,
            processes,
            seconds,
        )
        for (question, _), ids, text, score in zip(
            repeated, rollout.completions, rollout.texts, rollout.scores
        ):
            samples.append({**question._asdict(), "completion": text, **score._asdict(),
                            "greedy": greedy, "length": len(ids),
                            "truncated": ids[-1] != encoding.eot_token})  # fmt: skip
    row = {"step": step, "kind": "eval", "task": cfg.eval_task or cfg.task, **summarize(samples, n),
           "too_long": n - len(pairs), "seconds": seconds,
           "mean_length": sum(s["length"] for s in samples) / max(1, len(samples)),
           "truncated": sum(s["truncated"] for s in samples) / max(1, len(samples))}  # fmt: skip
    return row, samples


def write_samples(path: Path, samples: list[dict]) -> None:
    write_atomically(path, b"".join(json.dumps(sample).encode() + b"\n" for sample in samples))


def draw(folder: Path, rows: list[dict]) -> None:
    """echo.png: above pass@1, maj@k and pass@k against steps; below the shares of the formats,
    stacked.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, k = [row["step"] for row in rows], rows[0]["k"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
    lines = {
        "pass@k": f"pass@{k}", "maj@k": f"maj@{k}", "pass@1": "pass@1 (greedy)",
        "sampled_pass@1": "pass@1 (sampled)",
    }  # fmt: skip
    for name, label in lines.items():
        if name in rows[0]:
            top.plot(steps, [row[name] for row in rows], marker="o", label=label)
    top.set(
        ylabel="share of questions",
        ylim=(0, 1),
        title=f"{rows[0]['task']}, {rows[0]['n']} questions",
    )
    top.legend()
    group = "sampled_formats" if k else "formats"
    stacks = [[row[group][name]["share"] for row in rows] for name in FORMATS]
    bottom.stackplot(steps, *stacks, labels=FORMATS)
    kind = "samples" if k else "greedy completions"
    bottom.set(
        ylabel=f"share of {kind}", xlabel="RL step", ylim=(0, 1), xlim=(0, max(1, steps[-1]))
    )
    bottom.legend(loc="lower left")
    figure.savefig(folder / "echo.png.tmp", format="png", dpi=120)
    plt.close(figure)
    (folder / "echo.png.tmp").replace(folder / "echo.png")


# ---------------------------------------------------------------- the run


def refuse_unused(cfg: Config) -> None:
    """Raises UserError where a setting was changed that the algorithm does not read.

    What a file given by --config holds is not held against it: another algorithm's run, whose
    config.json has every field, may be repeated with this one.
    """
    file = [f"--config={cfg.config}"] if cfg.config else []
    flags = [*file, f"--preset={cfg.preset}", f"--algo={cfg.algo}"]
    default = parse_config(Config, PRESETS, flags)
    for names, algos in USED_BY.items():
        for name in names.split() if cfg.algo not in algos.split() else ():
            if getattr(cfg, name) != getattr(default, name):
                raise UserError(f"--{name} does nothing with --algo={cfg.algo}: leave it out")


def check(cfg: Config) -> None:
    """Raises UserError on settings that cannot work, before anything is loaded."""
    require_positive(cfg, "prompts_per_step", "group_size", "max_new_tokens", "temperature",
                     "top_p", "minibatch_size", "micro_batch_size", "epochs", "learning_rate",
                     "critic_learning_rate", "max_steps", "eval_every", "sample_batch_size",
                     "save_every", "log_every", "time_limit")  # fmt: skip
    if not 0 <= cfg.warmup < 1:
        raise UserError(f"--warmup={cfg.warmup} is a share of the schedule: from 0 to below 1")
    if cfg.algo in ("grpo", "reinforce") and cfg.group_size < 2:
        raise UserError(f"--group_size=1 gives {cfg.algo} nothing to compare: use 2 or more")
    if cfg.algo in ("ppo", "grpo", "reinforce") and cfg.top_p != 1:
        raise UserError(f"--top_p={cfg.top_p}: {cfg.algo} trains the untruncated distribution, so "
                        "it must sample from it: use --top_p=1")  # fmt: skip
    if cfg.algo in ("grpo", "reinforce") and cfg.kl_in == "reward" and cfg.kl_coef:
        raise UserError(f"{cfg.algo} has one reward for a completion, not one for each token: use "
                        "--kl_in=loss")  # fmt: skip
    refuse_unused(cfg)
    if cfg.kl_in == "loss" and cfg.kl_estimator == "k1" and cfg.kl_coef and cfg.algo != "ei":
        raise UserError("the gradient of k1 in the loss is zero in expectation: use "
                        "--kl_estimator=k3 or k2, or --kl_in=reward")  # fmt: skip
    if (
        min(cfg.kl_coef, cfg.eval_k, cfg.eval_temperature) < 0
        or not 0 < cfg.eval_top_p <= 1
        or cfg.top_p > 1
    ):
        raise UserError(
            "kl_coef, eval_k and eval_temperature must be 0 or more, top_p and eval_top_p in (0, 1]"
        )
    try:
        import matplotlib  # noqa: F401  for echo.png: better missed now than later
    except ImportError:
        raise UserError("echo.png needs matplotlib: pip install -r requirements.txt") from None


def load_tasks(cfg: Config) -> tuple[list[Question], list[Question]]:
    """The questions to learn from (none for eval) and to evaluate on."""
    if cfg.algo == "eval":
        return [], load_questions(
            cfg.eval_task or cfg.task, "test", cfg.hub, cfg.eval_questions or cfg.questions
        )
    train = load_questions(cfg.task, "train", cfg.hub, cfg.questions)
    if cfg.questions and not cfg.eval_task and not cfg.eval_questions:
        held = min(256, max(1, len(train) // 10))
        return train[:-held], train[-held:]
    return train, load_questions(cfg.eval_task or cfg.task, "test", cfg.hub, cfg.eval_questions)


def snapshot_steps(total: int) -> set[int]:
    """Up to 15 steps from 1 to total, logarithmically spaced: where step_NNNNNN.pt is kept."""
    return {round(total ** (i / 14)) for i in range(15)}


def passed_over(name: str, whole: list, kept: list, room: int) -> str:
    """What is said of questions that do not fit."""
    end = ", and counted as wrong" if name == "test" else ""
    return (f"{len(whole) - len(kept)} of {len(whole)} {name} questions are longer than the {room} "
            f"tokens that the context leaves them: passed over{end}")  # fmt: skip


def conclude(log: RunLog, cfg: Config, folder: Path, evaluations: list[dict], seconds: float):
    """Shows the first and the last evaluation, and what is off."""
    first, last = evaluations[0], evaluations[-1]
    log.say(f"\n{cfg.algo} on {last['task']}, {last['n']} questions, 95% intervals; "
            f"{folder}/echo.png ({seconds:.0f} s)\n")  # fmt: skip
    log.say(table({f"step {row['step']}": row for row in (first, last)}))
    if log.active and cfg.algo != "eval":
        rows = map(json.loads, open(folder / "metrics.jsonl"))
        for sentence in advice([row for row in rows if row["kind"] == "train"]):
            log.say(f"note: {sentence}")


@signals_restored()
def main(cfg: Config) -> dict:
    """Trains for max_steps rollouts (or only evaluates); returns the last evaluation row."""
    check(cfg)
    start_servers()  # before a GPU context exists
    evaluates, name = cfg.algo == "eval", cfg.algo
    name += f"-{cfg.eval_task or cfg.task}" if evaluates else ""
    cfg = dataclasses.replace(cfg, out_dir=cfg.out_dir or f"out/{name}")
    processes, stop, folder = setup_distributed(cfg.device), StopSignal(), Path(cfg.out_dir)
    device, total = processes.device, 0 if evaluates else cfg.max_steps
    # on a CPU a token waits for the cache, and in bfloat16 that was read no faster
    dtype = "float32" if cfg.dtype == "auto" and device.type == "cpu" else cfg.dtype
    context = autocast(dtype, device)
    train_set, test_set = load_tasks(cfg)
    base_file = folder / "step_000000.pt"  # the base as this run first saw it
    begun = base_file.exists() and not cfg.overwrite
    base, tokenizer = load_model(base_file if begun else cfg.init_from, device)
    encoding, context_size = get_tokenizer(tokenizer), base.config.context
    train_pairs = fitting(train_set, encoding, context_size, cfg.max_new_tokens)
    test_pairs = fitting(test_set, encoding, context_size, cfg.max_new_tokens)
    if not test_pairs or not (train_pairs or evaluates):
        raise UserError(f"no question fits: a context of {context_size} tokens less "
                        f"--max_new_tokens={cfg.max_new_tokens} is too little, lower it or "
                        "pretrain with a longer --context")  # fmt: skip
    step, state = 0, open_run(cfg, processes)
    if processes.rank == 0 and not base_file.exists():
        save_checkpoint(base_file, model_state(base, tokenizer))

    model, reference = copy.deepcopy(base), Policy(base, cfg.temperature).requires_grad_(False)
    network = Policy(model, cfg.temperature, train_entropy=cfg.entropy_coef != 0)
    policy = Trainer(network, cfg.learning_rate, cfg, processes)
    critic = None
    if cfg.algo == "ppo":
        critic = Trainer(Critic(base), cfg.critic_learning_rate, cfg, processes)
    if state:
        step = state["step"]
        restore(folder / "ckpt.pt", state, model=model, optimizer=policy.optimizer)
        if critic:
            both = dict(critic=critic.module, critic_optimizer=critic.optimizer)
            restore(folder / "ckpt.pt", state, **both)
    evaluations = state["evaluations"] if state else []
    log = RunLog(cfg, processes, total, step, state["metrics_size"] if state else 0)
    del state  # a second copy of the weights
    for name, whole, kept in (("train", train_set, train_pairs), ("test", test_set, test_pairs)):
        if len(kept) < len(whole):
            log.say(passed_over(name, whole, kept, context_size - cfg.max_new_tokens))
    finished = bool(evaluations) and evaluations[-1]["step"] == total == step
    if finished:
        log.say(f"{folder} is finished: --overwrite=true starts it afresh")
    elif step:
        log.say(f"continuing {folder} at step {step}")
    started = time.perf_counter()

    def save() -> None:
        if processes.rank == 0:
            save_checkpoint(folder / "ckpt.pt", {
                **model_state(model, tokenizer), "step": step,
                "optimizer": policy.optimizer.state_dict(),
                "critic": critic and critic.module.state_dict(), "config": dataclasses.asdict(cfg),
                "critic_optimizer": critic and critic.optimizer.state_dict(),
                "evaluations": evaluations, "metrics_size": log.size(),
            })  # fmt: skip

    while not finished:
        evaluated = bool(evaluations) and evaluations[-1]["step"] == step
        if (step % cfg.eval_every == 0 or step == total) and not evaluated:
            n = len(test_set)
            with context:
                row, samples = evaluate(model, test_pairs, n, step, cfg, encoding, processes)
            evaluations = [*evaluations, row]
            log.write(row)
            shares = ", ".join(f"{f} {part['share']:.0%}" for f, part in row["formats"].items())
            log.say(f"step {step} evaluation: pass@1 {row['pass@1']:.1%}, greedy {shares}")
            if processes.rank == 0:
                write_samples(folder / f"samples_{step:06d}.jsonl", samples)
                draw(folder, evaluations)
        if step == total:
            save()
            break
        picked = pick_prompts(len(train_pairs), step, cfg.prompts_per_step, cfg.seed)
        groups = [train_pairs[i] for i in picked for _ in range(cfg.group_size)]
        seconds = {"sample": 0.0, "verify": 0.0}
        with context:
            key = cfg.seed, "rollout", step
            rollout = roll_out(model, groups, key, cfg, False, encoding, processes, seconds)
        learning = time.perf_counter()
        if restarts(cfg):
            model.load_state_dict(base.state_dict())
            policy.reset()
        with memory_for(cfg, "micro_batch_size"):
            metrics = learn(rollout, step, policy, critic, reference, cfg, context, processes)
        seconds["train"] = time.perf_counter() - learning
        step += 1
        log.bar.update()
        if step % cfg.log_every == 0 or step == total:
            described = describe_rollout(rollout, cfg, encoding.eot_token)
            log.write({"step": step, "kind": "train", **described, **metrics, "seconds": seconds})
        if step in snapshot_steps(total) and processes.rank == 0:
            save_checkpoint(folder / f"step_{step:06d}.pt", model_state(model, tokenizer))
        stopping = stop.agreed(processes)
        if step % cfg.save_every == 0 or stopping:
            save()
        if stopping and step < total:
            log.say(f"stopped at step {step}: the same command continues it")
            log.close()
            return evaluations[-1]
    log.close()
    conclude(log, cfg, folder, evaluations, time.perf_counter() - started)
    dist.barrier()
    return evaluations[-1]


if __name__ == "__main__":
    launch(main, Config, PRESETS)
