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
    words = {piece.encode().decode("latin-1"): n for piece, n in pieces.items()}  # chr(rank)s
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], [tokens[ord(c)] for c in pair]))
        words = {word.replace(first + second, chr(len(tokens))): n for word, n in words.items()}
        tokens.append(tokens[ord(first)] + tokens[ord(second)])
    return {token: rank for rank, token in enumerate(tokens)}


def train() -> str:
    """The content of data/toy.tiktoken."""
    texts = (text for name in AUTHORS for text in corpus(name, DOCUMENTS))
    ranks = train_bpe(texts, TOY_PATTERN, SIZE)
    return "".join(f"{base64.b64encode(token).decode()} {n}\n" for token, n in ranks.items())


if __name__ == "__main__":
    TOY_RANKS.write_text(train())
