"""Tasks of lm-evaluation-harness that `psft eval` knows: those of the paper's table 11, with where their data lie.

How they are asked for: `alignment-tax` is the five of the table, `alignment-tax/mmlu` one of them, `harness:TASK` any
task by lm-eval's name for it, a subject of MMLU or CMMLU too. `@N` behind a name: only the first N items.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from psft.errors import RequestError, shown

SUITE = "alignment-tax"
_SINGLE = "harness:"
_NUM_FEWSHOT = 5
"""Of tasks that are n-shot by name but for which lm-eval sets no n, and then shows none. The paper does not print its
numbers; 5 is what MMLU, CMMLU and GPQA are usually given."""


@dataclass(frozen=True)
class HarnessTask:
    """A task or a group of tasks of lm-eval.

    task: lm-eval's name. title: for people. short: name in the suite. folder: of its YAML files, in lm-eval's tasks.
    None = any. metric: `METRIC,FILTER`, the one called accuracy; None = the first it has. num_fewshot: where lm-eval's
    task sets none. file: under the data folder; None = only on the hub. reader: how the file is read (data.py). rows:
    expected, by split. sha256: of the registered copy. limit: only the first items, of each subject in a group.
    """

    task: str
    title: str
    short: str = ""
    folder: str | None = None
    metric: str | None = None
    num_fewshot: int | None = None
    file: str | None = None
    reader: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None
    how_to_get: str = ""
    limit: int | None = None


_GPQA_HOW = (
    "Its authors ask not to show its items in public, so no copy comes with anything: accept the terms at "
    "huggingface.co/datasets/Idavidrein/gpqa, run `hf auth login`, and add --download, or put the CSV file there."
)


def _gpqa(subset: str, rows: int) -> HarnessTask:
    return HarnessTask(
        f"gpqa_{subset}_cot_n_shot",
        f"GPQA {subset} (CoT)",
        short="gpqa" if subset == "main" else f"gpqa_{subset}",
        folder="gpqa/cot_n_shot",
        metric="exact_match,flexible-extract",
        num_fewshot=_NUM_FEWSHOT,
        file=f"gpqa/gpqa_{subset}.csv",
        reader="gpqa",
        rows={"train": rows},
        how_to_get=_GPQA_HOW,
    )


TABLE_11 = (
    HarnessTask(
        "gsm8k_cot",
        "GSM8K (CoT)",
        short="gsm8k",
        folder="gsm8k",
        metric="exact_match,flexible-extract",
        file="gsm8k/test.jsonl",
        reader="gsm8k",
        rows={"test": 1319},
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        how_to_get="Add --download (openai/gsm8k), or put there test.jsonl of github.com/openai/grade-school-math.",
    ),
    HarnessTask(
        "mmlu_flan_n_shot_generative",
        "MMLU (FLAN, generative)",
        short="mmlu",
        folder="mmlu/flan_n_shot/generative",
        metric="exact_match,flexible-extract",
        num_fewshot=_NUM_FEWSHOT,
        file="mmlu/mmlu.zip",
        reader="mmlu",
        rows={"test": 14042, "dev": 285},
        sha256="9e2b2d78bf59d80baf271a13005568ef0aca17bd663f2e5ebfecdc07a68f0edc",
        how_to_get="Add --download (cais/mmlu), or put there the zip of its CSV files (.../test/SUBJECT_test.csv).",
    ),
    HarnessTask(
        "truthfulqa_mc1",
        "TruthfulQA mc1",
        short="truthfulqa",
        folder="truthfulqa",
        metric="acc,none",
        file="truthfulqa/multiple_choice_hfschema.jsonl",
        reader="truthfulqa",
        rows={"validation": 817},
        sha256="d13fd014d52ad27ed5ad970b91720c2762c1f7aa6aba0cb8a2b9c0f63607df47",
        how_to_get="Add --download (truthfulqa/truthful_qa), or put its multiple_choice set there as rows of JSON.",
    ),
    HarnessTask(
        "cmmlu",
        "CMMLU",
        short="cmmlu",
        folder="cmmlu",
        metric="acc,none",
        num_fewshot=_NUM_FEWSHOT,
        file="cmmlu/cmmlu.zip",
        reader="cmmlu",
        rows={"test": 11582, "dev": 335},
        sha256="d9c62ec80912ab18148b17b6618f8468c3c9d0fe48f5ca7c5db0b3f013d3bd1e",
        how_to_get="Add --download (haonan-li/cmmlu), or put there the zip of its CSV files (test/SUBJECT.csv); its "
        "licence, CC BY-NC-SA 4.0, forbids commercial use.",
    ),
    _gpqa("main", 448),
)
"""The paper's table 11: five sets through lm-evaluation-harness. Which GPQA it means is not said; main is usual."""
KNOWN = (*TABLE_11, _gpqa("diamond", 198), _gpqa("extended", 546))


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of suites that are ours, and those that go to lm-evaluation-harness."""
    theirs = [name for name in names if name.startswith(_SINGLE) or re.split("[/@]", name, maxsplit=1)[0] == SUITE]
    return [name for name in names if name not in theirs], theirs


def choose_tasks(names: Sequence[str], limit: int | None = None) -> tuple[HarnessTask, ...]:
    """The tasks behind names such as `alignment-tax`, `alignment-tax/mmlu`, `harness:cmmlu_anatomy@20`.

    Args:
        limit: of those that have none of their own (`@N`).
    Raises:
        RequestError: an unknown name, a limit that is none, or one task named twice.
    """
    chosen: list[HarnessTask] = []
    for name in names:
        plain, at, count = name.partition("@")
        if at and not (count.isdecimal() and int(count) > 0):
            raise RequestError(f"{shown(name)}: behind @ stands how many items, 1 or more, as in {plain}@15.")
        own = int(count) if at else limit
        chosen += [replace(task, limit=own) for task in _find(plain)]
    twice = sorted({task.task for task in chosen if sum(other.task == task.task for other in chosen) > 1})
    if twice:
        raise RequestError(f"lm-eval task {', '.join(twice)} is asked for twice. Name it once.")
    return tuple(chosen)


def _find(name: str) -> Sequence[HarnessTask]:
    if name == SUITE:
        return TABLE_11
    if name.startswith(f"{SUITE}/"):
        short = name.removeprefix(f"{SUITE}/")
        found = [task for task in KNOWN if short in (task.short, task.task)]
        if not found:
            known = [task.short for task in KNOWN]
            close = difflib.get_close_matches(short, known, n=1) or [", ".join(known)]
            raise RequestError(
                f"{SUITE} has no task {shown(short)!r}. Did you mean {close[0]}? Any other task of lm-eval: "
                f"--suite {_SINGLE}TASK."
            )
        return found
    own = name.removeprefix(_SINGLE)
    if not re.fullmatch(r"[\w.:-]+", own):
        raise RequestError(f"{shown(name)}: behind {_SINGLE} stands lm-eval's name of a task, as {_SINGLE}gsm8k_cot.")
    for task in KNOWN:
        if own == task.task:
            return [task]
        if task.reader in ("mmlu", "cmmlu") and own.startswith(f"{task.task}_"):
            subject = own.removeprefix(f"{task.task}_").replace("_", " ")
            return [replace(task, task=own, title=f"{task.title}: {subject}")]
    return [
        HarnessTask(own, own, how_to_get="It is no task of table 11: add --download to let lm-eval fetch its data.")
    ]
