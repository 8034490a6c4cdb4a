import dataclasses
import functools
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import rl
from data import UserError
from data.tasks import Question
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from pretrain import Processes, autocast, parse_config, setup_distributed, write_atomically
from rl import Batch, Config, Critic, Policy, Rollout, Trainer
from test_pretrain import SERVER, killed_at_file_event, run
from verify import Score

CPU = Processes(0, 1, torch.device("cpu"))
FLOAT32 = autocast("float32", CPU.device)
QUICK = dict(max_steps=3, prompts_per_step=4, group_size=2, max_new_tokens=24, minibatch_size=4, micro_batch_size=3,
             eval_k=2, eval_every=2, save_every=1, sample_batch_size=64)  # fmt: skip


def settings(out_dir, base, algo="ppo", **changes):
    return Config(**{**QUICK, "algo": algo, "init_from": base, "out_dir": str(out_dir), **changes})


# ---------------------------------------------------------------- processes

SERVER.set_forkserver_preload(["test_pretrain", "test_rl", "torch._dynamo", "matplotlib"])


def training(base, accident=None, **changes):
    """Work for run(): the script itself, with an accident(rank) waiting to happen."""
    values = {**QUICK, "init_from": base, "out_dir": "run", "eval_every": 3, **changes}
    return functools.partial(script, [f"--{k}={v}" for k, v in values.items()], accident)


def script(argv: list[str], accident, rank: int) -> None:
    """A completion of an even number of letters is right: a base of six steps has no other merit.
    What takes long, and another test sees to, is left out: programs, and the picture.
    """
    sys.argv, rl.start_servers = ["rl.py", *argv], lambda: None
    rl.draw = lambda folder, rows: write_atomically(folder / "echo.png", b"a picture")
    rl.score_batch = lambda texts, golds, limit: [
        Score(1.0 - len(t) % 2, "text", None, None) for t in texts
    ]
    if accident:
        accident(rank)
    rl.launch(rl.main, Config, rl.PRESETS)


def killed_amid_a_write(size: int, rank: int) -> None:
    """The kernel ends the process where a file of its outgrows `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python had it ignored
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    """A file of few questions, of which 4 are held out: the evaluations take no time."""
    file = tmp_path_factory.mktemp("questions") / "questions.json"
    file.write_text(
        json.dumps([{"question": f"Ann has {i} apples.", "answer": i} for i in range(40)])
    )
    return str(file)


# ---------------------------------------------------------------- tiny rollouts


def random_rollout(rewards, prompt_lengths=(3, 5, 2, 7), seed=0) -> Rollout:
    """Completions of 1 to 6 tokens of random ids, one for each reward."""
    draw = torch.Generator().manual_seed(seed)
    count = len(rewards)
    ids = lambda n: torch.randint(1, 50, (n,), generator=draw).tolist()  # noqa: E731
    lengths = torch.randint(1, 7, (count,), generator=draw).tolist()
    prompts = [ids(prompt_lengths[i % len(prompt_lengths)]) for i in range(count)]
    scores = [Score(r, "text", None, None) for r in rewards]
    return Rollout(prompts, [ids(n) for n in lengths], [""] * count, scores,
                   [[0.0] * n for n in lengths])  # fmt: skip


def batch_of(rollout, rows=None, advantage=None) -> Batch:
    rows = list(range(len(rollout.prompts))) if rows is None else rows
    advantage = torch.ones(len(rollout.prompts)) if advantage is None else advantage
    weight = torch.full((len(rollout.prompts),), 0.5)
    return rl.make_batch(rollout, rows, advantage, weight, CPU.device)


def loss_batch(**given) -> Batch:
    """A batch of nothing but what a loss reads."""
    return Batch(**{field.name: given.get(field.name) for field in dataclasses.fields(Batch)})


# ---------------------------------------------------------------- advantages


def test_gae_agrees_with_numbers_worked_out_by_hand():
    reward = torch.tensor([[0.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    value = torch.tensor([[0.2, 0.4, 0.6], [0.1, 0.3, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage, returns = rl.gae(reward, value, mask, gamma=0.9, lam=0.5)
    # row 0, from its end: 1 - 0.6 = 0.4;  0.9*0.6 - 0.4 + 0.45*0.4 = 0.32;  0.9*0.4 - 0.2 +
    # 0.45*0.32 = 0.304 row 1, from its end: 1 - 0.3 = 0.7;  0.5 + 0.9*0.3 - 0.1 + 0.45*0.7 =
    # 0.985
    torch.testing.assert_close(advantage, torch.tensor([[0.304, 0.32, 0.4], [0.985, 0.7, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.504, 0.72, 1.0], [1.085, 1.0, 0.0]]))


def test_what_is_behind_the_last_token_changes_no_advantage():
    mask = torch.tensor([[True, True, False, False]])
    reward, value = torch.tensor([[0.0, 1.0, 9.0, 9.0]]), torch.tensor([[0.5, 0.5, 7.0, 7.0]])
    advantage, _ = rl.gae(reward, value, mask, 1.0, 0.95)
    short, _ = rl.gae(reward[:, :2], value[:, :2], mask[:, :2], 1.0, 0.95)
    torch.testing.assert_close(advantage[:, :2], short)
    assert advantage[:, 2:].abs().sum() == 0


@pytest.mark.parametrize("length", [1, 2, 6])
def test_the_reward_is_on_the_last_token_even_of_a_one_token_answer(length):
    """trl#2575 put it elsewhere."""
    rollout = Rollout([[1, 2]], [[3] * length], [""], [Score(1.0, "text", None, None)],
                      [[0.0] * length])  # fmt: skip
    batch = batch_of(rollout)
    batch.old_logp, batch.ref_logp = torch.full((1, length), -1.0), torch.full((1, length), -3.0)
    assert rl.token_rewards(batch, Config(kl_coef=0.0)).tolist() == [[0.0] * (length - 1) + [1.0]]
    torch.testing.assert_close(
        rl.token_rewards(batch, Config(kl_coef=0.1))[0, -1], torch.tensor(1.0 - 0.1 * 2)
    )
    assert torch.allclose(
        rl.token_rewards(batch, Config(kl_coef=0.1))[0, :-1], torch.tensor(-0.1 * 2)
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(value):
    """A standard deviation of zero made NaN, or a million (NeMo-RL#1518)."""
    advantage = rl.group_advantage(
        torch.tensor([value] * 8 + [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 8, True
    )
    assert advantage[:8].tolist() == [0.0] * 8
    assert advantage[9] > 0 > advantage[8] and abs(float(advantage.sum())) < 1e-5
    assert float(advantage[8:].std()) == pytest.approx(1, abs=1e-5)


def test_without_scaling_the_advantage_is_the_distance_from_the_group_mean():
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    advantage = rl.group_advantage(reward, 4, False)
    assert advantage.tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0]


def test_expert_iteration_learns_from_correct_completions_once():
    right, wrong = Score(1.0, "text", "7", None), Score(0.0, "text", "8", "wrong")
    rollout = Rollout(
        [[1], [1], [1], [2]],
        [[5, 0], [5, 0], [6, 0], [5, 0]],
        [""] * 4,
        [right, right, wrong, right],
        [[0.0, 0.0]] * 4,
    )
    assert rl.first_correct(rollout).tolist() == [1.0, 0.0, 0.0, 1.0]
    cfg = Config(algo="ei", minibatch_size=8)
    ((batch,),) = rl.split_minibatches(rollout, rl.first_correct(rollout), 0, cfg, CPU)
    assert batch.tokens.size(0) == 2 and batch.weight.flatten().tolist() == [1 / 4, 1 / 4]


# ---------------------------------------------------------------- log-probs and losses


def test_log_probs_agree_with_a_loop_over_tokens(gpt):
    """Off-by-one between logits and labels (trlx#509)."""
    rollout = random_rollout([0.0] * 4)
    batch = batch_of(rollout)
    logp, entropy = Policy(gpt, temperature=0.7)(batch)
    for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions)):
        for t, token in enumerate(completion):
            expected = F.log_softmax(
                gpt(torch.tensor([prompt + completion[:t]]))[0, -1] / 0.7, dim=-1
            )
            torch.testing.assert_close(logp[i, t], expected[token])
            torch.testing.assert_close(entropy[i, t], -(expected.exp() * expected).sum())
    assert (logp[~batch.mask] == 0).all()


