"""Token files: NAME.bin, uint16 ids with an end-of-text token behind each document; NAME.json."""

import json
from pathlib import Path

import numpy as np

from data import UserError
from data.files import read_json, write_atomically
from data.tokenizer import get_tokenizer

LONGEST = 1 << 19  # characters: 2^20 blanks in a row are too many for tiktoken's regex

NOTES = set("source tokenizer sha256 files of done tokens documents skipped".split())  # of a .json


def row_text(row: bytes | dict, fields: list[str]) -> str:
    """The text of a row; "" where it cannot be read, or a field is missing, blank or no text."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
        values = [row[field] for field in fields]
        text = "\n\n".join(values) if all(value.strip() for value in values) else ""
        text.encode()  # raises on half a surrogate pair, which JSON can spell and UTF-8 cannot
        return text
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def tokenize(rows: list, fields: list[str], tokenizer: str) -> tuple[bytes, int, int]:
    """The ids of the rows' texts, each with its end-of-text token; rows with and without a text."""
    encoding, parts = get_tokenizer(tokenizer), []
    assert encoding.n_vocab <= 1 << 16, f"{tokenizer} has ids beyond uint16"
    texts = [text for text in (row_text(row, fields) for row in rows) if text]
    for text in texts:
        for start in range(0, len(text), LONGEST):
            piece = text[start : start + LONGEST]
            # to an array: making a list would hold up the other threads; <|endoftext|> in a text
            # is spelt out, never the special token
            parts.append(encoding.encode_to_numpy(piece, disallowed_special=()))
        parts.append([encoding.eot_token])
    ids = np.concatenate(parts) if parts else np.zeros(0)
    return ids.astype(np.uint16).tobytes(), len(texts), len(rows) - len(texts)


def read_meta(path: Path) -> dict:
    """What is known of a token file; empty where it is not all there. Raises UserError."""
    notes = path.with_suffix(".json")
    meta = read_json(notes) if notes.exists() else {}
    return meta if NOTES <= meta.keys() else {}


def save_meta(path: Path, meta: dict) -> None:
    content = json.dumps(meta, indent=1).encode()
    write_atomically(path.with_suffix(".json"), lambda file: file.write(content))


def summary(path: Path) -> str:
    """One line of what is in a token file, and of how many rows are not."""
    meta = read_meta(path)
    skipped = f"; {meta['skipped']:,} rows without text skipped" if meta["skipped"] else ""
    return (f"{path}: {meta['tokens']:,} tokens, {meta['documents']:,} documents, "
            f"{meta['done']} of {meta['of']} files{skipped}")


def read_tokens(path: Path) -> np.ndarray:
    """The ids of a token file, memory-mapped. Raises UserError where they are not all there."""
    meta = read_meta(path)
    if not meta.get("sha256"):
        raise UserError(f"{path} is not finished: the command that began it continues")
    # not by its checksum, which takes minutes for 80 GB
    if not path.exists() or path.stat().st_size != 2 * meta["tokens"]:
        raise UserError(f"{path} is damaged: delete it, and it is made again")
    return np.memmap(path, dtype=np.uint16, mode="r")
