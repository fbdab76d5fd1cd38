"""Small data sets in the layout of the real ones, all made up here."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import pytest

SUBJECTS = ("anatomy", "astronomy", "virology")
NUM_TEST = (3, 5, 2)
"""Unequal, so that a mean over subjects is no mean over items."""


def csv_text(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A data folder with tiny MMLU, CMMLU, GSM8K, TruthfulQA and GPQA; psft's cache and datasets' lie beside it."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PSFT_DATA_DIR", raising=False)
    place = tmp_path / "data"
    for name in ("mmlu", "cmmlu", "gsm8k", "truthfulqa", "gpqa"):
        (place / name).mkdir(parents=True)
    with zipfile.ZipFile(place / "mmlu/mmlu.zip", "w") as archive:
        for subject, count in zip(SUBJECTS, NUM_TEST, strict=True):
            for split, rows in (("dev", 5), ("test", count), ("val", 1)):
                text = csv_text([[f'{subject} {split} {i},\n"really"?', "1", "2", "None", "4", "ABCD"[i % 4]]
                                 for i in range(rows)])  # fmt: skip
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text)
    with zipfile.ZipFile(place / "cmmlu/cmmlu.zip", "w") as archive:
        for subject, count in zip(SUBJECTS, NUM_TEST, strict=True):
            for split, rows in (("dev", 5), ("test", count)):
                head = ["", "Question", "A", "B", "C", "D", "Answer"]
                text = csv_text([head, *([str(i), f"问题 {split} {i}", "1.50", "乙", "丙", "丁", "ABCD"[i % 4]]
                                         for i in range(rows))])  # fmt: skip
                archive.writestr(f"{split}/{subject}.csv", text)
    write(
        place / "gsm8k/test.jsonl", [{"question": f"{i} and {i}?", "answer": f"Sum.\n#### {2 * i}"} for i in range(7)]
    )
    write(
        place / "truthfulqa/multiple_choice_hfschema.jsonl",
        [
            {"question": f"What is {i}?", "mc1_targets": {"choices": [f"{i}", "a cat", "no"][: 2 + i % 2],
             "labels": [1, 0, 0][: 2 + i % 2]}, "mc2_targets": {"choices": ["a"], "labels": [1]}}
            for i in range(6)
        ],
    )  # fmt: skip
    names = [
        "Record ID",
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
    ]
    rows = [[str(i), f"Q{i}?", f"right {i} [title]", f"wrong  {i}", f" wrong {i}b", f"wrong {i}c\n"] for i in range(20)]
    (place / "gpqa/gpqa_main.csv").write_text(csv_text([names, *rows]))
    return place


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
