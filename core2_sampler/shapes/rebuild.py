"""Rebuild the models of the embedded world from nothing: every stage of their training, in order.

A stage is one or more ``core2`` commands, each of which can be killed and repeated. What is done
is kept in ``rebuild.json``, with the minutes that it took.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic
from core2_sampler.info import environment
from core2_sampler.json_files import read_json
from core2_sampler.training import Log

Commands = list[list[str]]
Run = Callable[[list[str]], None]
"""``run(arguments)``: a command of ``core2``; raises where that fails."""

RECORD = "rebuild.json"
SCALES = (2.0, 3.0, 4.5, 7.0)
"""Guidance scales that an adapter's reference scale is chosen from."""

_ENCODERS = {"vae": 8, "clip": 12, "t5": 6}
_DENOISERS = {"sd3": (220, 25, 25), "sdxl": (48,), "flux": (108,)}
"""Minutes of each training; several go on from one another, and the model is their mean."""

_BESIDE = ("vae", "text_encoder", "text_encoder_3")  # what a denoiser is trained with

_SWEEP, _COLLECT, _REFLECT, _SHIP = 4, 5, 10, 1  # minutes
_PROMPTS, _TRAJECTORIES = 240, 1200
_FEWEST_PROMPTS, _FEWEST_TRAJECTORIES = 6, 20  # one of each task; with some to hold out


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the chain.

    Attributes:
        name: in the log and the record.
        minutes: that it is to take: time boxes of its trainings, and what the rest is known for.
        commands: makes its commands, when its turn has come.
    """

    name: str
    minutes: float
    commands: Callable[[], Commands]


def chain(folder: Path, minutes: float | None = None, device: str = "auto") -> list[Stage]:
    """Return the stages that end in ``folder/models``.

    Args:
        folder: of all that is made.
        minutes: of the whole chain, which its stages share in proportion; None is the full time.
            What is counted, not timed, has a least size, so that a short chain takes longer.
        device: a torch device, or ``auto``.
    """
    full = sum(stage.minutes for stage in _stages(folder, 1.0, device))
    return _stages(folder, 1.0 if minutes is None else minutes / full, device)


def _stages(folder: Path, share: float, device: str) -> list[Stage]:
    make = _Maker(folder, share, device)
    stages = [make.training(part, minutes) for part, minutes in _ENCODERS.items()]
    for family, boxes in _DENOISERS.items():
        stages += make.denoiser(family, boxes)
        stages += make.head(family, _model(folder, family))
    models = [[str(folder / "clip")]]
    for family in _DENOISERS:
        head = folder / f"{family}-adapter"
        models.append([str(_model(folder, family)), "--head", str(head)])
    into = ["--into", str(folder / "models")]
    commands = [["shapes", "ship", *model, *into] for model in models]
    return [*stages, Stage("ship", _SHIP * share, lambda: commands)]


def _model(folder: Path, family: str) -> Path:
    """Return where a family's pipeline lies in the end."""
    return folder / (f"{family}-mean" if len(_DENOISERS[family]) > 1 else family)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the stages of a folder, a share of their full length, on a device."""

    folder: Path
    share: float
    device: str

    def training(
        self, part: str, minutes: float, out: Path | None = None, start: Path | None = None
    ) -> Stage:
        """Return a training; one into `out` goes on from `start`, beside the same networks."""
        box = ["--minutes", self._box(minutes), "--device", self.device]
        command = ["shapes", "train", "--part", part, *box, "--out", str(out or self.folder)]

        def commands() -> Commands:
            if out is None:
                return [command]
            for name in _BESIDE:
                shutil.copytree(self.folder / name, out / name, dirs_exist_ok=True)
            return [[*command, "--start", str(start)]]

        return Stage(part if out is None else out.name, minutes * self.share, commands)

    def denoiser(self, family: str, boxes: Sequence[float]) -> list[Stage]:
        """Return a training, those that go on from it, and the mean of them all."""
        stages, folders = [self.training(family, boxes[0])], [self.folder / family]
        for number, minutes in enumerate(boxes[1:], start=2):
            out = self.folder / f"{family}-{number}"
            stages.append(self.training(family, minutes, out, folders[-1]))
            folders.append(out / family)
        if len(folders) > 1:
            mean = _model(self.folder, family)
            command = ["shapes", "average", *map(str, folders), "--out", str(mean)]
            stages.append(Stage(mean.name, 0.0, lambda: [] if mean.exists() else [command]))
        return stages

    def head(self, family: str, model: Path) -> list[Stage]:
        """Return the choice of a scale on split `val`, Collect, and Reflect with one round."""
        table, data = self.folder / f"{family}-sweep.md", self.folder / f"{family}-trajectories"
        given = ["--model", str(model), "--device", self.device]
        prompts = ["--prompts", self._count(_PROMPTS, _FEWEST_PROMPTS), "--seeds", "1"]
        scales = ["--scales", ",".join(f"{scale:g}" for scale in SCALES), "--dtype", "bf16"]
        kept = ["--cache", str(self.folder / "images"), "--out", str(table)]
        sweep = ["bench", "sweep", "--split", "val", *given, *prompts, *scales, *kept]
        count = ["--num-prompts", self._count(_TRAJECTORIES, _FEWEST_TRAJECTORIES)]
        collect = ["collect", "--config", "shapes-collect", *given, *count, "--output", str(data)]

        def reflect() -> Commands:
            scale = ["--reference-scale", f"{best_scale(table.with_suffix('.json')):g}"]
            box = ["--rounds", "1", "--minutes", self._box(_REFLECT), *given]
            place = ["--data", str(data), "--output", str(self.folder / f"{family}-adapter")]
            return [["reflect", "--config", "shapes-adapter", *scale, *box, *place]]

        return [
            Stage(f"{family}-scale", _SWEEP * self.share, lambda: [sweep]),
            Stage(f"{family}-collect", _COLLECT * self.share, lambda: [collect]),
            Stage(f"{family}-adapter", (2 * _REFLECT + _COLLECT) * self.share, reflect),
        ]

    def _box(self, minutes: float) -> str:
        return f"{max(minutes * self.share, 0.001):.4g}"

    def _count(self, full: int, least: int) -> str:
        return str(max(round(full * self.share), least))


def best_scale(table: Path) -> float:
    """Return the guidance scale of the best overall score in a sweep's rows; the lowest of equals.

    Args:
        table: the JSON file.
    """
    rows = json.loads(table.read_text(encoding="utf-8"))
    scores = {row["guidance_scale"]: row["value"] for row in rows if row["metric"] == "overall"}
    return max(sorted(scores), key=lambda scale: scores[scale])


def rebuild(
    stages: Sequence[Stage],
    folder: Path,
    run: Run,
    *,
    minutes: float | None = None,
    device: str = "cpu",
    log: Log = print,
) -> dict[str, Any]:
    """Run the stages that are not finished yet, and keep what each took.

    Args:
        stages: of `chain`.
        folder: gets ``rebuild.json``.
        run: runs a command.
        minutes: as given to `chain`.
        device: for the record.
        log: called with a line for each stage.

    Returns:
        The record: ``minutes`` asked for, ``environment``, and ``stages`` by name: the ``minutes``
        and ``commands`` of the run that finished it, and how many ``runs`` began it. What a killed
        run took is in no minutes.

    Raises:
        ValueError: if the folder was begun with other `minutes`.
    """
    path = folder / RECORD
    record = read_json(path) if path.exists() else {"minutes": minutes, "stages": {}}
    if record["minutes"] != minutes:
        raise ValueError(
            f"minutes must stay {record['minutes']}, with which {folder} was begun, got {minutes}: "
            "take another folder"
        )
    record["environment"] = environment(device)
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        known = record["stages"].setdefault(stage.name, {"runs": 0})
        if "minutes" in known:
            log(f"{title}: finished before, in {known['minutes']:.1f} minutes")
            continue
        known["runs"] += 1
        _write(path, record)
        began = time.monotonic()
        commands = stage.commands()
        for command in commands:
            run(command)
        known |= {"minutes": (time.monotonic() - began) / 60, "commands": commands}
        _write(path, record)
        log(f"{title}: {known['minutes']:.1f} minutes of {stage.minutes:.1f} expected")
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
