"""Published protocols: what each fixes, and where a run here cannot follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core2_sampler.registry import Registry

_XIELAB_STEPS = {"sdxl": 50, "sd3": 28, "flux": 28}
_XIELAB_SCALE = {"sdxl": 5.5, "sd3": 3.5, "flux": 3.5}
_OWN_LATENTS = "initial latents are drawn for each (prompt, seed), not from the published seeds"


@dataclass(frozen=True, slots=True)
class Preset:
    """A protocol; what the user gives as well wins, and the report says so.

    Attributes:
        about: one line.
        suite: name of the suite.
        steps: sampling steps N, by family.
        guidance_scale: scale, by family.
        seeds: seeds of each prompt.
        scorers: judges.
        deviations: what is not as published.
        limit: only so many prompts; of a list without tasks, the first.
        ga_eval_mode: what methods are matched by.
    """

    about: str
    suite: str
    steps: Mapping[str, int]
    guidance_scale: Mapping[str, float]
    seeds: tuple[int, ...]
    scorers: tuple[str, ...]
    deviations: tuple[str, ...]
    limit: int | None = None
    ga_eval_mode: str = "signed"


PRESETS: Registry[Preset] = Registry("preset")

for _name, _preset in {
    "xielab-pick101": Preset(
        "the first 101 prompts of Pick-a-Pic, as the authors' own repositories run them",
        "pickapic",
        _XIELAB_STEPS,
        _XIELAB_SCALE,
        (0,),
        ("pickscore", "hpsv21", "aes", "imagereward"),
        (_OWN_LATENTS, "no published steps or scale for FLUX: those of SD3.5"),
        limit=101,
    ),
    "geneval-official": Preset(
        "GenEval with its own generator's settings, four images a prompt",
        "geneval",
        dict.fromkeys(_XIELAB_STEPS, 50),
        dict.fromkeys(_XIELAB_STEPS, 9.0),
        (0, 1, 2, 3),
        ("geneval",),
        (
            "GenEval (HF port): another detector than the official one",
            f"{_OWN_LATENTS}, which repeat the same four for every prompt",
        ),
    ),
    "ga-eval": Preset(
        "after GA-Eval (arXiv 2602.22570): its Pick-a-Pic prompts, its steps and most scorers",
        "pickapic",
        {"sdxl": 50, "sd3": 50, "flux": 50},
        {"sdxl": 5.5, "sd3": 5.5, "flux": 5.5},
        (0,),
        ("hpsv21", "pickscore", "imagereward", "aes", "clipscore-gaeval"),
        (
            _OWN_LATENTS,
            "one of its four prompt sets",
            "HPSv2.1 in place of HPSv2, no MPS and no FID",
            "published scale known for SDXL alone, used for every family",
            "NFE is counted, but for Z-Sampling, whose ratio is the published one",
        ),
        limit=101,
        ga_eval_mode="official",
    ),
    "core2-paper": Preset(
        "HPDv2, whose score the paper's figure shows, with its repository's defaults",
        "hpdv2",
        _XIELAB_STEPS,
        _XIELAB_SCALE,
        (0,),
        ("hpsv21", "pickscore", "aes", "imagereward"),
        (
            _OWN_LATENTS,
            "the figure does not say which prompts it stands for",
            "no published steps or scale for FLUX: those of SD3.5",
        ),
    ),
}.items():
    PRESETS.register(_name)(_preset)
