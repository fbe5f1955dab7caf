"""The order of the rooms: a file imports only what stands above it, and the core never imports `reference`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import solvers as sv

ROOT = Path(sv.__file__).parent
ROOMS = [
    "phi",
    "arguments",
    "elements",
    "schedules",
    "discrete",
    "grids",
    "predictions",
    "guidance",
    "files",
    "plan",
    "noise",
    "jacobian",
    "decoder",
    "bits",
    "methods.exponential",
    "methods.tableaux",
    "methods.singlestep",
    "methods.multistep",
    "methods.unipc",
    "methods.belm",
    "methods.statistics",
    "methods.stochastic",
    "methods.analytic",
    "methods.renoise",
    "methods",
    "rows_triton",
    "kernels",
    "rows",
    "loop",
    "run",
    "graph",
    "langevin",
    "control",
    "adaptive",
    "adaptive_sde",
    "blackbox",
    "latents",
    "likelihood",
    "bound",
    "training",
    "adapters.networks",
    "adapters.k_diffusion",
    "adapters.configs",
    "adapters.steps",
    "adapters.diffusers",
    "adapters",
    "comparison",
    "figures",
    "options",
    "compare",
    "cli",
]


def imports(path):
    """The modules of this repository that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            yield name, path


def test_every_file_has_its_place():
    assert sorted(name for name, _ in rooms()) == sorted(ROOMS)


@pytest.mark.parametrize(
    ("name", "path"), list(rooms()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_file_imports_only_what_stands_above_it(name, path):
    above = {f"solvers.{room}" for room in ROOMS[: ROOMS.index(name)]}
    ours = {module for module in imports(path) if module.split(".")[0] == "solvers" and module != "solvers"}
    assert ours <= above, f"{name} reaches down to {sorted(ours - above)}"
    if name not in ("options", "compare", "cli"):
        assert not any(module.split(".")[0] == "reference" for module in imports(path))


def test_the_core_imports_no_optional_package():
    optional = ["typer", "rich", "matplotlib", "sklearn", "safetensors", "diffusers", "reference"]
    code = f"import sys, solvers; print([m for m in {optional} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_every_file_starts_with_its_caption():
    for package in (ROOT, ROOT.parent / "reference"):
        for path in package.rglob("*.py"):
            caption = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert caption, path
            assert len(caption.splitlines()[0]) <= 120, path


def test_public_names_exist_and_are_documented():
    for name in sv.__all__:
        assert getattr(sv, name).__doc__, name


def test_nothing_in_the_core_evaluates_or_unpickles():
    """Plans and records are read as data: no pickle, eval or torch.load anywhere."""
    for _, path in rooms():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & {"eval", "exec", "compile", "__import__"}, path
        assert not {"pickle", "marshal", "shelve", "yaml"} & set(imports(path)), path
        assert not any(
            isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.load" for n in ast.walk(tree)
        ), path
