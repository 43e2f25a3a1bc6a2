"""docs/compatibility.md: one table of what the other tests run.

Truth: the tables of the three other pages, each of which the tests that it names keep true, and the
lists of tests/unit/test_attach_compiled.py, test_attach_collect.py, test_attach_heads.py and
test_attach_rules.py; of what a stock class has, the arguments of its call.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import diffusers
import pytest

pytestmark = pytest.mark.checkout

UNIT = Path(__file__).parent
DOCS = UNIT.parents[1] / "docs"
FEATURES = ("images_per_prompt", "lora", "group_offload", "model_offload")
FOUND = (*FEATURES, "ip_adapter")
OWN = ("CoRe2StableDiffusion3", "CoRe2StableDiffusionXL", "CoRe2Flux")
FAMILIES = {"SDXL": "StableDiffusionXL", "SD3": "StableDiffusion3", "FLUX.1": "Flux"}


def rows(page, head):
    """Return the cells of the table of a page that starts with a head, without that."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


def listed(file, name):
    """Return the texts in the list that a file of tests gives to a name."""
    for node in ast.parse((UNIT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def of_own():
    """Yield name -> marks of our own pipelines."""
    marks = {row[0].strip("`"): row[2:5] for row in rows("support.md", "feature | what it is")}
    beyond = {row[0]: row[1:4] for row in rows("support.md", "feature | SD3")}
    offload = next(cells for name, cells in beyond.items() if name.startswith("model offload"))
    image = beyond["IP-Adapter by image"]
    found = {**marks, "model_offload": offload, "ip_adapter": image}
    for place, name in enumerate(OWN):
        shown = ["yes" if found[f][place] in ("both", "core2") else "" for f in FOUND]
        yield f"{name}Pipeline", ["yes", "yes", "yes", *shown, "", "yes"]


def of_attach():
    """Yield name -> marks of `attach`."""
    file = "test_attach_compiled.py"
    compiled = {*listed(file, "BATCHED"), *listed(file, "SEQUENTIAL")}
    file = "test_attach_collect.py"
    tasks = [*listed(file, "TASKS"), *listed(file, "PREFIXES").values()]
    collected = {f"{task}Pipeline" for task in tasks}
    file = "test_attach_rules.py"
    names, of_tasks = listed(file, "NAMES"), listed(file, "OF_TASKS")
    tasks = [names[family] + task for family in of_tasks for task in listed(file, "TASKS")]
    ruled = {f"{task}Pipeline" for task in [*names.values(), *tasks]} | {*listed(file, "RULED")}
    file = "test_attach_heads.py"
    lists = ("IP_ADAPTER", "IP_ADAPTER_OF_SD3", "IP_ADAPTER_OF_FLUX")
    adapted = {name for each in lists for name in listed(file, each)}
    networks = set()
    for name, network, *marks in rows("attach.md", "pipeline | network"):
        if network not in networks:  # the first one of each is collected from
            collected.add(name)
        networks.add(network)
        given = ["yes" if name in each else "" for each in (adapted, compiled, collected)]
        call = inspect.signature(getattr(diffusers, name).__call__)
        if "ip_adapter_image" not in call.parameters:
            given[0] = "–"
        yield name, ["yes", "–", "yes" if name in ruled else "", *marks, *given]


def of_guider():
    """Yield name -> marks of `CoRe2Guidance`."""
    zigzag = {FAMILIES[row[0].split(",")[0]] for row in rows("howto/modular.md", "pipeline, task")}
    tried = [row[0] for row in rows("howto/modular.md", "pipeline | network") if row[2] == "yes"]
    for name in sorted({*tried, *zigzag}):
        marks = ["yes", "yes" if name in zigzag else "–", "–", *[""] * 6, "–"]
        yield f"{name}ModularPipeline", marks


def table():
    """Return the table of docs/compatibility.md."""
    heads = [
        "fast, slow, CFG",
        "zigzag",
        "online scale",
        *(f"`{name}`" for name in FEATURES),
        "IP-Adapter",
        "compiled",
        "collect",
    ]
    lines = ["| pipeline | by | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for surface, found in (("itself", of_own), ("attach", of_attach), ("guider", of_guider)):
        lines += [f"| {name} | {surface} | " + " | ".join(marks) + " |" for name, marks in found()]
    return "\n".join(lines)


def test_the_page_has_the_table_of_the_other_tests():
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert table() in page
    assert len(re.findall(r"\| attach \| yes", page)) >= 14
    assert len(re.findall(r"\| guider \| yes", page)) >= 12


def test_the_tests_that_the_page_names_exist():
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+\.py)::(\w+)`", page)
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (UNIT / file).read_text(encoding="utf-8"), test
