"""What can be set of lm-evaluation-harness beside what `psft eval` sets for every benchmark. No lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class HarnessSettings:
    """lm-evaluation-harness (alignment-tax, harness:TASK)"""

    num_fewshot: int | None = field(
        default=None,
        metadata={"help": "Examples in the prompt, instead of the task's own number, or of 5 where it names none."},
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Put the prompts in the model's chat template; lm-eval's default is not to."}
    )
