"""The GPT that every script here trains, its key-value cache, and the sampler.

The architecture is OLMo's (arXiv 2402.00838), the one of the study: rotary positions, LayerNorm
without parameters, SwiGLU, no biases. The model knows ids only; text is the business of data/.
"""

import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int  # V, the end-of-text token included
    context: int = 256  # positions at most, prompt and completion together
    width: int = 96  # C
    layers: int = 2
    heads: int = 6  # H; the head width D = C / H must be even for the rotation
    tied: bool = True  # one matrix for the embedding and the output
    init_std: float = 0.02  # of every weight, truncated at three of them
    rope_base: float = 10000.0  # of the wavelengths of the rotary positions: above the longest


class KVCache:
    """Keys and values of every layer; all rows write their next token in the same slot.

    Rows are ragged: `real` marks the slots without padding, `length` is the position of a row's
    next token. Room is added as it is needed; attention reads the first `filled` slots.
    """

    STEP = 128  # slots added at a time: a copy of the rest is little beside 128 readings of it

    def __init__(self, config: GPTConfig, batch: int, device, dtype):
        shape = (2, config.layers, batch, config.heads, 0, config.width // config.heads)
        self.kv = torch.empty(shape, device=device, dtype=dtype)  # (2, L, B, H, S, D)
        self.slots = torch.arange(config.context, device=device)
        self.real = torch.ones((batch, config.context), dtype=torch.bool, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)  # (B,)
        self.filled = 0  # known without asking the device

    def reserve(self, T: int) -> None:
        """Makes room for T more tokens in each row."""
        needed, old = self.filled + T, self.kv
        if needed > old.size(4):
            size = min(needed + self.STEP, len(self.slots))
            self.kv = old.new_empty(*old.shape[:4], size, old.size(5))
            self.kv[..., : self.filled, :] = old[..., : self.filled, :]

    def advance(self, T: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes T more slots: their positions (B, T), and the mask that attention adds to its
        scores (B, 1, T, S), or None where it is causal and no more.
        """
        self.reserve(T)
        start, self.filled = self.filled, self.filled + T
        positions = self.length[:, None] + self.slots[:T]  # (B, T)
        self.length = self.length + T
        if start == 0:
            return positions, None  # padding stands on the right, where no token looks
        causal = self.slots[: self.filled] <= self.slots[start : self.filled, None]  # (T, S)
        seen = self.real[:, None, None, : self.filled] & causal
        return positions, torch.zeros_like(seen, dtype=self.kv.dtype).masked_fill(~seen, -torch.inf)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Writes k, v (B, H, T, D) in the slots taken; returns all filled, (B, H, S, D)."""
        past, T = self.kv[:, layer, :, :, : self.filled], k.size(2)  # (2, B, H, S, D)
        past[0, :, :, -T:], past[1, :, :, -T:] = k, v
        return past[0], past[1]

    def part(self, rows) -> "KVCache":
        """The cache of some rows: a slice shares this one's storage, numbers (n,) copy from it."""
        part = copy.copy(self)
        part.kv, part.real, part.length = self.kv[:, :, rows], self.real[rows], self.length[rows]
        return part

    def trim(self, lengths: torch.Tensor, filled: int) -> None:
        """Row b holds lengths[b] real tokens, and from there to `filled` padding."""
        self.length, self.filled = lengths, filled
        self.real[:, :filled] = self.slots[:filled] < lengths[:, None]

    def keep(self, alive: torch.Tensor) -> torch.Tensor:
        """Drops the rows that are not `alive`; returns the old place (n,) of each that is left."""
        n = int(alive.sum())  # the last rows move to the places of those that go: no other does
        gaps, movers = (~alive[:n]).nonzero()[:, 0], alive[n:].nonzero()[:, 0] + n
        filled = self.kv[..., : self.filled, :]
        filled[:, :, gaps] = filled[:, :, movers]
        left = torch.arange(n, device=alive.device).index_copy(0, gaps, movers)
        self.kv, self.real, self.length = self.kv[:, :, :n], self.real[left], self.length[left]
        return left


class SharedPrompts:
    """Keys and values of prompts for training: with their gradient, and each prompt read once.

    The first pass of GPT.hidden reads the U different prompts, of `lengths` (U,); the second one
    B completions, each after the prompt that `index` (B,) names. Padding is on the right of both.
    """

    def __init__(self, lengths: torch.Tensor, index: torch.Tensor):
        self.lengths, self.index = lengths, index
        self.kv = []  # k and v, (U, H, P, D), of each layer

    def advance(self, T: int):
        """As KVCache.advance."""
        slots = torch.arange(T, device=self.index.device)
        if not self.kv:
            return slots.expand(len(self.lengths), T), None
        k, length = self.kv[0][0], self.lengths[self.index][:, None]  # (B, 1)
        real = torch.arange(k.size(2), device=k.device) < length  # (B, P)
        causal = slots <= slots[:, None]  # (T, T)
        # with its four dimensions from the start: torch.compile fails on a view of the mask
        parts = real[:, None, None].expand(-1, 1, T, -1), causal.expand(len(real), 1, T, T)
        seen = torch.cat(parts, dim=3)
        mask = k.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)  # (B, 1, T, P + T)
        return length + slots, mask

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Takes k, v (B, H, T, D) of this pass; returns all that they attend to, (B, H, S, D)."""
        if layer == len(self.kv):  # the first pass
            self.kv.append((k, v))
            return k, v
        past = (t.index_select(0, self.index) for t in self.kv[layer])
        return [torch.cat(pair, dim=2) for pair in zip(past, (k, v))]


def rotate(x, rope) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): turns the halves (a, b) of the last dimension of x
    (B, H, T, D) to (a cos - b sin, b cos + a sin); rope is cos and -+sin, each (..., T, D).
    """
    cos, sin = rope
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)


