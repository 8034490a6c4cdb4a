"""Scores completions against gold answers: which format, which answer, right or wrong, and why not.

    score("...\\\\boxed{18}", "18") -> Score(reward=1.0, format="text", answer="18", failure=None)
    python verify.py FILE.jsonl     scores the completions of any system (fields completion, gold)

Code that a model wrote runs in other processes: servers started by exec with an empty environment,
which fork a child for each program (for many at once where they cannot touch one another). Two
walls stand around a child, and neither trusts the other: its syntax tree is screened before it
runs, and the kernel limits its memory, files and processes and refuses it every system call but
those of arithmetic (Linux on x86-64 and aarch64). What is late is killed from outside. The gold
answer never leaves the caller, so the most that a program gains by any trick is a guess.
NOT covered: side channels in time; a bug of the kernel or of CPython that corrupts memory before
the kernel's wall stands in its way; macOS, where the second wall is only what setrlimit gives.
"""

import ast
import atexit
import builtins
import collections
import contextlib
import ctypes
import importlib
import importlib.util
import json
import math
import operator
import os
import platform
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

FORMATS = ("tinygsm", "omi1", "text")
TIME_LIMIT = 1.0  # seconds for one program, by the clock
MEMORY_LIMIT = 512 << 20  # bytes of address space for one child
LONGEST_ANSWER = 1000  # characters; a longer one is compared by spelling
LARGEST_NUMBER = 10_000  # bits; a larger one is not computed, and compared by spelling


class Score(NamedTuple):
    reward: float  # 1 if the answer equals the gold, else 0
    format: str  # one of FORMATS: every completion has one
    answer: str | None
    failure: str | None  # None, "wrong", "no answer", "error", "timeout" or "blocked"


# ---------------------------------------------------------------- format and answer

DEFINITION = re.compile(r"^def \w+ *\((?:[^\n]*\)[^\n]*:|[^)\n]*$|[^\n]*\Z)|^def \w*\Z", re.M)
CODE_LINE = re.compile(
    r"def |class |import \w|from [\w.]+ import|@|#|assert |[\w.]+\(|[)\]}\s]|$"
    r"|\w+(?:\[[^]]*\])*(?: *, *\w+)* *(?:: *[\w\[\], ]+)?(?:[-+*%]|//?|\*\*)?= *[^=\s]"
    r"|(?:if|elif|else|for|while|with|try|except|finally)\b.*:\s*(?:#.*)?$")  # fmt: skip
BOX, BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{"), re.compile(r"[{}]")
NUMBERS = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
STATED = re.compile(
    r"(?:####|[Tt]he (?:final )?answer is:?)[*\s]{0,9}([^\s*][^\n]{0,200}?)[ \t]{0,9}"
    r"(?=\.?\*\*|\.\s|\.?$|, (?:because|since|so|as|which)\b)", re.M)  # fmt: skip
ANOTHER_PROBLEM = re.compile(
    r"\n\s{0,9}(?:(?:Question|Problem|Exercise|Q)\b|\n[^\n]{1,999}\?[ \t]{0,9}\n)")


def first_problem(completion: str) -> str:
    """A completion up to the problem that some models make up and solve behind their answer; of a
    program, cut_program finds the end.
    """
    if "<llm-code>" not in completion and DEFINITION.search(completion):
        return completion
    answered = BOX.search(completion) or STATED.search(completion)
    another = answered and ANOTHER_PROBLEM.search(completion, answered.end())
    return completion[: another.start()] if another else completion


def split_format(completion: str) -> tuple[str, str | None]:
    """The format of a completion, and its program (None in prose, "" where it breaks off)."""
    if "<llm-code>" in completion:
        blocks = re.findall(r"<llm-code>(.*?)(</llm-code>|\Z)", completion, re.DOTALL)
        whole = all(closing for _, closing in blocks)
        return "omi1", "\n".join(code.strip("\n") for code, _ in blocks) if whole else ""
    if definition := DEFINITION.search(completion):
        return "tinygsm", cut_program(completion, definition.start())
    return "text", None


def cut_program(completion: str, definition: int) -> str:
    """The lines of code around a definition: imports and constants before it, and what comes
    behind it up to the first line of prose.
    """
    lines = completion.replace("\r\n", "\n").split("\n")
    start = end = completion.count("\n", 0, definition)
    while start > 0 and CODE_LINE.match(lines[start - 1][:300]):
        start -= 1
    in_string = False  # a docstring may hold lines that look like prose
    while end < len(lines) and (in_string or CODE_LINE.match(lines[end][:300])):
        code = lines[end] if in_string else lines[end].partition("#")[0]
        in_string ^= (code.count('"""') + code.count("'''")) % 2 == 1
        end += 1
    return "\n".join(lines[start:end])


def boxes(text: str) -> list[str]:
    """What each \\boxed{...} of a text holds, braces nested; one that is not closed: nothing."""
    found, end = [], 0
    for box in BOX.finditer(text):
        if box.start() < end:
            continue  # inside the one before
        depth = 1
        for brace in BRACE.finditer(text, box.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = brace.end()
                found.append(text[box.end() : brace.start()])
                break
        else:
            break  # not closed, and so no later one is
    return found


def prose_answer(text: str, last_number: bool = False) -> tuple[str | None, str]:
    """The answer that prose states: the last box, else "####" or "The answer is", else None or the
    last number. "blocked" where it lists more than two different boxes, which is fishing.
    """
    boxed = boxes(text)
    if len(set(map(canonical, boxed[:100]))) > 2:
        return None, "blocked"
    stated = boxed or STATED.findall(text) or (NUMBERS.findall(text) if last_number else [])
    return (stated[-1] if stated else None), ""


# ---------------------------------------------------------------- equality
#
# Two answers are equal when their canonical forms are. A number is an exact Fraction; an expression
# is its values at three fixed points, exact where it is rational, to 60 digits of which 30 count
# where it is not: polynomials and roots that agree there agree everywhere, but for less than one
# chance in a million up to degree 100. What is no mathematics is its spelling. Nothing is ever
# evaluated as Python.


class Unreadable(Exception):
    """Not an expression of the grammar below, or one too large to compute."""


NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)")
GREEK = dict(zip("αβγδεζηθκλμνξρστφχψωΓΔΘΛΞΠΣΦΨΩ", """alpha beta gamma delta epsilon zeta eta theta
    kappa lambda mu nu xi rho sigma tau phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi
    Psi Omega""".split()))  # fmt: skip
CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "√": r"\sqrt ", "π": r"\pi ",
    "∞": r"\infty ", "∪": r"\cup ", "≤": "<=", "≥": ">=", "≠": "!=", "∈": r"\in ", "±": r"\pm ",
    "°": r"\degree ", "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "∅": r"\emptyset ",
    **dict.fromkeys("$€£~\"“”\u00a0\u2009", " "), **{k: f"\\{v} " for k, v in GREEK.items()},
})  # fmt: skip
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, repeated = match.groups()
    shift, nines = 10 ** len(fixed), 10 ** len(repeated) - 1
    value = int(whole + fixed or 0) * nines + int(repeated)
    return rf"\frac{{{value}}}{{{shift * nines}}}"


SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in (
    (r"^ *\*\*(.*)\*\* *$", r"\1"), (r"[⁰¹²³⁴-⁹⁻]+", lambda m: f"^{{{m[0].translate(RAISED)}}}"),
    (r"\\(?:boxed|fbox|underline) *\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
    (r"\\(?:boxed|fbox|underline) *\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),  # and one inside
    (r"(\d*)\.(\d*)\\overline\{(\d{1,50})\}", repeating),
    (r"\\mathbb *\{R\}", r"(-\\infty,\\infty)"),
    (r"(?:(?<=[\d})])|(?<=\\pi)) *(?:\\[ ,;]|~)* *\\(?:text|mbox|mathrm|textrm|rm) *"
     r"\{(?! *(?:and|or|to|i|e|hundred|thousand|[mb]illion) *\})[^{},()]*\}(?: *\^ *\{?[23]\}?)?",
     " "),  # units
    (r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathbb|operatorname|rm) *\{([^{}]*)\}",
     r" \1 "),
    (r"\\(?:text|math)(?:[a-z]{2})?(?![a-z])|\\(?:Large|large|huge|bf|it)(?![a-z])", " "),
    (r"\\(?:text)?color *\{\w+\}", " "), (r"(?<=\d)j\b", "i"),  # Python's complex numbers
    (r"(?<=\d)(?:\\[,!: ]|\{,\}|,\\!) ?(?=\d{3}(?!\d))", ","),
    (r"(?<!\\)\\(?:[,;:! ()\[\]$%#&]|(?:q?quad|(?:display|text)style|left|right|[Bb]igg?[lr]?"
     r"|limits)(?![A-Za-z])\.?)|%", " "),
    (r"(?<!\\)\\\{|\\lbrace(?![a-z])", "⦃"), (r"(?<!\\)\\\}|\\rbrace(?![a-z])", "⦄"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\[lr]vert(?![a-z])", "|"),
    (r"\\(?:emptyset|varnothing)", "⦃⦄"),
    (r"\^ *\{? *\\circ *\}?|\\circ(?![a-z])|\\degrees?(?![a-z])", r"\\degree "),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\(?:leqslant|leq?)(?![a-z])", "<="), (r"\\(?:geqslant|geq?)(?![a-z])", ">="),
    (r"\\neq?(?![a-z])", "!="), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"(?<=\d) +(?=\d+/\d)", "+"),  # 1 3/4
    (r"(?<=\d) +hundred\b", "*10^2"), (r"(?<=\d) +thousand\b", "*10^3"),
    (r"(?<=\d) +million\b", "*10^6"), (r"(?<=\d) +billion\b", "*10^9"), (r"\s+", " "),
)]  # fmt: skip
BASES = {word: str(n) for n, word in enumerate(
    "two three four five six seven eight nine ten".split(), 2)}  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?: ?, ?\d{3})+)(?!\d)")
UNIT = re.compile(
    r"(?<=[\d})!]) *(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|abs|half|halves"
    r"|thirds?|quarters?|dozens?|squared|cubed|plus|minus|times|over|of|not|wrong)\b)"
    r"(?:(?:(?<= )|/ ?)[A-Za-z]{2,}|cm|mm|km|kg|mg|ft|in|mph|lbs?|oz|mi|sq)\b"
    r"(?:[ ./]+[A-Za-z]+)* ?(?:\^ ?\{?[23]\}?)? *$|^(?:USD|EUR|Rs) ")  # fmt: skip
SYMBOL = r" *(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?|'|\^\{?-1\}?)?(?: ?\([\w, ]*\))? *"
NAMES = rf" *\({SYMBOL}(?:,{SYMBOL})+\) *"
MATRIX = re.compile(r"([^&]*?) *[\[(]? ?\\begin ?\{([pb]?matrix|array)\}(?: ?\{[lcr|]*\})?"
                    r"((?:(?!\\begin).)*)\\end ?\{\2\} ?[\])]?")  # fmt: skip
OPENING, CLOSING = "[([{⦃]", "[])}⦄]"


def canonical(answer: str):
    """What equal answers have in common: a Fraction, a tuple of the answer's parts, or a spelling.

    Hashable. Raises nothing, whatever the text.
    """
    text = answer.strip()
    if NUMBER.fullmatch(text) and len(text) <= LONGEST_ANSWER:
        return Fraction(text)
    try:
        return meaning_of(text) if len(text) <= LONGEST_ANSWER else ("words", text)
    except ImportError:  # mpmath, which comes with sympy
        raise
    except Exception:  # what breaks the reader is no answer that a reader could give
        return ("words", text)


def clean(text: str) -> str:
    """A text without what changes no meaning: fonts, spacing, currency, percent, spellings."""
    text = text.translate(CHARACTERS)
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    return text


@lru_cache(maxsize=4096)
def meaning_of(text: str):
    return meaning(clean(text))


def meaning(text: str):
    """The canonical form of a cleaned text, by its outermost structure."""
    text = text.strip().rstrip(".,;: ").removeprefix("=").strip()
    if matrix := MATRIX.fullmatch(text):
        rows = re.split(r"\\\\(?: ?\[[^]]*\])?", matrix[3].strip().removesuffix(r"\\"))
        cells = [[f"{matrix[1]}({cell})" for cell in row.split("&")] for row in rows]
        return ("matrix", *(tuple(map(meaning, row)) for row in cells))
    if listed := re.fullmatch(r"(?:Matrix ?\()? ?\[ ?(\[.*\]) ?\] ?\)?", text):  # Python's
        rows = [split(row.strip()[1:-1], ",") for row in split(listed[1], ",")]
        return ("matrix", *(tuple(map(meaning, row)) for row in rows))
    if condition := re.fullmatch(r"⦃ *[a-z] *(?:\\mid|\||:)(.*)⦄", text):
        return meaning(condition[1])
    text = re.sub(r"^[A-Z] ?(?=\(.*,.*\)$)", "", text)  # the name of a point
    if not re.search(r"[\[(⦃]", text):
        text = THOUSANDS.sub(lambda m: m[1] + re.sub(r"[ ,]", "", m[2]), text)
    if len(parts := split(text, r"\\cup(?![a-z])")) > 1:
        return unite(gather(parts))
    if len(parts := split(text, r",|;|\band\b|\bor\b")) > 1:
        named = [part.partition("=")[::2] for part in parts if re.match(SYMBOL + "=", part)]
        if len({name.strip().partition("_")[0] for name, _ in named}) > 1:
            return ("set", *sorted((name.strip(), repr(meaning(value))) for name, value in named))
        return gather(parts)
    if re.search(r"[<>=]|\\in\b", text):
        return relation(text)
    if text and re.match(OPENING, text) and encloses(text):
        parts = split(text[1:-1], ",|;")
        if text[0] in "⦃{":
            return gather(parts) if any(part.strip() for part in parts) else ("set",)
        if len(parts) > 1:
            return (text[0], *map(meaning, parts), text[-1])
    if re.search(r"\\[pm][pm]\b", text):
        return gather([re.sub(r"\\(?:pm|mp)", sign, text) for sign in "+-"])
    return value_or_words(text)


def split(text: str, separator: str) -> list[str]:
    """The pieces of a text between the separators that stand outside of all brackets."""
    pieces, depth, start = [], 0, 0
    for found in re.finditer(rf"({OPENING})|({CLOSING})|(?:{separator})", text):
        depth += bool(found[1]) - bool(found[2])
        if depth == 0 and not found[1] and not found[2]:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def encloses(text: str) -> bool:
    """Whether the bracket that opens a text closes at its end."""
    depth = 0
    for found in re.finditer(rf"({OPENING})|{CLOSING}", text):
        depth += 1 if found[1] else -1
        if depth == 0:
            return found.end() == len(text)
    return False


