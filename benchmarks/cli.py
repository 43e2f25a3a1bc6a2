"""The ``core2 bench`` commands: config dataclasses and what they run.

``COMMANDS`` is what the command line mounts. Nothing heavy is imported before the input is known
to be good.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core2_sampler.benchmarks.arms import ARMS, FIRST_TABLE, Arm, build_arms
from core2_sampler.config import ConfigError, option

if TYPE_CHECKING:
    from core2_sampler.benchmarks.report import Row
    from core2_sampler.benchmarks.study import ArmResult, Study

EMBEDDED = {"shapes-sd3": "sd3"}
KNEE_LOSS = 0.01  # one point of overall
NOTES = (
    "Values are percent with 95 % intervals: BCa bootstrap over whole prompts, stratified by task; "
    "overall is the unweighted mean of the tasks. Differences are paired image by image on the "
    "same initial latents; distances are |x - y| / |y| of the final latents. NFE is counted on the "
    "denoiser."
)


@dataclass(frozen=True)
class StudyConfig:
    """What all bench commands share."""

    model: str = option("shapes-sd3", help="Embedded model, folder or hub id.")
    prompts: int = option(240, help="Held-out Shapes prompts.", min=1)
    split: Literal["test", "val"] = option(
        "test", help="Held-out prompts to use: test for reporting, val for choosing."
    )
    seeds: int = option(2, help="Images of each prompt; seeds 0, 1, ...", min=1)
    batch_size: int = option(96, help="Images generated at once.", min=1)
    dtype: Literal["fp32", "bf16"] = option("fp32", help="bf16 is autocast.")
    device: str = option("auto", help="auto, cpu, cuda, ...")
    threads: int | None = option(None, help="CPU threads; default: torch's own choice.", min=1)
    cache: Path = option(
        Path("results/cache"), help="Folder of finished batches; a later run takes them from there."
    )
    out: Path = option(Path("results/bench.md"), help="The table; its JSON lies beside it.")


@dataclass(frozen=True)
class ShapesConfig(StudyConfig):
    """Options of ``core2 bench shapes``."""

    steps: tuple[int, ...] = option((28,), help="Number of steps N, or several.", min=1)
    guidance_scale: float = option(4.5, help="Guidance scale of every arm.", min=1)
    arms: tuple[str, ...] = option(FIRST_TABLE, help="Arms of the table, in its order.")
    heads: tuple[str, ...] = option(
        (), help="Folders of the heads that the arms need: adapter=FOLDER,tap=FOLDER."
    )
    trajectories: Path | None = option(
        None, help="Trajectory store to fit the affine control on, where no folder of it is given."
    )
    sheets: bool = option(False, help="Also draw the worst and best images of each arm.")
    out: Path = option(Path("results/shapes.md"), help="The table; its JSON lies beside it.")


@dataclass(frozen=True)
class SweepConfig(StudyConfig):
    """Options of ``core2 bench sweep``."""

    steps: int = option(28, help="Number of steps.", min=1)
    scales: tuple[float, ...] = option((1.0, 2.0, 3.0, 4.5, 7.0), help="Guidance scales.", min=1)
    out: Path = option(Path("results/sweep.md"), help="The table; its JSON lies beside it.")


@dataclass(frozen=True)
class KneeConfig(StudyConfig):
    """Options of ``core2 bench knee``."""

    steps: tuple[int, ...] = option(
        (4, 6, 8, 10, 12, 14, 20, 28), help="Numbers of steps N; each is run at 2N as well.", min=1
    )
    guidance_scale: float = option(4.5, help="Guidance scale: the best of the sweep.", min=1)
    out: Path = option(Path("results/knee.md"), help="The table; its JSON lies beside it.")


def bench_shapes(config: ShapesConfig) -> None:
    """Compare ways of sampling on the Shapes world, on paired latents."""
    heads = head_folders(config.heads)
    store = config.trajectories if "affine" in config.arms and "affine" not in heads else None
    if store is not None:
        if not store.is_dir():
            raise ConfigError(f"trajectories must be a folder, got {store}")
        heads["affine"] = str(config.cache / "affine")
    groups = [_arms(config.arms, n, config.guidance_scale, heads) for n in config.steps]
    study = open_study(config)
    if store is not None:
        from core2_sampler.benchmarks.runner import fit_affine

        fit_affine(study, store).save_pretrained(heads["affine"])
    results = iter(run_arms(study, [arm for arms in groups for arm in arms]))
    rows: list[Row] = []
    for arms in groups:
        group = [next(results) for _ in arms]
        cfg = next((result for result in group if result.arm.name == "cfg"), None)
        for result in group:
            other = None if result is cfg else cfg
            rows += _rows(study, result, other, "cfg", command_line("shapes", config))
        if config.sheets and cfg is not None:
            _write_sheets(study, config, group, cfg)
    _finish(config, rows, "Shapes: ways of sampling", legend(config.arms))


def bench_sweep(config: SweepConfig) -> None:
    """Measure stock CFG at several guidance scales."""
    scales = sorted(set(config.scales))
    study = open_study(config)
    results = run_arms(study, [Arm("cfg", "cfg", config.steps, scale) for scale in scales])
    base = results[0] if scales[0] == 1 else None
    rows: list[Row] = []
    for result in results:
        other = None if result is base else base
        rows += _rows(study, result, other, "scale_1", command_line("sweep", config))
    overall = [row for row in rows if row.metric == "overall"]
    best = max(overall, key=lambda row: row.value)
    text = f"Best guidance scale: {best.guidance_scale:g}, overall {100 * best.value:.1f}"
    if base is not None:
        text += f", {100 * (best.value - overall[0].value):+.1f} points against scale 1"
    _finish(config, rows, "Shapes: CFG at several guidance scales", f"{text}.\n\n{NOTES}")


def bench_knee(config: KneeConfig) -> None:
    """Find the smallest number of steps at which CFG loses less than a point against twice it."""
    counts = sorted({n for steps in config.steps for n in (steps, 2 * steps)})
    study = open_study(config)
    arms = [Arm("cfg", "cfg", n, config.guidance_scale) for n in counts]
    results = dict(zip(counts, run_arms(study, arms), strict=True))
    rows: list[Row] = []
    for n, result in results.items():
        double = results[2 * n] if n in config.steps else None
        rows += _rows(study, result, double, "2n", command_line("knee", config))
    knee = find_knee(rows)
    text = f"Knee: N = {knee}, the smallest of these" if knee else "No knee: there is no N here"
    text += f" at which CFG loses less than {100 * KNEE_LOSS:g} point of overall against 2N."
    _finish(config, rows, "Shapes: how many steps CFG needs", f"{text}\n\n{NOTES}")


COMMANDS: dict[str, tuple[type[Any], Any]] = {
    "shapes": (ShapesConfig, bench_shapes),
    "sweep": (SweepConfig, bench_sweep),
    "knee": (KneeConfig, bench_knee),
}
"""Name of each command, the dataclass of its options, and the function that takes it."""


def find_knee(rows: Sequence[Row]) -> int | None:
    """Return the smallest number of steps whose loss against 2N is below a point, or None."""
    losses = {row.steps: -row.value for row in rows if row.metric == "overall_minus_2n"}
    return min((n for n, loss in losses.items() if loss < KNEE_LOSS), default=None)


def head_folders(texts: Sequence[str]) -> dict[str, str]:
    """Read ``name=folder`` texts.

    Raises:
        ConfigError: if a text looks otherwise, a name comes twice or a folder holds no head.
    """
    heads: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in heads:
            raise ConfigError(f"heads must be name=FOLDER, each name once, got {text!r}")
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"head {name!r} must be a folder with a config.json, got {folder}")
        heads[name] = folder
    return heads


def command_line(name: str, config: StudyConfig) -> str:
    """Return the command that makes the table again: the options that are not the defaults."""
    words = ["core2", "bench", name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            items = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", ",".join(map(_number, items))]
    return shlex.join(words)


def legend(names: Sequence[str]) -> str:
    """Return a list of what the arms are."""
    lines = [f"- {name}: {ARMS.get(name).about}" for name in names]
    return "\n".join([*lines, "", NOTES])


def open_study(config: StudyConfig) -> Study:
    """Load the model and make the study that a config describes.

    Raises:
        ConfigError: if something that it names does not exist.
    """
    if config.out.suffix != ".md":
        raise ConfigError(f"out must be a file that ends in .md, got {config.out}")
    from core2_sampler.shapes.world import held_out_prompts

    try:
        prompts = tuple(held_out_prompts(config.prompts, config.split))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    source = _model_source(config.model)
    import torch

    from core2_sampler.benchmarks.study import Study
    from core2_sampler.info import pick_device
    from core2_sampler.pipelines.adapters import sd3_denoiser
    from core2_sampler.pipelines.auto import load_pipeline
    from core2_sampler.shapes.judge import judge

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pipe = load_pipeline(source).to(device)
    return Study(
        pipe=pipe,
        family=sd3_denoiser(pipe).family,
        prompts=prompts,
        seeds=tuple(range(config.seeds)),
        judge=judge,
        folder=config.cache,
        batch_size=config.batch_size,
        dtype=config.dtype,
    )


def run_arms(study: Study, arms: Sequence[Arm]) -> list[ArmResult]:
    """Run arms with a progress bar each; every arm is checked before the first runs.

    Raises:
        ConfigError: if an arm's head does not fit the model or the guidance scale.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from core2_sampler.benchmarks.runner import check_arm, run_arm

    try:
        for arm in arms:
            check_arm(study, arm)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def run(arm: Arm) -> ArmResult:
            about = f"{arm.name}, {arm.steps} steps, scale {arm.guidance_scale:g}"
            bar = progress.add_task(about, total=len(study.cases))
            return run_arm(study, arm, on_batch=lambda done: progress.update(bar, completed=done))

        return [run(arm) for arm in arms]


