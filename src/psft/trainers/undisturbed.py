"""Work with a model that is being trained, such that the training cannot tell it was done."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and any use of the model inside; afterwards all of it is as it was, to the bit.

    Put back: the random states of Python, numpy, torch and the accelerator; the mode and every other plain attribute
    of each module (rotary embeddings note the longest row they saw); buffers (and stretch their frequencies for it).
    Weights and gradients are not copied: what runs inside must not write them.
    """
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [] if accelerator is None else [torch.accelerator.current_device_index()]
    attributes = [(module, _plain_attributes(module)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
        try:
            with in_eval_mode(model):
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for module, values in attributes:
                _put_back(module, values)
            for module, name, buffer, content in buffers:
                _put_back_buffer(module, name, buffer, content)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) in _PLAIN}


def _put_back(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if vars(module).get(name) is not value:
            setattr(module, name, value)


@torch.no_grad()
def _put_back_buffer(module: nn.Module, name: str, buffer: Tensor, content: Tensor) -> None:
    if not torch.equal(buffer, content):
        buffer.copy_(content)
    module._buffers[name] = buffer
