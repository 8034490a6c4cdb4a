import gzip
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations, count
from pathlib import Path

import pytest
from honest import BLOCKS, FUNCTIONS, PROSE
from hostile import HOSTILE, MARK, POISON

import verify
from verify import (BOX, canonical, equal, gold_answer, maj_at_k, pass_at_k, read_rows, score,
                    score_batch, summarize, table)

CODE = "def simple_math_problem() -> int:\n    {}\n    return result"
GOOD, LOOP = CODE.format("result = 7"), CODE.format("while True: pass")
BLOCK = ("Let's see.\n<llm-code>\n{}\n</llm-code>\n<llm-code-output>\n7\n</llm-code-output>\n"
         "So \\boxed{{7}}.")

# ---------------------------------------------------------------- format and answer
@pytest.mark.parametrize("completion, name, answer, failure", [
    (CODE.format('"""\n    \\boxed{9}\n    """\n    result = 14 // 2'), "tinygsm", "7", None),
    ("import math\n\ndef helper(x):\n    return math.floor(x)\n\n"
     + CODE.format("result = helper(7.9)"), "tinygsm", "7", None),
    ("def f():\n    return 0.1 + 6.9\n\nSo the answer is 9.", "tinygsm", "7", None),
    ("def f():\n    return 7\n\nQuestion: now?\n\ndef f():\n    return 8", "tinygsm", "7", None),
    ("\ufeff  def f():\n      return 7", "tinygsm", "7", None),
    ("def f():\n    return 6", "tinygsm", "6", "wrong"),
    ("def f():\n    print(7)", "tinygsm", None, "no answer"),
    ("def f():\n    return (", "tinygsm", None, "error"),
    ("def simple_math", "tinygsm", None, "error"),
    ("def f():\n    return [7]", "tinygsm", "\\{7\\}", None),
    ("def f():\n    return print", "tinygsm", None, "error"),
    ("def f():\n    return open('7')", "tinygsm", None, "blocked"),
    ("import sympy\ndef f():\n    return 7", "tinygsm", None, "blocked"),
    (LOOP, "tinygsm", None, "timeout"),
    (CODE.format("result = 9**9**9**9"), "tinygsm", None, "error"),
    (CODE.format("result = 'a' * 10**11"), "tinygsm", None, "error"),
    (CODE.format("result = simple_math_problem()"), "tinygsm", None, "error"),
    (CODE.format("import time; time.sleep(99); result = 7"), "tinygsm", None, "error"),
    (CODE.format("result = eval('7')"), "tinygsm", None, "error"),
    (CODE.format("raise Exception"), "tinygsm", None, "error"),
    (CODE.format("import socket"), "tinygsm", None, "blocked"),
    (BLOCK.format("print(2)\nprint(3 + 4)"), "omi1", "7", None),
    (BLOCK.format("print('The answer is', 8)"), "omi1", "7", None),  # a sentence is no value
    (BLOCK.format("a = 3"), "omi1", "7", None),  # no value in the code: the closing box
    (BLOCK.format("import sympy"), "omi1", "7", None),  # nor where a module is missing
    (BLOCK.format("a = 3\na + 5"), "omi1", "8", "wrong"),  # what the code says, not what is claimed
    (BLOCK.format("a = 3\na +"), "omi1", None, "error"),
    ("<llm-code>\n7", "omi1", None, "error"),
    ("By definition def is a word. It is \\boxed{\\text{7}}.", "text", "\\text{7}", None),
    ("3 + 4 = 7\n#### 7\n\nNext problem: 2 pens.\n#### 2", "text", "7", None),
    ("The answer is **7 eggs**, altogether.", "text", "7 eggs", None),
    ("the answer is $7$. I hope it is correct.", "text", "7", None),
    ("Answer: the answer is 3 + 4 = 7 (seven).", "text", "3 + 4 = 7", None),
    ("The answer is\n\n\\[7\\]", "text", "7", None),
    ("\\boxed{6} no, \\boxed 7", "text", "7", None),
    ("\\boxed{7}\n\nHow many are eight?\n\n\\boxed{8}", "text", "7", None),  # another problem
    ("\\boxed{5} \\boxed{6} \\boxed{7}", "text", None, "blocked"),  # one answer, not a list
    ("It is 7", "text", None, "no answer"), ("", "text", None, "no answer"),
])
def test_every_completion_has_a_format_an_answer_and_a_reason(completion, name, answer, failure):
    scores = score_batch([completion], ["7"], time_limit=2.0)
    assert scores == [(float(failure is None), name, answer, failure)]