def gather(parts: list[str]):
    """A list or set: its elements in any order; one element is itself."""
    return gather_keys([meaning(part) for part in parts if part.strip()])


def gather_keys(found):
    nested = [m[1:] if isinstance(m, tuple) and m[:1] == ("set",) else (m,) for m in found]
    flat = sorted((m for group in nested for m in group), key=repr)
    return flat[0] if len(flat) == 1 else ("set", *flat)


def unite(found):
    """A set of intervals with those that touch made one."""
    if not all(isinstance(m, tuple) and m[0] in ("(", "[") and len(m) == 4 for m in found[1:]):
        return found
    united = []
    for interval in sorted(found[1:], key=lambda m: (float(m[1]), m[0] == "(")):
        first, low, high, last = united[-1] if united else ("(", "nan", "nan", ")")
        touches = float(interval[1]) == float(high) and (interval[0] == "[" or last == "]")
        if float(interval[1]) < float(high) or touches:
            if (float(interval[2]), interval[3] == "]") > (float(high), last == "]"):
                united[-1] = (first, low, *interval[2:])
        else:
            united.append(interval)
    return united[0] if len(united) == 1 else ("set", *sorted(united, key=repr))


def relation(text: str):
    """Equations up to a factor, "x = 5" as 5, inequalities of one variable as intervals."""
    signs = re.findall(r"<=|>=|!=|<|>|=|\\in\b", text)
    sides = split(text, r"<=|>=|!=|<|>|=|\\in\b")
    if len(sides) != len(signs) + 1 or not all(side.strip() for side in sides):
        return words(text)
    if set(signs) <= {"=", r"\in"}:
        if re.fullmatch(SYMBOL, sides[0]) or signs[0] == r"\in" or re.fullmatch(NAMES, sides[0]):
            return meaning(sides[-1])
        return meaning(sides[0]) if re.fullmatch(SYMBOL, sides[-1]) else equation(text)
    if signs[0][0] == ">":
        signs, sides = [sign.replace(">", "<") for sign in reversed(signs)], sides[::-1]
    if signs == ["!="] and re.fullmatch(SYMBOL, sides[0]):
        return ("set", ("(", "-inf", meaning(sides[1]), ")"), ("(", meaning(sides[1]), "inf", ")"))
    if not set(signs) <= {"<", "<="}:
        return words(text)
    bound = ["(" if sign == "<" else "[" for sign in signs]
    if len(sides) == 3 and re.fullmatch(SYMBOL, sides[1]):
        return (bound[0], meaning(sides[0]), meaning(sides[2]), ")" if bound[1] == "(" else "]")
    if len(sides) == 2 and re.fullmatch(SYMBOL, sides[0]):
        return ("(", "-inf", meaning(sides[1]), ")" if bound[0] == "(" else "]")
    if len(sides) == 2 and re.fullmatch(SYMBOL, sides[1]):
        return (bound[0], meaning(sides[0]), "inf", ")")
    return (signs[0], difference(sides[1], sides[0], True)) if len(sides) == 2 else words(text)


def equation(text: str):
    sides = split(text, "=")
    return ("=", difference(sides[0], sides[1])) if len(sides) == 2 else words(text)


def difference(left: str, right: str, keep_sign: bool = False):
    """left - right up to a factor (a positive one, where the sign is kept)."""
    try:
        with READING:
            value = each(SUBTRACT, Expression(left).whole(), Expression(right).whole())
            unit = value[0] if not keep_sign or complex(value[0]).real > 0 else NEGATE(value[0])
            return key_of(each(DIVIDE, value, (unit,) * POINTS))
    except (Unreadable, ArithmeticError, ValueError):
        return words(f"{left}={right}")


def words(text: str):
    return ("words", re.sub(r"[\s{}]|\.(?!\d)", "", text).lower() or text)


def value_or_words(text: str):
    """A number, a number of a base, an expression or, where it is none of them, words."""
    if NUMBER.fullmatch(text):
        return Fraction(text)
    if based := re.fullmatch(r"\(?(\d\w*?)\)? ?_ ?\{? ?(\d+|[a-z]+) ?\}?", text):
        return ("base", based[1].upper(), BASES.get(based[2], based[2]))
    if not re.search(r"[\d\\=<>+*/^]", text) and re.search(r"[^\W\d_]{3}", text):
        if not re.match(r"-?(?:sqrt|sin|cos|tan|cot|sec|csc|ln|log|exp|abs|inf)\b", text):
            return words(text)
    try:
        with READING:
            return key_of(Expression(UNIT.sub("", text)).whole())
    except (Unreadable, ArithmeticError, ValueError):
        return words(text)


# -------------------------------------------------- expressions: read and evaluated in one go

POINTS = 3  # where variables are evaluated
READING = threading.RLock()  # mpmath's precision is not safe from threads


@lru_cache
def reals():
    """An arithmetic of 60 digits of our own: no other user of mpmath changes its precision."""
    import mpmath

    context = mpmath.mp.clone()
    context.dps = 60
    return context


