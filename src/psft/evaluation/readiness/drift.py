"""How far a model is from the one that fine-tuning began with, in nats per token on general prompts.

The measure of the retention probe (`psft.trainers.probe`): over the base model's own answers, drawn at temperature 1,
the mean of its log-probs minus the model's. It is read from the run folder, or measured here from `--base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psft.evaluation.identity import Model
from psft.evaluation.statistics import Estimate, token_mean_values, unbounded_mean
from psft.runs import RunFolder

_SEED = 20250817
"""As the probe of a training run has it, so that both ask alike."""
_MOST_TOKENS = 48
"""Of an answer: the default of `--probe_max_new_tokens`."""
_BATCH_ROWS = 32
_ALL = "all"


@dataclass(frozen=True)
class Drift:
    """estimate: nats per token, None where it is not known. source: where it is from, or why it is not known, in words.
    values: one a probe prompt, for paired comparison; None where only the estimate is known."""

    estimate: Estimate | None
    source: str
    values: tuple[float, ...] | None = None


def recorded_drift(model: Model) -> Drift:
    """What the retention probe of the model's run says of its step."""
    if model.run is None or model.step is None:
        return Drift(None, "not known: it is no checkpoint of a run. Give --base MODEL to measure it")
    rows = [row for row in RunFolder(model.run).read_rows("probe.jsonl") if row.get("group") == _ALL]
    here = [row for row in rows if row.get("step") == model.step]
    if not here:
        steps = sorted({int(row["step"]) for row in rows})
        there = f"has measured it at steps {', '.join(map(str, steps))}" if steps else "has no measurement"
        return Drift(None, f"not known at step {model.step}: the run's probe {there}. Give --base MODEL to measure it")
    value, stderr = here[-1].get("drift_nats_per_token"), here[-1].get("stderr")
    if value is None:
        return Drift(None, "not known: the run's probe measured no finite number")
    low, high = (None, None) if stderr is None else (value - 1.96 * stderr, value + 1.96 * stderr)
    estimate = Estimate(float(value), stderr, low, high, int(here[-1].get("prompts") or 0))
    return Drift(estimate, f"the run's retention probe at step {model.step}")


class BaseAnswers:
    """What the base model says to the bundled general prompts, and how likely it found that.

    Raises:
        RequestError: the tokenizer cannot write a prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        import torch

        from psft.data.probe_prompts import encode_probe_prompts, load_probe_prompts
        from psft.models.answers import sample_answers
        from psft.models.decoding import end_tokens

        self.name = name
        self._vocabulary = tokenizer.get_vocab()
        self._prompts = encode_probe_prompts(tokenizer, load_probe_prompts())
        self._answers: list[list[int]] = []
        with torch.no_grad():
            for start in range(0, len(self._prompts), _BATCH_ROWS):
                prompts = self._prompts[start : start + _BATCH_ROWS]
                self._answers += sample_answers(
                    model, prompts, [_SEED + start + i for i in range(len(prompts))], max_new_tokens=_MOST_TOKENS,
                    end_ids=end_tokens(model, tokenizer), device=model.device,
                )  # fmt: skip
        self._base_logps = self._logps(model)

    def drift_of(self, model: Any, tokenizer: Any) -> Drift:
        """Of a model that has the same tokens; not known of any other."""
        if tokenizer.get_vocab() != self._vocabulary:
            return Drift(None, f"not known: its tokens are not those of {self.name}")
        logps = self._logps(model)
        sums = [base - now for base, now in zip(self._base_logps, logps, strict=True)]
        values = token_mean_values(sums, [len(answer) for answer in self._answers])
        return Drift(unbounded_mean(values), f"measured from {self.name} on {len(values)} prompts", tuple(values))

    def _logps(self, model: Any) -> Sequence[float]:
        """Of each answer, summed over its tokens, nats."""
        from psft.models.answer_scores import score_answers

        found = dict(score_answers(model, list(zip(self._prompts, self._answers, strict=True))))
        return [found[i].logp for i in range(len(self._answers))]
