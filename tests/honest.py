"""Programs and completions as models write them: each must score 1 against its gold."""

from textwrap import dedent, indent


def tinygsm(body: str, doc: str = "", before: str = "", behind: str = "") -> str:
    """A TinyGSM function with this body and docstring, and what stands before and behind it."""
    doc = f'"""\n{doc}\n"""\n' if doc else ""
    before, body = (dedent(text).strip("\n") for text in (before, body))
    function = "def simple_math_problem() -> int:\n" + indent(doc + body, "    ")
    return (before + "\n\n" if before else "") + function + behind


def omi1(*blocks: str, closing: str) -> str:
    """Code blocks with their introduction, and the closing sentence."""
    blocks = [f"<llm-code>\n{dedent(code).strip()}\n</llm-code>\n" for code in blocks]
    return "Let's solve this problem using Python code.\n" + "".join(blocks) + closing


def output(value: str, sentence: str | None = None) -> str:
    """An output block, and a sentence with the same answer in a box."""
    sentence = f"So the answer is \\boxed{{{value}}}." if sentence is None else sentence
    return f"<llm-code-output>\n{value}\n</llm-code-output>\n" + sentence


QUESTION = "Janet's ducks lay 16 eggs per day. She eats three and bakes with four. How much in \
dollars does she make if she sells the rest for $2 per egg?"
EGGS = "eggs_sold = 16 - 3 - 4\nresult = eggs_sold * 2\nreturn result"
HELPER = "def rest(total, *used):\n    return total - sum(used)"

# ---------------------------------------------------------------- TinyGSM: functions

