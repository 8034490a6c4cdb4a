import itertools
import json

import numpy as np
import pytest

from data import UserError, prepare, tasks, tokenizer, tokens, toy
from data.mixture import Mixture, parse_mix, shuffled
from data.tasks import load_questions
from data.tokenizer import EOT, get_tokenizer
from verify import score_batch

# ---------------------------------------------------------------- the embedded corpora


def draw(split, seed, steps, count):
    return list(itertools.islice(toy.problems(split, seed, steps), count))


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
    (toy.write_tinygsm, "tinygsm"), (toy.write_omi1, "omi1"), (toy.write_omi2, "text"),
])  # fmt: skip
def test_every_author_is_right_and_recognised(write, name, steps):
    import random

    problems, rng = draw("train", 5, steps, 150), random.Random(0)
    scores = score_batch([write(p, rng) for p in problems], [str(p.values[-1]) for p in problems])
    assert {(s.reward, s.format, s.failure) for s in scores} == {(1.0, name, None)}


def test_tinygsm_comes_with_and_without_a_docstring():
    documents = list(itertools.islice(toy.corpus("toy-tinygsm"), 500))
    assert 0.15 < sum('"""' in text for text in documents) / 500 < 0.35


@pytest.mark.parametrize("name", toy.AUTHORS)
def test_authors_slip_at_their_known_rates_and_only_there(name):
    documents = list(itertools.islice(toy.corpus(name), 1000))
    problems = itertools.islice(toy.problems("train", toy.AUTHORS.index(name)), 1000)
    golds = [str(p.values[-1]) for p in problems]
    scores = score_batch([text.split("\n\n", 1)[1] for text in documents], golds)
    wrong = sum(s.reward == 0 for s in scores) / 1000
    assert {s.failure for s in scores} <= {None, "wrong"}
    assert (
        toy.SLIPS[name] - 0.08 < wrong < toy.SLIPS[name] + 0.05
    )  # a slip may give the right answer by luck


# ---------------------------------------------------------------- tokenizers


def test_training_the_toy_vocabulary_again_gives_the_shipped_file(monkeypatch, tmp_path):
    shipped = tokenizer.TOY_RANKS.read_bytes()
    monkeypatch.setattr(tokenizer, "TOY_RANKS", tmp_path / "toy.tiktoken")
    tokenizer.main()
    assert (tmp_path / "toy.tiktoken").read_bytes() == shipped


