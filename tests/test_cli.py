"""The `solvers` command: what it prints, what it writes, what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from traceback import extract_tb

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Text
from torch.testing import assert_close
from typer.main import get_command
from typer.testing import CliRunner

import solvers as sv
from reference import digits, law, wasserstein2
from solvers import __main__, cli, compare, comparison, figures
from solvers.grids import usual
from solvers.methods import METHODS, SDES, Method

MINE = """
import torch
import solvers as sv
from reference import Gaussian

SCHEDULE = sv.VP()
DATA = Gaussian(torch.tensor([0.3, -0.2, 0.1]), torch.diag(torch.tensor([0.25, 0.5, 1.5])))

def load():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DATA.model(SCHEDULE), x, SCHEDULE

def pictures():
    return (lambda x, t: 0.9 * x), torch.linspace(-1, 1, 5 * 3 * 4 * 6).reshape(5, 3, 4, 6), SCHEDULE

def wrong():
    return SCHEDULE

def nan():
    return (lambda x, t: x * float("nan")), torch.ones(2, 3), SCHEDULE

def flow():
    return sv.Model(lambda x, t: 0.5 * x + x.tanh(), predicts="flow"), torch.ones(2, 3), sv.Flow()

LEVELS = sv.Discrete.linear(40)

def whole_steps():
    table = torch.linspace(0.95, 0.5, 40)
    net = lambda x, n: table[n][:, None, None, None] * x
    return sv.Model(net, label=LEVELS.step), torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6), LEVELS

def breaks():
    raise KeyError("weights")

def asserts():
    def net(x, t):
        assert x.ndim == 4, "four dimensions" + chr(10) + "please"
    return net, torch.ones(2, 3), SCHEDULE

def no_schedule():
    return (lambda x, t: x), torch.ones(2, 3), sv.VP

def fragile():
    return (lambda x, t: x @ torch.ones(7, 7)), torch.ones(2, 3), SCHEDULE
"""


def call(*arguments):
    """The result of a command, with its words free of boxes and line breaks."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    result.words = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    return result


def shows_something(path):
    pixels = imread(path)
    return min(pixels.shape[:2]) > 50 and pixels[..., :3].std() > 0.01


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder to work in, where my_model.py lies."""
    (tmp_path / "my_model.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison on the digits: its result and its folder."""
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    names = "ddim,dpm_solver_3,dpm_solver_fast,adams_data_4"
    options = ["--samples", 2, "--seed", 3, "--schedule", "edm", "--grid", "logsnr", "--out", out]
    return call("compare", "--solvers", names, "--calls", "2,5,10", *options), out


def test_compare_prints_a_row_per_solver(compared):
    result, _ = compared
    assert result.exit_code == 0, result.output
    assert re.search(r"calls +2 +5 +10", result.output)
    assert re.search(r"ddim +\d\.\de[+-]\d\d +\d\.\de[+-]\d\d +\d\.\de[+-]\d\d\s", result.output)
    assert re.search(r"dpm_solver_3 +- +\d\.\de[+-]\d\d \(3\) +\d\.\de[+-]\d\d \(9\)", result.output)
    assert re.search(r"dpm_solver_fast( +\d\.\de[+-]\d\d){3}\s", result.output)


def test_compare_writes_pictures_and_records(compared):
    result, out = compared
    assert {path.name for path in out.iterdir()} == {"digits.png", "errors.png", "records.jsonl"}
    assert all(name in result.stderr for name in ("digits.png", "errors.png", "records.jsonl"))
    assert shows_something(out / "digits.png")
    assert shows_something(out / "errors.png")


