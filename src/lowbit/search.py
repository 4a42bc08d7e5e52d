"""How widely the scale of a group is searched, by the name of the rounder that a recipe gives; read with torch and without.

    scale = the plain one times lowest .. highest, in `steps`; zero points up to `zero_steps` from the plain one

`grid.py` says what is done with the candidates, and what they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """How widely the scale of a group is searched around the plain one."""

    lowest: float = 0.70
    highest: float = 1.10
    steps: int = 16
    zero_steps: int = 1

    def ratios(self) -> list[float]:
        """The factors of the plain scale that are tried; none where nothing is searched."""
        span = self.highest - self.lowest
        return [self.lowest + span * i / max(self.steps - 1, 1) for i in range(self.steps)]


PLAIN = Search(1.0, 1.0, 0, 0)
SEARCHES = {"rtn": Search(), "plain_rtn": PLAIN}
