"""Scores completions against gold answers: which format, which answer, right or wrong, and why
not.

    score("...\\\\boxed{18}", "18") -> Score(reward=1.0, format="text", answer="18", failure=None)
    python verify.py FILE.jsonl     scores the completions of any system (fields completion, gold)

Code that a model wrote runs in other processes: servers started by exec with an empty
environment, which fork a child for each handful of programs; the child has limits on memory,
files and processes, its programs pass a check of their syntax tree and see few builtins, and it
is killed from outside when a program takes too long. NOT covered: no system-call filter and no
network namespace stand behind these walls, and macOS ignores the limit on memory.
"""

import ast
import atexit
import builtins
import collections
import contextlib
import importlib
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

FORMATS = ("tinygsm", "omi1", "text")
TIME_LIMIT = 1.0  # seconds for one program
MEMORY_LIMIT = 512 << 20  # bytes of address space for one child
LONGEST_ANSWER = 1000  # characters
MODULES = ("math fractions decimal itertools functools collections statistics datetime re random "
           "string").split()  # fmt: skip


class Score(NamedTuple):
    reward: float  # 1 if the answer equals the gold, else 0
    format: str  # one of FORMATS: every completion has one
    answer: str | None
    failure: str | None  # None, "wrong", "no answer", "error", "timeout" or "blocked"


# ---------------------------------------------------------------- format and answer


def split_format(completion: str) -> tuple[str, str | None]:
    """The format of a completion, and the program in it (None in prose, "" where it breaks off)."""
    if "<llm-code>" in completion:
        blocks = re.findall(r"<llm-code>(.*?)(</llm-code>|\Z)", completion, re.DOTALL)
        whole = all(closing for _, closing in blocks)
        return "omi1", "\n".join(code.strip("\n") for code, _ in blocks) if whole else ""
    start = re.search(r"^(?:def \w+ *\(|def \w*\Z)", completion, re.MULTILINE)
    return ("tinygsm", cut_program(completion)) if start else ("text", None)


def cut_program(completion: str) -> str:
    """The lines of a program with functions: from the first statement up to the prose behind the
    last of them.
    """
    code_line = re.compile(r"(?:def|import|from|@|#|\w+ *=|print\(|\s|$)")
    lines = completion.split("\n")
    start = next(i for i, line in enumerate(lines) if re.match(r"(?:def|import|from) ", line))
    end = start
    while end < len(lines) and code_line.match(lines[end]):
        end += 1
    return "\n".join(lines[start:end])


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, braces nested; None where there is none or it
    is not closed.
    """
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def prose_answer(text: str) -> str | None:
    """The answer that prose states: the last box, else "####", else "The answer is"."""
    if (boxed := last_boxed(text)) is not None:
        return boxed
    stated = re.findall(r"(?:####|[Tt]he answer is:?) *(\S[^\n]*?)\.?(?=\n|$)", text)
    return stated[-1] if stated else None


# ---------------------------------------------------------------- equality


def normalize(answer: str) -> str:
    """An answer without what does not change its meaning: spacing, currency, percent, degrees, "x
    =".
    """
    text = answer[:LONGEST_ANSWER].strip()
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|,|!|;|:)|\\?[$%]|\^\{?\\circ\}?|~", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?:\\!)?(?=\d{3}(?!\d))", "", text)  # 1,234,567
    text = re.sub(r"^[a-zA-Z] *=(?!=)", "", text.strip())
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def rational(text: str) -> Fraction | None:
    """The exact value of a normalised integer, decimal, a/b or \\frac{a}{b}, units behind it;
    else None.
    """
    number = r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
    if match := re.fullmatch(rf"({number})(?: *[a-zA-Z]+)*", text):
        return Fraction(match[1])
    match = re.fullmatch(rf"(-?)\\frac\{{({number})\}}\{{({number})\}}", text)
    match = match or re.fullmatch(rf"()({number}) ?/ ?({number})", text)
    if match and Fraction(match[3]):
        return Fraction(match[2]) / Fraction(match[3]) * (-1 if match[1] else 1)
    return None


def canonical(answer: str):
    """What two equal answers have in common: an exact number, or a spelling."""
    text = normalize(answer)
    value = rational(text)
    return value if value is not None else text.replace(" ", "")


def equal(prediction: str, gold: str) -> bool:
    """Whether a predicted answer is the gold one: exactly as a number, else by spelling."""
    return canonical(prediction) == canonical(gold)


# ------------------------------------------------------------ running programs: the server's side


class Blocked(Exception):
    pass


def screen(tree: ast.AST) -> None:
    """Raises Blocked where a program reaches for what arithmetic does not need."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
            if any(name not in MODULES for name in names):
                raise Blocked(f"import of {', '.join(names)}")
        elif isinstance(node, ast.Attribute) and (
            node.attr.startswith("_") or not isinstance(node.ctx, ast.Load)
        ):
            raise Blocked(f"attribute {node.attr}")
        elif isinstance(node, ast.Name) and (node.id.startswith("__") or node.id in FORBIDDEN):
            raise Blocked(f"name {node.id}")


