"""Scores completions against gold answers: which format, which answer, right or wrong, and why not.

Programs run in pydantic-monty, a Python in Rust without files, network or processes; the gold
answer never enters it. NOT covered: a fault of Monty, whose workers have our rights; its clock.
"""

import atexit
import cmath
import collections
import gzip
import itertools
import json
import math
import operator
import os
import random
import re
import sys
import textwrap
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Iterator, NamedTuple

FORMATS = ("tinygsm", "omi1", "text")
TIME_LIMIT = 1.0  # seconds for one program, by the clock
MEMORY = 64 << 20  # bytes of a program's values
WORKERS = 16  # programs side by side: those that loop for ever wait for their end together
STARTING = threading.Lock()  # one thread at a time starts the workers
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
    r"|(?:if|elif|else|for|while|with|try|except|finally)\b.*:\s*(?:#.*)?$")


def split_format(completion: str) -> tuple[str, str | None]:
    """The format of a completion, and its program (None in prose, "" where it breaks off)."""
    if "<llm-code>" in completion:
        blocks = re.findall(r"<llm-code>(.*?)(</llm-code>|\Z)", completion, re.DOTALL)
        whole = all(closing for _, closing in blocks)
        return "omi1", "\n".join(code.strip("\n") for code, _ in blocks) if whole else ""
    # docstrings are left out: their lines may look like prose, and need not be indented
    code = re.sub(r"(\"\"\"|\'\'\')(?s:.*?)\1", '""', completion.replace("\r\n", "\n"))
    code = textwrap.dedent(code.lstrip("\ufeff")).lstrip()
    if definition := DEFINITION.search(code):
        above = filter(CODE_LINE.match, code[: definition.start()].split("\n"))
        below = itertools.takewhile(CODE_LINE.match, code[definition.start() :].split("\n"))
        return "tinygsm", "\n".join([*above, *below])
    return "text", None


# ------------------------ the answer in prose: in \boxed{...}, braces four deep, or \boxed 5
INSIDE = r"(?:[^{}]++|\{(?:[^{}]++|\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\})*+\})*+"
BOX = re.compile(rf"\\(?:boxed|fbox)(?:\s*\{{|\s+)((?<=\{{){INSIDE}(?=\}})|(?<!\{{)[\d.,/]*\d)")
# what announces an answer, and the rest of the line; then, what ends the answer within it
STATED = re.compile(
    r"(?:####|\b[Aa]ns(?:wer)?(?: is\b:?|:))[*\s:`]{0,9}(?:\\[\[(]\s*|\$+\s*)?(?=([^\n]{1,300}))")
BEHIND = re.compile(
    r"\s*(?:\.?\*\*|[.!]\s|[.!]?$|</|`|\\[\])]|\$+(?![^$]*\d)| \(|\s--|, [A-Za-z]{2}"
    r"|,? (?:and|so|or|which|because|since|as|for|that) [A-Za-z]).*")
ANOTHER_PROBLEM = re.compile(
    r"\n\s{0,9}(?:[#*\[]{0,4} ?(?:(?:Next|New) \w+|Question|Problem|Exercise|Example|Q|Human|User"
    r"|Input|Instruction|Task)\b(?! is)|\n[^\n]{1,999}\?[ \t]{0,9}\n)")


def first_problem(completion: str) -> str:
    """A completion up to the problem that some models make up and solve behind their answer."""
    if "<llm-code>" not in completion and DEFINITION.search(completion):
        return completion  # split_format finds the end of a program
    answered = BOX.search(completion) or STATED.search(completion)
    another = answered and ANOTHER_PROBLEM.search(completion, answered.end())
    return completion[: another.start()] if another else completion


def prose_answer(text: str) -> tuple[str | None, str]:
    """The last box, else what is behind "####" or "answer is"; its failure, or ""."""
    boxed = BOX.findall(text)
    if len(set(map(canonical, boxed[:100]))) > 2:  # which is fishing
        return None, "blocked"
    stated = boxed or [BEHIND.sub("", words) for words in STATED.findall(text)[-1:]]
    return (stated[-1] if stated else None), ""