def lift(x):
    """A Fraction as a real of 60 digits."""
    return reals().mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def size(x) -> float:
    """Bits in front of and behind the point, roughly."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() + x.denominator.bit_length()
    return abs(reals().mag(x)) if x and reals().isfinite(x) else 0


def check(x):
    if size(x) > LARGEST_NUMBER or x != x:
        raise Unreadable("too large, or undefined")
    return x


def each(function, *values) -> tuple:
    """function of the values at each point; once, where all of them are constants."""
    if all(value[0] is value[-1] for value in values):
        return (check(function(*(value[0] for value in values))),) * POINTS
    return tuple(check(function(*parts)) for parts in zip(*values))


def arithmetic(function):
    """A function that stays exact on Fractions."""

    def apply(*xs):
        return function(*(xs if all(isinstance(x, Fraction) for x in xs) else map(lift, xs)))

    return apply


ADD, SUBTRACT, MULTIPLY = map(arithmetic, (operator.add, operator.sub, operator.mul))
DIVIDE, NEGATE = arithmetic(operator.truediv), arithmetic(operator.neg)


def power(base, exponent):
    if isinstance(exponent, Fraction):
        exact = exact_root(base, exponent.denominator) if exponent.denominator > 1 else None
        if exact is not None:
            return power(exact, Fraction(exponent.numerator))
        if exponent.denominator == 1 and isinstance(base, Fraction):
            if size(base) * abs(exponent) > LARGEST_NUMBER:
                raise Unreadable("too large")
            return base ** int(exponent)
    if not base:
        raise Unreadable("a power of zero")
    base, exponent = lift(base), lift(exponent)
    if size(exponent) > 64 or abs(exponent) * abs(reals().log(abs(base), 2)) > LARGEST_NUMBER:
        raise Unreadable("too large")
    return reals().power(base, exponent)


def exact_root(x, n: int) -> Fraction | None:
    """The rational n-th root, of a negative number too where n is odd; None where there is none."""
    if not isinstance(x, Fraction) or n > 64 or (x < 0 and n % 2 == 0) or size(x) > 180:
        return None
    parts = [int(reals().nint(reals().root(abs(part), n))) for part in (x.numerator, x.denominator)]
    if [part**n for part in parts] != [abs(x.numerator), x.denominator]:
        return None
    return Fraction(*parts) * (-1 if x < 0 else 1)


def root(x, n):
    """The n-th root; of a negative real the real one where n is odd."""
    if isinstance(x, Fraction) and x < 0 and n % 2 == 1:
        return NEGATE(power(-x, 1 / n))
    return power(x, 1 / n)


def factorial(x):
    if size(x) > 64 or abs(x) > 1000:
        raise Unreadable("too large")
    whole = isinstance(x, Fraction) and x.denominator == 1 and x >= 0
    return Fraction(math.factorial(int(x))) if whole else reals().gamma(lift(x) + 1)


def binomial(n, k):
    if {type(n), type(k)} != {Fraction} or n.denominator * k.denominator > 1:
        raise Unreadable("not whole numbers")
    if min(k, n - k) * n.numerator.bit_length() > LARGEST_NUMBER:
        raise Unreadable("too large")
    return Fraction(math.comb(int(n), int(k)))


def real_function(name: str):
    """A function of mpmath, of arguments small enough to have a value."""

    def function(x):
        if size(x) > 64:
            raise Unreadable("too large")
        return getattr(reals(), name)(lift(x))

    return function


ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS = {
    **{name: real_function(name) for name in (*ANGLES, "exp", "sinh", "cosh", "tanh")},
    **{f"arc{name}": real_function(f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": real_function("log"), "log": real_function("log10"), "abs": arithmetic(abs),
    "sqrt": lambda x: power(x, Fraction(1, 2)),
}  # fmt: skip
TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d+)?[eE][+-]?\d+|\d+(?:\.\d*)?|\.\d+|[A-Za-z]+|\*\*|\S")


class Expression:
    """Reads an expression in LaTeX or in plain notation, and evaluates it as it reads.

    A value is a tuple of POINTS numbers: a Fraction where it is exact, else of mpmath.
    """

    def __init__(self, text: str):
        self.tokens, self.at, self.depth = TOKEN.findall(text), 0, 0
        self.in_bars = self.in_angle = False

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def takes(self, *choices: str) -> bool:
        """Whether the next token is one of these; if so it is taken."""
        found = self.peek() in choices
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"no {token}")

    def whole(self) -> tuple:
        value = self.sum()
        self.expect("")
        return value

    def sum(self) -> tuple:
        self.depth += 1
        if self.depth > 40:
            raise Unreadable("too deep")
        value = self.product()
        while self.peek() in ("+", "-"):
            operation = ADD if self.take() == "+" else SUBTRACT
            value = each(operation, value, self.product())
        self.depth -= 1
        return value

    def product(self) -> tuple:
        value = self.signed()
        while True:
            if self.takes("*", r"\cdot", r"\times", r"\ast"):
                value = each(MULTIPLY, value, self.signed())
            elif self.takes("/", r"\div"):
                value = each(DIVIDE, value, self.signed())
            elif self.begins_factor():
                value = each(MULTIPLY, value, self.power())
            else:
                return value

    def begins_factor(self) -> bool:
        """Whether what follows multiplies without a sign; a number does only behind a symbol."""
        token = self.peek()
        if token == "|":
            return not self.in_bars
        if NUMBER.match(token):
            return not NUMBER.match(self.tokens[self.at - 1])
        return bool(re.match(r"[({A-Za-z]|\\(?!cdot|times|div)[A-Za-z]", token))

    def signed(self) -> tuple:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return each(NEGATE, value) if negative else value

    def power(self) -> tuple:
        value = self.postfix()
        if not self.takes("^", "**"):
            return value
        exponent = self.argument()
        if self.takes("^", "**"):  # 2^3^2 is 2^9
            exponent = each(power, exponent, self.argument())
        return each(power, value, exponent)

    def postfix(self) -> tuple:
        value = self.atom()
        while self.peek() in ("!", r"\degree"):
            if self.take() == "!":
                value = each(factorial, value)
            elif self.in_angle:
                value = each(lambda x: lift(x) * reals().pi / 180, value)
        return value

    def argument(self, digit: bool = False) -> tuple:
        """What a command or an exponent takes: a group, or one token (one digit of it)."""
        if self.takes("-"):
            return each(NEGATE, self.argument())
        if not NUMBER.fullmatch(self.peek()):
            return self.postfix()
        number = self.take()
        if digit and len(number) > 1:
            self.at -= 1
            self.tokens[self.at], number = number[1:], number[0]
        return constant(number)

    def atom(self) -> tuple:
        token = self.take()
        if NUMBER.match(token):
            # an integer with a fraction of digits behind it is their sum
            rest = "".join(self.tokens[self.at : self.at + 7])
            mixed = token.isdigit() and re.match(r"\\frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)", rest)
            return each(ADD, constant(token), self.atom()) if mixed else constant(token)
        if token in ("(", "{"):
            value = self.sum()
            self.expect(")" if token == "(" else "}")
            return value
        if token == "|":
            self.in_bars = True
            value = self.sum()
            self.expect("|")
            self.in_bars = False
            return each(FUNCTIONS["abs"], value)
        if token == r"\frac":
            return each(DIVIDE, self.argument(digit=True), self.argument(digit=True))
        if token == r"\binom":
            return each(binomial, self.argument(digit=True), self.argument(digit=True))
        if token == r"\sqrt":
            degree = constant("2")
            if self.takes("["):
                degree = self.sum()
                self.expect("]")
            return each(root, self.argument(), degree)
        return self.name(token)

    def name(self, token: str) -> tuple:
        """A function, a constant, a variable, or a product of such letters."""
        word = token.removeprefix("\\")
        if word in FUNCTIONS:
            return self.function(word)
        if word in ("pi", "infty", "oo", "inf"):
            return (+reals().pi if word == "pi" else reals().inf,) * POINTS
        if token != word:
            if word.removeprefix("var") not in GREEK.values() and word != "ell":
                raise Unreadable(token)
            return self.symbol(token)
        if not word.isalpha() or len(word) > 4:
            raise Unreadable(token)
        self.tokens[self.at : self.at] = list(word[1:])
        if word[0] == "i" or word == "I" and "*" in self.tokens:  # sympy's spelling
            return (reals().mpc(0, 1),) * POINTS
        return (+reals().e,) * POINTS if word[0] == "e" else self.symbol(word[0])

    def symbol(self, name: str) -> tuple:
        """A variable, with its index: one rational number of either sign at each point."""
        if self.takes("_"):
            first, nested = self.at, self.take() == "{"
            while nested and self.take() not in ("}", ""):
                pass
            name += "_" + "".join(self.tokens[first : self.at]).strip("{}")
        while self.takes("'"):
            name += "'"
        numbers = [zlib.crc32(f"{name} {point}".encode()) % 9973 + 1 for point in range(POINTS)]
        return tuple(Fraction(n * (-1) ** i, 997) for i, n in enumerate(numbers))

    def function(self, name: str) -> tuple:
        base = self.argument() if self.takes("_") else None
        exponent = self.argument() if self.takes("^") else None
        if exponent and exponent[0] == -1 and f"arc{name}" in FUNCTIONS:
            name, exponent = f"arc{name}", None
        self.in_angle, outer = name in ANGLES, self.in_angle
        bracketed = self.peek() in ("(", "{", "|")
        value = self.postfix() if bracketed else self.power()
        while not bracketed and re.fullmatch(r"[A-Za-z]|\\pi|\\theta", self.peek()):
            value = each(MULTIPLY, value, self.power())
        self.in_angle = outer
        value = each(FUNCTIONS["ln" if base else name], value)
        if base:
            value = each(DIVIDE, value, each(FUNCTIONS["ln"], base))
        return each(power, value, exponent) if exponent else value


def constant(number: str) -> tuple:
    if len(number.lower().partition("e")[2]) > 4:
        raise Unreadable("too large")
    return (Fraction(number),) * POINTS


def key_of(value: tuple):
    """A value as something hashable: one number where it is the same at all points."""
    keys = tuple(map(rounded, value if value[0] is not value[-1] else value[:1]))
    return keys[0] if len(set(keys)) == 1 else keys


def rounded(x):
    """A Fraction, where x is one to 40 digits, else 30 digits; a pair of them for a complex x."""
    if isinstance(x, Fraction):
        return x
    if not reals().isfinite(x):
        return str(x).replace("+", "")
    if isinstance(x, reals().mpc):
        tiny = abs(x) * reals().mpf(10) ** -40
        parts = [reals().mpf(0) if abs(part) <= tiny else part for part in (x.real, x.imag)]
        return ("complex", *map(rounded, parts)) if parts[1] else rounded(parts[0])
    sign, mantissa, exponent, _ = x._mpf_
    exact = Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent
    near = exact.limit_denominator(10**9)
    close = abs(near - exact) <= Fraction(1, 10**40) * max(1, abs(exact))
    return near if close else reals().nstr(x, 30)


def equal(prediction: str, gold: str, tolerance: float = 0.0) -> bool:
    """Whether a predicted answer is the gold one, exactly; as a number within a relative tolerance
    where that is above 0.
    """
    ours, theirs = canonical(prediction), canonical(gold)
    if ours == theirs:
        return True
    if tolerance and isinstance(ours, Fraction):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return math.isclose(float(ours), float(theirs), rel_tol=tolerance)
    try:
        return len(prediction + gold) < LONGEST_ANSWER and in_other_words(prediction, gold)
    except Exception:  # as in canonical
        return False


def in_other_words(prediction: str, gold: str) -> bool:
    """Whether a prediction is the gold answer as a list of Python's, as an equation that says more
    or less than the gold's, or as one that ends in the gold number.
    """
    ours, theirs = canonical(prediction), canonical(gold)
    if isinstance(theirs, tuple) and theirs[0] == "set" and prediction.strip()[:1] == "[":
        listed = isinstance(ours, tuple) and ours[0] == "[" and ours[-1] == "]"
        return listed and gather_keys(ours[1:-1]) == theirs
    if "=" in prediction and "=" in gold:  # solved for a variable on one side only
        return equation(clean(prediction)) == equation(clean(gold))
    left, sign, right = prediction.rpartition("=")
    return bool(sign) and isinstance(theirs, Fraction) and canonical(right) == theirs


# ------------------------------------------------------------ programs: the first wall, the syntax

MODULES = {  # what a program may import, and the names in it that it may not
    "math": (), "fractions": (), "decimal": (), "itertools": (), "collections": (),
    "statistics": (), "datetime": (), "re": (), "random": ("SystemRandom",),
    "functools": ("update_wrapper", "wraps"), "string": ("Formatter",), "sympy.abc": (),
    "sympy": ("lambdify", "preview", "parse_expr", "init_session"),
}  # fmt: skip
BUILTINS = set("""abs all any ascii bin bool bytes callable chr classmethod complex dict divmod
    enumerate filter float format frozenset hash hex int isinstance issubclass iter len list map
    max min next object oct ord pow print property range repr reversed round set slice sorted
    staticmethod str sum super tuple type zip __build_class__ True False None""".split())
BUILTINS |= {name for name in dir(builtins) if name.endswith(("Error", "Exception", "Iteration"))}
SAFE = {name: getattr(builtins, name) for name in BUILTINS}
HIDDEN = set(dir(builtins)) - BUILTINS - {"__name__"}
OF_DATETIME = ("_strptime", "time")  # its C code imports them in the name of the program
METHODS = set("""__init__ __str__ __repr__ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__
    __truediv__ __floordiv__ __mod__ __neg__ __pow__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    __hash__ __len__ __iter__ __next__ __getitem__ __setitem__ __contains__ __call__ __bool__
    __int__ __float__ __index__ __enter__ __exit__ __name__""".split())
HOLD_NO_NAMES = {ast.Load, ast.Store, ast.Assign, ast.BinOp, ast.Call, ast.Expr, ast.Return,
                 ast.Add, ast.Sub, ast.Mult, ast.Div, ast.arguments}  # fmt: skip
LEADS_OUT = re.compile(r"(?:gi|cr|ag|tb)_|f_(?:back|globals|locals|builtins|code)$|mro$")
STRING_LEADS_OUT = re.compile(r"[.{\[]\s*__|__\w+__\s*[.(\[]")


class Blocked(BaseException):
    """A program reaches for more than arithmetic. No `except Exception` of its own holds it."""


def screen(nodes: list[ast.AST]) -> None:
    """Raises Blocked where a program names what leads out of it: imports, dunders, frames."""
    own = {node.id for node in nodes if type(node) is ast.Name and type(node.ctx) is ast.Store}
    own |= {node.arg for node in nodes if type(node) is ast.arg}
    for node in nodes:
        for name in reached_names(node, own):
            raise Blocked(name)


def reached_names(node: ast.AST, own: set):
    """The names in a node that no program may use, but for its own."""
    kind = type(node)
    if kind is ast.Name:
        if node.id in HIDDEN and node.id not in own or is_dunder(node.id):
            yield node.id
    elif kind is ast.Attribute:
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "other")
        changed = type(node.ctx) is not ast.Load and node.attr.startswith("__")
        # the fields of a format string read attributes: they must be there to be seen
        formats = node.attr in ("format", "format_map") and type(node.value) is not ast.Constant
        private = node.attr.startswith("_") and not of_self and node.attr not in METHODS
        if changed or formats or private or is_dunder(node.attr) or LEADS_OUT.match(node.attr):
            yield node.attr
    elif kind is ast.Constant:
        if type(node.value) is str and STRING_LEADS_OUT.search(node.value):
            yield node.value
    elif kind is ast.Import:
        yield from (alias.name for alias in node.names if alias.name not in MODULES)
    elif kind is ast.ImportFrom:
        yield from [] if node.module in MODULES and not node.level else [str(node.module)]
    elif kind is ast.MatchClass:
        yield from (name for name in node.kwd_attrs if LEADS_OUT.match(name) or name[0] == "_")
    elif kind not in HOLD_NO_NAMES:
        for _, field in ast.iter_fields(node):
            names = field if type(field) is list else [field]
            yield from (name for name in names if type(name) is str and is_dunder(name))


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name not in METHODS


def leaves_nothing(nodes: list[ast.AST]) -> bool:
    """Whether a screened program can change nothing that another one in its process sees: it has
    no classes, sets no attributes, and of all modules it knows only math.
    """
    for node in nodes:
        kind = type(node)
        if kind in (ast.ClassDef, ast.AsyncFunctionDef):
            return False
        if kind is ast.Attribute and type(node.ctx) is not ast.Load:
            return False
        if kind is ast.Import and any(alias.name != "math" for alias in node.names):
            return False
        if kind is ast.ImportFrom and node.module != "math":
            return False
    return True


# ------------------------------------------------------------ programs: running one


class Showcase:
    def __init__(self, values: dict):
        self.__dict__.update(values)

    def __setattr__(self, name, value=None):
        raise Blocked(f"change of {name}")

    __delattr__ = __setattr__


@lru_cache
def showcase(name: str) -> Showcase:
    """What a program sees of a module: its public functions, classes and numbers, no modules."""
    module = importlib.import_module(name)
    names = set(getattr(module, "__all__", None) or dir(module)) - set(MODULES[name])
    values = {n: getattr(module, n) for n in names if not n.startswith("_") and hasattr(module, n)}
    return Showcase({n: v for n, v in values.items() if not isinstance(v, types.ModuleType)})


def import_showcase(name, globals=None, locals=None, fromlist=(), level=0):
    if name in OF_DATETIME:
        return sys.modules[name]
    if name not in MODULES or level:
        raise Blocked(f"import of {name}")
    return showcase(name)


def new_namespace(printed: list) -> dict:
    """The global names of a program; print keeps what was printed last."""

    def keep(*values, sep=" ", end="\n", file=None, flush=False):
        printed[:] = [values[0] if len(values) == 1 else " ".join(map(str, values))]

    own = {"print": keep, "__import__": import_showcase, "type": lambda value, /: type(value)}
    return {"__builtins__": SAFE | own, "__name__": "program"}


def run_program(source: str, is_block: bool, alone: bool) -> tuple:
    """(failure or "", answer, whether a float computed it) of a program: what its function returns,
    or a block's last expression or print. "alone" where it must not run beside others.
    """
    printed, namespace = [], {}
    try:
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        screen(nodes)
        if not alone and not leaves_nothing(nodes):
            return "alone", None, False
        namespace = new_namespace(printed)
        shows = is_block and tree.body and isinstance(tree.body[-1], ast.Expr)
        last = tree.body.pop() if shows else None
        exec(compile(tree, "program", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "program", "eval"), namespace)
        elif not is_block:
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            name = "simple_math_problem" if "simple_math_problem" in names else names[-1]
            value = namespace[name]()
        if is_block and (last is None or value is None):
            value = printed[-1] if printed else None
        with contextlib.suppress(TypeError) if is_block else contextlib.nullcontext():
            return "", plain(value), type(value) is float
        return "", None, False  # a block may end on what is no answer: the closing box counts
    except (Blocked, PermissionError):  # the first wall, the second wall
        return "blocked", None, False
    except BaseException:  # whatever a program raises, SystemExit too, is its own failure
        return "error", None, False
    finally:
        namespace.clear()  # its functions and its globals refer to each other


def plain(value, depth: int = 0) -> str | None:
    """A value of an exact built-in type, or sympy's, as a string: no method of a class that the
    program made is called. Raises TypeError for any other.
    """
    kind = type(value)
    if value is None:
        return None
    if kind is float:
        return f"{value:.12g}"  # 0.1 + 0.2 is 0.3
    if kind is str and (len(value) > LONGEST_ANSWER or "\\boxed" in value):
        raise TypeError("an answer is short, and a box is for the text to close with")
    if kind in (int, bool, str, Fraction, Decimal):
        return str(value)
    if kind in (list, tuple, set) and depth < 3 and 0 < len(value) <= 20:
        inside = ", ".join(str(plain(item, depth + 1)) for item in value)
        return f"({inside})" if kind is tuple else f"\\{{{inside}\\}}"
    home = sys.modules.get(kind.__module__) if kind.__module__.startswith("sympy.") else None
    if home and getattr(home, kind.__name__, None) is kind:
        return sys.modules["sympy"].latex(value, ln_notation=True)
    raise TypeError(f"a {kind.__name__} is not an answer")


# ------------------------------------------------------------ programs: the second wall, the kernel

# Numbers of: write mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap madvise
# getpid exit gettimeofday sigaltstack futex sched_yield clock_gettime exit_group getrandom
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (1, 9, 10, 11, 12, 13, 14, 15, 25, 28, 39, 60, 96, 131, 202, 24, 228,
                            231, 318)),
    "aarch64": (0xC00000B7, (64, 222, 226, 215, 214, 134, 135, 139, 216, 233, 172, 93, 169, 132,
                             98, 124, 113, 94, 278)),
}  # fmt: skip


def system_call_filter() -> bytes:
    """A program of the kernel's packet filter: these calls pass, the others fail with EPERM."""
    architecture, allowed = SYSTEM_CALLS[platform.machine()]
    load, jump_if_equal, answer, passes, refuses = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
    count = len(allowed)
    code = [(load, 0, 0, 4), (jump_if_equal, 0, count + 1, architecture), (load, 0, 0, 0)]
    code += [(jump_if_equal, count - i, 0, number) for i, number in enumerate(allowed)]
    code += [(answer, 0, 0, refuses), (answer, 0, 0, passes)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def close_the_wall(out: int, seconds: int) -> None:
    """Limits for this process for good: of what it may use, its processor time in seconds among
    it, and of what it may ask the kernel.
    """
    import resource

    limits = {resource.RLIMIT_AS: MEMORY_LIMIT, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0,
              resource.RLIMIT_NOFILE: out + 1, resource.RLIMIT_CORE: 0,
              resource.RLIMIT_CPU: seconds}  # fmt: skip
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # what a system does not have
            resource.setrlimit(kind, (value, value))
    os.closerange(0, out)
    if sys.platform == "linux" and platform.machine() in SYSTEM_CALLS:
        code = system_call_filter()
        content = ctypes.create_string_buffer(code)
        filter = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(content))
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its server
        if prctl(38, 1, 0, 0, 0) or prctl(22, 2, filter, 0, 0):  # NO_NEW_PRIVS, SECCOMP_FILTER
            raise OSError(ctypes.get_errno(), "no system call filter")


