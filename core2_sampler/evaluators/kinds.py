"""The kinds of evaluators: what each one is asked, and what it learns from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core2_sampler.registry import Registry

Lesson = Literal["captions", "edits", "generated", "ranked"]

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SIDES = (("left", "right"), ("above", "below"))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of evaluator.

    Attributes:
        about: what it tells apart, for help texts and cards.
        lesson: what a right example stands beside: other images and their ``captions``, images of
            ``edits`` of its own caption, ``generated`` images, or ``ranked`` ones of its prompt.
        reads_prompt: whether the score depends on the prompt.
        judges_alone: whether the score depends on the latents alone, too.
        words: of ``edits``: groups of words that stand for each other.
        swaps: of ``edits``: only two words of the caption change places, so that the wrong caption
            names the same things and only their order tells.
    """

    about: str
    lesson: Lesson
    reads_prompt: bool = True
    judges_alone: bool = False
    words: tuple[tuple[str, ...], ...] = ()
    swaps: bool = False


KINDS: Registry[Kind] = Registry("evaluator")
"""Every kind by name."""

KINDS.register("alignment")(Kind("the caption of an image from those of others", "captions"))
KINDS.register("fidelity")(
    Kind("real images from generated ones", "generated", reads_prompt=False, judges_alone=True)
)
KINDS.register("preference")(
    Kind("the preferred of two images of a prompt", "ranked", judges_alone=True)
)
KINDS.register("numeracy")(Kind("the right number from another", "edits", words=(NUMBERS,)))
KINDS.register("attribute")(
    Kind("the right color and place from another", "edits", words=(COLORS, *SIDES))
)
KINDS.register("binding")(
    Kind("which of two colors belongs to which object", "edits", words=(COLORS,), swaps=True)
)


def edits(text: str, groups: tuple[tuple[str, ...], ...], swaps: bool = False) -> list[str]:
    """Return the captions of another meaning that one word makes of a caption, sorted.

    A word gives way to another of its group; where the caption has two of the group that differ,
    they change places, so that only their order tells. Words are matched in lower case.

    Args:
        text: a caption.
        groups: words that stand for each other.
        swaps: only let words of the caption change places.
    """
    spots: list[tuple[re.Match[str], tuple[str, ...]]] = [
        (match, group)
        for group in groups
        for match in re.finditer(rf"\b({'|'.join(group)})\b", text)
    ]
    found: set[str] = set()
    for spot, group in spots:
        others = [match for match, g in spots if g is group and match[0] != spot[0]]
        for other in others:
            first, second = sorted((spot, other), key=lambda match: match.start())
            middle = text[first.end() : second.start()]
            found.add(text[: first.start()] + second[0] + middle + first[0] + text[second.end() :])
        if not others and not swaps:
            words = [word for word in group if word != spot[0]]
            found.update(text[: spot.start()] + word + text[spot.end() :] for word in words)
    return sorted(found)


def contrastive_loss(logits: Tensor, texts: list[str]) -> Tensor:
    """Return the loss of matching images with captions both ways; equal texts share a match.

    Args:
        logits: score of each image with each caption, or of each caption with each image, [B, B].
        texts: the captions, or what they say, B.

    Reference:
        CLIP, arXiv 2103.00020.
    """
    same = torch.tensor([[a == b for b in texts] for a in texts], device=logits.device)
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def real_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return the cross entropy of telling real [B] from generated [B]; a score is its logit."""
    return (F.softplus(-real) + F.softplus(generated)).mean() / 2


def ranking_loss(better: Tensor, worse: Tensor) -> Tensor:
    """Return the negative log likelihood of Bradley and Terry that the better one [B] wins."""
    return F.softplus(worse - better).mean()
