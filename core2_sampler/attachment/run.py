"""One call of an attached pipeline: hooks on its networks, and what they are to answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.faster_cache import FasterCacheDenoiserHook
from torch import nn

from core2_sampler.attachment.answers import Answers, Forward, Watch, has_own_scales
from core2_sampler.attachment.clock import (
    after_each_step,
    final_level,
    first_step,
    noise_levels,
    predicts_noise,
)
from core2_sampler.attachment.layouts import Call
from core2_sampler.attachment.measure import check_pass, measure_of
from core2_sampler.attachment.networks import Network
from core2_sampler.pipelines.adapters.flux import check_cache
from core2_sampler.pipelines.calls import count_images
from core2_sampler.pipelines.loop import check_head
from core2_sampler.plan import Core2Config, Plan
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.card import step_errors

logger = logging.getLogger(__name__)

_HOOK = "core2"
_READ_COND = ("guidance_rescale", "skip_guidance_layers")
"""Arguments by which a stock loop goes on to use cond itself."""

Answer = Callable[[Forward, Call], Any]
"""``answer(forward, call)``: what the caller of a network gets for a pass."""


@dataclass(slots=True, eq=False)
class Run:
    """The state of one call; made by the call and gone with it.

    Attributes:
        pipe: the pipeline.
        networks: its denoisers.
        head: the weak head.
        config: how to spend the passes.
        call: the stock call's arguments by name.
        scale_name: which of them is the scale of classifier-free guidance.
        watch: sees the steps that run both prompts.
        plan: known from the first pass on.
        step: how many steps the scheduler has made.
    """

    pipe: Any
    networks: list[Network]
    head: WeakHead | None
    config: Core2Config
    call: Mapping[str, Any]
    scale_name: str
    watch: Watch | None = None
    plan: Plan | None = None
    step: int = 0
    _answers: Answers = field(init=False)
    _batch: int = 0
    _paired: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Start before the first step."""
        rule = self.config.sample_rule
        own = rule is None and has_own_scales(self.config)
        self._answers = Answers(self.head, self._scale, own, rule, self.watch)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Stand between the loop and its networks; on exit both are as they were.

        Raises:
            ValueError: a network is in another attached call already.
        """
        with ExitStack() as stack:
            stack.enter_context(after_each_step(self.pipe.scheduler, self._next_step))
            for network in self.networks:

                def answer(forward: Forward, call: Call, network: Network = network) -> Any:
                    return self.answer(network, forward, call)

                stack.enter_context(hook_network(network.module, answer))
            self._stack = stack
            yield
        if self.plan is not None and not self._answers.guided:
            logger.warning(
                "%s ran without guidance, as its stock loop does: it never asked for the negative "
                "prompt, so core2 had no effect",
                type(self.pipe).__name__,
            )

    def answer(self, network: Network, forward: Forward, call: Call) -> Any:
        """Return what the loop gets for a pass.

        Args:
            network: that is asked.
            forward: runs it.
            call: the loop's arguments.

        Raises:
            ValueError: the run does not fit the config or the head, or the pass has other rows
                than one or two for each image.
            RuntimeError: the loop makes more steps than it has announced.
        """
        rows = len(network.sample(call))
        if self.plan is None:
            self._begin(network, call, rows)
        if rows not in (self._batch, 2 * self._batch):
            raise ValueError(
                f"a pass must have one row or two for each of the {self._batch} images, got "
                f"{rows}: attach knows no such guidance, call detach(pipe)"
            )
        if rows == self._batch and self._paired:
            # guidance is off, or this is the third pass of skip-layer guidance
            return forward(*call.args, **call.kwargs)
        answers = self._now()
        if rows == 2 * self._batch:
            return answers.pair(network, forward, call, self._batch)
        one = answers.negative if answers.waits else answers.prompt
        return one(network, forward, call)

    def _next_step(self) -> None:
        self.step += 1
        self._answers.go_on()

    def _now(self) -> Answers:
        """Return what answers the passes of this step."""
        plan, answers = cast(Plan, self.plan), self._answers
        if self.step >= len(plan):
            raise RuntimeError(
                f"the loop must make the {len(plan)} steps that it has announced, got one more: "
                "attach knows no such loop, call detach(pipe)"
            )
        answers.i, answers.step = self.step, plan.steps[self.step]
        answers.sigma, answers.asks = answers.levels[self.step], self.step in plan.asking
        return answers

    def _begin(self, network: Network, call: Call, rows: int) -> None:
        """Make the plan, now that the loop has set its timesteps, and check all that it needs."""
        prompts = self.call.get("prompt")
        images = self.call.get("num_images_per_prompt") or self.call.get("num_videos_per_prompt")
        self._batch = count_images(
            SimpleNamespace(
                prompt=self.call.get("prompt_embeds") if prompts is None else prompts,
                num_images_per_prompt=images or 1,
            )
        )
        self._paired = rows == 2 * self._batch
        scheduler, head = self.pipe.scheduler, self.head
        levels = [*noise_levels(scheduler).tolist(), final_level(scheduler)]
        steps = getattr(self.pipe, "_num_timesteps", None)
        start = first_step(scheduler, call, steps)
        steps = steps or len(levels) - 1 - start
        self._answers.levels = levels = levels[start : start + steps + 1]
        in_model = head is not None and head.in_model
        sigmas = torch.tensor(levels, dtype=torch.float64)
        errors = partial(step_errors, head, sigmas, noise=predicts_noise(scheduler))
        plan = self.config.plan(steps, self._scale(network), in_model, errors)
        check_head(head, plan, network)  # type: ignore[arg-type]  # reads what a Network has
        for each in self.networks:
            self._check_plan(plan, each.module)
        # all passes of one shape, so that no step waits for the compiler; plain CFG is as it was
        self._answers.apart = network.compiled and any(step.kind != "cfg" for step in plan.steps)
        if head is not None:
            head.to(network.sample(call).device)
            if in_model:
                self._stack.enter_context(cast(Any, head).attached(network.module))
            else:
                head.reset()
            head.begin(levels[:-1], None)
        if self._answers.rule is not None:
            self._answers.measure = measure_of(network, scheduler, self.call)
            check_pass(call)
            self._answers.rule.begin(network, levels)  # type: ignore[arg-type]  # as above
        self.plan = plan

    def _check_plan(self, plan: Plan, module: nn.Module) -> None:
        check_no_faster_cache(module)
        check_cache(module, plan)
        kinds = {step.kind for step in plan.steps}
        mixed = bool(kinds & {"cond", "fast"}) and bool(kinds & {"cfg", "slow"})
        if self._paired and mixed and getattr(module, "_cache_config", None) is not None:
            raise ValueError(
                "a cache must be off where steps differ in rows, got "
                f"{type(module._cache_config).__name__}: call disable_cache(), or use core2='fast'"
            )
        given = [name for name in _READ_COND if self.call.get(name)]
        if self._answers.rule is not None and given:
            raise ValueError(
                f"{given[0]} must be left out with a scale rule that sees the latents, which would "
                f"look ahead without it, got {self.call[given[0]]}"
            )
        if plan.in_model and "fast" in kinds and given:
            raise ValueError(
                f"{given[0]} must be left out in fast steps of a head inside the denoiser, which "
                f"know no cond, got {self.call[given[0]]}: use another head, or only slow steps"
            )

    def _scale(self, network: Network) -> float:
        """Return the loop's guidance scale as it is now; callbacks may change it."""
        now = vars(self.pipe).get(f"_{self.scale_name}", self.call[self.scale_name])
        return float(now) + network.layout.scale_offset


