"""The frozen reference of an objective: the model as it was before training, or another one that was named.

Two needs, two ways. The log-prob of each target token is a number that never changes: it is computed once for the whole
training set and kept in a file. The distribution over the whole vocabulary is too large to keep: the reference runs
beside the policy, micro-batch by micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from psft.errors import RequestError
from psft.models.logits import logit_transform
from psft.ops import ReferenceLogits
from psft.trainers.head import add_token_scoring
from psft.trainers.reference_cache import LogpTable, read_table, write_table
from psft.trainers.reference_model import base_of, base_state, reference_model
from psft.trainers.reference_table import COLUMN, column_names, table_from_cache_or_model, table_from_column

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

TABLE_FILE = "ref_logps.safetensors"  # in a checkpoint


class FrozenReference:
    """One of three models, none of which training changes:

        a model that was given      `ref_model`, or loaded from `ref_model_name_or_path`
        the base of a PEFT policy   the policy itself, adapter off: no second copy
        a copy of the policy        taken in the constructor, and only where the whole vocabulary is needed

    Full fine-tuning with target log-probs alone needs no copy: the policy scores the training set before its first
    update. Always in eval mode and without gradients; evaluation never touches it.

    reference = FrozenReference.of(trainer, ref_model)   # in the trainer's constructor; None if the objective has none
    reference.prepare()                                  # at every epoch; the first time it scores the training set
    reference.logits(micro_batch)                        # the whole vocabulary, streamed
    reference.target_logps(row_numbers, mask)            # one number a token, from the table
    """

    def __init__(self, trainer: PSFTTrainer, model: Any, *, has_column: bool) -> None:
        self.trainer = trainer
        self.has_column = has_column
        self.is_rehearsed = False  # memory is being measured: any numbers will do
        self._policy = trainer.model
        self._model = model  # a model of its own, or None: the policy
        self._is_placed = False
        self._table: LogpTable | None = None
        base = base_of(self._policy if model is None else model)
        self.config = base.config
        self._logit_scale, self._softcap = logit_transform(base)

    @classmethod
    def of(cls, trainer: PSFTTrainer, ref_model: Any) -> FrozenReference | None:
        """The reference that the trainer's objective needs, or None.

        To be called before anything is done to the policy's forward, so that a copy of it is a clean one. A model that
        is given is frozen in place.

        Raises:
            RequestError: a reference that has no effect, two of them, one with another vocabulary, or a policy that
                can be neither copied nor taken back to where it was.
        """
        objective = trainer.objective
        needs_vocabulary = objective.needs_ref_vocabulary
        if not (objective.needs_ref_logps or needs_vocabulary):
            if ref_model is not None:
                raise RequestError(
                    f"ref_model has no effect for objective '{objective.name}', which has no reference. Remove it."
                )
            return None
        has_column = objective.needs_ref_logps and COLUMN in column_names(trainer.train_dataset)
        sources = {
            "ref_model": ref_model is not None,
            "ref_model_name_or_path": trainer.args.ref_model_name_or_path is not None,
            f"the column '{COLUMN}' of train_dataset": has_column and not needs_vocabulary,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are two references. Give one of them.")
        needs_scores = objective.needs_ref_logps and not has_column
        model = reference_model(trainer, ref_model, needs_scores=needs_scores, needs_vocabulary=needs_vocabulary)
        if model is not None:
            add_token_scoring(base_of(model), trainer.head_kernel)
            model.requires_grad_(False).eval()
        return cls(trainer, model, has_column=has_column)

    @property
    def is_trained_model(self) -> bool:
        """Whether it is the policy's own weights that score, so that an update ends it as a reference."""
        return self._model is None and not is_peft_model(self._policy)

    def prepare(self) -> None:
        """Do once what needs the policy in place: score the training set or read its scores, and place the model.

        Raises:
            RequestError: the policy would have to be its own reference after an update, or the data's own column does
                not fit.
        """
        objective = self.trainer.objective
        if objective.needs_ref_logps and self._table is None:
            self._table = table_from_column(self.trainer) if self.has_column else table_from_cache_or_model(self)
            if not objective.needs_ref_vocabulary:
                self._give_back()
        if objective.needs_ref_vocabulary:
            self.place()

    def save(self, folder: Path) -> None:
        """Put the table into a checkpoint: a policy that has moved on cannot score the training set again."""
        if self._table is not None:
            write_table(folder / TABLE_FILE, self._table)

    def restore(self, folder: Path) -> None:
        """Take the table from a checkpoint, if it holds one."""
        path = folder / TABLE_FILE
        if path.exists():
            self._table = read_table(path, num_rows=len(self.trainer.train_dataset))

    def logits(self, micro_batch: dict[str, Any]) -> ReferenceLogits:
        """What gives the reference's logits at the micro-batch's trained tokens, row by row of labels[:, 1:]."""
        with self.frozen() as model:
            rows: Any = self.trainer._score(model, micro_batch, score_tokens="rows")
        return ReferenceLogits(rows.hidden, rows.weight, rows.bias, self._logit_scale, self._softcap)

    def target_logps(self, row_numbers: list[int], mask: Tensor) -> Tensor:
        """(B, T) float32 on the CPU, nats: the reference's log-probs where `mask` is True, 0 elsewhere.

        Args:
            row_numbers: rows of the training set, in the order in which the micro-batch holds them.
            mask: (B, T) bool on the CPU, the trained tokens; a padding-free row holds the sequences one after another.
        """
        if self.is_rehearsed:
            return torch.zeros(mask.shape, device=mask.device)
        assert self._table is not None, "prepare() has not run"
        values = self._table.of(row_numbers)
        num_tokens = int(mask.sum())
        assert num_tokens == len(values), f"{len(values)} reference log-probs for {num_tokens} trained tokens"
        return torch.zeros(mask.shape).masked_scatter(mask, values)

    def state(self) -> dict[str, Any] | None:
        """The reference's weights by name, or None where no rank has them whole. To be called on every rank.

        Under FSDP they are gathered; then only the first rank is sure to have them.
        """
        if is_deepspeed_zero3_enabled():
            return None
        if self._model is not None:
            return self._model.state_dict()  # before it is placed, so not yet sharded
        trainer = self.trainer
        is_sharded = trainer.is_fsdp_enabled
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else self._policy.state_dict()
        return base_state(self._policy, state) if is_peft_model(self._policy) else state

    def place(self) -> None:
        """Put a model of its own where the policy's kind of parallelism wants it, as TRL's DPO trainer does."""
        if self._model is None or self._is_placed:
            return
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if trainer.is_deepspeed_enabled:
            from trl.models.utils import prepare_deepspeed

            self._model = prepare_deepspeed(self._model, accelerator)
        elif accelerator.is_fsdp2:  # unlike TRL's function, accelerate's sends the first rank's weights to the others
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self._model = fsdp2_prepare_model(accelerator, self._model)
        elif trainer.is_fsdp_enabled:
            from trl.models.utils import prepare_fsdp

            self._model = prepare_fsdp(self._model, accelerator)
        else:
            self._model = accelerator.prepare_model(self._model, evaluation_mode=True)
        self._model.eval()
        self._is_placed = True

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Any]:
        """The model to call, without gradients. The policy is put back as it was, flag by flag."""
        with torch.no_grad():
            if self._model is not None:
                yield self._model
                return
            # Not `model_wrapped`: DDP must not see a forward that has no backward. Under FSDP this is the wrapped one.
            model = self.trainer.model
            modes = [(module, module.training) for module in model.modules()]
            trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            model.eval()
            try:
                with self._policy.disable_adapter() if is_peft_model(self._policy) else contextlib.nullcontext():
                    yield model
            finally:
                for module, was_training in modes:
                    module.training = was_training
                for parameter, was_trained in trained:  # PEFT marks every active adapter weight as trained
                    if parameter.requires_grad != was_trained:
                        parameter.requires_grad_(was_trained)

    def _give_back(self) -> None:
        """Let go of a model whose every number is in the table."""
        models = self.trainer.accelerator._models
        models[:] = [model for model in models if model is not self._model]
        self._model = None
