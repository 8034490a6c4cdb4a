import json
import math
import os
import random
import subprocess
import sys
import threading
from itertools import combinations
from pathlib import Path

import pytest

import verify
from verify import equal, last_boxed, maj_at_k, pass_at_k, score, score_batch, summarize

CODE = "def simple_math_problem() -> int:\n    {}\n    return result"
BLOCK = "Let's see.\n<llm-code>\n{}\n</llm-code>\n<llm-code-output>\n7\n</llm-code-output>\nSo \\boxed{{7}}."


@pytest.mark.parametrize("completion, name, answer, failure", [
    (CODE.format("result = 3 + 4"), "tinygsm", "7", None),
    (CODE.format('"""\n    A docstring with \\boxed{9}.\n    """\n    result = 14 // 2'), "tinygsm", "7", None),
    ("import math\n\ndef helper(x):\n    return math.floor(x)\n\n" + CODE.format("result = helper(7.9)"), "tinygsm", "7", None),
    ("def f():\n    return 7.0\n\nSo the answer is 9.", "tinygsm", "7", None),
    ("def f():\n    return 0.1 + 6.9", "tinygsm", "7", None),
    ("def f():\n    return 6", "tinygsm", "6", "wrong"),
    ("def f():\n    pass", "tinygsm", None, "no answer"),
    ("def f():\n    return (", "tinygsm", None, "error"),
    ("def simple_math", "tinygsm", None, "error"),
    ("def f():\n    return [7]", "tinygsm", None, "error"),
    (BLOCK.format("a = 3\na + 4"), "omi1", "7", None),
    (BLOCK.format("print(2)\nprint(3 + 4)"), "omi1", "7", None),
    (BLOCK.format("a = 3"), "omi1", "7", None),  # no value in the code: the box in the closing sentence
    (BLOCK.format("a = 3\na + 5"), "omi1", "8", "wrong"),  # the value of the code, not what the model claims
    (BLOCK.format("a = 3\na +"), "omi1", None, "error"),
    ("<llm-code>\n7", "omi1", None, "error"),
    ("By definition of f: def is a word. The answer is \\boxed{\\text{7}}.", "text", "\\text{7}", None),
    ("3 + 4 = 7\n#### 7", "text", "7", None),
    ("The answer is 7.", "text", "7", None),
    ("\\boxed{6} no, \\boxed{7}", "text", "7", None),
    ("It is 7", "text", None, "no answer"),
    ("", "text", None, "no answer"),
])  # fmt: skip
def test_every_completion_has_a_format_an_answer_and_a_reason(completion, name, answer, failure):
    assert score(completion, "7") == (float(failure is None), name, answer, failure)


@pytest.mark.parametrize("prediction, gold", [
    ("1,234", "1234"), ("$18", "18"), ("18.0", "18"), ("18.", "18"), ("0.5", "\\frac{1}{2}"), ("\\dfrac12", "1/2"),
    ("-\\frac{3}{4}", "-0.75"), ("25\\%", "25"), ("18 dollars", "18"), ("x = 5", "5"), ("90^\\circ", "90"),
    ("\\left(3, 4\\right)", "(3,4)"), ("\\text{Monday}", "Monday"), ("1e3", "1000"), (".5", "0.5"),
])  # fmt: skip
def test_spellings_of_the_same_answer_are_equal(prediction, gold):
    assert equal(prediction, gold) and equal(gold, prediction)


@pytest.mark.parametrize("prediction, gold", [
    ("60000", "59999"), ("7.14", "\\sqrt{51}"), ("8", "9"), ("(4,3)", "(3,4)"), ("1.0001", "1"), ("12", "1,2"),
    ("[1,2]", "(1,2)"), ("", "0"), ("-5", "5"), ("1/3", "0.3333"), ("10^9", "109"), ("1/0", "0"),
])  # fmt: skip
def test_different_answers_are_not_equal(prediction, gold):
    assert not equal(prediction, gold) and not equal(gold, prediction)


def test_nested_braces_and_unclosed_boxes():
    assert last_boxed("a \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{3} and \\boxed{4") is None and last_boxed("none") is None


@pytest.mark.parametrize("body, failure", [
    ("while True: pass", "timeout"),
    ("result = 9**9**9**9", "timeout"),
    ("result = 'a' * 10**11", "error"),
    ("result = simple_math_problem()", "error"),
    ("raise SystemExit(0)", "blocked"),
    ("raise Exception", "error"),
    ("import os; os._exit(0)", "blocked"),
    ("result = ().__class__.__bases__", "blocked"),
    ("result = open('/etc/passwd').read()", "blocked"),
    ("result = eval('7')", "blocked"),
    ("import math; math.sqrt = 7", "blocked"),
    ("class A(int):\n        def __eq__(self, o): return True\n    result = A(1)", "error"),
])  # fmt: skip
def test_hostile_programs_fail_alone_and_the_next_one_scores(body, failure):
    bad, good = CODE.format(body), CODE.format("result = 7")
    before, after = [score_batch([good, bad, good], ["7"] * 3) for _ in range(2)]
    assert before == after
    assert [s.failure for s in after] == [None, failure, None]