def attend(q, k, v, mask) -> torch.Tensor:
    """Attention of q (B, H, T, D) to k, v (B, H, S, D), causal without a mask (B, 1, T, S)."""
    if mask is None or q.size(2) > 1 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    # for one query on a CPU two products take less time than the fused kernel
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(2, 3)  # (B, H, 1, S)
    return (scores + mask).softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rope, mask=None, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, H, S, D): the past and the present
        y = attend(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202). OLMo fuses gate and up; apart, the backward pass joins nothing."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, 4 * config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, 4C) inside


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask=None, cache=None, layer=0, only=None):
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]), rope, mask, cache, layer)
        if only is not None:
            x = x[torch.arange(len(x), device=x.device), only][:, None]  # (B, 1, C)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


def token_logps(hidden, weight, tokens, temperature=1.0, room=1 << 26):
    """log p[token] in fp32, (n,), of p = softmax(hidden @ weight.T / temperature); 0 for token -1.

    hidden (n, C), weight (V, C), tokens (n,). Logits are made for one chunk of tokens at a time;
    where all of them would be more than `room` numbers, none is kept: the backward pass computes
    them again (arXiv 1604.06174).
    """
    chunk = 512 if hidden.device.type == "cpu" else 2048  # tokens: fits a cache, fills a GPU

    def part(x, y):
        logits = F.linear(x, weight)  # (chunk, V), in bf16 under autocast
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return -F.cross_entropy(logits, y, ignore_index=-1, reduction="none")

    if len(hidden) * len(weight) > room:
        part = functools.partial(checkpoint, part, use_reentrant=False)
    return torch.cat([part(x, y) for x, y in zip(hidden.split(chunk), tokens.split(chunk))])


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.width % (2 * config.heads):
            raise ValueError(f"{config.heads} heads need a width that is a multiple of twice that")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        std = config.init_std
        for w in self.parameters():
            nn.init.trunc_normal_(w, 0.0, std, -3 * std, 3 * std)
        if config.tied:
            self.head.weight = self.embed.weight
        D = config.width // config.heads
        rate = config.rope_base ** (-torch.arange(0, D, 2) / D)  # (D/2,) radians a position
        angle = torch.arange(config.context)[:, None] * rate  # (context, D/2)
        cos, sin = angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)
        self.register_buffer("rope", torch.stack((cos, sin)), persistent=False)  # (2, context, D)

    def hidden(self, ids: torch.Tensor, cache: KVCache | SharedPrompts | None = None, only=None):
        """Last normalised hidden states (B, T, C) of ids (B, T), which continue a given `cache`;
        with only (B,), that of one place in each row, (B, 1, C).
        """
        if ids.size(1) > self.config.context:
            raise ValueError(f"more tokens than the context of {self.config.context}")
        rope, mask = self.rope[:, : ids.size(1)], None  # (2, T, D)
        if cache is not None:
            positions, mask = cache.advance(ids.size(1))
            rope = self.rope[:, positions][:, :, None]  # (2, B, 1, T, D)
        x, rope = self.embed(ids), rope.unbind(0)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, only if block is self.blocks[-1] else None)
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None, targets=None):
        """Logits (B, T, V) of the token after each of ids (B, T); with targets (B, T), the sum of
        their cross-entropies in nats instead, where -1 counts nothing.
        """
        hidden = self.hidden(ids, cache)
        if targets is None:
            return self.head(hidden)
        return -token_logps(hidden.flatten(0, 1), self.head.weight, targets.flatten()).sum()


