"""Which file shows which prompt, in folders of images that were made elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from core2_sampler.benchmarks.geneval.layout import read_folder
from core2_sampler.benchmarks.judges import geneval_prompt
from core2_sampler.benchmarks.prompt_files import read_rows
from core2_sampler.benchmarks.suites import SuitePrompt

TEXTS_FILE = "metadata.jsonl"
"""In a plain folder: a line with ``file_name`` and ``prompt`` (or ``text``) for each image."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMED = 5  # so many prompts are named where more are meant

Placed = dict[str, dict[int, Path]]
"""For each prompt, by id, its images by their number."""


def place_images(
    layout: str, folder: Path, prompts: Sequence[SuitePrompt]
) -> dict[str, list[Path]]:
    """Find the images of every prompt.

    Args:
        layout: a name of ``LAYOUTS``.
        folder: of the images.
        prompts: all that they were made of, in the order of their list.

    Returns:
        By the id of each prompt its images in the order of their numbers, equally many for each.

    Raises:
        ValueError: if an image is of none of the prompts or there twice, or a prompt has none, or
            fewer than another.
    """
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, got {folder}, which is none")
    found = LAYOUTS[layout](folder, prompts)
    if missing := [prompt.id for prompt in prompts if prompt.id not in found]:
        raise ValueError(
            f"every prompt must have an image in {folder}, got none for {_few(missing)}: make "
            "them, or import with the --source or --limit that the images were made with"
        )
    most = max(map(len, found.values()))
    if fewer := [prompt.id for prompt in prompts if len(found[prompt.id]) < most]:
        raise ValueError(
            f"every prompt must have equally many images in {folder}, got fewer than {most} for "
            f"{_few(fewer)}"
        )
    return {
        prompt.id: [found[prompt.id][k] for k in sorted(found[prompt.id])] for prompt in prompts
    }


def _plain(folder: Path, prompts: Sequence[SuitePrompt]) -> Placed:
    """Read ``00000.png`` or ``00000-1.png``, or what a file of texts beside them says."""
    if not (folder / TEXTS_FILE).is_file():
        return _numbered(folder, prompts)
    rows = read_rows(folder / TEXTS_FILE)
    items = []
    for index, row in enumerate(rows):
        text, name = row.get("prompt", row.get("text")), row.get("file_name")
        if not (isinstance(text, str) and isinstance(name, str) and (folder / name).is_file()):
            raise ValueError(
                f"{folder / TEXTS_FILE} must name a file that is there and its prompt in every "
                f"line, as file_name and prompt, got {row} in line {index}"
            )
        items.append((text, folder / name))
    listed = {path for _, path in items}
    if len(listed) < len(items):
        raise ValueError(f"{folder / TEXTS_FILE} must name every file once, got one twice")
    if left := [path.name for path in _images_in(folder) if path not in listed]:
        raise ValueError(f"{folder / TEXTS_FILE} must name every image, got none of {_few(left)}")
    return _by_text(items, prompts)


def _hpsv2(folder: Path, prompts: Sequence[SuitePrompt]) -> Placed:
    """Read ``<style>/00000.jpg``, numbered within the style."""
    found: Placed = {}
    for place, own in _task_folders(folder, prompts):
        found |= _numbered(place, own)
    return found


def _t2icompbench(folder: Path, prompts: Sequence[SuitePrompt]) -> Placed:
    """Read ``<category>/samples/<prompt>_000000.png``, in the order of the numbers."""
    found: Placed = {}
    for place, own in _task_folders(folder, prompts):
        items = []
        for path in _images_in(place / "samples"):
            named = re.fullmatch(r"(.+)_(\d+)", path.stem, re.DOTALL)
            if named is None:
                raise ValueError(f"an image must be named PROMPT_000000.png, got {path}")
            items.append((int(named[2]), named[1], path))
        found |= _by_text([(text, path) for _, text, path in sorted(items)], own)
    return found


def _geneval(folder: Path, prompts: Sequence[SuitePrompt]) -> Placed:
    """Read ``00000/samples/00000.png``, each prompt as its metadata says."""
    wanted = {int(prompt.id.rsplit("/", 1)[-1]): prompt for prompt in prompts}
    found: Placed = {}
    for sample in read_folder(folder):
        prompt = wanted.get(int(sample.prompt.id))
        if prompt is None or geneval_prompt(prompt).metadata() != sample.prompt.metadata():
            raise ValueError(
                f"the images in {folder} must be of the prompts of the list, got "
                f"{sample.prompt.text!r} in {sample.prompt.id}, which is "
                f"{repr(prompt.text) if prompt else 'not in it'}"
            )
        _put(found, prompt.id, sample.index, sample.path)
    return found


LAYOUTS: dict[str, Callable[[Path, Sequence[SuitePrompt]], Placed]] = {
    "plain": _plain,
    "geneval": _geneval,
    "t2icompbench": _t2icompbench,
    "hpsv2": _hpsv2,
}
"""The layouts that are read, each with what reads it."""


def _numbered(folder: Path, prompts: Sequence[SuitePrompt]) -> Placed:
    """Read files that are named by the place of their prompt in the list, from 0."""
    found: Placed = {}
    for path in _images_in(folder):
        named = re.fullmatch(r"(\d+)(?:[-_](\d+))?", path.stem)
        if named is None or int(named[1]) >= len(prompts):
            raise ValueError(
                "an image must be named by the place of its prompt in the list, 00000.png or "
                f"00000-1.png up to {len(prompts) - 1:05d}, got {path}: rename it, or say in "
                f"{TEXTS_FILE} what it shows"
            )
        _put(found, prompts[int(named[1])].id, int(named[2] or 0), path)
    return found


def _by_text(items: Iterable[tuple[str, Path]], prompts: Sequence[SuitePrompt]) -> Placed:
    """Share the images of a text out over the prompts that have it, in their order."""
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(prompt.text, []).append(prompt.id)
    files: dict[str, list[Path]] = {}
    for text, path in items:
        if text not in ids:
            raise ValueError(f"{path} must be of a prompt of the list, got {text!r}")
        files.setdefault(text, []).append(path)
    found: Placed = {}
    for text, own in files.items():
        each, rest = divmod(len(own), len(ids[text]))
        if rest:
            raise ValueError(
                f"{text!r} stands {len(ids[text])} times in the list and must have as many images "
                f"each time, got {len(own)}"
            )
        for k, path in enumerate(own):
            _put(found, ids[text][k // each], k % each, path)
    return found


def _task_folders(
    folder: Path, prompts: Sequence[SuitePrompt]
) -> list[tuple[Path, list[SuitePrompt]]]:
    """Return each task's folder with its prompts; a folder of another task is an error."""
    tasks = {prompt.task for prompt in prompts}
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    if other := [place.name for place in places if place.name not in tasks]:
        raise ValueError(
            f"the folders in {folder} must be among {', '.join(sorted(tasks))}, got {_few(other)}"
        )
    return [(place, [p for p in prompts if p.task == place.name]) for place in places]


def _images_in(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix.lower() in _SUFFIXES)


def _put(found: Placed, prompt_id: str, number: int, path: Path) -> None:
    other = found.setdefault(prompt_id, {}).setdefault(number, path)
    if other != path:
        raise ValueError(
            f"image {number} of {prompt_id} must be there once, got {other} and {path}: take one "
            "away"
        )


def _few(names: Sequence[str]) -> str:
    """Name the first of what an error is about."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