PLAIN = {
    "four_lines": (tinygsm(EGGS), "18"),
    "docstring": (tinygsm(EGGS, QUESTION), "18"),
    "docstring_on_one_line": (tinygsm('"""How many eggs?"""\n' + EGGS), "18"),
    "docstring_in_single_quotes": (tinygsm("'''\nHow many eggs?\n'''\n" + EGGS), "18"),
    "docstring_at_the_margin": (
        'def simple_math_problem() -> int:\n    """\nHow many eggs?\ndef of rest: 9.\n    """\n'
        "    return 9 * 2", "18"),
    "docstring_with_another_answer": (tinygsm(EGGS, "The answer is \\\\boxed{9}.\n#### 9"), "18"),
    "comments_and_blank_lines": (
        tinygsm("# eggs that are left\neggs = 16 - 3 - 4  # 9\n\n\n# dollars\nreturn eggs * 2"),
        "18"),
    "comment_at_the_margin": (
        "def simple_math_problem() -> int:\n    eggs = 9\n# Now the price.\n    return eggs * 2",
        "18"),
    "annotated_variables": (tinygsm("eggs: int = 9\nprice: float = 2\nreturn eggs * price"), "18"),
    "gold_with_commas": (tinygsm("return 80_000 + 50_000 - 60_000"), "70,000"),
    "negative_answer": (tinygsm("return 3 - 8"), "-5"),
    "float_without_fraction": (tinygsm("return 36 / 2"), "18"),
    "float_with_cents": (tinygsm("total = 3 * 4.15\nreturn total"), "12.45"),
    "floor_division_and_rest": (tinygsm("full, rest = divmod(128, 7)\nreturn full + (rest > 0)"),
                                "19"),
    "round_to_cents": (tinygsm("return round(100 / 7, 2)"), "14.29"),
    "int_of_a_quotient": (tinygsm("return int(55 / 3)"), "18"),
    "string_of_digits": (tinygsm("return str(6 * 3)"), "18"),
    "string_with_two_decimals": (tinygsm("total = 25 / 2\nreturn f'{total:.2f}'"), "12.5"),
    "name_of_a_day": (tinygsm("days = ['Monday', 'Tuesday', 'Wednesday']\nreturn days[16 % 7 - 1]"),
                      "Tuesday"),
    "loop": (tinygsm("total = 0\nfor day in range(1, 10**5 + 1):\n    total += day\nreturn total"),
             "5000050000"),
    "while_with_break": (
        tinygsm("n = 0\nwhile True:\n    n += 1\n    if n % 3 == 0 and n % 7 == 0:\n        break\n"
                "return n"), "21"),
    "for_else_with_continue": (
        tinygsm("""
            primes = []
            for n in range(2, 20):
                if n == 4:
                    continue
                for d in primes:
                    if n % d == 0:
                        break
                else:
                    primes.append(n)
            return len(primes)
        """), "8"),
    "comprehensions": (
        tinygsm("prices = {name: len(name) for name in ('fig', 'apple', 'banana')}\n"
                "return sum([p for p in prices.values() if p > 3]) + len({p % 2 for p in (1, 2)})"),
        "13"),
    "dictionary": (
        tinygsm("""
            boxes = {"red": 3, "blue": 5}
            boxes["green"] = 2 * boxes.get("blue", 0)
            boxes["red"] += 0
            total = 0
            for color, count in boxes.items():
                total += count
            return total
        """), "18"),
    "builtins_on_lists": (
        tinygsm("""
            sold, prices = [3, 5, 2], [4, 1, 6]
            pairs = sorted(zip(sold, prices), key=lambda pair: -pair[1])
            first = [n * p for i, (n, p) in enumerate(pairs) if i < 2]
            odd = list(filter(lambda n: n % 2, map(int, reversed(sold))))
            return sum(first) + max(odd) - min(odd) + any(odd) + all(odd) + abs(-1)
        """), "29"),
    "walrus": (tinygsm("if (n := 9) > 5:\n    return n * 2\nreturn 0"), "18"),
    "match_statement": (
        tinygsm("""
            order = ("child", 3)
            match order:
                case ("adult", count):
                    return 10 * count
                case ("child", count) if count > 2:
                    return 6 * count
                case _:
                    return 0
        """), "18"),
    "caught_error": (
        tinygsm("try:\n    share = 18 / 0\nexcept ZeroDivisionError:\n    share = 18\n"
                "finally:\n    pass\nreturn share"), "18"),
    "nested_function_with_nonlocal": (
        tinygsm("""
            count = 0
            def add(n):
                nonlocal count
                count += n
            for n in (5, 6, 7):
                add(n)
            return count
        """), "18"),
    "generator": (
        tinygsm("def doubled():\n    n = 1\n    while n < 100:\n        yield n\n        n *= 2\n"
                "return sum(doubled())"), "127"),
    "class": (
        tinygsm("""
            class Shop:
                tax = 2
                def __init__(self, price, count):
                    self.price = price
                    self.count = count
                def total(self):
                    return self.price * self.count + self.tax
            shop = Shop(4, 3)
            shop.count += 1
            return shop.total()
        """), "18"),
    "string_methods": (
        tinygsm("words = 'one two  three'.replace('  ', ' ').split()\n"
                "text = ', '.join(word.upper() for word in words)\n"
                "return len('{:>5}|{}'.format(text[0], text))"), "21"),
    "long_lines_joined": (
        tinygsm("total = 3 \\\n    + 4\nmore = (\n    5\n    + 6\n); return total + more"), "18"),
    "prints_on_the_way": (tinygsm('eggs = 9\nprint("Eggs:", eggs)\nreturn eggs * 2'), "18"),
    "tabs": (tinygsm(EGGS).replace("    ", "\t"), "18"),
    "carriage_returns": (tinygsm(EGGS, QUESTION).replace("\n", "\r\n"), "18"),
    "accented_names": (tinygsm("prix_du_café = 9\nreturn prix_du_café * 2  # 18 €"), "18"),
    "unicode_strings": (tinygsm("return len('日本語 → €½')"), "8"),
    "trailing_spaces": (tinygsm(EGGS) + "  \n\n \n", "18"),
}  # fmt: skip

