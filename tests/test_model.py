import pytest
import torch
import torch.nn.functional as F

from conftest import Spy
from model import GPT, GPTConfig, KVCache, generate, sample, token_logps

EOS = 0


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("step", [0, 1, 5, 128])  # slots that the cache adds when it grows
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 1, 4, 1), (11, 1)])
def test_cached_logits_equal_uncached_ones_at_every_boundary(gpt, chunks, step, monkeypatch):
    """And no token sees a later one: a cache that is read one by one holds none."""
    monkeypatch.setattr(KVCache, "STEP", step)
    ids = torch.randint(50, (3, 12))
    cache = KVCache(gpt.config, 3, "cpu", torch.float32)
    parts = [gpt(part, cache) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), gpt(ids))


@pytest.mark.parametrize("step", [0, 128])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.7, 0.8), (1.0, 1.0)])
def test_a_ragged_batch_gives_each_prompt_what_it_gets_alone(
        gpt, step, temperature, top_p, monkeypatch):
    """While the cache grows, equal prompts are read once, and rows that end leave: with an end that
    is likely they do at every chance, and others move to their places with all that is theirs."""
    monkeypatch.setattr(KVCache, "STEP", step)
    gpt.head.bias = torch.nn.Parameter(torch.tensor([2.0] + [0.0] * 49))  # of the EOS
    prompts = [list(range(1, 2 + i % 9)) for i in range(40)]  # each length some four times
    together = generate(gpt, prompts, 30, EOS, seeded(*range(40)), temperature, top_p)
    lengths = together[1].sum(dim=1)
    assert lengths.min() < 5 and lengths.max() > 12 and len(lengths.unique()) > 4
    for i, prompt in enumerate(prompts):
        alone = generate(gpt, [prompt], 30, EOS, seeded(i), temperature, top_p)
        for mine, ours in zip(alone, together):
            torch.testing.assert_close(mine[0], ours[i], atol=1e-4, rtol=1e-4)


def test_the_mask_contains_the_first_eos_and_nothing_after_it(gpt):
    """Without the EOS in the signal, stopping is never learned; what follows it is none."""
    prompts = [[i] for i in range(1, 41)]
    tokens, mask, logp = generate(gpt, prompts, 30, EOS, seeded(*range(40)), 2.0)
    ended = [row.tolist().index(EOS) for row in tokens if EOS in row.tolist()]
    assert len(ended) > 10 and min(ended) < 8 and len(ended) < 40  # some end early, and some do not
    for row, kept, values in zip(tokens.tolist(), mask.tolist(), logp):
        length = row.index(EOS) + 1 if EOS in row else 30
        assert kept == [True] * length + [False] * (30 - length)
        assert row[length:] == [EOS] * (30 - length) and values[length:].abs().sum() == 0


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_reported_log_probs_are_of_the_whole_distribution_at_the_temperature(gpt, temperature):
    prompts = [[5, 6], [7, 8, 9]]
    tokens, mask, logp = generate(gpt, prompts, 10, EOS, seeded(0, 1), temperature, top_p=0.9)
    for prompt, row, kept, values in zip(prompts, tokens, mask, logp):
        ids = torch.tensor(prompt + row[kept].tolist())
        for t in range(int(kept.sum())):  # token by token: an index that is off by one would show
            logits = gpt(ids[None, : len(prompt) + t])[0, -1] / temperature
            expected = F.log_softmax(logits, dim=-1)[ids[len(prompt) + t]]
            torch.testing.assert_close(values[t], expected)


def test_sampled_tokens_follow_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    uniform = 1 - torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    token, _ = sample(p.log().expand(40_000, 5), 1.0, 1.0, uniform)
    torch.testing.assert_close(token.bincount(minlength=5) / 40_000, p, atol=0.01, rtol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.999])
