"""Run the arms of a study with the pipeline that users run, and keep every finished batch.

What was generated is kept in one folder per arm, named by a hash of all that decides its images,
one file per batch, written whole or not at all: an interrupted run goes on where it stopped and
nothing is generated twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import (
    digest,
    hash_component,
    read_batches,
    write_batch,
)
from core2_sampler.benchmarks.study import DTYPES, ArmResult, Case, Study
from core2_sampler.model_files import UNTRAINED
from core2_sampler.nfe import count_nfe
from core2_sampler.trajectory import TrajectoryStore, write_atomic
from core2_sampler.types import InModelHead
from core2_sampler.weak_heads import HEADS, load_head
from core2_sampler.weak_heads.base import WeakHead

REVISION = 1
"""Part of every arm's hash: raise it when a change of the sampling code changes images."""

_KEPT_EMBEDS = 256  # prompts; 11 MB each for SD3 with T5

OnBatch = Callable[[int], None]
"""``on_batch(done)``: images of the arm that are there, before the first and after each batch."""


def run_arm(study: Study, arm: Arm, *, on_batch: OnBatch | None = None) -> ArmResult:
    """Generate what is missing of an arm, then judge all of it.

    Args:
        study: what the arms share.
        arm: the arm.
        on_batch: told about progress.

    Raises:
        ValueError: if the arm's head does not fit the model, its settings are impossible, or the
            study has no judge.
        RuntimeError: if the counted NFE is not what the plan says.
    """
    judge = study.judge
    if judge is None:
        raise ValueError("a study must have a judge to have its arms judged, got none")
    head = resolve_head(study, arm.head)
    folder = arm_folder(study, arm, head)
    kept = read_batches(folder)
    cases = study.cases
    missing = [case for case in cases if case.key not in kept]
    on_batch = on_batch or (lambda done: None)
    on_batch(len(cases) - len(missing))
    with using_head(study.pipe, head):
        for start in range(0, len(missing), study.batch_size):
            batch = missing[start : start + study.batch_size]
            keys = [case.key for case in batch]
            kept |= write_batch(folder, keys, *generate(study, arm, batch))
            on_batch(sum(case.key in kept for case in cases))
    found = [kept[case.key] for case in cases]
    images = torch.stack([one.image for one in found])
    pictures = [Image.fromarray(image.numpy()) for image in images]
    verdicts = [judge(picture, c.prompt) for picture, c in zip(pictures, cases, strict=True)]
    return ArmResult(
        arm,
        found[0].nfe,
        images,
        torch.stack([one.latents for one in found]),
        [bool(verdict.correct) for verdict in verdicts],
        [verdict.reason for verdict in verdicts],
    )


@torch.no_grad()
def generate(study: Study, arm: Arm, cases: Sequence[Case]) -> tuple[Tensor, Tensor, float]:
    """Sample one batch with the pipeline that users run, and count its denoiser evaluations.

    Returns:
        Final latents float32, as the pipeline lays them out; images [B, H, W, 3] uint8; NFE of
        one sample.

    Raises:
        RuntimeError: if the counted NFE is not what the plan says.
    """
    pipe = study.pipe
    head = pipe.weak_head
    plan = arm.plan(head is not None and head.in_model)
    pipe.set_progress_bar_config(disable=True)
    with count_nfe(pipe.family.denoiser(pipe).module) as counter, autocast(study):
        final = pipe(**call_of(study, arm, cases, with_negative=plan.needs_uncond)).images
    nfe = counter.per_sample(len(cases))
    if nfe != plan.nfe:
        raise RuntimeError(
            f"arm {arm.name!r} must cost the {plan.nfe:g} denoiser evaluations a sample that its "
            f"plan says, got {nfe:g} counted: nothing of this batch was kept"
        )
    return final.float().cpu(), decode(pipe, final), nfe