def test_nested_braces_and_unclosed_boxes():
    for text, found in (
            ("a \\boxed{\\frac{1}{2}} b \\fbox {3}", ["\\frac{1}{2}", "3"]), ("none", []),
            ("\\boxed{3} and \\boxed{4", ["3"]), ("\\boxed{" * 10**5, []), ("\\boxed5}", []),
            ("\\boxed{\\boxed{3}}", ["\\boxed{3}"]), ("\\boxed 1.5 \\boxed{ }", ["1.5", " "])):
        assert BOX.findall(text) == found


def test_shares_sum_to_one_whatever_the_completions_and_formats():
    """A format that FORMATS does not know, as of a fork, was left out of the shares."""
    rng, pieces = random.Random(0), ["def f():\n", "    return 7", "<llm-code>", "</llm-code>",
                                     "\\boxed{7}", "definition", "\x00", "\n", "é", "\ud800"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(200)]
    rows = [{"id": i, "gold": "7", "greedy": True, **s._asdict()}
            for i, s in enumerate(score_batch(texts, ["7"] * 200))]
    rows[0]["format"] = "another"
    summary = summarize(rows)
    parts = summary["formats"].values()
    assert math.isclose(sum(part["share"] for part in parts), 1)
    assert math.isclose(summary["pass@1"], sum((p["accuracy"] or 0) * p["share"] for p in parts))
    assert "greedy another: share" in table({"": summary})


# ---------------------------------------------------------------- equality
def equality_cases() -> dict[str, list[str]]:
    """The lines of equality.txt by their kind: a prediction, == or !=, a gold answer."""
    text = Path(__file__).with_name("equality.txt").read_text("utf-8")
    _, *parts = re.split("^# (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], map(str.splitlines, parts[1::2])))


@pytest.mark.parametrize("kind", equality_cases())
def test_equality_accepts_what_is_equal_and_nothing_else(kind):
    cases = [re.split("  (==|!=)  ", line, maxsplit=1) for line in equality_cases()[kind]]
    assert [case for case in cases if equal(case[0], case[2]) != (case[1] == "==")] == []


@pytest.mark.parametrize("text", [
    "9^{9^{9^9}}", "10^{10^{10}}", "100000!", "(1+x)^{100000}", "\\binom{10^9}{10^8}", "{" * 10000,
    "(" * 400 + "1" + ")" * 400, "1," * 500, "\\frac" * 200, "\\pm" * 300, "9" * 10**6,
    "2^" * 300 + "2", "\\sqrt{" * 300, "1e999999999", "=" * 999, "\\begin{pmatrix}" * 60, "|" * 99,
    "1 " + "ä" * 90 + "!", "1 " + "äöüß " * 90 + "!", "1 " + "abcd. " * 90 + "!", "$" * 999 + "1",
    "-" * 999, "5" + "!" * 500, "\\text{" * 100, "0.\\overline{" + "3" * 900 + "}", "\x00",
])
def test_no_answer_is_too_large_to_compare(text):
    assert not equal(text, "7") and not equal("7", text) and canonical(text) == canonical(text)


@pytest.mark.parametrize("value, gold, right", [
    ("1 / 3", "\\frac{1}{3}", 1), ("51**0.5", "\\sqrt{51}", 1), ("[1 / 3, 0.5]", "1/2, 1/3", 1),
    ("0.1 + 0.2", "0.3", 1), ("60000.1", "60000", 0), ("10.0**10 + 1", "10000000000", 0),
    ("123456789012344.0", "123456789012345", 0), ("0.333", "1/3", 0)])
def test_floats_round_but_no_two_integers_are_equal(value, gold, right):
    assert score(CODE.format(f"result = {value}"), gold).reward == right
    assert not equal("0.333333333333", "1/3")  # what is written is exact


# ---------------------------------------------------------------- real data
@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "math500_test.json", "aime24.jsonl"])
def test_every_real_gold_equals_itself_boxed_and_no_other(shared, name):
    rows = [row for _, row in read_rows(shared / name)]
    golds = [gold_answer(row["answer"]) for row in rows]
    assert all(s.reward for s in score_batch([f"So \\boxed{{{g}}}." for g in golds], golds))
    assert not any(s.reward for s in score_batch([f"\\boxed{{{g} + 1}}" for g in golds], golds))
    if name.startswith("math500"):
        texts = [row["solution"] for row in rows]
        assert all(s.reward for s in score_batch(texts, golds))
        assert all(equal(gold_answer(text), gold) for text, gold in zip(texts, golds))