@pytest.mark.parametrize("train_entropy", [False, True])
@pytest.mark.parametrize("tokens", [1, 512, 1100])  # less than a chunk, one, two and a rest
def test_chunked_log_probs_and_entropies_have_the_gradients_of_plain_ones(tokens, train_entropy):
    draw = torch.Generator().manual_seed(tokens)
    hidden, weight, d_logp, d_entropy = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((tokens, 8), (30, 8), (tokens,), (tokens,))
    )
    ids = torch.randint(30, (tokens,), generator=draw)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    ours = rl.TokenLogps.apply(*inputs, ids, 0.7, train_entropy)
    logps = (hidden @ weight.t() / 0.7).log_softmax(-1)
    theirs = logps.gather(1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert ours[0].requires_grad and ours[1].requires_grad == train_entropy
    found, expected = (
        torch.autograd.grad(d_logp @ logp + d_entropy @ entropy * train_entropy, inputs)
        for logp, entropy in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


class Widest(TorchDispatchMode):
    """Notes the most rows that a result with V numbers in each has had."""

    def __init__(self, V: int):
        super().__init__()
        self.V, self.rows = V, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.size(-1) == self.V:
            self.rows = max(self.rows, result.numel() // self.V)
        return result


@pytest.mark.parametrize("train_entropy", [False, True])
def test_logits_of_a_whole_micro_batch_never_exist(gpt, train_entropy):
    """At 50,000 tokens of vocabulary and 8 rows of 1,000 they are 1.6 GB, several times over."""
    batch = batch_of(random_rollout([0.0] * 300))
    assert int(batch.mask.sum()) > 1000
    with Widest(50) as widest:
        logp, entropy = Policy(gpt, 1.0, train_entropy)(batch)
        (logp.sum() + entropy.sum()).backward()
    assert widest.rows == 512 and gpt.embed.weight.grad.any()


def test_log_probs_do_not_depend_on_the_padding(gpt):
    """Attention to tokens behind the end (trl#2708); positions shifted by padding (trl#6800)."""
    rollout = random_rollout([0.0] * 4, prompt_lengths=(2, 30, 9, 17))
    together, _ = Policy(gpt, 1.0)(batch_of(rollout))
    for i, completion in enumerate(rollout.completions):
        alone, _ = Policy(gpt, 1.0)(batch_of(rollout, [i]))
        torch.testing.assert_close(together[i, : len(completion)], alone[0])


def test_completions_of_one_prompt_share_it_and_change_nothing():
    """Log-probs and gradient are those of each row alone, read from prompt to end in one pass."""
    gpt = make_gpt().double()
    rollout = random_rollout([0.0] * 9, prompt_lengths=(4, 13, 7))
    rollout = rollout._replace(prompts=[rollout.prompts[i % 3] for i in range(9)])
    batch = batch_of(rollout)
    assert len(batch.prompts) == 3
    logp, _ = Policy(gpt, 1.0)(batch)
    weight = torch.randn(logp.shape, dtype=torch.float64)  # another for each token
    (logp * weight).sum().backward()
    shared = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions)):
        whole = torch.tensor([prompt + completion])
        alone = (
            gpt(whole[:, :-1])
            .log_softmax(-1)
            .gather(2, whole[:, 1:, None])[0, len(prompt) - 1 :, 0]
        )
        torch.testing.assert_close(logp[i, : len(completion)], alone)
        (alone * weight[i, : len(completion)]).sum().backward()
    for ours, p in zip(shared, gpt.parameters()):
        torch.testing.assert_close(ours, p.grad)


def test_completions_of_a_single_token_have_log_probs(gpt):
    rollout = random_rollout([0.0] * 3)._replace(completions=[[5], [0], [7]])
    logp, _ = Policy(gpt, 1.0)(batch_of(rollout))
    last = torch.stack([gpt(torch.tensor([p]))[0, -1].log_softmax(-1) for p in rollout.prompts])
    torch.testing.assert_close(logp, last.gather(1, torch.tensor([[5], [0], [7]])))


@pytest.mark.parametrize("world", [1, 2])
def test_a_minibatch_is_of_whole_groups_so_that_a_prompt_is_read_once(world):
    rollout, cfg = random_rollout([0.0] * 32), Config(minibatch_size=8, group_size=4)
    rollout = rollout._replace(prompts=[[1 + i // 4] for i in range(32)])
    seen = []
    for rank in range(world):
        processes = CPU._replace(rank=rank, world=world)
        for parts in rl.split_minibatches(rollout, torch.ones(32), 0, cfg, processes):
            assert sum(len(batch.prompts) for batch in parts) == 2 // world
            seen += [int(batch.prompts[i]) for batch in parts for i in batch.index]
    assert sorted(seen) == [1 + i // 4 for i in range(32)] != seen


def test_the_end_of_text_is_trained_on_though_padding_has_its_id():
    """What is padding is told by lengths: by ids, stopping would never be learned (trl#6357)."""
    scores = [Score(1.0, "text", None, None)] * 2
    rollout = Rollout([[4, 0], [4]], [[5, 6, 0], [0]], [""] * 2, scores, [[0.0] * 3, [0.0]])
    assert batch_of(rollout).mask.tolist() == [[True, True, True], [True, False, False]]


def test_the_log_probs_that_are_trained_are_those_that_were_sampled(base):
    """Training at T = 1 what was sampled at T = 0.7 (trl#3029)."""
    encoding, (model, _) = get_tokenizer("toy"), rl.load_model(base, "cpu")
    pairs = [(Question("", "", "3"), encoding.encode_ordinary("Ann" * n)) for n in (1, 7, 3)]
    cfg, seconds = settings("unused", base, temperature=0.7), {"sample": 0.0, "verify": 0.0}
    batch = batch_of(rl.roll_out(model, pairs, ("key",), cfg, False, encoding, CPU, seconds))
    logp, _ = Policy(model, 0.7)(batch)
    torch.testing.assert_close(logp, batch.sampled_logp, atol=1e-5, rtol=1e-5)


def test_log_probs_are_computed_in_fp32_under_bfloat16(gpt):
    """KL in bfloat16 is noise (OpenRLHF#620)."""
    batch = batch_of(random_rollout([0.0] * 4))
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = Policy(gpt, 1.0, train_entropy=True)(batch)
        logits = gpt.head(rl.completion_states(gpt, batch))
    assert logp.dtype == entropy.dtype == torch.float32 and logits.dtype == torch.bfloat16
    exact = logits.float().log_softmax(-1)
    assert torch.equal(logp[batch.mask], exact.gather(1, batch.tokens[batch.mask][:, None])[:, 0])
    (logp.sum() + entropy.sum()).backward()  # outside the autocast, as in an update
    assert gpt.embed.weight.grad.dtype == torch.float32


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    logp, ref_logp = torch.randn(3).log_softmax(0).double(), torch.randn(3).log_softmax(0).double()
    p = logp.exp()
    k3 = rl.kl_estimate(logp, ref_logp, "k3")
    assert (k3 >= 0).all() and rl.kl_estimate(logp, logp, "k3").abs().max() == 0
    torch.testing.assert_close((p * k3).sum(), (p * (logp - ref_logp)).sum())


def test_k1_in_the_reward_has_the_gradient_of_the_kl_and_in_the_loss_none():
    """open-instruct#534: the expectation of grad(logp - ref_logp) under the policy itself is
    zero.
    """
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    p = logp.detach().exp()
    (kl_gradient,) = torch.autograd.grad(
        (logp.exp() * (logp - ref_logp)).sum(), logits, retain_graph=True
    )
    in_loss = torch.autograd.grad((p * (logp - ref_logp)).sum(), logits, retain_graph=True)[0]
    assert in_loss.abs().max() < 1e-12 < kl_gradient.abs().max()
    # each token is a completion of its own, with its probability as weight
    batch = loss_batch(mask=torch.ones(3, 1, dtype=torch.bool), reward=torch.zeros(3),
                      old_logp=logp.detach()[:, None], ref_logp=ref_logp[:, None])  # fmt: skip
    batch.advantage = rl.token_rewards(batch, Config(kl_coef=1.0))
    loss = (p[:, None] * rl.clipped_loss(batch, logp[:, None], Config())).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], kl_gradient)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_in_the_loss_k2_has_the_gradient_of_the_kl_and_k3_that_of_the_reverse_kl(kind):
    """By enumeration of three tokens, each with its probability as weight, on the policy itself.
    The gradient of k3 is E[(1 - pi_ref / pi) grad log pi], that of KL(pi_ref, pi).
    """
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    exact = {"k2": (logp.exp() * (logp - ref_logp)).sum(),
             "k3": (ref_logp.exp() * (ref_logp - logp)).sum()}[kind]  # fmt: skip
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    batch = loss_batch(ref_logp=ref_logp[:, None])
    cfg = Config(kl_in="loss", kl_estimator=kind, kl_coef=0.5)
    loss = (logp.detach().exp()[:, None] * rl.kl_loss(batch, logp[:, None], cfg)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], 0.5 * expected)


@pytest.mark.parametrize("algo", ["ppo", "grpo", "reinforce"])
def test_on_policy_every_loss_has_the_policy_gradient_by_enumeration(algo):
    """The gradient of E[r] over three tokens, by its definition and by the loss."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.2], dtype=torch.float64)
    logp = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logp.exp() * reward).sum(), logits, retain_graph=True)
    batch = loss_batch(advantage=reward[:, None], old_logp=logp.detach()[:, None])
    token_loss = rl.ALGORITHMS[algo].loss(batch, logp[:, None], Config(kl_coef=0.0))
    (found,) = torch.autograd.grad((logp.detach().exp()[:, None] * token_loss).sum(), logits)
    torch.testing.assert_close(-found, expected)


def test_a_reward_of_zero_survives():
    """It was read as missing (OpenRLHF#1219)."""
    rollout = random_rollout([0.0, 1.0, 0.0])
    assert rl.rewards(rollout).tolist() == batch_of(rollout).reward.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("norm, weights", [
    ("token", [1 / 10] * 3), ("sequence", [1 / 15, 1 / 6, 1 / 9]), ("constant", [1 / 60] * 3),
])  # fmt: skip
def test_the_loss_has_one_normaliser(norm, weights):
    found = rl.token_weights([5, 2, 3], Config(loss_norm=norm, max_new_tokens=20))
    assert found == pytest.approx(weights)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_ratio_is_clipped_only_where_that_limits_the_gain(algo):
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    batch = loss_batch(advantage=advantage, old_logp=torch.zeros(1, 4))
    rl.ALGORITHMS[algo].loss(batch, new, Config(kl_coef=0.0)).sum().backward()
    assert [g == 0 for g in new.grad[0].tolist()] == [True, False, False, True]


def test_the_value_loss_takes_the_larger_of_the_clipped_and_the_plain_error():
    value, old, returns = (
        torch.tensor([1.0, 0.1, -1.0]),
        torch.zeros(3),
        torch.tensor([2.0, 2.0, -0.5]),
    )
    found = rl.clipped_value_loss(value, old, returns, 0.2)
    torch.testing.assert_close(found, torch.tensor([1.8**2 / 2, 1.9**2 / 2, 0.5**2 / 2]))


# ---------------------------------------------------------------- updates


def learn_once(gpt_factory, algo, rewards, micro_batch_size, processes=CPU, **changes):
    """Gradients and metrics of the first update on a random rollout."""
    setup_distributed("cpu")
    torch.manual_seed(1)
    gpt = gpt_factory()
    cfg = Config(algo=algo, minibatch_size=len(rewards), micro_batch_size=micro_batch_size, group_size=4,
                 temperature=0.7, learning_rate=1e-9, critic_learning_rate=1e-9, grad_clip=1e9, **changes)  # fmt: skip
    gradients = []
    policy = Trainer(Policy(gpt, cfg.temperature), cfg.learning_rate, cfg, processes)
    critic = Trainer(Critic(gpt), 1e-9, cfg, processes) if algo == "ppo" else None
    policy.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in gpt.parameters())
    )
    reference = Policy(gpt_factory(), cfg.temperature)
    metrics = rl.learn(
        random_rollout(rewards), 0, policy, critic, reference, cfg, FLOAT32, processes
    )
    return gradients, metrics


def make_gpt(seed=3, layers=2):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, context=64, width=32, layers=layers, heads=2, init_std=0.3))


REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
TWELVE = [*REWARDS, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("algo, norm", [("ppo", "token"), ("grpo", "sequence"), ("ei", "token"),
                                        ("reinforce", "constant")])  # fmt: skip
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_gradient_is_the_same_for_every_way_to_split_a_minibatch(algo, norm, micro_batch_size):
    """Sequences of unequal length, averaged per micro-batch, are weighed wrongly (trl#2647)."""
    split, _ = learn_once(make_gpt, algo, REWARDS, micro_batch_size, loss_norm=norm)
    whole, _ = learn_once(make_gpt, algo, REWARDS, 8, loss_norm=norm)
    assert any(g.abs().max() > 1e-3 for g in whole)
    for left, right in zip(split, whole):
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-4)


def test_skipping_completions_without_signal_changes_no_gradient(monkeypatch):
    """Groups of equal rewards have nothing to say to grpo without a KL, but they still count."""
    rewards = [0.0] * 4 + [1.0, 0.0, 0.0, 1.0]
    skipped, _ = learn_once(make_gpt, "grpo", rewards, 2, kl_coef=0.0)
    kept, _ = learn_once(make_gpt, "grpo", rewards, 2, kl_coef=1e-30)  # a KL: all rows are needed
    assert any(g.abs().max() > 1e-3 for g in kept)
    for left, right in zip(skipped, kept):
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_the_logged_kl_is_the_mean_over_tokens_of_that_to_the_base(algo):
    """trl#1180 logged another one than it used, trl#463 one of the wrong sign."""
    setup_distributed("cpu")
    _, metrics = learned(algo=algo)
    batch = batch_of(random_rollout(TWELVE))
    logp, ref_logp = (Policy(make_gpt(seed), 1.0)(batch)[0][batch.mask] for seed in (3, 4))
    ratio = (ref_logp - logp).exp().detach()
    assert metrics["kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-5)
    assert metrics["kl"] > 0.01


@pytest.mark.parametrize("algo", rl.ALGORITHMS)
def test_the_first_learning_rate_is_above_zero_and_the_last_at_its_floor(algo):
    setup_distributed("cpu")
    cfg = dict(algo=algo, epochs=1, minibatch_size=12, min_learning_rate=0.1)
    assert 0 < learned(**cfg, max_steps=1000)[1]["lr"] < 1e-3
    assert learned(**cfg, max_steps=1, warmup=0.5)[1]["lr"] == pytest.approx(1e-4)


def test_a_bonus_for_entropy_raises_it():
    def entropy_after(coef):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(vocab_size=9, context=4, width=16, layers=1, heads=2, init_std=0.5))
        cfg = Config(algo="grpo", minibatch_size=8, group_size=8, kl_coef=0.0, max_steps=1,
                     learning_rate=1e-2, warmup=0.0, entropy_coef=coef, epochs=20)  # fmt: skip
        policy = Trainer(Policy(gpt, 1.0, train_entropy=coef != 0), 1e-2, cfg, CPU)
        scores = [Score(0.0, "text", None, None)] * 8
        rollout = Rollout([[1]] * 8, [[arm] for arm in range(8)], [""] * 8, scores, [[0.0]] * 8)
        rl.learn(rollout, 0, policy, None, None, cfg, FLOAT32, CPU)
        p = gpt(torch.tensor([[1]]))[0, -1].softmax(-1).detach()
        return float(-(p * p.log()).sum())

    setup_distributed("cpu")
    assert entropy_after(0.1) > entropy_after(0.0) + 0.05


