"""`ipex_llm.transformers.pipeline_parallel`: a model in stages, one to a process. One process is one stage: the whole model.

init_pipeline_parallel()
model = AutoModelForCausalLM.from_pretrained(path, load_in_4bit=True, pipeline_parallel_stages=torch.distributed.get_world_size())

A script that was started in one process runs as it is; one that a launcher started in several is refused before it loads anything.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from lowbit.compat.ignored import say_once
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import IGNORED, REFUSED, WORKS, Name
from lowbit.errors import RecipeError

__all__ = ["init_pipeline_parallel"]

# What launchers call the number of processes that they started: torchrun, then those of MPI.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_ONE_STAGE = "one process runs the whole model"
_SERVER = "`lowbit chat`: it has no server of its own"
_SEVERAL = (
    "lowbit runs a model in one process, which a model of 4 bits needs a quarter of the memory for: start the script without its "
    "launcher, or with one process"
)


def init_pipeline_parallel() -> None:
    """What scripts call first: torch.distributed answers afterwards, of one process."""
    refuse_several()
    if torch.distributed.is_available() and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def check_stages(stages: int | None) -> bool:
    """Whether a call asks for stages, which lay on GPUs; one process is one, however many it asks for."""
    if stages in (None, 1):
        return False
    refuse_several()
    say_once(f"pipeline_parallel_stages={stages} has no effect: {_ONE_STAGE}")
    return True


def pipeline_parallel_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate`: the one stage has all layers."""
    refuse_several()
    return model.generate(*args, **kwargs)


def refuse_several() -> None:
    for name in _COUNTS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise RecipeError(
                f"{name}={count}: a launcher started {count} processes for the stages of a model. {_SEVERAL}"
            )


__getattr__ = refuse_unknown(__name__, {"PPModelWorker": _SERVER})

_PLACE = "ipex_llm.transformers"
_TESTS = "tests/unit/test_compat_bigdl_stages.py::"
_ONE_OF_ONE = f"{_TESTS}test_one_process_is_one_stage"
_LEFT = "in one process; several are refused, with the way out"
NAMES = (
    Name(f"{_PLACE}.init_pipeline_parallel", "", WORKS, _ONE_OF_ONE, _LEFT),
    Name(f"{_PLACE}.pipeline_parallel.init_pipeline_parallel", "", WORKS, _ONE_OF_ONE, _LEFT),
    Name(
        f"{_PLACE}.pipeline_parallel.PPModelWorker",
        "",
        REFUSED,
        f"{_TESTS}test_what_is_left_is_refused",
        f"use {_SERVER}",
    ),
    Name(
        f"{_PLACE}.AutoModelForCausalLM.from_pretrained(pipeline_parallel_stages=)",
        "",
        IGNORED,
        _ONE_OF_ONE,
        _ONE_STAGE,
    ),
    Name(
        f"{_PLACE}.AutoModelForCausalLM.load_low_bit(pipeline_parallel_stages=)", "", IGNORED, _ONE_OF_ONE, _ONE_STAGE
    ),
    Name(f"{_PLACE}.AutoModelForCausalLM.pipeline_parallel_generate", "", WORKS, _ONE_OF_ONE, "it is generate"),
)
