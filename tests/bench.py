"""Measures speed, one table a command: `python tests/bench.py verify`.

Machines are noisy: compare the rows of one run, not runs.
"""

import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LOOP = "def simple_math_problem() -> int:\n    while True:\n        pass"
LATEX = [  # an answer and another spelling of it, for every n
    (r"\frac{N\sqrt{2}}{2}", r"\frac{N}{\sqrt{2}}"), (r"(x+N)^2 - N^2", r"x^2 + 2 \cdot N x"),
    (r"\left(N, \frac{\pi}{2}\right)", r"(N, \pi/2)"), (r"N\sqrt{13}", r"\sqrt{13 \cdot N^2}"),
    (r"(-\infty, N) \cup [N+3, \infty)", r"x < N \text{ or } x \ge N+3"),
    (r"N\frac{2}{3}", r"\frac{3 \cdot N + 2}{3}"),
    (r"\begin{pmatrix} N \\ \frac{1}{2} \end{pmatrix}", r"\begin{pmatrix}N\\0.5\end{pmatrix}"),
]  # fmt: skip


def print_table(title: str, rows: list[tuple]) -> None:
    """Rows of cells as text, the first row being the header."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    print(title)
    for row in rows:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)))


def bench_verify(count: int = 4096) -> None:
    """Completions a second through score_batch, by format, and what loops for ever cost a batch."""
    from hostile import CHEATS, CODE

    from data import toy
    from verify import score_batch

    stories, rng = list(itertools.islice(toy.problems("train", 0), count)), random.Random(0)
    golds = [str(story.values[-1]) for story in stories]
    rows = [("", "completions", "per second", "seconds", "right")]

    def measure(name: str, completions: list[str], golds: list[str]) -> None:
        began = time.perf_counter()
        right = sum(score.reward for score in score_batch(completions, golds))
        seconds = time.perf_counter() - began
        rows.append((name, len(completions), f"{len(completions) / seconds:,.0f}",
                     f"{seconds:.2f}", f"{right / len(completions):.1%}"))  # fmt: skip

    written = {write.__name__.removeprefix("write_"): [write(story, rng) for story in stories]
               for write in (toy.write_tinygsm, toy.write_omi1, toy.write_omi2)}  # fmt: skip
    score_batch(written["tinygsm"], golds)  # the servers have started
    for name, completions in written.items():
        measure(name, completions, golds)
    pairs = [[side.replace("N", str(n)) for side in LATEX[n % len(LATEX)]] for n in range(count)]
    measure("text, LaTeX", [f"So it is \\boxed{{{p}}}." for p, _ in pairs], [g for _, g in pairs])
    few = written["tinygsm"][:502]
    measure("tinygsm, 512", written["tinygsm"][:512], golds[:512])
    measure("tinygsm, 10 of 512 loop", [*few[:251], *[LOOP] * 10, *few[251:]],
            [*golds[:251], *["0"] * 10, *golds[251:502]])  # fmt: skip
    hostile = [*CODE.values(), *CHEATS.values()]
    measure("hostile, none that loops", hostile, ["42"] * len(hostile))
    print_table("completions scored by verify.py", rows)


BENCHES = {"verify": bench_verify}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in BENCHES:
        BENCHES[sys.argv[1]]()
    else:
        sys.exit(f"usage: python tests/bench.py {'|'.join(BENCHES)}")
