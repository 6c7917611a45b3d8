"""What an installation contains."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = ("tests", "docs", "examples", "benchmarks", "build", "dist")


def source_files():
    """Every file of the package in the checkout: code, types marker, the report's template and style."""
    folders = [p for p in ROOT.iterdir() if (p / "__init__.py").is_file() and p.name not in NOT_SHIPPED]
    files = [p for p in ROOT.iterdir() if p.is_file()] + [p for f in folders for p in f.rglob("*")]
    return {str(p.relative_to(ROOT)) for p in files if p.name.endswith((".py", ".html", ".css", "py.typed"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel, built offline from a copy (building in place would leave files behind)."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("wheel") / "project"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs", "benchmarks")
    shutil.copytree(ROOT, copy, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").glob("fxpress-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_the_wheel_contains_every_file_of_every_subpackage(wheel):
    missing = {n for n in source_files() if f"fxpress/{n}" not in wheel}
    assert missing == set()


@pytest.mark.slow
def test_the_wheel_contains_nothing_else(wheel):
    strangers = {n for n in wheel if not n.startswith("fxpress/") and ".dist-info/" not in n}
    assert strangers == set()
    assert not any(n.startswith(("fxpress/tests", "fxpress/benchmarks")) for n in wheel)
    assert any(n.endswith("licenses/LICENSE") for n in wheel)


def test_pyproject_lists_every_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inits = [p.parent.relative_to(ROOT) for p in ROOT.rglob("__init__.py")]
    inits = [p for p in inits if not p.parts or (p.parts[0] not in NOT_SHIPPED and not p.parts[0].startswith("."))]
    assert listed == {".".join(("fxpress", *p.parts)) for p in inits}


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=!~ ]", d)[0].lower() for d in needed} - {"fxpress"}
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", x) for x in lines), "exact, and no local versions"
    assert names <= {x.split("==")[0].lower() for x in lines}
