"""Turns corpora into token files: `python -m data.prepare tinygsm omi1 --tokenizer=gpt2`.

Reads files of the hub by their paths, so no loading script is run and no copy is kept, or with
--hub=DIR those of a mirror, DIR/REPOSITORY/FILE (sizes and times: data/README.md). Killed at any
time, the same command continues with the file it was at, and ends with the same bytes. pretrain.py
calls `prepare` on one rank.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

from tqdm import tqdm

from data import UserError, cores, lock, reason, toy
from data.tokenizer import get_tokenizer
from data.tokens import read_meta, read_tokens, save_meta, summary, tokenize

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
CHUNK, ROWS = 1 << 20, 512  # bytes of JSON lines, rows of another file: what one thread gets
BLOCK = 32 << 20  # bytes of one request to the hub: fewer would wait for answers more than read


def find_files(pattern: str, hub: str) -> list[str]:
    """Sorted paths of a pattern's files, in a mirror's folder `hub`, or "" for the hub itself."""
    from fsspec.core import url_to_fs  # slow, like pyarrow: the embedded corpora do without

    place = f"{hub or 'hf://datasets'}/{pattern}"
    try:
        system, path = url_to_fs(place)
        found = sorted(system.glob(path))
        if not found:
            raise FileNotFoundError("no such file")
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{place} could not be read ({reason(error)}): fetch it where there is a "
                        "network, and give --hub=DIR, a mirror of the hub's layout") from None
    return found if hub else [f"hf://{path}" for path in found]


def read_chunks(file: str, fields: list[str]) -> Iterator[list]:
    """Lists of the rows of a file (or of an embedded corpus, by its name): dicts, or lines of JSON.

    `datasets` would give up a file of JSON for one bad row, and take half a .zst for a whole one.
    """
    if toy.VARIANT.fullmatch(file):
        yield [{"text": text} for text in toy.corpus(file)]
        return
    import pyarrow
    from fsspec.core import url_to_fs
    from pyarrow.parquet import ParquetFile

    system, path = url_to_fs(file)
    with system.open(path, "rb", block_size=BLOCK) as raw:
        if file.endswith(".parquet"):
            for batch in ParquetFile(raw).iter_batches(ROWS, columns=fields):
                yield batch.to_pylist()
            return
        compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(file).suffix)
        stream = io.BufferedReader(pyarrow.input_stream(raw, compression))
        if stream.peek(64)[:64].lstrip().startswith(b"["):  # one array: MetaMathQA's 0.4 GB
            rows = json.load(stream)
            yield from (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))
        while lines := stream.readlines(CHUNK):
            yield [line for line in lines if not line.isspace()]


def write(path: Path, meta: dict, files: list[str], fields, tokenizer: str, workers: int) -> None:
    """Appends the ids of those `files` that are not done. The .json tells of whole files alone."""
    file = "its folder"  # or what else an error is about
    others = itertools.repeat(fields), itertools.repeat(tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(desc=path.stem, total=len(files), initial=meta["done"], disable=None)
        with bar, ThreadPoolExecutor(workers) as pool, open(path, "ab") as out:
            if not lock(out):
                raise OSError("another process is making the file")
            if out.tell() < 2 * meta["tokens"]:
                raise OSError("the file is shorter than its .json says: delete both")
            out.truncate(2 * meta["tokens"])  # of a file that was not read to its end
            save_meta(path, meta)
            for file in files[meta["done"] :]:
                chunks = read_chunks(file, fields)
                while group := list(itertools.islice(chunks, 4 * workers)):
                    # threads, for tiktoken lets them run beside each other
                    for ids, texts, skipped in pool.map(tokenize, group, *others):
                        out.write(ids)
                        meta["tokens"] += len(ids) // 2
                        meta["documents"] += texts
                        meta["skipped"] += skipped
                    bar.set_postfix_str(f"{meta['tokens']:,} tokens")
                out.flush()
                os.fsync(out.fileno())  # before the .json tells of them
                meta["done"] += 1
                save_meta(path, meta)
                bar.update()
    except Exception as error:  # every file type and file system has its own
        raise UserError(f"{path} is not finished because of {file} ({reason(error)}): once that is "
                        "mended, the same command continues") from None


def prepare(name: str, tokenizer: str, folder, hub="", shards=0, workers=0) -> Path:
    """Makes the token file of a corpus where it is missing, stale or unfinished; returns its path.

    shards: files to read, 0 for as many as it was begun with, or all; the others as in `main`.
    """
    if name not in CORPORA and not toy.VARIANT.fullmatch(name):
        raise UserError(f"unknown corpus {name!r}: choose from {', '.join(NAMES)}, or a variant "
                        "such as toy-omi1@slips=20@div=sub@mul=add")
    path, vocabulary = Path(folder) / f"{name}-{tokenizer}.bin", get_tokenizer(tokenizer).name
    stories = hashlib.sha256(Path(toy.__file__).read_bytes()).hexdigest() + " text"
    source, meta = CORPORA.get(name, stories), read_meta(path)
    # edit a story or the vocabulary, and it is made anew
    if not path.exists() or (meta.get("source"), meta.get("tokenizer")) != (source, vocabulary):
        meta = {"source": source, "tokenizer": vocabulary, "sha256": "", "files": [], "of": 0,
                "done": 0, "tokens": 0, "documents": 0, "skipped": 0}
    if meta["sha256"] and shards in (0, len(meta["files"])):
        read_tokens(path)  # raises where it is damaged
        return path
    pattern, *fields = source.split()
    files = find_files(pattern, hub) if name in CORPORA else [name]
    chosen = files[: shards or len(meta["files"]) or len(files)]
    names, done = [Path(file).name for file in chosen], meta["done"]
    if names[:done] != meta["files"][:done]:
        raise UserError(f"{path} was begun with other files, or more: delete it to start afresh")
    meta.update(files=names, of=len(files), sha256="")
    write(path, meta, chosen, fields, tokenizer, workers or cores())
    if not meta["tokens"]:
        raise UserError(f"{path} would be empty: no row has text under {' and '.join(fields)}")
    with open(path, "rb") as file:  # a run names what it has read
        meta["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    save_meta(path, meta)
    return path


def main(argv: list[str]) -> None:
    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists all")

    parser = argparse.ArgumentParser("python -m data.prepare", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("corpora", nargs="+", metavar="CORPUS", help=", ".join(NAMES))
    parser.add_argument("--tokenizer", default="toy", help="toy or gpt2")
    parser.add_argument("--data_dir", default="out/data", help="where the token files go")
    parser.add_argument("--hub", default="", help="a mirror's folder, in place of the hub")
    parser.add_argument("--shards", type=int, default=0, help="files of a corpus; 0: all")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one a core")
    args = parser.parse_args(argv)
    if min(args.shards, args.workers) < 0:
        raise UserError("--shards and --workers take whole numbers from 0 on")
    for name in args.corpora:
        path = prepare(name, args.tokenizer, args.data_dir, args.hub, args.shards, args.workers)
        print(summary(path), flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know all characters
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command continues")
