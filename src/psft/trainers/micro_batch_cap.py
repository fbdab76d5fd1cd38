"""The cap of padded tokens of one forward pass: given, or found for this device, remembered, lowered when too high.

given        max_tokens_per_micro_batch is a number
rule         on a CPU, and where memory cannot be measured
measured     on an accelerator, before the first window, with the real model and objective
remembered   measured by an earlier run under the same conditions
checkpoint   of the run that is resumed, so that it goes on to the same bits
lowered      memory ran out under a higher one
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor

from psft import __version__
from psft.data.microbatch import ACCELERATOR_OVERHEAD_TOKENS, CPU_OVERHEAD_TOKENS, Cut
from psft.errors import RunFailed
from psft.models.architectures import from_settings
from psft.models.estimate import activation_bytes_per_token
from psft.trainers.cap_measuring import SAFE_SHARE, measure_cap, no_room_for_a_row
from psft.trainers.cap_rehearsal import Rehearsal
from psft.trainers.device_meter import DeviceMeter, meter_of
from psft.trainers.remembered_cap import (
    CPU_TOKENS,
    UNMEASURED_TOKENS,
    RememberedCap,
    caps_folder,
    config_digest,
    key_of,
    read_cap,
    write_cap,
)

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

logger = logging.getLogger(__name__)

_STILL_FITS_SHARE = 0.95  # of the memory free now: a remembered cap that needs more is measured anew
_LOWERED_SHARE = 0.8  # of the cap under which memory ran out


class MicroBatchCap:
    """One trainer's cap.

        begin()          at the start of training, before anything is wrapped or sharded
        resume(...)      then the cap of a checkpoint
        settle()         before the first window; afterwards `tokens` stays
        cut()            how mini-batches are cut
        ran_out(error)   memory ran out: lower what is remembered, and say so

    tokens: the cap in force. source: where it is from, one of the words above. depends_on: all that the memory of a
    micro-batch follows from, as plain values.
    """

    def __init__(self, trainer: PSFTTrainer) -> None:
        self.trainer = trainer
        self.meter: DeviceMeter | None = meter_of(trainer.args.device)
        self.is_auto = trainer.args.max_tokens_per_micro_batch == "auto"
        self.is_cpu = trainer.args.device.type == "cpu"
        self.depends_on: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        given: Any = self.trainer.args.max_tokens_per_micro_batch
        self.tokens = int(given) if not self.is_auto else CPU_TOKENS if self.is_cpu else UNMEASURED_TOKENS
        self.source = "rule" if self.is_auto else "given"
        self.measured: dict[str, Any] | None = None

    def begin(self) -> None:
        """Take down what the cap depends on while the model is as it was given, the same at every start."""
        self._reset()
        if self.is_auto:
            self.depends_on = conditions(self.trainer, self.meter)

    def cut(self) -> Cut:
        """How mini-batches are cut under the cap in force."""
        return Cut(
            self.tokens,
            is_hard=not self.is_auto,
            is_padded=not self.trainer.padding_free,
            overhead_tokens=CPU_OVERHEAD_TOKENS if self.is_cpu else ACCELERATOR_OVERHEAD_TOKENS,
        )

    def state_dict(self) -> dict[str, Any] | None:
        """For a checkpoint; None where the cap is a setting, which the run's identity holds."""
        return {"tokens": self.tokens, "key": key_of(self.depends_on)} if self.is_auto else None

    def resume(self, state: dict[str, Any] | None, largest_micro_batch: int) -> bool:
        """Take up the cap of a checkpoint if the conditions are the same. Called on every rank.

        Args:
            state: what `state_dict` gave. largest_micro_batch: padded tokens of the largest one in what is left of the
                checkpoint's open window on this rank; 0 if nothing is.
        Returns:
            whether the open window has to be dropped: memory has run out since the checkpoint, and the window has a
            micro-batch over the cap that was lowered then.
        """
        if not self.is_auto or state is None:
            return False
        remembered = self._remembered()
        if remembered is not None and remembered.lowered_from is not None and remembered.tokens < state["tokens"]:
            self.tokens, self.source = remembered.tokens, "lowered"
            return -self._least(-largest_micro_batch) > max(self.tokens, self.depends_on["row_tokens"])
        if state["key"] == key_of(self.depends_on):
            self.tokens, self.source = int(state["tokens"]), "checkpoint"
        return False

    def settle(self) -> None:
        """Find the cap for this device unless it is given or a checkpoint's; announce and record it.

        Raises:
            RunFailed: the longest row does not fit into the device's memory.
        """
        if self.source == "rule":
            self._find()
        if self.is_auto and self.trainer.is_world_process_zero():
            logger.info("max_tokens_per_micro_batch=auto: %d padded tokens, %s.", self.tokens, self._in_words())
        record = {"tokens": self.tokens, "source": self.source, "measured": self.measured}
        self.trainer.recorder.write_in_run("micro_batch_cap", record)

    def ran_out(self, error: BaseException) -> RunFailed:
        """What to tell of memory that ran out in a step; an automatic cap is remembered at a lower value."""
        what = f"memory ran out in a step ({str(error).splitlines()[0][:200]})."
        kept = "The last complete checkpoint is as it was"
        longest = max(self.trainer.row_lengths)
        if self.tokens <= longest:
            return RunFailed(f"{what} {no_room_for_a_row(longest)} {kept}.")
        lower = max(longest, int(self.tokens * _LOWERED_SHARE))
        if not self.is_auto:
            return RunFailed(
                f"{what} Micro-batches have up to max_tokens_per_micro_batch={self.tokens} padded tokens; set it "
                f"lower, e.g. {lower}. {kept}: go on with --resume --allow_changed batch_sizes."
            )
        write_cap(caps_folder(), RememberedCap(lower, self.depends_on, lowered_from=self.tokens))
        return RunFailed(
            f"{what} Micro-batches have up to {self.tokens} padded tokens (max_tokens_per_micro_batch=auto: "
            f"{self._in_words()}). For this model, data and device it is {lower} from now on; a number of your own "
            f"goes before it. {kept}: go on with --resume."
        )

    def _find(self) -> None:
        remembered = self._remembered()
        if remembered is not None and remembered.lowered_from is not None:
            self.tokens, self.source, self.measured = remembered.tokens, "lowered", None
        elif self.is_cpu and self.meter is None:
            self._fit_into_cpu_memory()
        elif self.meter is None or self.trainer.is_deepspeed_enabled:  # DeepSpeed would take a step with a probe
            pass
        elif remembered is not None and self._still_fits(remembered):
            self.tokens, self.source = remembered.tokens, "remembered"
            self.measured = dict(remembered.measured or {})
        else:
            self._measure()

    def _measure(self) -> None:
        assert self.meter is not None
        with Rehearsal(self.trainer) as rehearsal:
            found = measure_cap(
                rehearsal.run,
                self.meter,
                row_tokens=self.depends_on["row_tokens"],
                most_rows=self.depends_on["most_rows"],
                reserved_bytes=self._missing_optimizer_bytes(),
                least=self._least,
            )
        self.meter.release()
        self.meter.reset_peak()  # what metrics.jsonl tells is the peak of training
        self.tokens, self.source, self.measured = found.tokens, "measured", dataclasses.asdict(found)
        if self.trainer.is_world_process_zero():
            write_cap(caps_folder(), RememberedCap(self.tokens, self.depends_on, measured=self.measured))

    def _still_fits(self, remembered: RememberedCap) -> bool:
        """Whether the free memory of now, on every rank, would take the remembered cap as well."""
        assert self.meter is not None and remembered.measured is not None
        needed = remembered.measured["bytes_at_cap"]
        gradients = sum(_local_bytes(p) for p in self._trained() if p.grad is None)
        room = _STILL_FITS_SHARE * (self.meter.free() - gradients - self._missing_optimizer_bytes())
        return bool(self._least(int(needed <= room)))

    def _fit_into_cpu_memory(self) -> None:
        """Fewer tokens where the machine's free memory is too small for the rule, by an estimate from sizes."""
        sizes = from_settings(self.trainer.model.config.to_dict())
        if sizes is None:
            return
        args = self.trainer.args
        a_token = activation_bytes_per_token(
            sizes, half=bool(args.bf16), gradient_checkpointing=bool(args.gradient_checkpointing)
        )
        to_come = sum(_local_bytes(p) for p in self._trained() if p.grad is None) + self._missing_optimizer_bytes()
        free = psutil.virtual_memory().available / args.world_size - to_come
        fits = self._least(max(1, int(SAFE_SHARE * free / a_token)))
        if fits < self.tokens:
            self.tokens = fits
            logger.warning("free memory is short: about %.1f GiB for micro-batches of this rank.", free / 2**30)

    def _missing_optimizer_bytes(self) -> int:
        """What the optimizer allocates at its first step: two moments of each trained number, as AdamW has; 0 later."""
        optimizer: Any = self.trainer.optimizer
        if optimizer is not None and optimizer.state:
            return 0
        return 2 * sum(_local_bytes(parameter) for parameter in self._trained())

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.trainer.model.parameters() if p.requires_grad]

    def _remembered(self) -> RememberedCap | None:
        """What the first rank finds, on every rank."""
        if self.trainer.args.world_size == 1:
            return read_cap(caps_folder(), self.depends_on)
        is_first = self.trainer.is_world_process_zero()
        return broadcast_object_list([read_cap(caps_folder(), self.depends_on) if is_first else None])[0]

    def _least(self, value: int) -> int:
        """The smallest of a number over all ranks."""
        trainer = self.trainer
        return -int(trainer._reduce(torch.tensor(-value, dtype=torch.int64, device=trainer.args.device), "max").item())

    def _in_words(self) -> str:
        if self.source in ("measured", "remembered"):
            assert self.measured is not None
            how = "measured now" if self.source == "measured" else "measured by an earlier run"
            return f"{how}: {self.measured['free_bytes'] / 2**30:.1f} GiB were free for micro-batches"
        return {
            "rule": "the fastest on a CPU" if self.is_cpu else "a guess, as memory is not measured here",
            "checkpoint": "as in the checkpoint",
            "lowered": "lowered since memory ran out",
        }[self.source]