def test_a_loop_for_ever_does_not_hold_up_the_others():
    completions = [CODE.format("result = 7"), CODE.format("while True: pass")] * 2 + ["\\boxed{7}"]
    assert [s.reward for s in score_batch(completions, ["7"] * 5)] == [1, 0, 1, 0, 1]


def test_programs_never_run_in_this_process():
    seen = score("import random\ndef f():\n    return id(random)", "0")
    assert seen.failure == "blocked"  # id is not theirs to call
    assert (
        "model_was_here" not in sys.modules
        and score(CODE.format("result = print"), "0").failure == "error"
    )


def test_servers_hold_no_environment_and_no_open_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "18")
    server = verify.Server()
    with open(tmp_path / "gold", "w") as gold:
        server.run([["def f():\n    return 1", False]])
        pid = server.process.pid
        environment = Path(f"/proc/{pid}/environ")
        if not environment.exists():
            pytest.skip("this system has no /proc")
        assert environment.read_bytes() == b""
        opened = [os.path.realpath(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert gold.name not in opened
    server.close()
    assert not Path(f"/proc/{pid}").exists() and not os.path.exists(server.folder)


def test_a_server_that_died_is_replaced():
    server = verify.Server()
    program = [["def f():\n    return 1", False]]
    assert server.run(program) == [["", "1"]]
    server.process.kill()
    server.process.wait()
    assert server.run(program) == [["", "1"]]
    server.close()


def test_scores_are_right_from_a_thread():
    """An alarm signal works on the main thread only; scoring elsewhere was silently 0 in verl."""
    found = []
    completions = [CODE.format("result = 7"), CODE.format("while True: pass")]
    thread = threading.Thread(target=lambda: found.extend(score_batch(completions, ["7", "7"])))
    thread.start()
    thread.join()
    assert [s.failure for s in found] == [None, "timeout"]


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([1] * c + [0] * (n - c), k))
            assert math.isclose(
                pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12
            )


def test_pass_at_k_refuses_k_above_n():
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(3, 1, 4)


def test_the_vote_goes_to_the_commonest_answer_and_a_tie_to_the_earliest():
    assert maj_at_k(["5", "7", "7.0"], "7") == 1.0
    assert maj_at_k(["7", "5", "5"], "7") == 0.0
    assert maj_at_k(["7", "5", "5", "7"], "7") == 1.0
    assert maj_at_k(["5", "7", "7", "5"], "7") == 0.0
    assert maj_at_k([None, None, "7"], "7") == 1.0 and maj_at_k([None], "7") == 0.0


def test_shares_sum_to_one_whatever_the_completions():
    rng = random.Random(0)
    pieces = [
        "def f():\n",
        "    return 7",
        "<llm-code>",
        "</llm-code>",
        "\\boxed{7}",
        "definition",
        "\x00",
        "\n",
        "é",
    ]
    completions = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(200)]
    rows = [{"id": str(i), "gold": "7", "greedy": True, **s._asdict()}
            for i, s in enumerate(score_batch(completions, ["7"] * 200))]  # fmt: skip
    summary = summarize(rows)
    assert math.isclose(sum(part["share"] for part in summary["formats"].values()), 1)
    assert math.isclose(
        summary["pass@1"],
        sum((p["accuracy"] or 0) * p["share"] for p in summary["formats"].values()),
    )


def test_questions_left_out_count_as_wrong():
    rows = [{"id": "a", "gold": "7", "greedy": True, **score("\\boxed{7}", "7")._asdict()}]
    assert summarize(rows, n=4)["pass@1"] == 0.25


def test_the_command_line_prints_the_table_and_names_bad_lines(tmp_path):
    file = tmp_path / "completions.jsonl"
    rows = [
        {"id": i, "completion": f"\\boxed{{{7 + j}}}", "gold": 7}
        for i in range(3)
        for j in range(2)
    ]
    file.write_text("\n".join([*map(json.dumps, rows), "{broken", '{"gold": 1}']))
    run = [sys.executable, verify.__file__]
    done = subprocess.run([*run, str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and "50.0%" in done.stdout
    assert (
        "6 completions of 3 questions" in done.stdout
        and "pass@2" in done.stdout
        and "100.0%" in done.stdout
    )
    assert (
        "2 lines passed over" in done.stdout and "line 7" in done.stdout and "line 8" in done.stdout
    )
    missing = subprocess.run([*run, str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("file", ["gsm8k_test.jsonl", "math500_test.json", "aime24.jsonl"])
def test_every_real_gold_equals_itself_boxed_and_no_other(shared, file):
    from data.tasks import load_questions

    golds = [q.gold for q in load_questions("gsm8k", "test", file=str(shared / file))]
    scores = score_batch([f"So it is \\boxed{{{gold}}}." for gold in golds], golds)
    assert all(s.reward == 1 for s in scores)
    assert not any(
        s.reward for s in score_batch([f"\\boxed{{{gold} + 1}}" for gold in golds], golds)
    )
