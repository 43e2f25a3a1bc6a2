"""The arms of a study: which sampler, at how many steps and which scale, with which head.

An ``ArmSpec`` is an arm before a study has chosen N and the guidance scale; ``spec.at(...)`` makes
the ``Arm`` that runs. Later studies add their own specs to ``ARMS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core2_sampler.fitting import UNTRAINED
from core2_sampler.plan import Core2Config, Mode, Plan
from core2_sampler.registry import Registry

if TYPE_CHECKING:
    from core2_sampler.scales import SampleRule

HEAD_MODES: tuple[Mode, ...] = ("core", "zcore", "zfast")
"""The modes that ask a weak head."""

ZIG_MODES: tuple[Mode, ...] = ("zigzag", "zcore", "zfast", "z2")
"""The modes of zigzag steps."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of sampling, ready to run.

    Attributes:
        name: what tables call it; does not influence the images.
        mode: of `Core2Config`.
        steps: sampling steps.
        guidance_scale: scale of CFG and of the head; 1 is no guidance.
        head: folder of a saved head, or the name of a control that needs no training.
        slow_steps: how many steps, from the first, or which ones, also pay for ``uncond``.
        w2s_scale: weak-to-strong scale of the slow steps; 1 is plain CFG.
        zig_steps: how many steps, from the first, are zigzag steps, in the modes that have them.
        inversion_scale: guidance scale that undoes a zigzag step.
        scale_rule: text of a rule that says each step's guidance scale, in place of the one.
        sample_rule: picks each image's scale in each step while it runs. No key of an arm tells it:
            `core2_sampler.benchmarks.ruled` keeps such images, and nothing else may.
        evaluators: folders of what picks each image's scale in each step, with commas between.
        image_scales: file of the guidance scale of each image, by case, in place of the one.
        embedded_guidance: that FLUX.1-dev embeds; None is the stock call's.
    """

    name: str
    mode: Mode
    steps: int
    guidance_scale: float
    head: str | None = None
    slow_steps: int | tuple[int, ...] = 0
    w2s_scale: float = 1.0
    zig_steps: int = 0
    inversion_scale: float = 0.0
    scale_rule: str | None = None
    sample_rule: SampleRule | None = None
    evaluators: str | None = None
    image_scales: str | None = None
    embedded_guidance: float | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise be ignored."""
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps} in arm {self.name!r}")
        if (self.mode in HEAD_MODES) != (self.head is not None):
            raise ValueError(
                f"an arm has a head if and only if its mode is one of {', '.join(HEAD_MODES)}, "
                f"got mode {self.mode!r} and head {self.head!r} in arm {self.name!r}"
            )
        if self.mode != "core" and (self.slow_steps, self.w2s_scale) != (0, 1.0):
            raise ValueError(
                f"slow_steps and w2s_scale are for mode 'core' only, got {self.slow_steps} and "
                f"{self.w2s_scale} with mode {self.mode!r} in arm {self.name!r}"
            )
        if self.mode not in ZIG_MODES and (self.zig_steps, self.inversion_scale) != (0, 0.0):
            raise ValueError(
                f"zig_steps and inversion_scale are for modes {', '.join(ZIG_MODES)} only, got "
                f"{self.zig_steps} and {self.inversion_scale} with mode {self.mode!r} in arm "
                f"{self.name!r}"
            )

    def config(self) -> Core2Config:
        """Return the value of the pipelines' ``core2=`` argument."""
        rule = self.sample_rule or self.scale_rule
        settings: dict[str, Any] = {"mode": self.mode, "scale_rule": rule}
        if self.mode in ZIG_MODES:
            settings |= {"zig_steps": self.zig_steps, "inversion_scale": self.inversion_scale}
        if self.mode == "core":
            settings |= {"slow_steps": self.slow_steps, "w2s_scale": self.w2s_scale}
        return Core2Config(**settings)

    def plan(self, in_model: bool) -> Plan:
        """Return the plan that the pipeline will make of it, for a head of that kind."""
        return self.config().plan(self.steps, self.guidance_scale, in_model)


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """An arm relative to a study's number of steps N.

    Attributes:
        mode: of `Core2Config`.
        head: which of the study's heads; a control that needs no training goes by its own name.
        slow_share: share of the steps that are slow, in 0..1; above 0 it is at least one step.
        w2s_scale: weak-to-strong scale of the slow steps.
        steps_share: steps over N, in (0, 1].
        zig_share: modes of zigzag steps: share of the steps but the last that are such, in 0..1.
        inversion_scale: the same modes: guidance scale that undoes a step.
        scale_rule: makes the text of a scale rule of the study's guidance scale.
        is_asking: whether the study's evaluators pick the scales.
        about: one line for the table's legend.
    """

    mode: Mode
    about: str
    head: str | None = None
    slow_share: float = 0.0
    w2s_scale: float = 1.0
    steps_share: float = 1.0
    zig_share: float = 1.0
    inversion_scale: float = 0.0
    scale_rule: Callable[[float], str] | None = None
    is_asking: bool = False

    def at(
        self,
        name: str,
        steps: int,
        guidance_scale: float,
        heads: Mapping[str, str],
        evaluators: str | None = None,
    ) -> Arm:
        """Return the arm at N = ``steps``.

        Args:
            name: the arm's name in tables.
            steps: the study's N.
            guidance_scale: the study's scale.
            heads: folder of each head that the study has, by name.
            evaluators: folders of the study's evaluators, with commas between.

        Raises:
            ValueError: if the arm would have no step, or its head or evaluators are not there.
        """
        if self.is_asking and not evaluators:
            raise ValueError(f"arm {name!r} needs evaluators, got none: give --evaluators FOLDER")
        own_steps = int(steps * self.steps_share)
        if own_steps < 1:
            raise ValueError(
                f"arm {name!r} needs more steps: a share {self.steps_share} of {steps}"
            )
        slow = max(1, math.floor(own_steps * self.slow_share + 0.5)) if self.slow_share else 0
        zigs = math.floor((own_steps - 1) * self.zig_share + 0.5) if self.mode in ZIG_MODES else 0
        return Arm(
            name,
            self.mode,
            own_steps,
            guidance_scale,
            self._head(name, heads),
            slow,
            self.w2s_scale,
            zigs,
            self.inversion_scale,
            None if self.scale_rule is None else self.scale_rule(guidance_scale),
            evaluators=evaluators if self.is_asking else None,
        )

    def _head(self, name: str, heads: Mapping[str, str]) -> str | None:
        if self.head is None:
            return None
        head = heads.get(self.head, self.head if self.head in UNTRAINED else None)
        if head is None:
            raise ValueError(
                f"arm {name!r} needs a head {self.head!r}, got "
                f"{', '.join(heads) or 'none'}: give its folder as {self.head}=FOLDER"
            )
        return head