@pytest.mark.parametrize("algo", ["ppo", "grpo", "reinforce"])
@pytest.mark.parametrize("micro_batch_size", [2, 3, 8])
def test_before_the_first_update_every_ratio_is_exactly_1_at_t_0_7(algo, micro_batch_size):
    """Log-probs at T = 1 of samples at T = 0.7 (trl#3029)."""
    _, metrics = learn_once(make_gpt, algo, REWARDS, micro_batch_size)
    assert metrics["ratio_max_dev"] == 0.0 and metrics["kl"] == 0.0


def test_a_rollout_without_signal_gives_a_finite_zero_gradient():
    for algo in ("grpo", "reinforce", "ei"):
        gradients, metrics = learn_once(make_gpt, algo, [0.0] * 8, 3, kl_coef=0.0)
        assert all(g.abs().max() == 0 for g in gradients) and metrics["grad_norm"] == 0.0


def test_a_rank_without_rows_has_a_batch_that_counts_nothing(gpt):
    batch = batch_of(random_rollout(REWARDS), [])
    logp, _ = Policy(gpt, 1.0)(batch)
    loss = (
        rl.clipped_loss(dataclasses.replace(batch, old_logp=logp.detach()), logp, Config())
        * batch.mask
    ).sum()
    loss.backward()
    assert float(loss.detach()) == 0 and all(
        p.grad is None or p.grad.abs().max() == 0 for p in gpt.parameters()
    )


