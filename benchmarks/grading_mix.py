r"""Answers to grade as a run would have them, made from real problems, gold answers and worked responses.

    repeated   32 samples a problem, as avg@32 and reinforcement learning have: half of them wrong, many of those alike
               (a model makes the same mistakes again), a tenth cut off before the box
    distinct   every answer wrong and unlike every other: nothing that was compared before can be remembered
    long       as `repeated`, each response ten to twenty times as long: the reasoning of a long-thinking model

No two responses are the same text: paragraphs of a response are left out at random. Golds are those of the six
mathematics sets and of MATH's training set, responses those of `math_cot_60x8_labelled.jsonl`.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLES = 32
_SETS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench_test")
_MISTAKES = 8
"""Different wrong answers to a problem; the first of them is the most frequent, as 1, 1/2, 1/3, ..."""
_CUT_OFF = 0.1
_WRONG = 0.5
_RAISED = re.compile(r"[\^_]\s*(?:\{[^{}]*\}|\d+)")
Row = dict[str, Any]


def mathematics(kind: str, num_rows: int, data: Path, *, seed: int = 0) -> Iterator[Row]:
    """Rows for `psft grade --grader math`: `repeated`, `distinct` or `long`."""
    rng = random.Random(f"{seed}:{kind}")
    golds = golds_of(data)
    rng.shuffle(golds)
    bodies = worked_responses(data)
    for number in range(num_rows):
        gold = golds[number // SAMPLES % len(golds)]
        if kind == "distinct":
            answer: str | None = mistaken(gold, random.Random(f"{seed}:{number}"), unlike=number)
        else:
            answer = sampled(gold, rng, seed)
        yield {"response": response(answer, rng, bodies, kind == "long"), "gold": gold}


def golds_of(data: Path) -> list[str]:
    """Gold answers: of the six sets, then of MATH's training problems."""
    golds = []
    for name in _SETS:
        lines = (data / "math" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        golds += [str(json.loads(line)["answer"]) for line in lines]
    with gzip.open(data / "train" / "math8k_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        golds += [str(json.loads(line)["answer"]) for line in file]
    return [gold for gold in golds if gold.strip()]  # a few of MATH's problems have none


def worked_responses(data: Path) -> list[list[str]]:
    """The paragraphs of each response, up to its last box."""
    bodies = []
    with open(data / "math" / "math_cot_60x8_labelled.jsonl", encoding="utf-8") as file:
        for line in file:
            for text in json.loads(line)["response"]:
                before, box, _ = text.rpartition(r"\boxed{")
                if box:
                    bodies.append(before.split("\n\n")[:-1])
    return bodies


def sampled(gold: str, rng: random.Random, seed: int) -> str | None:
    """One sample's answer: None = cut off before the box; else right, in one of three writings, or a mistake."""
    if rng.random() < _CUT_OFF:
        return None
    if rng.random() >= _WRONG:
        return rng.choice([gold, gold, gold.replace(r"\frac", r"\dfrac"), rf"\displaystyle {gold.strip('$')}"])
    number = rng.choices(range(_MISTAKES), [1 / (1 + n) for n in range(_MISTAKES)])[0]
    return mistaken(gold, random.Random(f"{seed}:{gold}:{number}"))


def mistaken(gold: str, rng: random.Random, *, unlike: int | None = None) -> str:
    """A wrong answer of the gold's kind: a number in it is another, a sign, a root, or a term more.

    unlike: a number that no other answer of the run has, to stand in this one.
    """
    text = gold.strip().strip("$")
    raised = [found.span() for found in _RAISED.finditer(text)]  # nobody answers x^467432
    found = re.finditer(r"(?<![\d.])\d+", text)
    numbers = [one for one in found if not any(start <= one.start() < end for start, end in raised)]
    other = str(unlike if unlike is not None else rng.choice([rng.randint(0, 30), rng.randint(0, 999)]))
    if not numbers:
        return f"{text} + {other}" if rng.random() < 0.5 or unlike is not None else f"-{text}"
    place = rng.choice(numbers)
    if unlike is None and place.group() == other:
        other += "1"
    if unlike is not None and len(text) > len(place.group()):
        other = str(2 + int(place.group()[:3])) + other  # the digits of the gold, so that sizes stay as they were
    kinds = [text[: place.start()] + other + text[place.end() :]] * 4
    if unlike is None:
        kinds += [text.replace("+", "-", 1) if "+" in text else f"{text} + 1"]
        kinds += [rf"\sqrt{{{other}}}", rf"\frac{{{other}}}{{7}}"]
    return rng.choice(kinds)


def response(answer: str | None, rng: random.Random, bodies: list[list[str]], is_long: bool) -> str:
    """Paragraphs of real responses, and the answer in its box; of a response that is cut off, a half."""
    parts = [rng.choice(bodies) for _ in range(rng.randint(10, 20) if is_long else 1)]
    paragraphs = [text for part in parts for text in part if rng.random() < 0.9]
    if answer is None:
        return "\n\n".join(paragraphs)[: None if is_long else rng.randint(200, 2000)]
    return "\n\n".join([*paragraphs, rf"Therefore, the answer is \(\boxed{{{answer}}}\)."])


def choices(num_rows: int, data: Path, *, seed: int = 0) -> Iterator[Row]:
    """Rows for `--grader choice`: stored outputs to MMLU-Pro, again and again, each time cut somewhere else."""
    rng = random.Random(seed)
    options = {row["question_id"]: row["options"] for row in _zipped(data / "mmlu_pro" / "test.jsonl.gz")}
    outputs = list(_zipped(data / "mmlu_pro" / "llama31_8b_instruct_5shot_outputs.jsonl.gz"))
    for number in range(num_rows):
        row = outputs[number % len(outputs)]
        text = row["generated_text"][rng.randint(0, 9) :]
        yield {"response": text, "gold": row["answer"], "options": options[row["question_id"]]}


def instructions(num_rows: int, data: Path) -> Iterator[Row]:
    """Rows for `--grader ifeval`: two models' stored answers, each time with another word at the end."""
    folder = data / "ifeval"
    with open(folder / "input_data.jsonl", encoding="utf-8") as file:
        by_prompt = {row["prompt"]: row for row in map(json.loads, file)}
    answers = []
    for model in ("gpt-4o-mini", "mistral-7b-instruct-v0.3"):
        with open(folder / f"labelled_{model}.jsonl", encoding="utf-8") as file:
            answers += [row for row in map(json.loads, file) if row["prompt"] in by_prompt]
    for number in range(num_rows):
        row = answers[number % len(answers)]
        yield {**by_prompt[row["prompt"]], "response": f"{row['response']} {number}"}


def _zipped(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
