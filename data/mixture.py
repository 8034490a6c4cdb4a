"""A mixture of token files as batches of blocks: a pure function of its arguments and the step.

`tinygsm:4,omi1` counts passes, the study's way. `tinygsm:30%,omi1:70%` with a token budget fixes
shares instead, so that the mixture and the amount of training are separate knobs.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import UserError, toy
from data.tokens import read_meta

HELD_OUT = 16, 512  # blocks at least and at most: more would only lengthen every evaluation


def parse_mix(mix: str) -> tuple[dict[str, float], bool]:
    """Amount per corpus, and whether the amounts are shares that sum to 1 (else passes)."""
    entries = [entry.strip().partition(":") for entry in mix.split(",")]
    shares = all(amount.endswith("%") for _, _, amount in entries)
    try:
        amounts = {name: float(a.removesuffix("%" * shares) or 1) for name, _, a in entries}
    except ValueError:
        amounts = {}
    if len(amounts) < len(entries) or not all(0 <= a < np.inf for a in amounts.values()):
        raise UserError(f"--mix={mix} should read NAME:PASSES,... or NAME:PERCENT%,..., not both: "
                        "each corpus once, with an amount of 0 or more")
    if shares and abs(sum(amounts.values()) - 100) > 1e-7:
        raise UserError(f"--mix={mix}: the percents sum to {sum(amounts.values()):g}, not to 100")
    return {name: a / (100 if shares else 1) for name, a in amounts.items()}, shares


class Mixture:
    """Blocks of T + 1 ids (T inputs and their T targets), dealt out in batches of `batch_size`.

    corpora: name -> ids (n,). The last hundredth of each (within HELD_OUT) is held out of every
    mixture. The order of a corpus's blocks depends on seed, name and pass alone: mixtures share
    prefixes of it.
    """

    def __init__(self, corpora: dict, mix: str, tokens: float, context: int, batch_size: int,
                 seed: int):
        amounts, shares = parse_mix(mix)
        if shares != (tokens > 0):
            raise UserError("--tokens goes with percents in --mix, and percents with --tokens")
        self.corpora, self.names, self.seed = corpora, list(amounts), seed
        self.context, self.batch_size = context, batch_size
        self.available, self.held = {}, {}
        for name in amounts:
            blocks = (len(corpora[name]) - 1) // context  # a block ends with the next one's first
            self.held[name] = min(max(HELD_OUT[0], blocks // 100), HELD_OUT[1], blocks // 2)
            self.available[name] = blocks - self.held[name]
            if self.held[name] == 0:
                raise UserError(f"corpus {name} has fewer than two blocks of {context} tokens")
        if shares:  # of the budget, each to one block: the ends are rounded, so that they add up
            ends = np.round(np.cumsum([0, *amounts.values()]) * (int(tokens) // context))
            self.counts = dict(zip(amounts, map(int, np.diff(ends))))
        else:
            self.counts = {name: round(passes * self.available[name])
                           for name, passes in amounts.items()}
        self.total = sum(self.counts.values())
        if self.total == 0:
            raise UserError(f"--mix={mix} --tokens={tokens:g} holds not one block of {context}")
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
        start = int(block) * self.context  # int: tokens may be more than uint32 holds
        return self.corpora[name][start : start + self.context + 1].astype(np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Blocks of a step, (batch_size, T + 1) int64; rows past the end of the mixture are -1."""
        out, row = np.full((self.batch_size, self.context + 1), -1), 0  # -1 is no target
        first = self.counts_before(step * self.batch_size)
        last = self.counts_before(min((step + 1) * self.batch_size, self.total))
        for name in self.names:
            for place in range(first[name], last[name]):
                once, i = divmod(place, self.available[name])  # the pass, and the place in it
                order = shuffled(self.available[name], self.seed, name, once)
                out[row] = self.read(name, order[i])
                row += 1
        return out

    def held_out(self, name: str) -> np.ndarray:
        """The held-out tail of a corpus, (blocks, T + 1) int64."""
        first = self.available[name]
        return np.stack([self.read(name, first + i) for i in range(self.held[name])])

    def manifest(self) -> dict:
        """What is in the mixture, for each corpus; of an embedded one its authors' errors too."""
        rows = {}
        for name, n in self.counts.items():
            rows[name] = {"tokens": n * self.context, "blocks": n,
                          "passes": n / self.available[name], "share": n / self.total,
                          "held_out_blocks": self.held[name],
                          "sha256": read_meta(Path(self.corpora[name].filename))["sha256"]}
            if toy.VARIANT.fullmatch(name):
                rows[name]["slips"], rows[name]["misconceptions"] = toy.errors(name)[1:]
        return rows


def generator(*key) -> np.random.Generator:
    """A generator of its own for every key, the same in every process (hash() is not)."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


@lru_cache(maxsize=32)
def shuffled(size: int, *key) -> np.ndarray:
    """The numbers 0 ... size - 1 in the order that belongs to the key, (size,).

    Of 20 million blocks, 40 billion tokens at 2048 each, that is 80 MB.
    """
    return generator(*key).permutation(np.arange(size, dtype=np.uint32))


def pick_prompts(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of `count` questions a step asks: each once an epoch, in the epoch's own order."""
    places = [divmod(i, count) for i in range(step * size, (step + 1) * size)]
    return [int(shuffled(count, seed, "prompts", epoch)[i]) for epoch, i in places]
