"""Programs and completions as models write them: each must score 1 against its gold."""

from textwrap import dedent, indent


def tinygsm(body: str, before: str = "", behind: str = "", doc: str = "") -> str:
    """A TinyGSM function with this body and docstring, and what stands before and behind it."""
    doc = f'"""\n{doc}\n"""\n' if doc else ""
    before, body = (dedent(text).strip("\n") for text in (before, body))
    function = "def simple_math_problem() -> int:\n" + indent(doc + body, "    ")
    return (before + "\n\n" if before else "") + function + behind


def omi1(*blocks: str, closing: str) -> str:
    """Code blocks with their introduction, and what closes them."""
    blocks = [f"<llm-code>\n{dedent(code).strip()}\n</llm-code>\n" for code in blocks]
    return "Let's solve this problem using Python code.\n" + "".join(blocks) + closing


def output(value: str) -> str:
    """An output block, and a sentence with the same answer in a box."""
    return f"<llm-code-output>\n{value}\n</llm-code-output>\nSo the answer is \\boxed{{{value}}}."


QUESTION = "Janet's ducks lay 16 eggs per day. She eats three and bakes with four. How much in \
dollars does she make if she sells the rest for $2 per egg?"
EGGS = "eggs_sold = 16 - 3 - 4\nresult = eggs_sold * 2\nreturn result"
HELPER = "def rest(total, *used):\n    return total - sum(used)"

# ---------------------------------------------------------------- TinyGSM: functions

FUNCTIONS = {
    "four_lines": (tinygsm(EGGS), "18"),
    "docstring": (tinygsm(EGGS, doc=QUESTION), "18"),
    "docstring_in_single_quotes": (tinygsm("'''\nHow many eggs?\n'''\n" + EGGS), "18"),
    "docstring_at_the_margin": (
        'def simple_math_problem() -> int:\n    """\nHow many eggs?\ndef of rest: 9.\n    """\n'
        "    return 9 * 2", "18"),
    "comments_and_blank_lines": (
        tinygsm("# eggs left\neggs = 16 - 3 - 4  # 9\n\n\n# dollars\nreturn eggs * 2"), "18"),
    "gold_with_commas": (tinygsm("return 80_000 + 50_000 - 60_000"), "70,000"),
    "negative_answer": (tinygsm("return 3 - 8"), "-5"),
    "float_with_cents": (tinygsm("total = 3 * 4.15\nreturn total"), "12.45"),
    "round_to_cents": (tinygsm("return round(100 / 7, 2)"), "14.29"),
    "string_of_digits": (tinygsm("return str(6 * 3)"), "18"),
    "name_of_a_day": (tinygsm("days = ['Monday', 'Tuesday']\nreturn days[16 % 7 - 1]"), "Tuesday"),
    "loop": (tinygsm("total = 0\nfor i in range(10**5):\n    total += 2\nreturn total"), "200000"),
    "class": (
        tinygsm("""
            class Shop:
                tax = 2
                def __init__(self, price, count): self.price, self.count = price, count
                def total(self): return self.price * self.count + self.tax
            shop = Shop(4, 3)
            shop.count += 1
            return shop.total()
        """), "18"),
    "carriage_returns": (tinygsm(EGGS, doc=QUESTION).replace("\n", "\r\n"), "18"),
    "accented_names": (tinygsm("prix_du_café = 9\nreturn prix_du_café * 2  # 18 €"), "18"),
    # with something before or behind it
    "helper_before": (tinygsm("return rest(16, 3, 4) * 2", before=HELPER), "18"),
    "constants_before": (tinygsm("return EGGS * PRICE", before="EGGS = 9\nPRICE = 2"), "18"),
    "cached_fibonacci": (
        tinygsm("return f(50)", "import functools\n\n\n@functools.lru_cache(maxsize=None)\n"
                "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)"), "12586269025"),
    "another_name": ("def solve():\n    return 9 * 2", "18"),
    "main_guard_behind": (
        tinygsm(EGGS, behind='\n\nif __name__ == "__main__":\n    print(simple_math_problem())'),
        "18"),
    "prose_behind": (tinygsm(EGGS, behind="\n\nSo Janet's daily income is 18 dollars."), "18"),
    "fence": ("Here is the code:\n\n```python\n" + tinygsm(EGGS) + "\n```\nIt returns 18.", "18"),
    "second_problem_behind": (
        tinygsm(EGGS, behind="\n\nTom's robe takes 2 bolts of blue fiber and half that much white "
                "fiber. How many bolts?\n\n" + tinygsm("return 2 + 2 / 2")), "18"),
}

