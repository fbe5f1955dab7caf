"""Every method, on every grid, at every number of steps: finite, with the declared calls, never far from the answer."""

import pytest
import torch

import solvers as sv
from problems import line_model
from solvers.methods import METHODS

FEW = (*range(1, 13), 20)
MANY = (50, 100, 999, 1000, 1001)
EDM = sv.EDM()
GRIDS = (sv.uniform, sv.quadratic, sv.power, sv.logsnr, sv.karras, sv.angle)


def places(schedules, grids):
    """By name, a schedule and a grid."""
    return {
        f"{name} {grid.__name__}": (schedule, grid) for name, schedule in schedules.items() for grid in grids
    }


LEVELS = places({"ddpm": sv.Discrete.linear(1000)}, (sv.trailing, sv.leading, sv.linspace))
PLACES = places({"vp": sv.VP()}, GRIDS) | places({"flow": sv.Flow()}, (sv.uniform, sv.angle)) | LEVELS
OTHER_PLACES = places({"edm": EDM, "cosine": sv.Cosine(), "subvp": sv.SubVP()}, GRIDS)
EVERYWHERE = PLACES | OTHER_PLACES
BUILDS = {"recommended": sv.recommended} | {name: method.build for name, method in METHODS.items()}


def nfe(name, steps, times, schedule):
    """The calls declared, and one where a step touches infinite half log-SNR; None where the method has no such step."""
    if name == "recommended":
        singlestep = steps >= 40 and not isinstance(schedule, sv.Discrete)
        method = METHODS["unipc_angle_4"] if singlestep else METHODS["ddim"]
    else:
        method = METHODS[name]
    lam = schedule.half_logsnr(times)
    stages = [method.start[1]] * min(steps, method.start[0])
    if lam[0].isinf() and stages and name != "pndm":
        stages = [1] + [method.start[1]] * min(steps - 1, method.start[0])  # the start has one step more
    stages += [method.calls_per_step] * (steps - len(stages))
    if lam[0].isinf() and name != "pndm":
        stages[0] = 1
    if lam[-1].isinf() and name != "pndm":
        stages[-1] = 1
    return sum(stages)


def check(name, schedule, grid, steps):
    times = grid(schedule, steps)
    lam = schedule.half_logsnr(times)
    form = METHODS[name].build(sv.VP(), sv.logsnr(sv.VP(), 2)).predicts if name in METHODS else "velocity"
    if (lam[0].isinf() and form == "noise") or (lam.isinf().any() and form == "mixture"):
        with pytest.raises(ValueError, match=r"cannot start at alpha = 0|infinite half log-SNR"):
            BUILDS[name](schedule, times)
        return
    plan = BUILDS[name](schedule, times)
    assert plan.nfe == nfe(name, steps, times, schedule)
    x = schedule.sigma(times[0]) * torch.tensor([[-1.5], [-0.2], [0.1], [1.0]], dtype=torch.float64)
    x = x + schedule.alpha(times[0]) * torch.tensor([[-1.2], [0.3], [0.3], [1.5]], dtype=torch.float64)
    end = sv.run(plan, line_model(schedule), x)
    assert end.isfinite().all()
    if steps >= 50 and grid in (sv.logsnr, sv.angle):
        assert end.abs().max() < 3, end  # the data lies within (-2.2, 2.4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BUILDS)
def test_few_steps(name, place):
    for steps in FEW:
        check(name, *PLACES[place], steps)


@pytest.mark.slow
@pytest.mark.parametrize("place", OTHER_PLACES)
@pytest.mark.parametrize("name", BUILDS)
def test_few_steps_on_other_schedules(name, place):
    for steps in FEW:
        check(name, *OTHER_PLACES[place], steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", MANY)
@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("name", BUILDS)
def test_many_steps(name, place, steps):
    schedule, grid = EVERYWHERE[place]
    if place in LEVELS and steps > schedule.levels:
        with pytest.raises(ValueError, match="fall on one level"):
            grid(schedule, steps)
        return
    check(name, schedule, grid, steps)