def render(question: str, answer: str, off: int) -> list[str]:
    """GSM8K's reference solution as each of the three authors would write it, wrong by `off`."""
    steps, final = answer.split("####")
    final = int(final.replace(",", "")) + off
    lines = [f"step_{i} = {expression}"
             for i, expression in enumerate(re.findall(r"<<([\d+*/(). -]+)=", steps))
             if not re.search(r"\b0\d", expression)]
    body = "\n    ".join([f'"""{question}"""', *lines, f"result = {final}"])
    code = "\n".join([*lines, f"result = {final}", "result"])
    return [CODE.format(body), f"<llm-code>\n{code}\n</llm-code>\nSo \\boxed{{{final}}}.",
            re.sub(r"<<.*?>>", "", steps) + f"\n\\boxed{{{final}}}"]


@pytest.mark.parametrize("off", [0, 1])
def test_every_gsm8k_solution_scores_in_all_formats_and_off_by_one_in_none(shared, off):
    rows = [row for _, row in read_rows(shared / "gsm8k_test.jsonl")]
    texts = [text for row in rows for text in render(row["question"], row["answer"], off)]
    golds = [gold_answer(row["answer"]) for row in rows for _ in range(3)]
    scores = score_batch(texts, golds, time_limit=60.0)
    assert [s.format for s in scores] == ["tinygsm", "omi1", "text"] * 1319
    assert {s.reward for s in scores} == {1.0 - off}


def test_cases_from_bug_reports_are_mostly_right_and_hardly_ever_accepted_wrongly(shared):
    file = shared.parent / "cases" / "verify_public.jsonl"
    if not file.exists():
        pytest.skip("the cases from bug reports are not beside this checkout")
    rows = [row for _, row in read_rows(file)]
    texts = [row.get("completion") or f"\\boxed{{{row['prediction']}}}" for row in rows]
    scores = score_batch(texts, [row["gold"] for row in rows], time_limit=60.0)
    found = [equal(row["prediction"], row["gold"]) if "prediction" in row else s.reward == 1
             for row, s in zip(rows, scores)]
    assert sum(f == row["expected"] for f, row in zip(found, rows)) >= 0.85 * len(rows)
    assert sum(f > row["expected"] for f, row in zip(found, rows)) <= 2


# ---------------------------------------------------------------- programs
@pytest.mark.parametrize("group, name", [(FUNCTIONS, "tinygsm"), (BLOCKS, "omi1"), (PROSE, "text")])
def test_honest_completions_of_many_styles_score_one(group, name):
    scores = score_batch([t for t, _ in group.values()], [gold for _, gold in group.values()], 60.0)
    assert {key: s for key, s in zip(group, scores) if (s.reward, s.format) != (1, name)} == {}


def test_hostile_completions_score_zero_leave_nothing_and_spare_the_next_program():
    texts = [text for hostile in HOSTILE.values() for text in (hostile, GOOD)]
    scores = score_batch(texts, ["42", "7"] * len(HOSTILE), time_limit=3.0)
    assert [n for n, s in zip(HOSTILE, scores[::2]) if s.reward or not s.failure] == []
    assert [n for n, s in zip(HOSTILE, scores[1::2]) if s.reward != 1] == []
    folders = [Path(name) for name in (".", "/tmp", "/dev/shm") if Path(name).is_dir()]
    assert [file for folder in folders for file in folder.glob(f"*{MARK}*")] == []


@pytest.mark.parametrize("name", POISON)
def test_a_program_leaves_nothing_behind_for_the_next(name):
    poison, honest, gold = POISON[name]
    scores = score_batch([poison, honest] * 2 + [honest], ["42", gold] * 2 + [gold], 60.0)
    assert [s.reward for s in scores] == [0, 1, 0, 1, 1]


