"""FSDP on CPUs. torch cuts a model up over gloo as over NCCL; accelerate allows it on accelerators only.

Read in accelerate 1.15.0, state.py: where the distributed type is MULTI_CPU, `AcceleratorState` drops the FSDP plugin,
and every process trains a whole copy without a word. Here the plugin is put in its place, for trying out and for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


@contextlib.contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """While an `Accelerator` is made: let one that was given an FSDP plugin have it on a CPU, too."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = original  # type: ignore[method-assign]
