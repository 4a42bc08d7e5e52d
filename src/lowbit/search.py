"""How widely the scale of a group is searched, by the name of the rounder that a recipe gives; read with torch and without.

    scale = the plain one times lowest .. highest, in `steps`; zero points up to `zero_steps` from the plain one

`grid.py` says what is done with the candidates, and what they are worth. `CLIP` is the plain search that other systems call mse
clip: the scale shrunk to the least squared error, which cuts off the largest weights, and nothing refitted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """How widely the scale of a group is searched around the plain one.

    `refit`: candidates are fitted to their codes by least squares; without it all weights count alike, too.
    """

    lowest: float = 0.70
    highest: float = 1.10
    steps: int = 16
    zero_steps: int = 1
    refit: bool = True

    def ratios(self) -> list[float]:
        """The factors of the plain scale that are tried; none where nothing is searched."""
        span = self.highest - self.lowest
        return [self.lowest + span * i / max(self.steps - 1, 1) for i in range(self.steps)]


PLAIN = Search(1.0, 1.0, 0, 0)
CLIP = Search(0.80, 1.0, 41, 0, refit=False)
# Integers of so many bits under a scale for more than so many weights are not searched without data. Their steps are fine, and what
# the search gives up for finer ones are the largest weights of a row: KL of the reference model at int8_channel 0.0046 searched and
# 0.0041 plain; at int8_g64 0.0016 and 0.0017 (6 windows).
UNSEARCHED_BITS, WIDE = 8, 128


def worth_searching(search: Search, bits: int, width: int) -> Search:
    """The search of integers in groups of `width` weights, where no importance is known."""
    return PLAIN if bits >= UNSEARCHED_BITS and width > WIDE else search


SEARCHES = {"rtn": Search(), "plain_rtn": PLAIN}
