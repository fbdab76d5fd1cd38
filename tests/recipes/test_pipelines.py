"""The pipelines of the paper hold every value of its tables 6 to 9 and the tasks of table 11, through recipes."""

from __future__ import annotations

from typing import Any

import pytest

from psft.pipelines import Reference, read_pipeline
from psft.pipelines.keys import settings_of

TABLE_6 = {
    "psft": {
        "objective": "psft", "train_batch_size": 256, "mini_batch_size": 32, "learning_rate": 1e-6,
        "epsilon_high": 0.28,
    },
    "sft": {"objective": "sft", "train_batch_size": 256, "mini_batch_size": 256, "learning_rate": 2e-5},
}  # fmt: skip
TABLE_7 = {
    "learning_rate": 1e-6, "beta": 0.0, "max_prompt_length": 2048, "max_completion_length": 10240,
    "overlong_buffer": 2048, "train_batch_size": 256, "mini_batch_size": 32, "epsilon": 0.2, "epsilon_high": 0.28,
    "temperature": 1.0, "num_generations": 8, "max_steps": 800,
}  # fmt: skip
"""100 steps of the table are train batches, each of 8 updates."""
TABLE_8 = {
    "psft": {**TABLE_6["psft"], "num_train_epochs": 5, "max_length": 6144},
    "prolong": {**TABLE_6["psft"], "num_train_epochs": 10, "max_length": 6144},
    "sft": {**TABLE_6["sft"], "num_train_epochs": 5, "max_length": 6144},
}
TABLE_9 = {"train_batch_size": 64, "beta": 0.01, "learning_rate": 5e-7, "num_train_epochs": 1, "max_length": 4096}


def _values(name: str, stage: str, table: dict[str, Any]) -> dict[str, Any]:
    found = settings_of(read_pipeline(name).stage(stage))
    return {key: found.get(key) for key in table}


@pytest.mark.parametrize("name", ["pipeline-math-qwen2.5-7b", "pipeline-math-llama3.1-8b"])
def test_the_mathematics_pipelines_hold_tables_6_and_7_and_the_evaluation(name: str) -> None:
    """Goes red if a stage takes another recipe, overrides a value of the tables, or starts from another model."""
    pipeline = read_pipeline(name)
    for kind, table in TABLE_6.items():
        table = {**table, "max_length": 10240, "num_train_epochs": 10, "select_best": "aime24"}
        assert _values(name, kind, table) == table
        assert _values(name, f"{kind}-grpo", TABLE_7) == TABLE_7
        assert pipeline.stage(f"{kind}-grpo").model == Reference(kind, "model")
        assert pipeline.stage(f"{kind}-grpo-scores").model == Reference(f"{kind}-grpo", "model")
    models = {pipeline.base_model(stage) for stage in pipeline.stages if stage.command != "report"}
    assert models == {{"q": "Qwen/Qwen2.5-7B-Instruct", "l": "meta-llama/Llama-3.1-8B-Instruct"}[name[14]]}
    sampling = {"k", "temperature", "top_p", "max_new_tokens", "limit"}
    for stage in pipeline.stages:
        if stage.command == "eval":
            assert stage.settings["suite"] == ["math", "ood"] and not sampling & set(stage.settings)
    assert len(pipeline.stages[-1].runs) == 4


def test_the_alignment_pipeline_holds_tables_8_9_and_11() -> None:
    """Goes red as above."""
    name = "pipeline-align-qwen3-4b"
    pipeline = read_pipeline(name)
    for kind, table in TABLE_8.items():
        assert _values(name, kind, table) == table
        assert _values(name, f"{kind}-dpo", TABLE_9) == TABLE_9
        assert pipeline.stage(f"{kind}-dpo").model == Reference(kind, "model")
    scores = [stage for stage in pipeline.stages if stage.command == "eval"]
    assert len(scores) == 7 and {stage.settings["suite"] for stage in scores} == {"alignment-tax"}
    assert {pipeline.base_model(stage) for stage in pipeline.stages[:-1]} == {"Qwen/Qwen3-4B-Base"}
    assert len(pipeline.stages[-1].runs) == 6
