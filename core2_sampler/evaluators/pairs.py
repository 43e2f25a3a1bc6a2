"""What evaluators learn from: pairs of a right and a wrong example.

Images are clean latents, as the denoiser's own VAE makes them; noise is added in training.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Protocol

import torch
from torch import Tensor

from core2_sampler.evaluators.images import Captioned, Finals, Images
from core2_sampler.evaluators.kinds import edits


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch of right examples, each beside a wrong one.

    Attributes:
        x0: clean latents, [B, C, H, W].
        texts: their captions, B.
        other_x0: the other examples' latents, as `x0`.
        other_texts: captions that the others are right under, B; None where the others are worse
            ones under the same.
    """

    x0: Tensor
    texts: list[str]
    other_x0: Tensor
    other_texts: list[str] | None = None


class PairSource(Protocol):
    """Where an evaluator gets its pairs from."""

    def train(self, step: int, count: int) -> Pairs:
        """Return a step's pairs of ``count`` right examples at most, by the step alone."""
        ...

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield a fixed set of pairs that ``train`` never returns, ``count`` at a time."""
        ...


class CaptionPairs:
    """Images with their own captions, beside other images with theirs."""

    def __init__(self, images: Images) -> None:
        """Take the images."""
        self._images = images

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step."""
        return _rolled(*self._images.draw(step, count))

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield the held-out pairs."""
        x0, texts = self._images.held_out()
        for start in range(0, len(texts) - 1, count):
            yield _rolled(x0[start : start + count], texts[start : start + count])


def _rolled(x0: Tensor, texts: list[str]) -> Pairs:
    """Put the next image with another caption beside each."""
    others, count = [], len(texts)
    for i, text in enumerate(texts):
        later = (j % count for j in range(i + 1, i + count))
        others.append(next((j for j in later if texts[j] != text), i))
    return Pairs(x0, texts, x0[others], [texts[j] for j in others])


class EditPairs:
    """Images with their own captions, beside images of these captions with one word changed.

    Each is right under its own caption and wrong under the other's, so that nothing is learned
    from a caption alone.
    """

    def __init__(
        self, images: Captioned, words: tuple[tuple[str, ...], ...], swaps: bool = False
    ) -> None:
        """Take the images, groups of words that stand for each other, and whether these only swap.

        Raises:
            ValueError: the images have no such captions.
        """
        self._twins = images.twins(partial(edits, groups=words, swaps=swaps))

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step; both of a pair count as right examples."""
        return _split(*self._twins.draw(step, count))

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield the held-out pairs."""
        x0, texts = self._twins.held_out()
        for start in range(0, len(texts), 2 * (count // 2)):
            part = slice(start, start + 2 * (count // 2))
            yield _split(x0[part], texts[part])


def _split(x0: Tensor, texts: list[str]) -> Pairs:
    """Return twins, which follow each other, side by side."""
    return Pairs(x0[::2], texts[::2], x0[1::2], texts[1::2])


class RealPairs:
    """Real images beside generated ones."""

    def __init__(self, images: Images, generated: Finals, held_out_share: float) -> None:
        """Take real images, generated ones, and the share of these to hold out.

        Raises:
            ValueError: a part is empty.
        """
        self._images, self._generated = images, generated
        self._parts = [generated.of(part, held_out_share) for part in (False, True)]
        _check_parts(self._parts, held_out_share)

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step."""
        x0, texts = self._images.draw(step, count)
        picks = random.Random(f"generated/{step}").choices(self._parts[0], k=len(texts))
        return Pairs(x0, texts, self._generated.x0[picks])

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield the held-out pairs."""
        x0, texts = self._images.held_out()
        fakes = self._parts[1]
        for start in range(0, len(texts), count):
            part = range(start, min(start + count, len(texts)))
            picks = [fakes[i % len(fakes)] for i in part]
            yield Pairs(
                x0[part.start : part.stop], texts[part.start : part.stop], self._generated.x0[picks]
            )


class RankedPairs:
    """Generated images beside worse ones of the same prompt."""

    def __init__(
        self, generated: Finals, ranks: Sequence[tuple[float, ...]], held_out_share: float
    ) -> None:
        """Take generated images and what makes one better.

        Args:
            generated: with several of a prompt.
            ranks: what each scorer says of each image, the greater the better; the first that
                differs by more than its standard deviation over the images of a prompt decides.
                Less is as good as a tie, and would teach noise: pairs that tie in all are dropped.
            held_out_share: share of what prompts say to hold out.

        Raises:
            ValueError: a part has no two images of a prompt that differ in rank.
        """
        self._generated = generated
        by_prompt = _by_prompt(generated, range(len(generated.records)))
        margins = _margins([[ranks[i] for i in same] for same in by_prompt])
        self._parts = [
            [
                (a, b)
                for same in _by_prompt(generated, generated.of(part, held_out_share))
                for a, b in permutations(same, 2)
                if _better(ranks[a], ranks[b], margins)
            ]
            for part in (False, True)
        ]
        _check_parts(self._parts, held_out_share)

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step."""
        return self._take(random.Random(f"ranked/{step}").choices(self._parts[0], k=count))

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield the held-out pairs."""
        for start in range(0, len(self._parts[1]), count):
            yield self._take(self._parts[1][start : start + count])

    def _take(self, pairs: Sequence[tuple[int, int]]) -> Pairs:
        better, worse = (list(part) for part in zip(*pairs, strict=True))
        texts = [self._generated.records[i].prompt for i in better]
        return Pairs(self._generated.x0[better], texts, self._generated.x0[worse])


def _by_prompt(generated: Finals, chosen: Iterable[int]) -> list[list[int]]:
    """Return the chosen images, those of a prompt together."""
    found: dict[str, list[int]] = {}
    for i in chosen:
        found.setdefault(generated.records[i].prompt_id, []).append(i)
    return list(found.values())


def _margins(ranks: Sequence[Sequence[tuple[float, ...]]]) -> list[float]:
    """Return the standard deviation of each scorer over the images of a prompt, pooled."""
    centred = []
    for same in ranks:
        told = torch.tensor(same, dtype=torch.float64)  # [images, scorers]
        centred.append(told - told.mean(0))
    return torch.cat(centred).square().mean(0).sqrt().tolist()


def _better(first: tuple[float, ...], second: tuple[float, ...], margins: Sequence[float]) -> bool:
    """Return whether the first scorer that tells two images apart prefers the first image."""
    leads = (a - b for a, b in zip(first, second, strict=True))
    clear = (lead for lead, margin in zip(leads, margins, strict=True) if abs(lead) > margin)
    return next(clear, 0.0) > 0


def _check_parts(parts: Sequence[Sequence[Any]], share: float) -> None:
    if not all(parts):
        raise ValueError(
            "generated images must fill a training and a held-out part, got "
            f"{len(parts[0])} and {len(parts[1])} examples at a held-out share of {share}: collect "
            "more prompts, and for preference several seeds of each"
        )
