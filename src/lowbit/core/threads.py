"""How many threads the core works with. The first of these that says something decides:

    lowbit.set_threads(4)          this process's own word
    torch.set_num_threads(4)       where torch is there: its products and ours should not fight over cores
    OMP_NUM_THREADS=4              as for every other library
    the cgroup's quota, affinity   a container's cores, not the machine's

The last two are the core's default, found in C++ so that C++ programs have them too.
"""

from __future__ import annotations

import os

from lowbit.core import calls
from lowbit.errors import RecipeError
from lowbit.machine import usable_cores

_VARIABLE = "OMP_NUM_THREADS"


class _Choice:
    """What was said so far: by the user, and what torch's number was when it was last looked at."""

    asked = False
    followed: int | None = None


def set_threads(threads: int) -> None:
    """Work with so many threads from now on, whatever torch does; 0 follows torch and the machine again."""
    if threads < 0:
        raise RecipeError(f"{threads} threads asked for; give 1 or more, or 0 to follow torch and the machine")
    calls.set_threads(threads)
    _Choice.asked, _Choice.followed = threads > 0, None


def follow(torch_threads: int) -> None:
    """Take over torch's number unless `set_threads` was called. Costs a comparison when nothing has changed."""
    if _Choice.asked or torch_threads == _Choice.followed:
        return
    # Torch's default is all cores that the process may run on: it knows no quota, and so says nothing.
    default = torch_threads == usable_cores() and _VARIABLE not in os.environ
    calls.set_threads(0 if default else torch_threads)
    _Choice.followed = torch_threads