# ---------------------------------------------------------------- programs
@lru_cache
def interpreters(pid: int) -> tuple:
    """The package, and the workers of process `pid`, which start when they are first needed."""
    try:
        import pydantic_monty
    except ImportError:
        raise ImportError("programs need pydantic-monty: pip install -r requirements.txt") from None
    if interpreters.cache_info().currsize:  # the threads that talk to them are not in a fork's copy
        raise RuntimeError("a forked process cannot run programs if its parent has: use spawn")
    sys.modules.setdefault("opentelemetry", None)  # else each program looks for it on the disk
    pool = pydantic_monty.Monty(max_processes=WORKERS).__enter__()
    atexit.register(lambda: os.getpid() == pid and pool.__exit__(None, None, None))
    return pydantic_monty, pool


def run_program(source: str, is_block: bool, limit: float, again=True) -> tuple[str | None, str]:
    """What a function returns, or a block's last expression or print; the failure, or ""."""
    with STARTING:  # from any thread
        monty, pool = interpreters(os.getpid())
    code = "eval = exec = None\n" + source  # what computes an answer is there to be read
    if not is_block:
        names = re.findall(r"^def (\w+)", source, re.M) or ["nothing"]
        code += f"\n{'simple_math_problem' if 'simple_math_problem' in names else names[-1]}()"
    limits = {"max_feed_duration_secs": limit, "max_memory": MEMORY}
    printed = monty.CollectString(100_000)
    try:  # a session of its own: nothing is left behind for the next program
        with pool.checkout(limits=limits, os_policy={"sleep": "call_host"}) as session:
            value = session.feed_run(code, print_callback=printed)
        if is_block and value is None:
            value = printed.output.strip().rpartition("\n")[2] or None
        return value if value is None else plain(value), ""
    except monty.MontyError as error:
        reason = error.exception()
        late = isinstance(reason, TimeoutError) or getattr(error, "timed_out", False)
        if again and isinstance(error, monty.MontyCrashedError) and not late:  # killed from outside
            return run_program(source, is_block, limit, again=False)
        missing = isinstance(reason, (ImportError, PermissionError, NotImplementedError))
        return None, "timeout" if late else "blocked" if missing else "error"
    except (TypeError, ValueError):  # of plain; a block may end on what is no answer
        return None, "" if is_block else "error"


def plain(value, depth: int = 0) -> str:
    """A number, a text or a list of them as a text. Raises TypeError for any other value."""
    if isinstance(value, float):
        text = f"{value:.12g}"  # 0.1 + 0.2 is 0.3
        return text if len(text) < 13 else f"{value:.17g}"
    if isinstance(value, (list, tuple, set)) and depth < 3 and 0 < len(value) <= 20:
        inside = ", ".join(plain(item, depth + 1) for item in value)
        return f"({inside})" if isinstance(value, tuple) else f"\\{{{inside}\\}}"
    if not isinstance(value, (int, str, Decimal)) or "\\boxed" in str(value):
        raise TypeError("no answer, or a box, which is for the text to close with")
    return str(value)


# ---------------------------------------------------------------- equality: one spelling
# An answer is cleaned, then read by the grammar below; what that cannot read keeps its spelling.

CHARACTERS = str.maketrans("−‐‑‒–—×·⋅•∙∗÷⁄∕$€£¥~“”`\"", "------******///         ")
MEANINGS = dict(zip(*[iter(r"""\le <= \leq <= \leqslant <= ≤ <= \ge >= \geq >= \geqslant >= ≥ >= \ne
    != \neq != ≠ != \lt < \gt > \in = ∈ = \cdot * \times * \ast * \div / \cup , ∪ , \circ ° \degree
    ° \{ ⦃ \} ⦄ \lbrace ⦃ \rbrace ⦄ \lvert | \rvert | \vert | \emptyset ⦃⦄ \varnothing ⦃⦄ ∅ ⦃⦄
    \dfrac \frac \tfrac \frac \cfrac \frac \bar \overline \lg \log \approx ≈ ∞ \infty π \pi ± \pm
    \sqrt \root{2} sqrt \root{2} √ \root{2} ∛ \root{3} \cot \frac1\tan cot \frac1\tan \sec
    \frac1\cos \csc \frac1\sin zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9
    ten 10 dozen *12 hundred *10^2 thousand *10^3 million *10^6 billion *10^9 trillion *10^12 half
    /2 halve /2 third /3 quarter /4 fourth /4 fifth /5 sixth /6 seventh /7 eighth /8 ninth /9 tenth
    /10 hundredth /100 thousandth /1000""".split())] * 2))
