"""Byte-pair encoding: trains the toy's vocabulary on the embedded corpora, and writes it to
data/toy.tiktoken: `python tests/train_tokenizer.py`.
"""

import base64
import sys
from collections import Counter
from pathlib import Path

import regex  # tiktoken's own dependency

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.tokenizer import TOY_PATTERN, TOY_RANKS  # noqa: E402
from data.toy import AUTHORS, corpus  # noqa: E402

SIZE = 895  # tokens at most, and one for the end of a text
DOCUMENTS = 5000  # of each author: more would hold few other pieces


def train_bpe(texts, pattern: str, size: int) -> dict[bytes, int]:
    """Byte-pair ranks (arXiv 1508.07909): the 256 bytes, then the commonest pair again and again
    up to `size`.

    Ties go to the smaller pair of byte strings, so the same texts give the same ranks.
    """
    pieces = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = {tuple(bytes([b]) for b in p.encode()): n for p, n in pieces.items()}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = {merge(word, best): n for word, n in words.items()}
    return ranks


def merge(word: tuple, pair: tuple) -> tuple:
    """`word` with every occurrence of `pair` joined, from the left."""
    out, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if joined else word[i])
        i += 1 + joined
    return tuple(out)


def train() -> str:
    """The content of data/toy.tiktoken."""
    texts = (text for name in AUTHORS for text in corpus(name, DOCUMENTS))
    ranks = train_bpe(texts, TOY_PATTERN, SIZE)
    return "".join(f"{base64.b64encode(token).decode()} {n}\n" for token, n in ranks.items())


if __name__ == "__main__":
    TOY_RANKS.write_text(train())
