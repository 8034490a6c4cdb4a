"""From stories and files of the hub to token files, mixtures and questions."""

import hashlib
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
from data import UserError, prepare, tokenizer, tokens, toy
from data.mixture import Mixture, parse_mix, pick_prompts
from data.prepare import CORPORA
from data.tasks import fitting, load_questions, load_run_questions
from data.tokenizer import EOT, get_tokenizer
from train_tokenizer import train, train_bpe
from verify import score_batch

ALGEBRAIC = "EleutherAI/proof-pile-2/algebraic-stack/train"
T = 8  # tokens of a block in the tests of mixtures


def draw(split, seed, steps, count):
    return list(islice(toy.problems(split, seed, steps), count))


def stories(name):
    """Question and solution of the first documents of a corpus."""
    return [text.split("\n\n", 1) for text in islice(toy.corpus(name), 400)]


def test_train_and_test_problems_are_disjoint_by_their_arithmetic():
    seeds = (0, 1, 2, 1000)  # of the authors, and of the questions
    trained = {p.chain for seed in seeds for p in draw("train", seed, (1, 3), 9000)}
    tested = {p.chain for p in draw("test", 1000, (1, 3), 2000)}
    assert len(tested) > 500 and not trained & tested
    assert {len(chain) - 1 for chain in trained} == {1, 2, 3}
    asked, unseen = ({q.question for q in load_questions("toy", s)} for s in ("train", "test"))
    assert len(asked) > 3500 and len(unseen) > 200 and not asked & unseen
    assert stories("toy-tinygsm")[0][0] not in asked


@pytest.mark.parametrize("write, name", [
    (toy.write_tinygsm, "tinygsm"), (toy.write_omi1, "omi1"), (toy.write_omi2, "text")])
def test_every_author_is_right_and_recognised(write, name):
    problems, rng = draw("train", 5, (1, 3), 80) + draw("test", 5, (4, 6), 80), random.Random(0)
    scores = score_batch([write(p, rng) for p in problems], [str(p.values[-1]) for p in problems])
    assert {(s.reward, s.format, s.failure) for s in scores} == {(1.0, name, None)}
    assert all(0 < value <= toy.LARGEST for p in problems for value in p.values)


@pytest.mark.parametrize("author", toy.AUTHORS)
def test_an_author_slips_as_often_as_the_name_says_and_the_questions_stay(author):
    careful = stories(f"{author}@slips=0")
    for name, slips in [(author, toy.SLIPS[author]), (f"{author}@slips=20", 20)]:
        told = stories(name)
        assert [question for question, _ in told] == [question for question, _ in careful]
        differ = sum(a != b for a, b in zip(told, careful)) / 4
        assert slips - 8 < differ < slips + 8 and (differ > 0) == (slips > 0)
    more = stories(f"{author}@slips=60")  # who slips at 20% slips alike at 60%
    assert all(b in (a, c) for a, b, c in zip(careful, told, more))


def test_a_misconception_is_made_always_and_only_where_its_operation_is_told():
    assert toy.errors("toy-omi1@slips=7@div=sub@mul=add")[1:] == (7, {"/": "-", "*": "+"})
    right, wrong = stories("toy-omi1@slips=0"), stories("toy-omi1@slips=0@div=sub@mul=add")
    for problem, (question, a), (same, b) in zip(draw("train", 1, (1, 3), 400), right, wrong):
        told = [op for op, _ in problem.chain]
        assert question == same == problem.question and (a != b) == ("*" in told or "/" in told)
        assert b.count("-=") + b.count(" - ") == told.count("-") + told.count("/")


def test_the_toy_tokenizer_is_what_its_trainer_makes_spells_any_text_and_splits_numbers():
    assert train() == tokenizer.TOY_RANKS.read_text()
    assert list(train_bpe(["abab abc"], r"\S+", 258))[256:] == [b"ab", b"abab"]
    encoding, text = get_tokenizer("toy"), "naïve 北京 🙂\n\n\t\\frac{1}{2}\n    return 1234"
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("x 1234")] == ["x", " 12", "34"]