SPREAD = {  # over two ranks: the last minibatch has one row, so rank 1 has none of it
    "ppo": dict(algo="ppo", minibatch_size=11), "grpo": dict(algo="grpo", minibatch_size=11),
    "grpo without KL": dict(algo="grpo", minibatch_size=11, kl_coef=0.0, loss_norm="sequence"),
    "reinforce": dict(algo="reinforce", minibatch_size=11, loss_norm="constant"),
    "ei": dict(algo="ei", minibatch_size=2),
}  # fmt: skip


def learned(processes=CPU, layers=2, **changes) -> tuple[list, dict]:
    """Weights and metrics after the updates of a rollout of 12, in two epochs."""
    cfg = Config(**{"group_size": 4, "micro_batch_size": 2, "epochs": 2, "kl_coef": 0.1,
                    "learning_rate": 1e-3, "critic_learning_rate": 1e-3, **changes})  # fmt: skip
    gpt = make_gpt(layers=layers).double()  # Adam makes much of rounding where a gradient is 0
    policy = Trainer(Policy(gpt, 1.0), cfg.learning_rate, cfg, processes)
    critic = (
        Trainer(Critic(gpt), cfg.critic_learning_rate, cfg, processes)
        if cfg.algo == "ppo"
        else None
    )
    reference = Policy(make_gpt(4, layers).double(), 1.0)
    metrics = rl.learn(
        random_rollout(TWELVE), 0, policy, critic, reference, cfg, FLOAT32, processes
    )
    return [trainer.module.state_dict() for trainer in (policy, critic) if trainer], metrics


def updates(rank: int) -> None:
    processes = setup_distributed("cpu")
    torch.save(
        {name: learned(processes, **changes) for name, changes in SPREAD.items()}, "results.pt"
    )


def test_an_update_of_two_ranks_is_that_of_one(tmp_path):
    """Weighing by a rank's own tokens, or whitening by its own statistics (transformers#34242)."""
    assert run(tmp_path / "one", updates) == [0] and run(tmp_path / "two", updates, 2) == [0, 0]
    one, *ranks = (
        torch.load(tmp_path / place / "results.pt") for place in ("one/0", "two/0", "two/1")
    )
    for two in ranks:
        for name in SPREAD:
            torch.testing.assert_close(two[name][0], one[name][0], atol=1e-6, rtol=0)
            assert two[name][1] == pytest.approx(one[name][1], rel=1e-5, abs=1e-6)
    start = make_gpt().state_dict()
    for name in SPREAD:
        assert (one[name][0][0]["gpt.embed.weight"] - start["embed.weight"]).abs().max() > 1e-3


class Compiled(torch.nn.Module):
    """Stands for torch.compile: with and without gradient, its log-probs differ in rounding."""

    def __init__(self, module, dynamic):
        super().__init__()
        self.module = module

    def forward(self, batch):
        logp, entropy = self.module(batch)
        return logp * (1 + 1e-7 * torch.is_grad_enabled()), entropy


def test_compiled_too_every_ratio_is_1_before_the_first_update(monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled)
    setup_distributed("cpu")
    _, metrics = learned(algo="grpo", epochs=1, minibatch_size=12, compile=True)
    assert metrics["ratio_max_dev"] == 0.0


@pytest.mark.skipif("COMPILE" not in os.environ, reason="compiles for a minute: COMPILE=1 runs it")
def test_compiled_updates_are_those_that_are_not():
    setup_distributed("cpu")
    cfg = dict(layers=1, algo="grpo", minibatch_size=12, micro_batch_size=6)  # of two shapes
    (compiled,), metrics = learned(**cfg, compile=True)
    (plain,), _ = learned(**cfg)
    torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=0)
    assert metrics["ratio_max_dev"] == 0.0


@pytest.mark.parametrize("algo, steps", [("ppo", 40), ("grpo", 40), ("reinforce", 60), ("ei", 1)])
def test_each_algorithm_learns_the_token_that_is_rewarded(algo, steps):
    """A bandit of 8 arms: one prompt, one token, reward for token 5."""
    setup_distributed("cpu")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=9, context=4, width=16, layers=1, heads=2, init_std=0.1))
    base = {name: value.clone() for name, value in gpt.state_dict().items()}
    cfg = Config(algo=algo, minibatch_size=64, group_size=64, kl_coef=0.0, max_steps=steps, learning_rate=1e-2,
                 epochs=40 if algo == "ei" else 1)  # fmt: skip
    policy = Trainer(Policy(gpt, 1.0), cfg.learning_rate, cfg, CPU)
    critic = Trainer(Critic(gpt), cfg.critic_learning_rate, cfg, CPU) if algo == "ppo" else None
    for step in range(steps):
        p = gpt(torch.tensor([[1]]))[0, -1].softmax(-1).detach()
        arms = p.multinomial(
            64, replacement=True, generator=torch.Generator().manual_seed(step)
        ).tolist()
        scores = [Score(float(arm == 5), "text", None, None) for arm in arms]
        # the de-duplication of ei leaves one completion; a prompt apart for each keeps them all
        # the same
        rollout = Rollout([[1]] * 64, [[arm] for arm in arms], [""] * 64, scores, [[0.0]] * 64)
        rl.learn(rollout, step, policy, critic, None, cfg, FLOAT32, CPU)
    assert float(gpt(torch.tensor([[1]]))[0, -1].softmax(-1)[5].detach()) > 0.9
    assert any(not torch.equal(base[name], value) for name, value in gpt.state_dict().items())