ALLOWED = """abs all any ascii bin bool chr complex dict divmod enumerate filter float format
    frozenset hash hex int isinstance issubclass iter len list map max min next oct ord pow print
    range repr reversed round set slice sorted str sum tuple zip True False None ArithmeticError
    AssertionError Exception IndexError KeyError StopIteration TypeError ValueError
    ZeroDivisionError __build_class__""".split()
FORBIDDEN = set(dir(builtins)) - set(ALLOWED)


def run_program(source: str, is_block: bool) -> tuple[str, str | None]:
    """(failure or "", answer) of a program: a function's result, or a block's last expression or
    print.
    """
    printed = []
    safe = {name: getattr(builtins, name) for name in ALLOWED}
    safe["__import__"] = lambda name, *rest: importlib.import_module(
        name
    )  # screened, and loaded already
    safe["print"] = lambda *values, **rest: printed.__setitem__(slice(None), values)
    namespace = {"__builtins__": safe, "__name__": "program"}
    try:
        tree = ast.parse(source)
        screen(tree)
        last = (
            tree.body.pop()
            if is_block and tree.body and isinstance(tree.body[-1], ast.Expr)
            else None
        )
        exec(compile(tree, "program", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "program", "eval"), namespace)
        elif not is_block:
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            value = namespace[
                "simple_math_problem" if "simple_math_problem" in functions else functions[-1]
            ]()
        if is_block and (last is None or value is None):
            value = printed[-1] if printed else None
        return "", plain(value)
    except Blocked:
        return "blocked", None
    except BaseException:  # whatever the program raises, SystemExit too, is its own failure
        return "error", None


def plain(value) -> str | None:
    """A value of an exact built-in type as a string: no method of a class of the program's own is
    called.
    """
    if value is None:
        return None
    if type(value) is float:
        return f"{value:.12g}"  # 0.1 + 0.2 is 0.3
    if type(value) in (int, str, Fraction, Decimal):
        return str(value)[:LONGEST_ANSWER]
    raise TypeError(f"a {type(value).__name__} is not an answer")


def child(programs: list, out: int) -> None:
    """Runs programs one after the other under limits, and writes a line for each."""
    import resource

    limits = {resource.RLIMIT_AS: MEMORY_LIMIT, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0,
              resource.RLIMIT_NOFILE: out + 1, resource.RLIMIT_CORE: 0}  # fmt: skip
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # what a system does not have
            resource.setrlimit(kind, (value, value))
    os.closerange(0, out)
    sys.setrecursionlimit(500)
    for source, is_block in programs:
        os.write(out, json.dumps(run_program(source, is_block)).encode() + b"\n")


def run_programs(programs: list) -> list:
    """The results of programs. One that takes too long, or kills its child, fails alone: the rest
    goes on.
    """
    results = []
    while len(results) < len(programs):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                child(programs[len(results) :], write)
            os._exit(0)
        os.close(write)
        failure = collect(read, programs, results)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        if len(results) < len(programs):
            results.append((failure, None))
    return results


def collect(read: int, programs: list, results: list) -> str:
    """Appends lines from a child to results until all are there, it died ("error") or it is late
    ("timeout").
    """
    rest = b""
    while len(results) < len(programs):
        if not select.select([read], [], [], TIME_LIMIT)[0]:
            return "timeout"
        data = os.read(read, 1 << 16)
        if not data:
            return "error"
        *lines, rest = (rest + data).split(b"\n")
        results.extend(json.loads(line) for line in lines)
    return ""