SURROUNDED = {
    "helper_before": (tinygsm("return rest(16, 3, 4) * 2", before=HELPER), "18"),
    "helper_behind": (tinygsm("return rest(16, 3, 4) * 2", behind="\n\n" + HELPER), "18"),
    "helper_with_keywords": (
        tinygsm("return total(2, apples=3, pears=5, tax=2)",
                before="def total(price, *, tax=0, **counts):\n"
                "    return price * sum(counts.values()) + tax"), "18"),
    "constants_before": (tinygsm("return EGGS * PRICE", before="EGGS = 9\nPRICE = 2"), "18"),
    "table_before": (
        tinygsm("return PRICES['fig'] * 6", before="PRICES = {\n    'fig': 3,\n    'kiwi': 1,\n}"),
        "18"),
    "loop_before": (
        tinygsm("return TOTAL", before="TOTAL = 0\nfor n in (5, 6, 7):\n    TOTAL += n"), "18"),
    "class_before": (
        tinygsm("return Coin(3).times(6)",
                before="class Coin:\n    def __init__(self, value):\n        self.value = value\n\n"
                "    def times(self, n):\n        return self.value * n"), "18"),
    "recursion": (
        tinygsm("return stairs(200)", before="def stairs(n):\n    return n and n + stairs(n - 1)"),
        "20100"),
    "cached_fibonacci": (
        tinygsm("return f(50)",
                before="import functools\n\n\n@functools.lru_cache(maxsize=None)\ndef f(n):\n"
                "    return n if n < 2 else f(n - 1) + f(n - 2)"), "12586269025"),
    "another_name": ("def solve():\n    return 9 * 2", "18"),
    "last_of_two_other_names": (
        "def price():\n    return 2\n\n\ndef total():\n    return 9 * price()", "18"),
    "default_parameters": ("def simple_math_problem(eggs: int = 9, price=2) -> int:\n"
                           "    return eggs * price", "18"),
    "main_guard_behind": (
        tinygsm(EGGS, behind='\n\nif __name__ == "__main__":\n    print(simple_math_problem())'),
        "18"),
    "print_behind": (tinygsm(EGGS, behind="\n\nprint(simple_math_problem())  # 18"), "18"),
    "result_and_assert_behind": (
        tinygsm(EGGS, behind="\n\nresult = simple_math_problem()\nassert result == 18\n"
                'print(f"The answer is {result}")'), "18"),
    "prose_behind": (tinygsm(EGGS, behind="\n\nSo Janet's daily income is 18 dollars."), "18"),
    "box_behind": (tinygsm(EGGS, behind="\n\nThe answer is \\boxed{18}."), "18"),
    "prose_before": ("Let's define a function that finds it.\n\n" + tinygsm(EGGS), "18"),
    "fence": ("Here is the code:\n\n```python\n" + tinygsm(EGGS) + "\n```\nIt returns 18.", "18"),
    "second_problem_behind": (
        tinygsm(EGGS, behind="\n\nTom's robe takes 2 bolts of blue fiber and half that much white "
                "fiber. How many bolts?\n\n" + tinygsm("return 2 + 2 / 2")), "18"),
}  # fmt: skip

