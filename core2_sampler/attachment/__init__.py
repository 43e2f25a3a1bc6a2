"""Plug in anywhere: a weak head under the stock loop of a pipeline that is not ours."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from core2_sampler.attachment.answers import Watch, has_own_scales
from core2_sampler.attachment.checks import (
    NEGATIVES,
    check_config,
    check_head,
    check_placement,
    check_rule,
    check_two_networks,
    find_head,
    scale_argument,
)
from core2_sampler.attachment.networks import find_networks
from core2_sampler.attachment.run import Run, check_no_faster_cache
from core2_sampler.pipelines.stock import CoRe2Mixin
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.weak_heads.base import WeakHead

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attachment:
    """What is attached, and the plan of the latest call."""

    head: WeakHead | None
    config: Core2Config
    scale_name: str
    watch: Watch | None
    plan: Plan | None = None

    @property
    def schedule(self) -> Tensor | None:
        """The scales that the latest call's rule picked, [N, B]."""
        rule = self.config.sample_rule
        return None if rule is None or self.plan is None else rule.schedule

    def run(self, pipe: Any, stock_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.plan = None
        bound = inspect.signature(stock_call).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        call, networks = bound.arguments, find_networks(pipe)
        if not self._asks_for_guidance(call, networks[0].layout.scale_offset):
            return stock_call(pipe, *args, **kwargs)
        run = Run(pipe, networks, self.head, self.config, call, self.scale_name, self.watch)
        try:
            with run.hooked():
                return stock_call(pipe, *args, **kwargs)
        finally:
            self.plan = run.plan

    def _asks_for_guidance(self, call: Mapping[str, Any], scale_offset: float) -> bool:
        """Say whether the stock call would run the negative prompt at all."""
        scale = call[self.scale_name]
        if not scale + scale_offset > 1:
            lack = f"{self.scale_name} must turn guidance on, got {scale}"
        elif self.scale_name != "guidance_scale" and all(call.get(n) is None for n in NEGATIVES):
            lack = f"a negative prompt must be given for {self.scale_name} to act, got none"
            logger.warning("%s: core2 has no effect; pass negative_prompt=''", lack)
        else:
            return True  # the negative prompt is the empty one where none is given
        if has_own_scales(self.config):
            raise ValueError(f"{lack}: the scale of each step, which the config has, is in vain")
        return False


def attach(
    pipe: Any,
    *,
    head: WeakHead | str | Path | None = None,
    core2: str | Core2Config,
    watch: Watch | None = None,
) -> Any:
    """Guide a stock diffusers pipeline by a weak head from its next call on.

    The stock loop stays as it is; only what it is told in the place of uncond changes, so
    callbacks, schedulers, guidance rescale, ControlNets, LoRAs and IP-Adapters act as without us.
    Calls whose guidance scale is 1 or less are those of the stock class.

    Args:
        pipe: the pipeline; this instance alone changes.
        head: a weak head, the folder or hub id of one, or the name of one that needs no training
            (``last_gap``, ``cond``). Outside SDXL, SD3 and FLUX its family is the name of the
            network's class, and it gets what that network is given.
        core2: ``fast``, ``balanced``, ``quality``, or a `Core2Config`. Where it leaves the slow
            steps to the head's card, they are placed in each call, on the noise levels of its loop.
        watch: called in each step that runs both prompts.

    Returns:
        The pipeline itself; its ``core2_plan`` is the plan of the latest call, and its
        ``core2_schedule`` the scales that a rule that sees the latents has picked in it, [N, B].

    Raises:
        ValueError: the pipeline is ours, attached already, has no classifier-free guidance or a
            network that is not known; the head is missing, of another model or without the card
            that the config asks; FasterCache is on; or the config asks for what cannot be done
            from inside a network.
        TypeError: `core2` or `head` is of another type.
    """
    if isinstance(pipe, CoRe2Mixin):
        raise ValueError(
            f"pipe must be a stock pipeline, got {type(pipe).__name__}, which is ours: "
            "pass core2= to its call"
        )
    if is_attached(pipe):
        raise ValueError(
            f"pipe must not be attached already, got an attached {type(pipe).__name__}: "
            "call detach(pipe) first"
        )
    networks = find_networks(pipe)
    scale_name = scale_argument(pipe)
    config = resolve_config(core2)
    check_config(config, networks[0].family)
    check_rule(config, networks[0], pipe.scheduler)
    for network in networks:
        check_no_faster_cache(network.module)
    found = find_head(head, networks[0])
    check_head(found, config, networks[0])
    check_two_networks(config, networks)
    check_placement(found, config)
    pipe._core2_attachment = _Attachment(found, config, scale_name, watch)
    pipe.__class__ = _attached_class(type(pipe))  # type: ignore[arg-type]  # a class is hashable
    return pipe


def detach(pipe: Any) -> Any:
    """Undo `attach`.

    Args:
        pipe: an attached pipeline.

    Returns:
        The pipeline itself, as it was.

    Raises:
        ValueError: nothing is attached.
    """
    if not is_attached(pipe):
        raise ValueError(f"pipe must be attached, got a plain {type(pipe).__name__}")
    pipe.__class__ = type(pipe).__mro__[1]
    del pipe._core2_attachment
    return pipe


@contextmanager
def attached(
    pipe: Any,
    *,
    head: WeakHead | str | Path | None = None,
    core2: str | Core2Config,
    watch: Watch | None = None,
) -> Iterator[Any]:
    """`attach` for the length of a context, with the same arguments and errors.

    Args:
        pipe: the pipeline.
        head: the weak head.
        core2: how to spend the passes.
        watch: called in each step that runs both prompts.

    Yields:
        The pipeline itself.
    """
    attach(pipe, head=head, core2=core2, watch=watch)
    try:
        yield pipe
    finally:
        if is_attached(pipe):
            detach(pipe)


def is_attached(pipe: Any) -> bool:
    """Say whether `attach` acts on a pipeline."""
    return "_core2_attachment" in vars(pipe)


@functools.cache
def _attached_class(stock: type) -> type:
    """Return the class of an attached pipeline: the stock one under its own name, but its call.

    What is made of the class, as by ``type(pipe).from_pipe``, is a stock pipeline.
    """
    stock_call: Any = stock.__call__

    @functools.wraps(stock_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._core2_attachment.run(self, stock_call, args, kwargs)

    members = {
        **{name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")},
        "__new__": lambda _cls, *args, **kwargs: stock(*args, **kwargs),
        "__call__": call,
        "__reduce_ex__": lambda self, _protocol: (_bare, (stock,), vars(self)),
        "core2_plan": property(lambda self: self._core2_attachment.plan),
        "core2_schedule": property(lambda self: self._core2_attachment.schedule),
    }
    return type(stock.__name__, (stock,), members)


def _bare(stock: type) -> Any:
    """Return an attached pipeline without its attributes, for copies and pickles."""
    return object.__new__(_attached_class(stock))