def serve() -> None:
    """A server: answers each line of programs on stdin with a line of results, until stdin ends."""
    for module in (
        *MODULES,
        "resource",
        "unicodedata",
    ):  # compiling an accented name needs unicodedata
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        results = json.dumps(run_programs(json.loads(line)))
        sys.stdout.buffer.write(results.encode() + b"\n")
        sys.stdout.buffer.flush()


# ------------------------------------------------------------ running programs: the caller's side


class Server:
    """A process of this file's serve(), replaced when it breaks."""

    def __init__(self):
        self.process, self.folder = None, tempfile.mkdtemp(prefix="verify-")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), "--serve"], env={},
            cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def run(self, programs: list) -> list:
        """The results of programs; a server that breaks is replaced, and they get a second
        chance.
        """
        for _ in range(2):
            if self.process is None:
                self.start()
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(json.dumps(programs).encode() + b"\n")
                self.process.stdin.flush()
                wall = 10 + len(programs) * (TIME_LIMIT + 1)
                if select.select([self.process.stdout], [], [], wall)[0]:
                    results = json.loads(self.process.stdout.readline())
                    if len(results) == len(programs):
                        return results
            self.stop()
        return [("error", None)] * len(programs)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # what was not flushed has nowhere to go
                    pipe.close()
            self.process = None

    def close(self) -> None:
        self.stop()
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)


@lru_cache
def servers(pid: int) -> queue.Queue:
    """The idle servers of process `pid`, one for each core of a rank; a fork gets servers of its
    own.
    """
    idle = queue.Queue()
    for _ in range(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))):
        server = Server()
        atexit.register(lambda server=server: os.getpid() == pid and server.close())
        idle.put(server)
    return idle


def run_all(programs: list[tuple[str, bool]]) -> list:
    """The results of (source, is_block) programs, spread over the servers; safe from any thread."""
    idle = servers(os.getpid())

    def run(part):
        server = idle.get()
        try:
            return server.run(part)
        finally:
            idle.put(server)

    parts = [programs[i : i + 32] for i in range(0, len(programs), 32)]
    with ThreadPoolExecutor(max(1, min(len(parts), os.cpu_count() or 1))) as threads:
        return [result for part in threads.map(run, parts) for result in part]


# ---------------------------------------------------------------- scores


def score(completion: str, gold: str) -> Score:
    """The score of one completion."""
    return score_batch([completion], [gold])[0]


def score_batch(completions: list[str], golds: list[str]) -> list[Score]:
    """The score of each completion against its gold; programs run side by side."""
    if len(completions) != len(golds):
        raise ValueError(f"{len(completions)} completions, {len(golds)} golds")
    split = [split_format(text) for text in completions]
    programs = [(code, name == "omi1") for name, code in split if code]
    ran = iter(run_all(programs))
    scores = []
    for text, gold, (name, code) in zip(completions, golds, split):
        failure, answer = ("", None) if code is None else next(ran) if code else ("error", None)
        if (
            answer is None and not failure and name != "tinygsm"
        ):  # prose, or a block that shows no value
            answer = prose_answer(text)
        reward = float(answer is not None and equal(answer, str(gold)))
        failure = failure or (None if reward else "no answer" if answer is None else "wrong")
        scores.append(Score(reward, name, answer, failure))
    return scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) /
    C(n, k).

    The unbiased estimator of arXiv 2107.03374, equation 1. Raises ValueError unless 0 <= c <= n
    and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: list[str | None], gold: str) -> float:
    """1 if the commonest answer is the gold one, else 0. None does not vote; a tie goes to the
    earliest.
    """
    votes = collections.Counter(canonical(answer) for answer in answers if answer is not None)
    return float(bool(votes) and votes.most_common(1)[0][0] == canonical(gold))


# ---------------------------------------------------------------- summary and table


def shares(rows: list[dict]) -> dict:
    """For each format: its share of rows, and its accuracy (None where it does not occur)."""
    by_format = {name: [row["reward"] for row in rows if row["format"] == name] for name in FORMATS}
    return {name: {"share": len(rewards) / max(1, len(rows)),
                   "accuracy": sum(rewards) / len(rewards) if rewards else None}
            for name, rewards in by_format.items()}  # fmt: skip


