"""Scores completions against gold answers: which format, which answer, right or wrong, and why not.

    score("... \\boxed{18}", "18") -> Score(reward=1.0, format="text", answer="18", failure=None)
    python verify.py FILE.jsonl     prints a table of what any system wrote: see --help

Code that a model wrote runs in pydantic-monty, a Python interpreter in Rust that knows no files,
network or processes; the gold answer never enters it. NOT covered: a fault of that interpreter,
whose workers have the rights of this process; and what a program learns from the clock.
"""

import atexit
import cmath
import collections
import contextlib
import gzip
import itertools
import json
import math
import operator
import os
import re
import sys
import textwrap
import unicodedata
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

FORMATS = ("tinygsm", "omi1", "text")
TIME_LIMIT = 1.0  # seconds for one program, by the clock
MEMORY_LIMIT = 64 << 20  # bytes of a program's values
WORKERS = 16  # programs side by side: those that loop for ever wait for their end together
LONGEST_ANSWER = 1000  # characters; a longer one is compared by spelling


class Score(NamedTuple):
    reward: float  # 1 if the answer equals the gold, else 0
    format: str  # one of FORMATS: every completion has one
    answer: str | None
    failure: str | None  # None, "wrong", "no answer", "error", "timeout" or "blocked"


# ---------------------------------------------------------------- format

# a line at the margin that begins a function; at the end of a completion it may be cut off
DEFINITION = re.compile(r"^def \w+ *\((?:[^\n]*\)[^\n]*:|[^)\n]*$|[^\n]*\Z)|^def \w*\Z", re.M)
# a line that may stand beside functions; a line of prose ends a program
CODE_LINE = re.compile(
    r"$|[\s@#)\]}]|(?:def|class|import|assert) \w|from [\w.]+ import|[\w.]+\("
    r"|\w[\w.\[\]', ]*(?:: *\w+ *)?[-+*/%]*=[^=]"
    r"|(?:if|elif|else|for|while|with|try|except|finally)\b.*:\s*(?:#.*)?$"
)
DOCSTRING = re.compile(r"(\"\"\"|\'\'\').*?\1", re.DOTALL)


def split_format(completion: str) -> tuple[str, str | None]:
    """The format of a completion, and its program (None in prose, "" where it breaks off)."""
    if "<llm-code>" in completion:
        blocks = re.findall(r"<llm-code>(.*?)(</llm-code>|\Z)", completion, re.DOTALL)
        whole = all(closing for _, closing in blocks)
        return "omi1", "\n".join(code.strip("\n") for code, _ in blocks) if whole else ""
    # docstrings are left out: their lines may look like prose, and need not be indented
    code = DOCSTRING.sub('""', completion.replace("\r\n", "\n"))
    code = textwrap.dedent(code).lstrip()
    if definition := DEFINITION.search(code):
        above = filter(CODE_LINE.match, code[: definition.start()].split("\n"))
        below = itertools.takewhile(CODE_LINE.match, code[definition.start() :].split("\n"))
        return "tinygsm", "\n".join([*above, *below])
    return "text", None


# ---------------------------------------------------------------- the answer in prose

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\d+))")
NUMBERS = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
# what announces an answer, and the rest of the line; then, what ends the answer within it
STATED = re.compile(
    r"(?:####|\b[Aa]nswer(?: is)?:|\b[Aa]nswer is\b)[*\s:`]{0,9}(?:\\[\[(]\s*|\$+\s*)?"
    r"(?=([^\n]{1,300}))"
)
BEHIND = re.compile(
    r"\s*(?:\.?\*\*|[.!]\s|[.!]?$|</|`|\\[\])]|\$+(?![^$]*\d)| \(|\s--|, [A-Za-z]{2}"
    r"|,? (?:and|so|or|which|because|since|as|for|that) [A-Za-z]).*"
)
ANOTHER_PROBLEM = re.compile(
    r"\n\s{0,9}(?:(?:[#*\[]{1,4} ?)?(?:(?:Next|New) )?"
    r"(?:Question|Problem|Exercise|Example|Q|Human|User|Input|Instruction|Task)\b(?! is)"
    r"|\n[^\n]{1,999}\?[ \t]{0,9}\n)"
)


