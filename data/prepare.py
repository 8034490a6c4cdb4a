"""Turns a corpus into a token file: `python -m data.prepare toy-tinygsm toy-omi1 toy-omi2`.

Writes FOLDER/NAME-TOKENIZER.bin, uint16 ids with an end-of-text token behind every document, and
beside it a .json with its count, checksum and source. pretrain.py calls it for what is missing,
on one rank.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import UserError, tokenizer as tokenizers, toy


def source_checksum() -> str:
    """Of the code and the vocabulary that the embedded corpora come from: edit a story, and it is
    told anew.
    """
    files = (Path(toy.__file__), Path(tokenizers.__file__), tokenizers.TOY_RANKS)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def prepare(name: str, tokenizer: str, folder: str | Path) -> Path:
    """Makes the token file of corpus `name` where it is missing or stale; returns its path."""
    if name not in toy.AUTHORS:
        raise UserError(f"unknown corpus {name!r}: choose from {', '.join(toy.AUTHORS)}")
    path = Path(folder) / f"{name}-{tokenizer}.bin"
    source = source_checksum()
    if path.exists() and read_meta(path).get("source") == source:
        return path
    encoding = tokenizers.get_tokenizer(tokenizer)
    documents = tqdm(toy.corpus(name), desc=name, unit=" documents", disable=None, leave=False)
    ids = [
        token
        for text in documents
        for token in (*encoding.encode_ordinary(text), encoding.eot_token)
    ]
    content = np.array(ids, dtype=np.uint16).tobytes()  # raises on an id over 65535
    checksum = hashlib.sha256(content).hexdigest()
    meta = {"tokens": len(ids), "sha256": checksum, "tokenizer": tokenizer, "source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, data in ((path, content), (path.with_suffix(".json"), json.dumps(meta).encode())):
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, file)
    return path


def read_meta(path: Path) -> dict:
    """What is known of a token file; empty where nothing is."""
    meta = path.with_suffix(".json")
    return json.loads(meta.read_text()) if meta.exists() else {}


def read_tokens(path: Path) -> np.ndarray:
    """The ids of a token file, memory-mapped. Raises UserError where it is not what was written."""
    tokens, meta = np.memmap(path, dtype=np.uint16, mode="r"), read_meta(path)
    if len(tokens) != meta.get("tokens") or hashlib.sha256(tokens).hexdigest() != meta["sha256"]:
        raise UserError(f"{path} is damaged: delete it, and it is made again")
    return tokens


def main() -> None:
    names = sys.argv[1:]
    if not names or names[0].startswith("-"):
        sys.exit(f"usage: python -m data.prepare CORPUS...\ncorpora: {', '.join(toy.AUTHORS)}")
    for name in names:
        path = prepare(name, "toy", "out/data")
        print(f"{path}: {read_meta(path)['tokens']:,} tokens")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
