"""The reference has every public name once, and the pages build without a warning."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import reference
import solvers as sv

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^\.\. auto(\w+):: ([\w.]+)", API, flags=re.MULTILINE)
MODULES = {name for name in sv.__all__ if isinstance(getattr(sv, name), ModuleType)}


def test_the_reference_has_every_public_name_once():
    """Of a public module either all by automodule, or names of it one by one."""
    names = Counter(name.removeprefix("solvers.") for _, name in DOCUMENTED if name.startswith("solvers."))
    assert set(names.values()) == {1}
    assert {name for name in names if "." not in name} - MODULES == set(sv.__all__) - MODULES
    assert {name.split(".")[0] for name in names} >= MODULES


def test_the_reference_names_every_tableau():
    kinds = (sv.tableaux.Tableau, sv.tableaux.Pair)
    named = {name for name, value in vars(sv.tableaux).items() if isinstance(value, kinds)}
    assert named <= set(re.findall(r"`(?:tableaux\.)?(\w+)`", API))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    out = tmp_path_factory.mktemp("pages")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_pages_build_and_every_public_name_has_its_anchor(pages):
    html = (pages / "api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<dt class="[^"]*\bpy\b[^"]*" id="([\w.]+)"', html))
    assert anchors >= {f"solvers.{name}" for name in set(sv.__all__) - MODULES}
    assert anchors >= {f"reference.{name}" for name in reference.__all__}


def test_docstrings_are_shown_as_they_are(pages):
    """No markup is made of stars and bars, no backslash is left of it, and no default is left unread."""
    html = (pages / "api.html").read_text(encoding="utf-8")
    assert "[N, 2, *D]" in html
    assert "log |det dz/dx| of the map" in html
    assert "||sigma^2 S + 1 - e e^T||_F^2 / d^2\n" in html
    assert not set(re.findall(r"\\.|~torch|factory|Alias for field", html))
