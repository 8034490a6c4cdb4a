"""The hub's corpora, read from a mirror of its layout in its own file types, down to the blocks of
a mixture.
"""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pretrain
from conftest import ROOT, SMALL
from data import UserError, hub, prepare, tokens
from data.mixture import Mixture
from data.prepare import CORPORA, read_meta, summary
from data.tokenizer import EOT, get_tokenizer

ALGEBRAIC = "EleutherAI/proof-pile-2/algebraic-stack/train"
OMI1 = "nvidia/OpenMathInstruct-1/correct_solutions/train.jsonl"


def make_rows(fields: list[str], start: int, count: int = 60) -> list[dict]:
    """Rows with a text under each field, and a field that is nobody's business."""
    text = "naïve 北京\n\n\\frac{1}{7} = 1234"
    return [{**{field: f"{field} {i}: {text}" for field in fields}, "other": i}
            for i in range(start, start + count)]  # fmt: skip


def put(path: Path, content) -> Path:
    """Writes a file of the hub: rows in the type that the name says, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet" and not isinstance(content, bytes):
        table = content if isinstance(content, pa.Table) else pa.Table.from_pylist(content)
        pq.write_table(table, path, row_group_size=25)
        return path
    if path.suffix == ".json":
        content = json.dumps(content, ensure_ascii=False).encode()
    if not isinstance(content, bytes):
        content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
    kind = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    with pa.output_stream(str(path), compression=kind) as file:
        file.write(content)
    return path


@pytest.fixture(scope="session")
def mirror(tmp_path_factory) -> tuple[str, dict[str, list[str]]]:
    """A mirror of all corpora, and the texts of each. Beside them lie files that are not theirs."""
    root, texts = tmp_path_factory.mktemp("mirror"), {}
    for name, source in CORPORA.items():
        pattern, *fields = source.split()
        shards = 1 if "*" not in pattern else 3
        rows = [make_rows(fields, 1000 * shard) for shard in range(shards)]
        for shard in range(shards):
            put(root / pattern.replace("*", f"0000{shard}"), rows[shard])
        texts[name] = ["\n\n".join(row[f] for f in fields) for shard in rows for row in shard]
    decoy = [{"problem": "decoy", "generated_solution": "decoy", "question": "decoy"}]
    put(root / "nvidia/OpenMathInstruct-2/data/train_1M-00000.parquet", decoy)
    put(root / "nvidia/OpenMathInstruct-1/correct_solutions/validation.jsonl", decoy)
    put(root / "openai/gsm8k/main/test-00000.parquet", decoy)
    put(root / ALGEBRAIC / "00000a.jsonl.zst", [])  # a frame of nothing
    (root / ALGEBRAIC / "00003.jsonl.zst").write_bytes(b"")
    return str(root), texts


def documents(path: Path, tokenizer: str = "toy") -> list[str]:
    """The texts of a token file, split at its end-of-text tokens."""
    encoding, ids = get_tokenizer(tokenizer), tokens.read_tokens(path)
    ends = np.flatnonzero(ids == encoding.eot_token)
    assert len(ids) == ends[-1] + 1
    return [encoding.decode(part[part != encoding.eot_token].tolist())
            for part in np.split(ids, ends + 1)[:-1]]  # fmt: skip


def make(name: str, folder: Path, source: str, *flags: str) -> Path:
    """The token file that `python -m data.prepare` makes, in this process."""
    prepare.main([name, f"--data_dir={folder}", f"--hub={source}", "--workers=1", *flags])
    return folder / f"{name}-toy.bin"


def both(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), path.with_suffix(".json").read_bytes()


# ---------------------------------------------------------------- from files to documents


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_of_the_hub_becomes_its_documents_in_their_order(name, mirror, tmp_path):
    source, texts = mirror
    path = make(name, tmp_path, source)
    assert documents(path) == texts[name] and len(texts[name]) in (60, 180)
    meta = read_meta(path)
    assert meta["documents"] == len(texts[name]) and meta["tokens"] == path.stat().st_size // 2
    assert meta["irregular"] == ({"empty files": 2} if name == "algebraic-stack" else {})


def test_gpt2_spells_the_same_documents(shared, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.tokenizers, "gpt2_ranks", lambda: load_ranks(shared))
    get_tokenizer.cache_clear()
    path = prepare.prepare("gsm8k", "gpt2", tmp_path, mirror[0], workers=1)
    assert documents(path, "gpt2") == mirror[1]["gsm8k"]
    get_tokenizer.cache_clear()


def load_ranks(shared: Path) -> dict[bytes, int]:
    from tiktoken.load import load_tiktoken_bpe

    return load_tiktoken_bpe(str(shared / "gpt2.tiktoken"))


@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_every_file_type_gives_the_same_rows_in_bounded_chunks(file, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CHUNK", 1000)
    monkeypatch.setattr(hub, "ROWS", 16)
    rows = make_rows(["text"], 0, 200)
    chunks = list(hub.read_chunks(str(put(tmp_path / file, rows)), ["text"]))
    read = [prepare.tokenize([row], ["text"], "toy") for chunk, _ in chunks for row in chunk]
    assert read == [prepare.tokenize([{"text": r["text"].encode()}], ["text"], "toy") for r in rows]
    assert max(len(chunk) for chunk, _ in chunks) <= 20
    shares = [share for _, share in chunks]
    assert shares == sorted(shares) and shares[-1] == 1


def test_an_array_may_be_spread_over_lines_and_frames_of_zstd_may_follow_each_other(tmp_path):
    rows = make_rows(["text"], 0, 5)
    (tmp_path / "a.json").write_text("\n " + json.dumps(rows, indent=2) + "\n")
    parts = [pa.compress(json.dumps(row).encode() + b"\n\n", "zstd", asbytes=True) for row in rows]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    for file in ("a.json", "a.jsonl.zst"):
        chunks = hub.read_chunks(str(tmp_path / file), ["text"])
        assert [json.loads(row) for chunk, _ in chunks for row in chunk] == rows


# ---------------------------------------------------------------- irregular rows

IRREGULAR = [
    ({"text": "good 1"}, None),
    ({"text": f"before {EOT} behind"}, f"texts with {EOT} in them (kept as text)"),
    ({"text": ""}, "rows without text (skipped)"),
    ({"text": " \n"}, "rows without text (skipped)"),
    ({"text": None}, "rows without text (skipped)"),
    ({"text": 5}, "rows without text (skipped)"),
    ({"title": "no text"}, "rows without text (skipped)"),
    (["text"], "rows without text (skipped)"),
    (b'{"text": "caf\xe9"}', "rows not in UTF-8 (skipped)"),
    (b'{"text": "half a pair \\ud83d"}', "rows not in UTF-8 (skipped)"),
    (b'{"text": "a line that breaks', "rows not in JSON (skipped)"),
    ({"text": "good 2", "meta": {"x": [1]}}, None),
    ({"text": "good 3", "meta": "of another type"}, None),
]


def test_irregular_rows_are_counted_said_and_never_fatal(tmp_path, capsys):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in IRREGULAR]
    put(tmp_path / ALGEBRAIC / "0.jsonl.zst", b"\n".join(lines) + b"\n\n")
    (tmp_path / ALGEBRAIC / "1.jsonl.zst").write_bytes(b"")
    path = make("algebraic-stack", tmp_path, str(tmp_path))
    assert documents(path) == ["good 1", f"before {EOT} behind", "good 2", "good 3"]
    kinds = [kind for _, kind in IRREGULAR if kind] + ["empty files"]
    assert read_meta(path)["irregular"] == {kind: kinds.count(kind) for kind in kinds}
    said = capsys.readouterr().out
    assert all(f"; {kind}: {kinds.count(kind)}" in said for kind in kinds)


def test_parquet_columns_may_hold_nothing_or_what_is_not_utf8(tmp_path):
    content = pa.array([b"good", None, b"", b"caf\xe9", b"end"])
    text = pa.Array.from_buffers(pa.string(), len(content), content.buffers())  # not validated
    put(tmp_path / "HuggingFaceTB/finemath/finemath-3plus/0.parquet", pa.table({"text": text}))
    put(tmp_path / "HuggingFaceTB/finemath/finemath-3plus/1.parquet", pa.table({"text": text[:0]}))
    put(tmp_path / "HuggingFaceTB/finemath/finemath-3plus/2.parquet", [{"url": "no text"}] * 3)
    path = make("finemath3", tmp_path, str(tmp_path))
    assert documents(path) == ["good", "end"]
    assert list(read_meta(path)["irregular"].values()) == [2 + 3, 1, 1]


def test_a_row_of_an_array_that_is_not_utf8_costs_no_other_row(tmp_path):
    rows = [{"query": "a", "response": text} for text in ("good 1", "caf\xe9", "good 2")]
    content = json.dumps(rows, ensure_ascii=False).encode("latin-1")
    (tmp_path / "meta-math/MetaMathQA").mkdir(parents=True)
    (tmp_path / "meta-math/MetaMathQA/MetaMathQA-395K.json").write_bytes(content)
    path = make("mmqa", tmp_path, str(tmp_path))
    assert documents(path) == ["a\n\ngood 1", "a\n\ngood 2"]
    assert read_meta(path)["irregular"] == {"rows not in UTF-8 (skipped)": 1}


def test_the_end_of_text_token_comes_from_no_text():
    ids, texts, _ = prepare.tokenize([{"text": EOT.encode()}] * 3, ["text"], "toy")
    end = get_tokenizer("toy").eot_token
    assert texts == 3 and np.frombuffer(ids, np.uint16).tolist().count(end) == 3


def test_a_million_blanks_in_a_row_do_not_overflow_the_tokenizer():
    text = "a" + " " * (1 << 21) + "b"
    ids, _, _ = prepare.tokenize([{"text": text.encode()}], ["text"], "toy")
    assert get_tokenizer("toy").decode(np.frombuffer(ids, np.uint16)[:-1].tolist()) == text


# ---------------------------------------------------------------- killed, damaged, made in parts

KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from data import hub, prepare
hub.CHUNK, prepare.SAVE_EVERY = 500, 3

def killed(function, calls=[]):
    def call(*args):
        if len(calls) == {after}:
            children = [child.pid for child in multiprocessing.active_children()]
            Path(__file__).with_name("children").write_text(" ".join(map(str, children)))
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args)
        return function(*args)
    return call

if __name__ == "__main__":
    {where} = killed({where})
    prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name, where, after, workers", [
    ("algebraic-stack", "os.fsync", 9, 1),  # ids are written that the .json does not know yet
    ("omi1", "prepare.save_meta", 4, 2),  # in the midst of the only file
])  # fmt: skip
def test_a_kill_at_half_leaves_no_trace_in_the_files_that_the_next_run_ends_with(
    name, where, after, workers, mirror, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub, "CHUNK", 500)
    monkeypatch.setattr(prepare, "SAVE_EVERY", 3)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(where=where, after=after))
    flags = [name, f"--hub={mirror[0]}", f"--data_dir={tmp_path}", f"--workers={workers}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script), *flags], env=environment)
    assert run.returncode == -signal.SIGKILL
    path, whole = tmp_path / f"{name}-toy.bin", make(name, tmp_path / "whole", mirror[0])
    half = read_meta(path)
    assert 0.2 < half["documents"] / read_meta(whole)["documents"] < 0.9
    with pytest.raises(UserError, match="not finished"):
        tokens.read_tokens(path)
    opened, rows, read, tokenize = [], [], hub.read_chunks, prepare.tokenize
    monkeypatch.setattr(prepare, "read_chunks", lambda f, names: opened.append(f) or read(f, names))
    monkeypatch.setattr(prepare, "tokenize", lambda r, **f: rows.extend(r) or tokenize(r, **f))
    make(name, tmp_path, mirror[0])
    assert both(path) == both(whole)
    assert len(opened) == half["of"] - half["file"]  # no finished file is read again
    assert len(rows) == read_meta(whole)["documents"] - half["documents"]  # nor a row tokenised
    children = (tmp_path / "children").read_text().split()
    assert len(children) in (0, workers) and all(ended(int(child)) for child in children)


def ended(process: int) -> bool:
    """Whether a process is gone, or goes within seconds."""
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_is_killed_is_a_sentence_and_the_same_command_continues(
    mirror, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub, "CHUNK", 500)
    save = prepare.save_meta

    def kill_a_worker(path, meta):
        save(path, meta)
        if meta["file"] == 2:
            multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(prepare, "save_meta", kill_a_worker)
    with pytest.raises(UserError, match="the same command continues"):
        make("algebraic-stack", tmp_path, mirror[0], "--workers=2")
    monkeypatch.setattr(prepare, "save_meta", save)
    path = make("algebraic-stack", tmp_path, mirror[0])
    assert both(path) == both(make("algebraic-stack", tmp_path / "whole", mirror[0]))


@pytest.mark.parametrize("name, file", [
    ("tinygsm", "TinyGSM/TinyGSM/data/00001.parquet"), ("omi1", OMI1 + ".gz"),
    ("mmqa", "meta-math/MetaMathQA/MetaMathQA-395K.json"),
    ("algebraic-stack", ALGEBRAIC + "/1.jsonl.zst"),
])  # fmt: skip
def test_a_damaged_file_is_named_and_once_mended_the_same_command_continues(
    name, file, tmp_path, monkeypatch
):
    monkeypatch.setitem(CORPORA, name, CORPORA[name].replace("train.jsonl ", "train.jsonl.gz "))
    fields = CORPORA[name].split()[1:]
    rows = [{f: os.urandom(300).hex() for f in fields} for _ in range(30)]
    if "*" in CORPORA[name].split()[0]:
        put(Path(str(tmp_path / file).replace("1.", "0.")), rows)
    whole = put(tmp_path / file, rows).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{file} could not be read .*: .*the same command") as said:
        make(name, tmp_path, str(tmp_path))
    assert "\n" not in str(said.value)
    (tmp_path / file).write_bytes(whole)
    assert documents(make(name, tmp_path, str(tmp_path)))[-1] == "\n\n".join(rows[-1].values())


def test_a_part_of_a_corpus_is_a_prefix_of_it_and_grows(mirror, tmp_path):
    whole = make("tinygsm", tmp_path / "whole", mirror[0]).read_bytes()
    path = make("tinygsm", tmp_path, mirror[0], "--shards=1")
    part = path.read_bytes()
    assert len(documents(path)) == 60 and whole.startswith(part)
    assert make("tinygsm", tmp_path, "/nowhere").read_bytes() == part  # what is there is enough
    assert "1 of 3 files" in summary(path)
    assert make("tinygsm", tmp_path, mirror[0], "--shards=3").read_bytes() == whole
    with pytest.raises(UserError, match="delete it"):
        make("tinygsm", tmp_path, mirror[0], "--shards=2")
    with pytest.raises(UserError, match="--shards=4 is too many: the corpus has 3"):
        make("tinygsm", tmp_path, mirror[0], "--shards=4")


def test_a_corpus_whose_files_changed_names_after_a_kill_is_refused(mirror, tmp_path):
    path = make("tinygsm", tmp_path, mirror[0], "--shards=1")
    meta = read_meta(path)
    tokens.save_meta(path, {**meta, "files": ["another.parquet"]})
    with pytest.raises(UserError, match="begun with other files"):
        make("tinygsm", tmp_path, mirror[0], "--shards=2")


def test_two_processes_do_not_make_one_file(mirror, tmp_path):
    with open(tmp_path / "gsm8k-toy.bin", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="made by another process"):
            make("gsm8k", tmp_path, mirror[0])


# ---------------------------------------------------------------- checks before use


def test_the_checksum_is_taken_again_only_where_a_file_has_changed(mirror, tmp_path, monkeypatch):
    path, taken, checksum = make("gsm8k", tmp_path, mirror[0]), [], tokens.checksum
    monkeypatch.setattr(tokens, "checksum", lambda file: taken.append(file) or checksum(file))
    tokens.read_tokens(path)
    assert not taken  # preparing took it
    os.utime(path)  # as a copy would
    tokens.read_tokens(path)
    tokens.read_tokens(path)
    assert taken == [path]


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b + b"ab", lambda b: b"ab" + b[2:]])
def test_a_token_file_that_is_not_what_was_written_is_refused(damage, mirror, tmp_path):
    path = make("gsm8k", tmp_path, mirror[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged: delete it"):
        prepare.prepare("gsm8k", "toy", tmp_path)
    path.unlink()
    assert len(documents(make("gsm8k", tmp_path, mirror[0]))) == 180


def test_a_token_file_of_another_source_is_made_again(mirror, tmp_path, monkeypatch):
    make("gsm8k", tmp_path, mirror[0])
    monkeypatch.setitem(CORPORA, "gsm8k", "openai/gsm8k/main/train-*.parquet question")
    assert documents(make("gsm8k", tmp_path, mirror[0]))[0].startswith("question 0: naïve")
    assert "answer" not in documents(tmp_path / "gsm8k-toy.bin")[0]


def test_a_corpus_without_any_text_is_refused(tmp_path):
    put(tmp_path / OMI1, [{"question": "no solution"}])
    with pytest.raises(UserError, match="no row has text under question and generated_solution"):
        make("omi1", tmp_path, str(tmp_path))


@pytest.mark.parametrize("source", ["", "/nowhere"])
def test_files_out_of_reach_are_a_sentence_with_two_ways_around(source, tmp_path, monkeypatch):
    import fsspec.core

    def offline(url):
        raise ConnectionError("no network\nand a long story")

    if not source:
        monkeypatch.setattr(fsspec.core, "url_to_fs", offline)
    with pytest.raises(UserError, match="--hub=DIR, .* or run `python -m data.prepare") as said:
        make("omi1", tmp_path, source)
    assert "\n" not in str(said.value) and OMI1 in str(said.value)


def test_the_command_with_two_processes_writes_the_bytes_of_one_and_ends_with_2_on_a_mistake(
    mirror, tmp_path
):
    def command(*flags):
        words = [sys.executable, "-m", "data.prepare", f"--data_dir={tmp_path}", *flags]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    run = command("omi1", "tinygsm", f"--hub={mirror[0]}", "--workers=2")
    assert (run.returncode, run.stderr, len(run.stdout.splitlines())) == (0, "", 2)
    for name in ("omi1", "tinygsm"):
        assert both(tmp_path / f"{name}-toy.bin") == both(make(name, tmp_path / "one", mirror[0]))
    for flags in (["omi1", "--shard=1"], ["omi3"], ["gsm8k", "--hub=/nowhere"]):
        run = command(*flags)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr


# ---------------------------------------------------------------- mixtures of them


def test_a_mixture_deals_out_blocks_of_the_token_files(mirror, tmp_path):
    ids = {n: tokens.read_tokens(make(n, tmp_path, mirror[0])) for n in ("tinygsm", "omi2")}
    mixture = Mixture(ids, "tinygsm:2,omi2", 0, 64, 8, 0)
    rows = np.concatenate([mixture.batch(step) for step in range(mixture.steps)])
    for name, passes in (("tinygsm", 2), ("omi2", 1)):
        blocks = [ids[name][i : i + 65] for i in range(0, len(ids[name]) - 64, 64)]
        for i, block in enumerate(blocks):
            seen = (rows == block).all(1).sum()
            assert seen == (passes if i < mixture.available[name] else 0)  # the tail is held out
    assert mixture.manifest()["omi2"]["sha256"] == read_meta(tmp_path / "omi2-toy.bin")["sha256"]


def test_pretraining_prepares_a_corpus_of_the_hub_on_first_use(mirror, tmp_path):
    def train(mix, source):
        small = dict(SMALL, tokens=1024, context=64, max_steps=2, out_dir=str(tmp_path / "run"))
        return pretrain.main(pretrain.Config(**small, mix=mix, hub=source, data_dir=str(tmp_path)))

    assert set(train("gsm8k:50%,mmqa:50%", mirror[0])["loss"]) == {"gsm8k", "mmqa"}
    manifest = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert manifest["mmqa"]["sha256"] == read_meta(tmp_path / "mmqa-toy.bin")["sha256"]
    with pytest.raises(UserError, match="OpenMathInstruct-1.* could not be read .*--hub=DIR"):
        train("gsm8k:50%,omi1:50%", "/nowhere")