def test_scores_are_right_from_a_thread_while_loops_run_elsewhere():
    """An alarm signal works on the main thread only; scoring elsewhere was silently 0 in verl."""
    found, texts = [], [GOOD, *[LOOP] * 9]
    thread = threading.Thread(target=lambda: found.extend(score_batch(texts, ["7"] * 10, 3.0)))
    thread.start()
    while thread.is_alive():
        assert score_batch([GOOD], ["7"], 60.0)[0].reward == 1
    assert [s.failure for s in found] == [None, *["timeout"] * 9]


def test_a_forked_child_is_told_to_be_spawned_and_a_spawned_one_scores():
    assert score(GOOD, "7").reward == 1
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        scores = pool.starmap(score_batch, [([GOOD], ["7"], 60.0), ([LOOP], ["7"])])
    assert [s.failure for (s,) in scores] == [None, "timeout"]
    with pytest.raises(RuntimeError, match="use spawn"):
        verify.interpreters(-1)  # as under another process id


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(verify.__file__).parent)!r})
import verify
assert verify.score({GOOD!r}, '7').reward == 1
print('ready', flush=True)
verify.score_batch([{LOOP!r}] * 4, ['7'] * 4)
"""


def workers(pid: int) -> list[int]:
    """The interpreters of a process, the busiest one last."""
    ps = subprocess.run(["ps", "-eo", "pcpu,pid,ppid,args"], capture_output=True, text=True)
    rows = [line.split() for line in ps.stdout.splitlines()[1:]]
    mine = [row for row in rows if int(row[2]) == pid and "monty" in row[3]]
    return [int(row[1]) for row in sorted(mine, key=lambda row: float(row[0]))]


@pytest.mark.skipif(sys.platform == "win32", reason="signals and ps")
@pytest.mark.parametrize("number", [None, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_survives_its_parent_however_it_ends(number):
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    parent.stdout.readline()
    left = workers(parent.pid)
    assert left
    if number:
        parent.send_signal(number)
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in left):  # until their time is over
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and ps")
def test_a_program_whose_worker_is_killed_from_outside_gets_another():
    count = CODE.format("n = 0\n    while n < 5_000_000: n += 1\n    result = n")
    found = [score(GOOD, "7")]  # a worker is there
    thread = threading.Thread(target=lambda: found.extend(score_batch([count], ["5000000"], 600.0)))
    thread.start()
    time.sleep(0.3)
    os.kill(workers(os.getpid())[-1], signal.SIGKILL)
    thread.join()
    assert [s.failure for s in found] == [None, None]


def test_whoever_is_interrupted_waits_for_no_program_that_has_not_begun(monkeypatch):
    began, slowly = count(), lambda *_: time.sleep(0.05) or ("7", "")
    monkeypatch.setattr(verify, "run_program", lambda *job: slowly() if next(began) else sys.exit())
    with pytest.raises(SystemExit):
        score_batch([GOOD] * 2000, ["7"] * 2000)
    assert next(began) < 2000


def test_without_the_interpreter_a_sentence_says_what_to_install():
    script = "import sys; sys.modules['pydantic_monty'] = None\n" + SCRIPT
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("pip install -r requirements.txt")


# ---------------------------------------------------------------- pass@k, maj@k, files
@pytest.mark.parametrize("n", range(1, 6))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n):
    for c, k in ((c, k) for c in range(n + 1) for k in range(1, n + 1)):
        draws = [any(draw) for draw in combinations([1] * c + [0] * (n - c), k)]
        assert math.isclose(pass_at_k(n, c, k), sum(draws) / len(draws), abs_tol=1e-12)
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(n, 1, n + 1)


def test_the_vote_goes_to_the_commonest_answer_and_a_tie_to_the_earliest():
    assert maj_at_k(["5", "7", "7.0"], "7") == 1.0 and maj_at_k(["7", "5", "5"], "7") == 0.0
    assert maj_at_k(["7", "5", "5", "7"], "7") == 1.0 and maj_at_k(["5", "7", "7", "5"], "7") == 0.0
    assert maj_at_k([None, None, "7"], "7") == 1.0 and maj_at_k([None], "7") == 0.0
    assert maj_at_k(["\\frac12", "1", "0.5"], "1/2") == 1.0  # one answer in three spellings


def test_questions_left_out_count_as_wrong_and_a_table_has_no_row_twice():
    rows = [{"id": "a", "gold": "7", "greedy": True, **score("\\boxed{7}", "7")._asdict()}]
    assert summarize(rows, n=4)["pass@1"] == 0.25
    sampled = [{**rows[0], "greedy": False}]
    for k, shown in ((0, rows), (1, rows + sampled), (2, rows + sampled * 2)):
        titles = [line.split("  ")[0] for line in table({"": summarize(shown)}).splitlines()]
        assert len(set(titles)) == len(titles) and ("maj@2" in titles) == (k == 2)
        assert "maj@0" not in titles and "maj@1" not in titles


def test_files_of_other_systems_are_read_line_by_line(tmp_path):
    good = '{"a": "x\u2028y\u0085z"}'.encode()
    lines = [good, b"", b'{"a": "caf\xe9"}', b"[" * 10**5, b"[1]", b'{"a": "c']
    data = b"\xef\xbb\xbf" + b"\r\n".join(lines)
    (tmp_path / "f.jsonl").write_bytes(data)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "f.json").write_text('[{"a": NaN}, 2]')
    for name in ("f.jsonl", "f.jsonl.gz"):
        rows = dict(read_rows(tmp_path / name))
        assert list(rows) == [1, 3, 4, 5, 6] and rows[1] == {"a": "x\u2028y\u0085z"}
        assert rows[3]["a"][:3] == "caf" and all("JSON" in rows[number] for number in (4, 5, 6))
    (first, one), (second, two) = read_rows(tmp_path / "f.json")
    assert (first, one, second) == (1, {"a": None}, 2) and "not a JSON object" in two
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "empty.json").write_bytes(b"[\n]")
    (tmp_path / "no.gz").write_bytes(b"no")
    for name in ("none.jsonl", "", "empty.jsonl", "empty.json", "no.gz"):
        with pytest.raises(ValueError, match="cannot be read|is empty"):
            list(read_rows(tmp_path / name))


def test_a_gold_answer_is_found_behind_hashes_in_the_last_box_or_as_it_is():
    assert gold_answer("so <<3+4=7>>7\n#### 7,000 ") == "7,000" and gold_answer(7) == "7"
    assert gold_answer("\\boxed{1} or \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert gold_answer("We find $x = 1/2$ or $x = 2$: our answer is $\\boxed 2$.") == "2"
    for value in (None, "", " ", "#### ", [7], {"a": 7}, True):
        with pytest.raises(ValueError, match="no answer in"):
            gold_answer(value)


def run_verify(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, verify.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_command_line_prints_the_table_and_names_bad_lines(tmp_path):
    """Questions that shared an id, or had none, were taken for one, and "false" for true."""
    file = tmp_path / "completions é.jsonl"
    rows = [{"id": wrong, "question": None, "problem": f"{gold}?", "gold": f"\\boxed{{{gold}}}",
             "completion": f"\\boxed{{{gold + wrong}}}"} for gold in (7, 8, 9) for wrong in (0, 1)]
    bad = ["{broken", '{"gold": 1}', "[1]", json.dumps({**rows[0], "greedy": "false"})]
    unnamed = json.dumps({"id": None, "completion": "7", "gold": 7, "greedy": True})
    file.write_text("\n".join([*map(json.dumps, rows), *bad, unnamed, unnamed]))
    done = run_verify(file, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "8 completions of 5 questions" in done.stdout
    assert "maj@2" in done.stdout and "pass@2" in done.stdout
    for words in ("{'wrong': 3, 'no answer': 2}", "4 lines passed over", "line 7: is not",
                  "line 8: needs completion (a text) and gold, and has gold",
                  "line 9: is not a JSON object", "line 10: greedy must be"):
        assert words in done.stdout
    if sys.platform != "win32":  # a pipe that closes is no reason to complain
        piped = f"{sys.executable} {verify.__file__} '{file}' | head -1"
        assert subprocess.run(piped, shell=True, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("arguments, hint", [
    (["none.jsonl"], "cannot be read"), ([], "usage"), (["a", "b"], "usage"), (["--help"], "usage"),
    ([os.devnull], "is empty"), ([__file__], "nothing that can be scored")])
def test_a_mistake_on_the_command_line_is_a_sentence_and_status_2(arguments, hint):
    done = run_verify(*arguments)
    assert done.returncode == 2 and hint in done.stderr and "Traceback" not in done.stderr
