"""The examples of docs/examples: they run, and their page says what their records say."""

import json
import math
import re
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch

import solvers as sv
from problems import generator
from test_docs import ROOT, loaded

EXAMPLES = ROOT / "docs/examples"
PAGE = (ROOT / "docs/likelihood.md").read_text(encoding="utf-8")


def table_between(name):
    return re.search(rf"(?s)<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", PAGE)[1]


@pytest.fixture(scope="module")
def training():
    return loaded(EXAMPLES / "high_order_training.py")


@pytest.fixture(scope="module")
def digits():
    return loaded(EXAMPLES / "digits_unet.py")


def records(training):
    lines = (EXAMPLES / "high_order_training.jsonl").read_text(encoding="utf-8").splitlines()
    return [training.Record(**json.loads(line)) for line in lines]


def test_the_page_has_the_table_of_its_records(training):
    assert table_between("kl") == training.table(records(training))


@pytest.mark.parametrize("problem", ["mixture", "checkerboard"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_records_show_that_higher_orders_lower_the_kl_by_more_than_its_spread(training, problem, order):
    """Against order 1 with as many steps and with four times as many, over five seeds."""
    found = [r for r in records(training) if r.problem == problem]
    high = [r.kl for r in found if r.order == order]
    for steps in {r.steps for r in found if r.order == 1}:
        first = [r.kl for r in found if (r.order, r.steps) == (1, steps)]
        assert len(first) == len(high) == 5
        assert mean(first) - mean(high) > 2 * (stdev(first) + stdev(high))
        assert max(high) < min(first)


def test_training_by_every_order_runs_from_the_command_line(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "STEPS_OF_THE_ODE", 2)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin kl -->\nold\n<!-- end kl -->\nbehind\n")
    threads = torch.get_num_threads()
    training.main(["--seeds", "1", "--share", "0.001", "--out", str(tmp_path), "--into", str(page)])
    torch.set_num_threads(threads)
    written = [json.loads(line) for line in (tmp_path / "high_order_training.jsonl").read_text().splitlines()]
    assert len(written) == 2 * 4
    assert all(math.isfinite(record["kl"]) for record in written)
    assert (tmp_path / "high_order_training.png").stat().st_size > 10_000
    shown = page.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("behind\n")
    assert "old" not in shown
    assert shown.count("| checkerboard |") == 4
    assert "| mixture | 3 |" in capsys.readouterr().out


def test_a_seed_trains_the_same_network_again(training):
    problem = training.PROBLEMS["mixture"]
    first, second = (training.trained(problem, 3, seed=1, steps=3).net.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_densities_of_the_problems_have_integral_1_where_their_draws_are(training):
    for problem in training.PROBLEMS.values():
        x, cell = training.points(problem)
        density = problem.log_density(x).exp()
        assert abs(float(density.sum()) * cell - 1) < 1e-3
        alpha, sigma = training.level(training.STOP)
        drawn = alpha * problem.draw(4000, generator()) + sigma * torch.randn(
            4000, problem.d, generator=generator(1)
        )
        second = (density[:, None] * x**2).sum(0) * cell
        assert torch.allclose((drawn**2).double().mean(0), second, atol=0.03)


def test_the_kl_of_the_exact_network_is_0(training, monkeypatch):
    """And is not with a noise prediction that is one per cent too small."""
    from reference import Mixture

    problem = training.PROBLEMS["mixture"]
    deviations = torch.tensor([1 / 9, 1 / 9, 2 / 9])
    data = Mixture(
        torch.tensor([0.4, 0.4, 0.2]),
        torch.tensor([[-2 / 3], [-2 / 9], [4 / 9]]),
        deviations[:, None, None] ** 2,
    )
    model = sv.Model(data.model(training.SCHEDULE))
    assert abs(training.kl(problem, model)) < 2e-4
    assert training.kl(problem, replace(model, net=lambda x, t: 0.99 * model.net(x, t))) > 2e-3


def test_the_trained_digits_are_sampled_alike_by_every_solver(digits):
    model = digits.load()
    found = digits.errors(model, torch.randn(4, 1, 8, 8, generator=generator()))
    error = {name: value for name, (value, _) in found.items()}
    assert error["DPM-Solver++(2M), logsnr, 10"] < error["DDIM, logsnr, 10"]
    assert error["recommended for noise, 20"] < error["recommended for noise, 10"]
    assert error["recommended for noise, 10"] < error["DPM-Solver++(2M), logsnr, 10"] / 1.5
    assert error["recommended for noise, 10"] < error["recommended, angle, 10"] / 5
    assert error["adaptive, 1e-2"] < 0.05
    exact = found["dopri5, 1e-5"][1]
    assert 0.5 < exact.std() < 0.9
    assert exact.abs().max() < 1.5


def test_the_trained_digits_cost_fewer_bits_than_other_images(digits):
    """By a plan and one probe; noise of the same values costs more than the log2(17) bits that tell nothing."""
    model, held_out = digits.load(), digits.images()[1][:16]
    back = sv.Inversion(digits.SCHEDULE)
    plan = sv.exponential_adams(back, sv.angle(back, 12), order=2, predicts="velocity")

    def bits(pixels):
        x = sv.dequantized(pixels, digits.VALUES, noise=0)
        found = sv.log_likelihood(model, digits.SCHEDULE, x, sv.hutchinson(2), plan, noise=0)
        return sv.bits_per_dim(found.log_p, (1, 8, 8), bins=digits.VALUES).mean()

    assert (
        1.0
        < bits(held_out)
        < 3.2
        < math.log2(17)
        < bits(torch.randint(17, held_out.shape, generator=generator()))
    )


def test_the_digits_train_and_their_report_is_drawn(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "BATCH", 16)
    monkeypatch.setattr(digits, "SOLVERS", dict([*digits.SOLVERS.items()][:1]))
    monkeypatch.setattr(digits, "bits", lambda model, pixels: {"none": (0.0, 0.0)})
    threads = torch.get_num_threads()
    digits.main(["train", "--steps", "2", "--weights", str(tmp_path / "w.safetensors")])
    torch.set_num_threads(threads)
    digits.main(["report", "--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path)])
    assert (tmp_path / "digits_unet.png").stat().st_size > 5_000
    assert "DDIM, logsnr, 10" in capsys.readouterr().out


@pytest.mark.slow
def test_bits_per_dimension_of_the_trained_digits_are_those_of_the_exact_divergence(digits):
    """And the SDE's bounds, by densities and by values, are above the ODE's."""
    model, held_out = digits.load(), digits.images()[1][:8]
    found = {name: bits for name, (bits, _) in digits.bits(model, held_out).items()}
    x = sv.dequantized(held_out, digits.VALUES, noise=0)
    exact = sv.log_likelihood(model, digits.SCHEDULE, x, noise=0).log_p
    assert abs(float(sv.bits_per_dim(exact, (1, 8, 8), bins=17).mean()) - found["ODE, dequantised"]) < 0.1
    assert all(1.0 < bits < math.log2(17) for bits in found.values())
