"""The retention probe: how far the model has moved on general prompts, measured while it trains, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from psft.data.probe_prompts import ProbePrompt, encode_probe_prompts
from psft.errors import RequestError
from psft.models.answers import sample_answers
from psft.models.decoding import end_tokens
from psft.ops import IGNORE_INDEX
from psft.ops.precision import exact_small_products
from psft.runs.rows import ProbeRow
from psft.trainers.evaluation import HeldOutResult, evaluation_model
from psft.trainers.undisturbed import in_eval_mode

if TYPE_CHECKING:
    from psft.trainers.psft_trainer import PSFTTrainer

SEED = 20250817
"""Of the sampled answers. A constant, so that runs with other seeds are probed by the same answers."""
BATCH_ROWS = 32
ALL = "all"


class RetentionProbe:
    """Answers that the model gave before training, and how likely it finds them now.

        sample()      once, before the first step: answers at temperature 1, and the base model's log-probs of them
        measure()     then and later: drift in nats per token, overall and by kind

    drift = mean over answer tokens of (base log-prob - current log-prob). The base model drew the answers, so this
    estimates KL(base || current) on general text without bias: 0 at first, to the bit, and growing as the base model's
    ways become unlikely. It can be negative by chance. The standard error takes answers as clusters.

    Nothing of the training is touched: no weight, no gradient, no random state. On several ranks each takes its share
    of the prompts; models that ranks hold together are called by all ranks alike.
    """

    def __init__(self, trainer: PSFTTrainer, prompts: Sequence[ProbePrompt]) -> None:
        self.trainer = trainer
        self.kinds = [prompt.kind for prompt in prompts]
        tokenizer: Any = trainer.processing_class
        self.prompts = encode_probe_prompts(tokenizer, list(prompts))
        self.answers: list[list[int]] = []
        self.base_logps: list[float] = []  # summed over each answer, nats
        self._check_lengths(prompts)

    @property
    def is_ready(self) -> bool:
        """Whether the base model has answered."""
        return bool(self.answers)

    def sample(self) -> None:
        """Let the model answer, as it is now, and score what it said."""
        trainer, mine = self.trainer, self._mine()
        model = evaluation_model(trainer)
        is_shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        answers: list[list[int]] = []
        on_cpu = trainer.args.device.type == "cpu"
        with in_eval_mode(model), exact_small_products() if on_cpu else nullcontext():
            for start in range(0, len(mine), BATCH_ROWS):
                numbers = mine[start : start + BATCH_ROWS]

                def forward(**inputs: Any) -> Any:
                    with trainer.compute_loss_context_manager():
                        return model(**inputs)

                answers += sample_answers(
                    forward,
                    [self.prompts[i] for i in numbers],
                    [SEED + i for i in numbers],
                    max_new_tokens=trainer.args.probe_max_new_tokens,
                    end_ids=end_tokens(trainer.model, self._tokenizer),
                    device=trainer.args.device,
                    runs_full_length=is_shared and trainer.args.world_size > 1,
                )
        self.answers = self._in_order(list(zip(mine, answers, strict=True)))
        _, logps, _ = self._score()
        self.base_logps = logps.tolist()

    def measure(self) -> list[ProbeRow]:
        """One row over all prompts, then one a kind, without `step`."""
        assert self.is_ready, "sample() comes first"
        tokens, logps, entropies = self._score()
        drift = torch.tensor(self.base_logps, dtype=torch.float64) - logps
        groups = {ALL: list(range(len(self.kinds)))}
        for i, kind in enumerate(self.kinds):
            groups.setdefault(kind, []).append(i)
        rows: list[ProbeRow] = []
        for group, members in groups.items():
            result = HeldOutResult(tokens[members], drift[members], entropies[members], torch.zeros(len(members)))
            rows.append(
                {
                    "group": group,
                    "drift_nats_per_token": result.mean("nll"),
                    "stderr": result.stderr("nll"),
                    "entropy": result.mean("entropy"),
                    "tokens": int(result.tokens.sum()),
                    "prompts": len(members),
                }
            )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run, which has no base model any more, needs; survives JSON to the bit."""
        return {"prompts": self.prompts, "answers": self.answers, "base_logps": self.base_logps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RequestError: the checkpoint was probed with other prompts."""
        if state["prompts"] != self.prompts:
            raise RequestError(
                "the run was probed with other prompts than probe_prompts gives now, and the base model that answered "
                "them is gone. Give the same file as before, or probe_every=0."
            )
        self.answers, self.base_logps = state["answers"], state["base_logps"]

    def _score(self) -> tuple[Tensor, Tensor, Tensor]:
        """(prompts,) float64 on the CPU each: answer tokens, their summed log-probs and entropies under the model."""
        trainer, mine = self.trainer, self._mine()
        model = evaluation_model(trainer)
        sums = []
        with torch.no_grad(), in_eval_mode(model):
            for start in range(0, len(mine), BATCH_ROWS):
                scored = trainer._score(model, self._batch(mine[start : start + BATCH_ROWS]))
                columns = (scored.mask, scored.logps, scored.entropies)
                sums.append(torch.stack([x.sum(1, dtype=torch.float64) for x in columns], 1))
        gathered = trainer.accelerator.gather(torch.cat(sums)).cpu()
        numbers = [i for rank in range(trainer.args.world_size) for i in self._share(rank)]
        rows = torch.empty(len(self.prompts), 3, dtype=torch.float64)
        rows[numbers] = gathered  # a rank that repeats a prompt to keep step gives the same numbers again
        tokens, logps, entropies = rows.unbind(1)
        return tokens, logps, entropies

    def _batch(self, numbers: list[int]) -> dict[str, Tensor]:
        rows = [(self.prompts[i], self.answers[i]) for i in numbers]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        inputs = {
            name: torch.full((len(rows), width), fill)
            for name, fill in (("input_ids", self._pad_id()), ("labels", IGNORE_INDEX), ("attention_mask", 0))
        }
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            inputs["input_ids"][row, :end] = torch.tensor(prompt + answer)
            inputs["labels"][row, len(prompt) : end] = torch.tensor(answer)
            inputs["attention_mask"][row, :end] = 1
        return inputs

    def _mine(self) -> list[int]:
        return self._share(self.trainer.args.process_index)

    def _share(self, rank: int) -> list[int]:
        """Numbers of a rank's prompts, of like length first; every rank has equally many, some twice if need be."""
        world_size = self.trainer.args.world_size
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        order += order[: -len(order) % world_size]
        return order[rank::world_size]

    def _in_order(self, numbered: list[tuple[int, list[int]]]) -> list[list[int]]:
        """Every rank's answers on every rank, by number of prompt."""
        if self.trainer.args.world_size > 1:
            numbered = gather_object(numbered)
        answers = dict(numbered)
        return [answers[i] for i in range(len(self.prompts))]

    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return 0 if pad is None else pad

    @property
    def _tokenizer(self) -> Any:
        return self.trainer.processing_class

    def _check_lengths(self, prompts: Sequence[ProbePrompt]) -> None:
        most = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.trainer.args.probe_max_new_tokens
        for prompt, ids in zip(prompts, self.prompts, strict=True):
            if most is not None and len(ids) + new > most:
                raise RequestError(
                    f"{prompt.where}: the prompt has {len(ids)} tokens, and with probe_max_new_tokens={new} that is "
                    f"more than the {most} the model can hold. Shorten or remove it."
                )
