"""Rows and models that arms are timed on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from psft.models.architectures import KNOWN, Architecture
from psft.ops import IGNORE_INDEX

Row = dict[str, list[int]]
"""input_ids and labels, of equal length, not shifted; IGNORE_INDEX = not trained."""

_ROOT = Path(__file__).resolve().parents[1]
GSM8K = _ROOT.parent / "shared" / "data" / "train" / "gsm8k_train.jsonl"
"""GSM8K's training set (MIT, openai/grade-school-math) beside the repository; not part of it."""
GENERATED = "reasoning-gym:gsm_symbolic?size=1024&seed=0"
_ROWS_READ = 1024


@dataclass(frozen=True)
class Tokens:
    """real: of the rows. trained: with a label to predict. padded: rows x longest, what a padded batch computes."""

    real: int
    trained: int
    padded: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Tokens:
        lengths = [len(row["input_ids"]) for row in rows]
        trained = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
        return cls(sum(lengths), trained, len(rows) * max(lengths))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def demonstrations(tokenizer: Any, *, seed: int = 0) -> tuple[list[Row], str]:
    """1024 rows in an order drawn from `seed`, and what they are: GSM8K where it lies, else generated ones."""
    from psft.data import prepare_dataset

    is_there = GSM8K.is_file()
    source = str(GSM8K) if is_there else GENERATED
    prepared = prepare_dataset(source, tokenizer=tokenizer, max_length=1024, max_rows=_ROWS_READ)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepared.dataset]
    random.Random(seed).shuffle(rows)
    return rows, f"GSM8K train, first {_ROWS_READ} rows" if is_there else GENERATED


def synthetic_rows(
    number: int, *, vocab_size: int, median: int, spread: float = 0.329, trained: float = 0.58, seed: int = 0
) -> list[Row]:
    """Rows of random ids. Lengths are log-normal about `median` tokens, cut to [median / 3, 3 median].

    The default spread and trained share are those of GSM8K in a chat template: 95th percentile / median = 347 / 202
    tokens, hence ln(347 / 202) / 1.645 = 0.329; 58 % of the tokens are trained. spread = 0: all of one length.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        length = round(min(max(median * draw.lognormvariate(0.0, spread), median / 3), 3 * median))
        ids = [draw.randrange(4, vocab_size) for _ in range(length)]
        prompt = round(length * (1 - trained))
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return rows


def load_bundled() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer; fetched on first use."""
    from psft.models import load_model, load_tokenizer

    name = "smollm2-135m-instruct"
    return load_model(name), load_tokenizer(name)


def excerpt(row: Row, tokens: int) -> Row:
    """`tokens` of a row about the place where its trained part begins, half of them trained: enough to compare arms."""
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    start = max(0, first - tokens // 2)
    return {name: values[start : start + tokens] for name, values in row.items()}


def plain_tokenizer() -> Any:
    """A tokenizer that only names the end and pad tokens: for rows that come as ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, "<unk>": 2, "<start>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=1 << 20
    )


def tiny_architecture(vocab_size: int = 512, hidden_size: int = 64, num_layers: int = 2) -> Architecture:
    """A Llama of a few thousand to a few million parameters, for sweeps and tests. Heads are 32 wide."""
    heads = hidden_size // 32
    return Architecture(
        num_layers, hidden_size, 2 * hidden_size, heads, heads, 32, vocab_size, is_tied=True, context=8192
    )


def random_model(shape: str | Architecture, *, device: str = "cpu", seed: int = 0, attention: str | None = None) -> Any:
    """A model with random float32 weights of a known shape; nothing is downloaded.

    Args:
        shape: a key of `psft.models.architectures.KNOWN` (sizes from the config.json of the hub model of that name), or
            the sizes themselves. What does not change the work (rotary base and scaling) is left at its default.
        attention: `attn_implementation` of transformers; None = its choice.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = KNOWN[shape] if isinstance(shape, str) else shape
    assert not sizes.has_qk_norm, "Qwen3 shapes are not built here"
    common: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": sizes.is_tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if attention is not None:
        common["attn_implementation"] = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if sizes.has_qkv_bias:
            model: Any = Qwen2ForCausalLM(Qwen2Config(**common))
        else:
            model = LlamaForCausalLM(LlamaConfig(**common, head_dim=sizes.head_size))
    assert sum(p.numel() for p in model.parameters()) == sizes.num_parameters, "the shape is not the one named"
    return model.to(torch.float32).to(device)