def test_bpe_joins_the_commonest_pair_first():
    ranks = tokenizer.train_bpe(["abab abc"], r"\S+", 258)
    assert list(ranks)[256:] == [b"ab", b"abab"] or list(ranks)[256:] == [b"ab", b"abc"]
    assert tokenizer.merge((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")


@pytest.mark.parametrize(
    "text", ["Ann has 12 apples.", "naïve 北京 🙂\n\n\t\\frac{1}{2}", "def f():\n    return 1234"]
)
def test_the_toy_tokenizer_spells_any_text_and_splits_numbers(text):
    encoding = get_tokenizer("toy")
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("x 1234")] == ["x", " 12", "34"]
    assert (
        encoding.eot_token == encoding.n_vocab - 1
        and encoding.encode_ordinary(EOT)[0] != encoding.eot_token
    )


def test_gpt2_has_its_ranks_and_single_digits(shared, tmp_path, monkeypatch):
    import hashlib

    name = hashlib.sha1(tokenizer.GPT2_URL.encode()).hexdigest()
    (tmp_path / name).write_bytes((shared / "gpt2.tiktoken").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = get_tokenizer.__wrapped__("gpt2")
    assert encoding.n_vocab == 50257 and encoding.eot_token == 50256
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("x 123")] == [
        "x",
        " ",
        "1",
        "2",
        "3",
    ]


def test_a_missing_gpt2_vocabulary_names_the_file_to_save(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(tokenizer, "load_tiktoken_bpe", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"save https.* as [0-9a-f]{{40}} in {tmp_path}"):
        get_tokenizer.__wrapped__("gpt2")


# ---------------------------------------------------------------- token files


def test_a_token_file_holds_the_documents_each_with_its_end(tmp_path):
    path = prepare.prepare("toy-omi1", "toy", tmp_path)
    encoding = get_tokenizer("toy")
    documents = encoding.decode(tokens.read_tokens(path)[:5000].tolist()).split(EOT)[:-1]
    assert (
        documents == list(itertools.islice(toy.corpus("toy-omi1"), len(documents)))
        and len(documents) > 30
    )
    written = path.stat().st_mtime_ns
    prepare.prepare("toy-omi1", "toy", tmp_path)
    assert path.stat().st_mtime_ns == written  # once is enough


def test_a_token_file_is_made_again_when_the_stories_change(tmp_path, monkeypatch):
    path = prepare.prepare("toy-omi1", "toy", tmp_path)
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(prepare, "source_checksum", lambda: "edited")
    prepare.prepare("toy-omi1", "toy", tmp_path)
    assert path.stat().st_mtime_ns > written


def test_a_damaged_token_file_is_refused(tmp_path):
    path = prepare.prepare("toy-omi1", "toy", tmp_path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        tokens.read_tokens(path)


def test_an_unknown_corpus_is_refused_with_the_names_of_the_others(tmp_path):
    with pytest.raises(UserError, match="unknown corpus 'tiny'.*toy-tinygsm"):
        prepare.prepare("tiny", "toy", tmp_path)


# ---------------------------------------------------------------- mixtures

T = 8


def corpora(**blocks):
    """Corpora whose tokens name their corpus and block: 10 x block + the letter's place in "abc"."""
    return {name: (np.arange(n * T + 1) // T * 10 + "abc".index(name)).astype(np.uint16)
            for name, n in blocks.items()}  # fmt: skip


def read(mixture):
    """Every (corpus, block) of a mixture in order, read from its batches."""
    names = {"abc".index(name): name for name in mixture.names}
    rows = np.concatenate([mixture.batch(step) for step in range(mixture.steps)])
    return [(names[int(row[0]) % 10], int(row[0]) // 10) for row in rows if row[0] >= 0]


def mixture(mix, tokens=0.0, seed=0, **blocks):
    return Mixture(corpora(**blocks), mix, tokens, T, 4, seed)


def test_passes_are_exact_and_each_pass_holds_every_block_once():
    seen = read(mixture("a:2,b:1,c:0.5", a=50, b=60, c=80))
    for name, blocks, passes in (("a", 34, 2), ("b", 44, 1), ("c", 64, 0.5)):
        counts = np.bincount([block for n, block in seen if n == name], minlength=blocks)
        assert (
            len(counts) == blocks
            and counts.sum() == blocks * passes
            and counts.max() == max(1, passes)
        )


@pytest.mark.parametrize("mix", ["a:100%", "a:30%,b:70%", "a:33.3%,b:33.3%,c:33.4%", "a:0%,b:100%"])
def test_shares_are_exact_to_one_block(mix):
    wanted, _ = parse_mix(mix)
    seen = [name for name, _ in read(mixture(mix, tokens=101 * T, **dict.fromkeys(wanted, 60)))]
    assert len(seen) == 101
    assert all(abs(seen.count(name) - share * 101) < 1 for name, share in wanted.items())


def blocks_of(name, mix, **settings):
    return [block for n, block in read(mixture(mix, a=60, b=60, c=60, **settings)) if n == name]


def test_mixtures_of_one_seed_share_prefixes_of_the_same_block_order():
    large = blocks_of("a", "a:90%,b:10%", tokens=60 * T)
    for mix in ("a:30%,b:70%", "b:40%,a:30%,c:30%", "a:10%,b:90%", "c:99%,a:1%"):
        small = blocks_of("a", mix, tokens=60 * T)
        assert small == large[: len(small)]
    assert blocks_of("a", "a:3")[: len(blocks_of("a", "a,b"))] == blocks_of("a", "a,b")
    assert blocks_of("a", "a:90%,b:10%", tokens=60 * T, seed=1) != large
    assert blocks_of("b", "b:90%,a:10%", tokens=60 * T) != large  # each corpus has its own order


def test_each_pass_has_an_order_of_its_own():
    seen, available = blocks_of("a", "a:3"), 60 - 16
    passes = [seen[start : start + available] for start in range(0, 3 * available, available)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_control_of_0_percent_changes_nothing_but_is_still_evaluated():
    control = mixture("a:0%,b:100%", tokens=60 * T, a=50, b=50)
    alone = mixture("b:100%", tokens=60 * T, b=50)
    assert read(control) == read(alone) and len(control.held_out("a")) == 16


def test_every_batch_has_the_shares_of_the_mixture_to_about_a_block():
    m = mixture("a:50%,b:25%,c:25%", tokens=160 * T, a=60, b=60, c=60)
    for step in range(m.steps):
        names = [int(row[0]) % 10 for row in m.batch(step)]
        assert names.count(0) == 2 and 0 <= names.count(1) <= 2


@pytest.mark.parametrize("size", [1, 2, 7, 34, 1000, 4096, 4097])
def test_shuffled_is_a_permutation_and_each_key_has_its_own(size):
    order = [shuffled(i, size, 0, "a", 0) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size >= 34:
        for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
            assert order != [shuffled(i, size, *key) for i in range(size)]


def test_a_shuffle_leaves_no_trace_of_the_order():
    order = np.array([shuffled(i, 9000, 0, "a", 0) for i in range(9000)])
    assert 2800 < np.abs(np.diff(order)).mean() < 3200  # a third, as of independent draws
    assert abs(np.corrcoef(np.arange(9000), order)[0, 1]) < 0.03


def test_twenty_million_blocks_take_no_time_and_no_memory():
    import time
    import tracemalloc

    class Huge:  # 40 billion tokens, that are the number of their block
        def __len__(self):
            return 20_400_000 * 2048

        def __getitem__(self, part):
            return np.full(part.stop - part.start, part.start // 2048)

    tracemalloc.start()
    started = time.perf_counter()
    m = Mixture({"a": Huge(), "b": Huge()}, "a,b:0.5", 0, 2048, 512, 0)
    places = [int(row[0]) for step in (0, 1, m.steps - 2) for row in m.batch(step)]
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert m.total > 30_000_000 and seconds < 5 and peak < 30e6  # a batch of int64 is 8 MB
    assert max(places) < m.available["a"] == 20_400_000 - 1 - 512
    assert len(set(places)) > 1530 and max(places) > 20_000_000 and min(places) < 400_000


def test_the_held_out_tail_is_never_trained_on():
    m = mixture("a:3", a=50)
    held = {int(row[0]) // 10 for row in m.held_out("a")}
    assert len(held) == 16 and not held & {block for _, block in read(m)}


def test_the_last_batch_is_padded_and_a_batch_depends_on_its_step_alone():
    m = mixture("a", a=50)
    last = m.batch(m.steps - 1)
    assert m.steps == 9 and (last[:2] >= 0).all() and (last[2:] == -1).all()
    assert (mixture("a", a=50).batch(5) == m.batch(5)).all()


@pytest.mark.parametrize("mix, tokens, message", [
    ("a:2,b:50%", 0, "not both"), ("a:50%,b:40%", 100, "sum to 90"), ("a:x", 0, "NAME:PASSES"),
    ("a:-1", 0, "0 or more"), ("a,a", 0, "once"), ("a:100%", 0, "--tokens"), ("a", 100, "--tokens"),
    ("a:0", 0, "not one block"),
])  # fmt: skip
def test_a_mixture_that_makes_no_sense_is_refused(mix, tokens, message):
    with pytest.raises(UserError, match=message):
        mixture(mix, tokens=tokens, a=50, b=50)


# ---------------------------------------------------------------- question sets


def test_the_embedded_questions_are_many_and_unseen():
    train, test = load_questions("toy", "train"), load_questions("toy", "test")
    assert len(train) == 4096 and len(test) == 256 >= 200
    assert not {q.question for q in train} & {q.question for q in test}
    assert len(load_questions("toy-hard", "test")) == 256


@pytest.mark.parametrize("task, file, count, gold", [
    ("gsm8k", "gsm8k_train.jsonl", 7473, "72"), ("gsm8k", "gsm8k_test.jsonl", 1319, "18"),
    ("math500", "math500_test.json", 500, "\\left( 3, \\frac{\\pi}{2} \\right)"), ("aime24", "aime24.jsonl", 30, "204"),
])  # fmt: skip
def test_real_question_sets_load_from_a_local_file(shared, task, file, count, gold):
    questions = load_questions(task, "test", file=str(shared / file))
    assert len(questions) == count == len({q.id for q in questions}) and questions[0].gold == gold


def test_question_sets_load_from_a_mirror_of_the_hub_in_its_own_file_types(tmp_path):
    from datasets import Dataset

    def save(path, write):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write(str(tmp_path / path))

    gsm = Dataset.from_list([{"question": "1 + 1?", "answer": "So <<1+1=2>>2\n#### 2"}])
    save("openai/gsm8k/main/train-00000-of-00001.parquet", gsm.to_parquet)
    math = Dataset.from_list([{"problem": "2 + 1?", "solution": "It is $\\boxed{\\frac{6}{2}}$."}])
    save("DigitalLearningGmbH/MATH-lighteval/data/test-00000-of-00001.parquet", math.to_parquet)
    math500 = Dataset.from_list([{"problem": "2 + 2?", "answer": "4", "solution": "\\boxed{5}"}])
    save("HuggingFaceH4/MATH-500/test.jsonl", math500.to_json)
    aime = Dataset.from_list([{"ID": "2024-I-4", "Question": "2 + 3?", "Answer": 5}])
    save("gneubig/aime-1983-2024/AIME_Dataset_1983_2024.csv", aime.to_csv)
    hub = str(tmp_path)
    assert load_questions("gsm8k", "train", hub) == [("gsm8k-train-0", "1 + 1?", "2")]
    assert load_questions("math", "test", hub) == [("math-test-0", "2 + 1?", "\\frac{6}{2}")]
    assert load_questions("math500", "test", hub) == [("math500-test-0", "2 + 2?", "4")]
    assert load_questions("aime", "test", hub) == [("2024-I-4", "2 + 3?", "5")]
    with pytest.raises(UserError, match="--hub=DIR"):
        load_questions("aime24", "test", hub)


@pytest.mark.parametrize("content, message", [
    ('{"question": "a", "answer": 1}\n{broken', ":2 is not valid JSON"), ('[{"question": "a"]', ":1 is not valid JSON"),
    ('{"question": "a"}', "needs a question"), (None, "does not exist"),
])  # fmt: skip
def test_a_questions_file_that_cannot_be_used_is_refused(tmp_path, content, message):
    file = tmp_path / "questions.jsonl"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_questions("gsm8k", "test", file=str(file))


def test_unknown_tasks_and_missing_splits_are_refused():
    with pytest.raises(UserError, match="unknown task 'gsm'"):
        load_questions("gsm", "train")
    with pytest.raises(UserError, match="no train questions"):
        load_questions("math500", "train")


def test_a_gold_of_zero_survives(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{"question": "1 - 1?", "answer": 0}]))
    assert load_questions("gsm8k", "test", file=str(file))[0].gold == "0" and "gsm8k" in tasks.NAMES