def test_records_hold_the_error_against_the_exact_flow(compared):
    records = [json.loads(line) for line in (compared[1] / "records.jsonl").read_text().splitlines()]
    runs = {(record["solver"], record["calls"]): record for record in records}
    assert len(runs) == len(records) == 3 * 4 - 2  # neither dpm_solver_3 nor adams_data_4 fits in 2 calls
    schedule = sv.EDM()
    x = 80.0 * sv.noise.per_sample(3, range(2)).initial(1, 8, 8, dtype=torch.float64)
    exact = digits().flow(x, schedule, schedule.start, schedule.stop)
    for name, build in {"ddim": sv.ddim, "dpm_solver_fast": None}.items():
        plan = build(schedule, sv.logsnr(schedule, 10)) if build else sv.dpm_solver_fast(schedule, 10)
        each = (sv.run(plan, digits().model(schedule), x) - exact).flatten(1).square().mean(1)
        record = runs[name, 10]
        assert record["error"] == pytest.approx(each.mean().sqrt().item(), rel=1e-9)
        assert record["median_error"] == pytest.approx(each.sqrt().min().item(), rel=1e-9)
        assert record["error"] != pytest.approx(1.001 * each.mean().sqrt().item(), rel=1e-9)
    record = runs["adams_data_4", 10]
    assert (record["nfe"], record["samples"], record["seed"]) == (10, 2, 3)
    assert (record["model"], record["schedule"], record["grid"]) == ("digits", "edm", "logsnr")
    assert record["seconds"] > 0
    assert {"torch", "solvers", "python"} <= record.keys()


@pytest.mark.parametrize("name", cli.SOLVERS)
def test_a_plan_makes_the_calls_that_fit(name):
    schedule = sv.VP()
    for calls in (1, 2, 3, 4, 5, 6, 7, 12, 19):
        plan = comparison.within(name, schedule, sv.logsnr, calls)
        if plan is None:
            method = METHODS[name]
            assert calls < max(method.nfe(1), method.calls_per_step)  # one step is as dear as that
        else:
            assert plan.nfe <= calls
            more = comparison.within(name, schedule, sv.logsnr, calls + 1)
            assert more is not None
            assert more.nfe >= plan.nfe
    step = 1 if name == comparison.FAST or name.startswith("recommended") else METHODS[name].calls_per_step
    assert all(
        comparison.within(name, schedule, sv.logsnr, calls).nfe > calls - step - 6 * (calls == 48)
        for calls in (12, 24, 48, 96)
    )


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    out = tmp_path_factory.mktemp("laws")
    names = "ddpm,analytic_ddpm,sa_solver,ancestral_2s,recommended"
    return call(
        "compare",
        "--stochastic",
        "--solvers",
        names,
        "--calls",
        "5,10",
        "--seed",
        2,
        "--samples",
        3,
        "--out",
        out,
    ), out


def test_the_stochastic_family_is_compared_by_its_exact_law(laws):
    result, out = laws
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"digits.png", "errors.png", "records.jsonl"}
    assert shows_something(out / "digits.png")
    assert shows_something(out / "errors.png")
    assert re.search(r"ancestral_2s +\d\.\de-\d\d \(4\) +\d\.\de-\d\d\s", result.output)
    assert "Wasserstein-2 distance of the sampler's exact law, per element" in result.words
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    runs = {(record["solver"], record["calls"]): record for record in records}
    data, schedule = digits().moments, sv.VP()
    times = sv.logsnr(schedule, 10)
    gamma = sv.gaussian_gamma(data.variances.clamp(min=1e-12))
    for name, plan in {
        "ddpm": sv.ddpm(schedule, times),
        "analytic_ddpm": sv.analytic_dpm(schedule, times, gamma),
    }.items():
        exact = data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
        assert runs[name, 10]["error"] == pytest.approx(wasserstein2(law(plan, data), exact) / 8, rel=1e-9)
    assert runs["analytic_ddpm", 10]["error"] < runs["ddpm", 10]["error"]


@pytest.fixture(scope="module")
def tolerances(tmp_path_factory):
    out = tmp_path_factory.mktemp("adaptive")
    names = "adams,bosh3_t,recommended"
    options = ("--solvers", names, "--calls", "6,12", "--samples", 2, "--out", out)
    return call("compare", "--adaptive", *options), out


