"""The embedded corpora: grade-school stories that need no network, each solved by three "authors".

A problem is a chain: a start and one to three operations on it (`toy-hard`: four to six), told by one of eight
story families. The authors write in the formats of the corpora that they stand for: toy-tinygsm a Python
function, toy-omi1 an <llm-code> block with its output, toy-omi2 prose. Everything is a function of its seed.
"""

import random
import zlib
from typing import Iterator, NamedTuple

# A family: the noun that is counted, how the story starts, a sentence for each operation, what is asked.
FAMILIES = (
    ("apples", "{name} has {n} apples.", "{name} picks {n} more.", "{name} eats {n}.",
     "A friend brings {n} times as many.", "Only 1 in {n} is ripe.", "How many apples are left?"),
    ("dollars", "{name} saves {n} dollars.", "{name} earns {n} more.", "A toy costs {n}.",
     "A bank makes it {n} times as much.", "It is split by {n} friends.", "How many dollars are left?"),
    ("pages", "{name} has to read {n} pages.", "The teacher adds {n}.", "{name} skips {n}.",
     "A new book is {n} times as long.", "It is read in {n} days.", "How many pages are read?"),
    ("eggs", "{name} finds {n} eggs.", "The hens lay {n} more.", "A fox takes {n}.",
     "A farm gives {n} times as many.", "They fill {n} equal boxes.", "How many eggs are counted?"),
    ("points", "{name} scores {n} points.", "A bonus gives {n}.", "A foul costs {n}.",
     "A level multiplies it by {n}.", "A team of {n} shares it.", "How many points are won?"),
    ("miles", "{name} drives {n} miles.", "A detour adds {n}.", "A short cut saves {n}.",
     "The trip is made {n} times.", "It is shared by {n} drivers.", "How many miles are driven?"),
    ("seats", "{name} owns a bus with {n} seats.", "A shop puts in {n}.", "A shop takes out {n}.",
     "There are {n} such buses.", "They are in {n} equal rows.", "How many seats are there?"),
    ("minutes", "{name} trains for {n} minutes.", "The coach adds {n}.", "Rain cuts off {n}.",
     "It is done on {n} days.", "It is cut into {n} equal parts.", "How many minutes are there?"),
)  # fmt: skip
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
LARGEST = 99  # no intermediate value exceeds it
AUTHORS = ("toy-tinygsm", "toy-omi1", "toy-omi2")


class Problem(NamedTuple):
    question: str
    name: str
    noun: str
    chain: tuple  # (("=", start), ("+", 5), ...): the operations, the start first
    values: tuple  # the running value after each of them; the last is the answer


def draw_chain(rng: random.Random, steps: int) -> tuple[tuple, tuple]:
    """A random chain of `steps` operations on whole numbers from 1 to LARGEST, and its running values."""
    value = rng.randint(2, 20)
    chain, values = [("=", value)], [value]
    while len(chain) <= steps:
        op = rng.choice("+-*/")
        n = rng.randint(2, 9) if op in "+-" else rng.randint(2, 4)
        if op == "/" and value % n:
            continue
        value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]
        if 1 <= value <= LARGEST:
            chain.append((op, n))
            values.append(value)
        else:
            value = values[-1]
    return tuple(chain), tuple(values)


def is_test(chain: tuple) -> bool:
    """Whether a chain is kept for testing: by its arithmetic alone, so no other wording of it is trained on."""
    return zlib.crc32(repr(chain).encode()) % 8 == 0


def problems(split: str, seed: int, steps: tuple[int, int] = (1, 3)) -> Iterator[Problem]:
    """An endless stream of problems of a split, "train" or "test", with between steps[0] and steps[1] steps."""
    rng = random.Random(f"{split} {seed} {steps}")
    while True:
        chain, values = draw_chain(rng, rng.randint(*steps))
        noun, *sentences, ask = rng.choice(FAMILIES)
        name = rng.choice(NAMES)
        if is_test(chain) == (split == "test"):
            told = [sentences["=+-*/".index(op)].format(name=name, n=n) for op, n in chain]
            yield Problem(" ".join((*told, ask)), name, noun, chain, values)


def write_tinygsm(problem: Problem, rng: random.Random) -> str:
    """A function that returns the answer, half of the time with a docstring."""
    noun, lines = problem.noun, ["def simple_math_problem() -> int:"]
    if rng.random() < 0.5:
        lines += ['    """', "    " + problem.question.rpartition(". ")[2], '    """']
    lines.append(f"    {noun} = {problem.chain[0][1]}")
    lines += [f"    {noun} = {noun} {'//' if op == '/' else op} {n}" for op, n in problem.chain[1:]]
    return "\n".join((*lines, f"    result = {noun}", "    return result"))


def write_omi1(problem: Problem, rng: random.Random) -> str:
    """An <llm-code> block that ends in the expression to print, its output, and a closing sentence."""
    opening = rng.choice(("Let's solve this problem using Python code.\n", ""))
    expression = str(problem.chain[0][1])
    for i, (op, n) in enumerate(problem.chain[1:]):
        inner = f"({expression})" if i and op in "*/" else expression  # precedence: only where it matters
        expression = f"{inner} {'//' if op == '/' else op} {n}"
    answer = problem.values[-1]
    return (f"{opening}<llm-code>\n{problem.noun} = {expression}\n{problem.noun}\n</llm-code>\n"
            f"<llm-code-output>\n{answer}\n</llm-code-output>\n"
            f"So the answer is \\boxed{{{answer}}} {problem.noun}.")  # fmt: skip


def write_omi2(problem: Problem, rng: random.Random) -> str:
    """Prose that computes one step at a time and boxes the answer."""
    signs = {"+": "+", "-": "-", "*": "\\times", "/": "\\div"}
    before, after = problem.values, problem.values[1:]
    steps = [f"{rng.choice(('Then', 'Next', 'Now'))} we get {a} {signs[op]} {n} = {b}."
             for a, (op, n), b in zip(before, problem.chain[1:], after)]  # fmt: skip
    opening = f"We start with {problem.values[0]} {problem.noun}."
    return " ".join((opening, *steps, f"The answer is \\boxed{{{after[-1]}}}."))


def corpus(name: str, documents: int = 9000) -> Iterator[str]:
    """The documents of toy-tinygsm, toy-omi1 or toy-omi2: question, blank line, solution."""
    write = dict(zip(AUTHORS, (write_tinygsm, write_omi1, write_omi2)))[name]
    rng = random.Random(name)
    for problem, _ in zip(problems("train", AUTHORS.index(name)), range(documents)):
        yield problem.question + "\n\n" + write(problem, rng)
