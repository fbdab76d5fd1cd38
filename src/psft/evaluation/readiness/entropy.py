"""How undecided a model was at the tokens of its own answers: kept beside the samples, so that nothing is scored twice.

    OUTPUT/entropies.jsonl    {"key", "sample", "tokens", "entropy"}: an answer's tokens and summed entropy, nats

The text of an answer is cut into tokens again; a tokenizer may join what was drawn apart, which touches few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from psft.errors import RunFailed
from psft.evaluation.generate import Plan
from psft.evaluation.samples import KeyedFile, digest

ENTROPIES = "entropies.jsonl"
_VERSION = 1
"""Of how they are computed; rises when old ones must be made again."""
_KEEP_EVERY = 16  # answers

Entropies = dict[str, tuple[float, int]]
"""Key of a sample -> summed entropy in nats, tokens; answers without a token are left out."""


def entropies_of(
    plans: Sequence[Plan], samples: KeyedFile, folder: Path, load: Callable[[], tuple[Any, Any]], numerics: str
) -> Entropies:
    """Entropies of every sample of the plans that is there.

    Args:
        folder: where they are kept. load: gives model and tokenizer; called only if something is missing.
        numerics: what beside the weights decides the numbers, as `hf/float32`.
    Raises:
        RunFailed: memory ran out.
    """
    found: Entropies = {}
    with KeyedFile(folder / ENTROPIES) as kept:
        names = {
            request.key: digest([request.key, numerics, _VERSION])[:32]
            for plan in plans
            for request in plan.requests
            if request.key in samples
        }
        missing = [
            (request, samples.read(request.key))
            for plan in plans
            for request in plan.requests
            if request.key in names and names[request.key] not in kept
        ]
        if missing:
            rows = []
            for key, tokens, entropy in _scored(missing, *load()):
                rows.append({"key": names[key], "sample": key, "tokens": tokens, "entropy": entropy})
                if len(rows) >= _KEEP_EVERY:
                    kept.append(rows)
                    rows = []
            kept.append(rows)
        for key, name in names.items():
            row = kept.read(name)
            if row["tokens"]:
                found[key] = (row["entropy"], row["tokens"])
    return found


def _scored(missing: Sequence[tuple[Any, Any]], model: Any, tokenizer: Any) -> Iterator[tuple[str, int, float]]:
    """Key, tokens and summed entropy of each sample."""
    import torch

    from psft.data.templates import render_chat
    from psft.models.answer_scores import score_answers

    rows: list[tuple[list[int], list[int]]] = []
    keys: list[str] = []
    for request, sample in missing:
        text = render_chat(tokenizer, request.messages, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(sample["response"], add_special_tokens=False)["input_ids"]
        if sample["finish_reason"] != "length":
            answer = [*answer, tokenizer.eos_token_id]
        if not answer:
            yield request.key, 0, 0.0
            continue
        keys.append(request.key)
        rows.append((prompt, answer))
    try:
        for number, score in score_answers(model, rows):
            yield keys[number], score.tokens, score.entropy
    except torch.OutOfMemoryError as error:
        raise RunFailed("memory ran out while answers were scored for their entropy. Set --device cpu.") from error