def test_adaptive_solvers_are_compared_by_the_calls_that_an_error_costs(tolerances):
    result, out = tolerances
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"errors.png", "records.jsonl"}
    assert shows_something(out / "errors.png")
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    runs = {(record["solver"], record.get("tolerance", record["calls"])): record for record in records}
    noise = sv.noise.per_sample(0, range(2)).initial(1, 8, 8, dtype=torch.float64)
    x = sv.VP().sigma(torch.tensor(1.0, dtype=torch.float64)) * noise
    found = sv.adaptive(digits().model(sv.VP()), sv.VP(), x, rtol=1e-2, atol=1e-2)
    assert runs["adams", 1e-2]["nfe"] == found.nfe.double().mean()
    assert runs["recommended", 12]["nfe"] == 12
    assert runs["adams", 1e-4]["error"] < 1e-3 < runs["adams", 1e-1]["error"]
    assert re.search(r"error +0.1 +0.01 +0.001 +0.0001", result.output)
    assert re.search(r"adams +\d+ +\d+ +\d+", result.output)
    assert "Calls of a sample, in the mean" in result.words


def test_adaptive_solvers_want_their_option_and_laws_are_another_comparison():
    assert call("compare", "--solvers", "dopri5_t").exit_code == 2
    result = call("compare", "--adaptive", "--stochastic")
    assert result.exit_code == 2
    assert "--adaptive: it has no use with --stochastic" in result.words


def test_all_solvers_are_those_of_the_comparison(monkeypatch, tmp_path):
    asked = {}

    def stop(names, *rest):
        asked["names"] = names
        raise ValueError("enough")

    monkeypatch.setattr(compare, "candidates", stop)
    for options in ((), ("--stochastic",)):
        call("compare", "--solvers", "all", *options, "--out", tmp_path)
        assert asked["names"] == ([*comparison.BUILDS, comparison.FAST] if options else cli.SOLVERS)


def test_stochastic_solvers_without_their_option_or_with_a_model_are_refused(mine):
    result = call("compare", "--solvers", "ddim,ddpm")
    assert result.exit_code == 2
    assert (
        "ddpm is stochastic: no run of it has an exact answer; compare the laws with --stochastic"
        in result.words
    )
    for option, value in (("--error", "rms"), ("--reference-calls", 30)):
        assert (
            f"{option}: it has no use with --stochastic"
            in call("compare", "--stochastic", option, value).words
        )
    result = call("sample", "--solver", "analytic_ddim", "--model", "my_model:load")
    assert "analytic_ddim needs gamma of your data" in result.words
    result = call("compare", "--stochastic", "--model", "my_model:load")
    assert result.exit_code == 2
    assert "it has no use with --stochastic" in result.words


def test_sample_draws_the_noise_of_a_stochastic_solver_from_the_seed(tmp_path):
    for seed in (3, 4):
        assert (
            call(
                "sample",
                "--solver",
                "sa_solver",
                "--steps",
                6,
                "--samples",
                2,
                "--seed",
                seed,
                "--out",
                tmp_path / str(seed),
            ).exit_code
            == 0
        )
    schedule = sv.VP()
    x = sv.noise.per_sample(3, range(2)).initial(1, 8, 8, dtype=torch.float64)
    plan = sv.sa_solver(schedule, sv.angle(schedule, 6))
    expected = sv.run(
        plan, digits().model(schedule), schedule.sigma(torch.tensor(1.0, dtype=torch.float64)) * x, noise=3
    )
    drawn = [np.load(tmp_path / str(seed) / "samples.npy") for seed in (3, 4)]
    assert np.array_equal(drawn[0], expected.numpy())
    assert not np.allclose(drawn[0], drawn[1])


