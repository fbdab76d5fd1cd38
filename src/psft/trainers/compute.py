"""Threads and float32 precision of the process that trains, set for this machine where the settings ask for it.

Both belong to the whole process, and a library must not change them unasked. So in Python nothing is touched unless
`num_threads` or `matmul_precision` is given; the command line, whose process is psft's own, gives "auto" for both.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from psft.machine import local_rank, local_ranks, physical_cores
from psft.ops.precision import MATMUL_PRECISIONS, matmul_precision, set_matmul_precision

if TYPE_CHECKING:
    from psft.trainers.dpo_config import DPOStageConfig
    from psft.trainers.grpo_config import GRPOStageConfig
    from psft.trainers.psft_config import PSFTConfig

logger = logging.getLogger(__name__)


def compute_problems(args: PSFTConfig | DPOStageConfig | GRPOStageConfig) -> list[str]:
    """What is wrong with the two settings; a number of threads given as text becomes a number."""
    problems = []
    if args.num_threads not in (None, "auto"):
        try:
            args.num_threads = int(args.num_threads)
        except ValueError:
            args.num_threads = 0
        if args.num_threads < 1:
            problems.append("num_threads must be a number of threads or auto")
    if args.matmul_precision is None:
        return problems
    if args.matmul_precision not in MATMUL_PRECISIONS:
        problems.append(f"matmul_precision={args.matmul_precision} must be one of {', '.join(MATMUL_PRECISIONS)}")
    elif args.matmul_precision != "auto" and args.tf32 is not None:
        problems.append("matmul_precision and tf32 both say how float32 products are rounded. Give one of them")
    return problems


def use_machine(args: PSFTConfig | DPOStageConfig | GRPOStageConfig) -> None:
    """Set what `num_threads` and `matmul_precision` ask for, for the rest of this process; None leaves it as it is.

    num_threads auto: one thread a physical core that this process may use, shared by the job's ranks on this machine.
    Fewer than torch would take where a container's quota allows less. OMP_NUM_THREADS, where it is set, wins.
    """
    before = torch.get_num_threads(), matmul_precision()
    if args.num_threads == "auto":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(physical_cores() // local_ranks(), 1))
    elif args.num_threads is not None:
        torch.set_num_threads(int(args.num_threads))
    if args.matmul_precision is not None:
        set_matmul_precision(args.matmul_precision)
    now = torch.get_num_threads(), matmul_precision()
    if now != before and local_rank() == 0:
        logger.info("float32 products of this process: %d threads, precision %s (before: %d, %s).", *now, *before)
