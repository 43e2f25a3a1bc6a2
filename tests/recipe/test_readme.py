"""Every command and program of the README runs, as it stands there, on the embedded model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
pytestmark = pytest.mark.checkout


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text.strip() for text in found]


def set_up(name: str) -> str:
    marked = re.findall(rf"<!-- set-up: {name} -->\n```bash\n(.*)\n```", TEXT)
    assert len(marked) == 1, "a set-up command is one line in a marked block"
    return marked[0]


def commands() -> list[str]:
    """Every `core2 ...` of the README: in the set-up, and in the blocks of commands."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part.removeprefix(".venv/bin/") for part in parts if re.match(r"(\S*/)?core2 ", part)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without network, and with `core2` being the one of this Python."""
    wrapper = tmp_path / "bin" / "core2"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m core2_sampler "$@"\n')
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}


def test_there_are_exactly_two_set_up_commands():
    assert re.findall(r"<!-- set-up: (\w+) -->", TEXT) == ["generate", "test"]
    start = "python3 -m venv .venv && .venv/bin/pip install "
    assert set_up("generate").startswith(f"{start}. && .venv/bin/core2 generate ")
    assert set_up("test") == f'{start}-e ".[test]" && .venv/bin/python -m pytest'
    assert TEXT.count("pip install") == 2


def test_the_readme_shows_commands():
    assert len(commands()) >= 3


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command: str, environment: dict[str, str], tmp_path: Path):
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if "generate" in command:
        name = "compare.png" if "--compare" in command else "grid.png"
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.parametrize("program", blocks("python"))
def test_a_program_runs(program: str, environment: dict[str, str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(image.size)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(64, 64)\n"


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)|src=\"([^\"]+)\"", TEXT)
    for target in {first or second for first, second in targets}:
        assert (README.parent / target).exists(), target
