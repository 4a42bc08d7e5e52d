"""`ipex.llm.utils`: reading checkpoints that GPTQ, AWQ and AutoRound packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.ready_made import Packing, read_folder
from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name
from lowbit.errors import RecipeError

_DEVICES = "one process runs on all its cores"
_PAGE = "docs/migration.md says which names are for one process"


def load_low_precision_checkpoint(
    pathname: str | Path, rank: int = 0, world_size: int = 1
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a folder and how they are packed, as `ipex.llm.optimize(low_precision_checkpoint=...)` takes them."""
    if world_size != 1:
        raise RecipeError(f"load_low_precision_checkpoint cuts nothing for {world_size} ranks: {_DEVICES}; {_PAGE}")
    tensors, config = read_folder(pathname)
    Packing.of(config)  # says at once what is not read
    return tensors, config


__getattr__ = refuse_unknown(
    __name__, {"shard_low_precision_checkpoint": f"load_low_precision_checkpoint: {_DEVICES}; {_PAGE}"}
)

_PLACE = "intel_extension_for_pytorch.llm.utils"
_TESTS = "tests/unit/test_compat_ipex_llm.py::"
NAMES = (
    Name(f"{_PLACE}.load_low_precision_checkpoint", "", WORKS, f"{_TESTS}test_checkpoints_that_others_packed"),
    Name(
        f"{_PLACE}.shard_low_precision_checkpoint",
        "",
        REFUSED,
        f"{_TESTS}test_names_of_several_devices_are_refused",
        _DEVICES,
    ),
)
