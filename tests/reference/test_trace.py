"""Tracing a sampler gives back the table it was run from."""

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from reference import rows, trace
from textbook import Table

N = 4


def random_table(draws=0):
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(N, dtype=torch.float64, generator=generator) + 0.5
    b = torch.randn(N, N, dtype=torch.float64, generator=generator).tril().flip(1)
    b = torch.stack([torch.cat([b[i, N - 1 - i :], torch.zeros(N - 1 - i).double()]) for i in range(N)])
    c = torch.randn(N, draws, dtype=torch.float64, generator=generator)
    none = torch.zeros(N + 1, dtype=torch.float64)
    return Table(none, none, none, a, b, c)


def sampler(plan):
    def sample(model, x, noise):
        outputs = []
        for i in range(N):
            outputs.append(model(x, plan.times[i]))
            x = plan.a[i] * x + sum(plan.b[i, j] * outputs[i - j] for j in range(i + 1))
            for k in range(plan.c.shape[1]):
                x = x + plan.c[i, k] * noise()
        return x

    return sample


def test_rows_of_a_trace_are_the_table():
    plan = random_table()
    weights = trace(sampler(plan), calls=N)
    assert weights.shape == (N + 1, N + 1)
    a, b, c = rows(weights, calls=N)
    assert c.shape == (N, 0)
    assert_close(a, plan.a, rtol=1e-13, atol=0)
    assert_close(b, plan.b, rtol=1e-12, atol=1e-13)


def test_trace_is_the_sampler():
    """The last row weighs x_init, the calls and the draws as any run does."""
    plan = random_table(draws=2)
    weights = trace(sampler(plan), calls=N, draws=2 * N)
    generator = torch.Generator().manual_seed(0)
    x, m, z = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (1, N, 2 * N))
    outputs, draws = iter(m), iter(z)
    end = sampler(plan)(lambda x, t: next(outputs), x, lambda: next(draws))
    assert_close(weights[-1] @ torch.cat([x, m, z]), end[0], rtol=1e-13, atol=1e-13)


def test_in_place_samplers_are_traced_too():
    def sample(model, x, noise):
        for _ in range(2):
            m = model(x, 0.0)
            x += m
            m *= 3.0
        return x

    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64)
    assert_close(trace(sample, calls=2), expected)


def test_other_numbers_of_calls_and_draws_are_errors():
    plan = random_table(draws=1)
    with pytest.raises(ValueError, match="more than calls = 3"):
        trace(sampler(plan), calls=3, draws=N)
    with pytest.raises(ValueError, match="more than draws = 3"):
        trace(sampler(plan), calls=N, draws=3)
    with pytest.raises(ValueError, match="made 4 calls and 4 draws, expected calls = 5"):
        trace(sampler(plan), calls=5, draws=N)
    with pytest.raises(ValueError, match="does not depend on x_init"):
        rows(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.float64), calls=2)
    with pytest.raises(ValueError, match="weights has shape"):
        rows(torch.ones(3, 3), calls=3)


def test_rows_of_a_noisy_sampler_carry_its_draws():
    plan = sv.ddim(sv.VP(), sv.logsnr(sv.VP(), 5), eta=0.7)

    def ours(model, x, noise):
        return sv.run(plan, sv.Model(model, predicts="data"), x, noise=lambda number, like: noise())

    a, b, c = rows(trace(ours, calls=5, draws=5), calls=5)
    again = sv.Plan(plan.times, plan.alpha, plan.sigma, a, b, c, "data")
    assert (again.window, again.c.shape) == (1, (5, 1))
    assert again.allclose(plan)


def test_a_sampler_that_is_not_linear_is_refused():
    def clipped(model, x, noise):
        for _ in range(2):
            x = 0.5 * x + model(x, 0.0).clamp(-1, 1)
        return x

    with pytest.raises(ValueError, match="the sampler is not linear"):
        trace(clipped, calls=2)