# ---------------------------------------------------------------- rollouts


def test_answers_stay_with_their_questions(base, monkeypatch):
    """Prompts and answers misaligned after shuffling or sharding (open-instruct#1484)."""
    encoding = get_tokenizer("toy")
    model, _ = rl.load_model(base, "cpu")
    pairs = [(Question(str(i), f"Ann has {i} apples.", str(i)), encoding.encode_ordinary(f"Ann has {i} apples.\n\n"))
             for i in range(40)]  # fmt: skip
    golds = []
    monkeypatch.setattr(
        rl,
        "score_batch",
        lambda texts, g, limit: golds.extend(g) or [Score(float(x), "text", x, None) for x in g],
    )
    picked = [pairs[i] for i in rl.pick_prompts(40, 1, 24, seed=3)]
    cfg = settings("unused", base)
    seconds = {"sample": 0.0, "verify": 0.0}
    rollout = rl.roll_out(model, picked, ("key",), cfg, False, encoding, CPU, seconds)
    for prompt, score in zip(rollout.prompts, rollout.scores):
        assert encoding.decode(prompt) == f"Ann has {int(score.reward)} apples.\n\n"
    assert sorted(golds) != golds  # they were shuffled


def test_each_question_is_asked_once_an_epoch_in_an_order_of_its_own():
    asked = [i for step in range(10) for i in rl.pick_prompts(25, step, 5, seed=0)]
    assert sorted(asked[:25]) == sorted(asked[25:]) == list(range(25)) and asked[:25] != asked[25:]
    assert rl.pick_prompts(25, 3, 5, seed=0) == asked[15:20] != rl.pick_prompts(25, 3, 5, seed=1)


def test_completions_of_one_question_differ_and_reruns_agree(base):
    encoding = get_tokenizer("toy")
    model, _ = rl.load_model(base, "cpu")
    pair = (
        Question("0", "Ann has 3 apples.", "3"),
        encoding.encode_ordinary("Ann has 3 apples.\n\n"),
    )
    cfg, seconds = settings("unused", base), {"sample": 0.0, "verify": 0.0}
    first, again, small = (
        rl.roll_out(model, [pair] * 8, ("key",), c, False, encoding, CPU, seconds).completions
        for c in (cfg, cfg, dataclasses.replace(cfg, sample_batch_size=3)))  # fmt: skip
    assert first == again == small and len({tuple(ids) for ids in first}) == 8


# ---------------------------------------------------------------- runs


def rows(folder) -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def final_weights(folder) -> dict:
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)["model"]


VARIANTS = {
    "ppo": {}, "grpo": {"algo": "grpo"}, "reinforce": {"algo": "reinforce"}, "ei": {"algo": "ei", "epochs": 2},
    "online ei": {"algo": "ei", "restart_from_base": False},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(
    base, questions, tmp_path, name
):
    """Before a random touch of a file (a row, a checkpoint, a picture, a rename), and amid one."""
    changes, moments, deaths = {"questions": questions, **VARIANTS[name]}, random.Random(name), 0
    assert run(tmp_path / "whole", training(base, **changes)) == [0]
    kinds = [(killed_at_file_event, 24), (killed_amid_a_write, 1 << 19)]
    while deaths < 30:
        kill, most = kinds[deaths % 2]
        accident = functools.partial(kill, moments.randint(1, most))
        if run(tmp_path, training(base, accident, **changes)) == [0]:
            break
        deaths += 1
    assert 2 <= deaths < 30, (tmp_path / "0" / "stderr").read_text()
    whole, killed = tmp_path / "whole" / "0" / "run", tmp_path / "0" / "run"
    assert rows(whole) == rows(killed) and any(row.get("grad_norm") for row in rows(whole))
    files = {file.name for file in whole.iterdir()}
    assert files == {file.name for file in killed.iterdir()}
    for file in files:
        if file.startswith("samples"):
            assert (whole / file).read_bytes() == (killed / file).read_bytes()
        if file.endswith(".pt"):
            left, right = (tensors(folder / file) for folder in (whole, killed))
            assert len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def tensors(file: Path) -> list[torch.Tensor]:
    """All in a checkpoint: the policy's, and where they are kept the critic's and the optimisers'."""
    leaves = torch.utils._pytree.tree_leaves(torch.load(file, weights_only=True))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_a_run_fills_its_folder_and_a_finished_one_changes_nothing(
    base, questions, tmp_path, capsys
):
    cfg = settings(tmp_path / "run", base, questions=questions)
    row = rl.main(cfg)
    files = {file.name: file.read_bytes() for file in Path(cfg.out_dir).iterdir()}
    steps = ["step_000000.pt", "step_000001.pt", "step_000002.pt", "step_000003.pt"]
    samples = ["samples_000000.jsonl", "samples_000002.jsonl", "samples_000003.jsonl"]
    assert files.keys() == {"config.json", "metrics.jsonl", "ckpt.pt", "echo.png", *steps, *samples}
    assert files["echo.png"].startswith(b"\x89PNG") and row["n"] == 4 and row["k"] == 2
    assert {"pass@1", "pass@k", "maj@k", "mean_length", "truncated"} <= row.keys()
    assert sum(part["share"] for part in row["formats"].values()) == pytest.approx(1)
    lines = [json.loads(line) for line in files["samples_000003.jsonl"].splitlines()]
    assert len(lines) == 4 * 3  # a greedy one and two others for each question
    assert lines[0].keys() >= {"id", "question", "gold", "completion", "format", "answer", "reward",
                               "failure", "greedy"}  # fmt: skip
    capsys.readouterr()
    assert rl.main(cfg) == row and "is finished" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in Path(cfg.out_dir).iterdir()} == files


