"""The embedded corpora: grade-school stories that need no network, each solved by three
"authors".

A problem is a chain: a start and one to three operations on it (`toy-hard`: four to six), told by
one of eight story families. The authors write in the formats of the corpora that they stand for:
toy-tinygsm a Python function, toy-omi1 an <llm-code> block with its output, toy-omi2 prose.
Everything is a function of its seed.
"""

import itertools
import random
import zlib
from typing import Iterator, NamedTuple

# A family: the noun that is counted, how the story starts, a sentence for each operation, what is
# asked.
FAMILIES = (
    ("apples", "{name} has {n} apples.", "{name} picks {n} more.", "{name} eats {n}.",
     "A friend brings {n} times as many.", "Only 1 in {n} is ripe.", "How many apples are left?"),
    ("dollars", "{name} saves {n} dollars.", "{name} earns {n} more.", "A toy costs {n}.",
     "A bank makes it {n} times as much.", "It is split by {n} friends.",
     "How many dollars are left?"),
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
# Share of an author's documents in which a number is misread, so that the formats differ in
# accuracy by design.
SLIPS = {"toy-tinygsm": 0.0, "toy-omi1": 0.4, "toy-omi2": 0.5}


class Problem(NamedTuple):
    question: str
    noun: str
    chain: tuple  # (("=", start), ("+", 5), ...): the operations, the start first
    values: tuple  # the running value after each of them; the last is the answer


def draw_operand(rng: random.Random, op: str) -> int:
    return rng.randint(2, {"=": 20, "+": 9, "-": 9, "*": 4, "/": 4}[op])


def apply(op: str, value: int, n: int) -> int:
    return {"=": n, "+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]


def draw_chain(rng: random.Random, steps: int) -> tuple:
    """A random chain of a start and `steps` operations on whole numbers from 1 to LARGEST."""
    chain, value = [], 0
    while len(chain) <= steps:
        op = rng.choice("+-*/") if chain else "="
        n = draw_operand(rng, op)
        after = apply(op, value, n)
        if 1 <= after <= LARGEST and not (op == "/" and value % n):
            chain.append((op, n))
            value = after
    return tuple(chain)


def run_chain(chain: tuple) -> tuple:
    """The running value after each operation; the last is the answer."""
    values = [0]
    for op, n in chain:
        values.append(apply(op, values[-1], n))
    return tuple(values[1:])


def misread(problem: Problem, rng: random.Random) -> Problem:
    """The same story with one number of its chain drawn again: an author's slip."""
    place, chain = rng.randrange(len(problem.chain)), list(problem.chain)
    op, n = chain[place]
    while chain[place] == (op, n):
        chain[place] = op, draw_operand(rng, op)
    return problem._replace(chain=tuple(chain), values=run_chain(chain))


def is_test(chain: tuple) -> bool:
    """Whether a chain is kept for testing: by its arithmetic alone, so no other wording of it is
    trained on.
    """
    return zlib.crc32(repr(chain).encode()) % 8 == 0


def problems(split: str, seed: int, steps: tuple[int, int] = (1, 3)) -> Iterator[Problem]:
    """An endless stream of problems of a split, "train" or "test", of steps[0] to steps[1] steps.

    Each further step is half as frequent.
    """
    rng, lengths = random.Random(f"{split} {seed} {steps}"), range(steps[0], steps[1] + 1)
    while True:
        chain = draw_chain(rng, rng.choices(lengths, weights=[2.0**-n for n in lengths])[0])
        noun, *sentences, ask = rng.choice(FAMILIES)
        name = rng.choice(NAMES)
        if is_test(chain) == (split == "test"):
            told = [sentences["=+-*/".index(op)].format(name=name, n=n) for op, n in chain]
            yield Problem(" ".join((*told, ask)), noun, chain, run_chain(chain))


def write_code(problem: Problem) -> list[str]:
    """The chain as assignments to the noun, a line for each operation."""
    noun, (_, start) = problem.noun, problem.chain[0]
    steps = [f"{noun} = {noun} {'//' if op == '/' else op} {n}" for op, n in problem.chain[1:]]
    return [f"{noun} = {start}", *steps]


def write_tinygsm(problem: Problem, rng: random.Random) -> str:
    """A function that returns the answer, one time in four with the question as its docstring."""
    docstring = ['"""', problem.question, '"""'] if rng.random() < 0.25 else []
    body = (*docstring, *write_code(problem), f"result = {problem.noun}", "return result")
    return "\n    ".join(("def simple_math_problem() -> int:", *body))


def write_omi1(problem: Problem, rng: random.Random) -> str:
    """An <llm-code> block that ends in the expression to print, its output, and a closing
    sentence.
    """
    opening = rng.choice(("Let's solve this problem using Python code.\n", ""))
    code = "\n".join((*write_code(problem), problem.noun))
    answer = problem.values[-1]
    return (
        f"{opening}<llm-code>\n{code}\n</llm-code>\n"
        f"<llm-code-output>\n{answer}\n</llm-code-output>\n"
        f"So the answer is \\boxed{{{answer}}} {problem.noun}."
    )


def write_omi2(problem: Problem, rng: random.Random) -> str:
    """Prose that computes one step at a time and boxes the answer."""
    signs = {"+": "+", "-": "-", "*": "\\times", "/": "\\div"}
    before, after = problem.values, problem.values[1:]
    steps = [
        f"{rng.choice(('Then', 'Next', 'Now'))} we get {a} {signs[op]} {n} = {b}."
        for a, (op, n), b in zip(before, problem.chain[1:], after)
    ]
    opening = f"We start with {problem.values[0]} {problem.noun}."
    return " ".join((opening, *steps, f"The answer is \\boxed{{{after[-1]}}}."))


def corpus(name: str, documents: int = 21000) -> Iterator[str]:
    """The documents of toy-tinygsm, toy-omi1 or toy-omi2: question, blank line, solution."""
    write = dict(zip(AUTHORS, (write_tinygsm, write_omi1, write_omi2)))[name]
    rng = random.Random(name)
    for problem in itertools.islice(problems("train", AUTHORS.index(name)), documents):
        solved = misread(problem, rng) if rng.random() < SLIPS[name] else problem
        yield problem.question + "\n\n" + write(solved, rng)
