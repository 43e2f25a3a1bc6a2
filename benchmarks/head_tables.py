"""The numbers of ``core2 bench heads``, and their page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.full_size import share_at_full_size
from core2_sampler.benchmarks.matching import Matched
from core2_sampler.benchmarks.notes import NOTES
from core2_sampler.benchmarks.options import command_line
from core2_sampler.benchmarks.report import (
    Row,
    markdown_table,
    numbers_table,
    provenance_notes,
    sources,
    write_rows,
)
from core2_sampler.benchmarks.runner import resolve_head
from core2_sampler.benchmarks.study import ArmResult, Study, result_rows
from core2_sampler.benchmarks.study_table import method_verdicts
from core2_sampler.weak_heads.base import WeakHead

if TYPE_CHECKING:
    from core2_sampler.benchmarks.head_study import Group, HeadsConfig

COSTS = {
    "parameters": "{:.0f}",
    "share_of_pass": "{:.3%}",
    "effective_scale": "{:.2f}",
    "orthogonal_share": "{:.2f}",
}
"""Numbers of an arm without an interval, and how they are told."""

LEGEND = """\
- NAME: the head, all fast (E = 0); NAME-first-E: its first E steps by CFG; NAME-placed-E: the E
  steps by CFG where its card says that it is worst; NAME-slow: all slow, weak-to-strong.
- share of pass: FLOPs that a head of the same options adds to a pass of the published network of
  its family (SDXL, SD3.5 Large, FLUX.1-dev) for 1024 x 1024 px, beside the weights.
- cfg half: CFG with half the steps; matched: CFG at the arm's effective scale and its NFE.
- effective scale, orthogonal share: GA-Eval, arXiv 2602.22570; p-values are corrected over all
  comparisons below (Holm)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An arm's result and what it is compared with.

    Attributes:
        result: of the arm.
        references: other arms on the same latents by what metrics call them; ``cfg`` is one.
        found: its effective guidance scale; None for CFG and cond.
        matched: CFG at that scale and its NFE; None likewise.
    """

    result: ArmResult
    references: Mapping[str, ArmResult]
    found: Matched | None
    matched: ArmResult | None


def entry_rows(study: Study, entry: Entry, command: str) -> list[Row]:
    """Return an arm's scores, its differences to all references and the distance to CFG."""
    others = dict(entry.references)
    cfg = others.pop("cfg")
    if entry.matched is not None:
        others["matched"] = entry.matched
    own = entry.result
    rows = result_rows(study, own, None if own is cfg else cfg, command=command)
    for against, other in others.items():
        metric = f"overall_minus_{against}"
        if other is not own:
            compared = result_rows(study, own, other, against=against, command=command)
            rows += [row for row in compared if row.metric == metric]
    return rows


def head_costs(study: Study, name: str) -> dict[str, float]:
    """Return what a head of a study costs, whatever it is used for.

    Args:
        study: what the arms share.
        name: folder of the head, or name of a control.
    """
    head = cast(WeakHead, resolve_head(study, name))
    share = share_at_full_size(head, study.pipe.family.denoiser(study.pipe))
    return {"parameters": sum(p.numel() for p in head.parameters()), "share_of_pass": share}


def cost_rows(entry: Entry, costs: Mapping[str, float], like: Row) -> list[Row]:
    """Return the numbers of `COSTS` that an arm has, as rows like another one of it."""
    values = dict(costs)
    if entry.found is not None:
        values["effective_scale"] = entry.found.effective_scale
        values["orthogonal_share"] = entry.found.orthogonal_share
    return [
        dataclasses.replace(like, metric=metric, value=value, low=math.nan, high=math.nan)
        for metric, value in values.items()
    ]


def verdicts(study: Study, entries: Sequence[Entry]) -> list[str]:
    """Say of each method what its comparisons with CFG and with matched CFG show."""
    compared = []
    for entry in entries:
        arm = entry.result.arm
        name = f"{arm.name}, N = {arm.steps}, scale {arm.guidance_scale:g}"
        if entry.matched is not None:
            compared.append((name, entry.result, entry.references["cfg"], entry.matched))
    return method_verdicts(study, compared)


def write_tables(
    config: HeadsConfig,
    study: Study,
    groups: Mapping[Group, Sequence[Entry]],
    about: Mapping[str, Any],
) -> str:
    """Write a page with two tables for each N and scale, and the rows as JSON beside it.

    Returns:
        The page, and where it is.
    """
    command = command_line(config)
    every = [entry for entries in groups.values() for entry in entries]
    heads = dict.fromkeys(entry.result.arm.head for entry in every)
    of_head = {head: {} if head is None else head_costs(study, head) for head in heads}
    rows: list[tuple[Row, Mapping[str, Any]]] = []
    parts = ["# Shapes: weak heads"]
    for (n, scale), entries in groups.items():
        scores = [entry_rows(study, entry, command) for entry in entries]
        costs = [
            row
            for entry, own in zip(entries, scores, strict=True)
            for row in cost_rows(entry, of_head[entry.result.arm.head], own[0])
        ]
        controls = [e.matched for e in entries if e.matched is not None]
        scores += [result_rows(study, control, command=command) for control in controls]
        table = [row for own in scores for row in own]
        parts += [f"## N = {n}, guidance scale {scale:g}", markdown_table(table)]
        parts.append(_cost_table(costs))
        of_group = {**about, "N": n, "scale": scale}
        rows += [(row, of_group) for row in table + costs]
    parts.append("\n".join(f"- {line}" for line in verdicts(study, every)))
    made = sources([row for row, _ in rows], provenance_notes(about))
    parts += [NOTES, LEGEND, *made]
    page = "\n\n".join(parts) + "\n"
    write_rows(config.out.with_suffix(".json"), rows)
    write_atomic(config.out, page.encode())
    return f"{page}\nWrote {config.out} and {config.out.with_suffix('.json')}"


def _cost_table(rows: Sequence[Row]) -> str:
    """Return one line for each arm with the numbers of `COSTS`."""
    arms: dict[str, dict[str, str]] = {}
    for row in rows:
        arms.setdefault(row.arm, {})[row.metric] = COSTS[row.metric].format(row.value)
    return numbers_table(("arm",), [((arm,), cells) for arm, cells in arms.items()], list(COSTS))
