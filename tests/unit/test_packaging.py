"""The packaging: what is declared, against what the folders hold."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import core2_sampler

ROOT = Path(__file__).parents[2]
LINKED = ("benchmarks", "pipelines", "weak_heads")


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.checkout
def test_packages_are_the_folders_that_hold_an_init(setup: configparser.ConfigParser):
    inits = [path for path in (ROOT / "core2_sampler").rglob("__init__.py") if not linked(path)]
    for name in LINKED:
        inits += (ROOT / name).rglob("__init__.py")
    folders = [path.parent.relative_to(ROOT) for path in inits]
    names = {".".join(folder.parts) for folder in folders}
    found = {f"core2_sampler.{n}" if n.split(".")[0] in LINKED else n for n in names}
    assert set(setup["options"]["packages"].split()) == found


def linked(path: Path) -> bool:
    return path.relative_to(ROOT / "core2_sampler").parts[0] in LINKED


@pytest.mark.checkout
@pytest.mark.parametrize("name", LINKED)
def test_the_folders_at_the_root_are_mapped_and_linked(setup: configparser.ConfigParser, name: str):
    assert f"core2_sampler.{name} = {name}" in setup["options"]["package_dir"]
    link = ROOT / "core2_sampler" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.checkout
@pytest.mark.parametrize("name", LINKED)
def test_a_bare_name_is_refused(name: str):
    done = run_python(f"import {name}", ROOT)
    assert done.returncode == 1
    assert f"ImportError: import core2_sampler.{name}" in done.stderr


@pytest.mark.checkout
def test_the_test_extra_brings_no_torchvision(setup: configparser.ConfigParser):
    extras = setup["options.extras_require"]
    for extra in set(extras) - {"bench"}:
        assert not re.search(r"torchvision|open_clip", extras[extra]), extra
    assert "torchvision" not in setup["options"]["install_requires"]


@pytest.mark.checkout
def test_torch_and_torchvision_bounds_are_a_pair(setup: configparser.ConfigParser):
    # PyTorch's release table: torchvision 0.(n + 15) belongs to torch 2.n
    torch = re.search(r"torch>=2\.(\d+)", setup["options"]["install_requires"])
    vision = re.search(r"torchvision>=0\.(\d+)", setup["options.extras_require"]["bench"])
    assert torch
    assert vision
    assert int(vision[1]) == int(torch[1]) + 15


@pytest.mark.checkout
def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    program = re.search(r"awk '(.*?)' README.md", script, re.DOTALL)
    assert program
    extracted = subprocess.run(
        ["awk", program[1], "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert extracted.stdout.strip().endswith(
        'pip install -e ".[test]" && .venv/bin/python -m pytest'
    )
    assert extracted.stdout.count("\n") == 1
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_version_is_stated_once():
    assert version("core2-sampler") == core2_sampler.__version__


def test_importing_the_package_and_the_command_line_is_cheap(tmp_path: Path):
    code = "import core2_sampler.cli, sys; print({'torch', 'diffusers'} & set(sys.modules))"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", sorted(set(core2_sampler.__all__) - {"__version__"}))
def test_public_names_load(name: str):
    assert getattr(core2_sampler, name) is not None
    assert name in dir(core2_sampler)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        core2_sampler.nothing  # noqa: B018


def test_data_files_are_installed():
    package = Path(core2_sampler.__file__).parent
    assert (package / "py.typed").is_file()
    assert list((package / "recipes").glob("*.yaml"))
