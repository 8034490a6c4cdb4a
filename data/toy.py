"""The embedded corpora: grade-school stories that need no network, solved by three "authors".

A problem is a chain: a start and one to three operations on it (`toy-hard`: two to four), told by
one of eight story families. The authors write in the formats of the corpora that they stand for:
toy-tinygsm a Python function, toy-omi1 an <llm-code> block with its output, toy-omi2 prose.
Everything is a function of its seed.

The authors err, and a corpus's name can say how: in `toy-omi1@slips=20@div=sub` a number is misread
in 20% of the documents (noise, which RL can sharpen away), and each division is taken for a
subtraction (a misconception, which it cannot). Variants tell the same stories in the same order.
"""

import itertools
import random
import re
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
)
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
HIGHEST = {"=": 20, "+": 9, "-": 9, "*": 4, "/": 4}  # number that goes with an operation
LARGEST = 99  # no value that a story leads to exceeds it; that of an error may
# Percent of an author's documents in which a number is misread, where the name does not say: the
# formats differ in accuracy by design.
SLIPS = {"toy-tinygsm": 0, "toy-omi1": 40, "toy-omi2": 50}
AUTHORS = tuple(SLIPS)
OPERATIONS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
ANY = "|".join(OPERATIONS)
VARIANT = re.compile(
    rf"({'|'.join(AUTHORS)})(?:@slips=(100|[0-9][0-9]?))?((?:@(?:{ANY})=(?:{ANY}))*)")


class Problem(NamedTuple):
    question: str
    noun: str
    chain: tuple  # (("=", start), ("+", 5), ...): the operations, the start first

    @property
    def values(self) -> list[int]:
        """The running value after each operation; the last is the answer."""
        return list(itertools.accumulate(self.chain, apply, initial=0))[1:]


def apply(value: int, step: tuple[str, int]) -> int:
    op, n = step
    return {"=": n, "+": value + n, "-": value - n, "*": value * n, "/": value // n}[op]


def draw_chain(rng: random.Random, steps: int) -> tuple:
    """A random chain of a start and `steps` operations on whole numbers from 1 to LARGEST."""
    chain, value = [], 0
    while len(chain) <= steps:
        op = rng.choice("+-*/") if chain else "="
        n = rng.randint(2, HIGHEST[op])
        after = apply(value, (op, n))
        if 1 <= after <= LARGEST and not (op == "/" and value % n):
            chain.append((op, n))
            value = after
    return tuple(chain)


def is_test(chain: tuple) -> bool:
    """Whether a chain is kept for testing: by its arithmetic, so no wording of it is trained on."""
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
            yield Problem(" ".join((*told, ask)), noun, chain)


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
    """An <llm-code> block that ends in the expression to print, its output, a closing sentence."""
    opening = rng.choice(("Let's solve this problem using Python code.\n", ""))
    code, answer = "\n".join((*write_code(problem), problem.noun)), problem.values[-1]
    return (f"{opening}<llm-code>\n{code}\n</llm-code>\n"
            f"<llm-code-output>\n{answer}\n</llm-code-output>\n"
            f"So the answer is \\boxed{{{answer}}} {problem.noun}.")


def write_omi2(problem: Problem, rng: random.Random) -> str:
    """Prose that computes one step at a time and boxes the answer."""
    signs = {"+": "+", "-": "-", "*": "\\times", "/": "\\div"}
    values = problem.values
    told = [f"We start with {values[0]} {problem.noun}."]
    for before, (op, n), after in zip(values, problem.chain[1:], values[1:]):
        word = rng.choice(("Then", "Next", "Now"))
        told.append(f"{word} we get {before} {signs[op]} {n} = {after}.")
    return " ".join((*told, f"The answer is \\boxed{{{values[-1]}}}."))


def errors(name: str) -> tuple[str, float, dict[str, str]]:
    """Author, percent of slips, misconceptions such as {"/": "-"}, as the name of a corpus says."""
    author, slips, pairs = VARIANT.fullmatch(name).groups()
    words = [pair.split("=") for pair in pairs.split("@")[1:]]
    misconceptions = {OPERATIONS[told]: OPERATIONS[taken] for told, taken in words}
    return author, float(slips or SLIPS[author]), misconceptions


def slip(chain: tuple, rng: random.Random) -> tuple:
    """The chain with one of its numbers drawn again."""
    place, (op, n) = rng.choice(list(enumerate(chain)))
    other = n
    while other == n:
        other = rng.randint(2, HIGHEST[op])
    return (*chain[:place], (op, other), *chain[place + 1 :])


def corpus(name: str, documents: int = 21000) -> Iterator[str]:
    """The documents of an author, or of a variant: question, blank line, solution."""
    author, slips, misconceptions = errors(name)
    write = dict(zip(AUTHORS, (write_tinygsm, write_omi1, write_omi2)))[author]
    style, care = random.Random(author), random.Random(f"{author} slips")
    for problem in itertools.islice(problems("train", AUTHORS.index(author)), documents):
        # drawn whether it is used or not: a document that slips at 20% does so alike at 40%
        slips_here, slipped = 100 * care.random() < slips, slip(problem.chain, care)
        chain = slipped if slips_here else problem.chain
        read = problem._replace(chain=tuple((misconceptions.get(op, op), n) for op, n in chain))
        yield problem.question + "\n\n" + write(read, style)