def call_of(
    study: Study, arm: Arm, cases: Sequence[Case], *, with_negative: bool
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that samples a batch of an arm."""
    pipe = study.pipe
    return {
        **encode(study, cases, with_negative=with_negative),
        "latents": pipe.family.noise(pipe, [case.generator() for case in cases]),
        "num_inference_steps": arm.steps,
        pipe.family.scale_argument: arm.guidance_scale,
        "output_type": "latent",
        "core2": arm.config(),
    }


@torch.no_grad()
def encode(study: Study, cases: Sequence[Case], *, with_negative: bool) -> dict[str, Tensor]:
    """Return the pipeline's embedding arguments for a batch; each prompt is encoded once."""
    texts = [case.prompt.text for case in cases]
    new = sorted({text for text in texts if text not in study._embeds})
    if len(study._embeds) + len(new) > _KEPT_EMBEDS:
        study._embeds.clear()
        new = sorted(set(texts))
    if new:
        length = study.max_sequence_length
        options = {} if length is None else {"max_sequence_length": length}
        with autocast(study):
            cond, uncond = study.pipe.family.encode(study.pipe, new, [""] * len(new), **options)
        for k, text in enumerate(new):
            study._embeds[text] = {
                "prompt_embeds": cond.prompt_embeds[k],
                "pooled_prompt_embeds": cond.pooled[k],
                "negative_prompt_embeds": uncond.prompt_embeds[k],
                "negative_pooled_prompt_embeds": uncond.pooled[k],
            }
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    if with_negative:
        names += ["negative_prompt_embeds", "negative_pooled_prompt_embeds"]
    return {name: torch.stack([study._embeds[text][name] for text in texts]) for name in names}


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode final latents as the pipeline does with ``output_type='pil'``, [B, H, W, 3] uint8."""
    decoded = pipe.family.decode(pipe, latents.to(pipe.vae.dtype))
    pixels = torch.from_numpy(pipe.image_processor.postprocess(decoded, output_type="np"))
    return (pixels * 255).round().to(torch.uint8)


def resolve_head(study: Study, name: str | None) -> WeakHead | None:
    """Load a head's folder, or build a control that needs no training by its name.

    Raises:
        ValueError: if there is no such head, or it is one of another family.
    """
    if name is None:
        return None
    if name in UNTRAINED:
        return HEADS.get(name).for_denoiser(study.pipe.family.denoiser(study.pipe))
    return load_head(name, study.family)


def check_arm(study: Study, arm: Arm) -> None:
    """Refuse an arm that could not run, before hours go into those ahead of it.

    Raises:
        ValueError: as ``resolve_head`` and the plan, or if an in-model head does not fit the
            denoiser or was not trained for the arm's guidance scale.
    """
    head = resolve_head(study, arm.head)
    plan = arm.plan(head is not None and head.in_model)
    if plan.needs_head and plan.in_model:
        in_model = cast(InModelHead, head)
        with (
            in_model.attached(study.pipe.family.denoiser(study.pipe).module),
            in_model.active(arm.guidance_scale),
        ):
            pass


def fit_affine(study: Study, trajectories: Path) -> WeakHead:
    """Fit the per-step affine control on all rows of a trajectory store.

    Raises:
        ValueError: if the store is empty or of another model.
    """
    rows = TrajectoryStore(trajectories).rows()
    head = HEADS.get("affine").for_denoiser(study.pipe.family.denoiser(study.pipe))
    head.fit(rows.take(index) for index in torch.arange(len(rows)).split(4096))
    return head


@contextmanager
def using_head(pipe: Any, head: Any) -> Iterator[None]:
    """Put a head (or None) into a pipeline, and the pipeline's own one back at the end."""
    own = pipe.weak_head
    pipe.register_modules(weak_head=head if head is None else head.to(pipe.device))
    try:
        yield
    finally:
        pipe.register_modules(weak_head=own)


def shared_key(study: Study) -> dict[str, Any]:
    """Return what decides the images of all arms of a study."""
    return {
        "revision": REVISION,
        "model": study.model_hash,
        "dtype": study.dtype,
        "max_sequence_length": study.max_sequence_length,
        "device": study.pipe.device.type,
    }


def arm_key(study: Study, arm: Arm, head: Any) -> dict[str, Any]:
    """Return all that decides an arm's images but prompt and seed.

    The plan stands for the arm's settings, so arms that run the same steps share their images.
    """
    plan = arm.plan(head is not None and head.in_model)
    steps = [
        (s.kind, 1.0 if s.kind == "cond" else s.guidance_scale, s.w2s_scale) for s in plan.steps
    ]
    return {
        **shared_key(study),
        "steps": steps,
        "head": hash_component(head) if plan.needs_head else None,
    }


def arm_folder(study: Study, arm: Arm, head: Any, writer: int = 0) -> Path:
    """Return the folder of an arm's images; it holds what its name is the hash of.

    Args:
        study: what the arms share.
        arm: the arm.
        head: its head, loaded.
        writer: number of the process, where several share the folder.
    """
    key = arm_key(study, arm, head)
    folder = study.folder / digest(key)
    write_atomic(folder / "arm.json", json.dumps(key, indent=1).encode(), writer)
    return folder


def autocast(study: Study) -> AbstractContextManager[Any]:
    """Return the context of a study's precision."""
    if study.dtype == "fp32":
        return nullcontext()
    return torch.autocast(study.pipe.device.type, DTYPES[study.dtype])
