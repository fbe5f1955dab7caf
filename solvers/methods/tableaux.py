"""Explicit exponential Runge-Kutta tableaux; at z = 0 each is a classical one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from solvers.arguments import number

Phi = Callable[..., Tensor]  # (k, c=1.0) -> phi_k(c z)


@dataclass(frozen=True)
class Tableau:
    """Stages of a step: stage i stands at c_i and is the exact part over c_i h plus h sum_j a_ij m_j; the end has weights b_j.

    The first output is left out: it takes what consistency leaves, a_i1 = c_i phi_1(c_i z) - sum_{j > 1} a_ij.
    Source: Hochbruck & Ostermann 2005 (doi 10.1137/040611434), section 2.

    Attributes:
        positions: c_1 = 0, c_2, ..., each in [0, 1].
        weights: from the phi-functions, (k, c=1) -> phi_k(c z), the weights of outputs 2, 3, ... in stages 2, 3, ... and in
            the step's end: [[], [a_32], ..., [b_2, b_3, ...]].
    """

    positions: tuple[float, ...]
    weights: Callable[[Phi], list[list[Tensor]]]

    def __post_init__(self) -> None:
        if not self.positions or self.positions[0] != 0 or not all(0 <= c <= 1 for c in self.positions):
            raise ValueError(f"positions = {self.positions}: expected c_1 = 0, then numbers in [0, 1]")
        if not callable(self.weights):
            raise TypeError(
                f"weights = {self.weights!r:.100}: expected a function of phi, e.g. lambda p: [[], [p(2) / c2]] for two stages"
            )

    @property
    def stages(self) -> int:
        """The number of calls in a step."""
        return len(self.positions)


def position(name: str, value: float) -> float:
    """A stage's place within the step."""
    if not 0 < number(name, value) <= 1:
        raise ValueError(f"{name} = {value}: expected a position within the step, 0 < {name} <= 1")
    return float(value)


def two_positions(**places: float) -> tuple[float, float]:
    """The places of the two inner stages of a third-order step."""
    (first, c2), (second, c3) = ((name, position(name, value)) for name, value in places.items())
    if not c2 < c3 or abs(c2 - 2 / 3) < 0.05:
        raise ValueError(
            f"{first} = {c2:g}, {second} = {c3:g}: order 3 needs {first} < {second} and {first} away from 2/3, where the weights "
            f"grow without bound, e.g. {first}=1/3, {second}=2/3"
        )
    return c2, c3


euler = Tableau((0.0,), lambda p: [[]])


def second_order(c2: float = 0.5) -> Tableau:
    """Order 2, RES 2: b_2 = phi_2 / c_2; midpoint rule (c2 = 1/2), Ralston (2/3), Heun (1) at z = 0."""
    c2 = position("c2", c2)
    return Tableau((0.0, c2), lambda p: [[], [p(2) / c2]])


def dpm_solver_2(c2: float = 0.5) -> Tableau:
    """Order 2 with the weight phi_1 / (2 c_2) of DPM-Solver-2: Lu et al. 2022 (arXiv 2206.00927), algorithm 4."""
    c2 = position("c2", c2)
    return Tableau((0.0, c2), lambda p: [[], [p(1) / (2 * c2)]])


def third_order(c2: float = 1 / 3, c3: float = 2 / 3) -> Tableau:
    """Order 3, RES 3: gamma = (3 c_3^2 - 2 c_3) / (c_2 (2 - 3 c_2)); at c_3 = 2/3 it is DPM-Solver-3.

    Source: Hochbruck & Ostermann 2005, section 5. Code that ports it to diffusion prints gamma with c_3^3, which is right at
    c_3 = 1 alone and elsewhere leaves order 2.
    """
    c2, c3 = two_positions(c2=c2, c3=c3)

    def weights(p: Phi) -> list[list[Tensor]]:
        gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))
        b3 = p(2) / (gamma * c2 + c3)
        return [[], [gamma * c2 * p(2, c2) + c3**2 / c2 * p(2, c3)], [gamma * b3, b3]]

    return Tableau((0.0, c2, c3), weights)


etdrk3 = (
    Tableau(  # Cox & Matthews 2002 (doi 10.1006/jcph.2002.6995), eq. 23 to 25; Kutta's third order at z = 0
        (0.0, 1 / 2, 1.0), lambda p: [[], [2 * p(1)], [4 * p(2) - 8 * p(3), 4 * p(3) - p(2)]]
    )
)
lie3 = Tableau(  # order 3 of Lie-group integrators: DPM-Solver-3 with the released code's "taylor" weights
    (0.0, 1 / 3, 2 / 3),
    lambda p: [[], [4 / 3 * p(2, 2 / 3)], [6 * p(2) - 18 * p(3), 9 * p(3) - 3 / 2 * p(2)]],
)


def _fourth_order_end(p: Phi) -> list[Tensor]:
    return [2 * p(2) - 4 * p(3), 2 * p(2) - 4 * p(3), 4 * p(3) - p(2)]