def summarize(rows: list[dict], n: int | None = None) -> dict:
    """Metrics of scored rows (id, gold, format, answer, reward, failure, greedy) of n questions.

    Greedy rows give pass@1 and formats; the others sampled_formats, pass@k and maj@k, k of them a
    question. Questions without rows, such as those too long for the context, count as wrong where
    n counts them.
    """
    greedy = [row for row in rows if row["greedy"]]
    sampled = collections.defaultdict(list)
    for row in rows:
        if not row["greedy"]:
            sampled[row["id"]].append(row)
    n = n or len({row["id"] for row in rows})
    k = min(map(len, sampled.values()), default=0)
    summary = {
        "n": n,
        "pass@1": sum(row["reward"] for row in greedy) / n if greedy else None,
        "k": k,
    }
    if k:
        correct = [sum(row["reward"] for row in group) for group in sampled.values()]
        draws = [pass_at_k(len(group), int(c), k) for group, c in zip(sampled.values(), correct)]
        votes = [
            maj_at_k([row["answer"] for row in group[:k]], group[0]["gold"])
            for group in sampled.values()
        ]
        summary["pass@k"], summary["maj@k"] = sum(draws) / n, sum(votes) / n
        summary["sampled_pass@1"] = sum(c / len(g) for c, g in zip(correct, sampled.values())) / n
    summary["formats"] = shares(greedy)
    summary["sampled_formats"] = shares([row for group in sampled.values() for row in group])
    summary["failures"] = dict(
        collections.Counter(row["failure"] for row in rows if row["failure"])
    )
    return summary


def interval(share: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a share of n independent trials (Wilson 1927)."""
    z = 1.96
    center, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def table(columns: dict[str, dict]) -> str:
    """Summaries side by side: percent with 95% intervals over the questions, then each format."""
    lines = [[""] + list(columns)]
    for name in ("pass@1", "sampled_pass@1", "maj@k", "pass@k"):
        cells = [percent(s.get(name), s["n"]) for s in columns.values()]
        k = next((s["k"] for s in columns.values() if s["k"]), 0)
        lines.append([name.replace("@k", f"@{k}").replace("_", " "), *cells])
    for group, title in (("formats", "greedy"), ("sampled_formats", "sampled")):
        for name in FORMATS:
            cells = [s[group][name] for s in columns.values()]
            shown = ["-" if c["accuracy"] is None else f"{c['accuracy']:.1%}" for c in cells]
            parts = [f"{c['share']:6.1%}, {accuracy:>6}" for c, accuracy in zip(cells, shown)]
            lines.append([f"{title} {name}: share, accuracy", *parts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines
    )


def percent(value: float | None, n: int) -> str:
    if value is None:
        return "     -"
    low, high = interval(value, n)
    return f"{value:6.1%} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------- command line


def read_completions(file: str) -> tuple[list[dict], list[str]]:
    """The rows of a .jsonl file that hold a completion and a gold, and a complaint for each line
    that does not.
    """
    rows, bad = [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append({**row, "completion": str(row["completion"]), "gold": str(row["gold"])})
            except (ValueError, TypeError, KeyError) as error:
                bad.append(f"line {number}: {type(error).__name__} {error}")
    return rows, bad


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python verify.py FILE.jsonl, a JSON object a line with completion and gold, "
              "and its id or question if there are several of one", file=sys.stderr)  # fmt: skip
        return 2
    try:
        rows, bad = read_completions(argv[0])
    except OSError as error:
        print(
            f"verify.py: {argv[0]} cannot be read ({error.strerror}): name a .jsonl file",
            file=sys.stderr,
        )
        return 2
    if not rows:
        print(
            f"verify.py: {argv[0]} holds no completion: each line needs completion and gold",
            file=sys.stderr,
        )
        return 2
    scores = score_batch([row["completion"] for row in rows], [row["gold"] for row in rows])
    for i, (row, result) in enumerate(zip(rows, scores)):
        row.setdefault("id", row.get("question", str(i)))
        row.setdefault("greedy", False)
        row.update(result._asdict())
    summary = summarize(rows)
    print(f"{len(rows)} completions of {summary['n']} questions in {argv[0]}, 95% intervals")
    print(table({"": summary}))
    print(
        "failures:", ", ".join(f"{n} {kind}" for kind, n in summary["failures"].items()) or "none"
    )
    if bad:
        print(f"{len(bad)} lines passed over:", *bad[:10], sep="\n  ")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main(sys.argv[1:]))