@pytest.mark.parametrize("uniform", [1.0, 1e-30])
def test_a_token_of_probability_zero_is_never_drawn_even_at_the_ends(uniform, top_p):
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert int(sample(logits, 1.0, top_p, torch.tensor([uniform]))[0]) in (1, 2)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)
    uniform = torch.linspace(0.001, 1, 1000)
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.85, {0, 1, 2})):
        assert set(sample(logits, 1.0, top_p, uniform)[0].tolist()) == kept


def test_a_prompt_or_a_width_that_does_not_fit_is_refused(gpt):
    with pytest.raises(ValueError, match="10 follow"):
        generate(gpt, [[1] * 55], 10, EOS, seeded(0))
    with pytest.raises(ValueError, match="1 to 54 tokens"):
        generate(gpt, [[]], 10, EOS, seeded(0))
    with pytest.raises(ValueError, match="a multiple of twice that"):
        GPT(GPTConfig(vocab_size=10, width=30, heads=4))


def test_attention_depends_on_relative_positions_only(gpt):
    other = GPT(gpt.config)
    other.load_state_dict(gpt.state_dict())
    other.rope = gpt.rope.roll(-7, dims=1)  # every position seven later
    ids = torch.randint(50, (2, 20))
    torch.testing.assert_close(other(ids), gpt(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("room", [0, 1 << 26])
@pytest.mark.parametrize("tokens", [0, 1, 512, 1100])  # none, less than a chunk, one, two and more
def test_chunked_log_probs_have_the_values_and_gradients_of_plain_ones(tokens, room):
    """And the logits of all tokens never exist at once, forwards or backwards."""
    draw = torch.Generator().manual_seed(tokens)
    hidden, weight = (torch.randn(n, 8, generator=draw, dtype=torch.float64).requires_grad_()
                      for n in (tokens, 30))
    ids, d_logp = torch.randint(-1, 30, (tokens,), generator=draw), torch.randn(tokens)
    kept, note = [], lambda saved: kept.append(saved.shape) or saved
    with Spy() as spy, torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        ours = token_logps(hidden, weight, ids, 0.7, room)
        with torch.no_grad():
            assert torch.equal(token_logps(hidden, weight, ids, 0.7, room), ours)  # to the bit
        found = torch.autograd.grad(d_logp.double() @ ours, (hidden, weight))
    logps = (hidden @ weight.t() / 0.7).log_softmax(-1)
    theirs = logps.gather(1, ids.clamp(min=0)[:, None])[:, 0] * (ids >= 0)  # -1 counts nothing
    expected = torch.autograd.grad(d_logp.double() @ theirs, (hidden, weight))
    torch.testing.assert_close((ours, *found), (theirs, *expected), atol=1e-12, rtol=1e-12)
    logits = [shape for shape in spy.shapes if len(shape) > 1 and shape[-1] == 30]
    assert all(shape[:-1].numel() <= 512 for shape in logits)
    assert not (room == 0 < tokens and {(tokens, 30), (512, 30)} & set(kept))


def test_the_loss_is_in_fp32_under_autocast_and_zero_where_nothing_counts(gpt):
    """Log-probs in bf16 have two digits (OpenRLHF#620). All padding was 0 / 0 (trl#6439)."""
    ids, targets = torch.randint(50, (2, 2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = gpt(ids), gpt(ids, targets=targets)
        padding = gpt(ids, targets=torch.full_like(targets, -1))
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    (loss + padding).backward()
    assert padding == 0
    assert gpt.head.weight.grad.dtype == torch.float32 and gpt.head.weight.grad.isfinite().all()
    hidden, weight = torch.randn(9, 32).bfloat16(), gpt.head.weight.detach().bfloat16()
    exact = (F.linear(hidden, weight).float() / 0.7).log_softmax(-1)[:, 3]
    assert torch.equal(token_logps(hidden, weight, torch.full((9,), 3), 0.7), exact)


def test_initial_weights_are_truncated_at_three_standard_deviations():
    model = GPT(GPTConfig(vocab_size=500, init_std=0.02))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert 0.0195 < float(weights.std()) < 0.0205 and float(weights.abs().max()) <= 0.06
