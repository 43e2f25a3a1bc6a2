"""The arm ``online``: evaluators pick each image's guidance scale in each step."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from core2_sampler.benchmarks.cache import hash_component
from core2_sampler.evaluators import load_evaluator
from core2_sampler.scales import OnlineScale


@lru_cache(maxsize=2)
def online_rule(evaluators: str, family: str, device: str) -> OnlineScale:
    """Load evaluators and return the rule that asks them, with the paper's candidates.

    Args:
        evaluators: their folders, with commas between.
        family: of the denoiser.
        device: of the denoiser.

    Raises:
        ValueError: if a folder holds no evaluator, or one of another family.
    """
    folders = [Path(each) for each in evaluators.split(",")]
    return OnlineScale({each.name: load_evaluator(each, family).to(device) for each in folders})


def rule_key(rule: OnlineScale) -> dict[str, Any]:
    """Return all that decides what a rule picks."""
    return {
        "evaluators": {name: hash_component(each) for name, each in rule.evaluators.items()},
        "candidates": list(rule.candidates),
        "upstream": rule.upstream,
        "weights": rule.weights if isinstance(rule.weights, str) else dict(rule.weights),
    }
