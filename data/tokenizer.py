"""Tokenizers, both tiktoken.Encoding: "toy", shipped beside this file, and "gpt2" with single
digits.

`python -m data.tokenizer` trains the toy vocabulary again and writes toy.tiktoken.
"""

import base64
import hashlib
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

import regex  # tiktoken's own dependency
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from data import UserError
from data.toy import AUTHORS, corpus

EOT = "<|endoftext|>"
TOY_RANKS = Path(__file__).with_name("toy.tiktoken")
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern but for \p{N}, one digit a token: a number is then spelt in one way only.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# In the toy a tag, a LaTeX command, a snake_case name and a number below 100 are one piece each:
# short sequences, and numbers that a small model copies in one go.
TOY_PATTERN = r"</?[a-z-]+>| ?\\?[\p{L}_]+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"
TOY_SIZE = 896  # tokens, the end-of-text token included


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


@lru_cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding "toy" or "gpt2". Raises UserError on another name, or where GPT-2's ranks
    cannot be had.
    """
    if name == "toy":
        lines = TOY_RANKS.read_text().split("\n")[
            :-1
        ]  # not tiktoken's loader: it would cache the file
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        pattern = TOY_PATTERN
    elif name == "gpt2":
        ranks, pattern = gpt2_ranks(), GPT2_PATTERN
    else:
        raise UserError(f"unknown tokenizer {name!r}: choose toy or gpt2")
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )


def gpt2_ranks() -> dict[bytes, int]:
    try:
        return load_tiktoken_bpe(GPT2_URL, expected_hash=GPT2_SHA256)
    except (OSError, ValueError):  # ValueError: a file with another hash
        name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", "a folder named by TIKTOKEN_CACHE_DIR")
        raise UserError(f"the GPT-2 vocabulary could not be loaded: offline, save {GPT2_URL} "
                        f"as {name} in {folder}") from None  # fmt: skip


def main() -> None:
    texts = [text for name in AUTHORS for text in corpus(name)]
    ranks = train_bpe(texts, TOY_PATTERN, TOY_SIZE - 1)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    TOY_RANKS.write_text("".join(lines))
    print(f"{TOY_RANKS}: {len(ranks)} ranks from {len(texts)} documents")


if __name__ == "__main__":
    main()
