"""Quick imports of heavy packages."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No search for garbage inside: importing torch and transformers makes a million objects, hardly any of them
    garbage, and looking for it again and again takes a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_models() -> Iterator[None]:
    """`transformers.TrainingArguments` can be imported and made inside without transformers' models, PEFT, torch's
    compiler and sympy: half of its time, and nothing that settings are about.

    They come in at two places of transformers 5.23, and what these compute stays what it was. `trainer_utils` takes two
    classes of PEFT, to ask whether a model is one; here it gets stand-ins that ask PEFT itself, which is imported then.
    `TrainingArguments` imports all tracker integrations to ask whether an environment variable is there; here it is
    asked for first. Where either is imported already, or is not what it was, the usual way is taken.
    """
    _import_trainer_utils()
    with _kubeflow_by_its_variable():
        yield


class _AsksPeft(type):
    """Class of a stand-in for PEFT's class of the same name: `isinstance` gives what it gives with that one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        import peft

        return isinstance(instance, getattr(peft, cls.__name__))

    def __subclasscheck__(cls, subclass: type) -> bool:
        import peft

        return issubclass(subclass, getattr(peft, cls.__name__))


def _import_trainer_utils() -> None:
    """Import `transformers.trainer_utils` with stand-ins for PEFT's classes; nothing else can see them."""
    importlib.import_module("transformers.utils")  # and torch: what they import is not to meet the stand-ins
    spec = importlib.util.find_spec("peft") if "peft" not in sys.modules else None
    if spec is not None and "transformers.trainer_utils" not in sys.modules:
        stand_in: Any = types.ModuleType("peft")  # any other name of it is an ImportError
        stand_in.__spec__, stand_in.__file__ = spec, spec.origin
        stand_in.PeftModel = _AsksPeft("PeftModel", (), {})
        stand_in.PeftMixedModel = _AsksPeft("PeftMixedModel", (), {})
        sys.modules["peft"] = stand_in
        try:
            importlib.import_module("transformers.trainer_utils")
        finally:
            del sys.modules["peft"]


@contextlib.contextmanager
def _kubeflow_by_its_variable() -> Iterator[None]:
    integrations = importlib.import_module("transformers.integrations")
    is_imported = "transformers.integrations.integration_utils" in sys.modules
    if is_imported or "KUBEFLOW_TRAINER_SERVER_URL" in os.environ:
        yield
        return
    vars(integrations)["is_kubeflow_available"] = lambda: False
    try:
        yield
    finally:
        del vars(integrations)["is_kubeflow_available"]