def first_problem(completion: str) -> str:
    """A completion up to the problem that some models make up and solve behind their answer."""
    if "<llm-code>" not in completion and DEFINITION.search(completion):
        return completion  # split_format finds the end of a program
    answered = BOX.search(completion) or STATED.search(completion)
    another = answered and ANOTHER_PROBLEM.search(completion, answered.end())
    return completion[: another.start()] if another else completion


def boxes(text: str) -> list[str]:
    """What each \\boxed{...} of a text holds, braces nested; one that is not closed: nothing."""
    found, end = [], 0
    for box in BOX.finditer(text):
        depth = 1
        for brace in re.finditer(r"[{}]", text[box.end() :] if box.start() >= end else ""):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = box.end() + brace.end()
                found.append(text[box.end() : end - 1])
                break
    return found


def prose_answer(text: str, last_number: bool = False) -> tuple[str | None, str]:
    """The answer that prose states: the last box, else "####" or "answer is", else None or the
    last number. "blocked" where it lists more than two different boxes, which is fishing.
    """
    boxed = boxes(text)
    if len(set(map(canonical, boxed[:100]))) > 2:
        return None, "blocked"
    stated = boxed or [BEHIND.sub("", words) for words in STATED.findall(text)]
    stated = stated or (NUMBERS.findall(text) if last_number else [])
    return (stated[-1] if stated else None), ""


# ---------------------------------------------------------------- programs


@lru_cache
def interpreters(pid: int):
    """The workers of process `pid`, started when they are needed."""
    import pydantic_monty

    if interpreters.cache_info().currsize:  # the threads that talk to them are not in a fork's copy
        raise RuntimeError("a forked process cannot run programs if its parent has: use spawn")
    pool = pydantic_monty.Monty(max_processes=WORKERS).__enter__()
    atexit.register(lambda: os.getpid() == pid and pool.__exit__(None, None, None))
    return pool


def run_program(source: str, is_block: bool, limit: float) -> tuple[str | None, str, bool]:
    """What the function of a program returns, or the last expression or print of a block; its
    failure or ""; whether a float computed it.
    """
    import pydantic_monty

    if not is_block:
        names = re.findall(r"^def (\w+)", source, re.M) or ["nothing"]
        source += f"\n{'simple_math_problem' if 'simple_math_problem' in names else names[-1]}()"
    printed = pydantic_monty.CollectString(max_bytes=100_000)
    limits = {"max_feed_duration_secs": limit, "max_memory": MEMORY_LIMIT}
    checkout = interpreters(os.getpid()).checkout(limits=limits, os_policy={"sleep": "zero"})
    try:
        with checkout as session:  # of its own: nothing is left behind for the next program
            session.feed_run("eval = exec = None")  # what computes an answer is there to be read
            value = session.feed_run(source, print_callback=printed)
        if is_block and value is None:
            value = printed.output.strip().rpartition("\n")[2] or None
            value = float(value) if value and re.fullmatch(r"-?\d+\.\d+", value) else value
        return plain(value), "", type(value) is float
    except pydantic_monty.MontyError as error:
        kind = type(error.exception())
        if getattr(error, "timed_out", kind is TimeoutError):
            return None, "timeout", False
        missing = issubclass(kind, (ImportError, PermissionError, NotImplementedError))
        return None, "blocked" if missing else "error", False
    except (TypeError, ValueError):  # of plain; a block may end on what is no answer
        return None, "" if is_block else "error", False


def plain(value, depth: int = 0) -> str | None:
    """A value of a built-in type as a string. Raises TypeError for any other."""
    if value is None:
        return None
    if type(value) is float:
        return f"{value:.12g}"  # 0.1 + 0.2 is 0.3
    if type(value) is str and (len(value) > LONGEST_ANSWER or "\\boxed" in value):
        raise TypeError("an answer is short, and a box is for the text to close with")
    if type(value) in (int, bool, str, Decimal):
        return str(value)
    if type(value) in (list, tuple, set) and depth < 3 and 0 < len(value) <= 20:
        inside = ", ".join(str(plain(item, depth + 1)) for item in value)
        return f"({inside})" if type(value) is tuple else f"\\{{{inside}\\}}"
    raise TypeError(f"a {type(value).__name__} is not an answer")


