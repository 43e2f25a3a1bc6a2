"""The grammar of the Shapes world: what can be said, and which of it training never sees.

Six tasks after GenEval (arXiv 2310.11513): a single object, two objects, counting, colors,
position and color attribution. A ``Prompt`` is a caption and the scene that it demands. Its
``content`` (task, shapes, colors, number, relation: not the wording) decides its split, so that no
held-out combination is ever seen in training in any wording or order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (214, 39, 40),
    "yellow": (250, 200, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 220),
    "purple": (150, 50, 190),
    "black": (25, 25, 25),
}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_TRAINING_WEIGHTS = (1, 2, 2, 1, 3, 3)  # of TASKS: the more there is to learn, the more often
NUMBERS = {2: "two", 3: "three"}
PREFIXES = (
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a painting of ",
    "a sketch of ",
    "an icon of ",
    "a poster of ",
    "a print of ",
    "a render of ",
    "a cartoon of ",
)
SPLITS = ("train", "val", "test")
_SPLIT_SHARE = 6  # one sixth of the contents of each task is "test", another sixth "val"
_INVERSE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True, slots=True)
class Object:
    """A group of ``count`` equal objects; ``color`` None means that any color will do."""

    shape: str
    color: str | None = None
    count: int = 1

    def phrase(self) -> str:
        """Return the noun phrase, such as ``a red star`` or ``three rings``."""
        noun = f"{self.color} {self.shape}" if self.color else self.shape
        if self.count == 1:
            return f"a {noun}"
        return f"{NUMBERS[self.count]} {noun}{'es' if noun.endswith('s') else 's'}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption of the Shapes world and what its image must show.

    Attributes:
        task: one of ``TASKS``.
        objects: one or two groups of objects, in the order of the caption.
        relation: one of ``RELATIONS``, of the first object to the second, or None.
        prefix: one of ``PREFIXES``; wording only.
    """

    task: str
    objects: tuple[Object, ...]
    relation: str | None = None
    prefix: str = ""

    @property
    def text(self) -> str:
        """The caption."""
        joint = f" {self.relation} " if self.relation else " and "
        return self.prefix + joint.join(thing.phrase() for thing in self.objects)

    @property
    def id(self) -> str:
        """A stable name, unique among the captions."""
        return f"{self.task}/{self.text}"

    @property
    def content(self) -> str:
        """What is said, whatever the words and their order; single objects differ by wording."""
        things, relation = list(self.objects), self.relation
        if relation in _INVERSE:
            things, relation = things[::-1], _INVERSE[relation]
        if relation is None:
            things = sorted(things, key=Object.phrase)
        wording = self.prefix if self.task == "single_object" else ""
        return json.dumps([self.task, wording, relation, [thing.phrase() for thing in things]])

    @property
    def split(self) -> str:
        """``train``, ``val`` or ``test``."""
        return _splits()[self.content]

    def metadata(self) -> dict[str, object]:
        """Return the line of a GenEval ``evaluation_metadata.jsonl`` for this prompt."""
        include: list[dict[str, object]] = []
        for thing in self.objects:
            entry: dict[str, object] = {"class": thing.shape, "count": thing.count}
            if thing.color:
                entry["color"] = thing.color
            include.append(entry)
        line: dict[str, object] = {"tag": self.task, "include": include, "prompt": self.text}
        if self.relation:  # GenEval names the target last and places it relative to group 0
            include.reverse()
            include[1]["position"] = [self.relation, 0]
        if self.task == "counting":
            line["exclude"] = [{"class": t.shape, "count": t.count + 1} for t in self.objects]
        return line


def _pairs(colored: bool) -> Iterable[tuple[Object, Object]]:
    """Yield ordered pairs of different shapes; in two different colors, or with none named."""
    colors = list(itertools.permutations(COLORS, 2)) if colored else [(None, None)]
    for first, second in itertools.permutations(SHAPES, 2):
        for a, b in colors:
            yield Object(first, a), Object(second, b)


