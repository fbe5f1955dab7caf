"""Files: written whole or not at all; tensors by name; a plan's text, checked before any tensor is made."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = "diffusion-solvers plan 2"
MAX_ROWS, MAX_COLUMNS, MAX_BYTES = 10**5, 1024, 2**28


def write_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file, which is then whole or not there at all."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        fill(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, which is whole or not there at all."""
    save_file = _safetensors().torch.save_file
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda unfinished: save_file(held, unfinished))


def load_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read a safetensors file that holds exactly these names.

    Raises:
        ValueError: not such a file.
    """
    safetensors = _safetensors()
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if set(tensors) != set(names):
        raise ValueError(f"{path} has {sorted(tensors)}: expected {sorted(names)}, as save writes them")
    return tensors


def text_of(values: Mapping[str, Any]) -> str:
    """The fields of a plan as JSON text."""
    return json.dumps({"format": FORMAT, **values}, allow_nan=False, separators=(",", ":")) + "\n"


def values_of(
    text: str, scalars: Sequence[str], vectors: Mapping[str, int], tables: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list]]:
    """What `text_of` wrote: the scalars, which are left to be checked, and the lists of finite numbers.

    Args:
        text: the JSON text.
        scalars: names of fields that are single values.
        vectors: names of fields that have a number for each row, and how many more they have; the last has none.
        tables: names of fields that have a list of numbers for each row.
    """
    if not isinstance(text, str):
        raise TypeError(f"plan text is {type(text).__name__}: expected str, as to_json gives it")
    if len(text) > MAX_BYTES:
        raise ValueError(f"plan text has {len(text)} characters: expected at most {MAX_BYTES}")
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_int=float, parse_constant=_refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a plan: {str(error)[:200]}") from error
    expected = {"format", *scalars, *vectors, *tables}
    if not isinstance(body, dict) or set(body) != expected:
        odd = sorted(set(body) ^ expected)[:5] if isinstance(body, dict) else type(body).__name__
        raise ValueError(
            f"not a plan: fields unknown or missing: {odd!s:.200}; expected exactly {sorted(expected)}"
        )
    if body["format"] != FORMAT:
        raise ValueError(f"format = {body['format']!r:.100}: expected {FORMAT!r}")
    last = list(vectors)[-1]
    per_row = body[last]
    rows = len(per_row) if isinstance(per_row, list) else 0
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{last} has {rows} entries: expected a list of 1 to {MAX_ROWS} numbers")
    for name, more in vectors.items():
        _numbers(name, body[name], rows + more)
    for name in tables:
        _table(name, body[name], rows)
    return {name: body[name] for name in scalars}, {name: body[name] for name in (*vectors, *tables)}


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("not a plan: a field is repeated")
    return body


def _refuse(constant: str) -> float:
    raise ValueError(f"not a plan: {constant} is not a finite number")


def _numbers(name: str, values: object, length: int) -> None:
    if not isinstance(values, list) or len(values) != length:
        size = len(values) if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{name} has {size} entries: expected a list of {length} numbers")
    for i, value in enumerate(values):
        if not isinstance(value, float) or not math.isfinite(value):
            raise ValueError(f"{name}[{i}] = {value!r:.100}: expected a finite number")


def _table(name: str, values: object, rows: int) -> None:
    if not isinstance(values, list) or len(values) != rows or not isinstance(values[0], list):
        raise ValueError(f"{name}: expected a list of {rows} lists of numbers")
    columns = len(values[0])
    if columns > MAX_COLUMNS:
        raise ValueError(f"{name} has {columns} columns: expected at most {MAX_COLUMNS}")
    for i, row in enumerate(values):
        _numbers(f"{name}[{i}]", row, columns)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this is saved as safetensors: pip install 'diffusion-solvers[files]'") from error
    return safetensors
