"""Benchmarks while training: avg@k of the model as it is, into eval.jsonl, and the best checkpoint by them.

    RUN/evaluation/step-N/samples.jsonl, grades.jsonl    every sample and grade, found again by key after a kill
                          RUN-step-N.SUITE.json          results, as `psft eval` writes them

An evaluation comes after the checkpoint of its step, so however long it takes, a kill loses no training. A run that
goes on from that checkpoint finishes what was left of it; samples that are there are not made again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import SaveStrategy

from psft.errors import RequestError
from psft.evaluation import results
from psft.evaluation.backends.live import LiveBackend, live_identity
from psft.evaluation.generate import Plan, make_plan
from psft.evaluation.graded import generate_graded, graded_items
from psft.evaluation.grading import Grades, grader_of, prepare_graders
from psft.evaluation.identity import plain_name
from psft.evaluation.in_training import chosen_suite, cost_in_words, load_benchmarks, selection_of
from psft.evaluation.results_file import results_path, write_results
from psft.evaluation.samples import GRADES, SAMPLES, KeyedFile, digest
from psft.evaluation.text_table import with_error
from psft.runs.folder import EVALUATION, to_json
from psft.trainers.best_checkpoint import BestCheckpoint
from psft.trainers.evaluation import evaluation_model
from psft.trainers.trackers import tell_trackers
from psft.trainers.undisturbed import undisturbed

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)

SEED = 0
"""Of the evaluation, as `psft eval` has it: a constant, so that runs of other seeds are asked alike."""


class Benchmarks:
    """Evaluates a trainer's model on `eval_suite`, and keeps the best checkpoint by `select_best`.

        __init__      data, graders and prompts are checked, so that nothing of them can fail hours later
        begins()      before the first step: the model before training; when a run goes on: what was left out
        step_ends()   after a step and what it saved

    Nothing of the training is touched, to the bit. On several ranks each takes its share of the batches; the first
    grades and writes, and every rank knows the scores.
    """

    def __init__(self, trainer: PSFTTrainer) -> None:
        self.trainer = trainer
        args = trainer.args
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise RequestError(
                "eval_suite generates from the model in training, which FSDP1 does not allow. Use --accelerate fsdp2, "
                "or leave eval_suite out and evaluate checkpoints with psft eval."
            )
        self.suite = chosen_suite(args)
        self.data = load_benchmarks(args)
        prepare_graders(self.data)
        backend = self._backend(forward=None)
        for part in self.data:
            backend.check(self._plan(part, backend, "").requests)
        selection = selection_of(args, self.suite)
        self.best = None if selection is None else BestCheckpoint(trainer, selection, self._settings())
        self._measured_at: int | None = None
        self._score: float | None = None  # of the step last measured, until it was offered
        self._owed_at: int | None = None  # a step whose checkpoint was saved before its evaluation

    @property
    def metrics(self) -> list[str]:
        """What rules can ask: NAME_accuracy of each benchmark, and of the selection."""
        names = [benchmark.name for benchmark in self.suite.benchmarks]
        return [f"{name}_accuracy" for name in dict.fromkeys([*names, *self._mean_names()])]

    def _mean_names(self) -> list[str]:
        """The selection's name, where it is a mean of its own."""
        return [self.best.selection.name] if self.best is not None and len(self.best.selection.benchmarks) > 1 else []

    def announce(self) -> None:
        """Say what each evaluation will take."""
        every = self.trainer.args.eval_suite_steps
        when = f"every {every} steps" if every else "with every checkpoint"
        logger.info("benchmarks at step 0, at the last step and %s: %s", when, cost_in_words(self.data))

    def begins(self) -> None:
        """Before the first step of a run, or of its continuation."""
        step, resume = self.trainer.state.global_step, self.trainer._resume
        if self.best is not None and resume is not None and step == resume.step:
            self.best.resumed()
        if self._measured_at != step and (step == 0 or self._owed_at == step):
            self._measure()
        self._choose()

    def step_ends(self, *, is_epoch_end: bool = False) -> None:
        """After a step, its records and its checkpoint; is_epoch_end: once more, after the last step of an epoch."""
        trainer = self.trainer
        is_open = self._measured_at != trainer.state.global_step and trainer.stop_signal.number is None
        if is_open and self._is_due() and (is_epoch_end or not self._is_saved_later()):
            self._measure()
        self._choose()

    def _is_saved_later(self) -> bool:
        """Whether the checkpoint of this step is still to come, at the end of the epoch."""
        is_epoch_end = self._is_last() or self.trainer.is_at_epoch_end
        return self.trainer.args.save_strategy == SaveStrategy.EPOCH and is_epoch_end

    def _is_last(self) -> bool:
        trainer = self.trainer
        is_stopped = trainer.stop_signal.number is not None
        is_ruled_out = trainer.control.should_training_stop and not is_stopped
        return trainer.state.global_step >= trainer.state.max_steps or is_ruled_out

    def _is_due(self) -> bool:
        """Whether the present step is evaluated; a signal leaves it out for the resumed run to make up."""
        trainer, args = self.trainer, self.trainer.args
        step = trainer.state.global_step
        is_stopped = trainer.stop_signal.number is not None
        if self._is_last():
            return True
        if args.eval_suite_steps is not None:
            return step % args.eval_suite_steps == 0
        if not is_stopped:
            return trainer.saved_at == step
        if args.save_strategy == SaveStrategy.STEPS:
            return step % trainer.state.save_steps == 0
        return args.save_strategy == SaveStrategy.EPOCH and trainer.is_at_epoch_end

    def _measure(self) -> None:
        trainer = self.trainer
        step, started = trainer.state.global_step, time.monotonic()
        model = evaluation_model(trainer)
        backend = self._backend(forward=model)
        with undisturbed(model):
            found = self._evaluate(model, backend)
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()  # the training's largest micro-batch was measured without what is kept here
        if backend.is_stopping:
            trainer.stop_signal.on_step_end(trainer.args, trainer.state, trainer.control)
        if found is None:
            logger.warning("step %d: the evaluation was stopped; its samples are kept, --resume finishes it.", step)
            return
        self._measured_at, self._owed_at = step, None
        self._record(step, found)
        if trainer.is_world_process_zero():
            scores = ", ".join(_shown(result) for result in found)
            logger.info("step %d: %s; %.0f s", step, scores, time.monotonic() - started)

    def _evaluate(self, model: Any, backend: LiveBackend) -> list[dict[str, Any]] | None:
        """Results by benchmark, the same on every rank; None if a signal came before the last batch."""
        trainer = self.trainer
        identity = live_identity(
            model, trainer.processing_class, num_ranks=trainer.args.world_size, is_shared=self._is_shared
        )
        started, num_made = time.monotonic(), 0
        found: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            files = None
            if trainer.is_world_process_zero():
                files = [stack.enter_context(KeyedFile(self._folder / name)) for name in (SAMPLES, GRADES)]
            for part in self.data:
                plan = self._plan(part, backend, identity)
                result, num = self._evaluate_part(plan, backend, files)
                if backend.was_stopped:
                    return None
                found.append(self._of_first(result))
                num_made += num
        if trainer.is_world_process_zero():
            self._write(found, backend, identity, started, num_made)
        return found

    def _evaluate_part(
        self, plan: Plan, backend: LiveBackend, files: list[KeyedFile] | None
    ) -> tuple[dict[str, Any] | None, int]:
        """Samples, grades, the result of one benchmark and how many samples were made for it, on the first rank; the
        others make their share of the samples."""
        if files is None:
            for _ in backend.generate(plan.requests, ()):
                pass
            return None, 0
        samples, grade_file = files
        grades = Grades(plan.data, grade_file)
        title = f"step {self.trainer.state.global_step}: {plan.data.benchmark.shown_name}"
        made = generate_graded(
            plan, backend, samples, grades, title=title, stream=_LogLines(), was_stopped=lambda: backend.was_stopped
        )
        if backend.was_stopped:
            return None, made.num_made
        items = graded_items(plan, samples, grades)
        return results.describe(plan.data, items, grader=grader_of(plan.data), hits=None), made.num_made

    def _record(self, step: int, found: list[dict[str, Any]]) -> None:
        recorder = self.trainer.recorder
        numbers = {}
        for result in found:
            for row in results.eval_rows(result, step):
                value = row["value"]
                assert value is not None  # every sample is there
                recorder.measured(row["benchmark"], row["metric"], value, row["stderr"], row["n"], row["k"])
                numbers[f"eval_{row['benchmark']}_{row['metric']}"] = value
        if self.best is not None:
            self._score = self.best.selection.score(found)
            chosen = [result for result in found if result["benchmark"] in self.best.selection.benchmarks]
            for name in self._mean_names():
                mean = results.mean_of(chosen)
                assert mean is not None
                recorder.measured(name, "accuracy", mean.value, mean.stderr, sum(result["n"] for result in chosen))
                numbers[f"eval_{name}_accuracy"] = mean.value
        tell_trackers(self.trainer, numbers)

    def _choose(self) -> None:
        """Offer the present step for the best, once it has both a score and a checkpoint."""
        step = self.trainer.state.global_step
        if self.best is None or self._score is None or not self._measured_at == self.trainer.saved_at == step:
            return
        score, self._score = self._score, None
        if self.best.offer(step, score) and self.trainer.is_world_process_zero():
            logger.info(
                "step %d is the best checkpoint so far: %s %.1f %%", step, self.best.selection.name, 100 * score
            )

    def _write(
        self, found: list[dict[str, Any]], backend: LiveBackend, identity: str, started: float, num_made: int
    ) -> None:
        """The results file, with the fields of `psft eval`."""
        run = self.trainer.recorder.folder.path
        name = f"{plain_name(run.resolve().name)}-{self._folder.name}"
        write_results(
            results_path(self._folder, name, self.suite.name),
            model={"name": name, "identity": identity, "step": self.trainer.state.global_step},
            suite=self.suite.name,
            seed=SEED,
            backend=backend.describe(),
            benchmarks=found,
            started=started,
            samples_made=num_made,
        )

    @property
    def _folder(self) -> Path:
        return self.trainer.recorder.folder.path / EVALUATION / f"step-{self.trainer.state.global_step}"

    def _plan(self, part: Any, backend: LiveBackend, identity: str) -> Plan:
        return make_plan(part, model=identity, numerics=backend.numerics, seed=SEED)

    @property
    def _is_shared(self) -> bool:
        """Whether ranks may hold parts of one model. ZeRO-2 could do without, and keeps step all the same."""
        return bool(self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def _backend(self, forward: Any) -> LiveBackend:
        trainer, args = self.trainer, self.trainer.args
        precision = trainer.accelerator.mixed_precision
        weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")

        def call(**inputs: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return forward(**inputs)

        return LiveBackend(
            trainer.model,
            trainer.processing_class,
            numerics=f"training/{weights if precision == 'no' else precision}",
            device=args.device,
            batch_size=args.eval_suite_batch_size,
            forward=call,
            around=trainer.accelerator.autocast,
            is_shared=self._is_shared,
            rank=args.process_index,
            num_ranks=args.world_size,
            is_stopped=lambda: trainer.stop_signal.is_received,
        )

    def _settings(self) -> str:
        """What scores follow from beside the weights, as one hash."""
        parts = [
            [part.benchmark.name, part.sha256, len(part.items), part.benchmark.k, vars(part.benchmark.sampling),
             part.benchmark.template, part.benchmark.system_prompt, dict(part.benchmark.grader)]
            for part in self.data
        ]  # fmt: skip
        return digest(to_json(parts))[:32]

    def _of_first(self, value: Any) -> Any:
        return value if self.trainer.args.world_size == 1 else broadcast_object_list([value])[0]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which is written before its step is evaluated; survives JSON."""
        step = self.trainer.state.global_step
        is_owed = self._measured_at != step and self._is_due()
        return {
            "measured_at": self._measured_at,
            "owed_at": step if is_owed else None,
            "score": self._score,
            "best": None if self.best is None else self.best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up where a checkpoint left off; None: it was written without benchmarks."""
        if state is None:
            return
        self._measured_at, self._owed_at, self._score = state["measured_at"], state["owed_at"], state["score"]
        if self.best is not None:
            self.best.load_state_dict(state["best"])


class _LogLines(io.StringIO):
    """A stream that turns progress into lines of the log: a live view has the terminal."""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        logger.info("%s", text.rstrip("\n"))
        return len(text)


def _shown(result: dict[str, Any]) -> str:
    entry = result["accuracy"]
    return f"{result['title']} {with_error(entry['value'], entry['stderr'])} %"
