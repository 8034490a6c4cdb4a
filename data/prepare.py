"""Turns corpora into token files: `python -m data.prepare tinygsm omi1 --tokenizer=gpt2`.

Reads the hub, or with --hub=DIR a mirror of its layout. Writes FOLDER/NAME-TOKENIZER.bin, an
end-of-text token behind every document, in the order of the files and their rows, and beside it
a .json of what is in it and how far it got: killed at any time, the same command continues.
pretrain.py calls `prepare` for what is missing, on one rank.
"""

import argparse
import fcntl
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Iterator

from tqdm import tqdm

from data import UserError, tokenizer as tokenizers, tokens, toy
from data.hub import ROWS, find_files, read_chunks, reason
from data.tokens import check, finish, read_meta, save_meta, summary, tokenize

# name: REPOSITORY/FILES on the hub, then the fields that make a document, a blank line between them
CORPORA = {
    "tinygsm": "TinyGSM/TinyGSM/data/*.parquet question code",
    "omi1": "nvidia/OpenMathInstruct-1/correct_solutions/train.jsonl question generated_solution",
    "omi2": "nvidia/OpenMathInstruct-2/data/train-*.parquet problem generated_solution",
    "mmqa": "meta-math/MetaMathQA/MetaMathQA-395K.json query response",
    "finemath3": "HuggingFaceTB/finemath/finemath-3plus/*.parquet text",
    "algebraic-stack": "EleutherAI/proof-pile-2/algebraic-stack/train/*.jsonl.zst text",
    "gsm8k": "openai/gsm8k/main/train-*.parquet question answer",
    "math": "DigitalLearningGmbH/MATH-lighteval/data/train-*.parquet problem solution",
}
NAMES = (*toy.AUTHORS, *CORPORA)
SAVE_EVERY = 16  # chunks, of about a MB of text: no more is tokenised again after a kill


def source_checksum() -> str:
    """Of the code and the vocabulary that the embedded corpora come from: edit a story, and it is
    told anew.
    """
    files = [Path(module.__file__) for module in (toy, tokenizers, tokens)]
    content = b"".join(file.read_bytes() for file in (*files, tokenizers.TOY_RANKS))
    return hashlib.sha256(content).hexdigest()


def toy_chunks(name: str, fields: list[str]) -> Iterator[tuple[list[dict], float]]:
    """As read_chunks, of an embedded corpus."""
    documents = toy.corpus(name)
    while chunk := [{"text": text.encode()} for text in itertools.islice(documents, ROWS)]:
        yield chunk, 0.0


def read_corpus(read, files: list[str], fields: list[str], file: int, chunk: int) -> Iterator:
    """(place, rows) from behind chunk `chunk` of number `file` on, and behind each file no rows.

    The place is that behind the rows: (number of the file, chunk in it, share of it).
    """
    for number in range(file, len(files)):
        try:
            for i, (rows, share) in enumerate(read(files[number], fields), 1):
                if number > file or i > chunk:
                    yield (number, i, share), rows
        except Exception as error:  # every file type has its own
            raise UserError(f"{files[number]} could not be read ({reason(error)}): once it can, "
                            "the same command continues") from None  # fmt: skip
        yield (number + 1, 0, 0.0), []


def end_with_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it even where that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(function, chunks: Iterator, workers: int) -> Iterator:
    """(place, function(rows)) of each (place, rows), in their order, by so many processes."""
    if workers == 1:
        yield from ((place, function(rows)) for place, rows in chunks)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    with ProcessPoolExecutor(workers, spawn, end_with_parent) as pool:
        waiting = deque()
        for place, rows in chunks:
            waiting.append((place, pool.submit(function, rows)))
            if len(waiting) > 2 * workers:  # enough for all to be busy, and few enough to hold
                place, future = waiting.popleft()
                yield place, future.result()
        yield from ((place, future.result()) for place, future in waiting)


