"""``core2 bench dynamic-cfg``: scales picked image by image while sampling, on the Shapes world.

What an online scale gains over one constant scale is set beside what it could be owed to otherwise:
its mean over images as a schedule known beforehand, its own scales in another order of the steps,
and schedules that see nothing. The judge itself, asked in each step, is the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from core2_sampler.benchmarks.arms import ARMS, Arm, build_arms
from core2_sampler.benchmarks.heads import head_folders
from core2_sampler.benchmarks.notes import COUNTED, PAIRED, VALUES
from core2_sampler.benchmarks.options import StudyConfig, check_out, command_line
from core2_sampler.config import ConfigError, option
from core2_sampler.fitting import find_fitting_evaluator, find_head
from core2_sampler.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    from core2_sampler.benchmarks.dynamic_runs import Runs
    from core2_sampler.evaluators.network import LatentEvaluator

STATIC_ARMS = ("interval", "linear", "linear-up", "cosine", "cosine-up")
"""Rules that see nothing, about the best constant scale."""

TAKEN = ("fixed", "adaptive", "mean", "shuffled")
"""What follows ``online-`` in arms of this study; no evaluator may be called so."""

NOTES = (
    f"{VALUES}, clip score the cosine of the Shapes CLIP. {PAIRED}, with the constant scale "
    "that did best on these very images, which favours it. The effective scale is the mean of the "
    "scales over steps and images, cond counting 1; arms that pick theirs have no other. The "
    "Frechet distance, to renders of the same prompts in the Shapes CLIP's features, has no "
    "interval: resampled images are further from any reference than the images themselves. "
    f"{COUNTED}. An evaluator of kind preference is trained on pairs that the judge and the Shapes "
    "CLIP rank, which score this table as well: its gains are weaker evidence than those of the "
    "others. p-values are corrected over all differences of the list (Holm)."
)


@dataclass(frozen=True, slots=True)
class DynamicCfgConfig:
    """Options of ``core2 bench dynamic-cfg``."""

    study: StudyConfig
    steps: int = option(28, help="Number of steps N.", min=2)
    scales: tuple[float, ...] = option(
        (1.0, 2.0, 2.5, 3.0, 3.5, 4.5, 6.0, 7.5, 11.0),
        help="Constant scales of the sweep.",
        min=1,
    )
    candidates: tuple[float, ...] = option(
        (1.0, 3.0, 7.5, 11.0, 15.0), help="Scales that are picked from.", min=1
    )
    evaluators: tuple[str, ...] | None = option(
        None,
        help="At least two evaluators: kinds of shipped ones, or folders; by default all that are "
        "shipped for the model.",
    )
    heads: tuple[str, ...] = option(
        (),
        help="Folders of heads on outputs, tap=FOLDER: scales are also picked in steps that they "
        "make fast; the model's own is known.",
    )
    out: Path = option(
        Path("out/dynamic-cfg.md"), help="The table; its JSON and a plot lie beside it."
    )

    def __post_init__(self) -> None:
        """Check that there is something to pick."""
        if not max(self.candidates) > 1:
            raise ValueError(f"candidates must have a scale above 1, got {self.candidates}")


def bench_dynamic_cfg(config: DynamicCfgConfig) -> None:
    """Compare guidance scales picked while sampling with constant and other known ones."""
    from core2_sampler.benchmarks.cli import open_study

    check_out(config.out)
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'core2-sampler[bench]'")
    model = find_model(config.study.model)
    folders = evaluator_folders(config, model)
    heads, inside = asked_heads(config, model)
    study = open_study(config.study, model)
    from core2_sampler.atomic import write_atomic
    from core2_sampler.benchmarks.dynamic_page import cost_note, verdicts
    from core2_sampler.benchmarks.dynamic_runs import pattern_plot, run_study
    from core2_sampler.benchmarks.study_table import choice_note, write_study

    evaluators = _load(folders, str(study.pipe.device))
    runs = run_study(study, config, evaluators, heads)
    plot = config.out.with_suffix(".png")
    write_atomic(plot, pattern_plot(study, runs))
    rows = runs.rows(study, command_line(config))
    kinds = [evaluator.config.kind for evaluator in evaluators.values()]
    parts = [f"![Scales picked in each step]({plot.name})", legend(config, runs, inside)]
    parts += [verdicts(study, runs), cost_note(study.family, kinds, len(config.candidates))]
    text = "\n\n".join([*parts, f"{NOTES} {choice_note(config.study)}"])
    write_study(config, study, rows, "Shapes: scales picked while sampling", text)


def evaluator_folders(config: DynamicCfgConfig, model: ModelFiles) -> dict[str, Path]:
    """Return the folder of each evaluator by its name, as far as known to fit without its weights.

    Raises:
        ConfigError: fewer than two, two of a name, one of a name in `TAKEN`, or one of another
            model.
    """
    from core2_sampler.evaluators.shipped import shipped_kinds

    names = shipped_kinds(model.family) if config.evaluators is None else config.evaluators
    found = [find_fitting_evaluator(name, model) for name in names]
    folders = {folder.name: folder for folder in found}
    if len(folders) < max(2, len(found)):
        raise ConfigError(
            "evaluators must be at least two of different names, got "
            f"{', '.join(map(str, names)) or 'none'}: name folders that `core2 evaluators train` "
            "wrote"
        )
    if not set(folders).isdisjoint(TAKEN):
        raise ConfigError(
            f"evaluators must have other names than {', '.join(TAKEN)}, got {', '.join(folders)}: "
            "rename the folder"
        )
    return folders


def asked_heads(config: DynamicCfgConfig, model: ModelFiles) -> tuple[dict[str, str], list[str]]:
    """Return the folders of the heads on outputs by name, and the names of all others.

    A head inside the denoiser makes the guided prediction in one pass at one scale: there is no gap
    that other scales could be tried on.

    Raises:
        ConfigError: as `head_folders`.
    """
    names: dict[str, str] = {}
    for name, folder in head_folders(config.heads, model).items():
        names.setdefault(folder, name)  # the model's own one has two
    found = {name: find_head(folder, model) for folder, name in names.items()}
    inside = [name for name, head in found.items() if head is not None and head.in_model]
    return {name: folder for folder, name in names.items() if name not in inside}, inside


def _load(folders: dict[str, Path], device: str) -> dict[str, LatentEvaluator]:
    from core2_sampler.evaluators import load_evaluator

    return {name: load_evaluator(folder).to(device) for name, folder in folders.items()}


def constant_arms(config: DynamicCfgConfig) -> list[Arm]:
    """Return CFG at each scale of the sweep."""
    return [Arm("cfg", "cfg", config.steps, scale) for scale in sorted(set(config.scales))]


def static_arms(config: DynamicCfgConfig, scale: float) -> list[Arm]:
    """Return the rules that see nothing, about a constant scale."""
    return build_arms(STATIC_ARMS, config.steps, scale, {})


def fast_arms(config: DynamicCfgConfig, heads: Mapping[str, str], scale: float) -> dict[str, Arm]:
    """Return, by name of each head on outputs, the arm that it makes all steps of at a scale."""
    return {
        name: Arm(f"{name}-fast", "core", config.steps, scale, folder)
        for name, folder in heads.items()
    }


def mean_arm(name: str, arm: Arm, scales: Sequence[float]) -> Arm:
    """Return the arm of a schedule that is known beforehand: one scale for each step."""
    text = ",".join(f"{scale:.6g}" for scale in scales)
    return Arm(name, "cfg", arm.steps, arm.guidance_scale, scale_rule=f"list:{text}")


def legend(config: DynamicCfgConfig, runs: Runs, inside: Sequence[str]) -> str:
    """Return what the arms are, as Markdown.

    Args:
        config: of the command.
        runs: what was run.
        inside: names of the heads that could not be asked for other scales.
    """
    lines = [f"- cfg: one constant scale; the best of the sweep is {runs.best_scale:g}"]
    lines += [f"- {name}: {ARMS.get(name).about}" for name in STATIC_ARMS]
    lines += [f"- {name}: {about}" for name, about in runs.abouts.items()]
    candidates = ", ".join(f"{scale:g}" for scale in config.candidates)
    text = "\n".join(lines) + f"\n\nCandidates: {candidates}."
    if inside:
        text += (
            f" Not asked in fast steps: {', '.join(inside)}. A head inside the denoiser has no gap "
            "that other scales could be tried on; a head on outputs has (`--heads tap=FOLDER`)."
        )
    return text
