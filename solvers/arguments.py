"""Arguments: numbers, counts and choices, refused at once by name and value."""

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def number(name: str, value: float) -> float:
    """A real number, and not text that reads like one."""
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} = {value!r:.100}: expected a real number")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a tensor or array that is not one number
        raise TypeError(f"{name} = {value!r:.100}: expected a real number") from error


def flag(name: str, value: bool) -> bool:
    """True or False, and not what merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} = {value!r:.100}: expected True or False")
    return value


def numbers(name: str, values: "Tensor | ArrayLike") -> Tensor:
    """Real numbers as a float64 tensor of their own on the host. Python's are never rounded to float32 on the way.

    Raises:
        TypeError: they are not real numbers, or in half precision and so rounded already.
    """
    if not isinstance(values, Tensor):
        try:
            array = np.array(values, order="C")
        except ValueError:  # ragged
            array = np.array(None)
        if array.dtype.kind not in "biufc":
            raise TypeError(
                f"{name} = {values!r:.100}: expected a tensor, an array or a list of real numbers"
            )
        values = torch.from_numpy(array)
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} has dtype {values.dtype}: expected real numbers, in float64")
    if values.is_floating_point() and values.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {values.dtype}: expected float64 or float32; {name} must not be rounded to half precision"
        )
    return values.to("cpu", torch.float64, copy=True)


def within(values: Tensor, least: float, most: float) -> bool:
    """Whether all of some values lie between two numbers, which NaN does not."""
    if not values.numel():
        return True
    low, high = (end.item() for end in values.aminmax())
    return least <= low <= high <= most


def positive(**values: float) -> None:
    """Finite numbers above 0."""
    for name, value in values.items():
        if not (math.isfinite(number(name, value)) and value > 0):
            raise ValueError(f"{name} = {value}: expected a finite number above 0")


def increasing(**values: float) -> None:
    """Two finite numbers, the first below the second."""
    (low_name, low), (high_name, high) = values.items()
    if not -math.inf < number(low_name, low) < number(high_name, high) < math.inf:
        raise ValueError(f"{low_name} = {low} must lie below {high_name} = {high}, both finite")


def whole(name: str, value: int, least: int, most: int, example: int | None = None) -> int:
    """A whole number from least to most; the example, if any, shows the line to write."""
    expected = f"expected a whole number from {least} to {most}"
    expected += "" if example is None else f", e.g. {name}={example}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} = {value!r:.100}: {expected}")
    if not least <= value <= most:
        raise ValueError(f"{name} = {value!s:.100}: {expected}")
    return int(value)


def choice(name: str, value: str, allowed: tuple[str, ...], aliases: Mapping[str, str] | None = None) -> str:
    """One of the allowed words; aliases are not accepted, but answered with the word to write."""
    if value not in allowed:
        meant = (aliases or {}).get(value) if isinstance(value, str) else None
        if meant is None and isinstance(value, str):
            meant = next(iter(difflib.get_close_matches(value, allowed, 1)), None)
        hint = "" if meant is None else f"; did you mean {meant!r}?"
        raise ValueError(f"{name} = {value!r:.100}: expected one of {', '.join(map(repr, allowed))}{hint}")
    return value
