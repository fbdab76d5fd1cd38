"""Share of problems a model solves with one greedy answer each: the quick look of the quick start."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from psft.data import final_answer, last_number
from psft.ops.precision import exact_small_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GreedyAnswers:
    """num_correct of num_problems ended in the gold number; num_truncated ran into the token limit.

    num_in_form: answers that give their result as the demonstrations do, `#### NUMBER`, right or wrong.
    """

    num_problems: int
    num_correct: int
    num_truncated: int
    num_in_form: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_problems

    @property
    def form_share(self) -> float:
        return self.num_in_form / self.num_problems

    def stderr(self, share: float) -> float:
        """Standard error of a share p of the problems, sqrt(p (1 - p) / n)."""
        return (share * (1 - share) / self.num_problems) ** 0.5


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    description: str = "greedy answers",
) -> GreedyAnswers:
    """Answer each conversation's last user turn greedily and compare the last number written with the gold one.

    Any last number counts, so that a model which solves the problem in another form than `#### NUMBER` is credited.

    Args:
        conversations: messages ending with an assistant turn that holds `#### NUMBER`; that turn is the gold answer.
        max_new_tokens: limit of an answer, in tokens; an answer that reaches it counts as truncated.
    """
    problems = [(messages[:-1], final_answer(messages[-1]["content"])) for messages in conversations]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p, _ in problems]
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))  # little padding
    num_correct = num_truncated = num_in_form = 0
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=description, delay=2, leave=False):
            rows = order[start : start + batch_size]
            inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            inputs = inputs.to(model.device)
            generated = _generate(model, tokenizer, inputs, max_new_tokens)[:, inputs["input_ids"].shape[1] :]
            for i, tokens in zip(rows, generated, strict=True):
                answer = str(tokenizer.decode(tokens, skip_special_tokens=True))
                num_correct += last_number(answer) == problems[i][1]
                num_in_form += final_answer(answer) is not None
                num_truncated += len(tokens) == max_new_tokens and tokenizer.eos_token_id not in tokens.tolist()
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return GreedyAnswers(len(problems), num_correct, num_truncated, num_in_form)


def _generate(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> torch.Tensor:
    with torch.no_grad(), exact_small_products() if model.device.type == "cpu" else contextlib.nullcontext():
        return model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
