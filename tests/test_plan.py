"""The table: what it derives, prints, refuses, slices, joins, folds and saves."""

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from solvers.methods import METHODS

TIMES = sv.logsnr(VP, 6)


def test_derived_properties():
    plan = sv.dpm_solver_pp(VP, TIMES, 2)
    assert (plan.nfe, plan.window, plan.is_stochastic) == (6, 2, False)
    assert sv.ddim(VP, TIMES, eta=0.5).is_stochastic
    assert_close(plan.half_logsnr, VP.half_logsnr(TIMES), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
def test_calls_are_what_the_method_says(name, steps):
    """Of every step, and of the first steps where a start keeps the order."""
    method = METHODS[name]
    plan = method.build(VP, sv.logsnr(VP, steps))
    assert plan.nfe == method.nfe(steps)
    assert (plan.times[0], plan.times[-1]) == (VP.start, VP.stop)


def test_printing_shows_every_row_and_its_weights():
    plan = sv.dpm_solver_pp(VP, TIMES, 2)
    lines = str(plan).splitlines()
    assert lines[0] == "6 calls, data form, window 2, deterministic"
    assert lines[1].split() == ["call", "t", "half_logsnr", "x", "x0", "x0[-1]"]
    assert len(lines) == 2 + 6 + 1
    assert float(lines[4].split()[-1]) == pytest.approx(plan.b[2, 1].item(), rel=1e-5)
    assert "z" in str(sv.ddim(VP, TIMES, eta=1.0)).splitlines()[1].split()


def test_equality_and_hash_are_by_value():
    one, same, other = sv.ddim(VP, TIMES), sv.ddim(VP, TIMES), sv.ddim(VP, TIMES, eta=0.1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "a plan"
    assert one.allclose(same)
    assert not one.allclose(dataclasses.replace(one, times=one.times * (1 + 1e-9)))


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_2", "dpm_solver_3", "dpm_solver_pp_3s"])
def test_a_plan_is_the_sum_of_its_steps(name):
    plan = METHODS[name].build(VP, TIMES)
    stride = METHODS[name].calls_per_step
    steps = [plan[i : i + stride] for i in range(0, plan.nfe, stride)]
    assert sum(steps[1:], steps[0]) == plan
    assert plan[stride:].times[0] == TIMES[1]


def test_a_slice_may_not_read_before_itself():
    plan = sv.dpm_solver_pp(VP, TIMES, 2)
    assert plan[:3].nfe == 3
    with pytest.raises(ValueError, match=r"row 3 reads call 2, which happens before plan\[3:\].*times\[3:\]"):
        plan[3:]
    with pytest.raises(ValueError, match="reads call 0"):
        sv.dpm_solver(VP, TIMES, 2)[1:]
    with pytest.raises(ValueError, match="no rows"):
        plan[4:4]
    with pytest.raises(TypeError, match="slice with step 1"):
        plan[::2]
    with pytest.raises(TypeError, match="slice with step 1"):
        plan[2]


def test_plans_join_only_where_they_meet():
    left, right = sv.ddim(VP, TIMES[:4]), sv.dpm_solver_pp(VP, TIMES[3:], 2)
    joined = left + right
    assert (joined.nfe, joined.window) == (6, 2)
    assert joined[:3].b[:, :1].equal(left.b)
    with pytest.raises(ValueError, match="plans do not meet"):
        right + left
    with pytest.raises(ValueError, match="different forms"):
        left + sv.dpm_solver(VP, TIMES[3:], 1)


def test_fold_turns_textbook_stages_into_rows():
    """u = A_1 x + B_10 m_0, then x' = A_2 x + B_20 m_0 + B_21 m_1, in two steps with different weights."""
    x_weights = torch.tensor([[0.5, 0.3], [0.9, 0.7]], dtype=torch.float64)
    weights = torch.tensor([[[0.4, 0.0], [0.2, 0.6]], [[0.1, 0.0], [-0.3, 0.8]]], dtype=torch.float64)
    a, b = sv.fold(x_weights, weights)
    x, outputs = 1.7, [0.3, -1.1, 0.8, 0.2]
    for step in range(2):
        first, second = outputs[2 * step : 2 * step + 2]
        stage = a[2 * step] * x + b[2 * step, 0] * first
        assert_close(stage.item(), (x_weights[step, 0] * x + weights[step, 0, 0] * first).item())
        end = a[2 * step + 1] * stage + b[2 * step + 1, 0] * second + b[2 * step + 1, 1] * first
        expected = x_weights[step, 1] * x + weights[step, 1] @ torch.tensor(
            [first, second], dtype=torch.float64
        )
        assert_close(end.item(), expected.item())
        x = end.item()


@pytest.mark.parametrize("name", [name for name in METHODS if "v3" not in name])
def test_saving_is_exact_and_stable(name, tmp_path):
    plan = METHODS[name].build(VP, TIMES)
    plan.save(tmp_path / "plan.json")
    again = sv.Plan.load(tmp_path / "plan.json")
    assert again == plan
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    plan = sv.ddim(VP, TIMES)
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()

    def full(self):
        raise OSError("no space left on device")

    monkeypatch.setattr(sv.Plan, "to_json", full)
    with pytest.raises(OSError, match="no space"):
        sv.ddim(VP, TIMES[::2]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sigma_zero_and_alpha_zero_are_rows_like_any_other():
    """Flow from pure noise to clean data: no NaN, no epsilon, and the last row lands on the prediction."""
    schedule = sv.Flow()
    times = sv.uniform(schedule, 5)
    for name, method in METHODS.items():
        form = method.build(VP, TIMES).predicts
        if form in ("noise", "mixture"):
            with pytest.raises(ValueError, match=r"cannot start at alpha = 0|infinite half log-SNR"):
                method.build(schedule, times)
            continue
        plan = method.build(schedule, times)
        assert (plan.alpha[0], plan.sigma[-1]) == (0, 0)
        if form == "data" and "unipc" not in name:
            assert plan.a[-1] == 0
            assert plan.b[-1].tolist() == [1.0] + [0.0] * (plan.window - 1)


def test_coefficients_can_be_differentiated_by_the_grid():
    def weights(inner):
        times = torch.cat([TIMES[:1], inner, TIMES[-1:]])
        return sv.dpm_solver_pp(VP, times, 2).b.square().sum()

    assert torch.autograd.gradcheck(weights, TIMES[1:-1].clone().requires_grad_())


def test_json_is_plain():
    body = json.loads(sv.ddim(VP, TIMES).to_json())
    assert set(body) == {
        "format",
        "predicts",
        "scale",
        "turns",
        "consistent",
        "times",
        "alpha",
        "sigma",
        "a",
        "b",
        "c",
    }


def test_a_plan_may_weigh_velocities():
    """DDIM as a rotation: x_t = (alpha_t alpha_s + sigma_t sigma_s) x_s + (sigma_t alpha_s - alpha_t sigma_s) v."""
    alpha, sigma = VP.alpha(TIMES), VP.sigma(TIMES)
    a = alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]
    b = (sigma[1:] * alpha[:-1] - alpha[1:] * sigma[:-1])[:, None]
    rotation = sv.Plan(TIMES, alpha, sigma, a, b, predicts="velocity")
    x = torch.randn(2, 8, dtype=torch.float64, generator=generator())
    for predicts in ("noise", "velocity"):
        model = sv.Model(PROBLEMS["eight"].model(VP, predicts), predicts=predicts)
        assert_close(sv.run(rotation, model, x), sv.run(sv.ddim(VP, TIMES), model, x), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="row 0 is not consistent"):
        dataclasses.replace(rotation, b=1.001 * b)


def test_coefficients_per_element_work_in_every_form():
    """As many elements as rows, so that a mistaken axis would broadcast: the same answer as with numbers."""
    times = sv.logsnr(VP, 4)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator())
    for plan in (
        sv.ddim(VP, times),
        sv.dpm_solver(VP, times, 1),
        sv.exponential_adams(VP, times, 2, "velocity", scale=0.5),
    ):
        spread = dataclasses.replace(
            plan, a=plan.a[:, None].expand(4, 4), b=plan.b[:, :, None].expand(*plan.b.shape, 4)
        )
        assert spread.element_shape == (4,)
        wavy = lambda x, t: torch.tanh(x)  # noqa: E731
        assert_close(sv.run(spread, wavy, x), sv.run(plan, wavy, x), rtol=1e-12, atol=1e-13)


def test_a_state_does_not_go_on_under_another_scale():
    plans = [sv.exponential_adams(VP, TIMES, 3, "velocity", scale=scale) for scale in (1.0, 0.5)]
    states = []
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator())
    sv.run(plans[0], lambda x, t: x, x, callback=lambda state: states.append(state.clone()))
    sv.run(plans[0], lambda x, t: x, states[2])
    with pytest.raises(
        ValueError, match=r"the state is of another plan: it stands at .*velocity of scale 0\.5"
    ):
        sv.run(plans[1], lambda x, t: x, states[2])


