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


# Where the importance of inputs is known, a group may lose its largest weights if little comes in there; with the steps
# of few bits it may not. KL of the reference model (12 windows) by `lowest`, steps in brackets:
#
#                  0.7 (16)   0.5 (20)   0.35 (26)
#   int5_g64       0.068      0.065
#   int4_channel   0.520      0.436      0.433
#   int4_g64       0.237      0.207      0.202
#   int4_asym_g64  0.223      0.199
#   int3_g64       0.849      0.865      0.914
#
# Beyond 1.1 nothing is found (int4_g64, 0.7 to 2.0: 0.233), and without refitting less is (0.6 to 1.6: 0.234 against 0.214).
WEIGHED_BITS, WEIGHED = 4, Search(lowest=0.5, steps=20)
# At 2 bits one end of the symmetric range is twice as far as the other: ratios of 0.7 to 1.1 of a half and of the whole of the
# largest weight leave a hole, 0.55 to 0.7, and what the other levels would have liked lies on both sides of it. The whole measure:
#
#                 0.7 - 1.1   0.7 - 1.4   0.7 - 1.8   0.35 - 1.4   0.35 - 1.8   0.25 - 1.8
#   int2_g32        3.206       3.198       3.290       2.752        2.714        2.723
#   int2_g64        4.250       4.264       4.010       3.307        3.37, 3.76   3.318       (two orders of sums)
#   int2_g32 GPTQ   1.246       1.223       1.214                    1.152
#   int2_g64 GPTQ   1.425                   1.439                    1.380
#
# AutoRound, which moves its scales itself, would rather start from the first column; so would rtn without data.
WEIGHED_2_BITS = Search(lowest=0.35, highest=1.8, steps=30)


def weighed(search: Search, bits: int, symmetric: bool) -> Search:
    """The search of integers whose inputs have an importance."""
    if not search.refit or not search.steps:
        return search
    if bits == 2 and symmetric:
        return WEIGHED_2_BITS
    return WEIGHED if bits >= WEIGHED_BITS else search


SEARCHES = {"rtn": Search(), "plain_rtn": PLAIN}
