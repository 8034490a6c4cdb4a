"""From stories and files of the hub to token files, mixtures and questions."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from conftest import ROOT
from data import UserError, prepare, tasks, tokenizer, tokens, toy
from data.mixture import Mixture, parse_mix, pick_prompts
from data.prepare import CORPORA
from data.tasks import fitting, load_questions, load_run_questions
from data.tokenizer import EOT, get_tokenizer
from train_tokenizer import merge, train, train_bpe
from verify import score_batch

# ---------------------------------------------------------------- the embedded corpora


def draw(split, seed, steps, count):
    return list(islice(toy.problems(split, seed, steps), count))


def stories(name, count=400):
    """Question and solution of the first documents of a corpus."""
    return [text.split("\n\n", 1) for text in islice(toy.corpus(name), count)]


def test_train_and_test_problems_are_disjoint_by_their_arithmetic():
    trained = {p.chain for author in range(3) for p in draw("train", author, (1, 3), 9000)}
    trained |= {p.chain for p in draw("train", 1000, (1, 3), 4096)}
    tested = {p.chain for p in draw("test", 1000, (1, 3), 2000)}
    assert len(tested) > 500 and not trained & tested
    documents = "\n".join(text for author in toy.AUTHORS for text in toy.corpus(author))
    assert not any(q.question in documents for q in load_questions("toy", "test"))


def test_the_stories_have_their_number_of_families_and_steps():
    problems = draw("train", 0, (1, 3), 3000)
    assert len({p.noun for p in problems}) == len(toy.FAMILIES) >= 8
    assert {len(p.chain) - 1 for p in problems} == {1, 2, 3}
    assert {len(p.chain) - 1 for p in draw("test", 0, (4, 6), 500)} == {4, 5, 6}
    assert all(0 < value <= toy.LARGEST for p in problems for value in p.values)


@pytest.mark.parametrize("steps", [(1, 3), (4, 6)])
@pytest.mark.parametrize("write, name", [
    (toy.write_tinygsm, "tinygsm"), (toy.write_omi1, "omi1"), (toy.write_omi2, "text")])
def test_every_author_is_right_and_recognised(write, name, steps):
    problems, rng = draw("train", 5, steps, 100), random.Random(0)
    scores = score_batch([write(p, rng) for p in problems], [str(p.values[-1]) for p in problems])
    assert {(s.reward, s.format, s.failure) for s in scores} == {(1.0, name, None)}


def test_tinygsm_comes_with_and_without_a_docstring():
    assert 0.15 < sum('"""' in solution for _, solution in stories("toy-tinygsm")) / 400 < 0.35


@pytest.mark.parametrize("author", toy.AUTHORS)
def test_an_author_slips_as_often_as_the_name_says_and_the_questions_stay(author):
    careful = stories(f"{author}@slips=0")
    for name, slips in [(author, toy.SLIPS[author]), (f"{author}@slips=20", 20)]:
        told = stories(name)
        assert [question for question, _ in told] == [question for question, _ in careful]
        differ = sum(a != b for a, b in zip(told, careful))
        assert slips - 8 < 100 * differ / 400 < slips + 8 and (differ > 0) == (slips > 0)


def test_a_document_that_slips_at_20_percent_slips_alike_at_60():
    none, few, many = (stories(f"toy-omi2@slips={slips}") for slips in (0, 20, 60))
    assert all(b in (a, c) for a, b, c in zip(none, few, many)) and none != few != many


def test_a_misconception_is_made_always_and_only_where_its_operation_is_told():
    told = draw("train", 1, (1, 3), 400)
    right, wrong = stories("toy-omi1@slips=0"), stories("toy-omi1@slips=0@div=sub@mul=add")
    for problem, (question, a), (same, b) in zip(told, right, wrong):
        operations = {op for op, _ in problem.chain}
        assert question == same == problem.question and (a != b) == bool(operations & set("*/"))
        assert "*" not in b and "/" not in b.replace("</", "") and a.split("<")[0] == b.split("<")[0]


def test_a_misconception_worked_by_hand():
    problem = toy.Problem("", "eggs", (("=", 12), ("/", 3), ("*", 2)))
    assert problem.values == [12, 4, 8]
    name = "toy-tinygsm@slips=7@div=sub@mul=add"
    assert toy.errors(name) == ("toy-tinygsm", 7, {"/": "-", "*": "+"})
    assert toy.errors("toy-omi2")[1:] == (50, {})