def sample(logits, temperature, top_p, uniform):
    """One token (B,) for each row of logits (B, V), and its log-prob (B,) in fp32.

    `uniform` (B,) in (0, 1] is the only randomness, so a row's token depends on nothing but the
    row. The log-prob is of the whole distribution at this temperature (at 1 where that is 0, which
    is greedy): top-p limits what is drawn, not what is reported.
    """
    p = kept = F.softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if top_p < 1:
        sorted_p, order = p.sort(dim=-1, descending=True)
        outside = sorted_p.cumsum(dim=-1) - sorted_p >= top_p
        kept = p.masked_fill(outside.scatter(1, order, outside), 0)
    cumulative = kept.cumsum(dim=-1)  # inverse transform sampling
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])  # (B, 1)
    token = p.argmax(dim=-1, keepdim=True) if temperature == 0 else drawn
    return token[:, 0], p.gather(1, token)[:, 0].log()


def distinct(prompts):
    """The U different ones of B prompts (lists of ids), padded on the right (U, P); their lengths
    (U,); the place (B,) of each prompt among them.
    """
    places = {}
    index = [places.setdefault(tuple(p), len(places)) for p in prompts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in places], batch_first=True)
    return ids, torch.tensor([len(p) for p in places]), torch.tensor(index)


def prefill(model, prompts) -> tuple[torch.Tensor, KVCache]:
    """The last hidden state (B, C) of each of `prompts`, and the cache that holds them all."""
    device = model.embed.weight.device
    ids, lengths, index = (t.to(device) for t in distinct(prompts))
    autocast = torch.is_autocast_enabled(device.type)  # then keys and values come in its dtype
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.embed.weight.dtype
    (U, T), last = ids.shape, []
    cache = KVCache(model.config, U, device, dtype)
    cache.reserve(T)
    count = max(1, (2048 if device.type == "cpu" else 65536) // T)  # fits a cache, fills a GPU
    for first in range(0, U, count):
        rows = slice(first, first + count)
        last.append(model.hidden(ids[rows], cache.part(rows), lengths[rows] - 1)[:, 0])
    cache.trim(lengths, T)
    # where no two prompts are equal there is nothing to copy
    return torch.cat(last)[index], cache if U == len(index) else cache.part(index)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, generators, temperature=1.0, top_p=1.0):
    """Continues each of `prompts` (lists of ids) up to `eos` or `max_new_tokens` = N tokens.

    `generators` holds a torch.Generator on the CPU for each prompt, whose tokens are then the same
    in any batch. Returns tokens (B, N), filled with eos at the end; mask (B, N), true up to the
    first eos and on it; logp (B, N) in fp32 at `temperature`, zero outside the mask.
    """
    B, N, device = len(prompts), max_new_tokens, model.embed.weight.device
    if not all(0 < len(prompt) <= model.config.context - N for prompt in prompts):
        raise ValueError(f"a prompt must have 1 to {model.config.context - N} tokens: {N} follow")
    uniform = torch.stack([torch.rand(N, generator=g) for g in generators])
    uniform = (1 - uniform).to(device)  # (0, 1]: a token of probability zero is never reached
    tokens = torch.full((B, N), eos, device=device)
    logp = torch.zeros((B, N), device=device)
    rows = torch.arange(B, device=device)  # those still being written
    alive = torch.ones_like(rows, dtype=torch.bool)  # for each of rows: no eos yet
    last, cache = prefill(model, prompts)
    for t in range(N):
        token, logp[rows, t] = sample(model.head(last), temperature, top_p, uniform[rows, t])
        tokens[rows, t] = token = token.where(alive, eos)
        alive = token != eos
        if t == N - 1:
            break
        left = int(alive.sum()) if t % 4 == 3 else len(rows)  # seldom: the host waits for it
        if left == 0:
            break
        if left < 0.9 * len(rows):  # finished rows cost as much as others until they leave
            stay = cache.keep(alive)
            rows, token, alive = rows[stay], token[stay], alive[stay]
        last = model.hidden(token[:, None], cache)[:, 0]
    ended = tokens == eos
    mask = ended.cumsum(dim=1) - ended.long() == 0  # up to the first eos, and on it
    return tokens, mask, logp * mask
