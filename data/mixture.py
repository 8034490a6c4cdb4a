"""A mixture of token files, as fixed batches of blocks: a pure function of its arguments and the
step.

`tinygsm:4,omi1` counts passes, the study's way. `tinygsm:30%,omi1:70%` with a token budget fixes
shares instead, so that the mixture and the amount of training are separate knobs. Nothing is
shuffled in memory: 20 million blocks, 40 billion tokens at 2048 each, start as fast as 20.
"""

import hashlib
import random
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import UserError
from data.tokens import read_meta

HELD_OUT = 16, 512  # blocks at least and at most: more would only lengthen every evaluation


def parse_mix(mix: str) -> tuple[dict[str, float], bool]:
    """Amount per corpus, and whether the amounts are shares that sum to 1 (else passes)."""
    amounts, percents = {}, set()
    for entry in mix.split(","):
        name, _, amount = entry.strip().partition(":")
        percents.add(amount.endswith("%"))
        try:
            amounts[name] = float(amount.rstrip("%") or 1) / (100 if amount.endswith("%") else 1)
        except ValueError:
            raise UserError(
                f"--mix: {entry!r} should read NAME, NAME:PASSES or NAME:PERCENT%"
            ) from None
    if len(amounts) < len(mix.split(",")) or not all(
        0 <= a < float("inf") for a in amounts.values()
    ):
        raise UserError(f"--mix={mix}: name each corpus once, with an amount of 0 or more")
    if len(percents) > 1:
        raise UserError(f"--mix={mix}: give passes to all corpora or percents to all, not both")
    if percents == {True} and abs(sum(amounts.values()) - 1) > 1e-9:
        raise UserError(
            f"--mix={mix}: the percents sum to {100 * sum(amounts.values()):g}, not to 100"
        )
    return amounts, percents == {True}


def count_blocks(amounts: dict, shares: bool, available: dict, budget: int) -> dict[str, int]:
    """Blocks to take of each corpus: passes x available, or shares of `budget` to one block."""
    if not shares:
        return {name: round(passes * available[name]) for name, passes in amounts.items()}
    exact = {name: share * budget for name, share in amounts.items()}
    counts = {name: int(blocks + 1e-6) for name, blocks in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


class Mixture:
    """Blocks of T + 1 ids (T inputs and their T targets), dealt out in batches of `batch_size`.

    corpora: name -> ids (n,). The last hundredth of each (within HELD_OUT) is held out of every
    mixture. The order of a corpus's blocks depends on seed, name and pass alone: mixtures share
    prefixes of it.
    """

    def __init__(
        self, corpora: dict, mix: str, tokens: float, context: int, batch_size: int, seed: int
    ):
        amounts, shares = parse_mix(mix)
        if shares != (tokens > 0):
            raise UserError("--tokens goes with percents in --mix, and percents with --tokens")
        self.corpora, self.names, self.seed = corpora, list(amounts), seed
        self.context, self.batch_size = context, batch_size
        self.available, self.held = {}, {}
        for name in amounts:
            blocks = (len(corpora[name]) - 1) // context
            self.held[name] = min(max(HELD_OUT[0], blocks // 100), HELD_OUT[1], blocks // 2)
            self.available[name] = blocks - self.held[name]
            if self.held[name] == 0:
                raise UserError(f"corpus {name} has fewer than two blocks of {context} tokens")
        self.counts = count_blocks(amounts, shares, self.available, int(tokens) // context)
        self.total = sum(self.counts.values())
        if self.total == 0:
            raise UserError(
                f"--mix={mix} --tokens={tokens:g} holds not one block of {context} tokens"
            )
        self.steps = -(-self.total // batch_size)  # the last batch may be short

    def counts_before(self, place: int) -> dict[str, int]:
        """Blocks of each corpus among the first `place`: its share of them, to about a block.

        The first corpus takes its share, the second its share of what is left, and so on; each
        count rises with `place` by 0 or 1, for what is left does too.
        """
        left, total, counts = place, self.total, {}
        for name, count in self.counts.items():
            counts[name] = left * count // max(total, 1)
            left, total = left - counts[name], total - count
        return counts

    def read(self, name: str, block: int) -> np.ndarray:
        start = block * self.context
        return self.corpora[name][start : start + self.context + 1].astype(np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Blocks of a step, (batch_size, T + 1) int64; rows past the end of the mixture are -1."""
        out, row = np.full((self.batch_size, self.context + 1), -1), 0
        first = self.counts_before(step * self.batch_size)
        last = self.counts_before(min((step + 1) * self.batch_size, self.total))
        for name in self.names:
            for place in range(first[name], last[name]):
                once, i = divmod(place, self.available[name])  # the pass, and the place in it
                out[row] = self.read(name, shuffled(i, self.available[name], self.seed, name, once))
                row += 1
        return out

    def held_out(self, name: str) -> np.ndarray:
        """The held-out tail of a corpus, (blocks, T + 1) int64."""
        first = self.available[name]
        return np.stack([self.read(name, first + i) for i in range(self.held[name])])

    def manifest(self) -> dict:
        """What is in the mixture, for each corpus."""
        return {name: {"tokens": n * self.context, "blocks": n, "passes": n / self.available[name],
                       "share": n / self.total, "held_out_blocks": self.held[name],
                       "sha256": read_meta(Path(self.corpora[name].filename))["sha256"]}
                for name, n in self.counts.items()}  # fmt: skip


def shuffled(place: int, size: int, *key) -> int:
    """The number at `place` in the permutation of 0 ... size - 1 that belongs to the key.

    A Feistel network permutes the numbers of 2 x `half` bits; where it leads out of the range, it
    is applied again (cycle walking, Black and Rogaway 2002), up to 4 times on average.
    """
    half = (size.bit_length() + 1) // 2
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for a, b in round_keys(key):
            # multiply-shift hashing (Dietzfelbinger 1996): the upper bits of 64
            left, right = right, left ^ ((a * right + b) % 2**64 >> (64 - half))
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=1024)
def round_keys(key: tuple) -> list[tuple[int, int]]:
    """A factor and a summand of 64 bits for each round."""
    rng = random.Random(repr(key))
    return [(rng.getrandbits(64) | 1, rng.getrandbits(64)) for _ in range(6)]


def generator(*key) -> np.random.Generator:
    """A generator of its own for every key."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))
