"""Proximal SFT where `trl.SFTTrainer` was: the import and the two class names are all that changed.

    python examples/drop_in.py gsm8k_train.jsonl                 # plain TRL needs only the next two lines exchanged:
    #   from trl import SFTConfig, SFTTrainer                    # instead of: from psft import PSFTConfig, PSFTTrainer
    #   SFTConfig / SFTTrainer                                   # instead of: PSFTConfig / PSFTTrainer

The file holds GSM8K rows: {"question": ..., "answer": ...}. The model is the quick start's; any hub id works.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from psft import PSFTConfig, PSFTTrainer
from psft.models import resolve_model


def to_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


dataset = load_dataset("json", data_files=sys.argv[1], split="train[:320]")
dataset = dataset.map(to_messages, remove_columns=dataset.column_names).train_test_split(test_size=32, seed=0)

trainer = PSFTTrainer(
    model=str(resolve_model("smollm2-135m-instruct")),
    args=PSFTConfig(
        output_dir="runs/drop_in",
        per_device_train_batch_size=4,
        learning_rate=3e-5 if "--lora" not in sys.argv else 3e-4,
        max_steps=16,
        eval_strategy="steps",
        eval_steps=16,
        eval_on_start=True,
        logging_steps=4,
        report_to="none",
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=LoraConfig(target_modules="all-linear") if "--lora" in sys.argv else None,
)
trainer.train()
trainer.save_model()
