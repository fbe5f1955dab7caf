"""The benchmarks run at their smallest size: records have the declared fields, figures open as images."""

import re
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

import solvers as sv
from reference import digits, kl, law, wasserstein2
from solvers.comparison import price

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("records", "step", "work_precision", "stochastic", "adaptive", "report")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules by name, imported as `python benchmarks/...` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        del sys.modules[name]


@pytest.fixture(scope="module")
def results(scripts, tmp_path_factory):
    """One JSONL file of each kind."""
    folder = tmp_path_factory.mktemp("results")
    step, errors = folder / "step.jsonl", folder / "work_precision.jsonl"
    scripts["step"].main(["--out", str(step), "--shape", "2x3x5", "--calls", "4", "--rounds", "2"])
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
        ["--out", str(errors), *chosen, "--methods", *methods, "--calls", "2", "8", "16"]
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
    lines = scripts["report"].lines_of(records, "1-D mixture")
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
        for name in ("step", "work_precision", "ratios", "laws", "samples", "prices", "kept")
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
    assert "ideal single pass" in text
    assert re.search(
        r"median: method .*\n.*\n\| `\w+` \| `\w+` \| 1(\.\d+)? ", text
    )  # the best, over the best
    assert "| `dpm_solver_pp_2m` |" in text
    assert text.endswith("last line")


def test_a_document_without_a_place_is_an_error(scripts):
    with pytest.raises(ValueError, match="begin step"):
        scripts["report"].insert("no place here", "step", "table")
