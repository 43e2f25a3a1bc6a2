"""Sample batches of an arm with the pipeline that users run, and name all that decides its images.

What is generated is kept in one folder per arm, named by a hash of all that decides its images: an
interrupted run goes on where it stopped and nothing is generated twice.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest, hash_component
from core2_sampler.benchmarks.online import online_rule, rule_key
from core2_sampler.benchmarks.study import Case, Study
from core2_sampler.fitting import UNTRAINED
from core2_sampler.info import versions
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.loop import check_head, check_rule
from core2_sampler.plan import Core2Config, make_plan
from core2_sampler.precision import DTYPES
from core2_sampler.progress import only_errors
from core2_sampler.scales import CallableScale, SampleRule
from core2_sampler.steps import Step
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weak_heads import HEADS, load_head
from core2_sampler.weak_heads.base import WeakHead

REVISION = 1
"""Part of every arm's hash: raise it when a change of the sampling code changes images."""

_KEPT_EMBEDS = 256  # prompts; 11 MB each for SD3 with T5

_VERSIONS = ("torch", "diffusers", "transformers")
"""Packages of which another version may draw other images: none are compared across them."""


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
    rule = sample_rule(study, arm) if arm.image_scales is None else _image_rule(arm, cases)
    embedded = {} if arm.embedded_guidance is None else {"guidance_scale": arm.embedded_guidance}
    return {
        **encode(study, cases, with_negative=with_negative),
        "latents": pipe.family.noise(pipe, [case.generator() for case in cases]),
        "num_inference_steps": arm.steps,
        pipe.family.scale_argument: arm.guidance_scale,
        **embedded,
        "output_type": "latent",
        "core2": replace(arm, sample_rule=rule).config(),
    }


def _image_rule(arm: Arm, cases: Sequence[Case]) -> SampleRule:
    """Return the rule that holds each image at the scale that the arm's file has for it."""
    known = _image_scales(arm)
    scales = torch.tensor([known[case.key] for case in cases])  # [B]
    return CallableScale(lambda pair: scales.to(pair.x.device))


def _image_scales(arm: Arm) -> dict[str, float]:
    return json.loads(Path(str(arm.image_scales)).read_text(encoding="utf-8"))["image_scales"]


def sample_rule(study: Study, arm: Arm) -> SampleRule | None:
    """Return what picks an arm's guidance scales while it runs, loaded once."""
    if arm.evaluators is None:
        return arm.sample_rule
    return online_rule(arm.evaluators, study.family, str(study.pipe.device))


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
        with autocast(study), only_errors():
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


def cut_prompts(study: Study) -> int:
    """Return how many prompts are longer than one of the pipeline's text encoders reads."""
    pipe = study.pipe
    found = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    tokenizers = []
    for tokenizer in found:
        if tokenizer is not None:
            asked = None if "CLIP" in type(tokenizer).__name__ else study.max_sequence_length
            tokenizers.append((tokenizer, min(tokenizer.model_max_length, asked or 10**9)))

    def is_cut(text: str) -> bool:
        return any(len(t(text).input_ids) > limit for t, limit in tokenizers)

    with only_errors():
        return sum(is_cut(prompt.text) for prompt in study.prompts)


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
        ValueError: as ``resolve_head`` and the plan, or if the head or the evaluators do not fit
            the denoiser, or the head was not trained for the arm's guidance scale or its gap.
    """
    pipe = study.pipe
    denoiser = pipe.family.denoiser(pipe)
    head = resolve_head(study, arm.head)
    plan = arm.plan(head is not None and head.in_model)
    check_head(head, plan, denoiser)
    if head is not None and plan.needs_head:
        head.check_gap(None)
    if arm.evaluators is not None:
        schedule = pipe.family.schedule(pipe, arm.steps, pipe.family.latent_shape(pipe)[1:])
        check_rule(sample_rule(study, arm), plan, schedule, denoiser)


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
    found = versions()
    return {
        "revision": REVISION,
        "libraries": {name: found[name] for name in _VERSIONS},
        "model": study.model_hash,
        "dtype": study.precision,
        "max_sequence_length": study.max_sequence_length,
        "device": study.pipe.device.type,
    }


def arm_key(study: Study, arm: Arm, head: Any) -> dict[str, Any]:
    """Return all that decides an arm's images but prompt and seed.

    The plan stands for the settings that it is made of, so arms that run the same steps share their
    images. Every other setting is part of the key as it is.

    Raises:
        ValueError: the arm has a rule of its own, which no key tells.
    """
    if arm.sample_rule is not None:
        raise ValueError(f"an arm must be without sample_rule to have a key, got {arm.name!r}")
    plan = arm.plan(head is not None and head.in_model)
    how = asdict(plan) | {"steps": [_step_key(step) for step in plan.steps]}
    how.pop("in_model")  # the head tells
    if arm.evaluators is not None:
        how |= rule_key(online_rule(arm.evaluators, study.family, str(study.pipe.device)))
    if arm.image_scales is not None:
        how["image_scales"] = digest(_image_scales(arm))
    if arm.embedded_guidance is not None:
        how["embedded_guidance"] = arm.embedded_guidance
    return {
        **shared_key(study),
        **how,
        **beside_plan(arm.config()),
        "head": hash_component(head) if plan.needs_head else None,
    }


def beside_plan(config: Core2Config) -> dict[str, Any]:
    """Return the settings of a config that its plan does not tell."""
    planned = {*inspect.signature(make_plan).parameters, "guidance_scales", "scale_rule"}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in planned}


def _step_key(step: Step) -> dict[str, Any]:
    """Return all of a step that decides an image; the scale does nothing in a cond step."""
    key = asdict(step)
    return key | {"guidance_scale": 1.0} if step.kind == "cond" else key


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
    if study.dtype == "fp32" or not study.autocast:
        return nullcontext()
    return torch.autocast(study.pipe.device.type, DTYPES[study.dtype])
