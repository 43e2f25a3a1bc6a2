"""Place slow steps where a weak head is known to be worst: as many as a budget pays for, or all
where it is off by more than a threshold. Both are fixed before the run, which waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from core2_sampler.registry import unknown_name

Rule = Literal["budget", "gated"]


@dataclass(frozen=True, slots=True)
class Placement:
    """A rule that picks slow steps by the head's errors.

    Attributes:
        rule: ``budget`` (the worst steps, as many as it pays for) or ``gated`` (all that are worse
            than the limit).
        limit: NFE of one sample; or root mean square error of the guided velocity.
    """

    rule: Rule
    limit: float

    @staticmethod
    def is_meant(text: str) -> bool:
        """Say whether a text for ``slow_steps`` looks like a rule, not like numbers."""
        return ":" in text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``budget:NFE`` or ``gated:ERROR``.

        Raises:
            ValueError: if it is neither.
        """
        rule, _, value = text.partition(":")
        if rule not in get_args(Rule):
            raise unknown_name("rule for slow_steps", rule, get_args(Rule))
        try:
            limit = float(int(value) if rule == "budget" else float(value))
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit >= 0):
            wanted = "budget:NFE, a whole number" if rule == "budget" else "gated:ERROR, a number"
            raise ValueError(f"slow_steps must read {wanted} of at least 0, got {text!r}")
        return cls(cast(Rule, rule), limit)

    def place(self, errors: Sequence[float], passes: int) -> tuple[int, ...]:
        """Return the positions of the slow steps, in order.

        Args:
            errors: root mean square error of each step's guided velocity if the head makes it,
                [N]; a step of error 0 is never slow, and of equal ones the earlier comes first.
            passes: what a slow step costs beyond a fast one, NFE.

        Raises:
            ValueError: if the budget is below N, or above N slow steps.
        """
        ranked = sorted((i for i, e in enumerate(errors) if e > 0), key=lambda i: -errors[i])
        if self.rule == "gated":
            return tuple(sorted(i for i in ranked if errors[i] > self.limit))
        least, most = len(errors), (1 + passes) * len(errors)
        if not least <= self.limit <= most:
            raise ValueError(
                f"a budget of NFE must be from {least}, all fast, to {most}, all slow, for "
                f"{len(errors)} steps, got {self.limit:g}"
            )
        return tuple(sorted(ranked[: int(self.limit - least) // passes]))
