"""Looks at a run's numbers while it goes on: measures the probe, says what a person should know, obeys their rules."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.data.probe_prompts import load_probe_prompts
from psft.errors import RequestError
from psft.runs.alerts import Alert, Watch
from psft.runs.rules import DRIFT, RuleBook, parse_rule
from psft.trainers.probe import RetentionProbe
from psft.trainers.trackers import probe_numbers, tell_trackers

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "psft_watch.json"


class RunWatch:
    """Told of every row a run records; measures drift on the way.

        begins()              before the first step: the base model answers the probe's prompts
        makes_up()            when a run goes on: the drift that a signal left out
        step_ends(row)        a row of metrics.jsonl; every probe_every steps, and after the last, the probe
        evaluated(row)        a row of eval.jsonl

    more_measured: what rows of eval.jsonl hold beside held-out data, as rules name it.

    Rules are asked on every rank, of numbers that are the same on all; alerts are said by the first.
    """

    def __init__(self, trainer: PSFTTrainer, more_measured: Sequence[str] = ()) -> None:
        self.trainer = trainer
        args = trainer.args
        self.alerts = Watch(args.drift_budget)
        self.probe: RetentionProbe | None = None
        if args.probe_every:
            self.probe = RetentionProbe(trainer, load_probe_prompts(args.probe_prompts))
        measured = [f"{name}_{metric}" for name in _held_out_names(trainer) for metric in trainer.held_out_metrics]
        measured += more_measured
        self.stop_rules, self.save_rules = (
            RuleBook(self._rule(text, setting, measured) for text in getattr(args, setting) or [])
            for setting in ("stop_when", "save_when")
        )
        self.stopped_by: str | None = None
        self._probed_at: int | None = None  # the last step; None in a checkpoint that does not say

    def _rule(self, text: str, setting: str, measured: list[str]) -> Any:
        rule = parse_rule(text, setting=setting, measured=measured)
        if rule.metric == DRIFT and self.probe is None:
            raise RequestError(f"{setting}={text!r} needs the retention probe, and probe_every=0 switches it off.")
        return rule

    def begins(self) -> None:
        """Draw the base model's answers, unless a checkpoint brought them."""
        if self.probe is None or self.probe.is_ready:
            return
        if self.trainer.state.global_step:
            logger.warning(
                "the retention probe is off: the run goes on from a checkpoint without the base model's answers, and "
                "the base model is gone."
            )
            self.probe = None
            return
        self.probe.sample()
        self._probe()

    def makes_up(self) -> None:
        """Measure drift at the step a run goes on from, or ends at, where a signal left it out."""
        step = self.trainer.state.global_step
        if self.probe is None or not self.probe.is_ready or self._probed_at in (None, step):
            return
        if self._is_probe_due(step):
            self._probe()

    def step_ends(self, row: Mapping[str, Any]) -> None:
        """Take in what a step measured; measure drift where it is time."""
        self._say(self.alerts.metrics(row))
        self._obey(row)
        if self._is_probe_due(row["step"]):
            self._probe()

    def _is_probe_due(self, step: int) -> bool:
        """Before a step's checkpoint is written, so that a resumed run measures each step once."""
        trainer = self.trainer
        if self.probe is None or trainer.stop_signal.number is not None:  # who stops a run should not have to wait
            return False
        is_last = step >= trainer.state.max_steps or trainer.control.should_training_stop
        return is_last or step % trainer.args.probe_every == 0

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Take in one measured value."""
        self._say(self.alerts.evaluated(row))
        self._obey({f"{row['benchmark']}_{row['metric']}": row["value"]})

    def _probe(self) -> None:
        assert self.probe is not None
        step = self._probed_at = self.trainer.state.global_step
        rows = self.probe.measure()
        for row in rows:
            row["step"] = step
        self.trainer.recorder.probed(rows)
        drift = rows[0]["drift_nats_per_token"]
        tell_trackers(self.trainer, probe_numbers(rows))
        self._say(self.alerts.probed(rows[0]))
        self._obey({DRIFT: drift})

    def _say(self, alerts: list[Alert]) -> None:
        if alerts and self.trainer.is_world_process_zero():
            for alert in alerts:
                logger.warning("step %d: %s", alert.step, alert.message)
            self.trainer.recorder.write_alerts([asdict(alert) for alert in self.alerts.said])

    def _obey(self, values: Mapping[str, Any]) -> None:
        """Ask the rules; those that are met save, or save and stop, at the end of this step."""
        control, step = self.trainer.control, self.trainer.state.global_step
        for rule in self.save_rules.met(values):
            logger.info("step %d: %s is met: a checkpoint is saved.", step, rule)
            control.should_save = True
        for rule in self.stop_rules.met(values):
            self.stopped_by = f"{rule} was met at step {step} with {values[rule.metric]:g}"
            logger.warning("%s: the run stops here, with a checkpoint.", self.stopped_by)
            control.should_save = control.should_training_stop = True

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder."""
        state = {
            "probe": None if self.probe is None else self.probe.state_dict(),
            "probed_at": self._probed_at,
            "rules": {"stop_when": self.stop_rules.state_dict(), "save_when": self.save_rules.state_dict()},
        }
        (folder / STATE_FILE).write_text(json.dumps(state, ensure_ascii=False) + "\n", encoding="utf-8")

    def replay(self, metrics: list[dict[str, Any]], evaluated: list[dict[str, Any]], probed: list[Any]) -> None:
        """Take in what a run recorded before it was resumed: what was said of that is not said again."""
        of_step: dict[int, list[tuple[Any, Mapping[str, Any]]]] = {}
        for take_in, rows in (
            (self.alerts.metrics, metrics), (self.alerts.probed, probed), (self.alerts.evaluated, evaluated)
        ):  # fmt: skip
            for row in rows:
                of_step.setdefault(int(row.get("step", 0)), []).append((take_in, row))
        for step in sorted(of_step):
            for take_in, row in of_step[step]:
                take_in(row)

    def restore(self, folder: Path) -> None:
        """Take up where a checkpoint left off.

        Raises:
            RequestError: the probe's prompts are others.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self.stop_rules.load_state_dict(state["rules"]["stop_when"])
        self.save_rules.load_state_dict(state["rules"]["save_when"])
        if self.probe is not None and state["probe"] is not None:
            self.probe.load_state_dict(state["probe"])
            self._probed_at = state.get("probed_at")


def _held_out_names(trainer: PSFTTrainer) -> list[str]:
    data = trainer.eval_dataset
    return list(data) if isinstance(data, dict) else ["eval"] if data is not None else []
