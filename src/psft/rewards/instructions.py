"""IFEval: does a response follow the instructions of its prompt? By the checkers of lm-evaluation-harness.

Two readings, both always reported: strict takes the response as it is; loose also tries it without its first line, its
last line and without asterisks, and takes the best (arXiv:2311.07911, section 2.2). A prompt counts as followed if all
its instructions are. The paper of PSFT reports the loose one.

The checkers cut sentences by nltk's `punkt_tab`, which they would download when imported: here it has to be there. They
tell languages by langdetect, which draws random numbers: here it is seeded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from psft.errors import RequestError
from psft.rewards.base import Grade, text_field

_SENTENCES = "tokenizers/punkt_tab"
_SEED = 0


class InstructionGrader:
    """Grades `response` to `prompt` by `instruction_id_list` and `kwargs` (one mapping for each instruction).

    Args:
        is_loose: whether the score is the loose reading's; both stand in the details.
        nltk_data: folder with `tokenizers/punkt_tab`, looked into before the places nltk knows ($NLTK_DATA among them).
    """

    name = "ifeval"
    is_quick = False

    def __init__(self, is_loose: bool = True, nltk_data: str | None = None) -> None:
        self.is_loose = is_loose
        self.nltk_data = nltk_data
        self._checkers: Any = None

    def prepare(self) -> None:
        try:
            import langdetect
            import nltk
        except ImportError as error:
            raise RequestError(f'grader ifeval needs {error.name}. Install it: pip install "psft[eval]".') from error
        if self.nltk_data is not None and self.nltk_data not in nltk.data.path:
            nltk.data.path.insert(0, self.nltk_data)
        try:
            nltk.data.find(f"{_SENTENCES}/english")
        except LookupError as error:
            looked = f" It is not in {self.nltk_data}." if self.nltk_data is not None else ""
            raise RequestError(
                f"grader ifeval needs nltk's punkt_tab, and psft downloads nothing by itself.{looked} Get it once: "
                "python -m nltk.downloader punkt_tab; or name a folder that holds tokenizers/punkt_tab: NLTK_DATA=DIR."
            ) from error
        langdetect.DetectorFactory.seed = _SEED
        try:
            from lm_eval.tasks.ifeval import utils
        except ImportError as error:
            raise RequestError(
                f'grader ifeval needs lm-eval ({error}). Install it: pip install "psft[eval]".'
            ) from error
        self._checkers = utils

    def check(self, row: Mapping[str, Any]) -> None:
        text_field(row, "response")
        text_field(row, "prompt")
        names, settings = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise RequestError("field 'instruction_id_list' must be a list of one or more names of instructions.")
        if not isinstance(settings, list) or len(settings) != len(names):
            raise RequestError(f"field 'kwargs' must be a list of {len(names)} mappings, one for each instruction.")
        if not all(one is None or isinstance(one, Mapping) for one in settings):
            raise RequestError("field 'kwargs' holds something else than mappings.")

    def __call__(self, row: Mapping[str, Any]) -> Grade:
        self.check(row)
        if self._checkers is None:
            self.prepare()
        unknown = set(row["instruction_id_list"]) - set(self._checkers.instructions_registry.INSTRUCTION_DICT)
        if unknown:
            raise RequestError(f"lm-eval knows no instruction called {', '.join(sorted(unknown))}.")
        settings = [{k: v for k, v in (one or {}).items() if v is not None} for one in row["kwargs"]]
        document = {"key": 0, "prompt": row["prompt"], "kwargs": settings}
        document["instruction_id_list"] = row["instruction_id_list"]
        state = random.getstate()
        random.seed(_SEED)  # a checker draws what a row's kwargs leave out
        try:
            found = self._checkers.process_results(document, [row["response"]])
        finally:
            random.setstate(state)
        followed = {level: [bool(x) for x in found[f"inst_level_{level}_acc"]] for level in ("strict", "loose")}
        details = {level: float(all(flags)) for level, flags in followed.items()}
        chosen = "loose" if self.is_loose else "strict"
        missed = [name for name, ok in zip(row["instruction_id_list"], followed[chosen], strict=True) if not ok]
        reason = f"not followed: {', '.join(missed)}" if missed else "all instructions followed"
        is_empty = not row["response"].strip()
        return Grade(
            details[chosen],
            None if is_empty else f"{len(followed[chosen]) - len(missed)} of {len(followed[chosen])} instructions",
            "no answer found: the response is empty" if is_empty else reason,
            {**details, **{f"instructions_{level}": flags for level, flags in followed.items()}},
        )
