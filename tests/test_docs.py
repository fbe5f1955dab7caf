"""What the README says is so: its code runs, its commands are CI's, its table is the table of methods."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import solvers as sv
from solvers.methods import METHODS, SDES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_two_lines_of_every_codebase_are_executed():
    """Each adapter's page has its code as examples, and so is among the pages that run."""
    calls = {
        "diffusers": ["from_diffusers(", "SolversScheduler.from_config("],
        "k-diffusion": ["sampler(", "from_denoiser("],
        "networks": ["from_edm(", "from_score(", "from_flow("],
    }
    for page, shown in calls.items():
        code = "".join(blocks("python", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")))
        assert all(call in code for call in shown), page


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    if "diffusers\n" in text:
        pytest.importorskip("diffusers")
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks("python", text):
            exec(block, names)
    printed = capsys.readouterr().out
    for shown in blocks("text", text):
        assert shown in printed
    if "samples" in names:
        assert names["samples"].isfinite().all()


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_what_docstrings_and_plans_say():
    generator = loaded(ROOT / "docs/methods.py")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run python docs/methods.py"


@pytest.mark.parametrize("name", METHODS | SDES)
def test_a_docstring_answers_the_four_questions_as_the_plan_does(name):
    """Order; calls per step; ODE; form: of the function, and true of every entry of the table that it makes."""
    generator, method = loaded(ROOT / "docs/methods.py"), (METHODS | SDES)[name]
    function, _ = generator.parts(method.build)
    order, calls, kind, form = generator.sentence(function)
    plan = method.build(sv.VP(), sv.logsnr(sv.VP(), 6))
    orders = re.findall(r"\d", order)
    assert order.startswith("Order")
    assert str(method.order) in orders or " p" in order or "tableau" in order or "the method" in order
    assert "SDE" in kind if name in SDES else kind.startswith("ODE")
    assert plan.is_stochastic == (name in SDES)
    assert plan.predicts in form or form == "the method's form"
    assert "per step" in calls
    if "as many" not in calls and "many as" not in calls:
        assert str(method.calls_per_step) in calls
    assert generator.source(function)


def test_ci_runs_the_test_command_of_the_readme():
    sample, test = (command.strip() for command in blocks("bash"))
    assert test in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert f"- run: {sample}" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_every_link_of_the_documentation_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