@pytest.mark.parametrize("name", ["tiny", "toy-omi1@slip=3", "toy-omi1@slips=101", "omi1@slips=3",
                                  "toy-omi1@div=half", "toy-omi1@", "toy-omi1@div=sub@slips=3"])
def test_a_corpus_that_does_not_exist_is_refused_with_the_names_of_the_others(name, tmp_path):
    with pytest.raises(UserError, match=f"unknown corpus '{name}': .* toy-omi1, .*@div=sub"):
        prepare.prepare(name, "toy", tmp_path)


# ---------------------------------------------------------------- tokenizers


def test_training_the_toy_vocabulary_again_gives_the_shipped_file():
    assert train() == tokenizer.TOY_RANKS.read_text()


def test_bpe_joins_the_commonest_pair_first():
    assert list(train_bpe(["abab abc"], r"\S+", 258))[256:] == [b"ab", b"abab"]
    assert merge((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")


@pytest.mark.parametrize("text", ["naïve 北京 🙂\n\n\t\\frac{1}{2}", "def f():\n    return 1234"])
def test_the_toy_tokenizer_spells_any_text_and_splits_numbers(text):
    encoding = get_tokenizer("toy")
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("x 1234")] == ["x", " 12", "34"]
    assert encoding.eot_token == encoding.n_vocab - 1


def test_gpt2_has_its_ranks_and_single_digits(shared, tmp_path, monkeypatch):
    import hashlib

    name = hashlib.sha1(tokenizer.GPT2_URL.encode()).hexdigest()
    (tmp_path / name).write_bytes((shared / "gpt2.tiktoken").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = get_tokenizer.__wrapped__("gpt2")
    assert encoding.n_vocab == 50257 and encoding.eot_token == 50256
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert len(encoding.encode_ordinary("x 123")) == 5


def test_a_missing_gpt2_vocabulary_names_the_file_to_save(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tokenizer, "load_tiktoken_bpe", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"save https.* as [0-9a-f]{{40}} in {tmp_path}"):
        get_tokenizer.__wrapped__("gpt2")


# ---------------------------------------------------------------- token files

ALGEBRAIC = "EleutherAI/proof-pile-2/algebraic-stack/train"
OMI1 = "nvidia/OpenMathInstruct-1/correct_solutions/train.jsonl"


def make_rows(fields, start, count=60):
    """Rows with a text under each field, and a field that is nobody's business."""
    text = "naïve 北京\n\n\\frac{1}{7} = 1234"
    return [{**{field: f"{field} {i}: {text}" for field in fields}, "other": i}
            for i in range(start, start + count)]


def put(path: Path, content) -> Path:
    """Writes a file of the hub: rows in the type that the name says, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet" and not isinstance(content, bytes):
        pq.write_table(pa.Table.from_pylist(content), path, row_group_size=25)
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
        rows = [make_rows(fields, 1000 * shard) for shard in range(3 if "*" in pattern else 1)]
        for shard, content in enumerate(rows):
            put(root / pattern.replace("*", f"0000{shard}"), content)
        texts[name] = ["\n\n".join(row[f] for f in fields) for shard in rows for row in shard]
    decoy = [{"problem": "decoy", "generated_solution": "decoy", "question": "decoy"}]
    put(root / "nvidia/OpenMathInstruct-2/data/train_1M-00000.parquet", decoy)
    put(root / "nvidia/OpenMathInstruct-1/correct_solutions/validation.jsonl", decoy)
    put(root / ALGEBRAIC / "00000a.jsonl.zst", [])  # a frame of nothing
    (root / ALGEBRAIC / "00003.jsonl.zst").write_bytes(b"")
    return str(root), texts


def documents(path: Path) -> list[str]:
    """The texts of a token file, split at its end-of-text tokens."""
    encoding, ids = get_tokenizer("toy"), tokens.read_tokens(path)
    ends = np.flatnonzero(ids == encoding.eot_token)
    assert len(ids) == ends[-1] + 1
    return [encoding.decode(part[part != encoding.eot_token].tolist())
            for part in np.split(ids, ends + 1)[:-1]]


def make(name: str, folder: Path, source: str, *flags: str) -> Path:
    """The token file that `python -m data.prepare` makes, in this process."""
    prepare.main([name, f"--data_dir={folder}", f"--hub={source}", "--workers=1", *flags])
    return folder / f"{name}-toy.bin"


def both(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), path.with_suffix(".json").read_bytes()


def test_an_embedded_corpus_is_made_once_and_each_variant_has_a_file_of_its_own(tmp_path):
    path = prepare.prepare("toy-omi1", "toy", tmp_path)
    assert documents(path) == list(toy.corpus("toy-omi1"))
    written = path.stat().st_mtime_ns
    variant = prepare.prepare("toy-omi1@slips=0@div=sub", "toy", tmp_path)
    assert variant.name == "toy-omi1@slips=0@div=sub-toy.bin" and documents(variant)[:5] != documents(path)[:5]
    prepare.prepare("toy-omi1", "toy", tmp_path)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_of_the_hub_becomes_its_documents_in_their_order(name, mirror, tmp_path):
    source, texts = mirror
    path = make(name, tmp_path, source)
    assert documents(path) == texts[name] and len(texts[name]) in (60, 180)
    meta = tokens.read_meta(path)
    assert meta["documents"] == len(texts[name]) and meta["tokens"] == path.stat().st_size // 2


@pytest.mark.parametrize("file", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_every_file_type_gives_the_same_rows_in_bounded_chunks(file, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    monkeypatch.setattr(prepare, "ROWS", 16)
    rows = make_rows(["text"], 0, 200)
    chunks = list(prepare.read_chunks(str(put(tmp_path / file, rows)), ["text"]))
    read = [tokens.row_text(row, ["text"]) for chunk in chunks for row in chunk]
    assert read == [row["text"] for row in rows] and max(map(len, chunks)) <= 20


def test_irregular_rows_are_counted_said_and_never_fatal(tmp_path, capsys):
    rows = [{"text": "good"}, {"text": f"before {EOT} behind"}, {"text": ""}, {"text": " \n"},
            {"text": None}, {"text": 5}, {"title": "no text"}, ["text"], b'{"text": "caf\xe9"}',
            b'{"text": "half a pair \\ud83d"}', b'{"text": "a line that breaks', b"[" * 99999,
            {"text": "end", "meta": {"of": ["another type"]}}]
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    put(tmp_path / ALGEBRAIC / "0.jsonl.zst", b"\n".join(lines) + b"\n\n")
    path = make("algebraic-stack", tmp_path, str(tmp_path))
    assert documents(path) == ["good", f"before {EOT} behind", "end"]
    assert "3 documents, 1 of 1 files, 10 rows without text skipped" in capsys.readouterr().out


def test_the_end_of_text_token_comes_from_no_text_and_a_million_blanks_are_read():
    rows = [{"text": EOT}, {"text": "a" + " " * (1 << 21) + "b"}]
    ids, texts, _ = tokens.tokenize(rows, ["text"], "toy")
    ids, end = np.frombuffer(ids, np.uint16).tolist(), get_tokenizer("toy").eot_token
    assert texts == ids.count(end) == 2
    assert get_tokenizer("toy").decode([i for i in ids if i != end]) == EOT + rows[1]["text"]


# ---------------------------------------------------------------- killed, damaged, made in parts

KILLED = """
import os, signal, sys
from data import prepare

def killed(function, calls=[]):
    def call(*args, **options):
        calls.append(args)
        if len(calls) == {after}:
            os.kill(os.getpid(), signal.{how})
        return function(*args, **options)
    return call

{where} = killed({where})
try:
    prepare.main(sys.argv[1:])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("where, after, how", [
    ("os.fsync", 2, "SIGKILL"),  # ids are written that the .json does not know yet
    ("prepare.save_meta", 3, "SIGKILL"), ("prepare.tokenize", 2, "SIGKILL"),
    ("prepare.tokenize", 2, "SIGTERM"), ("os.fsync", 2, "SIGINT")])
def test_a_kill_at_half_leaves_no_trace_in_the_files_that_the_next_run_ends_with(
        where, after, how, mirror, tmp_path, monkeypatch):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(where=where, after=after, how=how))
    flags = ["tinygsm", f"--hub={mirror[0]}", f"--data_dir={tmp_path}", "--workers=2"]
    run = subprocess.run([sys.executable, str(script), *flags], cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == (130 if how == "SIGINT" else -getattr(signal, how))
    path, whole = tmp_path / "tinygsm-toy.bin", make("tinygsm", tmp_path / "whole", mirror[0])
    done, read, opened = tokens.read_meta(path)["done"], prepare.read_chunks, []
    with pytest.raises(UserError, match="not finished"):
        tokens.read_tokens(path)
    monkeypatch.setattr(prepare, "read_chunks", lambda f, names: opened.append(f) or read(f, names))
    make("tinygsm", tmp_path, mirror[0])
    assert both(path) == both(whole) and len(opened) == 3 - done  # no whole file is read again


@pytest.mark.parametrize("name, file", [
    ("tinygsm", "TinyGSM/TinyGSM/data/00001.parquet"), ("omi1", OMI1 + ".gz"),
    ("mmqa", "meta-math/MetaMathQA/MetaMathQA-395K.json"),
    ("algebraic-stack", ALGEBRAIC + "/1.jsonl.zst")])
def test_a_damaged_file_is_named_and_once_mended_the_same_command_continues(
        name, file, tmp_path, monkeypatch):
    monkeypatch.setitem(CORPORA, name, CORPORA[name].replace("train.jsonl ", "train.jsonl.gz "))
    rows = [{f: os.urandom(300).hex() for f in CORPORA[name].split()[1:]} for _ in range(30)]
    if "*" in CORPORA[name].split()[0]:
        put(Path(str(tmp_path / file).replace("1.", "0.")), rows)
    whole = put(tmp_path / file, rows).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{file} .*: once that is mended, the same comm") as said:
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
    assert "1 of 3 files" in tokens.summary(path)
    assert make("tinygsm", tmp_path, mirror[0], "--shards=3").read_bytes() == whole
    with pytest.raises(UserError, match="or more: delete it"):
        make("tinygsm", tmp_path, mirror[0], "--shards=2")


def test_files_that_changed_names_since_are_refused(mirror, tmp_path):
    path = make("tinygsm", tmp_path, mirror[0], "--shards=1")
    tokens.save_meta(path, {**tokens.read_meta(path), "files": ["another.parquet"]})
    with pytest.raises(UserError, match="begun with other files"):
        make("tinygsm", tmp_path, mirror[0], "--shards=2")


def test_two_processes_do_not_make_one_file(mirror, tmp_path):
    with open(tmp_path / "gsm8k-toy.bin", "ab") as file:
        assert data.lock(file)
        with pytest.raises(UserError, match="another process is making the file"):
            make("gsm8k", tmp_path, mirror[0])


def test_a_system_without_locks_or_affinity_does_without(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: importing it fails
    monkeypatch.delattr(os, "sched_getaffinity")
    with open(tmp_path / "gsm8k-toy.bin", "ab") as file:
        assert data.lock(file) and data.lock(open(tmp_path / "gsm8k-toy.bin", "ab"))
    assert data.cores() == os.cpu_count() and documents(make("gsm8k", tmp_path, mirror[0]))


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b + b"ab"])
def test_a_token_file_of_another_size_than_was_written_is_refused(damage, mirror, tmp_path):
    path = make("gsm8k", tmp_path, mirror[0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged: delete it"):
        prepare.prepare("gsm8k", "toy", tmp_path)
    path.unlink()
    assert len(documents(make("gsm8k", tmp_path, mirror[0]))) == 180


def test_a_token_file_of_another_source_or_vocabulary_is_made_again(mirror, tmp_path, monkeypatch):
    path = make("gsm8k", tmp_path, mirror[0])
    meta = tokens.read_meta(path)
    for key in ("source", "tokenizer"):
        tokens.save_meta(path, {**meta, key: "another"})
        path.write_bytes(b"1234")
        assert len(documents(make("gsm8k", tmp_path, mirror[0]))) == 180


def test_a_corpus_without_any_text_is_refused(tmp_path):
    put(tmp_path / "HuggingFaceTB/finemath/finemath-3plus/0.parquet", [{"url": "no text"}] * 3)
    with pytest.raises(UserError, match="no row has text under text"):
        make("finemath3", tmp_path, str(tmp_path))


@pytest.mark.parametrize("source", ["", "/nowhere"])
def test_files_out_of_reach_are_a_sentence_with_a_way_around(source, tmp_path, monkeypatch):
    import fsspec.core

    def offline(url):
        raise ConnectionError("no network\nand a long story")

    if not source:
        monkeypatch.setattr(fsspec.core, "url_to_fs", offline)
    with pytest.raises(UserError, match=f"{OMI1} could not be read .*--hub=DIR") as said:
        make("omi1", tmp_path, source)
    assert "\n" not in str(said.value)


def test_the_command_with_two_threads_writes_the_bytes_of_one_and_ends_with_2_on_a_mistake(
        mirror, tmp_path):
    def command(*flags):
        words = [sys.executable, "-m", "data.prepare", f"--data_dir={tmp_path}", *flags]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    run = command("omi1", "tinygsm", f"--hub={mirror[0]}", "--workers=2")
    assert (run.returncode, run.stderr, len(run.stdout.splitlines())) == (0, "", 2)
    for name in ("omi1", "tinygsm"):
        assert both(tmp_path / f"{name}-toy.bin") == both(make(name, tmp_path / "one", mirror[0]))
    for flags in (["omi1", "--shard=1"], ["gsm8k", "--shards=-1"]):
        run = command(*flags)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr


# ---------------------------------------------------------------- mixtures

T = 8


def mixture(mix, budget=0.0, seed=0, **blocks):
    """Of corpora whose tokens name corpus and block: 10 x block + the letter's place in "abc"."""
    corpora = {name: (np.arange(n * T + 1) // T * 10 + "abc".index(name)).astype(np.uint16)
               for name, n in blocks.items()}
    return Mixture(corpora, mix, budget, T, 4, seed)


def read(mixture):
    """Every (corpus, block) of a mixture in order, read from its batches."""
    rows = np.concatenate([mixture.batch(step) for step in range(mixture.steps)])
    return [("abc"[int(row[0]) % 10], int(row[0]) // 10) for row in rows if row[0] >= 0]


def blocks_of(name, mix, *settings):
    return [block for n, block in read(mixture(mix, *settings, a=60, b=60, c=60)) if n == name]


def test_passes_are_exact_and_each_holds_every_block_once_in_an_order_of_its_own():
    seen = read(mixture("a:2,b:1,c:0.5", a=50, b=60, c=80))
    for name, blocks, passes in (("a", 34, 2), ("b", 44, 1), ("c", 64, 0.5)):
        counts = np.bincount([block for n, block in seen if n == name], minlength=blocks)
        assert (len(counts), counts.sum(), counts.max()) == (blocks, blocks * passes, max(1, passes))
    order = [block for n, block in seen if n == "a"]
    assert sorted(order[:34]) == sorted(order[34:]) == list(range(34)) and order[:34] != order[34:]


@pytest.mark.parametrize("mix", ["a:100%", "a:30%,b:70%", "a:33.3%,b:33.3%,c:33.4%", "a:0%,b:100%"])
def test_shares_are_exact_to_one_block(mix):
    wanted, _ = parse_mix(mix)
    seen = [name for name, _ in read(mixture(mix, 101 * T, **dict.fromkeys(wanted, 60)))]
    assert len(seen) == 101
    assert all(abs(seen.count(name) - share * 101) < 1 for name, share in wanted.items())


def test_mixtures_of_one_seed_share_prefixes_of_the_same_block_order():
    large = blocks_of("a", "a:90%,b:10%", 60 * T)
    for mix in ("a:30%,b:70%", "b:40%,a:30%,c:30%", "a:10%,b:90%", "c:99%,a:1%"):
        small = blocks_of("a", mix, 60 * T)
        assert small == large[: len(small)]
    assert blocks_of("a", "a:3")[: len(blocks_of("a", "a,b"))] == blocks_of("a", "a,b")
    assert blocks_of("a", "a:90%,b:10%", 60 * T, 1) != large
    assert blocks_of("b", "b:90%,a:10%", 60 * T) != large  # each corpus has its own order


def test_a_control_of_0_percent_changes_nothing_but_is_still_evaluated():
    control = mixture("a:0%,b:100%", 60 * T, a=50, b=50)
    assert read(control) == read(mixture("b:100%", 60 * T, b=50))
    assert len(control.held_out("a")) == 16


def test_every_batch_has_the_shares_of_the_mixture_to_about_a_block():
    m = mixture("a:50%,b:25%,c:25%", 160 * T, a=60, b=60, c=60)
    for step in range(m.steps):
        names = [int(row[0]) % 10 for row in m.batch(step)]
        assert names.count(0) == 2 and 0 <= names.count(1) <= 2


def test_the_held_out_tail_is_never_trained_on():
    m = mixture("a:3", a=50)
    held = {int(row[0]) // 10 for row in m.held_out("a")}
    assert len(held) == 16 and not held & {block for _, block in read(m)}


def test_the_last_batch_is_padded_and_a_batch_depends_on_its_step_alone():
    m = mixture("a", a=50)
    last = m.batch(m.steps - 1)
    assert m.steps == 9 and (last[:2] >= 0).all() and (last[2:] == -1).all()
    assert (mixture("a", a=50).batch(5) == m.batch(5)).all()


def test_blocks_beyond_the_range_of_their_numbers_are_read():
    """Numbers of blocks are uint32, and 20 million blocks of 2048 are more tokens than that."""
    class Huge:  # 40 billion tokens, that are the number of their block
        def __len__(self):
            return 20_400_000 * 2048

        def __getitem__(self, part):
            return np.full(part.stop - part.start, part.start // 2048)

    m = Mixture({"a": Huge()}, "a", 0, 2048, 512, 0)
    places = set(m.batch(0)[:, 0])
    assert len(places) == 512 and max(places) > 20_000_000


@pytest.mark.parametrize("mix, budget, message", [
    ("a:2,b:50%", 0, "not both"), ("a:50%,b:40%", 100, "sum to 90"), ("a:x", 0, "NAME:PASSES"),
    ("a:-1", 0, "0 or more"), ("a:nan", 0, "0 or more"), ("a,a", 0, "once"), ("a:0", 0, "not one block"),
    ("a:100%", 0, "--tokens"), ("a", 100, "--tokens")])
def test_a_mixture_that_makes_no_sense_is_refused(mix, budget, message):
    with pytest.raises(UserError, match=message):
        mixture(mix, budget, a=50, b=50)


def test_the_manifest_names_the_errors_of_authors_and_what_was_read(tmp_path):
    mix = "toy-omi1@slips=20@div=sub:30%,toy-omi2:70%"
    ids = {name: tokens.read_tokens(prepare.prepare(name, "toy", tmp_path))[:99999]
           for name in parse_mix(mix)[0]}
    first, second = Mixture(ids, mix, 64000, 64, 8, 0).manifest().values()
    assert (first["slips"], first["misconceptions"], first["share"]) == (20, {"/": "-"}, 0.3)
    assert (second["slips"], second["misconceptions"], second["blocks"]) == (50, {}, 700)
    assert second["sha256"] == tokens.read_meta(tmp_path / "toy-omi2-toy.bin")["sha256"]


# ---------------------------------------------------------------- questions


def test_the_embedded_questions_are_many_and_unseen():
    train, test = load_questions("toy", "train"), load_questions("toy", "test")
    assert len(train) == 4096 and len(test) == len(load_questions("toy-hard", "test")) == 256
    assert not {q.question for q in train} & {q.question for q in test}


@pytest.mark.parametrize("task, file, count, gold", [
    ("gsm8k", "gsm8k_train.jsonl", 7473, "72"), ("gsm8k", "gsm8k_test.jsonl", 1319, "18"),
    ("math500", "math500_test.json", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("aime24", "aime24.jsonl", 30, "204")])
def test_real_question_sets_load_from_a_local_file(shared, task, file, count, gold):
    questions = load_questions(task, "test", file=str(shared / file))
    assert len(questions) == count and questions[0].gold == gold


def test_question_sets_load_from_a_mirror_of_the_hub_in_its_own_file_types(tmp_path):
    put(tmp_path / "openai/gsm8k/main/train-00000.parquet",
        [{"question": "1 + 1?", "answer": "So <<1+1=2>>2\n#### 2"}])
    put(tmp_path / "DigitalLearningGmbH/MATH-lighteval/data/test-00000.parquet",
        [{"problem": "2 + 1?", "solution": "It is $\\boxed{\\frac{6}{2}}$."}])
    put(tmp_path / "HuggingFaceH4/MATH-500/test.jsonl",
        [{"problem": "2 + 2?", "answer": "4", "solution": "\\boxed{5}"}])
    put(tmp_path / "gneubig/aime-1983-2024/AIME.csv", b"ID,Question,Answer\n2024-I-4,2 + 3?,5\n")
    hub = str(tmp_path)
    assert load_questions("gsm8k", "train", hub) == [("gsm8k-train-0", "1 + 1?", "2")]
    assert load_questions("math", "test", hub) == [("math-test-0", "2 + 1?", "\\frac{6}{2}")]
    assert load_questions("math500", "test", hub) == [("math500-test-0", "2 + 2?", "4")]
    assert load_questions("aime", "test", hub) == [("2024-I-4", "2 + 3?", "5")]
    with pytest.raises(UserError, match="--hub=DIR"):
        load_questions("aime24", "test", hub)
    with pytest.raises(UserError, match="no train questions"):
        load_questions("math500", "train", hub)
    with pytest.raises(UserError, match="unknown task 'gsm'"):
        load_questions("gsm", "train")


@pytest.mark.parametrize("row, message", [
    ("{broken", "line 3: .*JSON"), ({"question": "a"}, "line 3: .*its keys are question"),
    ({"id": 1, "answer": 5}, "line 3: .*its keys are id, answer"), (["a"], "line 3: .*object"),
    ({"question": ["a"], "answer": 1}, "line 3: .*needs a question"),
    ({"question": "a", "answer": None}, "line 3: .*its keys are question, answer"),
    ({"question": "a", "solution": "I do not know."}, "line 3: .*states no answer")])
def test_a_row_that_cannot_be_used_is_named_by_its_line_and_keys(row, message, tmp_path):
    lines = ['{"question": "a", "answer": 1}', "", row if isinstance(row, str) else json.dumps(row)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"a.jsonl, {message}") as said:
        load_questions("gsm8k", "test", file=str(tmp_path / "a.jsonl"))
    assert "\n" not in str(said.value)


def test_a_number_is_a_question_zero_is_a_gold_and_ids_are_carried_along(tmp_path):
    rows = [{"id": 7, "question": 42, "answer": 0}, {"id": 7, "Problem": "b", "gold": "#### 1"}]
    put(tmp_path / "a.json", rows)
    loaded = load_questions("gsm8k", "test", file=str(tmp_path / "a.json"))
    assert loaded == [("7", "42", "0"), ("7", "b", "1")]


def run_questions(tmp_path, texts, **named):
    put(tmp_path / "a.jsonl", [{"question": text, "answer": i} for i, text in enumerate(texts)])
    return load_run_questions("gsm8k", named.get("eval_task", ""), str(tmp_path / "a.jsonl"),
                              named.get("eval_questions", ""), "")


def test_equal_questions_are_all_learnt_from_or_all_held_out(tmp_path, capsys):
    """A file with every question three times had all its held-out questions among the others."""
    train, test = run_questions(tmp_path, ["a", "b ", "c"] * 4 + [f"{i}" for i in range(17)] + ["c"])
    assert {q.question for q in train} | {q.question for q in test} >= {"a", "b ", "c"}
    assert not {q.question for q in train} & {q.question for q in test}
    assert len(train) + len(test) == 30 and len({q.question for q in test}) == 2
    assert "10 of 30 questions equal an earlier one" in capsys.readouterr().out


def test_questions_are_held_out_only_where_none_are_named(tmp_path, capsys):
    train, test = run_questions(tmp_path, "abcdef", eval_task="toy")
    assert len(train) == 6 and test == load_questions("toy", "test")
    train, test = run_questions(tmp_path, "abcdef", eval_questions=str(tmp_path / "a.jsonl"))
    assert len(train) == len(test) == 6 and "6 of 6 questions" in capsys.readouterr().out
    assert [len(part) for part in run_questions(tmp_path, map(str, range(5000)))] == [4744, 256]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("texts, message", [("", "holds no question"), ("aa", "holds one question")])
def test_a_file_of_too_few_questions_is_a_sentence_of_its_own(texts, message, tmp_path):
    with pytest.raises(UserError, match=f"a.jsonl {message}"):
        run_questions(tmp_path, texts)


def test_a_prompt_fits_that_leaves_the_room_of_a_completion():
    questions, encoding = load_questions("toy", "test"), get_tokenizer("toy")
    lengths = [len(encoding.encode_ordinary(q.question + "\n\n")) for q in questions]
    kept = fitting(questions, encoding, 100, 100 - sorted(lengths)[100])
    assert len(kept) == sum(n <= sorted(lengths)[100] for n in lengths) < 256
    assert all(encoding.decode(ids) == q.question + "\n\n" for q, ids in kept)


def test_each_question_is_asked_once_an_epoch_in_an_order_of_its_own():
    asked = [i for step in range(10) for i in pick_prompts(25, step, 5, seed=0)]
    assert sorted(asked[:25]) == sorted(asked[25:]) == list(range(25)) and asked[:25] != asked[25:]
    assert pick_prompts(25, 3, 5, seed=0) == asked[15:20] != pick_prompts(25, 3, 5, seed=1)