def test_compare_takes_the_users_model(mine):
    result = call(
        "compare",
        "--model",
        "my_model:load",
        "--solvers",
        "ddim,dpm_solver_pp_2m",
        "--calls",
        "10,20",
        "--grid",
        "logsnr",
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in (mine / "results").iterdir()} == {"errors.png", "records.jsonl"}
    records = [json.loads(line) for line in (mine / "results/records.jsonl").read_text().splitlines()]
    import my_model

    model, x, schedule = my_model.load()
    exact = my_model.DATA.flow(x, schedule, schedule.start, schedule.stop)
    for record, build in zip(records, [sv.ddim, sv.ddim, sv.dpm_solver_pp, sv.dpm_solver_pp], strict=True):
        x_end = sv.run(build(schedule, sv.logsnr(schedule, record["calls"])), model, x)
        error = (x_end - exact).square().mean().sqrt().item()
        assert 0 < record["resolution"] < 0.1 * error
        assert record["error"] == pytest.approx(error, abs=record["resolution"])


def test_errors_that_the_fine_run_cannot_see_are_shown_as_bounds(mine):
    options = ["--calls", "96", "--reference-calls", 12, "--solvers", "dpm_solver_3", "--error", "rms"]
    result = call("compare", "--model", "my_model:load", *options)
    assert re.search(r"dpm_solver_3 +<\d+e-\d\d\s", result.output)
    assert shows_something(mine / "results/errors.png")


@pytest.mark.parametrize(
    "grid", ["trailing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("leading", "linspace"))]
)
def test_a_solver_that_cannot_stand_on_the_grid_is_left_out(grid, tmp_path):
    options = ["--schedule", "ddpm", "--grid", grid, "--calls", "6", "--samples", 1, "--out", tmp_path]
    options += ["--solvers", "ddim,dpm_solver_fast,dpm_solver_pp_2s"]
    result = call("compare", *options)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if "left out" in line]
    assert len(notes) == 1
    assert notes[0].startswith("solvers: dpm_solver_fast is left out: it stands on a grid of its own")
    assert re.search(r"dpm_solver_fast +-\s", result.stdout)
    assert re.search(r"dpm_solver_pp_2s +\d\.\de", result.stdout)
    assert f"median of 1 sample, against the exact answer (known to 1e-11), on grid {grid}." in result.words


def test_the_default_grid_is_that_of_sample(mine):
    for schedule in (sv.VP(), sv.EDM(), sv.Flow(), sv.Discrete.linear(20)):
        times = usual(schedule)(schedule, 4)
        seen = []
        model = sv.Model(
            lambda x, t, seen=seen: seen.append(t[0].item()) or x, predicts="data", label=lambda t: t
        )
        sv.sample(model, torch.ones(1, 2, dtype=torch.float64), schedule, steps=4)
        assert seen == times[:-1].tolist()
    result = call("compare", "--model", "my_model:flow", "--calls", "6,12")
    assert result.exit_code == 0, result.output
    assert "solvers: dpm_solver_3 is left out: the noise form cannot start at alpha = 0" in result.stderr
    records = [json.loads(line) for line in (mine / "results/records.jsonl").read_text().splitlines()]
    assert {record["grid"] for record in records} == {"angle"}
    assert "Grid: angle\n" in call("sample", "--model", "my_model:flow").stderr
    plan = call("plan", "--schedule", "ddpm", "--steps", 3)
    schedule = sv.Discrete.linear()
    assert plan.stderr == "Grid: angle_levels\n"
    assert plan.stdout == f"{sv.dpm_solver_pp(schedule, sv.angle_levels(schedule, 3))}\n"


def test_a_network_of_whole_steps_is_held_against_a_run_on_its_levels(mine):
    result = call("compare", "--model", "my_model:whole_steps", "--calls", "6,12", "--reference-calls", 100)
    assert result.exit_code == 0, result.output
    assert "against a fine run of 40 calls (known to" in result.words
    assert re.search(r"dpm_solver_3 is left out: step [\d.]+ lies between two levels", result.stderr)
    records = [json.loads(line) for line in (mine / "results/records.jsonl").read_text().splitlines()]
    stepwise = {"ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m_ramp", "deis_t_3_ramp", "unipc_3_ramp"}
    assert {record["solver"] for record in records} == {
        *stepwise,
        "recommended",
        "adams_velocity_3_ramp",
        "ipndm",
    }
    assert {record["reference"] for record in records} == {"a fine run of 40 calls"}