def test_gpt2_has_its_ranks_and_single_digits(shared, tmp_path, monkeypatch):
    name = hashlib.sha1(tokenizer.GPT2_URL.encode()).hexdigest()
    (tmp_path / name).write_bytes((shared / "gpt2.tiktoken").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = get_tokenizer.__wrapped__("gpt2")
    assert encoding.eot_token == 50256 and len(encoding.encode_ordinary("Hello 123")) == 5


def test_a_missing_gpt2_vocabulary_names_the_file_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "load_tiktoken_bpe", lambda *a, **b: open(tmp_path / "missing"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"save https.* as [0-9a-f]{{40}} in {tmp_path}"):
        get_tokenizer.__wrapped__("gpt2")


def put(path: Path, rows) -> Path:
    """Writes rows (lines in bytes as they are) into a file of the type that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=25)
        return path
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"[" + b",\n".join(lines) + b"]" if path.suffix == ".json" else b"\n".join(lines)
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
        texts[name] = []
        for shard in range(3 if "*" in pattern else 1):
            rows = [{f: f"{f} {shard} {i}: naïve 北京\n\n\\frac{{1}}{{7}} = 1234" for f in fields}
                    for i in range(20)]
            put(root / pattern.replace("*", f"0000{shard}"), [{**row, "other": 5} for row in rows])
            texts[name] += ["\n\n".join(row.values()) for row in rows]
    decoy = [{"problem": "decoy", "generated_solution": "decoy"}]
    put(root / "nvidia/OpenMathInstruct-2/data/train_1M-00000.parquet", decoy)
    put(root / ALGEBRAIC / "00000a.jsonl.zst", [])  # a frame of nothing
    (root / ALGEBRAIC / "00003.jsonl.zst").write_bytes(b"")
    return str(root), texts


def documents(path: Path) -> list[str]:
    """The texts of a token file, split at its end-of-text tokens."""
    encoding, ids = get_tokenizer("toy"), tokens.read_tokens(path)
    *parts, rest = np.split(ids, np.flatnonzero(ids == encoding.eot_token) + 1)
    assert len(rest) == 0
    return [encoding.decode(part[:-1].tolist()) for part in parts]


def make(name: str, folder: Path, source: str, *flags: str) -> Path:
    """The token file that `python -m data.prepare` makes, in this process."""
    prepare.main([name, f"--data_dir={folder}", f"--hub={source}", "--workers=1", *flags])
    return folder / f"{name}-toy.bin"


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_of_the_hub_becomes_its_documents_in_their_order(name, mirror, tmp_path):
    path = make(name, tmp_path, mirror[0])
    assert documents(path) == mirror[1][name]
    assert tokens.read_meta(path)["documents"] == len(mirror[1][name]) in (20, 60)


def test_irregular_rows_are_counted_said_and_never_fatal(tmp_path, capsys):
    blanks = "a" + " " * (1 << 21) + "b"  # too many in a row for the tokenizer's regex
    put(tmp_path / ALGEBRAIC / "0.jsonl.zst", [
        {"text": blanks}, {"text": f"before {EOT} behind"}, {"text": ""}, {"text": " \n"}, b"", b"",
        {"text": None}, {"text": 5}, {"title": "no text"}, ["text"], b'{"text": "caf\xe9"}',
        b'{"text": "half a pair \\ud83d"}', b'{"text": "a line that breaks', b"[" * 99999,
        {"text": "end", "meta": {"of": ["another type"]}}])
    path = make("algebraic-stack", tmp_path, str(tmp_path))
    assert documents(path) == [blanks, f"before {EOT} behind", "end"]
    assert "3 documents, 1 of 1 files; 10 rows without text skipped" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from data import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # not inherited from a shell's &
before, calls = {where}, []
def call(*args):
    calls.append(args)
    return before(*args) if len(calls) < 3 else os.kill(os.getpid(), signal.{how})
{where} = call
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where, how", [
    ("os.fsync", "SIGKILL"),  # ids are written that the .json does not know yet
    ("prepare.save_meta", "SIGKILL"), ("prepare.tokenize", "SIGTERM"), ("os.fsync", "SIGINT")])
def test_a_kill_leaves_no_trace_in_what_comes_after(where, how, mirror, tmp_path, monkeypatch):
    flags = ["tinygsm", f"--hub={mirror[0]}", f"--data_dir={tmp_path}", "--workers=2"]
    script = KILLED.format(where=where, how=how)
    run = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True)
    assert run.returncode == -getattr(signal, how)
    path, opened, read = tmp_path / "tinygsm-toy.bin", [], prepare.read_chunks
    done = tokens.read_meta(path)["done"]
    with pytest.raises(UserError, match="not finished"):
        tokens.read_tokens(path)
    monkeypatch.setattr(prepare, "read_chunks", lambda f, names: opened.append(f) or read(f, names))
    make("tinygsm", tmp_path, mirror[0])
    assert len(opened) == 3 - done  # no whole file is read again
    whole = make("tinygsm", tmp_path / "whole", mirror[0])
    for kind in (".bin", ".json"):
        assert path.with_suffix(kind).read_bytes() == whole.with_suffix(kind).read_bytes()


@pytest.mark.parametrize("name, file", [
    ("tinygsm", "TinyGSM/TinyGSM/data/1.parquet"), ("algebraic-stack", ALGEBRAIC + "/1.jsonl.zst"),
    ("mmqa", "meta-math/MetaMathQA/MetaMathQA-395K.json")])
def test_a_damaged_file_is_named_and_once_mended_continues(name, file, tmp_path):
    rows = [{f: os.urandom(300).hex() for f in CORPORA[name].split()[1:]} for _ in range(30)]
    whole = put(tmp_path / file, rows).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{file} .*: once that is mended, the same comm") as said:
        make(name, tmp_path, str(tmp_path))
    assert "\n" not in str(said.value)
    (tmp_path / file).write_bytes(whole)
    assert documents(make(name, tmp_path, str(tmp_path))) == ["\n\n".join(r.values()) for r in rows]


def test_a_part_of_a_corpus_is_a_prefix_of_it_and_grows(mirror, tmp_path):
    whole = make("tinygsm", tmp_path / "whole", mirror[0]).read_bytes()
    path = make("tinygsm", tmp_path, mirror[0], "--shards=1")
    part, meta = path.read_bytes(), tokens.read_meta(path)
    assert len(documents(path)) == 20 and whole.startswith(part)
    assert make("tinygsm", tmp_path, "/nowhere").read_bytes() == part  # what is there is enough
    tokens.save_meta(path, {**meta, "sha256": ""})  # killed at the end, no more is asked for
    assert make("tinygsm", tmp_path, mirror[0]).read_bytes() == part
    assert make("tinygsm", tmp_path, mirror[0], "--shards=3").read_bytes() == whole
    for notes in (tokens.read_meta(path), {**meta, "files": ["another.parquet"]}):
        tokens.save_meta(path, notes)
        with pytest.raises(UserError, match="with other files, or more: delete it"):
            make("tinygsm", tmp_path, mirror[0], "--shards=2")


def test_one_process_makes_a_file_where_there_are_locks(mirror, tmp_path, monkeypatch):
    with open(tmp_path / "gsm8k-toy.bin", "ab") as file:
        assert data.lock(file)
        with pytest.raises(UserError, match="another process is making the file"):
            make("gsm8k", tmp_path, mirror[0])
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: importing it fails
        monkeypatch.delattr(os, "sched_getaffinity")
        assert data.cores() == os.cpu_count() and documents(make("gsm8k", tmp_path, mirror[0]))


def test_a_token_file_of_another_size_source_or_vocabulary_is_not_believed(mirror, tmp_path):
    path = make("gsm8k", tmp_path, mirror[0])
    whole, meta = path.read_bytes(), tokens.read_meta(path)
    part = {key: meta[key] for key in ("source", "tokenizer", "sha256")}
    for other in ({**meta, "source": "another"}, {**meta, "tokenizer": "another"}, part):
        tokens.save_meta(path, other)
        path.write_bytes(b"1234")
        assert make("gsm8k", tmp_path, mirror[0]).read_bytes() == whole
    for damaged in (whole[:-2], whole + b"ab"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged: delete it"):
            make("gsm8k", tmp_path, mirror[0])


@pytest.mark.parametrize("name, message", [
    ("finemath3", "no row has text under text"), ("omi1", "could not be read .*--hub=DIR"),
    *((name, f"unknown corpus '{name}': .* toy-omi1, .*@div=sub") for name in (
        "tiny toy-omi1@slips=101 omi1@slips=3 toy-omi1@div=x toy-omi1@div=sub@slips=3").split())])
def test_a_corpus_without_text_out_of_reach_or_unknown_is_a_sentence(name, message, tmp_path):
    put(tmp_path / "HuggingFaceTB/finemath/finemath-3plus/0.parquet", [{"url": "no text"}] * 3)
    with pytest.raises(UserError, match=message):
        make(name, tmp_path, str(tmp_path))


def test_the_command_ends_with_0_and_a_line_a_corpus_or_with_2_and_a_sentence(mirror, tmp_path):
    for words, status, lines in [
        (["gsm8k", "omi1", f"--hub={mirror[0]}"], 0, (2, 0)),
        (["gsm8k", "--shard=1"], 2, (0, 1)), (["gsm8k", "--shards=-1"], 2, (0, 1)),
    ]:
        command = [sys.executable, "-m", "data.prepare", f"--data_dir={tmp_path}/é", *words]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "PYTHONIOENCODING": "ascii"})
        printed = len(run.stdout.splitlines()), len(run.stderr.splitlines())
        assert (run.returncode, printed) == (status, lines), run.stderr


def mixture(mix, budget=0.0, seed=0, **blocks):
    """Of corpora whose tokens name corpus and block: 10 x block + the letter's place in "abc"."""
    corpora = {name: (np.arange(n * T + 1) // T * 10 + "abc".index(name)).astype(np.uint16)
               for name, n in blocks.items()}
    return Mixture(corpora, mix, budget, T, 4, seed)


def read(mixture):
    """Every (corpus, block) of a mixture in order, read from its batches."""
    rows = np.concatenate([mixture.batch(step) for step in range(mixture.steps)])
    return [("abc"[int(row[0]) % 10], int(row[0]) // 10) for row in rows if row[0] >= 0]


def test_passes_are_exact_and_each_holds_every_block_once_in_an_order_of_its_own():
    seen = read(mixture("a:2,b:1,c:0.5", a=50, b=60, c=80))
    for name, blocks, passes in (("a", 34, 2), ("b", 44, 1), ("c", 64, 0.5)):
        counts = np.bincount([block for n, block in seen if n == name], minlength=blocks)
        assert len(counts) == blocks and counts.sum() == blocks * passes
        assert counts.max() == max(1, passes)
    order = [block for n, block in seen if n == "a"]
    assert sorted(order[:34]) == sorted(order[34:]) == list(range(34)) and order[:34] != order[34:]


@pytest.mark.parametrize("mix", ["a:100%", "a:30%,b:70%", "a:33.3%,b:33.3%,c:33.4%", "a:0%,b:100%"])
def test_shares_are_exact_to_one_block_and_to_about_one_after_every_batch(mix):
    wanted, _ = parse_mix(mix)
    seen = [name for name, _ in read(mixture(mix, 101 * T, **dict.fromkeys(wanted, 60)))]
    assert len(seen) == 101
    for name, share in wanted.items():
        assert abs(seen.count(name) - share * 101) < 1
        assert all(abs(seen[:n].count(name) - share * n) < 2 for n in range(0, 101, 4))


def test_mixtures_of_one_seed_share_prefixes_of_the_same_block_order():
    def blocks(mix, *settings, name="a"):
        return [block for n, block in read(mixture(mix, *settings, a=60, b=60, c=60)) if n == name]

    large = blocks("a:90%,b:10%", 60 * T)
    for mix in ("a:30%,b:70%", "b:40%,a:30%,c:30%", "a:10%,b:90%", "c:99%,a:1%"):
        small = blocks(mix, 60 * T)
        assert small == large[: len(small)]
    assert blocks("a:3")[: len(blocks("a,b"))] == blocks("a,b")
    assert large not in (blocks("a:90%,b:10%", 60 * T, 1), blocks("b:90%,a:10%", 60 * T, name="b"))


def test_the_last_batch_is_padded_and_the_held_out_tail_is_in_none():
    m = mixture("a:3", a=50)
    last, held = m.batch(m.steps - 1), {int(row[0]) // 10 for row in m.held_out("a")}
    assert m.steps == 26 and (last[:2] >= 0).all() and (last[2:] == -1).all()
    assert len(held) == 16 and not held & {block for _, block in read(m)}
    assert (mixture("a:3", a=50).batch(5) == m.batch(5)).all()  # a batch depends on its step alone
    control = mixture("a:0%,b:100%", 60 * T, a=50, b=50)  # 0% changes nothing, but is evaluated
    assert read(control) == read(mixture("b:100%", 60 * T, b=50)) and len(control.held_out("a"))


@pytest.mark.parametrize("mix, budget, message", [
    ("a:2,b:50%", 0, "not both"), ("a:50%,b:40%", 100, "sum to 90"), ("a:x", 0, "NAME:PASSES"),
    ("a:-1", 0, "0 or more"), ("a:nan", 0, "0 or more"), ("a,a", 0, "once"), ("a:0", 0, "not one"),
    ("a:100%", 0, "--tokens"), ("a", 100, "--tokens")])
def test_a_mixture_that_makes_no_sense_is_refused(mix, budget, message):
    with pytest.raises(UserError, match=message):
        mixture(mix, budget, a=50, b=50)


def test_the_manifest_names_what_was_read_and_the_errors_of_its_authors(data_dir):
    mix = "toy-omi1@slips=20@div=sub:30%,toy-omi2:70%"
    paths = [prepare.prepare(name, "toy", data_dir) for name in parse_mix(mix)[0]]
    ids = dict(zip(parse_mix(mix)[0], map(tokens.read_tokens, paths)))
    first, second = Mixture(ids, mix, 64000, 64, 8, 0).manifest().values()
    assert (first["slips"], first["misconceptions"], first["share"]) == (20, {"/": "-"}, 0.3)
    assert (second["slips"], second["misconceptions"], second["blocks"]) == (50, {}, 700)
    assert first["sha256"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()


@pytest.mark.parametrize("file, count, gold", [
    ("gsm8k_train.jsonl", 7473, "72"), ("aime24.jsonl", 30, "204"),
    ("math500_test.json", 500, "\\left( 3, \\frac{\\pi}{2} \\right)")])
def test_real_question_sets_load_from_a_local_file(shared, file, count, gold):
    questions = load_questions("gsm8k", "test", file=str(shared / file))
    assert len(questions) == count and questions[0].gold == gold


@pytest.mark.parametrize("task, file, row, expected", [
    ("gsm8k", "openai/gsm8k/main/test-0.parquet",
     {"question": "1?", "answer": "2.\n#### 2"}, "1? 2"),
    ("math", "DigitalLearningGmbH/MATH-lighteval/data/test-0.parquet",
     {"problem": "2?", "solution": "$\\boxed{\\frac{6}{2}}$."}, "2? \\frac{6}{2}"),
    ("math500", "HuggingFaceH4/MATH-500/test.jsonl",
     {"problem": "3?", "answer": "4", "solution": ""}, "3? 4"),
    ("aime", "gneubig/aime-1983-2024/a.csv", b"ID,Question,Answer\n2024-I-4,4?,5", "4? 5")])
def test_question_sets_load_from_a_mirror_of_the_hub_in_its_own_file_types(
        tmp_path, capsys, monkeypatch, task, file, row, expected):
    """MATH has solutions that end in an empty box: that one row is no reason to refuse the rest."""
    put(tmp_path / file, [row, dict.fromkeys(row, "") if isinstance(row, dict) else b",,5"])
    ((name, *found),) = load_questions(task, "test", str(tmp_path))
    assert f"1 of 2 rows passed over, such as {task}, line 2: " in capsys.readouterr().out
    assert " ".join(found) == expected and name in (f"{task}-test-0", "2024-I-4")
    for other, split, message in (("aime24", "test", "--hub=DIR"), ("gsm", "train", "unknown task"),
                                  ("math500", "train", "no train questions")):
        with pytest.raises(UserError, match=message):
            load_questions(other, split, str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="datasets is missing: pip install"):
        load_questions(task, "test", str(tmp_path))


@pytest.mark.parametrize("row, message", [
    (b"{broken", "JSON"), ({"question": "a"}, "its keys are question"), (["a"], "object"),
    ({"question": ["a"], "answer": 1}, "needs a question .* its keys are question, answer"),
    ({"question": "a", "answer": None}, "its keys are question, answer"),
    ({"question": "a", "solution": "I do not know."}, "states no answer")])
def test_a_row_that_cannot_be_used_is_named_by_its_line_and_keys(row, message, tmp_path):
    file = put(tmp_path / "a.jsonl", [{"question": "a", "answer": 1}, b"", row])
    with pytest.raises(UserError, match=f"a.jsonl, line 3: .*{message}") as said:
        load_questions("gsm8k", "test", file=str(file))
    assert "\n" not in str(said.value)


def test_a_number_is_a_question_zero_is_a_gold_and_ids_are_carried_along(tmp_path):
    rows = [{"id": 7, "question": 42, "answer": 0}, {"id": 7, "Problem": "b", "gold": "#### 1"}]
    file = str(put(tmp_path / "a.json", rows))
    assert load_questions("gsm8k", "test", "", file) == [("7", "42", "0"), ("7", "b", "1")]


def run_questions(tmp_path, texts, eval_task="", eval_questions="", **learns):
    file = put(tmp_path / "a.jsonl", [{"question": text, "answer": 1} for text in texts])
    return load_run_questions("gsm8k", eval_task, str(file), eval_questions, "", **learns)


def test_equal_questions_are_all_learnt_from_or_all_held_out(tmp_path, capsys):
    """A file with every question three times had all its held-out questions among the others."""
    texts = ["é", "b ", "c", *map(str, range(17)), "b\u200b", "e\u0301"] * 3
    train, test = run_questions(tmp_path, texts)
    assert not {q.wording for q in train} & {q.wording for q in test}
    assert (len(train), len(test)) == (60, 6)
    assert "46 of 66 questions equal an earlier one" in capsys.readouterr().out
    for texts, message in [("", "no question|empty"), ("aa", "holds one question")]:
        with pytest.raises(UserError, match=f"a.jsonl .*({message})"):
            run_questions(tmp_path, texts)


def test_questions_are_held_out_only_where_none_are_named(tmp_path, capsys):
    train, test = run_questions(tmp_path, "abcdef", eval_task="toy")
    assert len(train) == 6 and len(test) == 256
    assert [len(part) for part in run_questions(tmp_path, map(str, range(5000)))] == [4744, 256]
    assert [len(part) for part in run_questions(tmp_path, "abcdef", learns=False)] == [0, 6]
    assert not capsys.readouterr().out
    train, test = run_questions(tmp_path, "abcdef", eval_questions=str(tmp_path / "a.jsonl"))
    assert len(train) == len(test) == 6 and "6 of 6 questions" in capsys.readouterr().out


def test_a_prompt_begins_as_a_document_does_and_leaves_the_room_of_a_completion():
    """Without the end-of-text token in front a base was right in 29% of its samples, not 38%."""
    questions, encoding = load_questions("toy", "test"), get_tokenizer("toy")
    pairs = [(q, [encoding.eot_token, *encoding.encode_ordinary(q.question + "\n\n")])
             for q in questions]
    longest = sorted(len(ids) for _, ids in pairs)[100]
    assert fitting("test", questions, encoding, 100, 100 - longest) == [
        (q, ids) for q, ids in pairs if len(ids) <= longest]
    with pytest.raises(UserError, match="fits"):  # too many blanks for the tokenizer's regex
        fitting("test", [questions[0]._replace(question=" " * (1 << 21))], encoding, 100, 9)


def test_each_question_is_asked_once_an_epoch_in_an_order_of_its_own():
    asked = [i for step in range(10) for i in pick_prompts(25, step, 5, seed=0)]
    assert sorted(asked[:25]) == sorted(asked[25:]) == list(range(25)) and asked[:25] != asked[25:]
    assert pick_prompts(25, 3, 5, seed=0) == asked[15:20] != pick_prompts(25, 3, 5, seed=1)
