"""What evaluators learn from: pairs of a right and a wrong example.

Images are clean latents, as the denoiser's own VAE makes them; noise is added in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from core2_sampler.evaluators.images import Captioned, Finals
from core2_sampler.evaluators.kinds import edit_words

_SURVEY = 512  # captions that tell which words occur


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch of right examples, each beside a wrong one.

    Attributes:
        x0: clean latents, [B, C, H, W].
        texts: their captions, B.
        other_x0: the wrong examples' latents; None where they are the same.
        other_texts: the wrong examples' captions; None where they are the same.
    """

    x0: Tensor
    texts: list[str]
    other_x0: Tensor | None = None
    other_texts: list[str] | None = None


class PairSource(Protocol):
    """Where an evaluator gets its pairs from."""

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step, ``count`` at most; a function of the step alone."""
        ...

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield a fixed set of pairs that ``train`` never returns, ``count`` at a time."""
        ...


class CaptionPairs:
    """Images with their own captions, beside the same images with other images' captions."""

    def __init__(self, images: Captioned) -> None:
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
    """Give each image the next other caption."""
    others = []
    for i, text in enumerate(texts):
        later = (*texts[i + 1 :], *texts[:i])
        others.append(next((other for other in later if other != text), text))
    return Pairs(x0, texts, other_texts=others)


class EditPairs:
    """Images with their own captions, beside the same images with one word of these changed."""

    def __init__(
        self, images: Captioned, words: tuple[tuple[str, ...], ...], swaps: bool = False
    ) -> None:
        """Take the images, groups of words that stand for each other, and whether these only swap.

        Words that no caption has are left out: they would tell the wrong caption by themselves.

        Raises:
            ValueError: the captions have no words to change.
        """
        self._images, self._swaps = images, swaps
        _, texts = images.draw(
            0, _SURVEY, lambda text: edit_words(text, words, _fixed(), swaps) is not None
        )
        seen = {word for text in texts for word in re.findall(r"\w+", text)}
        self._words = tuple(tuple(word for word in group if word in seen) for group in words)
        self._accept = cache(
            lambda text: edit_words(text, self._words, _fixed(), swaps) is not None
        )
        if not any(self._accept(text) for text in texts):
            raise ValueError(
                f"captions must have at least two of the words {words}, got {len(texts)} captions "
                f"with {sorted(seen & {word for group in words for word in group})}"
            )

    def train(self, step: int, count: int) -> Pairs:
        """Return the pairs of a step."""
        return self._edited(*self._images.draw(step, count, self._accept), f"edit/{step}")

    def held_out(self, count: int) -> Iterator[Pairs]:
        """Yield the held-out pairs."""
        x0, texts = self._images.held_out(self._accept)
        for start in range(0, len(texts), count):
            part = slice(start, start + count)
            yield self._edited(x0[part], texts[part], f"held out/{start}")

    def _edited(self, x0: Tensor, texts: list[str], seed: str) -> Pairs:
        rng = random.Random(seed)
        others = [edit_words(text, self._words, rng, self._swaps) or text for text in texts]
        return Pairs(x0, texts, other_texts=others)


def _fixed() -> random.Random:
    return random.Random(0)


class RealPairs:
    """Real images beside generated ones."""

    def __init__(self, images: Captioned, generated: Finals, held_out_share: float) -> None:
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
            ranks: of each image; the greater is better, the first number that differs decides.
            held_out_share: share of the prompts to hold out.

        Raises:
            ValueError: a part has no two images of a prompt that differ in rank.
        """
        self._generated = generated
        self._parts = [
            _ranked(generated, ranks, generated.of(part, held_out_share)) for part in (False, True)
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


def _ranked(
    generated: Finals, ranks: Sequence[tuple[float, ...]], chosen: Sequence[int]
) -> list[tuple[int, int]]:
    """Return all (better, worse) among the chosen images of each prompt."""
    by_prompt: dict[str, list[int]] = {}
    for i in chosen:
        by_prompt.setdefault(generated.records[i].prompt_id, []).append(i)
    return [
        (a, b) for same in by_prompt.values() for a in same for b in same if ranks[a] > ranks[b]
    ]


def _check_parts(parts: Sequence[Sequence[Any]], share: float) -> None:
    if not all(parts):
        raise ValueError(
            "generated images must fill a training and a held-out part, got "
            f"{len(parts[0])} and {len(parts[1])} examples at a held-out share of {share}: collect "
            "more prompts, and for preference several seeds of each"
        )
