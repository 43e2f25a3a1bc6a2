"""docs/benchmarks.md: every command is one that the program takes, and the tables are the truth."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from core2_sampler.benchmarks.arms import ARMS
from core2_sampler.benchmarks.cli import COMMANDS
from core2_sampler.benchmarks.judges import split_spec, suite_judges
from core2_sampler.benchmarks.presets import PRESETS
from core2_sampler.benchmarks.speed import ARM_NAMES
from core2_sampler.benchmarks.suites import SUITES, T2I_CATEGORIES
from core2_sampler.config import load_config

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
LINES = re.findall(r"^core2 bench .*$", TEXT, re.MULTILINE)
pytestmark = pytest.mark.checkout

STUDIES = {"shapes", "sweep", "knee", "heads", "zigzag", "dynamic-cfg", "merge"}
"""What makes the tables of docs/results; CONTRIBUTING and the tables themselves show how."""


def test_the_page_shows_every_command_but_those_of_the_tables_of_shapes():
    assert {line.split()[2] for line in LINES} == set(COMMANDS) - STUDIES


@pytest.mark.parametrize("line", LINES)
def test_a_command_has_options_that_exist(line: str):
    _, _, command, *words = shlex.split(line)
    flags = [flag.removeprefix("--").replace("-", "_") for flag in words[::2]]
    config = load_config(COMMANDS[command][0], given=dict(zip(flags, words[1::2], strict=True)))
    own = getattr(config, "generate", config)
    known = ARM_NAMES if command == "speed" else ARMS.names()
    assert set(getattr(own, "arms", None) or ()) <= set(known)
    for spec in getattr(getattr(config, "judging", None), "scorers", None) or ():
        assert split_spec(spec)


def test_the_table_of_suites_is_that_of_the_registry():
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in TEXT.splitlines() if "|" in line]
    found = {row[0].strip("`"): row for row in rows if row[0].startswith("`")}
    assert set(found) == set(SUITES.names())
    for name, (_, prompts, decides, _) in found.items():
        size = re.match(r"[\d,]*\d", prompts)[0]
        assert int(size.replace(",", "")) == SUITES.get(name).size
        assert re.findall(r"`([^`]+)`", decides) == suite_judges(name, T2I_CATEGORIES)


def test_presets_and_arms_are_those_of_the_registries():
    presets = re.search(r"\(`--preset`\): (.*?) fix", TEXT, re.DOTALL)[1]
    assert sorted(re.findall(r"`([^`]+)`", presets)) == PRESETS.names()
    arms = re.search(r"\(`--arms`\): (.*?), and", TEXT, re.DOTALL)[1]
    assert set(re.findall(r"`([^`]+)`", arms)) <= set(ARMS.names())
