"""Structure: imports point one way, every package folder is packaged, docs are where the code says."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hardware_profiles", "costmodels", "planner", "runtime", "reports")

# package -> the packages (or root modules) of tpplan that it may import
ALLOWED = {
    "hardware_profiles": {"errors", "units", "hardware_profiles"},
    "costmodels": {"errors", "units", "hardware_profiles", "costmodels"},
    "planner": {"errors", "units", "hardware_profiles", "costmodels", "planner"},
    "runtime": {"errors", "units", "planner", "runtime"},
    "reports": {"errors", "units", "hardware_profiles", "costmodels", "planner", "reports"},
}
# The files outside runtime/ that handle the user's model or tensors, and so may import torch.
TORCH_ALLOWED_ELSEWHERE = {
    f"planner/{name}.py"
    for name in (
        "arguments",
        "attention",
        "borders",
        "chance",
        "caches",
        "construct",
        "diffusers_models",
        "equal_calls",
        "fake_run",
        "gpu_dropout",
        "grouped",
        "huggingface",
        "huggingface_inputs",
        "huggingface_labels",
        "inputs",
        "kernels",
        "lengths",
        "liveness",
        "local_gpus",
        "losses",
        "own_checkpoints",
        "pass_for_real",
        "quick_fake",
        "recorder",
        "recording",
        "registry",
        "replay",
        "rnn",
        "run_once",
        "sequence",
        "signature",
        "sources",
        "stand_in",
        "target",
        "trace",
        "user_module",
        "values",
    )
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import statement in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                found.append((node.level, node.module))
            else:
                found += [(node.level, alias.name) for alias in node.names]
    return found


def test_packages_are_listed_in_pyproject() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tracked = subprocess.run(["git", "ls-files", "*__init__.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {Path(line).parent for line in tracked.stdout.split()}
    expected = {
        "tpplan" if f == Path(".") else "tpplan." + ".".join(f.parts) for f in folders if f.parts[:1] != ("tests",)
    }
    assert listed == expected


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in modules(package):
        depth = len(path.relative_to(ROOT).parts)  # planner/x.py: 2, so level 2 reaches the root
        for level, name in imports(path):
            assert not (level == 0 and name.split(".")[0] == "tpplan"), f"{path}: absolute import of tpplan"
            if level == 0:
                continue
            top = package if level < depth else name.split(".")[0]
            assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {'.' * level}{name}"


@pytest.mark.parametrize("package", ["hardware_profiles", "costmodels", "planner"])
def test_torch_only_where_models_are_traced(package: str) -> None:
    for path in modules(package):
        name = path.relative_to(ROOT).as_posix()
        uses = [n for level, n in imports(path) if level == 0 and n.split(".")[0] == "torch"]
        if uses:
            assert name in TORCH_ALLOWED_ELSEWHERE, f"{name} imports {uses}"


def test_every_module_opens_with_a_sentence() -> None:
    for package in PACKAGES:
        for path in modules(package):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert doc, f"{path.relative_to(ROOT)} has no module docstring"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tpplan; print([m for m in ('torch', 'pandas', 'pulp', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert out.stdout.strip() == "[]"
