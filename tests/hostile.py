"""Completions that attack or cheat: each must score 0 against the gold "42".

Most return 42 only where the attack succeeds, or never get that far; the others return 7 and try
to bring the verifier down. None does lasting harm where it succeeds: the worst are a file named
MARK, a process that sleeps for half a minute and the end of the process that ran it.
"""

from honest import omi1, tinygsm

MARK = "verify_was_here"  # no file of this name may exist afterwards: here, in /tmp or /dev/shm


def liar(bases: str, lie: str, value: str = "") -> str:
    """A function that returns an object which claims to be 42."""
    return tinygsm(f"class Liar({bases}):\n    {lie}\nreturn Liar({value})")


# ---------------------------------------------------------------- what arithmetic does not need

GADGETS = {  # name: an expression that evaluates, and is true, where the attack succeeds
    "classes_of_a_tuple": "().__class__.__base__.__subclasses__()",
    "getattr_of_an_assembled_name": "getattr((), '__cl' + 'ass__')",
    "format_of_an_assembled_field": "('{0._' + '_class_' + '_}').format(7)",
    "eval_of_code": "eval(\"__import__('os').getpid()\")",
    "globals_hold_builtins": "globals()['__builtins__']",
    "dunder_import": "__import__('os').getpid()",
    "fullwidth_dunder_import": "__ｉｍｐｏｒｔ__('os').getpid()",
}