# ------------------------------------------------------------ programs: the server


TOGETHER = 256  # programs of one child, where they cannot touch one another
SIDE_BY_SIDE = 8  # children that are waited for at the same time
PATIENCE = 0.05, 0.02  # seconds without a result before the programs behind go on in another child:
# of the first such program, and of those that come while it runs on


class Child:
    """A forked process that runs programs one after the other and writes a line for each."""

    def __init__(self, indices: list[int], programs: list, limit: float):
        self.left, self.rest, self.stuck = collections.deque(indices), b"", False
        self.began = time.monotonic()  # the program that runs now
        self.out, out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                close_the_wall(out, math.ceil(limit * len(indices)) + 1)
                for index in indices:
                    result = run_program(*programs[index], alone=len(indices) == 1)
                    os.write(out, json.dumps(result).encode() + b"\n")
            os._exit(0)
        os.close(out)

    def follow(self, ready: bool, limit: float, patience: float, results: list, waiting) -> bool:
        """Takes in what the child has written; whether it goes on. What it leaves undone waits."""
        if ready:
            data = os.read(self.out, 1 << 16)
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines[: len(self.left)]:
                index, self.began = self.left.popleft(), time.monotonic()
                results[index] = read_result(line)
                if results[index][0] == "alone":
                    waiting.append([index])
            if data and self.left:
                return True
            failure = "error"  # it died
        elif not self.late(limit):
            if time.monotonic() - self.began > patience and not self.stuck:
                self.stuck = True
                self.hand_over(waiting)
            return True
        else:
            failure = "timeout"
        if self.left:
            results[self.left[0]] = (failure, None, False)
            self.hand_over(waiting)
        return False

    def hand_over(self, waiting: collections.deque) -> None:
        """Leaves the programs behind the one that runs to another child."""
        first, *behind = self.left
        self.left = collections.deque([first])
        if behind:
            waiting.appendleft(behind)

    def late(self, limit: float) -> bool:
        """Whether its program had its time: by the clock, for loops that run side by side share the
        processor. Only where it had less than a fifth of that, up to 10 times as long.
        """
        seconds = time.monotonic() - self.began
        return seconds > limit and (seconds > 10 * limit or self.cpu_seconds() > limit / 5)

    def cpu_seconds(self) -> float:
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # Linux: the clock of a process
        except (OSError, AttributeError):
            return math.inf

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.out)


