"""The table that a sampler is: its fields, checks, printing, fold, slice, +, save and load."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from operator import gt, lt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.arguments import choice, number, within
from solvers.files import MAX_BYTES, MAX_COLUMNS, MAX_ROWS, text_of, values_of, write_whole
from solvers.predictions import mixture

SECONDS = ("range", "moments")
FORMS = ("noise", "data", "velocity", "mixture")
CONSISTENCY = 1e-10  # of the largest term; a table computed in float64 keeps about 1e-15


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as data. Row i is one network call and one linear combination::

        m_i = model(x, times[i]);   x <- a_i x + sum_j b_ij m_{i-j} + sum_k c_ik z_{i-k} + shift_i

    A call whose output no row reads is not made: a row that only adds noise costs none. Every array is float64 on the host. Made by a method, `(schedule, times, **options) -> Plan`, and executed by `run`.
    Coefficients may differ from element to element of x: then a, b, mix and shift have its dimensions (*D) behind their own.

    Attributes:
        times: [N+1]; call i happens at times[i], x ends at times[N].
        alpha: [N+1]; weight of the data at each time.
        sigma: [N+1]; weight of the noise at each time.
        a: [N, *D]; weight of x.
        b: [N, K, *D]; column j weighs the output of call i - j, in the form that `predicts` names.
        c: [N, L]; column k weighs the standard normal draw i - k; L = 0 (the default) for an ODE method.
        predicts: "noise" eps | "data" x_0 | "velocity" scale alpha eps - sigma x_0 / scale | "mixture", as `mix` says.
        scale: of "velocity": 1 for alpha eps - sigma x_0, the data's standard deviation for (a multiple of) EDM's F.
        mix: [N, 2, *D]; for "mixture" alone, the weights (p, q) of data and noise in the output p x_0 + q eps of each call.
        shift: [N, *D]; a constant added by each row; empty (the default) for none.
        turns: how many steps of `times` go against the way from first to last, declared so that a slip is refused: tableaux
            with a stage behind their last have one in each step, and so have rows that only add noise.
        variances: [N, 3]; (least, most, cap) of the variance of each row's own noise where the model's second output chooses
            it; empty (the default) where c says it all.
        second: what that second output is: "range", between the logarithms of least and most, or "moments", the share from the one
            to the other that Cov(eps | x) is; see `Model.variance`. Empty without variances.
        consistent: False for Euler's steps in t, whose rows carry alpha and sigma only up to the square of the step.

    Raises:
        TypeError: a field is not a float64 tensor on the host.
        ValueError: shapes do not fit, a value is not finite, times turn back, a row reads a call before the first, or a
            row is not consistent: in noise and data form, it would not carry alpha (and sigma, if it adds no noise) from level
            to level on data concentrated in one point; in velocity form, not where the velocity is 0 or in proportion to
            sqrt(scale^2 alpha^2 + sigma^2). A mixture has no such check, nor has a row with a shift.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor = field(default_factory=_none)
    predicts: str = "data"
    scale: float = 1.0
    mix: Tensor = field(default_factory=_none)
    shift: Tensor = field(default_factory=_none)
    turns: int = 0
    variances: Tensor = field(default_factory=_none)
    second: str = ""
    consistent: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", number("scale", self.scale))
        self._check_types()
        if self.c.numel() == 0:
            object.__setattr__(self, "c", self.a.new_zeros(len(self.a), 0))
        self._check_shapes()
        self._check_values()
        for name, array in (("b", self.b), ("c", self.c)):
            if array.shape[1] > 1:  # with one column each row reads its own
                self._check_reach(name, array)
        self._check_consistency()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.a)

    @cached_property
    def pattern(self) -> "Pattern":
        """Which outputs and draws the rows read."""
        return Pattern.of(self.b, self.c)

    @property
    def is_called(self) -> Tensor:
        """Whether the model is called in each row, as some row reads its output, [N]."""
        return torch.tensor(self.pattern.called, device="cpu")

    @property
    def nfe(self) -> int:
        """The number of model calls."""
        return sum(self.pattern.called)

    @property
    def window(self) -> int:
        """How many outputs a row may read, the newest and window - 1 before it."""
        return self.b.shape[1]

    @property
    def is_stochastic(self) -> bool:
        """Whether a run draws noise."""
        return bool((self.c != 0).any() or (self.variances != 0).any())

    @property
    def element_shape(self) -> tuple[int, ...]:
        """The dimensions of x in which coefficients differ, (*D); () for coefficients that are numbers."""
        return tuple(self.a.shape[1:])

    @property
    def is_scalar(self) -> bool:
        """Whether its rows weigh by numbers alone: no coefficients per element, and no shift."""
        return not (self.element_shape or self.shift.numel())

    @property
    def half_logsnr(self) -> Tensor:
        """log(alpha / sigma) at each time, [N+1]."""
        return torch.log(self.alpha) - torch.log(self.sigma)

    def mixture(self) -> tuple[Tensor, Tensor]:
        """The weights (p, q) of data and noise in the outputs that b weighs, each [N, *D] or with 1 for the dimensions of D."""
        if self.predicts == "mixture":
            return self.mix[:, 0], self.mix[:, 1]
        alpha, sigma = (v[:-1].reshape(-1, *[1] * len(self.element_shape)) for v in (self.alpha, self.sigma))
        return mixture(self.predicts, alpha, sigma, scale=self.scale)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._form() == other._form() and all(
            torch.equal(mine, theirs) for mine, theirs in zip(self._arrays(), other._arrays(), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self._form(), *((array.detach() + 0.0).numpy().tobytes() for array in self._arrays())))

    def allclose(self, other: "Plan", rtol: float = 1e-12, atol: float = 1e-12) -> bool:
        """Whether both have the same form and shapes, and arrays equal within the tolerances."""
        return self._form() == other._form() and all(
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
        first, last, _ = rows.indices(self.rows)
        if last <= first:
            raise ValueError(f"plan[{first}:{last}] has no rows: expected 0 <= first < last <= {self.rows}")
        for name, array in (("call", self.b), ("draw", self.c)):
            early = nonzero(array[first:last]).triu(1)
            if early.any():
                i, j = (int(v) for v in early.nonzero()[0])
                raise ValueError(
                    f"row {i + first} reads {name} {i + first - j}, which happens before plan[{first}:]; build the "
                    f"method on the shorter grid instead, times[{first}:], or resume a run from its State"
                )
        span = slice(first, last + 1)
        b, c = (array[first:last, : last - first] for array in (self.b, self.c))
        levels = [getattr(self, name)[span] for name in _LEVELS]
        own: dict[str, Any] = {
            name: getattr(self, name)[first:last] for name in ("a", "mix", "shift", "variances")
        }
        turns = _turns(self.times[span])
        return replace(self, **dict(zip(_LEVELS, levels, strict=True)), **own, b=b, c=c, turns=turns)

    def __add__(self, other: "Plan") -> "Plan":
        """This plan and then the other, which starts where this one ends.

        Raises:
            ValueError: the ends do not meet, or the forms differ.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        return joined([self, other])

    def __str__(self) -> str:
        kind = "stochastic" if self.is_stochastic else "deterministic"
        scale = f" (scale {self.scale:g})" if self.scale != 1 else ""
        title = f"{self.nfe} calls, {self.predicts} form{scale}, window {self.window}, {kind}"
        if self.element_shape:
            title += f", per element {list(self.element_shape)}: their means"
        symbol = {"noise": "eps", "data": "x0", "velocity": "v", "mixture": "m"}[self.predicts]
        called = self.is_called.tolist()
        heads = ["call" if all(called) else "row", "t", "half_logsnr", "x"]
        heads += [symbol if j == 0 else f"{symbol}[-{j}]" for j in range(self.window)]
        heads += ["z" if k == 0 else f"z[-{k}]" for k in range(self.c.shape[1])]
        heads += ["1"] if self.shift.numel() else []
        heads += ["least var", "most var", "cap"] if self.variances.numel() else []
        lam = self.half_logsnr
        columns = [self.times[:-1, None], lam[:-1, None], self.a[:, None], self.b, self.c]
        columns += [self.shift[:, None]] if self.shift.numel() else []
        columns += [self.variances] if self.variances.numel() else []
        table = torch.cat([v.flatten(2).mean(2) if v.ndim > 2 else v for v in columns], 1)
        lines = [[str(i) if called[i] else "-"] + [f"{v:.6g}" for v in row] for i, row in enumerate(table)]
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
            ValueError: more rows or columns than `from_json` would read, or not a plan of numbers alone: a mixture, a shift,
                variances of the model's, or coefficients per element are made again from what they were made of.
        """
        if self.predicts == "mixture" or self.variances.numel() or not self.is_scalar:
            raise ValueError(
                f"a plan in {self.predicts} form, per element {list(self.element_shape)}, or whose noise the model scales, is not "
                "saved as text: save what it is built from (e.g. Statistics.save) and build it again"
            )
        if self.rows > MAX_ROWS or max(self.b.shape[1], self.c.shape[1]) > MAX_COLUMNS:
            raise ValueError(
                f"a plan of {self.rows} rows, {self.window} columns: at most {MAX_ROWS} and {MAX_COLUMNS} are saved"
            )
        lists = {name: getattr(self, name).tolist() for name in _SAVED}
        return text_of({name: getattr(self, name) for name in _SCALARS} | lists)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan that `to_json` wrote. Sizes are checked before any tensor is made.

        Raises:
            ValueError: not such a text: unknown, missing or repeated fields, numbers that are not finite, wrong sizes.
        """
        scalars, lists = values_of(text, _SCALARS, {"times": 1, "alpha": 1, "sigma": 1, "a": 0}, _SAVED[4:])
        choice("predicts", scalars["predicts"], FORMS[:-1])
        turns, scale, consistent = scalars["turns"], scalars["scale"], scalars["consistent"]
        if not isinstance(scale, float):
            raise ValueError(f"scale = {scale!r:.100}: expected a number")
        if not (isinstance(turns, float) and 0 <= turns <= len(lists["a"]) and turns.is_integer()):
            raise ValueError(f"turns = {turns!r:.100}: expected a whole number from 0 to {len(lists['a'])}")
        if not isinstance(consistent, bool):
            raise ValueError(f"consistent = {consistent!r:.100}: expected true or false")
        arrays: dict[str, Any] = {
            name: torch.tensor(v, dtype=torch.float64, device="cpu") for name, v in lists.items()
        }
        return Plan(
            **arrays, predicts=scalars["predicts"], scale=scale, turns=int(turns), consistent=consistent
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, which is whole or not there at all."""
        text = self.to_json()
        write_whole(Path(path), lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

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

    def _form(self) -> tuple[str, float, str]:
        return self.predicts, self.scale, self.second

    def place(self, call: int) -> tuple[str, float]:
        """What a state at this call must agree on to go on with the plan: the form of its outputs, and the time."""
        form = self.predicts if self.scale == 1 else f"{self.predicts} of scale {self.scale!r}"
        return form, self.times[call].item()

    def _check_types(self) -> None:
        choice("predicts", self.predicts, FORMS)
        if not 0 < self.scale < math.inf or (self.scale != 1 and self.predicts != "velocity"):
            raise ValueError(
                f"scale = {self.scale:g} with predicts = {self.predicts!r}: expected a finite number above 0, and 1 for all but velocity"
            )
        for name, array in zip(_ARRAYS, self._arrays(), strict=True):
            if not isinstance(array, Tensor) or array.dtype != torch.float64 or array.device.type != "cpu":
                kind = (
                    f"{array.dtype} on {array.device}" if isinstance(array, Tensor) else type(array).__name__
                )
                raise TypeError(f"{name} is {kind}: expected a float64 tensor on the CPU")
        if self.a.ndim < 1 or len(self.a) < 1:
            raise ValueError(
                f"a has shape {list(self.a.shape)}: expected [N] (or [N, *D], per element) with at least one row"
            )

    def _check_shapes(self) -> None:
        rows = len(self.a)
        for name in ("times", "alpha", "sigma"):
            if list(getattr(self, name).shape) != [rows + 1]:
                shape = list(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {shape}: expected {[rows + 1]}, as a has {rows} rows")
        for name, least in (("b", 1), ("c", 0)):
            array, rest = getattr(self, name), self.element_shape if name == "b" else ()
            if array.ndim < 2 or (len(array), *array.shape[2:]) != (rows, *rest) or array.shape[1] < least:
                expected = ", ".join(map(str, (rows, "columns", *rest)))
                raise ValueError(
                    f"{name} has shape {list(array.shape)}: expected [{expected}], as a has {rows} rows"
                )
        if self.second not in (SECONDS if self.variances.numel() else ("",)):
            raise ValueError(
                f"second = {self.second!r} with variances of shape {list(self.variances.shape)}: expected 'range' or 'moments' with variances, "
                "and '' without"
            )
        if (self.predicts == "mixture") != bool(self.mix.numel()):
            raise ValueError(
                f"mix has shape {list(self.mix.shape)}: expected weights with predicts = 'mixture', and with it alone"
            )
        element = self.element_shape
        for name, own in (
            ("mix", [rows, 2, *element]),
            ("shift", [rows, *element]),
            ("variances", [rows, 3]),
        ):
            array, wanted = getattr(self, name), list(own)
            if array.numel() and list(array.shape) != wanted:
                raise ValueError(
                    f"{name} has shape {list(array.shape)}: expected {wanted}, as a has {rows} rows"
                )

    def _check_values(self) -> None:
        for name, array in zip(_ARRAYS, self._arrays(), strict=True):
            least = 0.0 if name in ("alpha", "sigma", "variances") else -sys.float_info.max
            most = math.inf if name == "variances" else sys.float_info.max  # no cap is a cap
            if not within(array, least, most):
                bad = ~((array >= least) & (array <= most))
                where = [int(i) for i in bad.nonzero()[0]]
                value = array[tuple(where)].item()
                raise ValueError(
                    f"{name}{where} = {value:g}: every entry must be finite, of alpha, sigma and variances not negative"
                )
        if _turns(self.times) > self.turns:
            steps = self.times.diff() if self.times[-1] <= self.times[0] else -self.times.diff()
            i = int((steps > 0).nonzero()[0])
            raise ValueError(
                f"times must not turn back: times[{i}] = {self.times[i]:g} is followed by {self.times[i + 1]:g}"
            )

    def _check_reach(self, name: str, array: Tensor) -> None:
        early = nonzero(array).triu(1)
        if early.any():
            i, j = (int(v) for v in early.nonzero()[0])
            raise ValueError(f"{name}[{i}, {j}] reads {j} rows back, before the first row")

    def _check_consistency(self) -> None:
        """What each row must solve exactly: a_i level_i + sum_j b_ij weight_{i-j} = level_{i+1} for (level, weight).

        Where x_0 and eps are constant: (alpha, p) and, for an ODE, (sigma, q). In velocity form, with
        n = sqrt(scale^2 alpha^2 + sigma^2) and theta = arctan(sigma / (scale alpha)): that, or (n, 0) and (n theta, n).
        """
        if not self.consistent or self.predicts == "mixture" or not self.is_scalar:
            return
        alpha, sigma = self.alpha, self.sigma
        levels, weights = [alpha, sigma], [*mixture(self.predicts, alpha, sigma, scale=self.scale)]
        if self.predicts == "velocity":
            norm = torch.hypot(self.scale * alpha, sigma)
            levels += [norm, norm * torch.atan2(sigma, self.scale * alpha)]
            weights += [0 * norm, norm]
        level, weight = torch.stack(levels), torch.stack(weights)  # [parts, N+1]
        row, column = _positions(self.rows, self.window)
        reads = weight[:, (row - column).clamp(min=0)]
        terms = torch.cat([(self.a * level[:, :-1])[..., None], self.b * reads], 2)
        values, expected = terms.sum(2), level[:, 1:]
        off = (values - expected).abs() > CONSISTENCY * torch.maximum(terms.abs().amax(2), expected.abs())
        if not off.any():
            return
        if self.is_stochastic:  # noise takes the place of sigma
            off[1::2] &= ~((self.c != 0).any(1) | (self.variances != 0).any(-1))
        gap = off.unflatten(0, (-1, 2)).any(1).all(0)
        if gap.any():
            i = int(gap.nonzero()[0])
            part = int(off[:, i].nonzero()[0])
            name = ("alpha", "sigma")[part]
            raise ValueError(
                f"row {i} is not consistent: it carries {name} to {values[part, i]:.12g}, expected {name}[{i + 1}] = "
                f"{expected[part, i]:.12g}"
            )


_SCALARS = ("predicts", "scale", "turns", "consistent")  # that are saved
_ARRAYS = tuple(f.name for f in fields(Plan) if f.name not in (*_SCALARS, "second"))
_LEVELS, _SAVED = _ARRAYS[:3], _ARRAYS[:6]  # all but mix, shift and variances


def joined(plans: Sequence[Plan]) -> Plan:
    """Plans one after the other, each starting where the one before ends; `first + second` is joined([first, second]).

    Raises:
        ValueError: the ends do not meet, or the forms differ.
    """
    if len(plans) == 1:
        return plans[0]
    for one, other in pairwise(plans):
        mine, theirs = (
            [float(v[i]) for v in (p.times, p.alpha, p.sigma)] for p, i in ((one, -1), (other, 0))
        )
        if mine != theirs:
            raise ValueError(
                f"plans do not meet: one ends at (t, alpha, sigma) = {mine}, the next starts at {theirs}"
            )
        if one._form() != other._form():
            forms = " and ".join(f"{p.predicts!r}, scale {p.scale:g}" for p in (one, other))
            raise ValueError(f"plans of different forms cannot be joined: {forms}")
        optional = [bool(getattr(p, name).numel()) for name in ("shift", "variances") for p in (one, other)]
        if optional[::2] != optional[1::2] or one.element_shape != other.element_shape:
            raise ValueError(
                f"plans for elements {list(one.element_shape)} and {list(other.element_shape)}, or one with a shift or with variances "
                "and one without, cannot be joined"
            )
    own: dict[str, Any] = {
        name: torch.cat([getattr(p, name) for p in plans]) for name in ("mix", "shift", "variances")
    }
    whole, consistent = chained(plans), all(p.consistent for p in plans)
    return replace(plans[0], **whole._asdict(), **own, turns=_turns(whole.times), consistent=consistent)


class Piece(NamedTuple):
    """Rows that are a part of a plan, with the plan's fields, not yet checked."""

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def plan(self, predicts: str, scale: float = 1.0) -> Plan:
        """The rows as a plan, checked."""
        return Plan(*self, predicts, scale, turns=_turns(self.times))


def chained(pieces: Sequence[Piece | Plan]) -> Piece:
    """Pieces one after the other, each starting where the one before ends; a row may read calls of the pieces before its own."""
    times, alpha, sigma = (
        torch.cat([getattr(pieces[0], name), *(getattr(p, name)[1:] for p in pieces[1:])]) for name in _LEVELS
    )
    a, b, c = (
        torch.cat([p.a for p in pieces]),
        stacked(*(p.b for p in pieces)),
        stacked(*(p.c for p in pieces)),
    )
    return Piece(times, alpha, sigma, a, b, c)


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
    ratio = torch.where(
        x_weights == 0, 0.0, x_weights / before
    )  # 0 / 0 where all memory is lost within the step
    rest = weights.clone()
    rest[:, 1:] -= ratio[:, 1:, None] * weights[:, :-1]
    k, j = torch.tril_indices(stages, stages, device="cpu")
    b = torch.zeros_like(rest)
    b[:, k, k - j] = rest[:, k, j]
    return ratio.reshape(steps * stages), b.reshape(steps * stages, stages)


def stacked(*tables: Tensor) -> Tensor:
    """The columns of runs of rows, [N1, K1] over [N2, K2] over ..., padded with zeros to the width of the widest."""
    width = max(table.shape[1] for table in tables)
    return torch.cat(
        [
            v
            if v.shape[1] == width
            else torch.cat([v, v.new_zeros(len(v), width - v.shape[1], *v.shape[2:])], 1)
            for v in tables
        ]
    )


def nonzero(table: Tensor) -> Tensor:
    """Which entries of [N, K, *D] are not 0 for some element, [N, K]."""
    return (table != 0).flatten(2).any(2) if table.ndim > 2 else table != 0


class Pattern(NamedTuple):
    """Which outputs and draws the rows of a plan read: all that a run needs to know of it but numbers.

    Attributes:
        called: by row, whether the model is called, as some row reads its output.
        past: by row, the earlier calls whose outputs it reads.
        draws: by row, the draws that it reads.
        last: by call, the last row that reads its output; -1 for none.
        last_draw: the same by draw.
        done: by row, the earlier calls whose outputs no later row reads.
        columns: [N, T]; by row, where the weights of its past outputs and then of its draws stand among the columns of b and c side by side, and behind
            them all for none.
    """

    called: list[bool]
    past: list[list[int]]
    draws: list[list[int]]
    last: list[int]
    last_draw: list[int]
    done: list[list[int]]
    columns: Tensor

    @staticmethod
    def of(b: Tensor, c: Tensor) -> "Pattern":
        """That of the weights of outputs and draws."""
        rows, window = b.shape[:2]
        outputs, draws = ([_read(row, i) for i, row in enumerate(nonzero(v).tolist())] for v in (b, c))
        last, last_draw = _last(outputs), _last(draws)
        past = [[call for call in calls if call < i] for i, calls in enumerate(outputs)]
        done: list[list[int]] = [[] for _ in range(rows)]
        for call, row in enumerate(last):
            if row > call:
                done[row].append(call)
        columns = [
            [i - call for call in calls] + [window + i - draw for draw in drawn]
            for i, (calls, drawn) in enumerate(zip(past, draws, strict=True))
        ]
        longest, none = max(map(len, columns)), window + c.shape[1]
        filled = [row + [none] * (longest - len(row)) for row in columns]
        called = [row >= call for call, row in enumerate(last)]
        return Pattern(
            called, past, draws, last, last_draw, done, torch.tensor(filled, dtype=torch.long, device="cpu")
        )


def _read(row: list[bool], i: int) -> list[int]:
    """The numbers of what row i reads, the newest first."""
    return [i - j for j, is_read in enumerate(row) if is_read]


def _last(read: list[list[int]]) -> list[int]:
    """For each call (or draw) the last row that reads it; -1 for none."""
    last = [-1] * len(read)
    for row, numbers in enumerate(read):
        for number_of in numbers:
            last[number_of] = row
    return last


def _turns(times: Tensor) -> int:
    """How many steps go against the way from the first time to the last."""
    values = times.tolist()
    against = lt if values[-1] <= values[0] else gt
    return sum(map(against, values, values[1:]))


def _positions(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a table, each broadcasting to [rows, columns]."""
    return torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")
