"""The benchmarks of one machine at their smallest size, on a CPU: every part writes its records, and the report is made of them."""

import re
import sys
import warnings
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import solvers as sv

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, imported as `python benchmarks/...` finds them, and forgotten afterwards."""
    names = ("records", "lines", "tables", "report", "device", "growth", "device_step", "end_to_end", "gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: import_module(name) for name in names})
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(scripts, tmp_path_factory):
    pytest.importorskip("diffusers")
    out = tmp_path_factory.mktemp("gpu")
    scripts.gpu.main(["--size", "test", "--out", str(out), "--steps", "2", "--threads", "1"])
    return out


@pytest.fixture
def case(scripts):
    """A network without diffusers, of which a graph is asked."""
    network = scripts.end_to_end.Network(lambda: None, (3, 5))
    net = torch.nn.Linear(5, 5).requires_grad_(False).eval()

    class Net(torch.nn.Module):
        def forward(self, x, t, return_dict):
            return (net(x),)

    return scripts.end_to_end.Case(
        "linear", network, Net, 2, "dpm_solver_pp_2m", "graph", 3, torch.float32, CPU
    )


def record(scripts, **values):
    """A run end to end of a large network, replayed."""
    about = {
        "network": "a",
        "parameters": 3 * 10**8,
        "method": "ddim",
        "executor": "graph",
        "dtype": "bfloat16",
    }
    numbers = {
        "shape": [2, 4, 8, 8],
        "nfe": 20,
        "seconds": 1.0,
        "bare": 1.0,
        "ratio": 1.0,
        "rounds": 3,
        "seed": 0,
    }
    counts = {"syncs": 1, "loop_syncs": None, "extra_states": 3.0}
    return scripts.records.EndToEnd(**about | numbers | counts | values)


def test_every_part_writes_records_with_the_declared_fields(scripts, folder):
    records = scripts.records.read(folder / "cpu.jsonl")
    kinds = {type(r).__name__ for r in records}
    assert kinds == {"Build", "Step", "Growth", "WorkPrecision", "EndToEnd"}
    for r in records:
        assert set(r.versions) >= {"python", "torch", "solvers", "threads", "device", "commit"}
        for field in fields(r):
            if field.type in (int, float, str):
                assert isinstance(getattr(r, field.name), field.type), field.name
    runs = [r for r in records if type(r).__name__ == "EndToEnd"]
    assert {(r.shape[0], r.executor) for r in runs} >= {(1, "eager"), (2, "eager")}
    assert len({r.network for r in runs}) == 2
    assert all(0.2 < r.ratio < 5 and r.nfe == 2 and r.syncs is None for r in runs)


def test_the_report_has_every_part_and_its_figures(folder):
    from matplotlib.image import imread

    page = (folder / "cpu.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {f"cpu_{name}.png" for name in ("step", "builds", "growth", "end_to_end", "grids")} <= set(images)
    assert {path.name for path in folder.glob("*.png")} == set(images)
    for name in images:
        assert imread(folder / name).std() > 0.01  # something is drawn
    assert page.count("\n## ") == 6
    for shown in ("| UNet, tiny |", "`dpm_solver_fast`", "| run, eager | steps | 2 to 8 |", "| `unipc_2` |"):
        assert shown in page
    graph = "graph: run / graph of the bare calls of a small network"
    assert f"| {graph} | not measured | 1.05 | 0 |  |" in page


def test_a_part_that_fails_leaves_the_others_their_records(scripts, tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scripts.device_step, "measure", broken)
    options = ["--size", "test", "--out", str(tmp_path), "--parts", "step", "growth", "--threads", "1"]
    with pytest.raises(SystemExit, match=r"failed: the cost of a call at \(2, 3, 5\)"):
        scripts.gpu.main(options)
    assert "out of memory" in capsys.readouterr().err
    assert {type(r).__name__ for r in scripts.records.read(tmp_path / "cpu.jsonl")} == {"Growth"}
    assert "## How costs grow" in (tmp_path / "cpu.md").read_text()


def test_growth_alone_writes_runs_and_builds(scripts, tmp_path):
    path = tmp_path / "growth.jsonl"
    limits = ["--budget", "0.01", "--rounds", "3", "--largest", "10", "--methods", "ddim", "sa_solver"]
    scripts.growth.main(["--out", str(path), "--quantities", "steps", *limits])
    records = scripts.records.read(path)
    runs = [r for r in records if r.benchmark == "growth"]
    assert {(r.quantity, r.value, r.steps, r.shape[0]) for r in runs} == {("steps", 10, 10, 1)}
    built = [(r.method, r.steps) for r in records if r.benchmark == "build"]
    assert built == [("ddim", 20), ("sa_solver", 20), ("ddim", 10), ("sa_solver", 10)]


def test_the_history_that_grows_is_the_plans(scripts):
    for order in (1, 3, 6):
        assert scripts.growth.Case("history", order).plan.window == order
    assert scripts.growth.Case("batch", 4).shape == (4, 4, 64, 64)
    assert scripts.growth.Case("dimension", 256).shape == (16, 256)


def test_a_line_is_fitted_and_a_square_is_told_from_it(scripts):
    values = (10, 20, 50, 100, 1000)
    line = scripts.lines.fit((v, 3e-4 + 2e-6 * v) for v in values)
    assert (line.fixed, line.per_unit) == pytest.approx((3e-4, 2e-6), rel=1e-6)
    assert line.worst < 1e-6
    assert line.exponent < 1
    square = scripts.lines.fit((v, 1e-6 * v**2) for v in values)
    assert square.exponent == pytest.approx(2)
    assert square.worst > 0.5
    assert scripts.tables.fit_row(["", ""], [(v, 1e-6 * v**2) for v in values])[-1] == "no"
    assert scripts.lines.fit([(1, 5e-4), (2, -1e-9), (4, 5e-4)]).fixed == pytest.approx(5e-4)


def test_a_graph_is_held_against_a_graph_and_a_loop_that_was_not_captured_is_no_record(case, monkeypatch):
    def stub(captured):
        def compiled_sampler(plan, model, shape, dtype, device):
            run = lambda x, noise=None: sv.run(plan, model, x, noise)  # noqa: E731
            return type("Sampler", (), {"captured": captured, "__call__": lambda self, *given: run(*given)})()

        return compiled_sampler

    monkeypatch.setattr(sv, "compiled_sampler", stub(True), raising=False)
    found = case.measure(rounds=3, budget=1.0, seed=0)
    assert (found.executor, found.nfe, found.parameters, found.shape) == ("graph", 3, 0, [2, 3, 5])
    assert (found.syncs, found.loop_syncs, found.extra_states) == (None, None, None)
    monkeypatch.setattr(sv, "compiled_sampler", stub(False), raising=False)
    with pytest.raises(RuntimeError, match="not in a graph"):
        case.measure(rounds=3, budget=1.0, seed=0)


def test_waits_are_counted_and_told_apart_by_the_calls_around_them(scripts):
    def wait():
        warnings.warn(f"{scripts.device.WAITED} (Triggered internally at c10)", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = scripts.device.Waits(caught)
        wait()  # before the first call
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        seen.mark()
        wait()
        wait()
        seen.mark()
        wait()  # after the last
    assert (seen.total, seen.between) == (4, 2)
    assert scripts.device.Waits([]).between is None
    with scripts.device.waits(CPU) as seen:
        seen.mark()
    assert (seen.total, seen.between) == (None, None)


def test_targets_are_judged_by_the_largest_of_what_was_measured(scripts):
    good = record(scripts)
    large = "graph: run / bare calls of a large network"
    table = scripts.tables.target_table
    assert f"| {large} | 1.0000 | 1.01 | 1 | met |" in table([good])
    assert f"| {large} | 1.0200 | 1.01 | 2 | missed |" in table([good, replace(good, ratio=1.02)])
    small = "graph: run / graph of the bare calls of a small network"
    assert f"| {small} | 1.0400 | 1.05 | 1 | met |" in table([replace(good, ratio=1.04, parameters=10**7)])
    waits = "times the host waits for the device between the first call and the last"
    assert f"| {waits} | 1 | 0 | 1 | missed |" in table([replace(good, executor="eager", loop_syncs=1)])


def test_the_headline_compares_the_loops_of_every_shape(scripts):
    between = {"one torch.add_": 1e-6, "ideal single pass": 4e-6, "heun": 2e-6, "diffusers DPM++ 2": 3e-5}
    steps = [
        scripts.records.Step(name, shape, 4, seconds, seconds, seconds, 3, 0)
        for shape in ([1, 2], [3, 2])
        for name, seconds in (between | ({"ddim": 1e-6} if shape == [1, 2] else {})).items()
    ]
    table = scripts.tables.headline_table(steps).splitlines()
    assert table[0].endswith("| it / one torch.add_ | it / ideal single pass | diffusers DPM++ 2 / it |")
    assert table[2:] == [f"| ({batch}, 2) | heun | 2.00 | 0.50 | 15.0 |" for batch in (1, 3)]