# a text in LaTeX, a word of four letters, or one that is known; a variable is none of these
UNIT = (r"(?:“(?! *(?:i|e|pi|[apAP]\.?[mM]\b\.?) *”)[^”]*”|(?<=[ /\-])(?!squared|cubed|factorial)"
        r"[^\W\d_]{4,}\b|(?<= )(?:[b-df-hj-np-tv-z][aeiou][a-z]|USD|EUR)\b|[^\W\d_a-zA-Z]+"
        r"|\b(?:cm|mm|km|kg|mg|ft|in|mph|lbs?|oz|mi|sq|yd|hrs?|sec)\b|(?<=/)[hs]\b)")
FUNCTION = "asin|acos|atan|sin|cos|tan|ln|log|exp|abs"
# pattern -> what is written in its place, in this order  # an example; ␣ is a space, “...” a text
SPELLINGS = r"""
\\dot *\{?(\d)\}?(?:(\d*)\\dot *\{?(\d)\}?)? -> \\overline{\1\2\3}  # 0.\dot{3}
(?<=[\d}]) *≈.*|(?<=\d)(?:,?\\[,!;:]|\{,\}) ?(?=\d{3}(?!\d))|\\\w*(?:color|space)\*?\{\w+\} ->
\\mathbb *\{?R\}? -> (-\\infty,\\infty)
(?<![/~ ,;:])\\math[a-z]+ *\{ *([A-Za-z]|\\[a-z]+) *\} -> {\1}  # 3\mathrm{x}
(?:\\(?:text\w*|[mh]box|math[a-z]+|operatorname|emph) *\{|\{ *\\(?:rm|bf|it)\b)([^{}]*)\} -> “\1”
\\begin *\{(?:[pb]?matrix|array)\} *(?:\{[lcr|]*\})? -> [[  # as a list of rows
(?:\\\\)?\s*\\end *\{\w+\} -> ]]
\\\\(?: *\[[^]]*\])? -> ],[
\\(?:left|right|[bB]igg?[lr]?|q?quad|\w+style|limits|rm|bf|it|[lL]arge|huge|text|math)(?!\w) -> ␣
\\[,;:! ()\[\]$%#&]|%|\bpercent\b -> ␣  # spaces and signs
^(?:Matrix|array) *\((.*)\)$ -> \1  # Python's
\\?(?:arc(sin|cos|tan)|(sin|cos|tan) *\^ *\{? *- *1 *\}?) -> a\1\2␣  # \sin^{-1} x
\\(?!(?:FUNCTION|frac|root|binom|overline|infty|pi)\b)[A-Za-z]+ *(?=\{)|“ *” ->
“([^”]*\d[^”]*)”|“ *(and|or) *” -> ␣\1\2␣  # \text{18 eggs}
&|,? *\b(?:and|or)\b|; -> ,␣  # lists
(?:\^ *\{? *)?° *\}?(?: *[“{]? *[CF]\b *[”}]?)? -> °  # 20^\circ\text{ C}
^( *-?) *“? *(?:US|USD|EUR|GBP|INR|Rs\.?) *”? *(?=-?\d) -> \1  # US\$5
(?<=[\w)}\]⦄°!.])(?>[-/*. ]*(?:per )?UNIT\.?(?: *\^ *\{?-?\d\}?)?)+(?= *(?:$|[,;)\]}⦄=<>])) -> ␣
(?i:^[ “]*(?:the )?(?:final )?ans(?:wer)?\b(?: is)?:?[ ”]*) ->  # the answer is 5
^ *(“[^”]*”|[A-Za-z][A-Za-z ]+): *(?=\S) -> \1=  # Area: 5
[“”] -> ␣
\{([^{}]*)\\over(?![a-z])([^{}]*)\} -> \\frac{\1}{\2}
\\(frac|binom) *(\d) -> \\\1{\2}  # \frac12
(?<![\w.^])(\d+) *\\frac *\{(\d+)\} *(?:\{(\d+)\}|(\d)) -> {\1+\2/\3\4}  # -2\frac13
(?<![\w.])(\d+) +(\d+/\d+)(?!\d) -> {\1+\2}  # 2 1/3
\\root\{2\} *\[([^][]*)\] -> \\root{\1}  # \sqrt[3]{8}
\|([^|]+)\| -> abs(\1)
_ *\{ *(\w+) *\} -> _\1
(?<=\*)I\b|\bI(?=\*)|(?<=\d)j\b -> i  # sympy's and Python's
^[\s=]+|[\s.,:\\]+$ ->
""".replace("UNIT", UNIT).replace("FUNCTION", FUNCTION).strip().split("\n")
SPELLINGS = [(re.compile(found), new.strip().replace("␣", " ")) for found, _, new in
             (line.partition("  # ")[0].partition(" ->") for line in SPELLINGS)]