class GuidanceHook(ModelHook):
    """Answers a network's passes in its place.

    Args:
        answer: to each pass.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    @torch.compiler.disable(recursive=False)
    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Answer a pass."""
        return self.answer(self.fn_ref.original_forward, Call(args, kwargs))


def check_no_faster_cache(module: nn.Module) -> None:
    """Raise ValueError if a network's FasterCache is on: it guesses uncond too."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    hooks = registry.hooks.values() if registry is not None else ()
    if any(isinstance(hook, FasterCacheDenoiserHook) for hook in hooks):
        raise ValueError(
            "FasterCache must be off, because it makes up the uncond that a weak head replaces, "
            f"got {type(module).__name__} with it: call disable_cache() on it"
        )


@contextmanager
def hook_network(module: nn.Module, answer: Answer) -> Iterator[None]:
    """Answer the passes of this network alone; on exit its forward is what it was.

    Args:
        module: the network.
        answer: to each pass.

    Raises:
        ValueError: its passes are answered already.
    """
    own = "forward" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(_HOOK) is not None:
        raise ValueError(
            f"a network must be in one attached call at a time, got {type(module).__name__} in a "
            "second one: make the call when the other has returned"
        )
    registry.register_hook(GuidanceHook(answer), _HOOK)
    ours = module.forward
    try:
        yield
    finally:
        now = module.forward
        registry.remove_hook(_HOOK, recurse=False)
        if now is not ours:  # model offload puts its hooks on anew at the end of a call
            module.forward = now
        elif not own:
            del module.forward