# name: (before the function, what it returns, gold)
MODULES = {
    "math_ceil_imported": ("from math import ceil, gcd", "ceil(100 / 12) * gcd(4, 6)", "18"),
    "math_square_root": ("import math", "math.sqrt(324)", "18"),
    "math_combinations": ("import math", "math.comb(5, 2) + math.factorial(4) // 3", "18"),
    "math_pi": ("import math", "round(math.pi * 2**2, 2)", "12.57"),
    "math_star": ("from math import *", "floor(hypot(3, 4) * 3.7)", "18"),
    "fraction": ("from fractions import Fraction", "Fraction(1, 4) + Fraction(1, 2)", "3/4"),
    "fraction_and_latex": ("import fractions", "fractions.Fraction(6, 8)", "\\frac{3}{4}"),
    "decimal": ("from decimal import Decimal", "Decimal('4.15') * 3", "12.45"),
    "decimal_quantized": ("from decimal import *", "Decimal('18').quantize(Decimal('0.01'))", "18"),
    "days_between_dates": (
        "from datetime import date", "(date(2024, 3, 1) - date(2024, 2, 12)).days", "18"),
    "time_that_passes": (
        "import datetime as dt",
        "(dt.datetime(2024, 1, 1, 9) + dt.timedelta(hours=33)).strftime('%H')", "18"),
    "date_parsed": (
        "from datetime import datetime", "datetime.strptime('2024-02-18', '%Y-%m-%d').day", "18"),
    "product": ("from itertools import product",
                "sum(a + b == 7 for a, b in product(range(1, 7), repeat=2))", "6"),
    "counter": ("from collections import Counter", "Counter('mississippi').most_common(1)[0][1]",
                "4"),
    "named_tuple": (
        "from collections import namedtuple\n\nItem = namedtuple('Item', 'price count')",
        "Item(price=3, count=6).price * 6", "18"),
    "mean_and_median": ("import statistics",
                        "statistics.mean([4, 8, 12]) + statistics.median([9, 10, 11])", "18"),
    "reduce": ("from functools import reduce", "reduce(lambda a, b: a * b, [1, 2, 3, 3])", "18"),
    "numbers_in_a_text": (
        "import re", "sum(int(n) for n in re.findall(r'\\d+', '16 and 2'))", "18"),
    "random_with_a_seed": ("import random\n\nrandom.seed(7)",
                           "18 if 1 <= random.randint(1, 6) <= 6 else 0", "18"),
    "letters": ("import string", "string.ascii_lowercase.index('s')", "18"),
    "sympy_solve": ("from sympy import symbols, Eq, solve\n\nx = symbols('x')",
                    "solve(Eq(3 * x + 4, 58), x)[0]", "18"),
    "sympy_system": ("import sympy as sp\n\nx, y = sp.symbols('x y', positive=True)",
                     "int(sp.solve([x + y - 20, x - y - 16], [x, y])[x])", "18"),
    "sympy_rational": ("from sympy import Rational", "Rational(1, 2) + Rational(1, 4)",
                       "\\frac{3}{4}"),
    "sympy_square_root": ("from sympy import sqrt", "sqrt(51)", "\\sqrt{51}"),
    "sympy_sum_with_a_root": ("import sympy", "3 * sympy.sqrt(8) - sympy.sqrt(2)", "5\\sqrt{2}"),
    "sympy_polynomial": ("import sympy\n\nx = sympy.Symbol('x')",
                         "sympy.expand((x + 1)**2) - 2 * x - 1", "x^{2}"),
    "sympy_power_as_in_math": ("import sympy\n\nx = sympy.Symbol('x')", "x**3 / x", "x^2"),
    "sympy_derivative": ("from sympy import diff, symbols\n\nx = symbols('x')",
                         "diff(x**3 + 6 * x, x).subs(x, 2)", "18"),
    "sympy_integral": ("from sympy import *\n\nx = symbols('x')",
                       "integrate(4 * x, (x, 0, 3))", "18"),
    "sympy_number_theory": ("from sympy import isprime, gcd, binomial",
                            "binomial(6, 2) + gcd(12, 18) // 2 * isprime(17)", "18"),
    "sympy_pi": ("from sympy import pi, Rational", "Rational(9, 2) * pi", "\\frac{9\\pi}{2}"),
}  # fmt: skip

FUNCTIONS = {**PLAIN, **SURROUNDED} | {
    name: (tinygsm(f"return {value}", before=before), gold)
    for name, (before, value, gold) in MODULES.items()
}

# ---------------------------------------------------------------- OpenMathInstruct-1: code blocks

