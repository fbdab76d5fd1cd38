"""Ways in which several processes share a model: one accelerate configuration file each, for `psft train --accelerate`.

Any of them also works with accelerate itself: `accelerate launch --config_file FILE --num_processes N -m psft.cli.main
train ...`. Whether bf16 computes is a setting of the run (`bf16`), so the files leave mixed precision off.
"""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "ddp": "every process holds the whole model and its optimizer state",
    "fsdp2": "weights, gradients and optimizer state are cut up between processes (PyTorch)",
    "zero2": "gradients and optimizer state are cut up (DeepSpeed)",
    "zero3": "weights, too (DeepSpeed)",
}


def config_file(kind: str) -> Path:
    """The configuration file of one of `KINDS`."""
    return Path(__file__).parent / f"{kind}.yaml"