def conditions(trainer: PSFTTrainer, meter: DeviceMeter | None) -> dict[str, Any]:
    """What the memory of a micro-batch follows from: `MicroBatchCap.depends_on`."""
    args, objective, config = trainer.args, trainer.objective, trainer.model.config
    reference = trainer.reference if objective.needs_ref_vocabulary else None
    return {
        "model": config_digest(config.to_dict()),
        "trained_numbers": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "dtype": sorted({str(p.dtype) for p in trainer.model.parameters()}),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "attention": config._attn_implementation,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "activation_offloading": bool(args.activation_offloading),
        "torch_compile": bool(args.torch_compile),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "needs": sorted(objective.needs),
        "reference": None if reference is None else config_digest(reference.config.to_dict()),
        "padding_free": bool(trainer.padding_free),
        "row_tokens": max(trainer.row_lengths),
        "most_rows": math.ceil(args.most_rows_per_step / args.world_size),
        "device": "cpu" if meter is None else meter.name,
        "device_bytes": psutil.virtual_memory().total if meter is None else meter.total,
        "world_size": args.world_size,
        "engine": trainer.accelerator.distributed_type.value,
        "versions": {"psft": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _local_bytes(parameter: torch.Tensor) -> int:
    """Of this rank's part of a parameter."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()
