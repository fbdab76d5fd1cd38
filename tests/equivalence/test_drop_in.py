"""The drop-in promise: a `trl.SFTTrainer` script needs another import and other class names, nothing else."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import trl

import psft

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "drop_in.py"


def keywords_of(name: str) -> set[str]:
    calls = [node for node in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == name]
    return {keyword.arg for keyword in call.keywords}


def test_the_example_uses_nothing_that_trl_does_not_have():
    """Goes red if the example comes to need a psft-only setting, so that TRL's script would differ from it."""
    assert keywords_of("PSFTConfig") <= {field.name for field in fields(trl.SFTConfig)}
    assert keywords_of("PSFTTrainer") <= set(inspect.signature(trl.SFTTrainer.__init__).parameters)


def test_the_constructor_takes_what_trl_takes_in_the_same_order():
    """Goes red if an argument of TRL's constructor is swallowed or moved."""
    theirs = list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    ours = inspect.signature(psft.PSFTTrainer.__init__).parameters
    named = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert named == theirs[: len(named)]
    assert {field.name for field in fields(trl.SFTConfig)} <= {field.name for field in fields(psft.PSFTConfig)}
