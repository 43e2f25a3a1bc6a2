"""What a run of Collect keeps: the chosen steps of each trajectory, as a store takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core2_sampler.rows import encoding_tensors, stable_hash
from core2_sampler.trajectory import Record
from core2_sampler.types import Conditioning

Unit = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]
"""What comes of a work unit: (rows, encodings), as a store takes them."""


def kept_steps(record: Record, num_steps: int, steps_per_trajectory: int | None) -> list[int]:
    """Return the steps that are stored of a trajectory; they depend on nothing but its key."""
    if steps_per_trajectory is None or steps_per_trajectory >= num_steps:
        return list(range(num_steps))
    generator = torch.Generator().manual_seed(stable_hash("steps", *record.key))
    order = torch.randperm(num_steps, generator=generator)
    return sorted(order[:steps_per_trajectory].tolist())


def halve(tensor: Tensor) -> Tensor:
    """Return a tensor as it is stored: float16 for floating-point numbers."""
    return tensor.half() if tensor.is_floating_point() else tensor


def encodings_by_file(
    records: Sequence[Record], cond: Conditioning
) -> dict[str, dict[str, Tensor]]:
    """Return the prompts of a unit, B rows, as a store takes them."""
    halves = {name: halve(tensor) for name, tensor in encoding_tensors(cond).items()}
    return {
        record.prompt_file: {name: tensor[index] for name, tensor in halves.items()}
        for index, record in enumerate(records)
    }


class Recorder:
    """The ``on_pair`` of a run: keeps the chosen steps of each trajectory, on the CPU.

    Args:
        sigmas: noise levels of the run, [N] or [N + 1].
        keep: the steps to keep of each trajectory.
        features: keep the denoiser's last hidden states too.
    """

    def __init__(
        self, sigmas: Sequence[float], keep: Sequence[Sequence[int]], features: bool
    ) -> None:
        self.features = features
        self._sigmas, self._keep = sigmas, keep
        self._parts: list[dict[str, Tensor]] = []

    def __call__(
        self,
        i: int,
        x: Tensor,
        cond: Tensor,
        gap: Tensor,
        features: Tensor | None,
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep what is wanted of a step.

        Args:
            i: number of the step.
            x: latents, [B, C, H, W].
            cond: prediction with the prompt, as `x`.
            gap: the true one, as `x`.
            features: last hidden states, [B, T, D], if there are any.
            exact: further tensors by name, [B] each, kept in their own precision.

        Raises:
            ValueError: a value is not finite in float16.
        """
        chosen = [index for index, steps in enumerate(self._keep) if i in steps]
        if not chosen:
            return
        sigma = float(self._sigmas[i])
        tensors = {"x": x, "cond": cond, "gap": gap}
        if features is not None and self.features:  # a head may ask for them too
            tensors["features"] = features
        part = {name: halve(tensor[chosen].cpu()) for name, tensor in tensors.items()}
        if not all(torch.isfinite(tensor).all() for tensor in part.values()):
            raise ValueError(
                f"states and predictions must be finite in float16, got others at step {i} "
                f"(sigma {sigma:.4g})"
            )
        part |= {name: tensor[chosen].cpu() for name, tensor in (exact or {}).items()}
        part["sigma"] = torch.full((len(chosen),), sigma)
        part["step"] = torch.full((len(chosen),), i, dtype=torch.int32)
        part["record"] = torch.tensor(chosen, dtype=torch.int32)
        self._parts.append(part)

    def rows(self) -> dict[str, Tensor]:
        """Return everything kept, [R, ...] each.

        Raises:
            ValueError: nothing was.
        """
        if not self._parts:
            raise ValueError(
                "a run must make both passes at a step that is kept, got none: raise "
                "steps_per_trajectory, or collect with a scale and a call that guide it"
            )
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
