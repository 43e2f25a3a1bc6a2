"""One call of an attached pipeline: the stock loop asks for uncond, and we say what it is told.

The stock loop keeps its own line, ``uncond + scale * (cond - uncond)``, and all that follows it. It
always gets the true cond; in the place of uncond it gets ``cond - gap`` with the gap of the step's
kind: the head's (fast), ``weak_to_strong`` of the head's and the true one (slow), the true one
(CFG), none (cond). Guidance is linear in the gap, so this is the same `d` that our own loops make.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.faster_cache import FasterCacheDenoiserHook
from torch import Tensor, nn

from core2_sampler.attachment.clock import after_each_step, first_step, noise_levels
from core2_sampler.attachment.networks import Call, Network
from core2_sampler.guidance import weak, weak_to_strong
from core2_sampler.pipelines.adapters.flux import check_cache
from core2_sampler.pipelines.calls import count_images
from core2_sampler.pipelines.loop import check_head
from core2_sampler.plan import Core2Config, Plan, Step
from core2_sampler.precision import wide
from core2_sampler.weak_heads.base import WeakHead

logger = logging.getLogger(__name__)

_HOOK = "core2"
_READ_COND = ("guidance_rescale", "skip_guidance_layers")
"""Arguments by which a stock loop goes on to use cond itself."""

Forward = Callable[..., Any]


@dataclass(slots=True)
class _PromptPass:
    """The first pass of a step where a loop makes two: what its answer to the second needs."""

    call: Call
    output: Any
    cond: Tensor
    features: Tensor | None
    guess: Tensor | None = None


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
        plan: known from the first pass on.
        step: how many steps the scheduler has made.
        guided: whether the loop has asked for guidance at all.
    """

    pipe: Any
    networks: list[Network]
    head: WeakHead | None
    config: Core2Config
    call: Mapping[str, Any]
    scale_name: str
    plan: Plan | None = None
    step: int = 0
    guided: bool = False
    _batch: int = 0
    _sigmas: list[float] = field(default_factory=list)
    _paired: bool = False
    _first: _PromptPass | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Stand between the loop and its networks; on exit both are as they were."""
        with ExitStack() as stack:
            stack.enter_context(after_each_step(self.pipe.scheduler, self._next_step))
            for network in self.networks:
                stack.enter_context(_hook(network.module, GuidanceHook(self, network)))
            self._stack = stack
            yield
        if self.plan is not None and not self.guided:
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
        if rows == 2 * self._batch:
            return self._answer_pair(network, forward, call)
        if rows != self._batch:
            raise ValueError(
                f"a pass must have one row or two for each of the {self._batch} images, got "
                f"{rows}: attach knows no such guidance, call detach(pipe)"
            )
        if self._paired:  # guidance is off, or the third pass of skip-layer guidance
            return forward(*call.args, **call.kwargs)
        if self._first is None:
            return self._answer_prompt(network, forward, call)
        first, self._first = self._first, None
        return self._answer_negative(network, forward, call, first)

    def _next_step(self) -> None:
        self.step += 1
        self._first = None

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
        levels = noise_levels(self.pipe.scheduler)
        start = first_step(self.pipe.scheduler, call)
        steps = getattr(self.pipe, "_num_timesteps", None) or len(levels) - start
        self._sigmas = levels[start : start + steps].tolist()
        head = self.head
        in_model = head is not None and head.in_model
        plan = self.config.plan(steps, self._scale(network), in_model)
        check_head(head, plan, network)  # type: ignore[arg-type]  # reads what a Network has
        for each in self.networks:
            self._check_plan(plan, each.module)
        if head is not None:
            head.to(network.sample(call).device)
            if in_model:
                self._stack.enter_context(cast(Any, head).attached(network.module))
            else:
                head.reset()
            head.begin(self._sigmas, None)
        self.plan = plan

    def _check_plan(self, plan: Plan, module: nn.Module) -> None:
        if plan.zigs:
            raise ValueError(
                "zigzag steps need one of our pipelines (CoRe2Pipeline), got an attached one: use "
                "another mode"
            )
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
        if plan.in_model and "fast" in kinds and given:
            raise ValueError(
                f"{given[0]} must be left out in fast steps of a head inside the denoiser, which "
                f"know no cond, got {self.call[given[0]]}: use another head, or only slow steps"
            )

    def _answer_pair(self, network: Network, forward: Forward, call: Call) -> Any:
        """Answer one pass of both prompts; run the prompt's rows alone where that is enough."""
        step, self.guided = self._step(), True
        prompt = network.rows(call, self._batch, prompt=True)
        run = call if step.kind in ("cfg", "slow") else prompt
        with self._active(step, network), network.capture(self.head) as read:
            output = forward(*run.args, **run.kwargs)
        features = read()
        if run is prompt:
            cond = network.prediction(output)
            first = _PromptPass(prompt, output, cond, features)
            return network.join(output, cond, self._without_negative(step, network, first))
        cond, uncond = network.split(network.prediction(output))
        features = None if features is None else network.split(features)[0]
        first = _PromptPass(prompt, output, cond, features)
        first.guess = self._in_model_guess(step, network, forward, first)
        told = self._with_negative(step, network, first, uncond)
        return output if told is uncond else network.join(output, cond, told)

    def _answer_prompt(self, network: Network, forward: Forward, call: Call) -> Any:
        """Answer the first pass of a step: cond, whatever the kind."""
        step = self._step()
        with self._active(step, network), network.capture(self.head) as read:
            output = forward(*call.args, **call.kwargs)
        first = _PromptPass(call, output, network.prediction(output), read())
        # Now, because a loop may change its arguments in place before the second pass.
        first.guess = self._in_model_guess(step, network, forward, first)
        self._first = first
        return output

    def _answer_negative(
        self, network: Network, forward: Forward, call: Call, first: _PromptPass
    ) -> Any:
        """Answer the second pass of a step; run it only where the true uncond is needed."""
        step, self.guided = self._step(), True
        if step.kind in ("cfg", "slow"):
            output = forward(*call.args, **call.kwargs)
            told = self._with_negative(step, network, first, network.prediction(output))
            return network.replace(output, told)
        told = self._without_negative(step, network, first)
        return network.replace(first.output, told)

    def _without_negative(self, step: Step, network: Network, first: _PromptPass) -> Tensor:
        """Return what the loop is told in the place of uncond by a step that does not run it."""
        if step.kind == "cond" or cast(WeakHead, self.head).in_model:
            return first.cond  # of an in-model head that is the guided d already
        gap = self._gap(network, first)
        return weak(first.cond, gap, 1 - self._share(step, network))

    def _with_negative(
        self, step: Step, network: Network, first: _PromptPass, uncond: Tensor
    ) -> Tensor:
        """Return what the loop is told in the place of a true uncond."""
        gap, share = wide(first.cond) - wide(uncond), self._share(step, network)
        true = gap
        if step.kind == "slow":
            guess = self._gap(network, first) if first.guess is None else first.guess
            gap = weak_to_strong(guess, gap, step.w2s_scale)
        if self.head is not None and not self.head.in_model:
            self.head.observe(network.true_gap(true, first.call, self._sigmas[self.step]))
        if step.kind == "cfg" and share == 1:
            return uncond
        return weak(first.cond, gap, 1 - share)

    def _gap(self, network: Network, first: _PromptPass) -> Tensor:
        head, sigma = cast(WeakHead, self.head), self._sigmas[self.step]
        return network.predict_gap(head, first.cond, first.call, sigma, first.features)

    def _in_model_guess(
        self, step: Step, network: Network, forward: Forward, first: _PromptPass
    ) -> Tensor | None:
        """Return the gap that an in-model head means in a slow step, by a pass of its own."""
        if step.kind != "slow" or not cast(WeakHead, self.head).in_model:
            return None
        scale = self._scale_of(step, network)
        with cast(Any, self.head).active(scale):
            output = forward(*first.call.args, **first.call.kwargs)
        return (wide(network.prediction(output)) - wide(first.cond)) / (scale - 1)

    def _active(self, step: Step, network: Network) -> AbstractContextManager[None]:
        if step.kind != "fast" or not cast(WeakHead, self.head).in_model:
            return nullcontext()
        return cast(Any, self.head).active(self._scale_of(step, network))

    def _step(self) -> Step:
        steps = cast(Plan, self.plan).steps
        if self.step >= len(steps):
            raise RuntimeError(
                f"the loop must make the {len(steps)} steps that it has announced, got one more: "
                "attach knows no such loop, call detach(pipe)"
            )
        return steps[self.step]

    def _scale(self, network: Network) -> float:
        """Return the loop's guidance scale as it is now; callbacks may change it."""
        now = vars(self.pipe).get(f"_{self.scale_name}", self.call[self.scale_name])
        return float(now) + network.layout.scale_offset

    def _scale_of(self, step: Step, network: Network) -> float:
        own = self.config.guidance_scales is not None
        return step.guidance_scale if own else self._scale(network)

    def _share(self, step: Step, network: Network) -> float:
        """Return by how much to stretch a gap, so that the loop's scale acts as the step's."""
        if self.config.guidance_scales is None:
            return 1.0
        return (step.guidance_scale - 1) / (self._scale(network) - 1)


class GuidanceHook(ModelHook):
    """Hands a network's passes to a run.

    Args:
        run: the call that the passes belong to.
        network: the one that is hooked.
    """

    def __init__(self, run: Run, network: Network) -> None:
        super().__init__()
        self.run, self.network = run, network

    @torch.compiler.disable(recursive=False)
    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Answer a pass in the network's place."""
        return self.run.answer(self.network, self.fn_ref.original_forward, Call(args, kwargs))


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
def _hook(module: nn.Module, hook: ModelHook) -> Iterator[None]:
    """Register a hook on this network alone; on exit its forward is what it was."""
    own = "forward" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, _HOOK)
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
