import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations
from pathlib import Path

import pytest
from hostile import CODE as CODE_SUITE
from hostile import HOSTILE, MARK, POISON
from honest import BLOCKS, FUNCTIONS, HONEST, PROSE

import verify
from verify import boxes, canonical, equal, maj_at_k, pass_at_k, score, score_batch, summarize

CODE = "def simple_math_problem() -> int:\n    {}\n    return result"
GOOD, LOOP = CODE.format("result = 7"), CODE.format("while True: pass")
BLOCK = "Let's see.\n<llm-code>\n{}\n</llm-code>\n<llm-code-output>\n7\n</llm-code-output>\nSo \\boxed{{7}}."
BOTH_WALLS = pytest.mark.skipif(sys.platform != "linux", reason="the second wall needs Linux")

# ---------------------------------------------------------------- format and answer


@pytest.mark.parametrize("completion, name, answer, failure", [
    (CODE.format("result = 3 + 4"), "tinygsm", "7", None),
    (CODE.format('"""\n    A docstring with \\boxed{9}.\n    """\n    result = 14 // 2'), "tinygsm", "7", None),
    ("import math\n\ndef helper(x):\n    return math.floor(x)\n\n" + CODE.format("result = helper(7.9)"), "tinygsm", "7", None),
    ("def f():\n    return 7.0\n\nSo the answer is 9.", "tinygsm", "7", None),
    ("def f():\n    return 0.1 + 6.9", "tinygsm", "7", None),
    ("def f():\n    return 7\n\nQuestion: and how many tomorrow?\n\ndef f():\n    return 8", "tinygsm", "7", None),
    ("def f():\n    return 6", "tinygsm", "6", "wrong"),
    ("def f():\n    pass", "tinygsm", None, "no answer"),
    ("def f():\n    return (", "tinygsm", None, "error"),
    ("def simple_math", "tinygsm", None, "error"),
    ("def f():\n    return [7]", "tinygsm", "\\{7\\}", None),
    ("def f():\n    return print", "tinygsm", None, "error"),
    ("def f():\n    return open('7')", "tinygsm", None, "blocked"),
    (BLOCK.format("a = 3\na + 4"), "omi1", "7", None),
    (BLOCK.format("print(2)\nprint(3 + 4)"), "omi1", "7", None),
    (BLOCK.format("print('The answer is', 8)"), "omi1", "7", None),  # a sentence is no value
    (BLOCK.format("a = 3"), "omi1", "7", None),  # no value in the code: the closing box
    (BLOCK.format("a = 3\na + 5"), "omi1", "8", "wrong"),  # what the code says, not what is claimed
    (BLOCK.format("a = 3\na +"), "omi1", None, "error"),
    ("<llm-code>\n7", "omi1", None, "error"),
    ("By definition of f: def is a word. The answer is \\boxed{\\text{7}}.", "text", "\\text{7}", None),
    ("3 + 4 = 7\n#### 7", "text", "7", None),
    ("The answer is 7.", "text", "7", None),
    ("\\boxed{6} no, \\boxed{7}", "text", "7", None),
    ("\\boxed{7}\n\nHow many are eight?\n\n\\boxed{8}", "text", "7", None),  # another problem
    ("\\boxed{5} \\boxed{6} \\boxed{7}", "text", None, "blocked"),  # one answer, not a list
    ("It is 7", "text", None, "no answer"),
    ("", "text", None, "no answer"),
])  # fmt: skip
def test_every_completion_has_a_format_an_answer_and_a_reason(completion, name, answer, failure):
    assert score(completion, "7") == (float(failure is None), name, answer, failure)


def test_the_last_number_of_prose_counts_only_where_the_task_allows_it():
    assert score_batch(["It is 1,007 eggs."], ["1007"])[0].failure == "no answer"
    assert score_batch(["It is 1,007 eggs."], ["1007"], last_number=True)[0].reward == 1


