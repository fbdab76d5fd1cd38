"""What a training run leaves behind, written to its run folder as it goes. Only the first rank writes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from psft.errors import RequestError, RunFailed, first_line, lost_a_peer, lost_a_worker
from psft.ops.precision import matmul_precision
from psft.runs import RunFolder, command_line, describe_environment
from psft.runs.checkpoints import remove_leftovers
from psft.runs.rows import ProbeRow
from psft.trainers.device_meter import is_out_of_memory
from psft.trainers.evaluation import HeldOutResult
from psft.trainers.telemetry import StepTelemetry
from psft.window import Step

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer


_NOTED = (
    "nll", "entropy", "clip_fraction", "grad_norm", "drift_nats_per_token",
    "rewards_margin", "rewards_accuracy", "reward_mean", "kept_group_share", "completion_length_mean",
    "truncated_share", "kl_start_k3",
)  # fmt: skip
"""Metrics whose first and last value the summary holds."""


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""What a disk answers: full, quota used up, file too large, read-only, broken, gone."""


class RunRecorder:
    """Follows one trainer: `step_begins` -> (telemetry set) -> `step_ends` for every step, `evaluated` now and then.

    is_claimed: set to True by a caller that has claimed the run folder already. extra: more entries for run.json.
    listeners: called on the first rank with each row and the file it goes to, without its ending.
    """

    def __init__(self, trainer: PSFTTrainer) -> None:
        self.trainer = trainer
        self.folder = RunFolder(str(trainer.args.output_dir))
        self.telemetry: StepTelemetry | None = None
        self.is_claimed = False
        self.last_evaluated_step: int | None = None
        self.num_eval_rows = 0  # of eval.jsonl; known to the rank that writes
        self.extra: dict[str, Any] = {}
        self.listeners: list[Callable[[str, Any], None]] = []
        self.best_checkpoint: dict[str, Any] | None = None  # for summary.json, where one is chosen
        self.loss: Tensor | None = None
        self._step_started = self._train_started = self._wall_time_s = 0.0
        self._exit_reason = "not started"
        self._first: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._best: dict[str, Any] = {}

    @contextlib.contextmanager
    def failures_in_words(self) -> Iterator[None]:
        """Turn a failure of the machine that a person can do something about into a `RunFailed` that says what."""
        try:
            yield
        except Exception as error:
            failure = self._in_words(error)
            if failure is not None:
                raise failure from error
            raise

    @contextlib.contextmanager
    def recording(self, *, resumed_at: int | None = None, num_eval_rows: int | None = None) -> Iterator[None]:
        """Claim the folder, write run.json, and write summary.json however the run ends.

        Args:
            resumed_at: the step of the checkpoint a run goes on from, 0 for its beginning: what was recorded later is
                cut off, as it will be repeated. None = a new run.
            num_eval_rows: rows eval.jsonl had at that step; None = not known.
        """
        if self._writes:
            if resumed_at is not None and self.folder.holds_run():
                self.is_claimed = True
                self._go_on(resumed_at, num_eval_rows)
            else:
                if not self.is_claimed:
                    self.folder.claim(overwrite=self.trainer.args.overwrite_output_dir)
                    self.is_claimed = True
                self.folder.write_json("run.json", self._run_info())
        self._train_started = time.monotonic()
        self._exit_reason = "finished"
        try:
            yield
            if self.trainer.stop_signal.number is not None:
                self._exit_reason = "interrupted"
            elif self.trainer.watch.stopped_by is not None:
                self._exit_reason = f"stopped: {self.trainer.watch.stopped_by}"
        except KeyboardInterrupt:
            self._exit_reason = "interrupted"
            raise
        except BaseException as error:
            self._exit_reason = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._wall_time_s += time.monotonic() - self._train_started
            is_failing = self._exit_reason.startswith("failed")
            # The disk may be what failed; and torch's handler speaks of a dead worker at any moment, here too.
            with contextlib.suppress(*([OSError, RuntimeError] if is_failing else [])):
                self.write_summary()

    def _go_on(self, step: int, num_eval_rows: int | None) -> None:
        """Cut the records back to `step` and take up what they say; run.json keeps how the run began."""
        remove_leftovers(self.folder.path)
        self.folder.cut_back(step, num_eval_rows=num_eval_rows)
        stepped, probed = self.folder.read_rows("metrics.jsonl"), self.folder.read_rows("probe.jsonl")
        for row in [*stepped, *(row for row in probed if row.get("group") == "all")]:
            self._note("", {k: row[k] for k in _NOTED if row.get(k) is not None})
        measured = self.folder.read_rows("eval.jsonl")
        self.trainer.watch.replay(stepped, measured, probed)
        self.num_eval_rows = len(measured)
        for row in measured:
            if row.get("value") is not None:
                self._note(f"{row['benchmark']}_", {row["metric"]: row["value"]})
        info = self._run_info()
        if (self.folder.path / "run.json").exists():
            began = self.folder.read_json("run.json")
            self.trainer.bad_steps.found = [b for b in began.get("bad_steps", []) if b["step"] <= step]
            info |= {name: began[name] for name in ("command", "started_at") if name in began}
            info |= {name: value for name, value in began.items() if name not in info}
            info["bad_steps"] = self.trainer.bad_steps.found
            info["alerts"] = [alert for alert in began.get("alerts", []) if alert["step"] <= step]
            again = {"step": step, "at": info_now(), "command": command_line(), "world_size": info["world_size"]}
            info["resumed"] = [*began.get("resumed", []), again]
        with contextlib.suppress(RequestError):
            self._wall_time_s = float(self.folder.read_json("summary.json").get("wall_time_s") or 0.0)
        self.folder.write_json("run.json", info)

    def write_bad_steps(self) -> None:
        """Name the steps that were passed over in run.json."""
        self.write_in_run("bad_steps", self.trainer.bad_steps.found)

    def write_in_run(self, name: str, value: Any) -> None:
        """Put an entry into run.json that was not known when the run began."""
        if self._writes and self.is_claimed:
            self.folder.write_json("run.json", {**self.folder.read_json("run.json"), name: value})

    def write_alerts(self, alerts: list[dict[str, Any]]) -> None:
        """Keep what was said about the run in run.json."""
        if self._writes and self.is_claimed:
            info = self.folder.read_json("run.json")
            self.folder.write_json("run.json", {**info, "alerts": alerts})

    def _in_words(self, error: BaseException) -> RunFailed | None:
        """A failure of the machine that a person can do something about, or None."""
        onward = "The last complete checkpoint is as it was: go on with --resume."
        if isinstance(error, RunFailed):
            return None  # it is in words
        if is_out_of_memory(error):
            return self._memory_ran_out(error)
        if lost_a_worker(error):
            return RunFailed(
                f"{first_line(error)}. A worker that reads data died, of too little memory as a rule. Lower "
                f"dataloader_num_workers. {onward}"
            )
        if self.trainer.args.world_size > 1 and lost_a_peer(error):
            return RunFailed(f"another rank is gone: {first_line(error)}. {onward}")
        if isinstance(error, BrokenPipeError):
            return RunFailed(
                f"what read this output is gone (broken pipe). Let it go to a file or a terminal. {onward}"
            )
        if isinstance(error, SafetensorError) or "PytorchStreamWriter failed" in str(error):  # the final model
            return RunFailed(f"{self.folder.path} cannot be written: {first_line(error)}. Make room. {onward}")
        if isinstance(error, OSError):
            named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
            path = self.folder.path if named is None else Path(named)
            if error.errno in _DISK or self.folder.path.absolute() in path.absolute().parents:
                return RunFailed(f"{path} cannot be written: {error.strerror}. Make room or mend it. {onward}")
        return None  # a failure elsewhere, of a callback say, keeps its traceback

    def _memory_ran_out(self, error: BaseException) -> RunFailed:
        return self.trainer.micro_batch_cap.ran_out(error)

    def write_summary(self) -> dict[str, Any]:
        """Write summary.json from what is known now, and return it; again after a later measurement."""
        summary = {
            "exit_reason": self._exit_reason,
            "steps": self.trainer.state.global_step,
            "wall_time_s": self._wall_time_s,
            "first": self._first,
            "last": self._last,
            "best": self._best,
        }
        if self.best_checkpoint is not None:
            summary["best_checkpoint"] = self.best_checkpoint
        if self._writes:
            self.folder.write_json("summary.json", summary)
        return summary

    def loss_seen(self, telemetry: StepTelemetry, loss: Tensor) -> None:
        """Keep what `training_step` measured until the optimizer has stepped; still on the device."""
        self.telemetry, self.loss = telemetry, loss

    def step_begins(self) -> None:
        self._step_started = time.monotonic()

    def step_ends(
        self, step: Step, grad_norm: Any, learning_rate: float | None, reduce: Callable[[Tensor, str], Tensor]
    ) -> dict[str, Any]:
        """Read the step's telemetry (the one host synchronisation of a step) and append its row."""
        assert self.telemetry is not None and self.loss is not None
        measured = self.telemetry.read(reduce)
        loss = reduce(self.loss, "sum").item() / self.trainer.args.world_size
        self.telemetry = None
        state = self.trainer.state
        row = {
            "step": state.global_step,
            "stage": "warmup" if step.is_warmup else "train",
            "window": step.window,
            "mini_batch": step.mini_batch,
            **self.trainer.trust_region.row(step),
            "epoch": state.epoch,
            "loss": loss,
            **measured,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            **self.pace(measured["tokens"] or 0),
        }
        self.append_step(row)
        return row

    def pace(self, num_tokens: int) -> dict[str, Any]:
        """What a row says about the machine: tokens a second since `step_begins`, and the peak of memory."""
        seconds = max(time.monotonic() - self._step_started, 1e-9)
        peak = peak_memory_bytes(self.trainer.args.device)
        return {"tokens_per_second": num_tokens / seconds, "peak_memory_bytes": peak}

    def append_step(self, row: dict[str, Any]) -> None:
        """Append a row of metrics.jsonl."""
        self._note("", {k: row[k] for k in _NOTED if row.get(k) is not None})
        if self._writes:
            self.folder.append("metrics.jsonl", row)
        self._tell("metrics", row)

    def evaluated(self, prefix: str, result: HeldOutResult) -> None:
        """Append NLL and entropy of one held-out data set to eval.jsonl."""
        name = prefix.removeprefix("eval_") if prefix != "eval" else "eval"
        for metric in ("nll", "entropy"):
            self.measured(name, metric, result.mean(metric), result.stderr(metric), int(result.tokens.sum()))
        self.last_evaluated_step = self.trainer.state.global_step

    def measured(
        self, benchmark: str, metric: str, value: float, stderr: float | None, n: int, k: int | None = None
    ) -> None:
        """Append one value to eval.jsonl at the current step; fields as in `psft.runs.rows.EvalRow`."""
        row = {
            "step": self.trainer.state.global_step,
            "benchmark": benchmark,
            "metric": metric,
            "k": k,
            "value": value,
            "stderr": stderr,
            "n": n,
        }
        self._note(f"{benchmark}_", {metric: value})
        if self._writes and self.is_claimed:
            self.folder.append("eval.jsonl", row)
            self.num_eval_rows += 1
        self._tell("eval", row)
        self.trainer.watch.evaluated(row)

    def probed(self, rows: list[ProbeRow]) -> None:
        """Append what the retention probe measured at the current step; the first row is over all prompts."""
        drift = rows[0]["drift_nats_per_token"]
        if drift is not None:
            self._note("", {"drift_nats_per_token": drift})
        if self._writes and self.is_claimed:
            for row in rows:
                self.folder.append("probe.jsonl", row)
        for row in rows:
            self._tell("probe", row)

    def _tell(self, kind: str, row: Any) -> None:
        if self._writes:
            for listener in self.listeners:
                listener(kind, row)

    @property
    def _writes(self) -> bool:
        return self.trainer.is_world_process_zero()

    def _note(self, prefix: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            key = prefix + name
            self._first.setdefault(key, value)
            self._last[key] = value
            if name == "nll":
                self._best[key] = min(value, self._best.get(key, value))
            elif name == "accuracy":
                self._best[key] = max(value, self._best.get(key, value))

    def _warmup_info(self) -> dict[str, Any] | None:
        args = self.trainer.args
        if not args.sft_warmup_steps:
            return None
        return {
            "steps": args.sft_warmup_steps,
            "mini_batch_size": args.sft_warmup_mini_batch_size or args.train_batch_size,
            "learning_rate": args.sft_warmup_learning_rate or args.learning_rate,
            "optimizer_state": args.sft_warmup_optimizer_state,
        }

    def _method_info(self) -> dict[str, Any]:
        """The entries of run.json that depend on what is trained."""
        trainer = self.trainer
        return {
            "objective": {"name": trainer.objective.name, "settings": dict(trainer.objective.settings)},
            "warmup": self._warmup_info(),
            "attention": trainer.attention,
            "head_kernel": trainer.head_kernel,
        }

    def _run_info(self) -> dict[str, Any]:
        args = self.trainer.args
        return {
            "command": command_line(),
            "started_at": info_now(),
            "seed": args.seed,
            "config": args.to_sanitized_dict() | {"train_batch_size": args.train_batch_size},
            **self._method_info(),
            "num_train_rows": len(self.trainer.train_dataset),
            "world_size": args.world_size,
            "distributed_type": self.trainer.accelerator.distributed_type.value,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul_precision": matmul_precision(),
            "num_threads": torch.get_num_threads(),
            "environment": describe_environment(),
            **self.extra,
        }


def info_now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory this process has held: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
