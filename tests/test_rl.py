import dataclasses
import functools
import itertools
import json
import math
import os
import random
import signal
import tracemalloc
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import rl
from conftest import Spy, make_gpt
from data import UserError, toy
from data.tasks import Question
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from pretrain import autocast, compiled, parse_config, save, setup_distributed
from rl import Batch, Config, Critic, Lab, Policy, Row, Trainer
from test_pretrain import (CPU, SERVER, assert_same_run, at, bare_system, deaths, raise_signals,
                           rows_of, run, script, tensors)
from verify import FORMATS, Score, score

QUICK = dict(max_steps=3, prompts_per_step=4, group_size=2, max_new_tokens=24, minibatch_size=4,
             micro_batch_size=3, eval_k=2, eval_every=2, save_every=1, sample_batch_size=8)


def settings(out_dir, base, algo="ppo", **changes) -> Config:
    return Config(**{**QUICK, "algo": algo, "init_from": base, "out_dir": str(out_dir), **changes})


def make_lab(cfg, processes=CPU) -> Lab:
    """A run without a folder."""
    nothing = types.SimpleNamespace(processes=processes, stop_seen=False, stopping=lambda: False)
    return Lab(cfg, nothing, get_tokenizer("toy"), autocast("float32", processes.device))


def make_row(prompt, completion, reward=0.0, logp=0.0) -> Row:
    ids = np.array(completion, dtype=np.int32)
    return Row(Question("", "", ""), prompt, ids, "", Score(reward, "text", None, None), logp)