THOUSANDS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}((?:,\d{3})+(?!,?\d)|(?: \d{3})+(?![\w/]))")


def clean(text: str) -> str:
    """A text without what changes no meaning: fonts, spacing, currency, units, spellings."""
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    text = " ".join(text.translate(CHARACTERS).split())
    text = re.sub(r"\\(?:[A-Za-z]+|[{}])|[^\x00-\x7f]|(?<![A-Za-z\\])[a-z]{3,}(?![A-Za-z])",
                  lambda m: MEANINGS.get(m[0]) or MEANINGS.get(m[0].removesuffix("s"), m[0]), text)
    for found, new in SPELLINGS:
        text = found.sub(new, text)
    text = re.sub(r"(\d*\.\d*)\\overline *\{?(\d{1,9})\}?", r"0\1" + r"\2" * 30, text)
    if not re.search(r"[\[(⦃]", text):
        text = THOUSANDS.sub(lambda m: re.sub("[ ,]", "", m[0]), text)
    return text if re.search("sin|cos|tan", text) else text.replace("°", "")


# ---------------------------------------------------------------- equality: numbers and the grammar
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf, "inf": math.inf}


def power(base, exponent):
    """base ** exponent: exact where that is rational; of a negative number the real odd root."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if (base.numerator * base.denominator).bit_length() * abs(exponent) > 10_000:
            raise ValueError("too large")
        if exponent.denominator == 1:
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2:
            return power(-base, exponent) * (-1) ** exponent.numerator
    return complex(base) ** complex(exponent)


FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan exp asin acos atan".split()}
FUNCTIONS |= {"ln": cmath.log, "log": cmath.log10, "abs": abs}
OPERATIONS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
              "/": (2, operator.truediv), "^": (3, power), "**": (3, power)}
POSTFIX = {"!": lambda x: math.gamma(x + 1), "°": lambda x: x * math.pi / 180}
OF_TWO = {r"\frac": operator.truediv, r"\root": lambda n, x: power(x, 1 / n), r"\binom":
          lambda n, k: math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1)}


def digits(x):
    """A number as something hashable: a Fraction, where it is or looks like one, or ten digits."""
    if isinstance(x, (Fraction, tuple)) or cmath.isinf(x):
        return x
    x = complex(*(part if abs(part) > 1e-11 * abs(x) else 0.0 for part in (x.real, x.imag)))
    near = Fraction(x.real).limit_denominator(10_000)
    exact = abs(near - x) < 1e-12 * min(max(1, abs(x)), 1e4) and abs(x) < 1e15 and near or not x
    return near if exact else f"{x:.10g}"


LETTER = r"[^\W\d_]"
NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+")
TOKEN = re.compile(
    rf"{NUMBER.pattern}|(?:\\[A-Za-z]+|(?:{FUNCTION}|pi|inf)(?!{LETTER}{{2}})"
    rf"|{LETTER}{{3,}}(?: +{LETTER}+)*|{LETTER})(?:_\w+)?'*|\*\*|[<>!]=|\S")
SYMBOL = rf"(?:{LETTER}|[A-Z]+|{LETTER}{{3,}}[\w ]*|m?\\[a-z]+[A-Z]*|\[[A-Z]+\])(?:_\w+)?'*"
NAME = re.compile(rf"{SYMBOL}(?:\^\{{?-1\}}?)?(?:\([\w,]*\))?|\({SYMBOL}(?:,{SYMBOL})+\)")


class Reader:
    """Computes an answer: a number, or a kind and its parts, as ("(]", 0, 5/2). Raises anything."""

    def __init__(self, text: str, point: int):
        self.tokens, self.at, self.point = [*TOKEN.findall(text), ""], 0, point

    def take(self, *choices: str) -> str:
        """The next token, and goes on behind it; "" where it is none of these."""
        found = self.tokens[self.at] if not choices or self.tokens[self.at] in choices else ""
        self.at += bool(found)
        return found

    def bracket(self, opening: str = ""):
        """What a bracket holds, or the whole text: there, a list without brackets is a set."""
        parts = []
        while self.tokens[self.at] not in (")", "]", "}", "⦄", ""):
            parts.append(self.relation())
            if not self.take(","):
                break
        kind = opening + self.take()
        if kind in ("", "()", "{}", "⦃⦄") and len(parts) == 1:
            return parts[0]
        if kind in ("()", "[]", "(]", "[)"):
            return (kind, *map(digits, parts))
        if kind == "⦃⦄" or kind in ("", "{}") and parts:
            return gather(parts)
        raise ValueError(kind)

    def relation(self):
        """What stands between commas: "x = 5" is a named 5, "x < 5" an interval."""
        sides, names, signs = [], [], []
        while len(sides) == len(signs):
            start = self.at
            sides.append(self.expression())
            side = "".join(self.tokens[start : self.at]).strip("{}")
            names.append(side if NAME.fullmatch(side) and side not in CONSTANTS else "")
            if sign := self.take("=", "<", ">", "<=", ">="):
                signs.append(sign)
        if set(signs) == {"="}:
            if not any(names):  # counts up to a factor
                return ("=", sides[0] - sides[1])
            name, value = (names[0], sides[-1]) if names[0] else (names[-1], sides[0])
            return ("named", name.partition("_")[0], gather([value]))
        kind, low, high = "()", -math.inf, math.inf
        for i, sign in enumerate(signs):
            small, large = (i, i + 1) if sign[0] == "<" else (i + 1, i)
            if names[large]:
                low, kind = digits(sides[small]), "(["["=" in sign] + kind[1]
            elif names[small]:
                high, kind = digits(sides[large]), kind[0] + ")]"["=" in sign]
            else:
                raise ValueError("a relation of no name")
        return (kind, low, high) if signs else sides[0]

    def expression(self, level: int = 1):
        """What binds at least as tightly as `level`: 1 is a sum, 2 a product, 3 a power."""
        self.take("+")
        value = -self.expression(3) if self.take("-") else self.atom()
        while True:
            while sign := self.take(*POSTFIX):
                value = POSTFIX[sign](value)
            # a product needs no sign, but where a number stands behind a number
            number = NUMBER.match(self.tokens[self.at - 1])
            factor = re.match(r"[({\\]|[^\W\d_]" if number else r"[({\\\w]", self.tokens[self.at])
            binds, operation = OPERATIONS.get("*" if factor else self.tokens[self.at], (0, None))
            if binds < level:
                return value
            self.take(*OPERATIONS)
            value = operation(value, self.expression(min(binds + 1, 3)))

    def atom(self):
        token = self.take()
        name, _, index = token.removeprefix("\\").partition("_")
        if NUMBER.fullmatch(token):
            # a decimal of so many digits is what a float printed, and no more exact
            return float(token) if "." in token and len(token) > 16 else Fraction(token)
        if token in ("(", "[", "{", "⦃"):
            return self.bracket(token)
        if token in OF_TWO:
            return OF_TWO[token](self.atom(), self.atom())
        if name in FUNCTIONS:
            return self.function(name, index)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if not name[:1].isalpha():
            raise ValueError(token)
        # a variable, as a rational number of either sign that is the same in every process
        rng = random.Random(f"{token.lower() if len(name) > 2 else token} {self.point}")
        return Fraction(rng.randint(1, 10**4), 997) * (-1) ** self.point

    def function(self, name: str, base: str):
        """A function, with the exponent and the argument behind it: sin^2 x, log_2 8, ln(3)."""
        exponent = self.expression(3) if self.take("^") else Fraction(1)
        bracketed = self.tokens[self.at] in ("(", "{")
        value = self.atom() if bracketed else self.expression(3)
        while not bracketed and re.fullmatch(r"[A-Za-z]|\\(pi|theta)", self.tokens[self.at]):
            value *= self.atom()
        return power(cmath.log(value, int(base)) if base else FUNCTIONS[name](value), exponent)


def gather(parts: list, kind: type = list):
    """A list or set: its elements in any order; one element is itself, and one name no matter."""
    parts = [part if isinstance(part, tuple) else ("number", digits(part)) for part in parts]
    if len({part[1] for part in parts if part[0] == "named"}) < 2:
        parts = [part[2] if part[0] == "named" else part for part in parts]
    flat = kind(one for part in parts for one in (part[1] if part[0] == "set" else [part]))
    return next(iter(flat)) if len(flat) == 1 else ("set", tuple(sorted(flat, key=repr)))


@lru_cache(maxsize=4096)
def canonical(answer: str) -> tuple:
    """What equal answers have in common: ("number", 5), say. Raises nothing, whatever the text."""
    text = answer.strip()
    if len(text) > LONGEST_ANSWER:
        return ("words", text)
    try:
        text = clean(text)
        if based := re.fullmatch(r"\(?([\dA-F. ]+?)\)? *_ *(\d+)", text):
            return ("base", based[1].replace(" ", ""), based[2])
        signed = {re.sub(r"\\(?:pm|mp)(?![a-z])", sign, text) for sign in "+-"}
        # variables have a value at each of three points: what agrees there agrees everywhere
        points = (1, 2, 3) if re.search("[A-Za-z]", re.sub("frac|root|pi", "", text)) else (1,)
        kind = list if len(signed) == 1 else set
        found = [gather([Reader(t, p).bracket() for t in signed], kind) for p in points]
        if found[0][0] == "=" and found[0] != found[-1]:
            found = [("=", digits(difference / found[0][1])) for _, difference in found]
        return found[0] if len(set(found)) == 1 else tuple(found)
    except Exception:  # what breaks the reader is no answer that a reader could give
        return ("words", re.sub(r"[\s{}]|\.(?!\d)", "", text).lower() or answer)


def equal(prediction: str, gold: str) -> bool:
    """Whether a prediction is the gold answer, or an equation that ends in it or says the same."""
    ours, theirs = canonical(prediction), canonical(gold)
    if ours == theirs:
        return prediction.strip() != ""
    if "set" in (ours[0], theirs[0]):  # one of several numbers is none; a list may be Python's
        return ours[0] == "[]" and canonical(prediction[1:-1]) == theirs
    if "=" in prediction and "=" in gold:  # one may be solved for a variable
        both = (re.sub("^([^=]+)=([^=]+)$", r"\1-(\2)=0", text) for text in (prediction, gold))
        return operator.eq(*map(canonical, both))
    return theirs[0] == "number" and canonical(re.split("(?<![<>!])=", prediction)[-1]) == theirs


# ---------------------------------------------------------------- scores
def score(completion: str, gold: str) -> Score:
    return score_batch([completion], [gold])[0]


def score_batch(completions: list, golds: list, time_limit=TIME_LIMIT) -> list[Score]:
    """The score of each completion; programs run side by side, each for `time_limit` seconds."""
    texts = [first_problem(text) for text in completions]
    split = [split_format(text) for text in texts]
    programs = [(code, name == "omi1", time_limit) for name, code in split if code]
    jobs, ran = iter(enumerate(programs)), [None] * len(programs)
    def work(_):  # one queue for all threads costs less than a future for each program
        for place, program in jobs:
            ran[place] = run_program(*program)
    with ThreadPoolExecutor(WORKERS) as threads:
        try:
            list(threads.map(work, programs[:WORKERS]))  # raises what a thread raised
        finally:
            list(jobs)  # whoever is interrupted does not wait for the rest
    scores, results = [], iter(ran)
    for text, gold, (name, code) in zip(texts, map(str, golds), split, strict=True):
        answer, failure = next(results) if code else (None, "error" if code == "" else "")
        words = not answer or canonical(answer)[0] == "words" or re.search("[a-z]{2} ", answer)
        if code is None or name == "omi1" and (failure == "blocked" or not failure and words):
            # prose, or a block that shows no value or needs what Monty lacks: the box counts
            stated, failure = prose_answer(text)
            answer = answer if stated is None else stated
        if not failure:
            failure = "no answer" if answer is None else None if equal(answer, gold) else "wrong"
        scores.append(Score(float(failure is None), name, answer, failure))
    return scores


# ---------------------------------------------------------------- pass@k, maj@k and their table
def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples hold a correct one, where c do (arXiv 2107.03374, eq. 1)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answers: list[str | None]) -> int | None:
    """The place of the first of the commonest answers. None does not vote."""
    forms = [None if answer is None else canonical(answer) for answer in answers]
    votes = collections.Counter(filter(None, forms))
    return forms.index(votes.most_common(1)[0][0]) if votes else None


def maj_at_k(answers: list[str | None], gold: str) -> float:
    """1 if the commonest answer is the gold one, else 0."""
    winner = vote(answers)
    return float(winner is not None and equal(answers[winner], gold))


def shares(rows: list[dict]) -> dict:
    """For each format: its share of rows, and its accuracy (None where it does not occur)."""
    rewards = {name: [] for name in FORMATS}
    for row in rows:  # a format that a fork of this project adds counts too
        rewards.setdefault(row["format"], []).append(row["reward"])
    return {name: {"share": len(found) / len(rows) if rows else None,
                   "accuracy": sum(found) / len(found) if found else None}
            for name, found in rewards.items()}


def summarize(rows: list[dict], n: int | None = None) -> dict:
    """Metrics of scored rows (id, format, answer, reward, failure, greedy): pass@1 of greedy rows,
    pass@k and maj@k of the others, k a question. Of n questions those without rows are wrong.
    """
    greedy, sampled = ([row for row in rows if row["greedy"] == kind] for kind in (True, False))
    groups = collections.defaultdict(list)
    for row in sampled:
        groups[row["id"]].append(row)
    n, k = n or len({row["id"] for row in rows}), min(map(len, groups.values()), default=0)
    pass_at_1 = sum(row["reward"] for row in greedy) / max(n, len(greedy)) if greedy else None
    summary = {"n": n, "pass@1": pass_at_1, "k": k}
    for group in groups.values():
        right, winner = sum(row["reward"] for row in group), vote([r["answer"] for r in group[:k]])
        won = 0.0 if winner is None else group[winner]["reward"]
        values = (right / len(group), won, pass_at_k(len(group), int(right), k))
        for name, value in zip(("sampled_pass@1", "maj@k", "pass@k"), values):
            summary[name] = summary.get(name, 0.0) + value / n
    return {**summary, "formats": shares(greedy), "sampled_formats": shares(sampled),
            "failures": dict(collections.Counter(r["failure"] for r in rows if r["failure"]))}


def percent(share: float | None, n: int = 0) -> str:
    """A share; of n independent trials with its 95% confidence interval (Wilson 1927)."""
    if share is None or not n:
        return "-" if share is None else f"{share:6.1%}"
    z2 = 1.96**2 / n
    center, half = share + z2 / 2, math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4)
    low, high = 100 * (center - half) / (1 + z2), 100 * (center + half) / (1 + z2)
    return f"{share:6.1%} [{max(0, low):.1f}, {min(100, high):.1f}]"


def table(columns: dict[str, dict]) -> str:
    """Summaries side by side: percent with 95% intervals over the questions, then each format."""
    lines, summaries = [["", *columns]], columns.values()
    k = max(summary["k"] for summary in summaries)
    for name in ("pass@1", "sampled_pass@1", "maj@k", "pass@k")[: 4 if k > 1 else 2]:
        cells = [percent(summary.get(name), summary["n"]) for summary in summaries]
        if set(cells) != {"-"}:
            lines.append([name.replace("@k", f"@{k}").replace("_", " "), *cells])
    for group, title in (("formats", "greedy"), ("sampled_formats", "sampled")):
        for name in dict.fromkeys(name for summary in summaries for name in summary[group]):
            found = [summary[group].get(name) or shares([])["text"] for summary in summaries]
            cells = [f"{percent(f['share'])}, {percent(f.get('accuracy')):>6}" for f in found]
            lines.append([f"{title} {name}: share, accuracy", *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ---------------------------------------------------------------- files and command line
def read_rows(file: str) -> Iterator[tuple[int, dict | str]]:
    """The objects of a .jsonl file, one a line, or of a .json array, also .gz, each with its number
    from 1; in place of what is no object, a sentence. Raises ValueError if nothing can be read.
    """
    try:
        with (gzip.open if str(file).endswith(".gz") else open)(file, "rb") as stream:
            text = stream.read().decode("utf-8-sig", errors="replace").rstrip()
        array = text.lstrip()[:1] == "[" and ".jsonl" not in str(file)
        lines = map(json.dumps, json.loads(text)) if array else text.split("\n")  # no splitlines
    except Exception as e:  # of the file, its compression or its JSON
        raise ValueError(f"{file} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not text.strip("[ \t\r\n]"):
        raise ValueError(f"{file} is empty")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "null", parse_constant=lambda name: None)  # NaN
        except (ValueError, RecursionError) as error:
            row = error
        if line.strip():
            yield number, row if isinstance(row, dict) else f"is not a JSON object ({row})"[:200]


def gold_answer(value) -> str:
    """What is behind "####", else a solution's last box, else the text. ValueError: no answer."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        _, hashes, behind = str(value).rpartition("####")
        answer = behind if hashes else [str(value), *BOX.findall(str(value))][-1]
        if answer.strip():
            return answer.strip()
    raise ValueError(f"no answer in {json.dumps(value)[:60]}: it must be a number or a text")