def read_result(line: bytes) -> tuple:
    """A line of a child, checked: what broke out of its walls could write anything."""
    with contextlib.suppress(ValueError, TypeError):
        failure, answer, computed = json.loads(line)
        if isinstance(failure, str) and (answer is None or len(answer + "") <= LONGEST_ANSWER):
            return failure, answer, computed is True
    return "error", None, False


def run_programs(programs: list, limit: float) -> list:
    """The results of programs. One that takes too long or kills its child fails alone; while it is
    waited for, those behind it go on in another child.
    """
    results, children = [None] * len(programs), []
    order = list(range(len(programs)))
    waiting = collections.deque(order[i : i + TOGETHER] for i in order[::TOGETHER])
    while waiting or children:
        if waiting and len(children) < SIDE_BY_SIDE and all(child.stuck for child in children):
            children.append(Child(waiting.popleft(), programs, limit))
        patience = PATIENCE[bool(children) and children[0].stuck]
        ready = select.select([0, *(child.out for child in children)], [], [], PATIENCE[1])[0]
        if 0 in ready:
            sys.exit()  # the caller has ended; the children die with this process
        for child in list(children):
            if not child.follow(child.out in ready, limit, patience, results, waiting):
                child.end()
                children.remove(child)
    return results


def serve(site: str) -> None:
    """A server: answers each line on stdin with a line of results, until stdin or its parent ends.

    Its working folder is one that is gone, where nothing can be written.
    """
    parent, folder = os.getppid(), tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    sys.path.append(site)
    # what the standard library imports at the moment of use must be there before the walls are
    for name in (*MODULES, *OF_DATETIME, "resource", "unicodedata"):
        if not name.startswith("sympy"):  # slow to load: when a program names it
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        while not select.select([0], [], [], 1)[0]:
            if os.getppid() != parent:
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        programs, limit = json.loads(line)
        if any("sympy" in source for source, _ in programs):
            load_sympy()
        results = json.dumps(run_programs(programs, limit))
        sys.stdout.buffer.write(results.encode() + b"\n")
        sys.stdout.buffer.flush()