# name: (before the function, what it returns, gold)
MODULES = {
    "math_ceil_imported": ("from math import ceil, gcd", "ceil(100 / 12) * gcd(4, 6)", "18"),
    "math_pi": ("import math", "round(math.pi * 2**2, 2)", "12.57"),
    "dates": ("from datetime import date", "(date(2024, 3, 1) - date(2024, 2, 12)).days", "18"),
    "counter": ("from collections import Counter", "Counter('aab').most_common(1)[0][1]", "2"),
    "named_tuple": (
        "from collections import namedtuple", "namedtuple('Item', 'a b')(a=3, b=6).b * 3", "18"),
    "numbers_in_a_text": ("import re", "sum(map(int, re.findall(r'\\d+', '16 and 2')))", "18"),
    "random_with_a_seed": ("import random\n\nrandom.seed(7)",
                           "18 if 1 <= random.randint(1, 6) <= 6 else 0", "18"),
}

FUNCTIONS |= {
    name: (tinygsm(f"return {value}", before=before), gold)
    for name, (before, value, gold) in MODULES.items()
}

# ---------------------------------------------------------------- OpenMathInstruct-1: code blocks

BLOCKS = {
    "last_expression": (omi1("eggs = 16 - 3 - 4\neggs * 2", closing=output("18")), "18"),
    "no_closing_sentence": (omi1("9 * 2", closing=""), "18"),
    "no_output_block": (omi1("9 * 2", closing="She makes \\boxed{18} dollars a day."), "18"),
    "two_blocks_with_one_namespace": (
        omi1("import math\neggs = 16 - 3 - 4\neggs", "# the price\nmath.floor(eggs * 2.0)",
             closing=output("18")), "18"),
    "function_that_is_called": (
        omi1("def price(eggs):\n    return eggs * 2\n\nprice(9)", closing=output("18")), "18"),
    "assignment_and_a_box": (omi1("total = 9 * 2", closing="So it is \\boxed{18}."), "18"),
    "float_and_a_whole_number": (omi1("36 / 2", closing=output("18.0")), "18"),
}

# ---------------------------------------------------------------- prose

PROSE = {
    "steps_and_a_box": ("She has 16 - 7 = 9 eggs. So $9 \\times 2 = \\boxed{18}$.", "18"),
    "hashes": ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
    "sentence": ("She has 9 eggs left and sells each for $2. The answer is 18.", "18"),
    "box_with_dollars": ("She makes \\boxed{\\$18} a day.", "18"),
    "box_with_a_unit": ("The side is \\boxed{18\\text{ cm}}.", "18"),
    "box_with_a_name": ("Hence $\\boxed{x = 5}$.", "5"),
    "box_with_a_decimal": ("It is \\boxed{0.75}.", "\\frac{3}{4}"),
    "box_with_degrees": ("The angle is $\\boxed{90^\\circ}$.", "90"),
    "box_with_a_pair": ("It is $\\boxed{\\left(3, \\pi\\right)}$.", "\\left( 3, \\pi \\right)"),
    "box_with_a_word": ("It is a \\boxed{\\text{Monday}}.", "Monday"),
    "definition": ("By definition the mean is 36 / 2. Hence \\boxed{18}.", "18"),
    "line_that_starts_with_def": ("Here\ndef means definition, and so it is \\boxed{18}.", "18"),
}