def run_all(programs: list[tuple[str, bool]], limit: float) -> list[tuple]:
    """The results of (source, is_block) programs; from any thread."""
    if not programs:
        return []
    interpreters(os.getpid())
    with ThreadPoolExecutor(WORKERS) as threads:
        return list(threads.map(lambda program: run_program(*program, limit), programs))


# ---------------------------------------------------------------- equality: one spelling
#
# Two answers are equal when their canonical forms are. A text is first rid of what changes no
# meaning (fonts, spacing, currency, units), then read by the grammar below. What cannot be read is
# compared by its spelling. Nothing is ever evaluated as Python.

CHARACTERS = str.maketrans("−‐‑‒–—×·⋅•∙∗÷⁄∕$€£¥~“”`\"", "------******///         ")
MEANINGS = dict(zip(*[iter(r"""\le <= \leq <= \leqslant <= ≤ <= \ge >= \geq >= \geqslant >= ≥ >=
    \ne != \neq != ≠ != \lt < \gt > \in = ∈ = \cdot * \times * \ast * \div / \cup , ∪ , \circ °
    \degree ° \lbrace ⦃ \rbrace ⦄ \lvert | \rvert | \vert | \dfrac \frac \tfrac \frac \cfrac \frac
    \bar \overline √ \sqrt ∛ \sqrt[3] ∞ \infty π \pi ± \pm \emptyset ⦃⦄ \varnothing ⦃⦄ ∅ ⦃⦄
    zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 dozen *12
    hundred *10^2 thousand *10^3 million *10^6 billion *10^9 trillion *10^12 half /2 halve /2
    third /3 quarter /4 fourth /4 fifth /5 sixth /6 seventh /7 eighth /8 ninth /9 tenth /10
    hundredth /100 thousandth /1000""".split())] * 2))
FUNCTION = "asin|acos|atan|acot|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|abs"
# a text in LaTeX, a word of four letters, or one that is known; a variable is none of these
UNIT = (r"(?:\"(?! *(?:i|e|[apAP]\.?[mM]\b\.?) *\")[^\"]*\"|(?<=[ /\-])(?!squared|cubed|factorial)"
        r"[^\W\d_]{4,}\b|(?<= )(?:[b-df-hj-np-tv-z][aeiou][a-z]|USD|EUR)\b|[^\W\d_a-zA-Z]+"
        r"|\b(?:cm|mm|km|kg|mg|ft|in|mph|lbs?|oz|mi|sq|yd|hrs?|sec)\b|(?<=/)[hs]\b)")
# pattern -> what is written in its place, in this order; ␣ is a space, "..." a text in LaTeX
SPELLINGS = r"""
\\(?:text)?color *\{\w+\}|\\hspace\*?\{[^{}]*\}|(?<=\d)(?:,?\\[,!;:]|\{,\}) ?(?=\d{3}(?!\d)) ->
\\mathbb *\{?R\}? -> (-\\infty,\\infty)
\\(?:text\w*|[mh]box|math[a-z]+|operatorname|emph) *\{([^{}]*)\}|\{ *\\(?:rm|bf|it)\b([^{}]*)\} -> "\1\2"
\\begin *\{(?:[pb]?matrix|array)\} *(?:\{[lcr|]*\})? -> ⟦⟦
(?:\\\\)?\s*\\end *\{\w+\} -> ⟧⟧
\\\\(?: *\[[^]]*\])? -> ⟧,⟦
\\\{ -> ⦃
\\\} -> ⦄
\\(?:left|right|[bB]igg?[lr]?|q?quad|\w+style|limits|rm|bf|it|[lL]arge|huge|text|math)(?![A-Za-z]) -> ␣
\\[,;:! ()\[\]$%#&]|%|\bpercent\b -> ␣
\\?arc(?=sin|cos|tan|cot) -> a
\\(?!(?:FUNCTION|frac|binom|overline|infty|pi)\b)[A-Za-z]+ *(?=\{)|" *" ->
"([^"]*\d[^"]*)"|" *(and|or) *" -> ␣\1\2␣
&|,? *\b(?:and|or)\b|; -> ,␣
\^ *\{? *° *\}?|° *"? *[CF]\b *"? -> °
^( *-?) *"? *(?:US|USD|EUR|GBP|INR|Rs\.?) *"? *(?=-?\d) -> \1
(?<=[\w)}\]⟧⦄°!.]) *-?(?: *(?:[/*.]|per\b)? *UNIT\.?(?: *\^ *\{?-?\d\}?)?)+(?= *(?:$|[-+,;)\]}⦄=<>])) -> ␣
^ *("[^"]*"|[A-Za-z][A-Za-z ]+): *(?=\S) -> \1=
" -> ␣
\{([^{}]*)\\over(?![a-z])([^{}]*)\} -> \\frac{\1}{\2}
\\(frac|binom) *(\d) -> \\\1{\2}
(?<![\w.^])(\d+) *\\frac *\{(\d+)\} *(?:\{(\d+)\}|(\d)) -> {\1+\2/\3\4}
(?<![\w.])(\d+) +(\d+/\d+)(?!\d) -> {\1+\2}
\\sqrt *\[([^][]*)\] -> \\root{\1}
\|([^|]+)\| -> abs(\1)
_ *\{ *(\w+) *\} -> _\1
(?<=\*)I\b|\bI(?=\*)|(?<=\d)j\b -> i
""".replace("UNIT", UNIT).replace("FUNCTION", FUNCTION).strip().split("\n")
SPELLINGS = [line.partition(" ->")[::2] for line in SPELLINGS]
SPELLINGS = [(re.compile(found), new.strip().replace("␣", " ")) for found, new in SPELLINGS]
THOUSANDS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}((?:,\d{3})+(?!,?\d)|(?: \d{3})+(?![\w/]))")


