"""The table that a sampler is: its fields, checks, printing, fold, slice, +, save and load."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from solvers.arguments import choice
from solvers.predictions import mixture

FORMS = ("noise", "data", "velocity")
CONSISTENCY = 1e-10  # of the largest term; a table computed in float64 keeps about 1e-15
FORMAT = "diffusion-solvers plan 1"
MAX_ROWS, MAX_COLUMNS, MAX_BYTES = 10**5, 64, 2**28


def _no_draws() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as data. Row i is one network call and one linear combination:

        m_i = model(x, times[i]);   x <- a_i x + sum_j b_ij m_{i-j} + sum_k c_ik z_{i-k}

    Every array is float64 on the host. Made by a method, `(schedule, times, **options) -> Plan`, and executed by `run`.

    Attributes:
        times: [N+1]; call i happens at times[i], x ends at times[N].
        alpha: [N+1]; weight of the data at each time.
        sigma: [N+1]; weight of the noise at each time.
        a: [N]; weight of x.
        b: [N, K]; column j weighs the output of call i - j, in the form that `predicts` names.
        c: [N, L]; column k weighs the standard normal draw i - k; L = 0 (the default) for an ODE method.
        predicts: "noise" | "data" | "velocity".

    Raises:
        TypeError: a field is not a float64 tensor on the host.
        ValueError: shapes do not fit, a value is not finite, times turn back, a row reads a call before the first, or a
            row is not consistent: on data concentrated in one point it would not carry alpha, sigma from level to level.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor = field(default_factory=_no_draws)
    predicts: str = "data"

    def __post_init__(self) -> None:
        self._check_types()
        if self.c.numel() == 0:
            object.__setattr__(self, "c", self.a.new_zeros(len(self.a), 0))
        self._check_shapes()
        self._check_values()
        self._check_reach("b", self.b)
        self._check_reach("c", self.c)
        self._check_consistency()

    @property
    def nfe(self) -> int:
        """The number of model calls."""
        return len(self.a)

    @property
    def window(self) -> int:
        """How many outputs a row may read: the newest and window - 1 before it."""
        return self.b.shape[1]

    @property
    def is_stochastic(self) -> bool:
        """Whether a run draws noise."""
        return bool((self.c != 0).any())

    @property
    def half_logsnr(self) -> Tensor:
        """log(alpha / sigma) at each time, [N+1]."""
        return torch.log(self.alpha) - torch.log(self.sigma)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.predicts == other.predicts and all(
            torch.equal(mine, theirs) for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.predicts, *((array.detach() + 0.0).numpy().tobytes() for array in self._arrays())))

    def allclose(self, other: "Plan", rtol: float = 1e-12, atol: float = 1e-12) -> bool:
        """Whether both have the same form and shapes, and arrays equal within the tolerances."""
        return self.predicts == other.predicts and all(
            mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=rtol, atol=atol)
            for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)
        )

    def __getitem__(self, rows: slice) -> "Plan":
        """The rows of a slice with step 1, as a plan of their own; its draws of noise are numbered from 0 again.

        Raises:
            TypeError: not a slice with step 1.
            ValueError: the slice is empty, or one of its rows reads a call before it.
        """
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"plan[{rows!r}]: expected a slice with step 1, e.g. plan[3:]")
        first, last, _ = rows.indices(self.nfe)
        if last <= first:
            raise ValueError(f"plan[{first}:{last}] has no rows: expected 0 <= first < last <= {self.nfe}")
        for name, array in (("call", self.b), ("draw", self.c)):
            row, column = _positions(last - first, array.shape[1])
            early = (array[first:last] != 0) & (column > row)
            if early.any():
                i, j = (int(v) for v in early.nonzero()[0])
                raise ValueError(
                    f"row {i + first} reads {name} {i + first - j}, which happens before plan[{first}:]; build the "
                    f"method on the shorter grid instead, times[{first}:], or resume a run from its State"
                )
        span = slice(first, last + 1)
        b, c = (array[first:last, : last - first] for array in (self.b, self.c))
        return Plan(
            self.times[span], self.alpha[span], self.sigma[span], self.a[first:last], b, c, self.predicts
        )

    def __add__(self, other: "Plan") -> "Plan":
        """This plan and then the other, which starts where this one ends.

        Raises:
            ValueError: the ends do not meet, or the forms differ.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = (
            [float(v[i]) for v in (p.times, p.alpha, p.sigma)] for p, i in ((self, -1), (other, 0))
        )
        if mine != theirs:
            raise ValueError(
                f"plans do not meet: one ends at (t, alpha, sigma) = {mine}, the next starts at {theirs}"
            )
        if self.predicts != other.predicts:
            raise ValueError(
                f"plans of different forms cannot be joined: {self.predicts!r} and {other.predicts!r}"
            )

        times, alpha, sigma = (
            torch.cat([getattr(self, n), getattr(other, n)[1:]]) for n in ("times", "alpha", "sigma")
        )
        a = torch.cat([self.a, other.a])
        return Plan(times, alpha, sigma, a, stacked(self.b, other.b), stacked(self.c, other.c), self.predicts)

    def __str__(self) -> str:
        kind = "stochastic" if self.is_stochastic else "deterministic"
        title = f"{self.nfe} calls, {self.predicts} form, window {self.window}, {kind}"
        symbol = {"noise": "eps", "data": "x0", "velocity": "v"}[self.predicts]
        heads = ["call", "t", "half_logsnr", "x"]
        heads += [symbol if j == 0 else f"{symbol}[-{j}]" for j in range(self.window)]
        heads += ["z" if k == 0 else f"z[-{k}]" for k in range(self.c.shape[1])]
        lam = self.half_logsnr
        lines = [
            [str(i)] + [f"{v:.6g}" for v in (self.times[i], lam[i], self.a[i], *self.b[i], *self.c[i])]
            for i in range(self.nfe)
        ]
        lines.append(["end", f"{self.times[-1]:.6g}", f"{lam[-1]:.6g}"] + [""] * (len(heads) - 3))
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        rows = [
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in (heads, *lines)
        ]
        return "\n".join([title, *rows])

    def to_json(self) -> str:
        """The plan as JSON text: shortest decimals that read back to the same float64, so the round trip is exact.

        Raises:
            ValueError: more rows or columns than `from_json` would read.
        """
        if self.nfe > MAX_ROWS or max(self.b.shape[1], self.c.shape[1]) > MAX_COLUMNS:
            raise ValueError(
                f"a plan of {self.nfe} rows, {self.window} columns: at most {MAX_ROWS} and {MAX_COLUMNS} are saved"
            )
        arrays = {name: array.tolist() for name, array in zip(_ARRAYS, self._arrays(), strict=True)}
        body = {"format": FORMAT, "predicts": self.predicts, **arrays}
        return json.dumps(body, allow_nan=False, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote. Sizes are checked before any tensor is made.

        Raises:
            ValueError: not such a text: unknown, missing or repeated fields, numbers that are not finite, wrong sizes.
        """
        if not isinstance(text, str):
            raise TypeError(f"plan text is {type(text).__name__}: expected str, as to_json gives it")
        if len(text) > MAX_BYTES:
            raise ValueError(f"plan text has {len(text)} characters: expected at most {MAX_BYTES}")
        try:
            body = json.loads(text, object_pairs_hook=_unique, parse_int=float, parse_constant=_refuse)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a plan: {str(error)[:200]}") from error
        expected = {"format", "predicts", *_ARRAYS}
        if not isinstance(body, dict) or set(body) != expected:
            odd = sorted(set(body) ^ expected)[:5] if isinstance(body, dict) else type(body).__name__
            raise ValueError(
                f"not a plan: fields unknown or missing: {odd!s:.200}; expected exactly {sorted(expected)}"
            )
        if body["format"] != FORMAT:
            raise ValueError(f"format = {body['format']!r:.100}: expected {FORMAT!r}")
        choice("predicts", body["predicts"], FORMS)
        rows = len(body["a"]) if isinstance(body["a"], list) else 0
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"a has {rows} entries: expected a list of 1 to {MAX_ROWS} numbers")
        for name in ("times", "alpha", "sigma", "a"):
            _numbers(name, body[name], rows if name == "a" else rows + 1)
        for name in ("b", "c"):
            _table(name, body[name], rows)
        arrays = {name: torch.tensor(body[name], dtype=torch.float64, device="cpu") for name in _ARRAYS}
        return Plan(**arrays, predicts=body["predicts"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, which is whole or not there at all."""
        text, path = self.to_json(), Path(path)
        unfinished = path.with_name(f".unfinished-{path.name}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is not a plan; see `from_json`.
        """
        path = Path(path)
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes: expected at most {MAX_BYTES}")
        try:
            return Plan.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a plan: {error}") from error

    def _arrays(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _ARRAYS)

    def _check_types(self) -> None:
        choice("predicts", self.predicts, FORMS)
        for name, array in zip(_ARRAYS, self._arrays(), strict=True):
            if not isinstance(array, Tensor) or array.dtype != torch.float64 or array.device.type != "cpu":
                kind = (
                    f"{array.dtype} on {array.device}" if isinstance(array, Tensor) else type(array).__name__
                )
                raise TypeError(f"{name} is {kind}: expected a float64 tensor on the CPU")
        if self.a.ndim != 1 or len(self.a) < 1:
            raise ValueError(f"a has shape {list(self.a.shape)}: expected [N] with at least one row")

    def _check_shapes(self) -> None:
        rows = len(self.a)
        for name in ("times", "alpha", "sigma"):
            if list(getattr(self, name).shape) != [rows + 1]:
                shape = list(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {shape}: expected {[rows + 1]}, as a has {rows} rows")
        for name, least in (("b", 1), ("c", 0)):
            array = getattr(self, name)
            if array.ndim != 2 or len(array) != rows or array.shape[1] < least:
                raise ValueError(
                    f"{name} has shape {list(array.shape)}: expected [{rows}, columns], as a has {rows} rows"
                )

    def _check_values(self) -> None:
        for name, array in zip(_ARRAYS, self._arrays(), strict=True):
            bad = ~array.isfinite() | (array < 0 if name in ("alpha", "sigma") else False)
            if bad.any():
                where = [int(i) for i in bad.nonzero()[0]]
                value = array[tuple(where)].item()
                raise ValueError(
                    f"{name}{where} = {value:g}: every entry must be finite, of alpha and sigma not negative"
                )
        steps = self.times.diff()
        if not ((steps <= 0).all() or (steps >= 0).all()):
            i = int((steps > 0).nonzero()[0])
            raise ValueError(
                f"times must not turn back: times[{i}] = {self.times[i]:g} is followed by {self.times[i + 1]:g}"
            )

    def _check_reach(self, name: str, array: Tensor) -> None:
        row, column = _positions(*array.shape)
        early = (array != 0) & (column > row)
        if early.any():
            i, j = (int(v) for v in early.nonzero()[0])
            raise ValueError(f"{name}[{i}, {j}] reads {j} rows back, before the first row")

    def _check_consistency(self) -> None:
        """Where x_0 and eps are constant: a_i alpha_i + sum_j b_ij p_{i-j} = alpha_{i+1}; for an ODE likewise sigma and q."""
        p, q = mixture(self.predicts, self.alpha, self.sigma)
        row, column = _positions(self.nfe, self.window)
        call = (row - column).clamp(min=0)
        parts = (
            [("alpha", self.alpha, p)]
            if self.is_stochastic
            else [("alpha", self.alpha, p), ("sigma", self.sigma, q)]
        )
        for name, level, weight in parts:
            terms = torch.cat([(self.a * level[:-1])[:, None], self.b * weight[call]], 1)
            size = torch.maximum(terms.abs().amax(1), level[1:])
            gap = (terms.sum(1) - level[1:]).abs()
            if (gap > CONSISTENCY * size).any():
                i = int((gap > CONSISTENCY * size).nonzero()[0])
                raise ValueError(
                    f"row {i} is not consistent: it carries {name} to {terms[i].sum():.12g}, expected {name}[{i + 1}] = "
                    f"{level[i + 1]:.12g}"
                )


_ARRAYS = tuple(f.name for f in fields(Plan) if f.name != "predicts")


def fold(x_weights: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Textbook stages to rows: row k moves x from stage k to stage k + 1.

    A textbook writes every stage of a step from the x at the step's start; one register has only the last stage. With
    u_k = A_k x + sum_j B_kj m_j, eliminating x gives u_{k+1} = (A_{k+1} / A_k) u_k + sum_j (B_{k+1,j} - A_{k+1} / A_k B_kj) m_j.

    Args:
        x_weights: A, [M, S]; in step m, the weight of the step's x in stage k + 1 (the last is the step's end).
        weights: B, [M, S, S]; the weight of the step's output j, which stage k + 1 may read if j <= k.

    Returns:
        (a [M S], b [M S, S]): the rows of a Plan.
    """
    steps, stages = x_weights.shape
    before = torch.cat([torch.ones_like(x_weights[:, :1]), x_weights[:, :-1]], 1)
    ratio = x_weights / before
    rest = weights - ratio[:, :, None] * torch.cat([torch.zeros_like(weights[:, :1]), weights[:, :-1]], 1)
    k, j = _positions(stages, stages)
    b = torch.where(j <= k, rest[:, k, (k - j).clamp(min=0)], 0.0)
    return ratio.reshape(steps * stages), b.reshape(steps * stages, stages)


def stacked(top: Tensor, bottom: Tensor) -> Tensor:
    """The columns of two runs of rows, [N1, K1] over [N2, K2], padded with zeros to [N1 + N2, max(K1, K2)]."""
    width = max(top.shape[1], bottom.shape[1])
    return torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in (top, bottom)])


def _positions(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a table, each broadcasting to [rows, columns]."""
    return torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")


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
