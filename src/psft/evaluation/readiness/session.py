"""RL readiness from request to verdict: each model is evaluated, its answers and drift are scored, all are compared.

    OUTPUT of each model/MODEL.rl-readiness.json    results as of every evaluation, and `readiness`
                         entropies.jsonl            entropy of every answer, beside samples and grades
    VERDICT/rl-readiness.json                       ranking, comparisons, thresholds and words, if there are several

VERDICT is --output_dir, else `evals`. The same command goes on after a kill: samples, grades and entropies are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psft.errors import RequestError
from psft.evaluation.benchmarks import Suite
from psft.evaluation.generate import Plan
from psft.evaluation.identity import Model, plain_name
from psft.evaluation.readiness.drift import BaseAnswers, Drift, recorded_drift
from psft.evaluation.readiness.entropy import Entropies, entropies_of
from psft.evaluation.readiness.measures import Measures, measure_prompt
from psft.evaluation.readiness.prompts import as_rollouts
from psft.evaluation.readiness.settings import ReadinessSettings
from psft.evaluation.readiness.verdict import Verdict, judge, to_json
from psft.evaluation.readiness.words import table_rows
from psft.evaluation.request import Say, check_settings, find_model, say_on_stderr
from psft.evaluation.results import ItemScores
from psft.evaluation.samples import SAMPLES, KeyedFile
from psft.evaluation.session import Outcome, evaluate, record_rows
from psft.evaluation.settings import HowToSample, WhatToEvaluate
from psft.evaluation.text_table import aligned
from psft.runs import EvalRow, RunFolder

VERDICT_SCHEMA = 1


@dataclass(frozen=True)
class Readiness:
    """outcomes: of each model, in the order asked for. path: of the verdict's file; None for one model."""

    outcomes: list[Outcome]
    measures: list[Measures]
    verdict: Verdict
    path: Path | None

    @property
    def table(self) -> str:
        return aligned(table_rows(self.measures, self.verdict.ranking, self.verdict.fitness))


@dataclass
class _Answered:
    """What one model answered: the plans, and scores by benchmark and item."""

    plans: list[Plan]
    items: dict[str, Mapping[str, ItemScores]]


class _Loaded:
    """Models on this machine, one at a time: the last one asked for stays until another is."""

    def __init__(self, how: HowToSample) -> None:
        self._how = how
        self._folder: Path | None = None
        self._pair: tuple[Any, Any] | None = None

    def get(self, folder: Path) -> tuple[Any, Any]:
        """Model, in eval mode on its device, and tokenizer."""
        if self._pair is None or self._folder != folder:
            from psft.evaluation.backends.hf import choose_device, choose_dtype
            from psft.models import load_model, load_tokenizer

            self._pair = None  # memory for one
            how, device = self._how, choose_device(self._how.device)
            model: Any = load_model(
                str(folder), dtype=choose_dtype(how.dtype, device), force_pure_bf16=True,
                trust_remote_code=how.trust_remote_code,
            )  # fmt: skip
            tokenizer = load_tokenizer(str(folder), how.chat_template_path, trust_remote_code=how.trust_remote_code)
            self._pair, self._folder = (model.to(device).eval(), tokenizer), folder
        return self._pair

    @property
    def numerics(self) -> str:
        """What beside the weights decides a number."""
        from psft.evaluation.backends.hf import choose_device, choose_dtype

        return f"hf/{choose_dtype(self._how.dtype, choose_device(self._how.device))}"


def evaluate_readiness(
    names: Sequence[str],
    suite: Suite,
    what: WhatToEvaluate,
    how: HowToSample,
    settings: ReadinessSettings,
    *,
    say: Say = say_on_stderr,
) -> Readiness:
    """Measure every model on the prompts and say which to start RL from.

    Args:
        names: of models, as `evaluate` takes them. suite: from `readiness_suite`. say: told lines a person should read.
    Raises:
        RequestError: something about the request is wrong; nothing was generated.
        RunFailed: a backend cannot go on; what came so far is kept.
    """
    what, how = as_rollouts(what, how, settings.group_size)
    _check(names, what, how, settings)
    models = [find_model(name, how) for name in names]
    base = None if settings.base is None else find_model(settings.base, how)
    loaded = _Loaded(how)
    outcomes: list[Outcome] = []
    answered: list[_Answered] = []
    for name in names:
        seen = _Answered([], {})

        def keep(plan: Plan, items: Mapping[str, ItemScores], seen: _Answered = seen) -> None:
            seen.plans.append(plan)
            seen.items[plan.data.benchmark.name] = items

        if len(names) > 1:
            say(f"{name}:")
        outcomes.append(evaluate(name, suite, what, how, say=say, answered=keep))
        answered.append(seen)
    assert what.k is not None
    base_answers = None if base is None else _base_answers(base, loaded, say)
    measures = []
    for name, model, outcome, seen in zip(names, models, outcomes, answered, strict=True):
        entropies = _entropies(model, seen, outcome.results_path.parent, loaded, say)
        drift = _drift(model, base_answers, loaded)
        measures.append(_measured(name, seen, entropies, what.k, settings.group_size, drift))
        _add_to_results(measures[-1], model, outcome, suite, what, say)
    verdict = judge(measures)
    path = None if len(names) == 1 else _write(verdict, measures, outcomes, suite, what)
    return Readiness(outcomes, measures, verdict, path)