def write(path: Path, meta: dict, results: Iterator) -> None:
    """Appends the results to the token file, and notes in its .json how far it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    started, before = time.perf_counter(), meta["tokens"]
    look = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    bar = tqdm(desc=path.stem, total=len(meta["files"]), initial=meta["file"], bar_format=look,
               disable=None)  # fmt: skip
    with bar, open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being made by another process: wait for it") from None
        except OSError:
            pass  # some file systems of clusters have no locks
        if file.tell() < 2 * before:
            raise OSError("it is shorter than its .json says: delete both")
        file.truncate(2 * before)
        save_meta(path, meta)
        for (number, chunk, share), (ids, texts, kinds) in results:
            file.write(ids)
            kinds["empty files"] += number > meta["file"] and meta["chunk"] == 0
            meta.update(file=number, chunk=chunk, tokens=meta["tokens"] + len(ids) // 2,
                        documents=meta["documents"] + texts,
                        irregular=Counter(meta["irregular"]) + kinds)  # fmt: skip
            rate = (meta["tokens"] - before) / (time.perf_counter() - started)
            bar.set_postfix_str(f"{meta['tokens']:,} tokens, {rate:,.0f} a second", refresh=False)
            bar.update(number + share - bar.n)
            if chunk % SAVE_EVERY == 0:  # behind every file, too
                file.flush()
                os.fsync(file.fileno())
                save_meta(path, meta)


def find_corpus(name: str, tokenizer: str, hub: str) -> tuple[list[str], list[str], object]:
    """The files of a corpus, the fields of a document, and what reads a file."""
    if name in toy.AUTHORS:
        return [name], ["text"], toy_chunks
    pattern, *fields = CORPORA[name].split()
    instead = f"run `python -m data.prepare {name} --tokenizer={tokenizer}` with a network"
    return find_files(pattern, hub, instead), fields, read_chunks


def choose_files(path: Path, meta: dict, files: list[str], shards: int) -> list[str]:
    """The files to read, whose names go into `meta`; those that were begun must stay the same."""
    begun = meta["file"] + (meta["chunk"] > 0)
    if shards > len(files):
        raise UserError(f"--shards={shards} is too many: the corpus has {len(files)}")
    chosen = files[: shards or len(meta["files"]) or len(files)]
    names = [Path(file).name for file in chosen]
    if names[:begun] != meta["files"][:begun]:
        raise UserError(f"{path} was begun with other files, or more: delete it to start afresh")
    meta.update(files=names, of=len(files), sha256="")
    return chosen


def prepare(
    name: str, tokenizer: str, folder: str | Path, hub: str = "", shards: int = 0, workers: int = 0
) -> Path:
    """Makes the token file of corpus `name` where it is missing, stale or unfinished; returns its
    path.

    hub: a mirror's folder, "" for the hub; shards: files to read, 0 for as many as the token file
    was begun with, or all; workers: processes, 0 for one a core.
    """
    if name not in NAMES:
        raise UserError(f"unknown corpus {name!r}: choose from {', '.join(NAMES)}")
    path, source = Path(folder) / f"{name}-{tokenizer}.bin", CORPORA.get(name) or source_checksum()
    meta = read_meta(path)
    if not path.exists() or (meta.get("source"), meta.get("tokenizer")) != (source, tokenizer):
        meta = {"source": source, "tokenizer": tokenizer, "sha256": "", "files": [], "of": 0,
                "file": 0, "chunk": 0, "tokens": 0, "documents": 0, "irregular": {}}  # fmt: skip
    if meta["sha256"] and shards in (0, len(meta["files"])):
        check(path)
        return path
    tokenizers.get_tokenizer(tokenizer)  # first of all, for it may be missing
    files, fields, read = find_corpus(name, tokenizer, hub)
    files = choose_files(path, meta, files, shards)
    chunks = read_corpus(read, files, fields, meta["file"], meta["chunk"])
    function = functools.partial(tokenize, fields=fields, tokenizer=tokenizer)
    workers = 1 if name in toy.AUTHORS else workers or os.cpu_count()
    try:
        write(path, meta, in_order(function, chunks, workers))
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"{path} is not finished ({reason(error)}): once that is mended, the "
                        "same command continues") from None  # fmt: skip
    if not meta["tokens"]:
        raise UserError(f"{path} would be empty: no row has text under {' and '.join(fields)}")
    finish(path, meta)
    return path


def refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists all")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m data.prepare", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("corpora", nargs="+", metavar="CORPUS", help=", ".join(NAMES))
    parser.add_argument("--tokenizer", default="toy", help="toy or gpt2")
    parser.add_argument("--data_dir", default="out/data", help="where the token files go")
    parser.add_argument("--hub", default="", help="a mirror's folder, in place of the hub")
    parser.add_argument("--shards", type=int, default=0, help="files of a corpus; 0: all")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    args = parser.parse_args(argv)
    if min(args.shards, args.workers) < 0:
        raise UserError("--shards and --workers take whole numbers from 0 on")
    for name in args.corpora:
        path = prepare(name, args.tokenizer, args.data_dir, args.hub, args.shards, args.workers)
        print(summary(path), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues")
