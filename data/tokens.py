"""A token file, NAME.bin: the uint16 ids of a corpus, an end-of-text token behind every document.
Beside it NAME.json: what is in it, and how far it got.
"""

import contextlib
import hashlib
import json
import os
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from data import UserError
from data.tokenizer import EOT, get_tokenizer

LONGEST = 1 << 19  # characters: 2^20 blanks in a row overflow the stack of tiktoken's regex


def row_text(row: bytes | dict, fields: list[str]) -> tuple[str, str]:
    """The text of a row, "" where it has none, and what is irregular about it, "" if nothing is."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
        values = [row.get(field) for field in fields] if isinstance(row, dict) else [None]
        values = [value.decode() if isinstance(value, bytes) else value for value in values]
        if not all(isinstance(value, str) and value.strip() for value in values):
            return "", "rows without text (skipped)"
        text = "\n\n".join(values)
        text.encode()  # raises on half a surrogate pair, which JSON can spell and UTF-8 cannot
    except UnicodeError:
        return "", "rows not in UTF-8 (skipped)"
    except (ValueError, RecursionError):
        return "", "rows not in JSON (skipped)"
    spelt = f"texts with {EOT} in them (kept as text)"
    return text, spelt if EOT in text else ""


def tokenize(rows: list, fields: list[str], tokenizer: str) -> tuple[bytes, int, Counter]:
    """The ids of the rows' texts, each with its end-of-text token; the number of texts; that of
    the irregular rows of each kind.
    """
    encoding, ids, texts, kinds = get_tokenizer(tokenizer), [], 0, Counter()
    for text, kind in (row_text(row, fields) for row in rows):
        if kind:
            kinds[kind] += 1
        if text:
            for start in range(0, len(text), LONGEST):
                ids += encoding.encode_ordinary(text[start : start + LONGEST])
            ids.append(encoding.eot_token)
            texts += 1
    return array("H", ids).tobytes(), texts, kinds  # raises on an id over 65535


def read_meta(path: Path) -> dict:
    """What is known of a token file; empty where nothing is."""
    notes = path.with_suffix(".json")
    try:
        return json.loads(notes.read_text()) if notes.exists() else {}
    except ValueError:
        raise UserError(f"{notes} is damaged: delete it, and the corpus is made again") from None


def save_meta(path: Path, meta: dict) -> None:
    """Atomically: a reader sees the old .json or the new one."""
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(meta, indent=1))
    os.replace(temporary, path.with_suffix(".json"))


def summary(path: Path) -> str:
    """One line of what is in a token file, and of what its corpus had that is not regular."""
    meta = read_meta(path)
    irregular = "".join(f"; {kind}: {count:,}" for kind, count in meta["irregular"].items())
    return (f"{path}: {meta['tokens']:,} tokens, {meta['documents']:,} documents, "
            f"{len(meta['files'])} of {meta['of']} files{irregular}")  # fmt: skip


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(path: Path, meta: dict) -> None:
    """Notes the checksum of a token file that holds all it should."""
    save_meta(path, {**meta, "sha256": checksum(path)})
    mark_checked(path)


def mark_checked(path: Path) -> None:
    """Gives a token file and its .json the same time of change: no later change keeps it so."""
    time_ns = path.stat().st_mtime_ns
    with contextlib.suppress(OSError):  # a folder that is read-only gets no mark
        os.utime(path.with_suffix(".json"), ns=(time_ns, time_ns))


def check(path: Path) -> None:
    """Raises UserError where a token file is not what was written.

    Its size is compared always. Its checksum, minutes for 80 GB, was taken when it was finished,
    and is taken again only where one of the two files has changed since.
    """
    meta, notes = read_meta(path), path.with_suffix(".json")
    if not meta.get("sha256"):
        raise UserError(f"{path} is not finished: the command that began it continues")
    whole = path.stat().st_size == 2 * meta["tokens"]
    if whole and path.stat().st_mtime_ns == notes.stat().st_mtime_ns:
        return
    if not whole or checksum(path) != meta["sha256"]:
        raise UserError(f"{path} is damaged: delete it, and it is made again")
    mark_checked(path)


def read_tokens(path: Path) -> np.ndarray:
    """The ids of a token file, memory-mapped. Raises UserError where it is not what was written."""
    check(path)
    return np.memmap(path, dtype=np.uint16, mode="r")