def test_a_run_gives_the_signals_back_even_where_it_fails(base, questions, tmp_path, monkeypatch):
    """A pool that is forked after a run, in a notebook, ends its workers with SIGTERM."""
    monkeypatch.setattr(rl, "learn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rl.main(settings(tmp_path / "run", base, questions=questions))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def warned_at_learning(step: int, victim: int, rank: int) -> None:
    """Rank `victim` gets SIGTERM before the updates of a step."""
    learn = rl.learn

    def warned(rollout, current, *rest):
        if (rank, current) == (victim, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(rollout, current, *rest)

    rl.learn = warned


def test_two_ranks_see_the_rollouts_and_evaluations_of_one_and_stop_and_continue_as_one(
    base, questions, tmp_path
):
    """The second is warned by SIGTERM; both save, exit with 0, and go on when started again."""
    folders = one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    work = [
        functools.partial(training, base, questions=questions, out_dir=folder, save_every=9)
        for folder in folders
    ]
    assert run(tmp_path / "one", work[0]()) == [0]
    warned = functools.partial(warned_at_learning, 1, 1)
    assert run(tmp_path / "two", work[1](warned), 2) == [0, 0]
    assert "stopped at step 2" in (tmp_path / "two" / "0" / "stdout").read_text()
    assert run(tmp_path / "two", work[1](), 2) == [0, 0]
    for left, right in zip(rows(one), rows(two), strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() & {
            "step",
            "kind",
            "length",
            "pass@1",
            "pass@k",
            "formats",
            "sampled_formats",
            "reward",
        }:
            assert left[key] == right[key]
    for step in (0, 3):
        assert len({(folder / f"samples_{step:06d}.jsonl").read_text() for folder in folders}) == 1
    torch.testing.assert_close(final_weights(two), final_weights(one), atol=1e-5, rtol=0)


def test_eval_reads_any_questions_and_counts_those_that_are_too_long(base, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    questions = [
        {"question": "1 + 1?", "answer": "#### 2"},
        {"question": "Why? " * 300, "answer": 3},
    ]
    file.write_text("\n".join(map(json.dumps, questions)))
    cfg = Config(algo="eval", init_from=base, out_dir=str(tmp_path / "eval"), task="gsm8k", questions=str(file),
                 max_new_tokens=24, eval_k=2)  # fmt: skip
    row = rl.main(cfg)
    assert row["n"] == 2 and row["too_long"] == 1 and row["task"] == "gsm8k"
    assert "1 of 2 test questions are longer than" in capsys.readouterr().out


def test_questions_from_a_file_are_held_out_for_evaluation(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": i}) for i in range(50)))
    train, test = rl.load_tasks(Config(task="gsm8k", questions=str(file)))
    assert len(train) == 45 and len(test) == 5 and not {q.id for q in train} & {q.id for q in test}


@pytest.mark.parametrize("change, message", [
    (dict(algo="grpo", group_size=1), "--group_size=1 gives grpo nothing to compare"),
    (dict(algo="ppo", top_p=0.95), "use --top_p=1"), (dict(algo="grpo", top_p=0.95), "use --top_p=1"),
    (dict(algo="reinforce", top_p=0.95), "use --top_p=1"),
    (dict(algo="grpo", kl_in="loss", kl_estimator="k1"), "the gradient of k1 in the loss is zero"),
    (dict(algo="grpo", kl_in="reward"), "grpo has one reward for a completion"),
    (dict(init_from="nowhere"), "nowhere/ckpt.pt does not exist: run `torchrun pretrain.py` first"),
    (dict(task="toyy"), "unknown task 'toyy'"), (dict(questions="none.jsonl"), "none.jsonl does not exist"),
    (dict(temperature=0.0), "--temperature=0.0 must be above 0"), (dict(max_new_tokens=250), "no question fits"),
    (dict(kl_coef=-1.0), "must be 0 or more"),
])  # fmt: skip
def test_a_mistake_is_a_sentence_before_anything_is_written(base, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        rl.main(dataclasses.replace(settings(tmp_path / "run", base), **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo, flag", [
    ("ppo", "scale_rewards=false"), ("ppo", "restart_from_base=false"), ("grpo", "gamma=0.9"), ("grpo", "whiten=false"),
    ("reinforce", "clip_eps=0.1"), ("reinforce", "critic_learning_rate=0.1"), ("ei", "clip_eps=0.1"),
    ("ei", "kl_coef=0.1"), ("ei", "kl_in=reward"), ("eval", "temperature=0.5"), ("eval", "max_steps=9"),
])  # fmt: skip
def test_a_setting_that_an_algorithm_does_not_read_is_refused(algo, flag):
    name = flag.partition("=")[0]
    with pytest.raises(UserError, match=f"--{name} does nothing with --algo={algo}: leave it out"):
        rl.check(parse_config(Config, rl.PRESETS, [f"--algo={algo}", f"--{flag}"]))


@pytest.mark.parametrize("preset", ["tiny", "paper"])
@pytest.mark.parametrize("algo", [*rl.ALGORITHMS, "eval"])
def test_presets_and_the_config_of_another_algorithm_s_run_are_not_refused(tmp_path, preset, algo):
    """Its config.json holds every field, read or not."""
    flags = [f"--preset={preset}", f"--algo={algo}"]
    rl.check(parse_config(Config, rl.PRESETS, flags))
    other = parse_config(Config, rl.PRESETS, ["--gamma=0.9", "--max_steps=9", "--kl_in=loss"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(other)))
    rl.check(parse_config(Config, rl.PRESETS, [*flags, f"--config={file}"]))


CHANGES = {
    "kl_coef": 0.2, "kl_in": "loss", "kl_estimator": "k2", "clip_eps": 0.01, "critic_learning_rate": 1e-2,
    "value_clip": 1e-4, "gamma": 0.9, "gae_lambda": 0.5, "whiten": False, "scale_rewards": False,
    "restart_from_base": False,
}  # fmt: skip


@pytest.mark.parametrize("algo", rl.ALGORITHMS)
def test_the_settings_that_an_algorithm_reads_are_those_that_change_its_update(algo):
    """The table against the code: a setting that is refused would have changed no bit."""
    setup_distributed("cpu")
    plain = learned(algo=algo)[0]
    for names, algos in rl.USED_BY.items():
        for name in set(names.split()) & CHANGES.keys():
            value = "reward" if name == "kl_in" and algo != "ppo" else CHANGES[name]
            changed = learned(algo=algo, **{name: value})[0]
            differs = any(not torch.equal(left[key], right[key])
                          for left, right in zip(plain, changed) for key in left)  # fmt: skip
            assert differs == (algo in algos.split()), name


def no_gpu_memory(*_):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd a long story."
    )


@pytest.mark.parametrize(
    "accident", [no_gpu_memory, lambda *_: torch.empty(1 << 60)], ids=["cuda", "cpu"]
)
@pytest.mark.parametrize("place, flag", [("generate", "sample_batch_size, 64"),
                                         ("make_batch", "micro_batch_size, 3")])  # fmt: skip
def test_out_of_memory_is_a_sentence_with_the_setting_to_lower(
    base, questions, tmp_path, monkeypatch, capsys, accident, place, flag
):
    monkeypatch.setattr(rl, place, accident)
    argv = [f"--{k}={v}" for k, v in {**QUICK, "init_from": base, "questions": questions}.items()]
    monkeypatch.setattr(sys, "argv", ["rl.py", *argv, f"--out_dir={tmp_path}/run"])
    with pytest.raises(SystemExit) as stopped:
        rl.launch(rl.main, Config, rl.PRESETS)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed == f"rl.py: out of memory: lower --{flag} now\n"


def test_another_error_of_an_update_is_not_taken_for_want_of_memory():
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        rl.memory_for(Config(), "micro_batch_size"),
    ):
        raise RuntimeError("size mismatch")


def test_a_corrupt_base_is_named(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        rl.main(settings(tmp_path / "run", str(tmp_path)))


def test_presets_depend_on_the_algorithm():
    ei = parse_config(Config, rl.PRESETS, ["--preset=paper", "--algo=ei"])
    ppo = parse_config(Config, rl.PRESETS, ["--preset=paper", "--kl_coef=0.01"])
    assert (ei.group_size, ei.top_p, ei.max_steps, ei.task) == (64, 0.95, 3, "gsm8k")
    assert (ppo.group_size, ppo.top_p, ppo.learning_rate, ppo.kl_coef) == (8, 1.0, 1e-6, 0.01)


def test_snapshots_are_logarithmic_and_include_the_ends():
    steps = sorted(rl.snapshot_steps(1000))
    assert len(steps) == 15 and steps[0] == 1 and steps[-1] == 1000 and steps[7] == 32


@pytest.mark.parametrize("row, hint", [
    ({"informative": 0.0}, "never succeeds"), ({"informative": 0.0, "reward": 1.0}, "always succeeds"),
    ({"kl": 3.0}, "away from the base"), ({"entropy": 1e-4}, "entropy is gone"),
    ({"truncated": 0.9}, "--max_new_tokens"), ({}, None),
])  # fmt: skip
def test_a_run_that_went_wrong_says_so_in_plain_words(row, hint):
    fine = {"informative": 0.5, "reward": 0.5, "kl": 0.1, "entropy": 0.3, "truncated": 0.0}
    said = rl.advice([{**fine, "informative": row.get("informative", 0.5)}, {**fine, **row}])
    assert len(said) == (hint is not None) and all(hint in sentence for sentence in said)


# ---------------------------------------------------------------- bench.py


def test_bench_rl_prints_the_seconds_of_each_phase(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    bench.COMMANDS["rl"](
        ["--prompts_per_step=2", "--group_size=2", "--max_new_tokens=4", "--max_steps=1"]
    )
    printed = capsys.readouterr().out
    assert "4 of 4 tokens" in printed
    for name in ("sample", "verify", "update", "total"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("prompts", [1, 8])
def test_bench_memory_computes_what_a_forward_pass_keeps(dtype, width, prompts):
    gpt = GPT(GPTConfig(vocab_size=300, context=64, width=96, layers=3, heads=6))
    asked = [[1 + i % prompts] * 30 for i in range(8)]
    rollout = Rollout(asked, [[2] * 30] * 8, [""] * 8, [Score(0.0, "text", None, None)] * 8,
                      [[0.0] * 30] * 8)  # fmt: skip
    batch, kept = batch_of(rollout), {}
    known = {t.untyped_storage().data_ptr() for t in (*gpt.parameters(), *gpt.buffers())}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(dtype, CPU.device):
        results = Policy(gpt, 1.0)(batch)
    assert results[0].requires_grad  # and what it needs for that is still there
    copies = 2 * sum(p.numel() for p in gpt.parameters()) if width == 2 else 0
    measured = sum(size for place, size in kept.items() if place not in known)
    computed = bench.activation_bytes(gpt.config, 8, prompts, 30, 30, width) + copies
    assert computed == pytest.approx(measured, rel=0.15), computed / measured


def test_bench_memory_prints_what_fits(capsys):
    bench.COMMANDS["memory"](["--max_new_tokens=512"])
    blocks = capsys.readouterr().out.split("parameters, ")
    assert len(blocks) == 1 + 4 * 3
    fits = {size: line.split(size)[1].strip() for line in blocks[-3].splitlines()  # ppo at 1B
            for size in ("fits  8 GB", "fits 80 GB") if size in line}  # fmt: skip
    assert fits["fits  8 GB"] == "does not fit" and fits["fits 80 GB"].startswith(
        "--micro_batch_size="
    )


@pytest.mark.parametrize(
    "room, most, largest", [(0.5, 64, 0), (1, 64, 1), (7.9, 64, 4), (900, 48, 32)]
)
def test_a_batch_that_fits_is_a_power_of_two(room, most, largest):
    assert bench.power_of_two(room, most) == largest