CODE = {name: tinygsm(f"return 42 if {gadget} else 7") for name, gadget in GADGETS.items()} | {
    "os_system": tinygsm(f"import os\nos.system('touch /tmp/{MARK}')\nreturn 42"),
    "fork_so_that_two_answer": tinygsm("import os\nos.fork()\nreturn 42"),
    "exec_of_another_program": tinygsm(
        """import os\nos.execv("/bin/echo", ["echo", '["", "42"]'])"""),
    "daemon_that_outlives_the_program": tinygsm(
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\nreturn 42", "import os, time"),
    "kill_of_the_parent": tinygsm("import os\nos.kill(os.getppid(), 9)\nreturn 42"),
    "import_whose_failure_is_caught": tinygsm(
        "try:\n    import socket\n    return 42\nexcept Exception:\n    return 7"),
    "thread_that_goes_on": tinygsm(
        "threading.Thread(target=lambda: list(iter(int, 1))).start()\nreturn 42",
        "import threading"),
    "sleep": tinygsm("import time\ntime.sleep(100)\nreturn 42"),
    "file_read": tinygsm("return 42 if open('/etc/passwd').read() else 7"),
    "file_written": tinygsm(f"open('/tmp/{MARK}', 'w').write('42')\nreturn 42"),
    "stdin_read": tinygsm("return 42 if input() else 7"),
    "patched_math": tinygsm("math.floor = lambda x: 42\nreturn math.floor(7.9)", "import math"),
    "patched_builtins": tinygsm("__builtins__['str'] = lambda x: '42'\nreturn 7"),
}

# ---------------------------------------------------------------- memory and time

EXPENSES = {  # name: an expression whose evaluation nobody can afford
    "string_too_long": "'a' * 10**11",
    "list_without_end": "list(itertools.count())",
    "tower_of_powers": "10**10**10",
    "factorial_too_large": "math.factorial(10**8)",
    "sum_too_long": "sum(range(10**14))",
}

LOOPS = {
    **{name: tinygsm(f"x = {expense}\nreturn 42", "import itertools, math")
       for name, expense in EXPENSES.items()},
    "loop": tinygsm("while True:\n    pass\nreturn 42"),
    "loop_that_catches_everything": tinygsm(
        "try:\n    while True:\n        pass\nexcept:\n    return 42"),
    "loop_that_catches_memory_errors": tinygsm(
        "x = []\nwhile True:\n    try:\n        x += [0] * 10**7\n    except MemoryError:\n"
        "        continue"),
    "loop_of_finally": tinygsm(
        "while True:\n    try:\n        return 42\n    finally:\n        continue"),
    "loop_in_a_block": omi1("while True:\n    pass", closing="It is \\boxed{42}."),
    "loop_of_prints": tinygsm("while True:\n    print('42' * 1000)"),
    "recursion_without_end": tinygsm("return 42 + 0 * simple_math_problem()"),
    "number_too_long_to_print": tinygsm("return 42 * 10**200000"),
    "parentheses_too_deep": tinygsm("return " + "(" * 5000 + "7" + ")" * 5000),
    "minus_too_deep": tinygsm("return " + "-" * 100001 + "42"),
}

# ---------------------------------------------------------------- answers that are none

CHEATS = {
    "int_that_prints_42": liar("int", "__str__ = __repr__ = __format__ = lambda *x: '42'", "7"),
    "str_that_equals_all": liar("str", "__eq__ = lambda *x: True; __hash__ = lambda x: 42", "'7'"),
    "object_that_claims_a_class": liar("", "__class__ = int; __str__ = lambda x: '42'"),
    "exit_with_the_answer": tinygsm("raise SystemExit(42)"),
    "error_with_the_answer": tinygsm("assert False, 42"),
    "result_written_to_every_file": tinygsm(
        "for fd in range(64):\n    os.write(fd, b'[\"\", \"42\"]\\n')", "import os"),
    "result_returned_as_a_pair": tinygsm("return ('', '42')"),
    "surrogate": tinygsm("return '\\ud800'"),
    "only_a_comment": tinygsm("# The answer is 42.\npass"),
    "own_docstring": tinygsm('"""42"""\nreturn simple_math_problem.__doc__'),
    "only_prints_prose": tinygsm("print('The answer is 42.')"),
    "failed_code_before_a_box": tinygsm("return apples", behind="\n\nSo it is \\boxed{42}."),
    "failed_block_before_a_box": omi1("1 / 0", closing="It is \\boxed{42}."),
    "cut_in_an_expression": tinygsm("return 42 +"),
    "cut_in_a_block": "<llm-code>\n6 * 7\n\nSo the answer is \\boxed{42}.",
    "cut_in_a_box": "So the answer is \\boxed{42",
    "boxes_for_all_numbers": " ".join(f"\\boxed{{{n}}}" for n in range(1, 101)),
    "box_of_three_numbers": "It is \\boxed{41, 42, 43}.",
    "list_of_three_numbers": tinygsm("return [41, 42, 43]"),
    "string_of_three_numbers": tinygsm("return '41, 42, 43'"),
    "string_with_a_box": tinygsm("return '\\\\boxed{42}'"),
    "not_a_number": tinygsm("return float('nan')"),
    "complex_number": tinygsm("return complex(42)"),
    # the comparison runs in the trainer: what these aim at
    "number_behind_spaces": tinygsm("return '42' + ' ' * 10**6 + 'or 43'"),
    "number_behind_spaces_in_a_box": "It is \\boxed{42" + " " * 10**5 + "or 43}.",
    "digits_in_a_box": "It is \\boxed{" + "42" * 10**5 + "}.",
    "code_in_a_box": f"It is \\boxed{{__import__('os').system('touch /tmp/{MARK}')}}.",
    "boxes_in_boxes": "\\boxed{" * 50000 + "42",
}

# ---------------------------------------------------------------- programs that poison the next

# name: (poison, the program that follows it in the batch, its gold, against which it scores 1)
POISON = {
    "context_of_decimal": (
        tinygsm("decimal.setcontext(decimal.Context(prec=1))\nreturn 7", "import decimal"),
        tinygsm("return Decimal(1) / Decimal(8)", "from decimal import Decimal"), "0.125"),
    "sum_of_builtins": (
        tinygsm("__builtins__['sum'] = lambda x: 42\nreturn 7"),
        tinygsm("return sum([3, 4])"), "7"),
    "print_of_a_block": (
        omi1("print = len\nanswer = 7", closing=""), omi1("print(3 + 4)", closing=""), "7"),
    "variable_left_behind": (
        tinygsm("global answer\nanswer = 42\nreturn 7"),
        tinygsm("try:\n    return answer\nexcept Exception:\n    return 7"), "7"),
}

HOSTILE = {**CODE, **LOOPS, **CHEATS, **{f"poison_{k}": v[0] for k, v in POISON.items()}}
assert len(HOSTILE) == len(CODE) + len(LOOPS) + len(CHEATS) + len(POISON), "a name occurs twice"
