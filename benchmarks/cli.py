"""The ``core2 bench`` commands: what they check and run.

``COMMANDS`` is what the command line mounts. Nothing heavy is imported before the input is known
to be good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.benchmarks import suite_cli
from core2_sampler.benchmarks.arms import ARMS, FIRST_TABLE, Arm, build_arms
from core2_sampler.benchmarks.dynamic_cfg import DynamicCfgConfig, bench_dynamic_cfg
from core2_sampler.benchmarks.head_study import HeadsConfig, bench_heads
from core2_sampler.benchmarks.heads import available_arms, check_scales, head_folders
from core2_sampler.benchmarks.lines import digest_bytes
from core2_sampler.benchmarks.merge import MergeConfig, bench_merge
from core2_sampler.benchmarks.notes import NOTES
from core2_sampler.benchmarks.options import (
    BenchConfig,
    KneeConfig,
    ShapesConfig,
    StudyConfig,
    SweepConfig,
    check_out,
    command_line,
)
from core2_sampler.benchmarks.speed import SpeedConfig, bench_speed
from core2_sampler.benchmarks.zigzag_study import ZigzagConfig, bench_zigzag
from core2_sampler.config import ConfigError
from core2_sampler.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    from core2_sampler.benchmarks.report import Row
    from core2_sampler.benchmarks.study import ArmResult, Study

KNEE_LOSS = 0.01  # one point of overall


def bench_shapes(config: ShapesConfig) -> None:
    """Compare ways of sampling on the Shapes world, on paired latents."""
    check_out(config.out)
    model = find_model(config.study.model)
    scale = model.guidance_scale if config.guidance_scale is None else config.guidance_scale
    heads = with_affine(head_folders(config.heads, model), config)
    names = available_arms(FIRST_TABLE, heads) if config.arms is None else config.arms
    groups = [_arms(names, n, scale, heads) for n in config.steps]
    check_scales([arm for arms in groups for arm in arms], model)
    study = open_study(config.study, model)
    if config.trajectories is not None:
        from core2_sampler.benchmarks.runner import fit_affine

        fit_affine(study, config.trajectories).save_pretrained(heads["affine"])
    results = iter(run_arms(study, [arm for arms in groups for arm in arms]))
    rows: list[Row] = []
    for arms in groups:
        group = [next(results) for _ in arms]
        cfg = next((result for result in group if result.arm.name == "cfg"), None)
        for result in group:
            rows += _rows(study, result, None if result is cfg else cfg, "cfg", config)
        if config.sheets and cfg is not None:
            _write_sheets(study, config.out.with_suffix(""), group, cfg)
    legend = "\n".join(f"- {name}: {ARMS.get(name).about}" for name in names)
    _finish(config, study, rows, "Shapes: ways of sampling", legend)


def bench_sweep(config: SweepConfig) -> None:
    """Measure stock CFG at several guidance scales."""
    check_out(config.out)
    scales = sorted(set(config.scales))
    study = open_study(config.study, find_model(config.study.model))
    results = run_arms(study, [Arm("cfg", "cfg", config.steps, scale) for scale in scales])
    base = results[0] if scales[0] == 1 else None
    rows: list[Row] = []
    for result in results:
        rows += _rows(study, result, None if result is base else base, "scale_1", config)
    overall = [row for row in rows if row.metric == "overall"]
    best = max(overall, key=lambda row: row.value)
    text = f"Best guidance scale: {best.guidance_scale:g}, overall {100 * best.value:.1f}"
    if base is not None:
        text += f", {100 * (best.value - overall[0].value):+.1f} points against scale 1"
    _finish(config, study, rows, "Shapes: CFG at several guidance scales", text + ".")


def bench_knee(config: KneeConfig) -> None:
    """Find the smallest number of steps at which CFG loses less than a point against twice it."""
    check_out(config.out)
    model = find_model(config.study.model)
    scale = model.guidance_scale if config.guidance_scale is None else config.guidance_scale
    counts = sorted({n for steps in config.steps for n in (steps, 2 * steps)})
    study = open_study(config.study, model)
    arms = [Arm("cfg", "cfg", n, scale) for n in counts]
    results = dict(zip(counts, run_arms(study, arms), strict=True))
    rows: list[Row] = []
    for n, result in results.items():
        rows += _rows(study, result, results[2 * n] if n in config.steps else None, "2n", config)
    knee = find_knee(rows)
    text = f"Knee: N = {knee}, the smallest of these" if knee else "No knee: there is no N here"
    text += f" at which CFG loses less than {100 * KNEE_LOSS:g} point of overall against 2N."
    _finish(config, study, rows, "Shapes: how many steps CFG needs", text)


COMMANDS: dict[str, tuple[type[Any], Any]] = {
    **suite_cli.COMMANDS,
    "shapes": (ShapesConfig, bench_shapes),
    "sweep": (SweepConfig, bench_sweep),
    "knee": (KneeConfig, bench_knee),
    "heads": (HeadsConfig, bench_heads),
    "zigzag": (ZigzagConfig, bench_zigzag),
    "dynamic-cfg": (DynamicCfgConfig, bench_dynamic_cfg),
    "merge": (MergeConfig, bench_merge),
    "speed": (SpeedConfig, bench_speed),
}
"""Name of each command, the dataclass of its options, and the function that takes it."""


def find_knee(rows: Sequence[Row]) -> int | None:
    """Return the smallest number of steps whose loss against 2N is below a point, or None."""
    losses = {row.steps: -row.value for row in rows if row.metric == "overall_minus_2n"}
    return min((n for n, loss in losses.items() if loss < KNEE_LOSS), default=None)


def with_affine(heads: dict[str, str], config: ShapesConfig) -> dict[str, str]:
    """Return the heads with the affine control among them, where it is to be fitted.

    Raises:
        ConfigError: if it is there already, or there is nothing to fit it on.
    """
    if config.trajectories is None:
        return heads
    if "affine" in heads or not config.trajectories.is_dir():
        raise ConfigError(
            "trajectories must be a folder, and without a head affine=FOLDER, "
            f"got {config.trajectories}"
        )
    store = digest_bytes(str(config.trajectories.resolve()).encode())[:16]  # another has its own
    return heads | {"affine": str(config.study.cache / f"affine-{store}")}


def open_study(config: StudyConfig, model: ModelFiles) -> Study:
    """Load a model and make the study that a config describes.

    Raises:
        ConfigError: if there are not so many prompts, or no such device.
    """
    from core2_sampler.info import pick_device
    from core2_sampler.shapes.world import held_out_prompts

    try:
        prompts = tuple(held_out_prompts(config.prompts, config.split))
        device = pick_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    import torch

    from core2_sampler.benchmarks.study import Study
    from core2_sampler.pipelines.auto import load_pipeline
    from core2_sampler.progress import hide_loading
    from core2_sampler.shapes.judge import judge

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    hide_loading()
    pipe = load_pipeline(model.source, dtype=torch.float32)
    return Study(
        pipe=pipe.to(device),
        family=model.family,
        prompts=prompts,
        seeds=tuple(range(config.seeds)),
        judge=judge,
        folder=config.cache / "images",
        batch_size=config.batch_size,
        dtype=config.dtype,
        max_sequence_length=model.check_tokens(config.max_sequence_length),
        keep_latents=True,
    )


def run_arms(study: Study, arms: Sequence[Arm]) -> list[ArmResult]:
    """Run arms with a progress bar each; every arm is checked before the first runs.

    Raises:
        ConfigError: if an arm's head does not fit the model.
    """
    from core2_sampler.benchmarks.generate import judge_arm
    from core2_sampler.benchmarks.runner import check_arm
    from core2_sampler.progress import rich_progress

    try:
        for arm in arms:
            check_arm(study, arm)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with rich_progress() as progress:

        def run(arm: Arm) -> ArmResult:
            about = f"{arm.name}, {arm.steps} steps, scale {arm.guidance_scale:g}"
            bar = progress.add_task(about, total=len(study.cases))
            return judge_arm(study, arm, on_images=partial(progress.advance, bar))

        return [run(arm) for arm in arms]


def about_study(config: StudyConfig, study: Study) -> dict[str, Any]:
    """Return where the numbers of a study come from."""
    from core2_sampler.benchmarks.report import provenance
    from core2_sampler.info import pick_device

    return provenance(
        pick_device(config.device),
        model=config.model,
        dtype=config.dtype,
        max_sequence_length=study.max_sequence_length,
        prompts=f"{config.prompts} of split {config.split}",
        seeds=list(range(config.seeds)),
    )


def _rows(
    study: Study, result: ArmResult, other: ArmResult | None, against: str, config: BenchConfig
) -> list[Row]:
    from core2_sampler.benchmarks.study import result_rows

    return result_rows(study, result, other, against=against, command=command_line(config))


def _finish(config: BenchConfig, study: Study, rows: Sequence[Row], title: str, text: str) -> None:
    """Write the table and print it."""
    from core2_sampler.benchmarks.report import markdown_table, write_table

    about = about_study(config.study, study)
    page = f"{text}\n\n{NOTES}"
    files = write_table(config.out, rows, title=title, provenance=about, text=page)
    print(markdown_table(rows), text, f"Wrote {files[0]} and {files[1]}", sep="\n\n")


def _write_sheets(study: Study, folder: Path, results: Sequence[ArmResult], cfg: ArmResult) -> None:
    """Draw, for each arm, images that only CFG got right and images that only the arm did."""
    from core2_sampler.benchmarks.report import contact_sheet
    from core2_sampler.benchmarks.study import worst_and_best

    for result in results:
        kinds = zip(("worst", "best"), worst_and_best(result, cfg, 10), strict=True)
        for kind, picks in ((kind, picks) for kind, picks in kinds if picks):
            pairs = [(cfg.image(i), result.image(i)) for i in picks]
            reasons = [result.reasons[i] or cfg.reasons[i] for i in picks]
            texts = [study.cases[i].prompt.text for i in picks]
            captions = [f"{text} | {reason}" for text, reason in zip(texts, reasons, strict=True)]
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{result.arm.name}-{result.arm.steps}-{kind}.png"
            contact_sheet(pairs, captions).save(folder / name)


def _arms(names: Sequence[str], steps: int, scale: float, heads: Mapping[str, str]) -> list[Arm]:
    try:
        return build_arms(names, steps, scale, heads)
    except ValueError as error:
        raise ConfigError(str(error)) from error
