"""Question sets with a verifiable answer: embedded, from the hub or a mirror, or a local file."""

import itertools
import os
import re
import unicodedata
from typing import NamedTuple

from data import UserError, reason, toy
from data.prepare import find_files
from data.tokens import LONGEST
from verify import gold_answer, read_rows

TOY_STEPS = {"toy": (1, 3), "toy-hard": (2, 4)}
TOY_SIZE = {"train": 4096, "test": 256}
HUB = {
    "gsm8k": "openai/gsm8k/main/{split}-*.parquet",
    "math": "DigitalLearningGmbH/MATH-lighteval/data/{split}-*.parquet",
    "math500": "HuggingFaceH4/MATH-500/test.jsonl",
    "aime": "gneubig/aime-1983-2024/*.csv",
    "aime24": "Maxwell-Jia/AIME_2024/*.parquet",
}
VERIFIERS = {}  # task -> a function to call in place of verify.score_batch: texts, golds, seconds


class Question(NamedTuple):
    id: str  # as its file has it, carried along: questions are told apart by their place in a list
    question: str
    gold: str

    @property
    def wording(self) -> str:
        """What makes two questions equal, whatever their ids, golds, blanks and encodings."""
        visible = re.sub("[\u00ad\u200b-\u200d\u2060\ufeff]", "", self.question)
        return " ".join(unicodedata.normalize("NFKC", visible).split())


def load_questions(task: str, split: str, hub: str = "", file: str = "") -> list[Question]:
    """The questions of a task's split ("train" or "test"), from `file` where one is given.

    `hub` is a folder with the hub's layout, REPOSITORY/FILE; empty, the hub itself is asked.
    """
    if task not in (names := [*TOY_STEPS, *HUB]):
        raise UserError(f"unknown task {task!r}: choose from {', '.join(names)}")
    try:
        if file:
            rows = list(read_rows(file))
        elif task in TOY_STEPS:
            stream = toy.problems(split, seed=1000, steps=TOY_STEPS[task])  # no author has the seed
            drawn = itertools.islice(stream, TOY_SIZE[split])
            rows = enumerate([{"question": p.question, "answer": p.values[-1]} for p in drawn], 1)
        else:
            rows = enumerate(hub_rows(task, split, hub), 1)
    except ValueError as error:
        raise UserError(str(error)) from None
    questions, refused = [], []
    for i, (number, row) in enumerate(rows):
        try:
            place = f"{file or task}, line {number}"
            questions.append(row_to_question(row, f"{task}-{split}-{i}", place))
        except UserError as error:
            if file:  # which its owner can mend; MATH has solutions with an empty box
                raise
            refused.append(str(error))
    if not questions:
        raise UserError(refused[0] if refused else f"{file or task} holds no question")
    if refused and os.environ.get("RANK", "0") == "0":
        print(f"{len(refused)} of {i + 1} rows passed over, such as {refused[0]}", flush=True)
    return questions


def hub_rows(task: str, split: str, hub: str) -> list[dict]:
    """Rows of a task's files, from the hub or a mirror of its layout."""
    try:
        import datasets  # slow, and the embedded tasks do without
    except ImportError:
        raise UserError("datasets is missing: pip install -r requirements.txt") from None
    pattern = HUB[task].format(split=split)
    if split == "train" and pattern == HUB[task]:
        raise UserError(f"task {task} has no train questions: choose another, or --questions=FILE")
    files, kind = find_files(pattern, hub), pattern.rpartition(".")[2].replace("jsonl", "json")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it also raises
    try:
        return list(datasets.load_dataset(kind, data_files=files, split="train", streaming=True))
    except Exception as error:  # every file type has its own
        raise UserError(f"{pattern} could not be read ({reason(error)}): give --questions=FILE "
                        "in its place") from None


def row_to_question(row: dict | str, default_id: str, place: str) -> Question:
    """Question and gold by the names in use. Raises UserError where a row does not have them."""
    if isinstance(row, str):  # a sentence on what is wrong with it
        raise UserError(f"{place}: {row}")
    fields = {key.lower(): value for key, value in row.items()}
    question = fields.get("question", fields.get("problem"))
    key = next((key for key in ("answer", "gold", "solution") if key in fields), "")
    try:
        if type(question) not in (str, int, float) or not str(question).strip() or not key:
            raise ValueError("a row needs a question (or problem) and an answer (gold, solution)")
        gold = gold_answer(fields[key])
        if key == "solution" and gold == str(fields[key]).strip():
            raise ValueError("the solution states no answer, behind #### or in \\boxed{}")
    except ValueError as error:
        raise UserError(f"{place}: {error}; its keys are {', '.join(row) or 'none'}") from None
    return Question(str(fields.get("id", default_id)), str(question), gold)


def load_run_questions(task: str, eval_task: str, questions: str, eval_questions: str, hub: str,
                       learns=True) -> tuple[list[Question], list[Question]]:
    """The questions that a run learns from, if it learns, and those that it is evaluated on.

    Of a file `questions` a tenth, at most 256, is held out where nothing else is named; equal
    questions fall on one side. Rank 0 says how many are equal.
    """
    if not learns:
        return [], load_questions(eval_task or task, "test", hub, eval_questions or questions)
    train = load_questions(task, "train", hub, questions)
    distinct = list(dict.fromkeys(q.wording for q in train))
    if not questions or eval_task or eval_questions:
        test, known = load_questions(eval_task or task, "test", hub, eval_questions), set(distinct)
        equal = sum(q.wording in known for q in test)
        note = f"{equal} of {len(test)} questions to evaluate on are learnt from, too"
    else:
        if len(distinct) == 1:
            raise UserError(f"{questions} holds one question: give more, or --eval_questions=FILE")
        held = set(distinct[-min(256, max(1, len(distinct) // 10)) :])
        equal = len(train) - len(distinct)
        note = f"{equal} of {len(train)} questions equal an earlier one: no two of them are parted"
        test = [q for q in train if q.wording in held]
        train = [q for q in train if q.wording not in held]
    if equal and os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", flush=True)
    return train, test


def fitting(name: str, questions: list[Question], encoding, context: int, room: int) -> list[tuple]:
    """(question, ids of its prompt) of each where these leave `room` tokens of the context.

    Rank 0 says how many do not. Raises UserError where none does.
    """
    start = encoding.eot_token  # as every document of pretraining begins, behind another's end
    pairs = [(q, [start, *encoding.encode_ordinary(q.question[:LONGEST] + "\n\n")])
             for q in questions]
    pairs = [(q, ids) for q, ids in pairs if len(ids) + room <= context]
    if questions and not pairs:
        raise UserError(f"no {name} question fits: a context of {context} tokens less "
                        f"--max_new_tokens={room} is too little, lower it or pretrain with a "
                        "longer --context")
    if len(pairs) < len(questions) and os.environ.get("RANK", "0") == "0":
        print(f"{len(questions) - len(pairs)} of {len(questions)} {name} questions leave no room "
              "for --max_new_tokens in the context: passed over, in tests as wrong", flush=True)
    return pairs