def random_rows(rewards, prompt_lengths=(3, 5, 2, 7), group=1) -> list[Row]:
    """Completions of 1 to 6 tokens of random ids, one for each reward, `group` of them a prompt."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 50, prompt_lengths[i % len(prompt_lengths)]).tolist()
               for i in range(len(rewards) // group)]
    return [make_row(prompts[i // group], draw.integers(1, 50, draw.integers(1, 7)), reward)
            for i, reward in enumerate(rewards)]


def batch_of(rows) -> Batch:
    return rl.make_batch(rows, torch.ones(len(rows)), CPU.device)


# ---------------------------------------------------------------- advantages
def test_gae_agrees_with_numbers_worked_out_by_hand():
    """At a terminal token (row 0) and before padding (row 1): trl#1536, cleanrl#16."""
    reward = torch.tensor([[0.0, 0.0, 1.0], [0.5, 1.0, 9.0]])
    value = torch.tensor([[0.2, 0.4, 0.7], [0.1, 0.3, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage, returns = rl.gae(reward, value, mask, lam=0.5)
    # row 0, from its end: 1 - 0.7 = 0.3;  0.7 - 0.4 + 0.5*0.3 = 0.45;  0.4 - 0.2 + 0.5*0.45 = 0.425
    # row 1, from its end: 1 - 0.3 = 0.7;  0.5 + 0.3 - 0.1 + 0.5*0.7 = 1.05
    torch.testing.assert_close(advantage, torch.tensor([[0.425, 0.45, 0.3], [1.05, 0.7, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.625, 0.85, 1.0], [1.15, 1.0, 0.0]]))


def test_the_reward_is_on_the_last_token_even_of_a_one_token_answer():
    """trl#2575 put it elsewhere; a reward of zero was read as missing (OpenRLHF#1219)."""
    mask = torch.arange(3) < torch.tensor([[1], [3], [2]])
    old_logp, ref_logp = torch.full((3, 3), -1.0), torch.full((3, 3), -3.0)
    found = rl.token_rewards(torch.tensor([1.0, 1.0, 0.0]), old_logp, ref_logp, mask, kl_coef=0.1)
    expected = [[0.8, 0.0, 0.0], [-0.2, -0.2, 0.8], [-0.2, -0.2, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(value):
    """A standard deviation of zero made NaN, or a million (NeMo-RL#1518)."""
    reward = torch.tensor([value] * 8 + [0.0, 1.0] + [0.0] * 6)
    advantage = rl.group_advantage(reward, 8, scale=True)
    assert advantage[:8].tolist() == [0.0] * 8 and advantage[9] > 0 > advantage[8]
    assert float(advantage[8:].std()) == pytest.approx(1, abs=1e-5)
    plain = rl.group_advantage(reward, 8, scale=False)  # the distance from the group's mean
    assert plain.tolist() == [0.0] * 8 + [-0.125, 0.875] + [-0.125] * 6


def test_expert_iteration_learns_from_correct_completions_once():
    rows = [make_row([1], [5, 0], 1.0), make_row([1], [5, 0], 1.0), make_row([1], [6, 0]),
            make_row([2], [5, 0], 1.0)]
    assert rl.first_correct(rows).tolist() == [1.0, 0.0, 0.0, 1.0]
    ((batches, tokens),) = rl.make_minibatches(rows, 0, make_lab(Config(algo="ei")))
    assert len(batches) == 1 and len(batches[0].tokens) == 2 and tokens == 4


# ---------------------------------------------------------------- log-probs and losses
def test_sharing_a_prompt_and_padding_change_no_log_prob_and_no_gradient():
    """Attention behind the end (trl#2708), shifted positions (trl#6800), logits of T = 1 (trl#3029)
    or off by one from their labels (trlx#509), among others."""
    gpt = make_gpt().double()
    rows = random_rows([0.0] * 9, prompt_lengths=(4, 13, 7), group=3)
    rows.append(make_row([9] * 30, [5]))  # a long prompt, and a completion of a single token
    batch = batch_of(rows)
    assert len(batch.prompts) == 4
    logp = Policy(gpt, 0.7)(batch)
    weight = torch.randn(logp.shape, dtype=torch.float64)  # another for each token
    (logp * weight).sum().backward()
    shared = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    for i, row in enumerate(rows):
        whole, first = torch.tensor([row.prompt + row.completion.tolist()]), len(row.prompt) - 1
        logps = (gpt(whole[:, :-1]) / 0.7).log_softmax(-1)
        alone = logps.gather(2, whole[:, 1:, None])[0, first:, 0]
        torch.testing.assert_close(logp[i, : len(alone)], alone)
        assert logp[i, len(alone) :].abs().sum() == 0
        (alone * weight[i, : len(alone)]).sum().backward()
    torch.testing.assert_close(shared, [p.grad for p in gpt.parameters()])


def test_the_end_of_text_is_trained_on_though_padding_has_its_id():
    """What is padding is told by lengths: by ids, stopping would never be learned (trl#6357)."""
    batch = batch_of([make_row([4, 0], [5, 6, 0]), make_row([4], [0])])
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]


def enumeration():
    """Three tokens, each a completion of its own: logits, log-probs, those of a base."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    return logits, logits.log_softmax(0), ref_logp


def expected_gradient(logits, logp, token_loss):
    """That of the loss over what the policy samples: each token has its probability as weight."""
    weighed = (logp.detach().exp()[:, None] * token_loss).sum()
    return torch.autograd.grad(weighed, logits, retain_graph=True)[0]


def test_k1_in_the_reward_has_the_gradient_of_the_kl_and_in_the_loss_none():
    """open-instruct#534: the expectation of grad(logp - ref_logp) under the policy is zero."""
    logits, logp, ref_logp = enumeration()
    kl = (logp.exp() * (logp - ref_logp)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    in_loss = expected_gradient(logits, logp, (logp - ref_logp)[:, None])
    assert in_loss.abs().max() < 1e-12 < kl_gradient.abs().max()
    old_logp, mask = logp.detach()[:, None], torch.ones(3, 1, dtype=torch.bool)
    advantage = rl.token_rewards(torch.zeros(3), old_logp, ref_logp[:, None], mask, 1.0)
    batch = types.SimpleNamespace(advantage=advantage, old_logp=old_logp)
    loss = rl.policy_loss(batch, logp[:, None], Config(algo="ppo"))
    torch.testing.assert_close(expected_gradient(logits, logp, loss), kl_gradient)


def test_k3_is_never_negative_on_average_the_kl_and_in_the_loss_pulls_as_the_reverse_kl():
    logits, logp, ref_logp = enumeration()
    k3 = rl.k3(logp, ref_logp)
    assert (k3 >= 0).all() and rl.k3(logp, logp).abs().max() == 0
    torch.testing.assert_close((logp.exp() * k3).sum(), (logp.exp() * (logp - ref_logp)).sum())
    reverse = (ref_logp.exp() * (ref_logp - logp)).sum()
    (expected,) = torch.autograd.grad(0.5 * reverse, logits, retain_graph=True)
    batch = types.SimpleNamespace(advantage=torch.zeros(3, 1), ref_logp=ref_logp[:, None])
    loss = rl.policy_loss(batch, logp[:, None], Config(algo="reinforce", kl_coef=0.5))
    torch.testing.assert_close(expected_gradient(logits, logp, loss), expected)


@pytest.mark.parametrize("algo", ["ppo", "grpo", "reinforce"])
def test_on_policy_every_loss_has_the_policy_gradient_by_enumeration(algo):
    logits, logp, _ = enumeration()
    reward = torch.tensor([1.0, 0.0, 0.2], dtype=torch.float64)
    (expected,) = torch.autograd.grad((logp.exp() * reward).sum(), logits, retain_graph=True)
    batch = types.SimpleNamespace(advantage=reward[:, None], old_logp=logp.detach()[:, None])
    loss = rl.policy_loss(batch, logp[:, None], Config(algo=algo, kl_coef=0.0))
    torch.testing.assert_close(-expected_gradient(logits, logp, loss), expected)


def test_the_ratio_is_clipped_only_where_that_limits_the_gain():
    new, advantage = torch.tensor([0.5, -0.5, 0.5, -0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    rl.clipped(new.requires_grad_(), torch.zeros(4), advantage, 0.2).sum().backward()
    assert [g == 0 for g in new.grad.tolist()] == [True, False, False, True]


def test_the_value_loss_takes_the_larger_of_the_clipped_and_the_plain_error():
    value, returns = torch.tensor([1.0, 0.1, -1.0]), torch.tensor([2.0, 2.0, -0.5])
    found = rl.clipped_value(value, torch.zeros(3), returns, clip=0.2)
    torch.testing.assert_close(found, torch.tensor([1.8**2 / 2, 1.9**2 / 2, 0.5**2 / 2]))


# ---------------------------------------------------------------- updates
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def learned(processes=CPU, layers=2, rows=None, hook=None, **changes) -> tuple[list, dict]:
    """Weights of policy and critic, and metrics, after the updates of a rollout of 12 in two
    epochs; `hook` sees the trainers before."""
    setup_distributed("cpu")
    cfg = Config(**{"group_size": 4, "minibatch_size": 12, "micro_batch_size": 2, "epochs": 2,
                    "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "kl_coef": 0.1,
                    "temperature": 0.7, **changes})
    gpt = make_gpt(layers=layers).double()  # Adam makes much of rounding where a gradient is 0
    policy = Trainer(Policy(gpt, 0.7), cfg.learning_rate)
    critic = cfg.algo == "ppo" and Trainer(Critic(gpt), cfg.critic_learning_rate)
    trainers = [trainer for trainer in (policy, critic) if trainer]
    for trainer in trainers if hook else ():
        hook(trainer)
    reference = Policy(make_gpt(4, layers).double(), 0.7)
    rows = rows or random_rows(REWARDS, group=4)
    metrics = rl.learn(rows, 0, policy, critic, reference, make_lab(cfg, processes))
    return [trainer.module.state_dict() for trainer in trainers], metrics


@pytest.mark.parametrize("algo", ["ppo", "grpo", "reinforce", "ei"])
@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_the_gradient_is_the_same_for_every_way_to_split_a_minibatch(algo, micro_batch_size):
    """Averages over micro-batches weigh sequences of unequal length wrongly (trl#2647)."""

    def gradients(size: int) -> list:
        found = []

        def hook(trainer):
            trainer.optimizer.register_step_pre_hook(
                lambda *_: found.append([p.grad.clone() for p in trainer.module.parameters()]))

        learned(algo=algo, epochs=1, micro_batch_size=size, hook=hook, grad_clip=1e9)
        return found

    split, whole = gradients(micro_batch_size), gradients(12)
    assert len(whole) == (2 if algo == "ppo" else 1)
    assert all(max(float(g.abs().max()) for g in network) > 1e-3 for network in whole)
    torch.testing.assert_close(split, whole, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("algo, kl_coef", [("ppo", 0.1), ("ppo", 0.0), ("grpo", 0.0)])
def test_the_logged_kl_is_that_of_whole_completions_whatever_its_coefficient(algo, kl_coef):
    """trl#1180 logged another than it used, trl#463 the wrong sign; k3 of tokens jumps."""
    _, metrics = learned(algo=algo, kl_coef=kl_coef)
    batch = batch_of(random_rows(REWARDS, group=4))
    logp, ref_logp = (Policy(make_gpt(seed).double(), 0.7)(batch) for seed in (3, 4))
    assert metrics["kl"] == pytest.approx(float((logp - ref_logp).sum(dim=1).mean().detach()))


def test_entropy_and_clip_fraction_are_of_the_whole_rollout_whatever_is_trained_on():
    """Of the rows that a setting happens to train on they cannot be compared between settings."""
    rows = random_rows([0.0] * 4 + [1.0, 0.0, 0.0, 1.0], group=4)  # the first group says nothing
    rows = [row._replace(logp=-2.0 * len(row.completion)) for row in rows]
    assert rl.describe(rows, Config(group_size=4), 0)["entropy"] == pytest.approx(2.0)
    seen = dict(algo="grpo", rows=rows, learning_rate=0.5, clip_eps=1e-9, minibatch_size=4)
    for kl_coef in (0.0, 0.1):  # the ratio is off 1 everywhere but in the first minibatch
        assert learned(**seen, kl_coef=kl_coef)[1]["clip_fraction"] > 0.7


@pytest.mark.parametrize("algo", ["ppo", "grpo", "reinforce", "ei"])
def test_the_first_learning_rate_is_above_zero_and_the_last_at_its_floor(algo):
    once = dict(algo=algo, epochs=1, min_learning_rate=0.1)
    assert 0 < learned(**once, max_steps=1000)[1]["lr"] <= 1e-3
    assert learned(**once, max_steps=1, warmup=0.5)[1]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("micro_batch_size", [2, 3, 12])
def test_before_the_first_update_every_ratio_is_exactly_1_at_t_0_7(micro_batch_size):
    """Log-probs at T = 1 of samples at T = 0.7 (trl#3029, trl#4159)."""
    assert learned(algo="ppo", micro_batch_size=micro_batch_size)[1]["ratio_max_dev"] == 0.0


@pytest.mark.parametrize("algo", ["grpo", "reinforce", "ei"])
def test_a_rollout_without_signal_gives_a_finite_zero_gradient(algo):
    """Masked tokens in the denominator, 0 / 0 (trl#6439)."""
    (weights,), metrics = learned(algo=algo, kl_coef=0.0, rows=random_rows([0.0] * 8, group=4))
    assert metrics["grad_norm"] == 0.0
    torch.testing.assert_close(weights["gpt.embed.weight"], make_gpt().embed.weight.data.double())


def test_a_minibatch_is_of_whole_groups_dealt_evenly_and_shared_out_to_the_ranks():
    """A remainder of few rows would get a full step of the optimiser."""
    rows = random_rows([0.0] * 40, group=4)
    cfg, seen = Config(minibatch_size=16, group_size=4, micro_batch_size=8), []
    for rank in range(2):
        lab = make_lab(cfg, CPU._replace(rank=rank, world=2))
        dealt = rl.make_minibatches(rows, 0, lab)
        assert [sum(len(b.index) for b in batches) for batches, _ in dealt] in (
            [8, 8, 8], [8, 4, 4])  # of 16, 12 and 12: whole groups
        seen += [tuple(b.prompts[i].tolist()) for batches, _ in dealt for b in batches
                 for i in b.index]
    assert len(seen) == 40 and len(set(map(tuple, seen))) >= 10


def test_an_update_never_waits_for_the_device():
    """A .item() or a mask's indices in a micro-batch would idle a GPU until the host answers."""
    spies = []

    def watched(trainer):
        update = trainer.update

        def spying(*args):
            with Spy() as spy:
                spies.append(spy)
                return update(*args)

        trainer.update = spying

    learned(algo="ppo", hook=watched)
    assert len(spies) == 4 and all("mm" in spy.names for spy in spies)
    assert not set.union(*(spy.names for spy in spies)) & {"_local_scalar_dense", "nonzero"}


SPREAD = {  # over two ranks: three groups in minibatches of two and one; of one rank 1 has none
    "ppo": dict(algo="ppo", minibatch_size=8), "grpo": dict(algo="grpo", minibatch_size=4),
    "reinforce": dict(algo="reinforce", minibatch_size=8), "ei": dict(algo="ei", minibatch_size=2),
}


def updates(rank: int) -> None:
    processes = setup_distributed("cpu")
    found = {name: learned(processes, **changes) for name, changes in SPREAD.items()}
    torch.save(found, "results.pt")


def test_an_update_of_two_ranks_is_that_of_one(tmp_path):
    """Weighing by a rank's own tokens, or whitening by its own statistics (transformers#34242)."""
    assert run(tmp_path / "one", updates) == [0] and run(tmp_path / "two", updates, 2) == [0, 0]
    one, *two = (torch.load(tmp_path / p / "results.pt") for p in ("one/0", "two/0", "two/1"))
    for name in SPREAD:
        moved = one[name][0][0]["gpt.embed.weight"] - make_gpt().embed.weight.double()
        assert moved.abs().max() > 1e-3
        for rank in two:
            torch.testing.assert_close(rank[name][0], one[name][0], atol=1e-6, rtol=0)
            assert rank[name][1] == pytest.approx(one[name][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("algo, steps", [("ppo", 40), ("grpo", 40), ("reinforce", 60), ("ei", 1)])
def test_each_algorithm_learns_the_token_that_is_rewarded(algo, steps):
    """A bandit of 8 arms: one prompt, one token, reward for token 5."""
    setup_distributed("cpu")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=9, context=4, width=16, layers=1, heads=2, init_std=0.1))
    cfg = Config(algo=algo, group_size=64, kl_coef=0.0, max_steps=steps, learning_rate=1e-2,
                 epochs=40 if algo == "ei" else 1)
    policy, reference = Trainer(Policy(gpt, 1.0), 1e-2), Policy(make_gpt(), 1.0)
    critic = algo == "ppo" and Trainer(Critic(gpt), cfg.critic_learning_rate)
    for step in range(steps):
        p = gpt(torch.tensor([[1]]))[0, -1].softmax(-1).detach()
        arms = p.multinomial(64, True, generator=torch.Generator().manual_seed(step)).tolist()
        rows = [make_row([1], [arm], float(arm == 5)) for arm in arms]
        rl.learn(rows, step, policy, critic, reference, make_lab(cfg))
    assert float(gpt(torch.tensor([[1]]))[0, -1].softmax(-1)[5].detach()) > 0.9


# ---------------------------------------------------------------- rollouts
def sampled(base, numbers, world=1, rank=0, **changes) -> list[Row]:
    """A rollout of a question for each number."""
    lab = make_lab(settings("unused", base, temperature=0.7, **changes))
    model, _ = rl.load_model(base, "cpu")
    questions = [Question("same", f"Ann has {i} apples.", str(i)) for i in numbers]
    asked = [(q, lab.encoding.encode_ordinary(q.question + "\n\n")) for q in questions]
    return rl.roll_out(model, asked, ("key",), 0.7, 1.0, "toy", lab)[0]


def test_answers_stay_with_their_questions(base, monkeypatch):
    """Prompts and answers misaligned after shuffling or sharding (open-instruct#1484)."""
    monkeypatch.setattr(rl, "score_batch", lambda texts, golds, limit: [
        Score(float(gold), "text", gold, None) for gold in golds])
    numbers = random.Random(0).sample(range(40), 24)
    rows = sampled(base, numbers)
    assert [row.score.reward for row in rows] == numbers
    for row in rows:
        prompt = get_tokenizer("toy").decode(row.prompt)
        assert prompt == f"Ann has {int(row.score.reward)} apples.\n\n"


def test_completions_of_one_question_differ_and_reruns_agree(base):
    """All ranks sampled the same completions (trl#2824)."""
    first, again, small = (sampled(base, [3] * 8, sample_batch_size=n) for n in (8, 8, 3))
    bits = [[row.completion.tobytes() for row in rows] for rows in (first, again, small)]
    assert bits[0] == bits[1] == bits[2] and len(set(bits[0])) == 8


def test_the_log_probs_that_are_trained_are_those_that_were_sampled(base):
    """Training at T = 1 what was sampled at T = 0.7 (trl#3029)."""
    rows, (model, _) = sampled(base, [1, 7, 3]), rl.load_model(base, "cpu")
    logp = Policy(model, 0.7)(batch_of(rows)).sum(dim=1)
    torch.testing.assert_close(logp, torch.tensor([row.logp for row in rows]), atol=1e-4, rtol=0)


def test_a_rollout_of_the_paper_s_expert_iteration_is_held_in_1_5_gb(monkeypatch):
    """478,272 completions of 250 tokens on each rank: without room for padding, ids of 64 bits or
    a prompt for each."""
    cfg = parse_config(Config, rl.PRESETS, ["--preset=paper", "--algo=ei"])
    lab, total = make_lab(cfg, setup_distributed("cpu")), cfg.prompts_per_step * cfg.group_size
    text = "".join(itertools.islice(toy.corpus("toy-omi1"), 500))
    ids = torch.tensor(lab.encoding.encode_ordinary(text))  # of four letters, as GPT-2's

    def generated(model, prompts, *rest):
        first = torch.randint(len(ids) - 1024, (len(prompts), 1))
        tokens = ids[first + torch.arange(1024)]
        return tokens, (torch.arange(1024) < 250).expand_as(tokens), torch.zeros(tokens.shape)

    monkeypatch.setattr(rl, "generate", generated)
    monkeypatch.setattr(rl, "score_batch", lambda texts, *_: [
        Score(0.0, "text", text[:20], "wrong") for text in texts])
    pairs = [(Question(str(i), text[:500], "7"), list(range(100))) for i in range(160)]
    asked = [pair for pair in pairs for _ in range(cfg.group_size)]
    tracemalloc.start()
    rows, _ = rl.roll_out(None, asked, ("key",), 1.0, 0.95, "gsm8k", lab)
    held, peak = (size / len(rows) * total for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert total == 478_272 and held < 1.5e9 and peak < 4e9, (held, peak)


# ---------------------------------------------------------------- runs
SERVER.set_forkserver_preload(["test_pretrain", "test_rl", "torch._dynamo", "matplotlib"])
VARIANTS = {"ppo": {}, "grpo": {"algo": "grpo"}, "ei": {"algo": "ei", "epochs": 2},
            "online ei": {"algo": "ei", "restart_from_base": False}}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    """A file of few questions, of which 4 are held out: the evaluations take no time."""
    file = tmp_path_factory.mktemp("questions") / "questions.json"
    rows = [{"id": "same", "question": f"Ann has {i} apples.", "answer": i} for i in range(40)]
    file.write_text(json.dumps(rows))
    return str(file)


def training(base, accident=None, **changes):
    """Work for run(): the script itself, with an accident(rank) waiting to happen."""
    flags = {**QUICK, "init_from": base, "out_dir": "run", "eval_every": 3, **changes}
    return functools.partial(quick_script, flags, accident)


def quick_script(flags: dict, accident, rank: int) -> None:
    """A completion of an even number of letters is right: a base of six steps has no other merit.
    The picture, which takes long and which another test sees to, is left out."""
    rl.publish = lambda folder, samples, rows: save(
        folder / f"samples_{rows[-1]['step']:06d}.jsonl", json.dumps(samples).encode())
    rl.score_batch = lambda texts, *_: [Score(1.0 - len(t) % 2, "text", None, None) for t in texts]
    script("rl", flags, accident, rank)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, questions):
    """The folder of a run of a variant that nothing disturbed."""

    @functools.cache
    def undisturbed(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        assert run(folder, training(base, questions=questions, **VARIANTS[name])) == [0]
        return folder / "0" / "run"

    return undisturbed


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(
        base, questions, tmp_path, whole, name):
    """kill -9 before a random touch of a file: a row, a checkpoint, samples, a rename."""
    work = functools.partial(training, base, questions=questions, **VARIANTS[name])
    assert deaths(tmp_path, work, seed=name) > 1
    assert_same_run(whole(name), tmp_path / "0" / "run")


@pytest.mark.parametrize("place, call, number, world, step", [
    ("generate", 1, signal.SIGTERM, 1, 0), ("generate", 4, signal.SIGINT, 1, 1),
    ("schedule", 5, signal.SIGTERM, 1, 1),  # amid a round of ei, of which nothing is saved
    ("learn", 2, signal.SIGTERM, 1, 2), ("evaluate", 2, signal.SIGINT, 1, 3),
    ("generate", 5, signal.SIGTERM, 2, 2), ("learn", 2, signal.SIGTERM, 2, 2)])
def test_a_signal_to_one_rank_in_any_phase_saves_exits_with_0_and_the_run_goes_on(
        base, questions, tmp_path, whole, place, call, number, world, step):
    """Two ranks see what one sees, and continue together, if need be on a system without locks."""
    name, ends, every = ("ei", 2, 1) if place == "schedule" else ("ppo", 0, 99)
    folder, undisturbed = tmp_path / "run", whole(name)
    work = functools.partial(training, base, questions=questions, out_dir=folder,
                             save_every=every, **VARIANTS[name])
    signals = functools.partial(raise_signals, number)
    accident = functools.partial(at, f"rl.{place}", call, signals, world - 1)
    assert run(tmp_path, work(accident), world) == [ends] * world
    said = "".join((tmp_path / "0" / std).read_text() for std in ("stdout", "stderr"))
    assert ("the same command starts again" if ends else "the same command continues it") in said
    assert torch.load(folder / "ckpt.pt", weights_only=True)["step"] == step
    assert run(tmp_path, work(bare_system), world) == [0] * world
    if world == 1:
        return assert_same_run(undisturbed, folder)
    exact = "step", "kind", "length", "pass@1", "pass@k", "formats", "sampled_formats", "reward"
    for left, right in zip(rows_of(undisturbed), rows_of(folder), strict=True):
        assert [left.get(key) for key in exact] == [right.get(key) for key in exact]
    ours, theirs = (torch.load(path / "step_000003.pt")["model"] for path in (undisturbed, folder))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("again", [True, False])
def test_a_round_of_expert_iteration_starts_from_the_base_or_goes_on(
        base, questions, tmp_path, monkeypatch, again):
    """With the optimiser's state of the round before, Adam would push where that one went."""
    seen, learn, start = [], rl.learn, rl.load_model(base, "cpu")[0].state_dict()

    def watched(rows, step, policy, *rest):
        weights = policy.module.gpt.state_dict().items()
        same = all(torch.equal(weight, start[name]) for name, weight in weights)
        seen.append((same, len(policy.optimizer.state) == 0))
        return learn(rows, step, policy, *rest)

    monkeypatch.setattr(rl, "learn", watched)
    monkeypatch.setattr(rl, "score_batch", lambda texts, *_: [
        Score(1.0, "text", None, None) for _ in texts])
    rl.main(settings(tmp_path, base, "ei", questions=questions, restart_from_base=again,
                     max_steps=2))
    assert seen == [(True, True), (again, again)]


def test_all_of_policy_and_critic_moves_and_nothing_of_the_base(whole, base):
    """A critic copied from a frozen base was frozen too, and every metric stayed plausible."""
    first = torch.load(whole("ppo") / "step_000000.pt", weights_only=True)["model"]
    last = torch.load(whole("ppo") / "ckpt.pt", weights_only=True)
    kept = rl.load_model(base, "cpu")[0].state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in first.items())
    assert not any(torch.equal(first[name], weight) for name, weight in last["model"].items())
    critic = {name.removeprefix("gpt."): weight for name, weight in last["critic"].items()}
    assert critic.keys() == first.keys() | {"head.bias"} and critic["head.weight"].abs().sum() > 0
    moved = [not torch.equal(first[name], critic[name]) for name in first if "head" not in name]
    assert all(moved) and critic["head.bias"].abs().sum() > 0


def test_a_gradient_of_the_critic_that_is_not_finite_stops_the_run_before_a_save(
        base, questions, tmp_path, monkeypatch):
    """It was clipped, applied and saved."""
    monkeypatch.setattr(rl, "clipped_value", lambda value, *rest: value * float("nan"))
    with pytest.raises(UserError, match="not finite at step 1: lower --learning_rate"):
        rl.main(settings(tmp_path / "run", base, questions=questions))
    kept = list((tmp_path / "run").glob("*.pt"))
    assert [file.name for file in kept] == ["step_000000.pt"]
    assert all(tensor.isfinite().all() for tensor in tensors(kept[0]))


def test_a_run_fills_its_folder_and_a_finished_one_changes_nothing(
        base, questions, tmp_path, capsys):
    cfg = settings(tmp_path / "run", base, questions=questions)
    row = rl.main(cfg)
    files = {file.name: file.read_bytes() for file in Path(cfg.out_dir).iterdir()}
    steps = [f"step_{i:06d}.pt" for i in range(4)]
    samples = [f"samples_{i:06d}.jsonl" for i in (0, 2, 3)]
    assert files.keys() == {"config.json", "metrics.jsonl", "ckpt.pt", "echo.png", *steps, *samples}
    assert files["echo.png"].startswith(b"\x89PNG") and row["n"] == 4 and row["k"] == 2
    assert {"pass@1", "pass@k", "maj@k", "mean_length", "truncated"} <= row.keys()
    assert sum(part["share"] for part in row["formats"].values()) == pytest.approx(1)
    lines = [json.loads(line) for line in files["samples_000003.jsonl"].splitlines()]
    assert len(lines) == 4 * 3  # a greedy one and two others for each question of one id
    assert lines[0].keys() >= {"id", "question", "gold", "completion", "format", "answer",
                               "reward", "failure", "greedy"}
    capsys.readouterr()
    assert rl.main(cfg) == row and "is finished" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in Path(cfg.out_dir).iterdir()} == files


def test_a_run_goes_on_only_with_the_base_and_the_questions_that_it_began_with(
        base, questions, tmp_path):
    """By content, not by name: an evaluation showed the table of weights that were replaced."""
    weights, file = tmp_path / "base.pt", tmp_path / "questions.json"
    weights.write_bytes((Path(base) / "ckpt.pt").read_bytes())
    file.write_bytes(Path(questions).read_bytes())
    cfg = settings(tmp_path / "run", str(weights), "eval", questions=str(file))
    row = rl.main(cfg)
    assert rl.main(dataclasses.replace(cfg, init_from=base)) == row  # the same under another name
    file.write_text(file.read_text().replace("Ann", "Eva"))
    with pytest.raises(UserError, match="content of test questions"):
        rl.main(cfg)
    file.write_bytes(Path(questions).read_bytes())
    for part, name in (("model", "embed.weight"), ("gpt", "rope_base")):
        state = torch.load(Path(base) / "ckpt.pt", weights_only=True)
        state[part][name] += 1
        torch.save(state, weights)
        with pytest.raises(UserError, match="content of base"):
            rl.main(cfg)


def test_a_task_may_bring_a_judge_of_its_own(base, questions, tmp_path, monkeypatch):
    for task, reward in (("math", 1.0), ("toy", 0.5)):
        monkeypatch.setitem(rl.VERIFIERS, task, lambda texts, golds, limit, reward=reward: [
            Score(reward, "kind", gold, None) for gold in golds])
    files = dict(questions=questions, eval_questions=questions, task="math", eval_task="toy")
    rl.main(settings(tmp_path, base, "grpo", max_steps=1, **files))
    _, trained, evaluated = rows_of(tmp_path)
    assert trained["reward"] == trained["share_kind"] == 1 and evaluated["pass@1"] == 0.5


def test_eval_reads_any_questions_and_counts_those_that_are_too_long(base, tmp_path, capsys):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "Why? " * 300, "answer": 3}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = rl.main(settings(tmp_path / "eval", base, "eval", task="gsm8k",
                           questions=str(tmp_path / "questions.jsonl")))
    assert row["n"] == 2 and row["too_long"] == 1 and row["task"] == "gsm8k"
    assert "1 of 2 test questions leave no room" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (dict(algo="grpo", group_size=1), "--group_size=1 gives grpo nothing to compare"),
    (dict(algo="ppo", top_p=0.95), "use --top_p=1"), (dict(algo="grpo", top_p=0.9), "--top_p=1"),
    (dict(group_size=3), "--minibatch_size=4 would tear groups apart"),
    (dict(init_from="nowhere"), "nowhere does not exist"), (dict(task="toyy"), "toyy"),
    (dict(questions="none.jsonl"), "none.jsonl"), (dict(max_new_tokens=250), "no train question"),
    (dict(temperature=0.0), "--temperature=0.0"), (dict(kl_coef=-1.0), "--kl_coef=-1.0"),
    (dict(learning_rate=1e30), "--learning_rate"), (dict(eval_temperature=np.nan), "nan"),
])
def test_a_mistake_is_a_sentence_before_anything_is_written(base, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        rl.main(dataclasses.replace(settings(tmp_path / "run", base), **change))
    assert not (tmp_path / "run").exists()


def test_presets_depend_on_the_algorithm():
    ei = parse_config(Config, rl.PRESETS, ["--preset=paper", "--algo=ei"])
    ppo = parse_config(Config, rl.PRESETS, ["--preset=paper", "--kl_coef=0.01"])
    assert (ei.group_size, ei.top_p, ei.max_steps, ei.task) == (64, 0.95, 3, "gsm8k")
    assert (ppo.group_size, ppo.top_p, ppo.learning_rate, ppo.kl_coef) == (8, 1.0, 1e-6, 0.01)
    for cfg in (ei, ppo, parse_config(Config, rl.PRESETS, ["--algo=ei"])):
        rl.check(cfg)


def test_snapshots_are_logarithmic_and_include_the_ends():
    steps = sorted(rl.snapshot_steps(1000))
    assert len(steps) == 16 and steps[:2] == [0, 1] and steps[-1] == 1000 and steps[8] == 32


def optimum(prior, reward, beta: float):
    """The distribution p that is best at p . reward - beta KL(p, prior), by ascent."""
    logits = prior.log().requires_grad_()
    adam = torch.optim.Adam([logits], 0.02)
    for _ in range(1500):
        p = logits.softmax(0)
        loss = beta * (p * (p / prior).log()).sum() - p @ reward
        adam.zero_grad()
        loss.backward()
        adam.step()
    return p.detach()


def test_optimal_shares_are_those_of_a_small_world():
    """Two questions, completions of three formats, right or wrong: each a cell of a table."""
    counts, beta = torch.tensor([[[9, 1], [4, 6], [5, 5]], [[1, 9], [20, 2], [3, 5]]]), 0.3
    samples = [{"place": q, "format": f, "reward": float(r)} for q in (0, 1)
               for i, f in enumerate(FORMATS) for r in (0, 1) for _ in range(counts[q, i, r])]
    found = rl.optimal_shares(samples, beta)
    cells = [optimum(of_question.flatten() / of_question.sum(), torch.tensor([0.0, 1.0] * 3), beta)
             for of_question in counts]
    share = counts.sum(dim=(0, 2)) / counts.sum()
    accuracy = counts[..., 1].sum(dim=0) / counts.sum(dim=(0, 2))
    wanted = {"full tilt": sum(p.view(3, 2).sum(dim=1) for p in cells) / 2,
              "re-weighting": optimum(share, accuracy, beta)}
    for name, shares in wanted.items():
        got = torch.tensor([found[name][f]["share"] for f in FORMATS])
        torch.testing.assert_close(got, shares, atol=1e-3, rtol=0)


def test_the_full_tilt_is_what_rejection_accepts():
    """Of the authors' solutions: exact samples of pi e^(r / beta) / Z are those that are kept with
    the chance e^((r - 1) / beta)."""
    rng, beta, samples, kept = random.Random(0), 0.5, [], Counter()
    for name, format in (("toy-tinygsm@div=sub", "tinygsm"), ("toy-omi2", "text")):
        told = toy.problems("train", toy.AUTHORS.index(name.partition("@")[0]))
        for i, document in enumerate(toy.corpus(name, 300)):
            answer = str(next(told).values[-1])
            reward = score(document.partition("\n\n")[2], answer).reward
            samples.append({"place": i % 3, "format": format, "reward": reward})
    for _ in range(200):
        kept.update((s["place"], s["format"]) for s in samples
                    if rng.random() < math.exp((s["reward"] - 1) / beta))
    share = np.mean([kept[q, "text"] / (kept[q, "text"] + kept[q, "tinygsm"]) for q in range(3)])
    assert abs(rl.optimal_shares(samples, beta)["full tilt"]["text"]["share"] - share) < 0.005
    assert share < 0.47  # the careless author loses


@pytest.mark.skipif("COMPILE" not in os.environ, reason="compiles for a minute: COMPILE=1 runs it")
def test_compiled_updates_are_those_that_are_not():
    """And their first ratios are 1 to the bit, though without gradient the bits would differ."""

    def hook(trainer):
        trainer.called = compiled(trainer.module, CPU.device, dynamic=True)
        assert trainer.called is not trainer.module

    cfg = dict(layers=1, algo="grpo", micro_batch_size=8)  # batches of two shapes
    ((ours,), metrics), ((plain,), _) = learned(**cfg, compile=True, hook=hook), learned(**cfg)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    assert metrics["ratio_max_dev"] == 0.0