BLOCKS = {
    "last_expression": (omi1("eggs = 16 - 3 - 4\neggs * 2", closing=output("18")), "18"),
    "last_print": (omi1("eggs = 9\nprint(eggs)\nprint(eggs * 2)", closing=output("18")), "18"),
    "print_in_a_loop": (omi1("for n in (9, 18):\n    print(n)", closing=output("18")), "18"),
    "no_closing_sentence": (omi1("9 * 2", closing=""), "18"),
    "no_output_block": (omi1("9 * 2", closing="She makes \\boxed{18} dollars a day."), "18"),
    "two_blocks_with_one_namespace": (
        omi1("import math\neggs = 16 - 3 - 4\neggs", "# the price\nmath.floor(eggs * 2.0)",
             closing=output("18")), "18"),
    "output_between_two_blocks": (
        omi1("eggs = 9\neggs", closing=output("9", "") + omi1("eggs * 2", closing=output("18"))),
        "18"),
    "function_that_is_called": (
        omi1("def price(eggs):\n    return eggs * 2\n\nprice(9)", closing=output("18")), "18"),
    "assignment_and_a_box": (omi1("total = 9 * 2", closing="So it is \\boxed{18}."), "18"),
    "list_of_one_root_and_a_box": (
        omi1("from sympy import symbols, solve\nx = symbols('x')\nsolve(2 * x - 36, x)",
             closing=output("[18]", "Therefore x is \\boxed{18}.")), "18"),
    "several_values_and_a_box": (
        omi1("eggs = 9\nprint(eggs, 2, eggs * 2)", closing=output("9 2 18", "It is \\boxed{18}.")),
        "18"),
    "pair_and_a_box": (
        omi1("x = 3\n(x, x + 1)", closing=output("(3, 4)", "The point is \\boxed{(3, 4)}.")),
        "(3,4)"),
    "float_and_a_whole_number": (omi1("36 / 2", closing=output("18.0")), "18"),
    "two_decimals": (omi1("total = 25 / 2\nprint('%.2f' % total)", closing=output("12.50")),
                     "12.5"),
    "comment_behind_the_value": (omi1("x = 9\nx * 2  # dollars\n# done", closing=output("18")),
                                 "18"),
    "condition_that_prints": (
        omi1("x = 18\nif x > 9:\n    print(x)\nelse:\n    print(9)", closing=output("18")), "18"),
    "counted_with_a_comprehension": (
        omi1("len([n for n in range(1, 100) if n % 5 == 0 and n % 2])", closing=output("10")),
        "10"),
    "solution_of_sympy": (
        omi1("import sympy as sp\nx = sp.Symbol('x')\nsolution = sp.solve(x**2 - 324, x)\n"
             "max(solution)", closing=output("18")), "18"),
    "fraction_in_a_box": (
        omi1("from fractions import Fraction\nprint(Fraction(3, 6))",
             closing=output("1/2", "So it is \\boxed{\\frac{1}{2}}.")), "\\frac{1}{2}"),
    "root_in_a_box": (
        omi1("from sympy import sqrt, simplify\nsimplify(sqrt(204) / 2)",
             closing=output("sqrt(51)", "So it is \\boxed{\\sqrt{51}}.")), "\\sqrt{51}"),
    "truth_in_a_box": (
        omi1("from sympy import isprime\nisprime(97)",
             closing=output("True", "So it is \\boxed{\\text{True}}.")), "\\text{True}"),
    "carriage_returns_in_a_block": (
        omi1("eggs = 9\neggs * 2", closing=output("18")).replace("\n", "\r\n"), "18"),
}  # fmt: skip

# ---------------------------------------------------------------- prose

PROSE = {
    "steps_and_a_box": ("She has 16 - 3 = 13 eggs. 13 - 4 = 9. So $9 \\times 2 = \\boxed{18}$.",
                        "18"),
    "hashes": ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
    "hashes_with_commas": ("80,000 - 10,000 = 70,000\n#### 70,000", "70000"),
    "sentence": ("She has 9 eggs left and sells each for $2. The answer is 18.", "18"),
    "sentence_with_dollars": ("She sells 9 eggs at $2. The answer is $18.", "18"),
    "sentence_with_a_colon": ("9 * 2 = 18\nThe answer is: 18", "18"),
    "box_with_dollars": ("She makes \\boxed{\\$18} a day.", "18"),
    "box_with_commas": ("The profit is $\\boxed{70,000}$ dollars.", "70000"),
    "box_with_a_unit": ("The side is \\boxed{18\\text{ cm}}.", "18"),
    "box_with_a_name": ("Hence $\\boxed{x = 5}$.", "5"),
    "box_with_spaces": ("It is $\\boxed{ 18 }$. \n\n", "18"),
    "box_in_a_display": ("Thus\n\\[\n\\boxed{18}\n\\]\n", "18"),
    "box_with_nested_braces": ("Thus it is \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
    "box_with_a_fraction": ("It is $\\boxed{\\dfrac{3}{4}}$.", "\\frac{3}{4}"),
    "box_with_a_decimal": ("It is \\boxed{0.75}.", "\\frac{3}{4}"),
    "box_with_degrees": ("The angle is $\\boxed{90^\\circ}$.", "90"),
    "box_with_a_pair": ("It is $\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}$.",
                        "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "box_with_a_word": ("It is a \\boxed{\\text{Monday}}.", "Monday"),
    "definition": ("By definition the mean is 36 / 2. Hence \\boxed{18}.", "18"),
    "line_that_starts_with_def": ("Here\ndef means definition, and so it is \\boxed{18}.", "18"),
    "line_that_starts_with_import": ("They buy eggs:\nimport costs 9 dollars, from a farm it is\n"
                                     "from 9 to 18 dollars. At most it is \\boxed{18}.", "18"),
}  # fmt: skip

HONEST = {**FUNCTIONS, **BLOCKS, **PROSE}
assert len(HONEST) == sum(map(len, (PLAIN, SURROUNDED, MODULES, BLOCKS, PROSE))), "a name twice"
