"""Tokenizers, both tiktoken.Encoding: "gpt2" with single digits, and "toy", whose vocabulary
`python tests/train_tokenizer.py` makes from the embedded corpora.
"""

import base64
import hashlib
import os
from functools import lru_cache
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from data import UserError

EOT = "<|endoftext|>"
TOY_RANKS = Path(__file__).with_name("toy.tiktoken")
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pattern but for \p{N}, one digit a token: a number is then spelt in one way only.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# In the toy a tag, a LaTeX command, a snake_case name and a number below 100 are one piece each:
# short sequences, and numbers that a small model copies in one go.
TOY_PATTERN = r"</?[a-z-]+>| ?\\?[\p{L}_]+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


@lru_cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding "toy" or "gpt2", whose .name tells one vocabulary from another. Raises UserError
    on another name, or where GPT-2's ranks cannot be had.
    """
    if name == "toy":
        lines = TOY_RANKS.read_text().splitlines()  # tiktoken's loader would cache the file
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        pattern = TOY_PATTERN
    elif name == "gpt2":
        ranks, pattern = gpt2_ranks(), GPT2_PATTERN
    else:
        raise UserError(f"unknown tokenizer {name!r}: choose toy or gpt2")
    checksum = hashlib.sha256(repr((pattern, ranks)).encode()).hexdigest()
    return tiktoken.Encoding(f"{name} {checksum[:16]}", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def gpt2_ranks() -> dict[bytes, int]:
    try:
        return load_tiktoken_bpe(GPT2_URL, expected_hash=GPT2_SHA256)
    except (OSError, ValueError):  # ValueError: a file with another hash
        name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", "a folder named by TIKTOKEN_CACHE_DIR")
        raise UserError(f"the GPT-2 vocabulary could not be loaded: offline, save {GPT2_URL} as "
                        f"{name} in {folder}") from None