@lru_cache
def load_sympy() -> None:
    """Imports sympy, but for its parser of strings, which evaluates them as Python."""
    import sympy
    import sympy.abc
    import sympy.parsing.sympy_parser

    def read_name(text, *arguments, **options):
        if not re.fullmatch(r"[A-Za-z]\w*|\d{1,100}(?:\.\d{1,100})?", text):
            raise Blocked(f"sympy would evaluate {text!r}")
        return sympy.Rational(text) if text[0].isdigit() else sympy.Symbol(text)

    # once each, for what sympy imports at the first use: later there is no opening of files
    x, y, sine = sympy.abc.x, sympy.abc.y, sympy.sin(sympy.abc.x)
    sympy.solve([x + y - 3, x - y - 1]), sympy.solve(x**3 - 2), sympy.solve(x**2 < 4)
    sympy.solveset(sine - 1, x, sympy.Interval(0, 7)), sympy.nsolve(x**2 - 2, 1)
    sympy.integrate(x * sine, (x, 0, 3)), sympy.limit(sine / x, x, 0), sympy.simplify(sine**2)
    sympy.summation(x**2, (x, 1, y)), sympy.product(x, (x, 1, 5)), sympy.series(sine, x)
    sympy.Matrix([[1, 2], [3, 4]]).eigenvals(), sympy.Matrix([[1, 2], [3, 4]]).inv()
    sympy.factorint(10**12 - 1), sympy.divisors(360), sympy.prime(100), sympy.nsimplify(0.5)
    sympy.Poly(x**4 - 5 * x).nroots(), sympy.sqrt(2).evalf(), str(sympy.Rational(1, 3) * sine)
    sympy.parsing.sympy_parser.parse_expr = read_name


# ------------------------------------------------------------ programs: the caller's side


class Server:
    """A process of this file's serve(), replaced when it breaks."""

    def __init__(self):
        self.process = None
        self.start()

    def start(self) -> None:
        sympy = importlib.util.find_spec("sympy")
        site = os.path.dirname(os.path.dirname(sympy.origin)) if sympy else ""
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), "--serve", site], env={},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def run(self, programs: list, limit: float) -> list:
        """The results of programs; a server that breaks is replaced, and they get a second try."""
        for _ in range(2):
            try:
                self.process.stdin.write(json.dumps([programs, limit]).encode() + b"\n")
                self.process.stdin.flush()
                results = json.loads(self.process.stdout.readline())
                return [tuple(result) for result in results]
            except (OSError, ValueError):
                self.stop()
                self.start()
            except BaseException:  # interrupted: what is still to come must not be read as next
                self.stop()
                self.start()
                raise
        return [("error", None, False)] * len(programs)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not flushed has nowhere to go
                pipe.close()


@lru_cache
def servers(pid: int) -> queue.Queue:
    """The idle servers of process `pid`, one for each core of a rank; a fork gets its own."""
    idle = queue.Queue()
    cores = min(16, os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for _ in range(max(1, cores)):
        server = Server()
        atexit.register(lambda server=server: os.getpid() == pid and server.stop())
        idle.put(server)
    return idle


def start_servers() -> None:
    """Starts the servers of this process now; else its first program does."""
    servers(os.getpid())


def run_all(programs: list[tuple[str, bool]], limit: float) -> list[tuple]:
    """The results of (source, is_block) programs, dealt out to the servers; from any thread."""
    if not programs:
        return []
    idle, hired = servers(os.getpid()), []
    try:
        hired.append(idle.get())
        with contextlib.suppress(queue.Empty):
            while len(hired) * 8 < len(programs):
                hired.append(idle.get_nowait())
        with ThreadPoolExecutor(len(hired)) as threads:
            parts = [programs[i :: len(hired)] for i in range(len(hired))]
            ran = list(threads.map(lambda server, part: server.run(part, limit), hired, parts))
    finally:
        for server in hired:
            idle.put(server)
    results = [None] * len(programs)
    for i, part in enumerate(ran):
        results[i :: len(hired)] = part
    return results


# ---------------------------------------------------------------- scores


def score(completion: str, gold: str) -> Score:
    """The score of one completion."""
    return score_batch([completion], [gold])[0]


def score_batch(completions: list[str], golds: list[str], time_limit: float = TIME_LIMIT,
                last_number: bool = False) -> list[Score]:
    """The score of each completion against its gold; programs run side by side, each for
    `time_limit` seconds at most. `last_number`: prose that states no answer answers with it.
    """
    if len(completions) != len(golds):
        raise ValueError(f"{len(completions)} completions, {len(golds)} golds")
    texts = [first_problem(text) for text in completions]
    split = [split_format(text) for text in texts]
    ran = iter(run_all([(code, name == "omi1") for name, code in split if code], time_limit))
    scores, prose, broken = [], ("", None, False), ("error", None, False)
    for text, gold, (name, code) in zip(texts, golds, split):
        failure, answer, computed = prose if code is None else next(ran) if code else broken
        if name == "text" or name == "omi1" and not failure and is_words(answer):
            stated, failure = prose_answer(text, last_number and name == "text")
            answer = answer if stated is None else stated
        tolerance = 1e-9 if computed else 0.0  # floats round; what is written does not
        reward = float(not failure and answer is not None and equal(answer, str(gold), tolerance))
        failure = failure or (None if reward else "no answer" if answer is None else "wrong")
        scores.append(Score(reward, name, answer, failure))
    return scores


def is_words(answer: str | None) -> bool:
    """Whether a block shows nothing, or a sentence: then the closing box is the answer."""
    meaning = None if answer is None else canonical(answer)
    return meaning is None or isinstance(meaning, tuple) and meaning[:1] == ("words",)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) /
    C(n, k).

    The unbiased estimator of arXiv 2107.03374, equation 1. Raises ValueError unless 0 <= c <= n
    and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answers: list[str | None]) -> int | None:
    """The place of the first of the commonest answers. None does not vote; a tie goes to the
    earliest.
    """
    meanings = [None if answer is None else canonical(answer) for answer in answers]
    votes = collections.Counter(meaning for meaning in meanings if meaning is not None)
    return meanings.index(votes.most_common(1)[0][0]) if votes else None