def _anneal(name: str, *, up: bool) -> Callable[[float], str]:
    """Return what makes the rule that goes from 1 to ``2s - 1``, or back: the mean is the scale."""

    def rule(scale: float) -> str:
        ends = (1.0, 2 * scale - 1) if up else (2 * scale - 1, 1.0)
        return f"{name}:{ends[0]},{ends[1]}"

    return rule


ARMS: Registry[ArmSpec] = Registry("arm")

OWN = "own"
"""What arms call the head that a model brings along, whatever its kind."""

for _name, _spec in {
    "cond": ArmSpec("cond", "the prompt alone, no guidance"),
    "cfg": ArmSpec("cfg", "classifier-free guidance, the reference"),
    "cfg-half": ArmSpec("cfg", "CFG with half the steps: what the same NFE buys", steps_share=0.5),
    "last-gap": ArmSpec("core", "last true gap reused after 1/7 slow steps", "last_gap", 4 / 28),
    "affine": ArmSpec("core", "per-step affine map of cond, all fast", "affine"),
    "adapter-fast": ArmSpec("core", "adapter head, all fast (E = 0)", "adapter"),
    "tap-fast": ArmSpec("core", "tap head, all fast (E = 0)", "tap"),
    "tap-quarter": ArmSpec("core", "tap head, first quarter slow (E = N/4)", "tap", 0.25),
    "tap-w2s": ArmSpec("core", "tap head, all slow (E = N), w2s 1.5", "tap", 1.0, 1.5),
    "fast": ArmSpec("core", "the model's own head, all fast (E = 0)", OWN),
    "balanced": ArmSpec("core", "the model's own head, first quarter CFG", OWN, 0.25),
    "quality": ArmSpec("core", "the model's own head, all slow (E = N), w2s 1.5", OWN, 1.0, 1.5),
    "zigzag": ArmSpec("zigzag", "Z-Sampling, undone by the negative prompt alone"),
    "zigzag-half": ArmSpec("zigzag", "Z-Sampling, undone by CFG at scale 0.5", inversion_scale=0.5),
    "zigzag-quarter": ArmSpec("zigzag", "Z-Sampling in the first quarter", zig_share=0.25),
    "zcore": ArmSpec(
        "zcore",
        "Z-CoRe^2, undone by the model's own head, or, where that works inside the denoiser, by "
        "the negative prompt",
        OWN,
    ),
    "zfast": ArmSpec("zfast", "made by the model's own head, undone as in zcore", OWN),
    "zfast-cond": ArmSpec("zfast", "as zfast, undone by cond", OWN, inversion_scale=1.0),
    "zfast-quarter": ArmSpec("zfast", "as zfast, in the first quarter", OWN, zig_share=0.25),
    "z2": ArmSpec("z2", "zigzag steps at CFG's passes: the step before's gap undoes them"),
    "interval": ArmSpec(
        "cfg",
        "CFG in the middle three fifths of the steps, cond before and after",
        scale_rule=lambda scale: f"interval:{scale},0.2,0.8",
    ),
    "linear": ArmSpec(
        "cfg", "CFG, its scale falling in equal steps to 1", scale_rule=_anneal("linear", up=False)
    ),
    "linear-up": ArmSpec(
        "cfg", "CFG, its scale rising in equal steps from 1", scale_rule=_anneal("linear", up=True)
    ),
    "cosine": ArmSpec(
        "cfg", "CFG, its scale falling by a cosine to 1", scale_rule=_anneal("cosine", up=False)
    ),
    "online": ArmSpec(
        "cfg", "CFG at the scale that evaluators pick in each step for each image", is_asking=True
    ),
    "cosine-up": ArmSpec(
        "cfg", "CFG, its scale rising by a cosine from 1", scale_rule=_anneal("cosine", up=True)
    ),
}.items():
    ARMS.register(_name)(_spec)