def _rows(
    study: Study, result: ArmResult, other: ArmResult | None, against: str, command: str
) -> list[Row]:
    from core2_sampler.benchmarks.study import result_rows

    return result_rows(study, result, other, against=against, command=command)


def _finish(config: StudyConfig, rows: Sequence[Row], title: str, text: str) -> None:
    """Write the table and print it."""
    from core2_sampler.benchmarks.report import markdown_table, provenance, write_table
    from core2_sampler.info import pick_device

    about = provenance(
        pick_device(config.device),
        dtype=config.dtype,
        prompts=f"{config.prompts} of split {config.split}",
        seeds=list(range(config.seeds)),
    )
    files = write_table(config.out, rows, title=title, provenance=about, text=text)
    print(markdown_table(rows), text, f"written: {files[0]}, {files[1]}", sep="\n\n")


def _write_sheets(
    study: Study, config: ShapesConfig, results: Sequence[ArmResult], cfg: ArmResult
) -> None:
    """Draw, for each arm, images that only CFG got right and images that only the arm did."""
    from core2_sampler.benchmarks.report import contact_sheet
    from core2_sampler.benchmarks.study import worst_and_best

    folder = config.out.with_suffix("")
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


def _arms(names: Sequence[str], steps: int, scale: float, heads: dict[str, str]) -> list[Arm]:
    try:
        return build_arms(names, steps, scale, heads)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _model_source(name: str) -> str:
    """Return the folder or hub id behind a model's name."""
    if name in EMBEDDED:
        from core2_sampler.shapes import model_path

        return str(model_path(EMBEDDED[name]))
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ConfigError(f"model must be a diffusers model, got {name}, without model_index.json")
    if not Path(name).is_dir() and name.count("/") != 1:
        known = ", ".join(EMBEDDED)
        raise ConfigError(f"model must be {known}, a folder or a hub id owner/name, got {name!r}")
    return name


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
