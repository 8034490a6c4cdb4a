"""Question sets with a verifiable answer: embedded, from the hub, a mirror of it, or a local
file.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

from data import UserError, toy
from data.hub import find_files, load_rows, reason
from verify import boxes

# name: (repository, its files for each split); `row_to_question` finds the fields by their names
HUB = {
    "gsm8k": ("openai/gsm8k", {"train": "main/train-*.parquet", "test": "main/test-*.parquet"}),
    "math": ("DigitalLearningGmbH/MATH-lighteval",
             {"train": "data/train-*.parquet", "test": "data/test-*.parquet"}),
    "math500": ("HuggingFaceH4/MATH-500", {"test": "test.jsonl"}),
    "aime": ("gneubig/aime-1983-2024", {"test": "*.csv"}),
    "aime24": ("Maxwell-Jia/AIME_2024", {"test": "*.parquet"}),
}  # fmt: skip
TOY_STEPS = {"toy": (1, 3), "toy-hard": (4, 6)}
TOY_SIZE = {"train": 4096, "test": 256}
NAMES = (*TOY_STEPS, *HUB)


class Question(NamedTuple):
    id: str
    question: str
    gold: str


def load_questions(task: str, split: str, hub: str = "", file: str = "") -> list[Question]:
    """The questions of a task's split ("train" or "test"), from `file` where one is given.

    `hub` is a folder with the hub's layout, REPOSITORY/FILE; empty, the hub itself is asked.
    """
    if task not in NAMES:
        raise UserError(f"unknown task {task!r}: choose from {', '.join(NAMES)}")
    if file:
        return [row_to_question(row, f"{task}-{i}", file) for i, row in enumerate(read_rows(file))]
    if task in TOY_STEPS:
        stream = toy.problems(split, seed=1000, steps=TOY_STEPS[task])  # a seed that no author has
        drawn = itertools.islice(stream, TOY_SIZE[split])
        return [
            Question(f"{task}-{split}-{i}", p.question, str(p.values[-1]))
            for i, p in enumerate(drawn)
        ]
    repository, files = HUB[task]
    if split not in files:
        raise UserError(
            f"task {task} has no {split} questions: choose another, or give --questions=FILE"
        )
    rows = hub_rows(repository, files[split], hub)
    return [row_to_question(row, f"{task}-{split}-{i}", repository) for i, row in enumerate(rows)]


def hub_rows(repository: str, pattern: str, hub: str) -> list[dict]:
    """Rows of a repository's files, from the hub or a mirror of its layout."""
    instead = "--questions=FILE, json or jsonl"
    files = find_files(f"{repository}/{pattern}", hub, instead)
    kind = {"parquet": "parquet", "jsonl": "json", "csv": "csv"}[pattern.rpartition(".")[2]]
    try:
        return list(load_rows(kind, files))
    except Exception as error:  # every file type has its own
        raise UserError(
            f"{repository}/{pattern} could not be read ({reason(error)}): give {instead}"
        ) from None


def read_rows(file: str) -> list[dict]:
    """Objects of a local .jsonl file, one a line, or of a .json array. Raises UserError naming a
    bad line.
    """
    if not Path(file).is_file():
        raise UserError(f"{file} does not exist: --questions takes a json or jsonl file")
    text = Path(file).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}" if text.lstrip().startswith("[") else f"{file}:{number}"
        raise UserError(f"{where} is not valid JSON: mend or delete it") from None


def row_to_question(row: dict, default_id: str, source: str) -> Question:
    """Question and gold by the names in use: the answer (behind "####" if there), or the
    solution's last box.
    """
    fields = {key.lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    question = fields.get("question", fields.get("problem"))
    boxed = boxes(str(fields.get("solution", "")))
    gold = fields.get("answer", boxed[-1] if boxed else None)
    if question is None or gold is None:
        raise UserError(
            f"{source}: {default_id} needs a question (or problem) and an answer (or solution)"
        )
    return Question(
        str(fields.get("id", default_id)), question, str(gold).rpartition("####")[2].strip()
    )