def test_nested_braces_and_unclosed_boxes():
    assert boxes("a \\boxed{\\frac{1}{2}} b \\fbox {3}") == ["\\frac{1}{2}", "3"]
    assert boxes("\\boxed{3} and \\boxed{4") == ["3"] and boxes("none") == []
    assert boxes("\\boxed{" * 10**5) == [] and boxes("\\boxed{\\boxed{3}}") == ["\\boxed{3}"]


def test_shares_sum_to_one_whatever_the_completions():
    rng = random.Random(0)
    pieces = ["def f():\n", "    return 7", "<llm-code>", "</llm-code>", "\\boxed{7}", "definition",
              "\x00", "\n", "é", "\ud800"]  # fmt: skip
    completions = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(200)]
    rows = [{"id": str(i), "gold": "7", "greedy": True, **s._asdict()}
            for i, s in enumerate(score_batch(completions, ["7"] * 200))]  # fmt: skip
    summary = summarize(rows)
    parts = summary["formats"].values()
    assert math.isclose(sum(part["share"] for part in parts), 1)
    assert math.isclose(summary["pass@1"], sum((p["accuracy"] or 0) * p["share"] for p in parts))


# ---------------------------------------------------------------- equality


def equality_cases() -> dict[str, list[tuple[str, bool, str]]]:
    """Cases of equality.txt by their kind: prediction, whether it is right, gold."""
    cases, kind = {}, ""
    for line in Path(__file__).with_name("equality.txt").read_text("utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line:
            prediction, sign, gold = re.split("  (==|!=)  ", line, maxsplit=1)
            cases.setdefault(kind, []).append((prediction, sign == "==", gold))
    return cases


@pytest.mark.parametrize("kind", equality_cases())
def test_equality_accepts_what_is_equal_and_nothing_else(kind):
    cases = equality_cases()[kind]
    false_rejects = [(p, g) for p, right, g in cases if right and not equal(p, g)]
    false_accepts = [(p, g) for p, right, g in cases if not right and equal(p, g)]
    assert not false_rejects and not false_accepts


def test_the_table_of_equality_has_many_cases_of_both_kinds():
    cases = [case for group in equality_cases().values() for case in group]
    right = sum(case[1] for case in cases)
    assert len(cases) >= 400 and right >= 150 and len(cases) - right >= 150


@pytest.mark.parametrize("text", [
    "9^{9^{9^9}}", "10^{10^{10}}", "100000!", "(1+x)^{100000}", "\\binom{10^9}{10^8}", "{" * 10000,
    "(" * 400 + "1" + ")" * 400, "[(" * 200, "1," * 500, "\\frac" * 200, "\\pm" * 300, "9" * 10**6,
    "2^" * 300 + "2", "+".join(f"1/{n}" for n in range(900, 1100)), "\\sqrt{" * 300, "1e999999999",
    "x" * 999, "=" * 999, "\\begin{pmatrix}" * 60, "|" * 500, "-" * 999, "!" * 500 + "5", "5" + "!" * 500,
    "\\text{" * 100, "0.\\overline{" + "3" * 900 + "}", "\\sin" * 200, "٣", "\x00", "\ud800",
])  # fmt: skip
def test_no_answer_is_too_large_to_compare(text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not equal(text, "7") and not equal("7", text) and canonical(text) == canonical(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_prediction_is_never_evaluated_as_python(tmp_path):
    mark = tmp_path / "mark"
    assert not equal(f"__import__('pathlib').Path('{mark}').touch()", "7")
    assert score(f"\\boxed{{exec('open(\"{mark}\", \"w\")')}}", "7").reward == 0
    assert not mark.exists()


def test_prediction_and_gold_are_not_interchangeable():
    """Math-Verify#25: swapped arguments. A prediction may be an equation that ends in the gold
    number; a gold that is an equation is not answered by a number that it happens to end in.
    """
    assert equal("a + b = 5", "5") and not equal("5", "a + b = 5")
    assert score("\\boxed{a + b = 5}", "5").reward == 1
    assert score("\\boxed{5}", "a + b = 5").reward == 0


def test_what_code_computed_in_floats_may_round_what_is_written_may_not():
    third = CODE.format("result = 1 / 3")
    assert score(third, "\\frac{1}{3}").reward == 1
    assert score("\\boxed{0.333333333333}", "\\frac{1}{3}").reward == 0
    assert score(CODE.format("result = 60000.1"), "60000").reward == 0


def test_equality_is_right_from_many_threads_at_once():
    found = []
    pairs = [(f"\\frac{{{n}\\sqrt{{2}}}}{{2}}", f"\\frac{{{n}}}{{\\sqrt2}}") for n in range(1, 60)]
    work = lambda: found.extend(equal(*pair) for pair in pairs)  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(found) == 8 * len(pairs) and all(found)


# ---------------------------------------------------------------- real golds


def golds_of(file: Path) -> list[str]:
    from data.tasks import load_questions

    return [q.gold for q in load_questions("gsm8k", "test", file=str(file))]


@pytest.mark.parametrize("file", ["gsm8k_test.jsonl", "math500_test.json", "aime24.jsonl"])
def test_every_real_gold_equals_itself_boxed_and_no_other(shared, file):
    golds = golds_of(shared / file)
    assert all(s.reward == 1 for s in score_batch([f"So \\boxed{{{g}}}." for g in golds], golds))
    assert not any(s.reward for s in score_batch([f"\\boxed{{{g} + 1}}" for g in golds], golds))


def test_every_reference_solution_of_math500_scores_one(shared):
    rows = json.loads((shared / "math500_test.json").read_text())
    scores = score_batch([row["solution"] for row in rows], [row["answer"] for row in rows])
    assert [row["answer"] for row, s in zip(rows, scores) if s.reward != 1] == []


def render(question: str, answer: str, off: int) -> list[str]:
    """GSM8K's reference solution as each of the three authors would write it, wrong by `off`."""
    steps, final = answer.split("####")
    final = int(final.replace(",", "")) + off
    lines = [f"step_{i} = {expression}"
             for i, expression in enumerate(re.findall(r"<<([\d+*/(). -]+)=", steps))
             if not re.search(r"\b0\d", expression)]  # fmt: skip
    body = "\n    ".join([f'"""{question}"""', *lines, f"result = {final}"])
    code = "\n".join([*lines, f"result = {final}", "result"])
    prose = re.sub(r"<<.*?>>", "", steps)
    return [CODE.format(body), f"<llm-code>\n{code}\n</llm-code>\n<llm-code-output>\n{final}\n"
            f"</llm-code-output>\nThe answer is \\boxed{{{final}}}.", f"{prose}\n\\boxed{{{final}}}"]  # fmt: skip


@pytest.mark.parametrize("off", [0, 1])
def test_every_gsm8k_solution_scores_in_all_formats_and_off_by_one_in_none(shared, off):
    rows = [json.loads(line) for line in open(shared / "gsm8k_test.jsonl")]
    assert len(rows) == 1319
    completions = [text for row in rows for text in render(row["question"], row["answer"], off)]
    golds = [row["answer"].split("####")[1].strip() for row in rows for _ in range(3)]
    scores = score_batch(completions, golds)
    assert [s.format for s in scores] == ["tinygsm", "omi1", "text"] * len(rows)
    wrong = [(c, s) for c, s in zip(completions, scores) if s.reward != (off == 0)]
    assert wrong == []


# ---------------------------------------------------------------- programs, honest and hostile


@pytest.mark.parametrize("group, name", [(FUNCTIONS, "tinygsm"), (BLOCKS, "omi1"), (PROSE, "text")])
def test_honest_completions_of_many_styles_score_one(group, name):
    scores = score_batch([text for text, _ in group.values()], [gold for _, gold in group.values()])
    failed = {key: s for key, s in zip(group, scores) if (s.reward, s.format) != (1, name)}
    assert failed == {} and len(HONEST) >= 100


def leftovers() -> tuple[set, set]:
    """Processes that this one has started, and files with the mark of the hostile programs."""
    folders = [Path(name) for name in (".", "/tmp", "/dev/shm") if Path(name).is_dir()]
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    family, grown = {os.getpid()}, True
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    while grown:
        more = {pid for pid, parent in pairs if parent in family} - family
        family, grown = family | more, bool(more)
    alive = {pid for pid in family if Path(f"/proc/{pid}/cmdline").exists()}
    return alive, {file for folder in folders for file in folder.glob(f"*{MARK}*")}


def test_hostile_completions_score_zero_leave_nothing_and_spare_the_next_program():
    score_batch([GOOD] * 64, ["7"] * 64)  # all servers have started
    alive, _ = leftovers()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    completions = [text for hostile in HOSTILE.values() for text in (hostile, GOOD)]
    scores = score_batch(completions, ["42", "7"] * len(HOSTILE), time_limit=0.5)
    rewarded = [name for name, s in zip(HOSTILE, scores[::2]) if s.reward or not s.failure]
    harmed = [name for name, s in zip(HOSTILE, scores[1::2]) if s.reward != 1]
    assert rewarded == [] and harmed == [] and len(HOSTILE) >= 80
    after, files = leftovers()
    assert len(after) <= len(alive) and files == set()  # a broken server may have been replaced
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB


@pytest.mark.parametrize("name", POISON)
def test_a_program_leaves_nothing_behind_for_the_next(name):
    poison, honest, gold = POISON[name]
    scores = score_batch([poison, honest] * 2 + [honest], ["42", gold] * 2 + [gold])
    assert [s.reward for s in scores] == [0, 1, 0, 1, 1]


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
    ("result = print", "error"),
])  # fmt: skip
def test_a_failure_has_its_name(body, failure):
    scores = score_batch([GOOD, CODE.format(body), GOOD], ["7"] * 3, time_limit=0.5)
    assert [s.failure for s in scores] == [None, failure, None]


def test_the_first_wall_stands_without_the_second(monkeypatch):
    """What reaches out of arithmetic is refused by the syntax and by what a program can see of the
    modules, where the kernel refuses nothing.
    """
    monkeypatch.setattr(verify, "close_the_wall", lambda out, seconds: None)
    monkeypatch.setattr(verify.select, "select", without_stdin(verify.select.select))
    verify.load_sympy()
    code = {name: verify.split_format(text)[1] for name, text in CODE_SUITE.items()
            if "kill" not in name}  # fmt: skip
    results = verify.run_programs([(source, False) for source in code.values()], 1.0)
    assert {name: r for name, r in zip(code, results) if r[0] == "" and r[1] == "42"} == {}


BEHIND_THE_WALL = """
import ctypes, os, socket, sys, time
sys.path.insert(0, {folder!r})
import verify
verify.close_the_wall(1, 2)
for name, attempt in dict(
    open=lambda: open("/etc/passwd"), write=lambda: open("/tmp/{mark}", "w"), fork=os.fork,
    socket=socket.socket, kill=lambda: os.kill(os.getppid(), 0), sleep=lambda: time.sleep(9),
    execute=lambda: os.execv("/bin/true", ["true"]), folder=lambda: os.mkdir("/tmp/{mark}"),
    memory=lambda: bytearray(1 << 30), trace=lambda: ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0 or open("/"),
).items():
    try:
        attempt()
        print(name, "went through")
    except (OSError, MemoryError) as error:
        print(name, type(error).__name__)
print(sum(range(10**5)))
"""


@BOTH_WALLS
def test_the_second_wall_stands_without_the_first():
    """What the kernel refuses to code that no syntax check has seen."""
    script = BEHIND_THE_WALL.format(folder=str(Path(verify.__file__).parent), mark=MARK)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    *refused, total = done.stdout.splitlines()
    assert len(refused) == 10 and total == "4999950000", done
    assert not [line for line in refused if "went through" in line]


def test_loops_for_ever_run_side_by_side(monkeypatch):
    """Each of ten loops gets its time, and all of them together no more than one of them: while
    the first waits for its end, the others are started.
    """
    alive, started = [], []

    class Watched(verify.Child):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.append(self)
            started.append(len(alive))

        def end(self):
            super().end()
            alive.remove(self)

    monkeypatch.setattr(verify, "Child", Watched)
    monkeypatch.setattr(verify.select, "select", without_stdin(verify.select.select))
    programs = [("def f():\n    while True: pass", False), ("def f():\n    return 7", False)] * 10
    results = verify.run_programs(programs, 1.0)
    assert [failure for failure, *_ in results] == ["timeout", ""] * 10
    assert max(started) >= 4 and alive == []


def without_stdin(select):
    """The server's select, for a test that has no caller at its standard input."""
    return lambda readable, *rest: select([fd for fd in readable if fd != 0], *rest)


def test_programs_that_are_slow_one_after_the_other_are_not_out_of_time():
    """Together they need more processor time than one of them may have."""
    slow = "def f():\n    n = 0\n    for i in range(1_000_000):\n        n += 1\n    return n"
    assert [s.failure for s in score_batch([slow] * 140, ["1000000"] * 140)] == [None] * 140


def test_a_machine_that_is_busy_elsewhere_is_no_time_out(monkeypatch):
    """A program that has had no processor time by its time limit is given more of it."""
    monkeypatch.setattr(verify.select, "select", without_stdin(verify.select.select))
    began = verify.Child([0], [("def f():\n    return 7", False)], 0.2)
    began.began -= 0.5  # half a second ago by the clock
    monkeypatch.setattr(began, "cpu_seconds", lambda: 0.0)
    assert not began.late(0.2)
    monkeypatch.setattr(began, "cpu_seconds", lambda: 0.1)
    assert began.late(0.2)
    began.end()


# ---------------------------------------------------------------- the servers


@BOTH_WALLS
def test_servers_hold_no_environment_no_open_file_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "18")
    with open(tmp_path / "gold", "w") as gold:
        os.set_inheritable(gold.fileno(), True)
        server = verify.Server()
        assert server.run([("def f():\n    return 1", False)], 1.0) == [("", "1", False)]
        place = Path(f"/proc/{server.process.pid}")
        assert (place / "environ").read_bytes() == b""
        opened = [os.path.realpath(file) for file in (place / "fd").iterdir()]
        assert gold.name not in opened and len(opened) == 3
        assert os.readlink(place / "cwd").endswith("(deleted)")
        assert os.getsid(server.process.pid) == server.process.pid != os.getsid(0)
    server.stop()
    assert not place.exists()


