"""Argument checks shared by the objectives: each names the arguments it found wanting."""

from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raise `ValueError` naming every shape unless all tensors have the same one. Broadcasting hides shifted labels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("these tensors must have one shape: " + ", ".join(f"{k} {v}" for k, v in shapes.items()))


def check_positive(**numbers: float) -> None:
    """Raise `ValueError` naming every number that is not greater than zero (NaN included)."""
    wrong = {name: value for name, value in numbers.items() if not value > 0}
    if wrong:
        raise ValueError("must be greater than 0: " + ", ".join(f"{name}={value}" for name, value in wrong.items()))


def check_choice(choices: tuple[str, ...], **values: str) -> None:
    """Raise `ValueError` naming every value that is none of `choices`."""
    wrong = {name: value for name, value in values.items() if value not in choices}
    if wrong:
        given = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"{given}: it is one of {', '.join(choices)}")
