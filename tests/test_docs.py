"""What the README says is so: its code runs, its commands are CI's, its table is the table of methods."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_of_the_readme_runs_and_prints_what_it_shows(capsys):
    torch.manual_seed(0)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    printed = capsys.readouterr().out
    (shown,) = blocks("text")
    assert shown in printed
    assert names["samples"].shape == (4, 8)


def test_ci_runs_the_test_command_of_the_readme():
    sample, test = (command.strip() for command in blocks("bash"))
    assert test in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert f"- run: {sample}" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_every_link_of_the_documentation_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
