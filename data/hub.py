"""Files of the hub's data sets, or of a mirror of its layout, DIR/REPOSITORY/FILE: found and read
by path, so no loading script is run and no copy is kept.

The slow imports are inside the functions: the embedded corpora do without them.
"""

import io
import json
import re
from pathlib import Path
from typing import Iterator

from data import UserError

CHUNK = 1 << 20  # bytes of JSON read at a time
ROWS = 512  # of a parquet file, read at a time
BLOCK = 32 << 20  # bytes of one request to the hub: fewer would wait for answers more than read


def reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def find_files(pattern: str, hub: str, instead: str) -> list[str]:
    """Sorted paths of the files REPOSITORY/FILE, in the folder `hub`, or on the hub where it is "".

    Raises UserError where there are none, with `instead` as a way around.
    """
    from fsspec.core import url_to_fs

    place = f"{hub or 'hf://datasets'}/{pattern}"
    try:
        system, path = url_to_fs(place)
        found = sorted(system.glob(path))
        if not found:
            raise FileNotFoundError("no such file")
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{place} could not be read ({reason(error)}): give --hub=DIR, a mirror "
                        f"of the hub's layout, or {instead}") from None  # fmt: skip
    return found if hub else [f"hf://{path}" for path in found]


def load_rows(kind: str, files, **options):
    """The rows of csv, json or parquet files, streamed by `datasets`."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it also raises
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


def read_chunks(file: str, fields: list[str]) -> Iterator[tuple[list, float]]:
    """Lists of a file's rows, each with the share of the file that has been read so far.

    A row is a line of JSON or a dict of parquet columns, in bytes either way: whoever decodes it
    can tell which row is not UTF-8. `datasets` itself would hold a whole row group or array, give
    up a file of JSON for one bad row, and take a .zst that was cut short for a whole one.
    """
    import pyarrow
    from fsspec.core import url_to_fs

    system, path = url_to_fs(file)
    with system.open(path, "rb", block_size=BLOCK) as raw:
        size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        if size == 0:
            return
        if file.endswith(".parquet"):
            yield from parquet_chunks(raw, fields)
            return
        compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(file).suffix)
        stream = io.BufferedReader(pyarrow.input_stream(raw, compression))
        is_array = stream.peek(64)[:64].lstrip().startswith(b"[")
        for chunk in array_chunks(stream) if is_array else line_chunks(stream):
            yield chunk, raw.tell() / size


def parquet_chunks(raw, fields: list[str]) -> Iterator[tuple[list[dict], float]]:
    """As read_chunks; a row has no key for a column that the file does not have."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    file, done = ParquetFile(raw), 0
    for batch in file.iter_batches(ROWS, columns=fields):
        columns = {name: column.cast(pyarrow.binary()).to_pylist()
                   for name, column in zip(batch.schema.names, batch.columns)}  # fmt: skip
        done += len(batch)
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(batch))]
        yield rows, done / file.metadata.num_rows


def line_chunks(stream: io.BufferedReader) -> Iterator[list[bytes]]:
    """The lines of a stream, but for blank ones."""
    while lines := stream.readlines(CHUNK):
        yield [line for line in lines if not line.isspace()]


def array_chunks(stream: io.BufferedReader) -> Iterator[list[bytes]]:
    """The objects of one JSON array, without ever holding the array."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    decoder, between, rest, more = json.JSONDecoder(), re.compile(r"[\s,\[]*"), "", True
    while more:
        more, rows, start = text.read(CHUNK), [], 0
        rest += more
        while True:
            start = between.match(rest, start).end()
            try:
                end = decoder.raw_decode(rest, start)[1]
            except json.JSONDecodeError:  # the object goes on in what is not read yet
                break
            rows.append(rest[start:end].encode("utf-8", "surrogateescape"))
            start = end
        rest = rest[start:]
        if rows:
            yield rows
    if rest.strip() != "]":
        raise ValueError(f"the array breaks off at {rest[:40]!r}")
