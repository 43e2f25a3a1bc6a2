"""The table of what is supported. Truth: the tests that it names, and the cases of the matrix."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.checkout

UNIT = Path(__file__).parent
DROPIN = ast.parse((UNIT / "test_dropin.py").read_text(encoding="utf-8"))
FAMILIES = ["sd3", "sdxl", "flux"]


def assigned(name):
    """Return the list that test_dropin.py gives to a name, unevaluated."""
    for node in DROPIN.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value.elts
    raise KeyError(name)


def lacks():
    """Return family -> what its stock class has not, and why."""
    found = {}
    for case in assigned("CASES"):
        given = {each.arg: each.value for each in case.keywords}
        empty = ast.Dict(keys=[], values=[])
        found[case.args[0].value] = ast.literal_eval(given.get("lacks", empty))
    return found


def text():
    """Return the page; only a checkout has it."""
    return (UNIT.parents[1] / "docs" / "support.md").read_text(encoding="utf-8")


def rows(heading):
    """Return the cells of the table under a heading, without its head."""
    part = text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_named_test_exists():
    named = set(re.findall(r"`(\w+\.py)::(\w+)`", text()))
    assert len(named) > 40
    for file, test in named:
        tree = ast.parse((UNIT / file).read_text(encoding="utf-8"))
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (file, test)


def test_the_matrix_has_a_row_for_each_feature_and_a_dash_where_stock_has_none():
    features = [node.id for node in assigned("FEATURES")]
    assert [row[0].strip("`") for row in rows("The matrix")] == features
    missing = lacks()
    assert list(missing) == FAMILIES
    for feature, _, *cells in rows("The matrix"):
        wanted = ["–" if feature.strip("`") in missing[family] else "both" for family in FAMILIES]
        assert cells == wanted, feature


def test_the_other_rows_have_known_marks_and_a_test():
    for feature, *cells, tests in rows("Beyond the matrix"):
        assert set(cells) <= {"both", "core2", "stock", "own", "–"} and len(cells) == 3, feature
        assert "::" in tests or tests == "the same two", feature


def test_what_stock_has_not_is_said_with_its_reason():
    part = text().split("## What stock has not\n")[1]
    for reasons in lacks().values():
        assert all(reason in part for reason in reasons.values())