def test_a_solver_is_left_out_where_it_does_not_fit(mine):
    options = ["--solvers", "ddim", "--calls", "6,50"]
    result = call("compare", "--model", "my_model:whole_steps", *options)
    assert "solvers: ddim is left out at 50 calls: steps = 50: expected at most 40" in result.stderr
    assert re.search(r"ddim +\d\.\de-\d\d +-\s", result.stdout)


def test_both_names_of_a_method_are_taken(tmp_path):
    plans = [call("plan", option, "ddim", "--steps", 3).stdout for option in ("--method", "--solver")]
    assert plans[0] == plans[1] != ""
    assert call("order", "--solver", "ddim", "--quiet").exit_code == 0
    options = ["--steps", 1, "--samples", 1, "--quiet", "--out", tmp_path]
    assert call("sample", "--method", "ddim", *options).exit_code == 0


def texts(figure):
    """Every text of a figure, with where it is drawn as a share of the figure's width."""
    figure.draw_without_rendering()
    width = figure.bbox.width
    found = [text for text in figure.findobj(Text) if text.get_text().strip()]
    return {text.get_text(): [edge / width for edge in text.get_window_extent().intervalx] for text in found}


@pytest.mark.parametrize("count", [1, 5])
def test_the_words_of_a_picture_are_not_clipped(count):
    x = torch.zeros(count, 1, 8, 8)
    fine = "a fine run of 600 calls\n(known to 1e-09)"
    title = "From the same noise by 12 network calls, best solver first"
    gallery = figures.gallery({fine: x, "dpm_solver_multistep_3": x}, title, ["error", "<1e-09"])
    sheet = figures.sheet(x, "dpm_solver_multistep_3, 100 network calls, grid quadratic")
    for drawn, least in ((gallery, 5), (sheet, 1)):
        assert len(texts(drawn)) >= least
        assert all(0 <= low < high <= 1 for low, high in texts(drawn).values())


def test_only_the_digits_are_drawn_as_ink(monkeypatch, mine):
    x = torch.ones(1, 1, 8, 8)
    for ink, shade in ((False, 1.0), (True, 0.0)):
        image = figures.sheet(x, "", ink=ink).axes[0].get_images()[0].get_array()
        assert (np.asarray(image) == shade).all()
    drawn = []
    sheet = figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda *a, ink: drawn.append(ink) or sheet(*a, ink=ink))
    call("sample", "--steps", 1, "--samples", 1)
    call("sample", "--steps", 1, "--samples", 1, "--model", "my_model:whole_steps")
    assert drawn == [True, False]


def test_every_solver_has_a_line_of_its_own():
    setting = {"calls": 6, "nfe": 6, "error": 0.1, "resolution": 1e-3, "reference": "a fine run of 9 calls"}
    setting |= {"model": "m", "schedule": "s", "grid": "g", "samples": 1}
    figure = figures.work_precision([{"solver": name, **setting} for name in cli.SOLVERS], "error", "error")
    lines = figure.axes[0].get_lines()
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(styles) == len(cli.SOLVERS)
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("Error against a fine run of 9 calls (known to 1e-03)\n")
    assert title.endswith("1 sample")


def test_compare_draws_the_users_images_and_takes_the_first_samples(mine):
    result = call(
        "compare", "--model", "my_model:pictures", "--solvers", "ddim", "--calls", "4", "--samples", 3
    )
    assert result.exit_code == 0, result.output
    assert shows_something(mine / "results/images.png")
    assert json.loads((mine / "results/records.jsonl").read_text())["samples"] == 3