@cache
def all_prompts(task: str) -> tuple[Prompt, ...]:
    """Return every prompt of a task in the plain wording; single objects in every wording.

    Raises:
        ValueError: if ``task`` is not one of ``TASKS``.
    """
    if task == "single_object":
        return tuple(Prompt(task, (Object(s),), prefix=p) for s in SHAPES for p in PREFIXES)
    if task == "two_object":
        return tuple(Prompt(task, pair) for pair in _pairs(colored=False))
    if task == "counting":
        colors = (None, *COLORS)
        groups = itertools.product(SHAPES, colors, NUMBERS)
        return tuple(Prompt(task, (Object(s, c, n),)) for s, c, n in groups)
    if task == "colors":
        return tuple(Prompt(task, (Object(s, c),)) for s in SHAPES for c in COLORS)
    if task == "position":
        pairs = [*_pairs(colored=False), *_pairs(colored=True)]
        return tuple(Prompt(task, pair, relation) for pair in pairs for relation in RELATIONS)
    if task == "color_attr":
        return tuple(Prompt(task, pair) for pair in _pairs(colored=True))
    raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _splits() -> dict[str, str]:
    """Map each content to its split: in every task, the first sixths by hash are held out."""
    split = {}
    for task in TASKS:
        contents = sorted({prompt.content for prompt in all_prompts(task)}, key=_digest)
        share = -(-len(contents) // _SPLIT_SHARE)
        for rank, content in enumerate(contents):
            split[content] = "test" if rank < share else "val" if rank < 2 * share else "train"
    return split


@cache
def _by_split(task: str, split: str) -> tuple[Prompt, ...]:
    return tuple(prompt for prompt in all_prompts(task) if prompt.split == split)


def training_prompt(rng: random.Random) -> Prompt:
    """Draw a training caption: the task first; then its content; then a wording."""
    (task,) = rng.choices(TASKS, _TRAINING_WEIGHTS)
    if task == "position":  # coloured pairs outnumber plain ones 30 to 1: balance them
        colored = rng.random() < 0.5
        prompt = rng.choice(_position_training(colored))
    else:
        prompt = rng.choice(_by_split(task, "train"))
    return prompt if task == "single_object" else _reworded(prompt, rng.choice(PREFIXES))


@cache
def _position_training(colored: bool) -> tuple[Prompt, ...]:
    pool = _by_split("position", "train")
    return tuple(p for p in pool if (p.objects[0].color is not None) == colored)


def _reworded(prompt: Prompt, prefix: str) -> Prompt:
    return Prompt(prompt.task, prompt.objects, prompt.relation, prefix)


def held_out_prompts(n: int = 240, split: str = "test") -> list[Prompt]:
    """Return ``n`` distinct held-out prompts, the tasks as even as their size allows.

    ``test`` is for reporting, ``val`` for choosing; neither shares a content with training or
    with the other.

    Args:
        n: how many, at least 1.
        split: ``test`` or ``val``.

    Raises:
        ValueError: if ``split`` is unknown or the world has fewer than ``n`` such prompts.
    """
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', got {split!r}")
    queues = []
    for task in TASKS:
        pool = _by_split(task, split)
        if task != "single_object":
            pool = tuple(_reworded(p, prefix) for p in pool for prefix in PREFIXES)
        queues.append(sorted(pool, key=lambda p: _digest(p.id)))
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    prompts = [prompt for prompt in itertools.islice(rounds, n * len(TASKS)) if prompt][:n]
    if n < 1 or len(prompts) < n:
        raise ValueError(f"n must be 1 to {len(prompts)} prompts of split {split!r}, got {n}")
    return sorted(prompts, key=lambda p: (TASKS.index(p.task), _digest(p.id)))


def write_metadata(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts as a GenEval ``evaluation_metadata.jsonl``."""
    lines = [json.dumps(prompt.metadata()) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