def test_a_server_that_died_is_replaced():
    server, program = verify.Server(), [("def f():\n    return 1", False)]
    assert server.run(program, 1.0) == [("", "1", False)]
    server.process.kill()
    server.process.wait()
    assert server.run(program, 1.0) == [("", "1", False)]
    server.stop()


def test_an_interrupted_caller_reads_no_answer_of_an_earlier_question(monkeypatch):
    server = verify.Server()
    monkeypatch.setattr(server.process, "stdout", InterruptedOnce(server.process.stdout))
    with pytest.raises(KeyboardInterrupt):
        server.run([("def f():\n    return 1", False)], 1.0)
    assert server.run([("def f():\n    return 2", False)], 1.0) == [("", "2", False)]
    server.stop()


class InterruptedOnce:
    def __init__(self, pipe):
        self.pipe = pipe

    def readline(self):
        raise KeyboardInterrupt

    def close(self):
        self.pipe.close()


def test_scores_are_right_from_a_thread():
    """An alarm signal works on the main thread only; scoring elsewhere was silently 0 in verl."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(score_batch([GOOD, LOOP], ["7", "7"])))
    thread.start()
    while thread.is_alive():  # and scoring goes on here while a completion loops for ever there
        assert score(GOOD, "7").reward == 1
    assert [s.failure for s in found] == [None, "timeout"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_scores_are_right_in_a_child_process(method):
    assert score(GOOD, "7").reward == 1
    with multiprocessing.get_context(method).Pool(2) as pool:
        scores = pool.starmap(score, [(GOOD, "7"), (GOOD, "8"), (LOOP, "7")] * 2)
    assert [s.failure for s in scores] == [None, "wrong", "timeout"] * 2


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    children = [child for child, parent in pairs if parent == pid]
    return children + [deeper for child in children for deeper in descendants(child)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_survives_its_parent_however_it_ends(number):
    """Idle servers and busy ones: they notice that nobody asks any more."""
    script = (f"import sys; sys.path.insert(0, {str(Path(verify.__file__).parent)!r}); import verify\n"
              f"verify.score_batch([{GOOD!r}] * 64, ['7'] * 64); print('ready', flush=True)\n"
              f"verify.score_batch([{LOOP!r}] * 64, ['7'] * 64, time_limit=60.0)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    parent.stdout.readline()
    time.sleep(0.5)
    workers = descendants(parent.pid)
    assert len(workers) >= 2
    parent.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(0.5)
        parent.kill()  # it waits for its programs, as it should: 60 seconds of them
    parent.wait()
    deadline = time.monotonic() + 20
    while [pid for pid in workers if is_running(pid)] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in workers if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_ranks_of_torchrun_score_side_by_side(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(verify.__file__).parent)!r})\n"
                      "from verify import score_batch\n"
                      f"scores = score_batch([{GOOD!r}, {LOOP!r}] * 4, ['7'] * 8)\n"
                      "assert [s.failure for s in scores] == [None, 'timeout'] * 4\n")  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- pass@k, maj@k, the command line


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations([1] * c + [0] * (n - c), k)]
            assert math.isclose(pass_at_k(n, c, k), sum(draws) / len(draws), abs_tol=1e-12)


def test_pass_at_k_refuses_k_above_n():
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(3, 1, 4)


def test_the_vote_goes_to_the_commonest_answer_and_a_tie_to_the_earliest():
    assert maj_at_k(["5", "7", "7.0"], "7") == 1.0
    assert maj_at_k(["7", "5", "5"], "7") == 0.0
    assert maj_at_k(["7", "5", "5", "7"], "7") == 1.0
    assert maj_at_k(["5", "7", "7", "5"], "7") == 0.0
    assert maj_at_k([None, None, "7"], "7") == 1.0 and maj_at_k([None], "7") == 0.0
    assert maj_at_k(["\\frac12", "1", "0.5"], "1/2") == 1.0  # one answer in three spellings


def test_questions_left_out_count_as_wrong():
    rows = [{"id": "a", "gold": "7", "greedy": True, **score("\\boxed{7}", "7")._asdict()}]
    assert summarize(rows, n=4)["pass@1"] == 0.25


def run_verify(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, verify.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_prints_the_table_and_names_bad_lines(tmp_path):
    file = tmp_path / "completions.jsonl"
    rows = [{"id": i, "completion": f"\\boxed{{{7 + j}}}", "gold": 7}
            for i in range(3) for j in range(2)]  # fmt: skip
    file.write_text("\n".join([*map(json.dumps, rows), "{broken", '{"gold": 1}', "[1]"]))
    done = run_verify(file)
    assert done.returncode == 0 and "6 completions of 3 questions" in done.stdout
    assert "50.0%" in done.stdout and "pass@2" in done.stdout and "100.0%" in done.stdout
    assert "failures: 3 wrong" in done.stdout and "3 lines passed over" in done.stdout
    assert "line 7 is not" in done.stdout and "line 8 has no 'completion'" in done.stdout


@pytest.mark.parametrize("arguments, hint", [
    (["none.jsonl"], "cannot be read"), ([], "--help"), (["a", "b"], "--help"),
    (["--fast=1", "a"], "--fast"), (["a", "--time_limit=soon"], "number of seconds"),
    (["a", "--last_number=maybe"], "true or false"), ([os.devnull], "completion and gold"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(arguments, hint):
    done = run_verify(*arguments)
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1
