"""The closed-form problems that the order tests run on, and what can be said of a row of each method."""

import functools

import torch

import solvers as sv
from reference import Mixture
from solvers.methods import METHODS

VP = sv.VP()
NARROW = tuple(VP.time(torch.tensor([-1.0, 3.0], dtype=torch.float64)).tolist())  # half log-SNR -1 to 3
FULL = (VP.start, VP.stop)  # half log-SNR -5.0 to 4.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


MEANS, DEVIATIONS, WEIGHTS = (
    torch.tensor(v, dtype=torch.float64) for v in ([-1.2, 0.3, 1.5], [0.25, 0.4, 0.3], [0.3, 0.45, 0.25])
)


def line():
    """Three components in one dimension; the exact flow matches CDFs."""
    return Mixture(WEIGHTS, MEANS[:, None], DEVIATIONS[:, None, None] ** 2)


def line_model(schedule):
    """The exact velocity of `line` for x [B, 1] in few operations, as `Mixture.model` has it for any mixture."""

    def model(x, t):
        alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
        total = alpha**2 * DEVIATIONS**2 + sigma**2
        away = x - alpha * MEANS
        share = torch.softmax(WEIGHTS.log() - total.log() / 2 - away**2 / total / 2, 1)
        noise = (share * away / total).sum(1, keepdim=True) * sigma
        data = (share * (MEANS + alpha * DEVIATIONS**2 * away / total)).sum(1, keepdim=True)
        return alpha * noise - sigma * data

    return sv.Model(model, predicts="velocity", label=lambda t: t)


def eight():
    """Three components with full covariances in eight dimensions."""
    root = torch.randn(3, 8, 8, dtype=torch.float64, generator=generator(1)) / 8**0.5
    covs = 0.3 * root @ root.mT + 0.2 * torch.eye(8, dtype=torch.float64)
    return Mixture(torch.tensor([0.3, 0.45, 0.25]), 0.7 * torch.randn(3, 8, generator=generator(2)), covs)


PROBLEMS = {"line": line(), "eight": eight()}
MODELS = {"line": line_model(VP), "eight": PROBLEMS["eight"].model(VP)}


@functools.cache
def starts(problem, span, n=64):
    """Exact states at the first time of a span: alpha x_0 + sigma eps, [n, d] float64."""
    data = PROBLEMS[problem]
    noise = torch.randn(n, *data.shape, dtype=torch.float64, generator=generator(3))
    return sv.noised(data.draw(n, generator(4)), VP, span[0], noise)


@functools.cache
def exact(problem, span):
    """Where the exact flow carries `starts`."""
    return PROBLEMS[problem].flow(starts(problem, span), VP, *span)


SHAPE = [1.0, 2.0, 1.5, 0.8, 1.6]  # of the outer steps before and with the one whose row is examined
RAMPED = {name for name in METHODS if name.endswith("_ramp")}
CORRECTED = {name for name in METHODS if name.startswith("unipc")}  # a corrected row shows its predictor
UNFOLDED = {"obelm", "dpm_solver_v3_1", "dpm_solver_v3_2"}  # their start, or a linear part, is in the rows
BETTER_QUADRATURE = {"etdrk3", "rho_kutta3"}  # Simpson's rule, of order 4
ROWS = [name for name in METHODS if name not in RAMPED | UNFOLDED]


def row_order_of(name):
    """The order that a row has on steps of SHAPE."""
    method = METHODS[name]
    return (method.uneven_order or method.order) - (name in CORRECTED)


class Counted:
    """A model that remembers the times of its calls; `answer` may be replaced."""

    def __init__(self, answer):
        self.times, self.answer = [], answer

    def __call__(self, x, t):
        self.times.append(float(t[0]))
        return self.answer(x, t)
