"""Images made elsewhere as an arm of a run: kept, scored and compared as generated ones are."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.exchange_options import ImportImagesConfig
from core2_sampler.benchmarks.export import SUITE_OF
from core2_sampler.benchmarks.foreign import place_images
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.lines import digest_bytes
from core2_sampler.benchmarks.matching import is_plain
from core2_sampler.benchmarks.options import command_line
from core2_sampler.benchmarks.runs import MATCHED, Run, RunArm, read_runs, write_run
from core2_sampler.benchmarks.study import Case
from core2_sampler.benchmarks.suites import load
from core2_sampler.config import ConfigError
from core2_sampler.progress import progress_bar
from core2_sampler.registry import unknown_name

_MARK = "imported"  # a key of such an arm's provenance
_OF_LIST = ("suite", "source", "limit", "skip_nsfw", "model")


def is_imported(entry: RunArm) -> bool:
    """Tell whether an arm's images were made elsewhere."""
    return _MARK in entry.provenance


def is_known_plain(entry: RunArm) -> bool:
    """Tell whether an arm is known to be cond, or CFG at one scale: nothing for GA-Eval."""
    return entry.arm.name in ("cond", "cfg") if is_imported(entry) else is_plain(entry.arm)


def import_images(config: ImportImagesConfig) -> tuple[Run, int]:
    """Take images in as an arm of a run that is there, or of one of their own.

    Args:
        config: the options, see there.

    Returns:
        The run, and how many images of the arm are new.

    Raises:
        ValueError: if options do not go together, the images do not fit the prompts (see
            `place_images`), a file is no image, or the run has another arm of this name: of other
            images, or of another NFE.
    """
    _check(config)
    runs = read_runs(config.out) if (config.out / "runs").is_dir() else []
    run = _own_run(config) if config.run is None else _named(runs, config.run)
    placed = place_images(config.layout, config.images, run.prompts)
    count = len(placed[run.prompts[0].id])
    if config.run is None:
        run = dataclasses.replace(run, seeds=tuple(range(count)))
        run = next((each for each in runs if each.name == run.name), run)
    if count != len(run.seeds):
        raise ValueError(
            f"every prompt must have {len(run.seeds)} images, one for each seed of {run.name}, "
            f"got {count}"
        )
    files = [
        (Case(prompt, seed), path)
        for prompt in run.prompts
        for seed, path in zip(run.seeds, placed[prompt.id], strict=True)
    ]
    steps, scale = _group(config, run)
    hashes = {case.key: digest_bytes(path.read_bytes()) for case, path in files}
    key = {_MARK: hashes, "nfe": config.nfe}
    folder = f"images/{digest(key)}"
    entry = RunArm(
        Arm(config.arm, "cond" if config.arm == "cond" else "cfg", steps, scale),
        steps,
        scale,
        folder,
        command_line(config),
        {_MARK: f"in the layout {config.layout}; steps, scale and NFE as told"},
    )
    _check_name(run, entry)
    write_atomic(config.out / folder / "arm.json", json.dumps(key, indent=1).encode())
    made = _keep(ImageStore(config.out / folder), files, config.nfe)
    return write_run(config.out, dataclasses.replace(run, arms=(entry,)), [made]), made


def _check(config: ImportImagesConfig) -> None:
    if not re.fullmatch(r"[\w.@+-]+", config.arm) or config.arm.endswith(MATCHED):
        raise ConfigError(
            f"arm must be a name of letters, digits and _.@+- that does not end in {MATCHED}, got "
            f"{config.arm!r}"
        )
    given = [name for name in _OF_LIST if getattr(config, name)]
    if config.run is not None and given:
        raise ConfigError(f"{', '.join(given)} must be left out with --run, which has its own list")


def _own_run(config: ImportImagesConfig) -> Run:
    """Return the run of images that join none, as yet without seeds and arms."""
    suite = config.suite or SUITE_OF.get(config.layout)
    if suite is None:
        raise ConfigError(
            "suite must be given for plain images that join no run: the suite of their prompts"
        )
    prompts = load(
        suite, config.source, limit=config.limit, evenly=False, skip_nsfw=config.skip_nsfw
    )
    settings = {"model": config.model or "images made elsewhere", "family": _MARK}
    return Run(suite, tuple(prompts), (), settings)


def _named(runs: Sequence[Run], name: str) -> Run:
    for run in runs:
        if run.name == name:
            return run
    raise unknown_name("run in this folder", name, [run.name for run in runs])


def _group(config: ImportImagesConfig, run: Run) -> tuple[int, float]:
    """Return the N and scale that the arm is compared at: as given, or the run's own."""
    groups = {entry.group for entry in run.arms}
    found = {
        (config.steps or steps, config.guidance_scale or scale)
        for steps, scale in groups or {(0, 0.0)}
    }
    if len(found) > 1 or 0 in min(found):
        has = ", ".join(f"{n} at {scale:g}" for n, scale in sorted(groups)) or "none as yet"
        raise ConfigError(
            "steps and guidance_scale must say with which arms these images are compared, got "
            f"{config.steps} and {config.guidance_scale} for a run with {has}"
        )
    return found.pop()


def _check_name(run: Run, entry: RunArm) -> None:
    taken = {(other.arm.name, other.group): other.folder for other in run.arms}
    if taken.get((entry.arm.name, entry.group), entry.folder) != entry.folder:
        raise ValueError(
            f"arm must be a name that {run.name} does not have for other images or another nfe, "
            f"got {entry.arm.name!r}: choose another"
        )


def _keep(store: ImageStore, files: Sequence[tuple[Case, Path]], nfe: float | None) -> int:
    """Keep what is not there yet as PNG files of the same pixels; return how many."""
    there = store.records()
    left = [(case, path) for case, path in files if case.key not in there]
    with progress_bar("images", len(files)) as bar:
        bar.advance(len(files) - len(left))
        for case, path in left:
            try:
                with Image.open(path) as image:
                    pixels = torch.from_numpy(np.array(image.convert("RGB")))
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"{path} must be an image, got {error}") from None
            store.add(case, pixels, math.nan if nfe is None else nfe, math.nan)
            bar.advance(1)
    return len(left)