def clean(text: str) -> str:
    """A text without what changes no meaning: fonts, spacing, currency, units, spellings."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
        text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    text = text.translate(CHARACTERS)
    text = re.sub(r"\\[A-Za-z]+|[^\x00-\x7f]|(?<!\\)\b[a-z]{3,}\b",
                  lambda m: MEANINGS.get(m[0]) or MEANINGS.get(m[0].removesuffix("s"), m[0]), text)
    text = re.sub(r"\\dot *\{?(\d)\}?(?:(\d*)\\dot *\{?(\d)\}?)?", r"\\overline{\1\2\3}", text)
    text = re.sub(r"(\d*)\.(\d*)\\overline *\{?(\d{1,50})\}?", repeating, text)
    for found, new in SPELLINGS:
        text = found.sub(new, text)
    if not re.search(r"[\[(⦃]", text):
        text = THOUSANDS.sub(lambda m: re.sub("[ ,]", "", m[0]), text)
    text = text if re.search("sin|cos|tan|cot|sec|csc", text) else text.replace("°", "")
    return text.strip().rstrip(".,: ").removeprefix("=").strip()


def repeating(match: re.Match) -> str:
    """0.1666... as a fraction."""
    whole, fixed, repeated = match.groups()
    nines, value = 10 ** len(repeated) - 1, int(whole + fixed or 0)
    return rf"\frac{{{value * nines + int(repeated)}}}{{{10 ** len(fixed) * nines}}}"


# ---------------------------------------------------------------- equality: numbers

POINTS = range(3)  # where variables are computed: what agrees there agrees, but for rare chance


def each(function, *numbers) -> tuple:
    """A function of numbers, at each point."""
    return tuple(map(function, *numbers))


def variable(name: str) -> tuple:
    """A rational number of either sign at each point."""
    hashed = [zlib.crc32(f"{name} {point}".encode()) for point in POINTS]
    return tuple(Fraction(h % 9973 + 1, 997) * (-1) ** n for n, h in enumerate(hashed))


def power(base, exponent):
    """base ** exponent: exact where that is rational; of a negative number the real odd root."""
    if not (isinstance(base, Fraction) and isinstance(exponent, Fraction)):
        return complex(base) ** complex(exponent)
    n, parts = exponent.denominator, (abs(base.numerator), base.denominator)
    if max(parts).bit_length() * abs(exponent) > 10_000:
        raise ValueError("too large")
    sign = -1 if base < 0 and n % 2 else 1
    roots = parts if n == 1 else [round(part ** (1 / n)) for part in parts]
    if (root := sign * Fraction(*roots)) ** n == base:
        return root**exponent.numerator
    return complex(sign * base) ** complex(exponent) * sign**exponent.numerator


CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf, "inf": math.inf}
FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan exp asin acos atan".split()} | {
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "ln": cmath.log,
    "csc": lambda x: 1 / cmath.sin(x), "acot": lambda x: cmath.atan(1 / x), "log": cmath.log10,
    "sqrt": lambda x: power(x, Fraction(1, 2)), "abs": abs}
OPERATIONS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
              "/": (2, operator.truediv), "^": (3, power), "**": (3, power)}
POSTFIX = {"!": lambda x: math.gamma(x + 1), "°": lambda x: x * math.pi / 180}
TWO = {r"\frac": operator.truediv, r"\root": lambda n, x: power(x, 1 / n), r"\binom":
       lambda n, k: math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1)}


def key(meaning: tuple):
    """A meaning as something hashable: a number as its digits, at all points or once."""
    if isinstance(meaning[0], str):
        return meaning
    found = tuple(map(digits, meaning))
    return found[0] if len(set(found)) == 1 else found


def digits(x) -> Fraction | str:
    """A Fraction, where x is one or looks like one; else ten digits."""
    if isinstance(x, Fraction):
        return x
    real, imaginary = (p if abs(p) > 1e-11 * abs(x) else 0.0 for p in (x.real, x.imag))
    if imaginary or cmath.isinf(x):
        return f"{real:.10g}{imaginary:+.10g}i" if imaginary else f"{x.real}"
    near = Fraction(real).limit_denominator(1000)
    rounding = 1e-12 * min(max(1, abs(real)), 1e4)  # the roots of large integers stay apart
    return near if near and abs(near - real) < rounding or not real else f"{real:.10g}"


# ---------------------------------------------------------------- equality: the grammar

LETTER = r"[^\W\d_]"
NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+")
TOKEN = re.compile(
    rf"{NUMBER.pattern}|(?:\\[A-Za-z]+|(?:{FUNCTION}|pi|inf)(?!{LETTER}{{2}})"
    rf"|{LETTER}{{3,}}(?: +{LETTER}+)*|{LETTER})(?:_\w+)?'*|\*\*|[<>!]=|\S")
SYMBOL = (rf"(?:\\?{LETTER}(?:_\w+)?|[A-Z]+|{LETTER}{{3,}}[\w ]*|m?\\(?:angle|triangle)[A-Z]+"
          r"|\[[A-Z]+\]|\\[A-Za-z]+)'*")
NAME = re.compile(rf"{SYMBOL}(?:\^\{{?-1\}}?)?(?:\([\w,]*\))?|\({SYMBOL}(?:,{SYMBOL})+\)")


class Reader:
    """Reads an answer in LaTeX or in plain notation, and computes it as it reads.

    A number is the tuple of its values at the points; all else a kind and its parts, as in
    ("(]", 0, 5/2). Raises an exception where the text is no mathematics.
    """

    def __init__(self, text: str):
        self.tokens, self.at = [*TOKEN.findall(text), ""], 0

    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *choices: str) -> str:
        """The next token, and goes on behind it; "" where it is none of these."""
        found = self.next() if not choices or self.next() in choices else ""
        self.at += bool(found)
        return found

    def relation(self) -> tuple:
        sides, names, signs = [], [], []
        while len(sides) == len(signs):
            start = self.at
            sides.append(self.expression())
            side = "".join(self.tokens[start : self.at])
            names.append(side if NAME.fullmatch(side) and side not in CONSTANTS else "")
            if sign := self.take("=", "<", ">", "<=", ">=", "!="):
                signs.append(sign)
        return relate(sides, names, signs) if signs else sides[0]

    def expression(self, level: int = 1) -> tuple:
        """What binds at least as tightly as `level`: 1 is a sum, 2 a product, 3 a power."""
        sign = self.take("-", "+")
        value = self.expression(3) if sign else self.atom()
        value = each(operator.neg, value) if sign == "-" else value
        while True:
            if sign := self.take(*POSTFIX):
                value = each(POSTFIX[sign], value)
                continue
            # a product needs no sign, but where a number stands behind a number
            number = NUMBER.match(self.tokens[self.at - 1])
            factor = re.match(r"[({\\]|[^\W\d_]" if number else r"[({\\\w]", self.next())
            binds, operation = OPERATIONS.get("*" if factor else self.next(), (0, None))
            if binds < level:
                return value
            self.take(*OPERATIONS)
            value = each(operation, value, self.expression(min(binds + 1, 3)))

    def atom(self) -> tuple:
        token = self.take()
        name, _, index = token.removeprefix("\\").partition("_")
        if NUMBER.fullmatch(token):
            return tuple(Fraction(token) for _ in POINTS)
        if token in ("(", "[", "{", "⦃", "⟦"):
            return self.bracket(token)
        if token in TWO:
            return each(TWO[token], self.atom(), self.atom())
        if name in FUNCTIONS:
            return self.function(name, index)
        if name in CONSTANTS:
            return tuple(CONSTANTS[name] for _ in POINTS)
        if name[:1].isalpha():
            return variable(token.lower() if len(name) > 2 else token)
        raise ValueError(token)

    def bracket(self, opening: str = "") -> tuple:
        """What a bracket holds, or the whole text: there, a list without brackets is a set."""
        parts = []
        while self.next() not in (")", "]", "}", "⦄", "⟧", ""):
            if not self.take(","):
                parts.append(self.relation())
        kind = opening + self.take()
        if kind in ("", "()", "[]", "{}", "⦃⦄") and len(parts) == 1:
            return parts[0]
        if kind == "⦃⦄" or kind in ("", "{}") and parts:
            return gather(list(map(key, parts)))
        if kind not in ("()", "[]", "(]", "[)", "⟦⟧"):
            raise ValueError(kind)
        return (kind, *map(key, parts))

    def function(self, name: str, base: str) -> tuple:
        """A function, with the exponent and the argument behind it: sin^2 x, log_2 8, ln(3)."""
        exponent = self.expression(3) if self.take("^") else None
        if exponent and exponent[0] == -1 and f"a{name}" in FUNCTIONS:
            name, exponent = f"a{name}", None
        bracketed = self.next() in ("(", "{")
        value = self.atom() if bracketed else self.expression(3)
        while not bracketed and re.fullmatch(r"[A-Za-z]|\\(pi|theta)", self.next()):
            value = each(operator.mul, value, self.atom())
        value = each(lambda x: cmath.log(x, int(base)) if base else FUNCTIONS[name](x), value)
        return each(power, value, exponent) if exponent else value


def gather(keys: list):
    """A list or set: its elements in any order; one element is itself."""
    if len({k[1] for k in keys if isinstance(k, tuple) and k[0] == "named"}) < 2:
        keys = [k[2] if isinstance(k, tuple) and k[0] == "named" else k for k in keys]
    flat = {m for k in keys for m in (k[1] if isinstance(k, tuple) and k[0] == "set" else [k])}
    return flat.pop() if len(flat) == 1 else ("set", frozenset(flat))


def relate(sides: list, names: list, signs: list) -> tuple:
    """What a relation says of a name: "x = 5" is 5, "x < 5" an interval. Of no name: an equation up
    to a factor, else its sides.
    """
    if signs[0] == "=" and any(names):
        name, value = (names[0], sides[-1]) if names[0] else (names[-1], sides[0])
        return ("named", name.partition("_")[0], key(value))
    if signs == ["="]:
        difference = each(operator.sub, *sides)
        if len(set(difference)) == 1:
            raise ValueError("says nothing")
        return ("=", key(each(lambda x: x / difference[0], difference)))
    if signs[0] in (">", ">="):
        sides, names = sides[::-1], names[::-1]
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
    ends = list(map(key, sides))
    if signs == ["!="] and names[0]:
        return gather([("()", "-inf", ends[1]), ("()", ends[1], "inf")])
    if len(ends) == 2 and any(names):
        ends = ["-inf", *ends] if names[0] else [*ends, "inf"]
        signs = ["<", *signs] if names[0] else [*signs, "<"]
    if len(ends) == 3 and any(names):
        return ("[("[signs[0] == "<"] + "])"[signs[1] == "<"], ends[0], ends[2])
    return (" ".join(signs), *ends)


@lru_cache(maxsize=4096)
def canonical(answer: str):
    """What equal answers have in common. Hashable. Raises nothing, whatever the text."""
    text = answer.strip()
    if re.fullmatch(r"-?[0-9]{1,15}", text):
        return Fraction(int(text))
    if len(text) > LONGEST_ANSWER:
        return ("words", text)
    try:
        text = clean(text)
        if based := re.fullmatch(r"\(?([\dA-F. ]+?)\)? *_ *(\d+)", text):
            return ("base", based[1].replace(" ", ""), based[2])
        signed = {re.sub(r"\\(?:pm|mp)(?![a-z])", sign, text) for sign in "+-"}
        return gather([key(Reader(one).bracket()) for one in signed])
    except Exception:  # what breaks the reader is no answer that a reader could give
        return ("words", re.sub(r"[\s{}]|\.(?!\d)", "", text).lower() or text)


def equal(prediction: str, gold: str, tolerance: float = 0.0) -> bool:
    """Whether a predicted answer is the gold one, exactly; as a number within a relative tolerance
    where that is above 0. A prediction may also be an equation that ends in the gold number, or
    that says the same as the gold equation.
    """
    ours, theirs = canonical(prediction), canonical(gold)
    if ours == theirs:
        return bool(prediction.strip())
    if tolerance:
        with contextlib.suppress(ValueError, TypeError):  # of float
            return math.isclose(float(ours), float(theirs), rel_tol=tolerance)
    if prediction[:1] == "[" and isinstance(theirs, tuple) and theirs[0] == "set":
        return canonical(prediction[1:-1]) == theirs  # a list of Python's
    if "=" in prediction and "=" in gold:  # one may be solved for a variable
        both = (re.sub("^([^=]+)=([^=]+)$", r"\1-(\2)=0", text) for text in (prediction, gold))
        return operator.eq(*map(canonical, both))
    _, sign, last = prediction.rpartition("=")
    return bool(sign) and isinstance(theirs, Fraction) and canonical(last) == theirs


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
    scores = []
    for text, gold, (name, code) in zip(texts, golds, split):
        broken = "error" if code == "" else ""
        answer, failure, computed = next(ran) if code else (None, broken, False)
        shows = name == "tinygsm" or answer and not is_words(answer)
        if name == "text" or failure == "blocked" and name == "omi1" or not (failure or shows):
            # prose, or a block without a value or a module: the box behind it is the answer
            stated, failure = prose_answer(text, last_number and name == "text")
            answer = answer if stated is None else stated
        tolerance = 1e-11 if computed else 0.0  # floats round; what is written does not
        reward = float(not failure and answer is not None and equal(answer, str(gold), tolerance))
        failure = failure or (None if reward else "no answer" if answer is None else "wrong")
        scores.append(Score(reward, name, answer, failure))
    return scores


def is_words(answer: str) -> bool:
    meaning = canonical(answer)
    return isinstance(meaning, tuple) and meaning[0] == "words"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them correct, hold a correct one: 1 - C(n-c, k) /
    C(n, k), the unbiased estimator of arXiv 2107.03374, equation 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answers: list[str | None]) -> int | None:
    """The place of the first of the commonest answers. None does not vote."""
    forms = [None if answer is None else canonical(answer) for answer in answers]
    votes = collections.Counter(form for form in forms if form is not None)
    return forms.index(votes.most_common(1)[0][0]) if votes else None


def maj_at_k(answers: list[str | None], gold: str) -> float:
    """1 if the commonest answer is the gold one, else 0."""
    winner = vote(answers)
    return float(winner is not None and equal(answers[winner], gold))


# ---------------------------------------------------------------- summary and table


def shares(rows: list[dict]) -> dict:
    """For each format: its share of rows, and its accuracy (None where it does not occur)."""
    names = dict.fromkeys([*FORMATS, *(row["format"] for row in rows)])
    found = {name: [row["reward"] for row in rows if row["format"] == name] for name in names}
    return {name: {"share": len(rewards) / max(1, len(rows)),
                   "accuracy": sum(rewards) / len(rewards) if rewards else None}
            for name, rewards in found.items()}


def summarize(rows: list[dict], n: int | None = None) -> dict:
    """Metrics of scored rows (id, gold, format, answer, reward, failure, greedy) of n questions.

    Greedy rows give pass@1 and formats; the others sampled_formats, pass@k and maj@k, k of them a
    question. Questions without rows count as wrong where n counts them.
    """
    greedy, sampled = [row for row in rows if row["greedy"]], collections.defaultdict(list)
    for row in rows:
        if not row["greedy"]:
            sampled[row["id"]].append(row)
    n, groups = n or len({row["id"] for row in rows}), list(sampled.values())
    k = min(map(len, groups), default=0)
    pass_at_1 = sum(row["reward"] for row in greedy) / max(n, len(greedy)) if greedy else None
    summary = {"n": n, "pass@1": pass_at_1, "k": k}
    if k:
        correct = [int(sum(row["reward"] for row in group)) for group in groups]
        winners = [vote([row["answer"] for row in group[:k]]) for group in groups]
        won = (g[i]["reward"] for g, i in zip(groups, winners) if i is not None)
        summary["pass@k"] = sum(pass_at_k(len(g), c, k) for g, c in zip(groups, correct)) / n
        summary["maj@k"] = sum(won) / n
        summary["sampled_pass@1"] = sum(c / len(g) for g, c in zip(groups, correct)) / n
    failures = collections.Counter(row["failure"] for row in rows if row["failure"])
    return {**summary, "formats": shares(greedy), "failures": dict(failures),
            "sampled_formats": shares([row for group in groups for row in group])}


def percent(share: float | None, n: int) -> str:
    """A share of n independent trials with its 95% confidence interval (Wilson 1927)."""
    if share is None:
        return "     -"
    z, scale = 1.96, 1 + 1.96**2 / n
    center = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return f"{share:6.1%} [{100 * max(0, center - half):.1f}, {100 * min(1, center + half):.1f}]"


def table(columns: dict[str, dict]) -> str:
    """Summaries side by side: percent with 95% intervals over the questions, then each format."""
    lines, summaries = [["", *columns]], columns.values()
    k = max((s["k"] for s in summaries), default=0)
    for name in ("pass@1", "sampled_pass@1", "maj@k", "pass@k"):
        if any(s.get(name) is not None for s in summaries) and (k > 1 or "@k" not in name):
            title = name.replace("@k", f"@{k}").replace("_", " ")
            lines.append([title, *(percent(s.get(name), s["n"]) for s in summaries)])
    for group, title in (("formats", "greedy"), ("sampled_formats", "sampled")):
        for name in dict.fromkeys(name for s in summaries for name in s[group]):
            cells = [s[group].get(name, {"share": 0, "accuracy": None}) for s in summaries]
            shown = ["-" if c["accuracy"] is None else f"{c['accuracy']:.1%}" for c in cells]
            parts = [f"{c['share']:6.1%}, {accuracy:>6}" for c, accuracy in zip(cells, shown)]
            lines.append([f"{title} {name}: share, accuracy", *parts])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


# ---------------------------------------------------------------- files and command line


def read_rows(file: str) -> Iterator[tuple[int, dict | str]]:
    """The objects of a .jsonl file, one a line, or of a .json array, also .gz, with the number of
    each from 1; or, in place of one, what is wrong with it. Raises ValueError where nothing can
    be read.
    """
    number = 0
    try:
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rb") as stream:
            lines = iter(stream)
            first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
            rows = itertools.chain([first], lines)
            if ".json" in str(file).removesuffix(".gz")[-5:] and first.lstrip()[:1] == b"[":
                rows = json.loads(decode(b"".join(rows)))
            for number, row in enumerate(rows, 1):
                if isinstance(row, dict) or row.strip():
                    yield number, parse(row)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file} cannot be read ({reason})") from None
    if not number:
        raise ValueError(f"{file} is empty")


def decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def parse(row: bytes | dict) -> dict | str:
    try:
        row = json.loads(decode(row)) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return row if isinstance(row, dict) else "is not an object of JSON"


def gold_answer(value) -> str:
    """The answer of a gold field: what is behind "####", else a worked solution's last box, else
    the text itself. Raises ValueError where there is none.
    """
    if type(value) in (int, float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"a gold answer is a text or a number, not {json.dumps(value)[:30]}")
    answer = value.rpartition("####")[2] if "####" in value else (boxes(value) or [value])[-1]
    if not answer.strip():
        raise ValueError("its gold answer is empty")
    return answer.strip()


def main(argv: list[str]) -> int:
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
