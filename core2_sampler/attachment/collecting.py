"""Collect from a stock pipeline: its own loop runs, and a hook keeps what the network says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from core2_sampler.attachment import attached
from core2_sampler.attachment.answers import Seen, Watch
from core2_sampler.attachment.checks import NEGATIVES, scale_argument
from core2_sampler.attachment.layouts import EMBEDS, Call, told
from core2_sampler.attachment.networks import find_networks
from core2_sampler.attachment.replay import (
    TIMESTEP,
    Replay,
    prompt_tensors,
    timesteps,
    token_mask,
)
from core2_sampler.collect import CollectConfig, Job, driver, fill_store, make_units
from core2_sampler.plan import Core2Config
from core2_sampler.recording import Recorder, Unit, encodings_by_file, kept_steps
from core2_sampler.rows import EXTRA, TOKEN_MASK
from core2_sampler.trajectory import Record, TrajectoryStore
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead

Arguments = Callable[[Sequence[Record]], Mapping[str, Any]]
"""``arguments(records)``: of a pipeline's call for B trajectories, beside `_OURS` and the scale.

The prompts are given unless they are here. What they tell the network beside the latents must
follow from the prompt alone: a store keeps it once for each prompt.
"""

_OURS = ("generator", "output_type", "num_images_per_prompt")

_TIMESTEP_ROW = EXTRA + TIMESTEP  # so `Rows` hand it on with what the prompts tell

_CFG = Core2Config(mode="cfg")
_FAST = Core2Config(slow_steps=1.0, w2s_scale=0.0)  # goes where fast steps go, and measures the gap


def collect_stock(
    pipe: Any,
    arguments: Arguments,
    jobs: Sequence[Job],
    store: TrajectoryStore,
    config: CollectConfig,
    *,
    policy: WeakHead | None = None,
    about: Mapping[str, Any] | None = None,
    **sharing: Any,
) -> int:
    """Run the jobs that the store does not hold yet by a stock pipeline, and store them.

    The store, and what holds for a kill and for several processes, are those of
    `core2_sampler.collect.collect`. Rows also tell each timestep, and prompts what the network was
    told of them, so that `replay` can make each pass again.

    Args:
        pipe: any pipeline that `core2_sampler.attach` takes. Of two networks each makes the rows of
            its own steps; the scale of the second, if it is another, is one of the arguments.
        arguments: of its call.
        jobs: trajectories; prompt id and seed together must be unique.
        store: where the rows go.
        config: what to keep; its scales are above 1.
        policy: the head of an on-policy round; None lets CFG drive.
        about: facts on the model and its call, pinned to the round and checked on resume.
        **sharing: further arguments of `core2_sampler.collect.fill_store`.

    Returns:
        The number of trajectories that this call added.

    Raises:
        ValueError: as `core2_sampler.attach` and `core2_sampler.collect.collect`; the pipeline
            tells each token a timestep, prompts have other numbers of tokens, the store has prompts
            without a mask that the network is told, or a scale or an argument is not as said above.
    """
    network = find_networks(pipe)[0]
    if config.features and network.denoiser is None:
        raise ValueError(
            f"features are known of sdxl, sd3 and flux, got {network.family}: leave them out"
        )
    if min(config.guidance_scales) <= 1:
        raise ValueError(
            "guidance_scales must be above 1 for a stock pipeline, whose loop makes one pass at 1, "
            f"got {min(config.guidance_scales):g}"
        )
    first = _first_pass(pipe, arguments, make_units(jobs[:1], config)[0], policy)
    timesteps(first.call, 1)  # refuses what no row could hold before the round is pinned
    _check_masks(store, first.call)
    facts = {
        "sigmas": list(first.levels),
        "policy": driver(policy),
        "pipeline": type(pipe).__name__,
        **(about or {}),
    }

    def run(records: Sequence[Record]) -> Unit:
        keep = [
            kept_steps(record, len(first.levels) - 1, config.steps_per_trajectory)
            for record in records
        ]
        watch = _Keeper(Recorder(first.levels, keep, config.features), first.call)
        _run(pipe, arguments, records, policy, watch)
        encodings = encodings_by_file(records, watch.prompt())
        return watch.recorder.rows(), {name: _tokens(each) for name, each in encodings.items()}

    return fill_store(run, jobs, store, config, about=facts, **sharing)


def replay(
    pipe: Any, arguments: Arguments, record: Record, store: TrajectoryStore | None = None
) -> Replay:
    """Return the network of a stock pipeline as it is called there, to train a head in.

    Args:
        pipe: the pipeline; of two networks, for heads on outputs alone.
        arguments: of its call, as they were given to `collect_stock`.
        record: any that was collected; the loop makes its first step.
        store: that it is from, to check that it has what the network is told of a prompt.

    Raises:
        ValueError: the network's passes cannot be made again, or the store has prompts without
            the mask that the network is told.
    """
    first = _first_pass(pipe, arguments, [record], None)
    if store is not None:
        _check_masks(store, first.call)
    return Replay(first.network, first.call)


def _run(
    pipe: Any,
    arguments: Arguments,
    records: Sequence[Record],
    policy: WeakHead | None,
    watch: Watch,
) -> None:
    """Call the pipeline for trajectories of one guidance scale."""
    given = arguments(records)
    scale = scale_argument(pipe)
    if wrong := [name for name in (*_OURS, scale) if name in given]:
        raise ValueError(f"{wrong[0]} must be left to Collect, got {given[wrong[0]]!r}")
    offset = find_networks(pipe)[0].layout.scale_offset
    call = {
        "prompt": [record.prompt for record in records],
        "generator": [torch.Generator().manual_seed(record.seed) for record in records],
        scale: records[0].guidance_scale - offset,
        "output_type": "latent",
    }
    if scale != "guidance_scale" and not any(name in given for name in NEGATIVES):
        # without any, the scale has no effect
        call["negative_prompt"] = [""] * len(records)
    core2 = _CFG if policy is None else _FAST
    with attached(pipe, head=policy, core2=core2, watch=watch):
        pipe(**{**call, **given})


class _Enough(Exception):
    """Ends a run from within."""


@dataclass(slots=True)
class _First:
    """Sees the first step that runs both prompts, and ends the run."""

    features: bool = False
    seen: list[Seen] = field(default_factory=list)

    def __call__(self, seen: Seen) -> None:
        self.seen.append(seen)
        raise _Enough


def _first_pass(
    pipe: Any, arguments: Arguments, records: Sequence[Record], policy: WeakHead | None
) -> Seen:
    watch = _First()
    try:
        _run(pipe, arguments, records, policy, watch)
    except _Enough:
        return watch.seen[0]
    raise ValueError(
        f"the loop must ask for the negative prompt, got a {type(pipe).__name__} that never does: "
        "there is no gap to collect"
    )


@dataclass(slots=True)
class _Keeper:
    """Keeps what a store keeps of a run, in the words of the library."""

    recorder: Recorder
    like: Call
    _prompt: Conditioning | None = None
    _extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def features(self) -> bool:
        """Whether the last hidden states are kept."""
        return self.recorder.features

    def __call__(self, seen: Seen) -> None:
        network, call, sigma = seen.network, seen.call, seen.levels[seen.i]
        shown = network.show(seen.cond, call, sigma, seen.features)
        gap = network.true_gap(seen.gap, call, sigma)
        exact = {_TIMESTEP_ROW: timesteps(call, len(shown.x))}
        self.recorder(seen.i, shown.x, shown.cond, gap, shown.features, exact)
        extra = prompt_tensors(network, call, self.like)
        if TOKEN_MASK in call.kwargs:
            extra[TOKEN_MASK] = token_mask(call)
        if self._prompt is None:
            if TOKEN_MASK not in extra:
                _check_tokens(call, self.like)
            self._prompt, self._extra = shown.prompt, extra
        else:  # what each step tells anew does not belong to the prompt
            known = self._extra.items()
            self._extra = {n: x for n, x in known if n in extra and torch.equal(x, extra[n])}

    def prompt(self) -> Conditioning:
        """Return the prompts of the run, once it has ended."""
        if self._prompt is None:
            raise ValueError("the loop must ask for the negative prompt, got a run that did not")
        return Conditioning(self._prompt.prompt_embeds, self._prompt.pooled, self._extra)


def _tokens(encoding: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a prompt without what fills it up to the longest of its batch, where a mask tells."""
    mask = encoding.get(EXTRA + TOKEN_MASK)
    if mask is None:
        return encoding
    told = {name: encoding[name][mask] for name in ("prompt_embeds", EXTRA + TOKEN_MASK)}
    return {**encoding, **told}


def _check_masks(store: TrajectoryStore, call: Call) -> None:
    """Raise ValueError for stored prompts without the mask of tokens that a network is told."""
    if TOKEN_MASK not in call.kwargs:
        return
    for name in sorted({record.prompt_file for record in store.records().values()}):
        path = store.root / "prompts" / name
        with safe_open(path, framework="pt") as file:
            if EXTRA + TOKEN_MASK not in file.keys():  # noqa: SIM118
                raise ValueError(
                    f"a store must tell which tokens are a prompt's, got {path} without a mask, of "
                    "an older version, which stored what fills a prompt up as well: collect into "
                    "another folder"
                )


def _check_tokens(call: Call, first: Call) -> None:
    """Raise ValueError for prompts that no batch could have together with those of a first pass."""
    embeds, like = (told(each.kwargs, EMBEDS) for each in (call, first))
    if embeds is not None and embeds.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"prompts must be told in as many tokens as the first, {like.shape[1]}, got "
            f"{embeds.shape[1]}: this pipeline pads to the longest prompt of a call, so collect "
            "prompts of one length, or give the call prompt_embeds of one length"
        )
