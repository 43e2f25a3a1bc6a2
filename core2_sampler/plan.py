"""How a run spends its passes: the config that chooses between modes, and presets by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, get_args

from core2_sampler.config import convert
from core2_sampler.layout import OPTION_MODES as OPTION_MODES
from core2_sampler.layout import Mode, make_plan, step_scales
from core2_sampler.placement import Placement
from core2_sampler.registry import unknown_name
from core2_sampler.scale_rules import StaticRule, parse_rule, static_scales
from core2_sampler.steps import Plan, check_asking
from core2_sampler.steps import Step as Step

if TYPE_CHECKING:
    from core2_sampler.scales import SampleRule

StepErrors = Callable[[Sequence[float]], Sequence[float]]
"""``errors = step_errors(scales)``: how far off each step's guided prediction is if the head makes
it, at the guidance scales [N] of the steps."""


@dataclass(frozen=True, slots=True)
class Core2Config:
    """How a pipeline run spends its passes; the number of steps is the pipeline's own argument."""

    mode: Mode = field(
        default="core",
        metadata={
            "help": "cond: prompt only; cfg: classifier-free guidance; core: slow steps where "
            "asked for, fast steps elsewhere; zigzag: every step made, undone and made again by "
            "CFG (Z-Sampling); zcore: undone by the head (Z-CoRe^2); zfast: all of it by the head; "
            "z2: CFG alone, from where the gap of the step before says that there and back ends"
        },
    )
    slow_steps: int | float | tuple[int, ...] | str | None = field(
        default=None,
        metadata={
            "help": "mode core: how many of the first steps also run the negative prompt: a count, "
            "a share written with a point (0.25), or a list of positions; or which steps by the "
            "head's card: budget:40 (its worst ones, as far as 40 NFE pay for) or gated:0.1 (where "
            "it is off by more); none by default"
        },
    )
    w2s_scale: float = field(
        default=1.5,
        metadata={"help": "slow steps: weak + w2s_scale * (strong - weak); 1 is plain CFG"},
    )
    guidance_scales: tuple[float, ...] | None = field(
        default=None,
        metadata={"help": "one guidance scale for each step, in place of the single one"},
    )
    scale_rule: str | StaticRule | SampleRule | None = field(
        default=None,
        metadata={
            "help": "guidance scale of each step by a rule, in place of the single one: "
            "constant:4.5, interval:6,0.2,0.8, linear:1,9, cosine:9,1, list:5,5,3,1, a callable of "
            "the step and their number, or a rule that sees the latents of each image"
        },
    )
    zig_steps: int | float | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "modes zigzag, zcore, zfast, z2: how many of the first steps are undone and "
            "made again: a count, a share of all but the last (0.25), or a list of positions; by "
            "default all but the last"
        },
    )
    inversion_scale: float | None = field(
        default=None,
        metadata={
            "help": "the same modes: guidance scale that undoes a step, below that of the step; "
            "by default 0, the negative prompt alone"
        },
    )
    upstream: bool = field(
        default=False,
        metadata={
            "help": "modes zigzag and zcore: undo steps as the released code of CoRe^2 does, "
            "errors included, in place of exactly"
        },
    )

    def __post_init__(self) -> None:
        """Refuse what no number of steps could make right."""
        if self.mode not in get_args(Mode):
            raise unknown_name("mode", self.mode, get_args(Mode))
        if isinstance(self.slow_steps, str):
            self._check_text(self.slow_steps)
        for name in ("slow_steps", "zig_steps"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0 <= value <= 1:
                raise ValueError(
                    f"{name} written with a point is a share and must lie in 0..1, "
                    f"got {value}; write a count without a point"
                )
        for name in ("slow_steps", "zig_steps", "guidance_scales"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.scale_rule is not None:
            self._check_rule()

    def _check_text(self, text: str) -> None:
        if Placement.is_meant(text):
            Placement.parse(text)
        else:
            kind = int | float | tuple[int, ...]
            object.__setattr__(self, "slow_steps", convert(text, kind, "slow_steps"))

    def _check_rule(self) -> None:
        rule = self.scale_rule
        if self.guidance_scales is not None:
            raise ValueError(
                "scale_rule and guidance_scales both say the scale of each step, got both: leave "
                "one of them out"
            )
        if self.mode == "cond":
            raise ValueError("scale_rule has no effect in mode 'cond', which has no guidance")
        if isinstance(rule, str):
            parse_rule(rule)
        elif not callable(rule):
            raise TypeError(
                "scale_rule must be a text such as cosine:9,1, a callable of the step and the "
                f"number of steps, or a rule that sees the latents, got {type(rule).__name__}"
            )

    @property
    def sample_rule(self) -> SampleRule | None:
        """The scale rule if it sees the latents, so that the plan cannot know what it picks."""
        seen = hasattr(self.scale_rule, "begin")
        return cast("SampleRule", self.scale_rule) if seen else None

    def plan(
        self,
        num_steps: int,
        guidance_scale: float,
        in_model: bool = False,
        errors: StepErrors | None = None,
    ) -> Plan:
        """Return the plan of a run.

        Args:
            num_steps: number of steps N of the run.
            guidance_scale: the scale of every step, unless `guidance_scales` or a static rule says
                otherwise. Where a rule picks one for each sample, any above 1 asks for guidance.
            in_model: whether the head works inside the denoiser.
            errors: of the head; asked where the slow steps are placed by them.

        Returns:
            The plan, of N steps.

        Raises:
            ValueError: as `make_plan`; the rule does not know N steps, or no step could ask it;
                the slow steps cannot be placed.
        """
        scales: float | tuple[float, ...] = self.guidance_scales or guidance_scale
        if self.scale_rule is not None and self.sample_rule is None:
            rule = self.scale_rule
            static = parse_rule(rule) if isinstance(rule, str) else cast(StaticRule, rule)
            scales = static_scales(static, num_steps)
        plan = make_plan(
            self.mode,
            num_steps,
            scales,
            slow_steps=self._slow_steps(num_steps, scales, in_model, errors),
            w2s_scale=self.w2s_scale,
            in_model=in_model,
            zig_steps=_count(self.zig_steps, num_steps - 1),
            inversion_scale=self.inversion_scale,
            upstream=self.upstream,
        )
        if self.sample_rule is not None:
            check_asking(plan)
        return plan

    def _slow_steps(
        self,
        num_steps: int,
        scales: float | Sequence[float],
        in_model: bool,
        errors: StepErrors | None,
    ) -> int | tuple[int, ...] | None:
        """Return how many first steps are slow, or which ones."""
        if not isinstance(self.slow_steps, str) or self.mode != "core":
            return _count(cast("int | float | tuple[int, ...] | None", self.slow_steps), num_steps)
        if errors is None:
            raise ValueError(
                f"slow_steps={self.slow_steps!r} must be placed by a CoRe2 pipeline or attach, "
                "which know the head's card and the noise levels, got neither: give positions"
            )
        passes = 2 if in_model and self.w2s_scale != 1 else 1  # the head inside needs its own
        placement = Placement.parse(self.slow_steps)
        return placement.place(errors(step_scales(scales, num_steps)), passes)


def _count(steps: int | float | tuple[int, ...] | None, of: int) -> int | tuple[int, ...] | None:
    """Return a share of the steps as a count, rounded; anything else as it is."""
    return math.floor(steps * of + 0.5) if isinstance(steps, float) else steps


PRESETS: dict[str, Core2Config] = {
    "fast": Core2Config(slow_steps=0),
    "balanced": Core2Config(slow_steps=0.25, w2s_scale=1.0),
    "quality": Core2Config(slow_steps=1.0, w2s_scale=1.5),
}
"""``fast``: one pass a step; ``balanced``: CFG in the first quarter; ``quality``: all slow."""


def resolve_config(core2: str | Core2Config) -> Core2Config:
    """Return the config that a preset name stands for, or the config itself.

    Args:
        core2: a name of `PRESETS`, or a config.

    Returns:
        The config.

    Raises:
        ValueError: unknown preset name.
        TypeError: neither a name nor a config.
    """
    if isinstance(core2, Core2Config):
        return core2
    if not isinstance(core2, str):
        raise TypeError(
            f"core2 must be a preset name or a Core2Config, got {type(core2).__name__}; "
            f"presets: {', '.join(PRESETS)}"
        )
    if core2 not in PRESETS:
        raise unknown_name("core2 preset", core2, PRESETS)
    return PRESETS[core2]
