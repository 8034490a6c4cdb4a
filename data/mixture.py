"""A mixture of token files, as fixed batches of blocks: a pure function of its arguments and the
step.

`toy-tinygsm:4,toy-omi1` counts passes, the study's way. `toy-tinygsm:30%,toy-omi1:70%` with a
token budget fixes shares instead, so that the mixture and the amount of training are separate
knobs.
"""

import hashlib

import numpy as np

from data import UserError


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

    corpora: name -> ids (n,). The last hundredth of each (16 blocks or more) is held out of every
    mixture. The order of a corpus's blocks depends on seed, name and pass alone: mixtures share
    prefixes of it.
    """

    def __init__(
        self, corpora: dict, mix: str, tokens: float, context: int, batch_size: int, seed: int
    ):
        amounts, shares = parse_mix(mix)
        if shares != (tokens > 0):
            raise UserError("--tokens goes with percents in --mix, and percents with --tokens")
        self.corpora, self.context, self.batch_size = corpora, context, batch_size
        self.available, self.held = {}, {}
        for name in amounts:
            blocks = (len(corpora[name]) - 1) // context
            self.held[name] = min(max(16, blocks // 100), blocks // 2)
            self.available[name] = blocks - self.held[name]
            if self.held[name] == 0:
                raise UserError(f"corpus {name} has fewer than two blocks of {context} tokens")
        self.counts = count_blocks(amounts, shares, self.available, int(tokens) // context)
        self.names = list(amounts)
        total = sum(self.counts.values())
        if total == 0:
            raise UserError(
                f"--mix={mix} --tokens={tokens:g} holds not one block of {context} tokens"
            )
        self.steps = -(-total // batch_size)  # the last batch may be short
        self.label = np.repeat(np.arange(len(amounts), dtype=np.uint8), list(self.counts.values()))
        generator(seed, "order").shuffle(self.label)
        self.block = np.empty(total, dtype=np.uint32)
        for i, name in enumerate(self.names):
            passes = -(-self.counts[name] // self.available[name])
            order = [
                generator(seed, name, p).permutation(self.available[name]) for p in range(passes)
            ]
            self.block[self.label == i] = np.concatenate([np.empty(0), *order])[: self.counts[name]]

    def read(self, name: str, block: int) -> np.ndarray:
        start = int(block) * self.context
        return self.corpora[name][start : start + self.context + 1].astype(np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Blocks of a step, (batch_size, T + 1) int64; rows past the end of the mixture are -1."""
        out = np.full((self.batch_size, self.context + 1), -1)
        places = range(step * self.batch_size, min((step + 1) * self.batch_size, len(self.label)))
        for row, place in enumerate(places):
            out[row] = self.read(self.names[self.label[place]], self.block[place])
        return out

    def held_out(self, name: str) -> np.ndarray:
        """The held-out tail of a corpus, (blocks, T + 1) int64."""
        first = self.available[name]
        return np.stack([self.read(name, first + i) for i in range(self.held[name])])

    def manifest(self) -> dict:
        """What is in the mixture, for each corpus."""
        return {name: {"tokens": n * self.context, "blocks": n, "passes": n / self.available[name],
                       "share": n / len(self.label), "held_out_blocks": self.held[name],
                       "sha256": hashlib.sha256(self.corpora[name]).hexdigest()}
                for name, n in self.counts.items()}  # fmt: skip


def generator(*key) -> np.random.Generator:
    """A generator of its own for every key."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))
