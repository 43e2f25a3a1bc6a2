"""GenEval's prompts: what an image must show, and the metadata lines that say it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core2_sampler.registry import unknown_name

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
POSITIONS = ("left of", "right of", "above", "below")

OBJECT_NAMES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace(
        "\n    ", " "
    ).split(", ")
)
"""COCO's 80 classes by detector index; GenEval calls three of them by names of its own."""


@dataclass(frozen=True, slots=True)
class Include:
    """Objects that must be there.

    Attributes:
        name: one of ``OBJECT_NAMES``.
        count: at least so many, 1 or more.
        color: the color of each, one of ``COLORS``.
        position: where each lies, one of ``POSITIONS``, and relative to which earlier clause.
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Exclude:
    """Objects of which fewer than ``count`` may be there."""

    name: str
    count: int


@dataclass(frozen=True, slots=True)
class GenEvalPrompt:
    """A prompt and what its images must show.

    Attributes:
        id: its line in the metadata file from 0, as five digits: the name of its image folder.
        text: the caption.
        task: one of ``TASKS``; ``counting`` raises the detector's threshold.
        include: clauses that must all hold.
        exclude: clauses of which none may be met.
    """

    id: str
    text: str
    task: str
    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """Return the upstream record, keys in the upstream order."""
        include = []
        for clause in self.include:
            item: dict[str, Any] = {"class": clause.name, "count": clause.count}
            if clause.color is not None:
                item["color"] = clause.color
            if clause.position is not None:
                item["position"] = list(clause.position)
            include.append(item)
        record: dict[str, Any] = {"tag": self.task, "include": include}
        if self.exclude:
            record["exclude"] = [{"class": c.name, "count": c.count} for c in self.exclude]
        return record | {"prompt": self.text}

    def metadata_line(self) -> str:
        """Return the upstream line, without its end; it names the prompt in a results file."""
        return json.dumps(self.metadata())


def prompt_from_record(record: Any, prompt_id: str, where: str) -> GenEvalPrompt:
    """Build a prompt from its record in a metadata file.

    Args:
        record: an object with ``tag``, ``include``, ``prompt`` and perhaps ``exclude``.
        prompt_id: the prompt's id.
        where: what names the record in error messages.

    Raises:
        ValueError: if it is no such object, or asks for something that GenEval's judge cannot see:
            every image would count as wrong.
    """
    try:
        _check_keys(record, {"tag", "include", "prompt"}, {"exclude"})
        if not isinstance(record["prompt"], str) or not record["prompt"]:
            raise ValueError(f"prompt must be a caption, got {record['prompt']!r}")
        return GenEvalPrompt(
            prompt_id,
            record["prompt"],
            _one_of("GenEval task", record["tag"], TASKS),
            tuple(_include(item, k) for k, item in enumerate(_clauses(record, "include"))),
            tuple(_exclude(item) for item in _clauses(record, "exclude")),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_prompt(line: str, prompt_id: str, where: str) -> GenEvalPrompt:
    """Read one line of a metadata file.

    Raises:
        ValueError: if the line is not JSON, or see ``prompt_from_record``.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: a line must be JSON, got {line[:60]!r}: {error}") from error
    return prompt_from_record(record, prompt_id, where)


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """Read a metadata file, one prompt a line.

    Args:
        path: such as ``prompts/evaluation_metadata.jsonl`` of djghosh13/geneval.

    Raises:
        ValueError: if there is no such file or no line in it, or see ``parse_prompt``.
    """
    if not path.is_file():
        raise ValueError(
            f"GenEval's prompts must be a metadata file, got {path} which is none: take "
            "prompts/evaluation_metadata.jsonl from github.com/djghosh13/geneval"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} must hold one prompt a line, got an empty file")
    return [parse_prompt(line, f"{k:05d}", f"{path} line {k + 1}") for k, line in enumerate(lines)]


def _check_keys(record: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {record!r}")
    if not required <= set(record) <= required | optional:
        allowed = ", ".join(sorted(required) + [f"{name} (optional)" for name in sorted(optional)])
        raise ValueError(f"the keys must be {allowed}, got {', '.join(record)}")


def _one_of(kind: str, name: Any, names: Iterable[str]) -> str:
    if name not in tuple(names):
        raise unknown_name(kind, name, names)
    return str(name)


def _clauses(record: Mapping[str, Any], key: str) -> list[Any]:
    clauses = record.get(key, [])
    if not isinstance(clauses, list) or (key == "include" and not clauses):
        raise ValueError(f"{key} must be a list of clauses, got {clauses!r}")
    return clauses


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"count must be a whole number of 1 or more, got {value!r}")
    return value


def _include(item: Any, index: int) -> Include:
    _check_keys(item, {"class", "count"}, {"color", "position"})
    color = _one_of("GenEval color", item["color"], COLORS) if "color" in item else None
    position = _position(item["position"], index) if "position" in item else None
    name = _one_of("GenEval object", item["class"], OBJECT_NAMES)
    return Include(name, _count(item["count"]), color, position)


def _exclude(item: Any) -> Exclude:
    _check_keys(item, {"class", "count"}, set())
    return Exclude(_one_of("GenEval object", item["class"], OBJECT_NAMES), _count(item["count"]))


def _position(value: Any, index: int) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2 or value[1] not in range(index):
        raise ValueError(
            f"position must be [relation, index of an earlier include clause], got {value!r} in "
            f"clause {index}"
        )
    return _one_of("GenEval position", value[0], POSITIONS), int(value[1])
