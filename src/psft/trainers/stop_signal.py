"""Ctrl-C and a scheduler's SIGTERM: finish the step, write a checkpoint, stop. A second one stops at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from psft.config import SAME_SIGNAL_S

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(TrainerCallback):
    """Listens while training runs. number: the signal that stops the run, the same on every rank, or None.

    With many processes a signal may reach one of them alone, or one before another. They agree after every step and at
    the end, and act on `number` alone: else one would wait in an evaluation that another leaves out.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._received_number: int | None = None
        self._first_at = 0.0
        self._keeps_no_checkpoint = False

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended: 128 + its number; 0 without one."""
        return 0 if self.number is None else 128 + self.number

    @property
    def is_received(self) -> bool:
        """Whether a signal has reached this rank, whatever the others know: long work may stop before its end."""
        return self._received_number is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over from the interpreter, and give them back. Elsewhere than in the main thread: no-op."""
        self.number = self._received_number = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._received_number is not None:
            if time.monotonic() - self._first_at > SAME_SIGNAL_S:
                os._exit(128 + number)
            return
        self._received_number, self._first_at = number, time.monotonic()
        if not int(os.environ.get("RANK") or 0):  # of a job's processes the first says it
            name = signal.Signals(number).name
            what = "" if self._keeps_no_checkpoint else " and writing a checkpoint"
            os.write(2, f"\n{name}: finishing this step{what}; once more stops at once.\n".encode())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keeps_no_checkpoint = args.save_strategy == "no"

    def _agree(self, args: Any) -> None:
        number = self._received_number or 0
        if args.world_size > 1:
            received = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            number = int(received)
        if number and self._received_number is None:  # this rank may receive it yet: the same signal, not a second
            self._received_number, self._first_at = number, time.monotonic()
        self.number = number or None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._agree(args)
        if self.number is not None:
            control.should_save = args.save_strategy != "no"
            control.should_evaluate &= bool(args.load_best_model_at_end)  # else a resumed run makes up for it
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # Wherever in the epoch a run stops, the Trainer says here that it has ended
        if self.number is not None and not (args.load_best_model_at_end and float(state.epoch).is_integer()):
            control.should_save = control.should_evaluate = False
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree(args)


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a process that reads data: outlive a signal that reaches every process of the run, as its rows are needed yet.

    Of SIGTERM only the first is passed over: it is also how a worker that does not end by itself is ended.
    """

    def passed_over(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, passed_over)