def coinciding(arms: Sequence[Arm], in_model: Container[str | None]) -> dict[str, str]:
    """Find arms that take the very steps of another one.

    Args:
        arms: of one study. Of those that are the same the first without a head stays, or the first.
        in_model: which of their heads work inside the denoiser.

    Returns:
        By name of each arm that need not be run, the arm that it is the same as.
    """
    names: dict[Any, str] = {}
    same: dict[str, str] = {}
    for arm in sorted(arms, key=lambda arm: arm.head is not None):
        plan = arm.plan(arm.head in in_model)
        head = arm.head if plan.needs_head else None
        found = names.setdefault((plan.steps, plan.upstream, head, arm.evaluators), arm.name)
        if found != arm.name:
            same[arm.name] = found
    return same


FIRST_TABLE = (
    "cond",
    "cfg",
    "cfg-half",
    "last-gap",
    "affine",
    "adapter-fast",
    "tap-fast",
    "tap-quarter",
    "tap-w2s",
)


SUITE_ARMS = ("cond", "cfg", "cfg-half", "last-gap", "fast", "balanced")
"""What suites are run with where no arms are named."""


def build_arms(
    names: Sequence[str],
    steps: int,
    guidance_scale: float,
    heads: Mapping[str, str],
    evaluators: str | None = None,
) -> list[Arm]:
    """Return the named arms at N = ``steps``.

    Raises:
        ValueError: for an unknown or repeated name, see ``ArmSpec.at`` and ``Registry.get``.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"every arm may be named once, got {list(names)}")
    specs = {name: ARMS.get(name) for name in names}
    return [s.at(n, steps, guidance_scale, heads, evaluators) for n, s in specs.items()]