def _check(names: Sequence[str], what: WhatToEvaluate, how: HowToSample, settings: ReadinessSettings) -> None:
    problems = []
    if len(set(names)) < len(names):
        problems.append("a model is named twice")
    if settings.group_size < 2:
        problems.append("--group_size must be 2 or more")
    elif what.k is not None and what.k < settings.group_size:
        problems.append(f"--k {what.k} is fewer answers than a group has: --group_size {settings.group_size}")
    if len(names) > 1:
        given = {"--run_dir": what.run_dir, "--step": what.step, "--compare_to": what.compare_to}
        problems += [f"{name} belongs to one model, and {len(names)} are named" for name in given if given[name]]
        if how.backend == "replay":
            problems.append("--backend replay holds the answers of one model. Evaluate one at a time")
    if settings.base is not None and how.backend not in ("hf", "vllm"):
        problems.append(f"--base needs the models' weights, and --backend {how.backend} has none here")
    if problems:
        raise RequestError("rl-readiness: " + "; ".join(problems) + ".")
    check_settings(what, how)


def _base_answers(base: Model, loaded: _Loaded, say: Say) -> BaseAnswers:
    assert base.folder is not None
    say(f"{base.name} answers general prompts, from which drift is measured")
    return BaseAnswers(*loaded.get(base.folder), base.name)


def _drift(model: Model, base_answers: BaseAnswers | None, loaded: _Loaded) -> Drift:
    if model.folder is None:
        return Drift(None, "not known: the model is not on this machine")
    return recorded_drift(model) if base_answers is None else base_answers.drift_of(*loaded.get(model.folder))


def _entropies(model: Model, seen: _Answered, folder: Path, loaded: _Loaded, say: Say) -> Entropies | None:
    """None where the model's weights are not here."""
    place = model.folder
    if place is None:
        return None

    def load() -> tuple[Any, Any]:
        say(f"{model.name}: entropy of its answers")
        return loaded.get(place)

    with contextlib.closing(KeyedFile(folder / SAMPLES, is_writer=False)) as samples:
        return entropies_of(seen.plans, samples, folder, load, loaded.numerics)


def _measured(
    name: str, seen: _Answered, entropies: Entropies | None, k: int, group_size: int, drift: Drift
) -> Measures:
    found = {}
    asked = 0
    for plan in seen.plans:
        keys: dict[str, list[str]] = {}
        for request in plan.requests:
            keys.setdefault(request.item, []).append(request.key)
        asked += len(keys)
        benchmark = plan.data.benchmark.name
        for item, scores in seen.items[benchmark].items():
            own = None if entropies is None else [entropies[key] for key in keys[item] if key in entropies]
            prompt = measure_prompt(scores, k=k, group_size=group_size, entropies=own)
            if prompt is not None:
                found[f"{benchmark}/{item}"] = prompt
    if not found:
        raise RequestError(f"{name}: no prompt has {k} answers. The same command asks for those that are missing.")
    return Measures(name, found, k, group_size, drift, asked - len(found))


def _add_to_results(
    measures: Measures, model: Model, outcome: Outcome, suite: Suite, what: WhatToEvaluate, say: Say
) -> None:
    """The numbers into the results file, and into eval.jsonl where the model is of a run and every answer is there."""
    outcome.results["readiness"] = measures.to_json()
    RunFolder(outcome.results_path.parent).write_json(outcome.results_path.name, outcome.results)
    step = what.step if what.step is not None else model.step
    if step is None or outcome.problem is not None:
        return
    group = measures.group_size
    names = {
        "room": f"room@{measures.k}", "mixed": f"mixed_groups@{group}", "readable": "readable",
        "entropy": "sample_entropy", "drift": "drift",
    }  # fmt: skip
    rows = []
    for of, metric in names.items():
        estimate = measures.estimate(of)
        if estimate is not None:
            rows.append(
                EvalRow(
                    step=step, benchmark=suite.name, metric=metric, k=measures.k, value=estimate.value,
                    stderr=estimate.stderr, n=estimate.n,
                )
            )  # fmt: skip
    record_rows(model, what, rows, say)


def _write(
    verdict: Verdict, measures: Sequence[Measures], outcomes: Sequence[Outcome], suite: Suite, what: WhatToEvaluate
) -> Path:
    """The verdict over several models, whole or not at all."""
    folder = Path(what.output_dir).expanduser() if what.output_dir else Path("evals")
    content = {
        "schema": VERDICT_SCHEMA,
        "suite": suite.name,
        **to_json(verdict),
        "models": {
            own.name: {**own.to_json(), "results": str(outcome.results_path)}
            for own, outcome in zip(measures, outcomes, strict=True)
        },
    }
    return RunFolder(folder).write_json(f"{plain_name(suite.name)}.json", content)