etdrk4 = Tableau(  # Cox & Matthews 2002, eq. 26 to 29; the classical fourth order at z = 0
    (0.0, 1 / 2, 1 / 2, 1.0), lambda p: [[], [p(1, 1 / 2) / 2], [0 * p(1), p(1, 1 / 2)], _fourth_order_end(p)]
)
krogstad = Tableau(  # Krogstad 2005 (doi 10.1016/j.jcp.2004.08.006), ETDRK4-B
    (0.0, 1 / 2, 1 / 2, 1.0), lambda p: [[], [p(2, 1 / 2)], [0 * p(1), 2 * p(2)], _fourth_order_end(p)]
)
strehmel_weiner = Tableau(  # Strehmel & Weiner 1992, in Hochbruck & Ostermann 2005, section 5
    (0.0, 1 / 2, 1 / 2, 1.0),
    lambda p: [
        [],
        [p(2, 1 / 2) / 2],
        [-2 * p(2), 4 * p(2)],
        [0 * p(1), 4 * p(2) - 8 * p(3), 4 * p(3) - p(2)],
    ],
)


def _hochbruck_ostermann(p: Phi) -> list[list[Tensor]]:
    a52 = p(2, 1 / 2) / 2 - p(3) + p(2) / 4 - p(3, 1 / 2) / 2
    return [
        [],
        [p(2, 1 / 2)],
        [p(2), p(2)],
        [a52, a52, p(2, 1 / 2) / 4 - a52],
        [0 * p(1), 0 * p(1), 4 * p(3) - p(2), 4 * p(2) - 8 * p(3)],
    ]


hochbruck_ostermann = Tableau(  # Hochbruck & Ostermann 2005, eq. 5.19: order 4 also where z is large
    (0.0, 1 / 2, 1 / 2, 1.0, 1 / 2), _hochbruck_ostermann
)


def _cubic_end(p: Phi) -> list[Tensor]:
    """The weights of outputs at 1/3, 2/3 and 1 that integrate cubics exactly."""
    return [
        9 * p(2) - 45 * p(3) + 81 * p(4),
        -9 / 2 * p(2) + 36 * p(3) - 81 * p(4),
        p(2) - 9 * p(3) + 27 * p(4),
    ]


def _three_eighths(p: Phi) -> list[list[Tensor]]:
    """sum_i b_i psi_{2,i} = 0 at every z, with psi_{2,i} = sum_j a_ij c_j - c_i^2 phi_2(c_i z): the last stage takes what the others leave."""
    b2, b3, b4 = _cubic_end(p)
    psi = (b2 * p(2, 1 / 3) / 9 - 2 / 9 * b3 * p(2, 2 / 3)) / b4
    a43 = 3 * (p(2) + psi)
    return [[], [2 * p(2, 2 / 3)], [-a43, a43], [b2, b3, b4]]


three_eighths = Tableau(
    (0.0, 1 / 3, 2 / 3, 1.0), _three_eighths
)  # order 4, this library; Kutta's 3/8 rule at z = 0


@dataclass(frozen=True)
class Pair:
    """A tableau of order p with the weights of a solution of order p - 1, for an estimate of the error.

    Attributes:
        tableau: of the higher solution.
        low: from the phi-functions, the weights of outputs 2, 3, ... in the lower solution.
        order: the p of these.
        asks_at_end: whether `low` reads the output at the step's end too, which is the first of the next.
    """

    tableau: Tableau
    low: Callable[[Phi], list[Tensor]]
    order: int
    asks_at_end: bool = False


# Lu et al. 2022 (arXiv 2206.00927), appendix C
dpm_solver_12 = Pair(dpm_solver_2(1 / 2), lambda p: [], 2)
dpm_solver_23 = Pair(third_order(1 / 3, 2 / 3), lambda p: dpm_solver_2(1 / 3).weights(p)[-1], 3)


def _second_order_low(p: Phi) -> list[Tensor]:
    """A quarter of the way from the third order's weights to the midpoint rule's: the tolerance is kept, but not by much."""
    (b2, b3), (low,) = (
        tableau.weights(p)[-1] for tableau in (third_order(1 / 2, 3 / 4), second_order(1 / 2))
    )
    return [(3 * b2 + low) / 4, 3 / 4 * b3]


def _third_order_low(p: Phi) -> list[Tensor]:
    """The third difference (-1, 3, -3, -3, 4) / 20 away, in which the stage and the step's end, both at 1, weigh -3 and 4: order 3.

    A pair whose weights differ at 1 alone, as that of Krogstad's method, sees nothing of an output that depends on time only.
    """
    b2, b3, b4 = _cubic_end(p)
    return [b2 + 3 / 20, b3 - 3 / 20, b4 - 3 / 20, 4 / 20 + 0 * b4]


exponential_32 = Pair(third_order(1 / 2, 3 / 4), _second_order_low, 3)  # Bogacki & Shampine's nodes
exponential_43 = Pair(three_eighths, _third_order_low, 4, asks_at_end=True)