def test_sample_writes_what_run_gives(tmp_path):
    options = ["--steps", 4, "--samples", 5, "--seed", 2, "--out", tmp_path]
    result = call("sample", "--solver", "dpm_solver_2", "--schedule", "ddpm", "--grid", "trailing", *options)
    assert result.exit_code == 0, result.output
    schedule = sv.Discrete.linear()
    x = sv.noise.per_sample(2, range(5)).initial(1, 8, 8, dtype=torch.float64)
    x = schedule.sigma(torch.tensor(1.0, dtype=torch.float64)) * x
    plan = sv.dpm_solver(schedule, sv.trailing(schedule, 4), order=2)
    expected = sv.run(plan, digits().model(schedule), x)
    assert_close(torch.from_numpy(np.load(tmp_path / "samples.npy")), expected, rtol=0, atol=1e-12)
    assert shows_something(tmp_path / "samples.png")


def test_sample_of_a_model_without_images_is_an_array_alone(mine):
    assert call("sample", "--model", "my_model:load", "--quiet").exit_code == 0
    assert [path.name for path in (mine / "results").iterdir()] == ["samples.npy"]
    assert np.load(mine / "results/samples.npy").shape == (5, 3)


def test_plan_prints_and_saves(tmp_path):
    file = tmp_path / "new" / "folder" / "plan.json"
    result = call("plan", "--method", "dpm_solver_pp_3m", "--steps", 5, "--save", file)
    schedule = sv.VP()
    plan = METHODS["dpm_solver_pp_3m"].build(schedule, sv.angle(schedule, 5))
    assert result.exit_code == 0
    assert result.stdout == f"{plan}\n"
    assert sv.Plan.load(file) == plan


def test_order_measures_what_is_declared():
    result = call("order", "--method", "dpm_solver_pp_2m", "--quiet")
    assert result.exit_code == 0
    assert re.search(r"dpm_solver_pp_2m +1 +2 +[12]\.\d\d +[12]\.\d\d", result.output)