def maj_at_k(answers: list[str | None], gold: str) -> float:
    """1 if the commonest answer is the gold one, else 0."""
    winner = vote(answers)
    return float(winner is not None and equal(answers[winner], gold))


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
    greedy, sampled = [row for row in rows if row["greedy"]], collections.defaultdict(list)
    for row in rows:
        if not row["greedy"]:
            sampled[row["id"]].append(row)
    n = n or len({row["id"] for row in rows})
    k = min(map(len, sampled.values()), default=0)
    pass_at_1 = sum(row["reward"] for row in greedy) / max(n, len(greedy)) if greedy else None
    summary, groups = {"n": n, "pass@1": pass_at_1, "k": k}, list(sampled.values())
    if k:
        correct = [sum(row["reward"] for row in group) for group in groups]
        summary["pass@k"] = sum(pass_at_k(len(g), int(c), k) for g, c in zip(groups, correct)) / n
        winners = [vote([row["answer"] for row in g[:k]]) for g in groups]
        won = (g[i]["reward"] for g, i in zip(groups, winners) if i is not None)
        summary["maj@k"] = sum(won) / n
        summary["sampled_pass@1"] = sum(c / len(g) for g, c in zip(groups, correct)) / n
    summary["formats"] = shares(greedy)
    summary["sampled_formats"] = shares([row for group in groups for row in group])
    failures = collections.Counter(row["failure"] for row in rows if row["failure"])
    return {**summary, "failures": dict(failures)}


def interval(share: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a share of n independent trials (Wilson 1927)."""
    z = 1.96
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def table(columns: dict[str, dict]) -> str:
    """Summaries side by side: percent with 95% intervals over the questions, then each format."""
    lines = [["", *columns]]
    for name in ("pass@1", "sampled_pass@1", "maj@k", "pass@k"):
        k = next((s["k"] for s in columns.values() if s["k"]), 0)
        cells = [percent(s.get(name), s["n"]) for s in columns.values()]
        lines.append([name.replace("@k", f"@{k}").replace("_", " "), *cells])
    for group, title in (("formats", "greedy"), ("sampled_formats", "sampled")):
        for name in FORMATS:
            cells = [s[group][name] for s in columns.values()]
            shown = ["-" if c["accuracy"] is None else f"{c['accuracy']:.1%}" for c in cells]
            parts = [f"{c['share']:6.1%}, {accuracy:>6}" for c, accuracy in zip(cells, shown)]
            lines.append([f"{title} {name}: share, accuracy", *parts])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def percent(value: float | None, n: int) -> str:
    if value is None:
        return "     -"
    low, high = interval(value, n)
    return f"{value:6.1%} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------- command line

USAGE = """usage: python verify.py FILE.jsonl [--time_limit=SECONDS] [--last_number=true]

FILE holds a JSON object a line: completion, gold and, where a question has several completions,
its id or question; "greedy": true marks those that count for pass@1. Prints pass@1, pass@k, maj@k,
share and accuracy of each format, failures by kind. --time_limit: for one program, 1 by default.
--last_number: prose that states no answer answers with its last number."""


def read_completions(file: str) -> tuple[list[dict], list[str]]:
    """The rows of a .jsonl file that hold a completion and a gold, and a complaint for each line
    that does not.
    """
    rows, bad = [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                gold = str(row["gold"]).rpartition("####")[2].strip()  # GSM8K's has its solution
                rows.append({**row, "completion": str(row["completion"]), "gold": gold})
            except (ValueError, TypeError) as error:
                bad.append(f"line {number} is not a JSON object ({error})")
            except KeyError as error:
                bad.append(f"line {number} has no {error}")
    return rows, bad


def parse_arguments(argv: list[str]) -> tuple[str, float, bool]:
    """FILE, time limit and whether the last number counts. Raises ValueError with a sentence."""
    flags = dict(word.partition("=")[::2] for word in argv if word.startswith("--"))
    files = [word for word in argv if not word.startswith("--")]
    limit, last = flags.pop("--time_limit", "1"), flags.pop("--last_number", "false")
    if flags:
        raise ValueError(f"unknown argument {next(iter(flags))}: see python verify.py --help")
    if len(files) != 1:
        raise ValueError("name one FILE.jsonl: see python verify.py --help")
    if not re.fullmatch(r"\d*\.?\d+", limit) or not float(limit):
        raise ValueError(f"--time_limit={limit} must be a number of seconds above 0")
    if last not in ("true", "false"):
        raise ValueError(f"--last_number={last} must be true or false")
    return files[0], float(limit), last == "true"


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    try:
        file, limit, last_number = parse_arguments(argv)
        rows, bad = read_completions(file)
        if not rows:
            raise ValueError(f"{file} holds no completion: each line needs completion and gold")
    except OSError as error:
        print(f"verify.py: {error.filename} cannot be read ({error.strerror})", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2
    completions, golds = [row["completion"] for row in rows], [row["gold"] for row in rows]
    for i, result in enumerate(score_batch(completions, golds, limit, last_number)):
        label = rows[i].get("id", rows[i].get("question", i))
        rows[i] = {"greedy": False, **rows[i], "id": str(label), **result._asdict()}
    summary = summarize(rows)
    print(f"{len(rows)} completions of {summary['n']} questions in {file}, 95% intervals")
    print(table({"": summary}))
    failures = ", ".join(f"{n} {kind}" for kind, n in summary["failures"].items())
    print("failures:", failures or "none")
    if bad:
        print(f"{len(bad)} lines passed over:", *bad[:10], sep="\n  ")
        print(*["  ..."] * (len(bad) > 10), sep="")
    return 0


# stand-in for the interface that another change brings


def read_rows(file: str):
    """(line, object) of a .jsonl, .json or .gz; a str in place of an object says what is wrong."""
    import gzip

    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as stream:
            text = stream.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        try:
            rows = enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not valid JSON ({error})") from None
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = ((number, line) for number, line in lines if line.strip())
    for number, row in rows:
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except (ValueError, RecursionError):
                row = "it is not valid JSON"
        yield number, row if isinstance(row, (dict, str)) else "it is not a JSON object"


def gold_answer(value) -> str:
    """The answer of a gold field: behind "####", else the last box, else the text."""
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"{value!r} is no answer")
    text = str(value)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return (boxes(text) or [text.strip()])[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
