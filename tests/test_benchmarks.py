"""The benchmarks run at their smallest size: records have the declared fields, figures open as images."""

import re
import sys
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from itertools import pairwise, product
from math import log2
from pathlib import Path

import pytest
import torch

import solvers as sv
from reference import digits, kl, law, wasserstein2
from solvers.comparison import price

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("records", "peers", "step", "work_precision", "stochastic", "adaptive", "lines", "report")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules by name, imported as `python benchmarks/...` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: import_module(name) for name in SCRIPTS}
    for name, module in list(sys.modules.items()):  # what they import, too
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


LOOPS = (
    "ddim", "heun", "ddpm", "dpm_solver_pp_2m", "dpm_solver_pp_2m, fused=False", "k-diffusion dpmpp_2m",
    "k-diffusion dpmpp_2s_ancestral", "diffusers DPM++ 2", "diffusers Heun", "diffusers DDPM",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(scripts, tmp_path_factory):
    """One JSONL file of each kind."""
    folder = tmp_path_factory.mktemp("results")
    step, errors = folder / "step.jsonl", folder / "work_precision.jsonl"
    size = ["--shape", "2x3x5", "--calls", "4", "--rounds", "2"]
    scripts["step"].main(["--out", str(step), *size, "--loops", *LOOPS])
    chosen = [
        "--problems",
        "2-D mixture",
        "--schedules",
        "VP",
        "--grids",
        "logsnr",
        "karras",
        "--starts",
        "3",
    ]
    methods = ["ddim", "dpm_solver_1", "dpm_solver_3", "dpm_solver_pp_2m"]
    scripts["work_precision"].main(
        ["--out", str(errors), *chosen, "--methods", *methods, "--calls", "2", "8", "16", "--peers", "none"]
    )
    laws = folder / "stochastic.jsonl"
    chosen = ["--problems", "three variances", "digits", "--grids", "uniform", "--samples", "16"]
    names = ["ddpm", "analytic_ddpm", "analytic_ddpm, optimal trajectory", "sn_ddpm"]
    scripts["stochastic"].main(["--out", str(laws), *chosen, "--methods", *names, "--calls", "2", "6"])
    tolerances = folder / "adaptive.jsonl"
    names = ["adams", "bosh3, t"]
    scripts["adaptive"].main(
        ["--out", str(tolerances), "--problems", "1-D mixture", "--starts", "8", "--solvers", *names]
    )
    return step, errors, laws, tolerances


def test_records_have_the_declared_fields(scripts, results):
    for path, kind in zip(results, ("Step", "WorkPrecision", "Law", "Adaptive"), strict=True):
        declared = getattr(scripts["records"], kind)
        records = scripts["records"].read(path)
        assert records
        for record in records:
            assert type(record) is declared
            assert set(record.versions) >= {"python", "torch", "solvers", "threads", "device", "commit"}
            for field in fields(declared):
                if field.type in (int, float, str):
                    assert isinstance(getattr(record, field.name), field.type), field.name


def test_a_record_with_another_field_is_refused(scripts, results, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(results[0].read_text().replace('"nfe"', '"calls"', 1))
    with pytest.raises(TypeError, match="calls"):
        scripts["records"].read(path)


def test_the_ideal_pass_is_five_units_of_traffic_where_addcmul_is_four(scripts, results):
    records = {r.method: r for r in scripts["records"].read(results[0])}
    assert records.keys() >= {"one torch.add_", "ddim", "heun", "ddpm", "dpm_solver_pp_2m, fused=False"}
    ideal, measured = records["ideal single pass"], records["torch.addcmul_"]
    for time in ("seconds", "best", "between"):
        assert getattr(ideal, time) == pytest.approx(1.25 * getattr(measured, time), rel=1e-12)


def test_the_ratios_of_steps_are_of_the_loops_that_they_name(scripts):
    step, shape = scripts["step"], [1, 4, 64, 64]
    made = [("dpm_solver_pp_2m", 2.0), ("k-diffusion dpmpp_2m", 8.0), ("dpm_solver_pp_2m, fused=False", 5.0)]
    records = [scripts["records"].Step(name, shape, 4, 9.0, 3 * v, v, 2, 0, {}) for name, v in made]
    assert step.ratios(records) == [
        {
            "shape": tuple(shape),
            "method": "dpm_solver_pp_2m",
            "over": "k-diffusion dpmpp_2m",
            "between": 0.25,
            "whole": 0.25,
            "at most": 0.2,
        }
    ]
    assert {method for _, *pair, _ in step.TARGETS for method in pair} <= {*step.CHOSEN, step.IDEAL}


@pytest.mark.parametrize("name", ["heun", "k-diffusion dpm_2", "diffusers Heun"])
def test_stages_are_counted_as_calls_and_timed_by_whole_steps(scripts, name):
    """A step of two calls, 1 s and 3 s apart, is 2 s per call, and not the median 1 s."""
    step = scripts["step"]
    net, made = step.loops((2, 3), 7, [name], 0)
    if name not in made:
        pytest.skip("not installed")
    assert (made[name].calls, made[name].per_step) == (6, 2)
    assert step._time(made[name], net)[0] > 0
    run = partial(net.asked.extend, [0.0, 1.0, 4.0, 5.0, 8.0, 9.0])
    assert step._time(step.Loop(run, 6, 2), net)[1] == 2.0
    with pytest.raises(RuntimeError, match="6 calls were made: expected 5"):
        step._time(step.Loop(run, 5, 2), net)


# of the peers as they are, the slope of their error and by how much it may be missed: those of declared order 3 have 2, by half
# of a second difference that is missing or by their start (test_published.py); UniPC has one more than its number
K_DIFFUSION = {
    "euler": (1, 0.1), "heun": (2, 0.1), "dpm_2": (2, 0.2), "lms": (4, 0.3), "dpmpp_2s": (2, 0.2), "dpmpp_2m": (2, 0.2),
    "dpmpp_2m_sde, eta 0": (2, 0.2), "dpmpp_3m_sde, eta 0": (2, 0.2),
}  # fmt: skip
DIFFUSERS = {
    "DDIM": (1, 0.1), "Euler": (1, 0.1), "Heun": (2, 0.2), "DPM++ 1": (1, 0.1), "DPM++ 2": (2, 0.2), "DPM++ 3": (2, 0.5),
    "UniPC 2": (3, 0.3), "UniPC 3": (4, 0.6), "DEIS 3": (2, 0.6),
}  # fmt: skip
ROUNDED = ("UniPC 3", "DEIS 3")  # at 200 steps float32 shows; the error of DEIS rises


def slopes_of(records):
    """log2 of the ratio of errors, by method, as steps are doubled."""
    errors = {}
    for r in records:
        errors.setdefault(r.method, []).append(r.rmse)
    return {name: [log2(a / b) for a, b in pairwise(line)] for name, line in errors.items()}


@pytest.mark.slow
def test_peers_on_our_grids_have_the_order_that_they_have(scripts):
    script, peers = scripts["work_precision"], scripts["peers"]
    chosen = peers.found(f"k-diffusion {name}" for name in K_DIFFUSION)
    if not chosen:
        pytest.skip("k-diffusion is not installed")
    case = script.Case.of("2-D mixture", "VP", sv.VP(), 8, 0)
    slopes = slopes_of(script.k_diffusion(case, chosen, ["logsnr"], [128, 256]))
    for name, (order, margin) in K_DIFFUSION.items():
        assert slopes[f"k-diffusion {name}"] == pytest.approx([order], abs=margin), name


@pytest.mark.slow
def test_peers_on_levels_of_their_own_have_the_order_that_they_have(scripts):
    """Their first level is no tiny sigma here, down to which one step is never short; 50 to 100 steps, or to 200."""
    script, peers = scripts["work_precision"], scripts["peers"]
    betas = torch.linspace(1e-4, 0.02, 1000)
    betas[0] = 0.04
    chosen = {
        name: replace(peer, options={**peer.options, "trained_betas": betas.tolist()})
        for name, peer in peers.found(f"diffusers {name}" for name in DIFFUSERS).items()
    }
    if not chosen:
        pytest.skip("diffusers is not installed")
    slopes = slopes_of(script.diffusers("2-D mixture", chosen, [50, 100, 200], 32, 0))
    for name, (order, margin) in DIFFUSERS.items():
        slope = slopes[f"diffusers {name}"][0 if name in ROUNDED else 1]
        assert slope == pytest.approx(order, abs=margin), name
    assert slopes["diffusers DEIS 3"][1] < 0


def test_records_of_peers(scripts, tmp_path):
    """k-diffusion's samplers find what the same methods of ours find; a budget holds, whatever counts the calls."""
    path = tmp_path / "peers.jsonl"
    same = {"euler": "ddim", "heun": "heun", "dpmpp_2m": "dpm_solver_pp_2m", "dpmpp_2s": "dpm_solver_pp_2s"}
    names = [f"k-diffusion {name}" for name in same]
    names += ["diffusers DPM++ 2", "diffusers Heun", "torchdiffeq bosh3", "torchdiffeq rk4"]
    size = ["--problems", "2-D mixture", "--grids", "karras", "--starts", "3", "--calls", "3", "9", "24"]
    main = scripts["work_precision"].main
    main(["--out", str(path), *size, "--methods", *same.values(), "--peers", *names])
    records = {(r.schedule, r.method, r.grid, r.calls): r for r in scripts["records"].read(path)}
    assert all(r.nfe <= r.calls for r in records.values())
    if scripts["peers"].found(names[:1]):
        for (theirs, ours), schedule in product(same.items(), ("VP", "EDM")):
            one, other = (records[schedule, n, "karras", 24] for n in (f"k-diffusion {theirs}", ours))
            assert (one.nfe, one.order) == (other.nfe, other.order)
            assert one.rmse == pytest.approx(other.rmse, rel=1e-7)
    fixed = [r.nfe for r in records.values() if r.method == "torchdiffeq rk4"]
    assert set(fixed) == {8, 24}
    assert records["EDM", "torchdiffeq bosh3", "in angle", 24].rmse < 0.1
    assert not any(r.schedule == "EDM" for r in records.values() if r.grid == "own")


def test_without_peers_the_scripts_run_without_them(scripts, monkeypatch):
    assert scripts["peers"].found() != {}
    monkeypatch.setattr(scripts["peers"], "find_spec", lambda name: None)
    assert scripts["peers"].found() == {}
    _, made = scripts["step"].loops((2, 3), 4, ["ddim", "k-diffusion euler", "diffusers DDIM"], 0)
    assert [*made] == ["bare model", "one torch.add_", "torch.addcmul_", "ddim"]
    options = (["2-D mixture"], ["VP"], ["logsnr"], ["ddim"], [4], 2, 0)
    records = scripts["work_precision"].records(*options, peers=["k-diffusion euler", "diffusers DDIM"])
    assert [r.method for r in records] == ["ddim"]


def test_loading_k_diffusion_leaves_no_module_behind(scripts):
    if not scripts["peers"].found(["k-diffusion euler"]):
        pytest.skip("k-diffusion is not installed")
    before = dict(sys.modules)
    assert scripts["peers"].k_diffusion.__wrapped__().sample_euler
    assert {name for name in sys.modules if "k_diffusion" in name} <= before.keys()


def test_no_record_claims_more_calls_than_were_asked_for(scripts, results):
    records = scripts["records"].read(results[1])
    assert {r.calls for r in records if r.method == "dpm_solver_3"} == {
        8,
        16,
    }  # 2 calls are too few for a step
    assert all(r.nfe <= r.calls for r in records)
    assert {r.nfe for r in records if r.method == "dpm_solver_3"} == {6, 15}


def test_errors_fall_with_calls(scripts, results):
    for name in ("ddim", "dpm_solver_3", "dpm_solver_pp_2m"):
        chosen = [r for r in scripts["records"].read(results[1]) if (r.method, r.grid) == (name, "logsnr")]
        few, many = min(chosen, key=lambda r: r.nfe), max(chosen, key=lambda r: r.nfe)
        assert many.rmse < few.rmse / 2
        assert many.median < few.median / 2


def test_records_of_laws_are_the_laws(scripts, results):
    records = {(r.problem, r.method, r.calls): r for r in scripts["records"].read(results[2])}
    data = scripts["stochastic"].three()
    for calls in (2, 6):
        plan = sv.ddpm(sv.VP(), sv.uniform(sv.VP(), calls))
        exact = data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
        record = records["three variances", "ddpm", calls]
        assert record.kl == pytest.approx(kl(exact, law(plan, data)), rel=1e-9)
        assert record.distance == pytest.approx(wasserstein2(exact, law(plan, data)) / 3**0.5, rel=1e-9)
    at_six = {
        name: record.kl
        for (problem, name, calls), record in records.items()
        if (problem, calls) == ("three variances", 6)
    }
    assert (
        at_six["sn_ddpm"]
        < 1e-12
        < at_six["analytic_ddpm, optimal trajectory"]
        < at_six["analytic_ddpm"]
        < at_six["ddpm"]
    )
    digits = [record for (problem, *_), record in records.items() if problem == "digits"]
    assert {(record.method, record.kl, record.samples) for record in digits} == {
        (name, None, 16) for name in ("ddpm", "analytic_ddpm", "sn_ddpm")
    }
    assert all(record.distance > record.floor / 2 > 0 for record in digits)


def test_records_of_adaptive_runs_are_their_runs(scripts, results):
    records = scripts["records"].read(results[3])
    module, schedule = scripts["adaptive"], sv.VP()
    data = module.line()
    x = scripts["work_precision"].start(data, schedule, 8, 0)
    model = sv.Model(data.model(schedule, "velocity"), predicts="velocity", label=lambda t: t)
    found = sv.adaptive(model, schedule, x, rtol=1e-2, atol=1e-2)
    record = next(r for r in records if (r.solver, r.tolerance) == ("adams", 1e-2))
    assert (record.nfe, record.most) == (found.nfe.double().mean(), found.nfe.max())
    off = found.x - data.flow(x, schedule, schedule.start, schedule.stop)
    assert record.rmse == pytest.approx(off.square().mean().sqrt().item(), rel=1e-6)
    assert {r.solver for r in records if r.tolerance is None} > {"recommended, angle"}
    lines = scripts["lines"].adaptive_lines(records, "1-D mixture")
    assert lines["adams"][0][1] > 1e-2 > lines["adams"][-1][1]


def test_the_price_of_an_error_is_found_between_runs_and_where_it_is_reached_for_good():
    line = [(10, 1e-1), (20, 1e-3), (40, 3e-2), (80, 1e-4)]
    assert price(line, 1.0) == 10
    assert price(line[:2], 1e-2) == pytest.approx(10 * 2**0.5)
    assert 40 < price(line, 1e-2) < 80  # not where it is met by chance
    assert price(line, 1e-5) is None
    assert price([], 1e-2) is None


def test_the_quick_model_of_the_digits_is_the_exact_one(scripts):
    data, schedule = digits(), sv.VP()
    x = torch.randn(5, *data.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((5,), 0.4)
    alpha, sigma = (float(v(t[:1].double())) for v in (schedule.alpha, schedule.sigma))
    eps, square = scripts["stochastic"].Quick(data, moments=True)(x, t)
    assert torch.allclose(eps.double(), data.noise(x.double(), alpha, sigma), atol=1e-4)
    assert torch.allclose(square.double(), data.noise_square(x.double(), alpha, sigma), atol=1e-3)
    assert torch.equal(scripts["stochastic"].Quick(data)(x, t), eps)


def test_drawing_makes_images_and_fills_the_document(scripts, results, tmp_path):
    from matplotlib.image import imread

    document = tmp_path / "benchmarks.md"
    places = [
        f"<!-- report.py: begin {name} -->\nold\n<!-- report.py: end {name} -->"
        for name in (
            "targets",
            "headline",
            "step",
            "work_precision",
            "ratios",
            "laws",
            "samples",
            "prices",
            "kept",
        )
    ]
    document.write_text("\n\n".join(["# Title", *places, "last line"]))
    scripts["report"].main(
        [*map(str, results), "--out", str(tmp_path), "--into", str(document), "--columns", "8", "16"]
    )

    figures = {path.stem: imread(path) for path in tmp_path.glob("*.png")}
    assert set(figures) == {"step", "work_precision_vp", "grids", "laws_uniform", "samples", "adaptive"}
    for image in figures.values():
        assert image.shape[0] > 300
        assert image.shape[1] > 300
        assert image.std() > 0.01  # something is drawn
    text = document.read_text()
    assert "old" not in text
    assert "| it / ideal single pass |" in text
    assert re.search(
        r"median: method .*\n.*\n\| `[^`]+` \| `\w+` \| 1(\.\d+)? ", text
    )  # the best, over the best
    assert "| `dpm_solver_pp_2m` |" in text
    assert text.endswith("last line")


def test_a_document_without_a_place_is_an_error(scripts):
    with pytest.raises(ValueError, match="begin step"):
        scripts["report"].insert("no place here", "step", "table")
