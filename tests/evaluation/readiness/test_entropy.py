"""Entropies of answers that are kept: which tokens count, and that nothing is scored twice."""

from __future__ import annotations

import pytest

from psft.evaluation.benchmarks import Benchmark
from psft.evaluation.generate import make_plan
from psft.evaluation.items import Data, Item
from psft.evaluation.readiness.entropy import entropies_of
from psft.evaluation.samples import KeyedFile

TEXT = "The answer is 72."


def test_the_end_token_of_an_answer_counts_and_what_was_cut_has_none(tmp_path, tiny_model, tiny_tokenizer):
    """Goes red if the decision to end is left out, or added to what was cut, or no token counts as 0 nats."""
    item = Item("q", "How many?", ({"role": "user", "content": "How many?"},), {"gold": "72"})
    plan = make_plan(Data(Benchmark("b", "math", "f", k=4), (item,), "f", "0", 1), model="m", numerics="hf", seed=0)
    ends = [(TEXT, "stop"), (TEXT, "length"), ("", "stop"), ("", "length")]
    with KeyedFile(tmp_path / "samples.jsonl") as samples:
        keys = [request.key for request in plan.requests]
        samples.append(
            {"key": key, "response": text, "finish_reason": end} for key, (text, end) in zip(keys, ends, strict=True)
        )
        found = entropies_of([plan], samples, tmp_path, lambda: (tiny_model, tiny_tokenizer), "hf/float32")
        length = len(tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        assert [found[key][1] for key in keys[:3]] == [length + 1, length, 1] and keys[3] not in found
        assert found[keys[0]][0] > found[keys[1]][0] > found[keys[2]][0] > 0
        again = entropies_of([plan], samples, tmp_path, lambda: pytest.fail("a model was loaded"), "hf/float32")
        assert again == found
        with pytest.raises(ZeroDivisionError):  # other arithmetic is another number
            entropies_of([plan], samples, tmp_path, lambda: 1 // 0, "hf/bfloat16")  # type: ignore[arg-type,return-value]