def test_order_refuses_a_wrong_declaration(monkeypatch):
    monkeypatch.setattr(cli, "METHODS", {"boast": Method(METHODS["ddim"].build, 2, 1)})
    monkeypatch.setattr(cli, "SDES", {"brag": Method(SDES["ddpm"].build, 2, 1)})
    result = call("order", "--quiet")
    assert result.exit_code == 1
    assert re.search(r"brag +1 +2 +(0\.9\d|1\.0\d) +(0\.9\d|1\.0\d)", result.output)
    assert re.search(r"boast +1 +2 +(0\.99|1\.00) +(0\.99|1\.00)", result.output)
    assert (
        result.stderr
        == "solvers: the measured order falls short of the declared one: boast (even), boast (uneven), brag (even), brag (uneven)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["compare", "--solvers", "ddim,dpm_solver2"],
            "--solvers: 'dpm_solver2' is unknown; did you mean dpm_solver_2?",
        ),
        (
            ["compare", "--solvers", "xyz"],
            "--solvers: 'xyz' is unknown; expected one of recommended, recommended_asinh, ddim, dpm_solver_1",
        ),
        (["compare", "--schedule", "cosin"], "--schedule: 'cosin' is unknown; did you mean cosine?"),
        (["compare", "--grid", "log-snr"], "--grid: 'log-snr' is unknown; did you mean logsnr?"),
        (["compare", "--error", "mean"], "--error: 'mean' is unknown; did you mean median?"),
        (["compare", "--calls", "5,0"], "--calls: '5,0': expected whole numbers above 0, e.g. 6,12,24"),
        (["compare", "--calls", "ten"], "--calls: 'ten': expected whole numbers above 0"),
        (
            ["compare", "--solvers", "dpm_solver_3", "--calls", "1,2"],
            "not one step of dpm_solver_3 fits in 2 calls",
        ),
        (["compare", "--samples", "0"], "--samples"),
        (["compare", "--model", "my_model:load", "--seed", "1"], "leave out --schedule and --seed"),
        (["compare", "--model", "my_model"], "expected module:function, e.g. my_model:load"),
        (
            ["compare", "--model", "my_model:lod"],
            "module 'my_model' has no function 'lod'; expected module:function",
        ),
        (
            ["compare", "--model", "no_such_module:load"],
            "No module named 'no_such_module'; expected module:function",
        ),
        (["sample", "--solver", "euler"], "--solver: 'euler' is unknown"),
        (["plan", "--method", "dpmpp_2m"], "did you mean dpm_solver_pp_2m?"),
        (["order", "--method", "all,ddim"], "--method: 'all' is unknown"),
        (["plam"], "No such command 'plam'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2_and_says_what_to_write(arguments, words, mine):
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in result.words
    assert not (mine / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--grid", "trailing"], "has no levels to stand on: expected a Discrete"),
        (
            ["compare", "--model", "my_model:wrong"],
            "my_model:wrong returned (VP): expected (model, x, schedule)",
        ),
        (["compare", "--model", "my_model:nan"], "the model's output is not finite in call 0"),
        (["sample", "--model", "my_model:fragile"], "raised by the model in call 0 of 20, t = 1"),
        (
            ["sample", "--model", "my_model:asserts"],
            "AssertionError: four dimensions please; raised by the model in call 0",
        ),
        (
            ["compare", "--model", "my_model:breaks"],
            "KeyError: 'weights'; raised by my_model:breaks (solvers --traceback ... shows where)",
        ),
        (["sample", "--model", "my_model:no_schedule"], "expected a schedule, e.g. sv.VP()"),
        (
            ["compare", "--model", "my_model:flow", "--grid", "logsnr"],
            "no solver is left on grid logsnr: start = 1 has alpha = 0",
        ),
        (
            ["compare", "--solvers", "dpm_solver_fast", "--grid", "uniform"],
            "compare it on --grid logsnr",
        ),
        (["plan", "--save", "my_model.py/plan.json"], "my_model.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failure_is_one_line_and_exit_code_1(arguments, words, mine):
    result = call(*arguments, *(["--quiet"] if arguments[0] != "plan" else []))
    assert result.exit_code == 1
    assert result.stderr.startswith("solvers: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (mine / "results").exists() or not list((mine / "results").iterdir())


def test_traceback_shows_where_an_error_comes_from(mine):
    result = call("--traceback", "sample", "--model", "my_model:fragile", "--quiet")
    assert isinstance(result.exception, RuntimeError)
    assert "my_model.py" in {Path(frame.filename).name for frame in extract_tb(result.exc_info[2])}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    def breaks(path):
        path.write_text("half")
        raise OSError("no space left")

    (tmp_path / "records.jsonl").write_text("before")
    with pytest.raises(OSError, match="no space"):
        cli.write(tmp_path, {"records.jsonl": breaks}, quiet=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("name", ["compare", "sample", "order", "plan"])
def test_help_teaches(name):
    command = get_command(cli.app).commands[name]
    assert f"Example:  `solvers {name} " in command.help
    assert all(option.help for option in command.params)
    shown = call(name, "--help").words
    assert all(option.opts[0] in shown for option in command.params)
    example = command.help.split("`")[1].split()[1:]
    with command.make_context(name, example[1:]):  # the example parses
        pass


def test_the_labels_of_a_figure_do_not_overlap():
    heights = sorted([0.1, 0.1, 0.11, 0.5, 0.51, 0.52, 0.9])
    spread = np.array(figures._spread(heights, 0.04))
    assert (np.diff(spread) > 0.04 - 1e-12).all()
    assert abs(spread - heights).max() < 0.04 + 1e-12
    assert spread[-1] == 0.9


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_without_an_optional_package_the_error_names_the_extra(missing, monkeypatch):
    for module in [
        m for m in sys.modules if m.split(".")[0] == missing or m in ("solvers.cli", "solvers.figures")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(sv, "cli")
    monkeypatch.delattr(sv, "figures")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        SystemExit, match=rf"solvers: the command needs {missing}.*pip install 'diffusion-solvers\[cli\]'"
    ):
        __main__.main()


def test_python_m_solvers_is_the_command(tmp_path):
    command = [sys.executable, "-m", "solvers", "plan", "--method", "ddim", "--steps", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(sv.__file__).parents[1], check=True
    )
    assert done.stdout.startswith("3 calls, data form")