def main(argv: list[str]) -> None:
    """Prints pass@1, pass@k, maj@k, share and accuracy of each format, and failures by kind."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("""usage: python verify.py FILE, a .jsonl or an array in .json, also .gz:
objects with completion, gold (also a worked solution), question or id, greedy: true for pass@1""")
    rows, bad, places = [], [], {}
    for number, row in read_rows(argv[0]):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            if not isinstance(row.get("completion"), str) or "gold" not in row:
                raise ValueError(f"needs completion (a text) and gold, and has {', '.join(row)}")
            if row.setdefault("greedy", False) not in (True, False):
                raise ValueError(f"greedy must be true or false, not {row['greedy']!r}")
            gold = gold_answer(row["gold"])
            name = row.get("question") or row.get("problem") or row.get("id")  # may be shared
            asked = json.dumps([name, gold, name is None and number])
            rows.append(row | {"gold": gold, "id": places.setdefault(asked, len(places))})
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if not rows:
        raise ValueError(f"{argv[0]} holds nothing that can be scored: {bad[0]}")
    scores = score_batch([row["completion"] for row in rows], [row["gold"] for row in rows])
    summary = summarize([row | result._asdict() for row, result in zip(rows, scores)])
    title = f"{len(rows)} completions of {summary['n']} questions in {argv[0]}, 95% intervals"
    print(title, table({"": summary}), f"failures: {summary['failures'] or 'none'}", sep="\n")
    if bad:
        print(f"{len(bad)} lines passed over:", *bad[:9], *["..."] * (len(bad) > 9), sep="\n  ")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know all characters
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, ImportError, KeyboardInterrupt) as error:
        print(f"verify.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