def test_times_turn_back_only_where_it_is_declared():
    plan = sv.exponential_rk(VP, TIMES, sv.tableaux.hochbruck_ostermann)
    assert plan.turns == 6
    assert (plan[:5].turns, (plan[:5] + plan[5:]).turns) == (1, 6)
    with pytest.raises(ValueError, match="times must not turn back"):
        dataclasses.replace(plan, turns=5)
    with pytest.raises(ValueError, match=r"times\[1\] = 0.5 is followed by 0.4"):
        dataclasses.replace(
            sv.ddim(VP, TIMES[:4]), times=torch.tensor([0.0, 0.5, 0.4, 1.0], dtype=torch.float64)
        )


def test_a_tableau_with_weights_of_another_shape_is_refused():
    short = sv.tableaux.Tableau((0.0, 0.5), lambda p: [[]])
    with pytest.raises(ValueError, match=r"the tableau has \[0\] weights: expected \[0, 1\]"):
        sv.exponential_rk(VP, TIMES, short)
    with pytest.raises(TypeError, match="expected a function of phi"):
        sv.tableaux.Tableau((0.0, 0.5), [[], [1.0]])
    with pytest.raises(TypeError, match="expected a Tableau"):
        sv.exponential_rk(VP, TIMES, "krogstad")
