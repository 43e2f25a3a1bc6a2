"""Probes that networks of the Shapes world answer while they learn; thrown away after training.

Here the scene of every caption and image is known, so a network can be asked what it has read.
Words: matching captions with whole images hardly tells which of two objects a word belongs to, and
a denoiser that reads such words paints both objects alike; so a linear probe on each word must
name the word's own object, how that lies to the other one, and the other one. Patches: a
denoiser's error says little about what lies where (a few of 256 latent pixels); naming each patch
from a middle layer binds words to places early, as alignment with the features of an image encoder
does (REPA, arXiv 2410.06940).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.shapes.render import LABELS
from core2_sampler.shapes.world import COLORS, RELATIONS, SHAPES, Object, Prompt

NOT_ASKED = -100  # the index that `cross_entropy` leaves out
_LINKS = ("alone", "and", *RELATIONS)
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
_COLOR_NAMES = (None, *COLORS)
_FIELDS = (len(SHAPES), 1 + len(COLORS), 3, len(_LINKS), 1 + len(SHAPES), 1 + len(COLORS))
"""Classes of each answer: own shape, color and number; the link; the other's shape and color."""


def _about(own: Object, link: str, other: Object | None) -> list[int]:
    """Return the answers for a word of ``own``."""
    shape = 1 + SHAPES.index(other.shape) if other else 0
    color = _COLOR_NAMES.index(other.color) if other else 0
    mine = [SHAPES.index(own.shape), _COLOR_NAMES.index(own.color), own.count - 1]
    return [*mine, _LINKS.index(link), shape, color]


def word_answers(prompt: Prompt, length: int, *, begin: int, causal: bool) -> Tensor:
    """Return the right answers for each token of a caption, [length, 6].

    Tokens after the last word answer for the whole caption, from its first object.

    Args:
        prompt: every word of it is one token.
        length: tokens, padding included.
        begin: tokens before the first word.
        causal: ask only what the words up to a token tell.
    """
    answers = torch.full((length, len(_FIELDS)), NOT_ASKED)
    first, second = prompt.objects[0], prompt.objects[-1] if len(prompt.objects) > 1 else None
    link = prompt.relation or ("and" if second else "alone")
    at = begin + len(prompt.prefix.split())
    views = [_about(first, link, second)]
    if second:
        views.append(_about(second, _OPPOSITE.get(link, link), first))
    for number, (thing, view) in enumerate(zip(prompt.objects, views, strict=True)):
        noun = at + len(thing.phrase().split()) - 1
        known = 3 if causal and number + 1 < len(views) else len(_FIELDS)
        answers[noun if causal else at : noun + 1, :known] = torch.tensor(view[:known])
        at = noun + 1 + len(link.split())
    answers[noun + 1 :] = torch.tensor(views[0])
    return answers


class WordProbe(nn.Module):
    """One linear layer from a word's state to the logits of all its answers."""

    def __init__(self, width: int) -> None:
        """Read states of ``width`` channels."""
        super().__init__()
        self.read = nn.Linear(width, sum(_FIELDS))

    def forward(self, states: Tensor, answers: Tensor) -> Tensor:
        """Return the cross entropy, summed over the answers and averaged over the words asked.

        Args:
            states: [..., width].
            answers: [..., 6] of ``word_answers``.
        """
        losses = [
            F.cross_entropy(guess, target, ignore_index=NOT_ASKED)
            for guess, target in self._guesses(states, answers)
        ]
        return torch.stack(losses).sum()

    def right(self, states: Tensor, answers: Tensor) -> Tensor:
        """Return the share of the words asked that give each of the answers, [6]."""
        shares = []
        for guess, target in self._guesses(states, answers):
            asked = target != NOT_ASKED
            shares.append((guess.argmax(-1) == target)[asked].float().mean())
        return torch.stack(shares)

    def _guesses(self, states: Tensor, answers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [N, classes] and right answers [N], for each of the six."""
        logits = self.read(states).float().flatten(0, -2).split(_FIELDS, dim=-1)
        yield from zip(logits, answers.flatten(0, -2).unbind(-1), strict=True)


class PatchProbe(nn.Module):
    """Names what lies in each patch of an image."""

    def __init__(self, width: int) -> None:
        """Read image tokens of ``width`` channels."""
        super().__init__()
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, LABELS)
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of the patches.

        Args:
            tokens: [B, T, width], row by row; T square.
            labels: of ``label_map``, [B, H, W]; a patch that holds several is each in part.
        """
        logits = self.read(tokens.float())
        side = round(logits.shape[1] ** 0.5)
        shares = F.one_hot(labels.long(), LABELS).float().unflatten(2, (side, -1))
        target = shares.unflatten(1, (side, -1)).mean((2, 4)).flatten(1, 2)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
