"""Names: what a transformers model calls its weights, and what its checkpoints call them.

transformers renames weights while it loads (`WeightRenaming`) and fuses the experts of a mixture into one 3-D weight
(`WeightConverter`). A saved folder speaks the checkpoint's language, so that other readers find what they expect; this
file is the only one that looks into transformers' tables of names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

# An expert's weight in the checkpoint -> a row of the fused weight: stacked over experts, then joined along the
# outputs.
_FUSING_STEPS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is transformers' own kind. Imports nothing: such a model exists only where transformers is imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _conversions(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(model, "_weight_conversions", None)
    return list(get_model_conversion_mapping(model, add_legacy=False)) if known is None else list(known)


def expert_sources(model: nn.Module, path: str) -> list[str] | None:
    """The checkpoint's names of the weights fused into `path`, with `*` for the expert's number; None if it fuses otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        steps = [type(step).__name__ for step in getattr(conversion, "operations", ())]
        targets = conversion.target_patterns
        if steps in _FUSING_STEPS and len(targets) == 1 and path.endswith(targets[0]) and _plain_dims(conversion):
            prefix = path.removesuffix(targets[0])
            return [prefix + source for source in conversion.source_patterns]
    return None


def _plain_dims(conversion: Any) -> bool:
    """Whether experts are stacked along the first axis and joined along the outputs."""
    dims = [step.dim for step in conversion.operations]
    return dims in ([0], [0, 1])


def checkpoint_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each name in a model, its name in the model's checkpoints."""
    from transformers.core_model_loading import WeightRenaming

    names = list(names)
    renamings = [c.reverse_transform() for c in reversed(_conversions(model)) if isinstance(c, WeightRenaming)]
    if getattr(model, "_weight_conversions", None) is None:
        # A model that was not loaded says nothing about optional prefixes, and its own names load as they are.
        renamings = [r for r in renamings if type(r).__name__ != "PrefixChange"]
    found = {}
    for name in names:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        found[name] = renamed
    return found


def keep_renamings_only_(model: nn.Module) -> None:
    """Let transformers' own save revert names but leave fused weights alone: packed codes cannot go through its operations."""
    from transformers.core_model_loading import WeightRenaming

    model._weight_conversions = [c for c in _conversions(model) if isinstance(c, WeightRenaming)]  # type: ignore[assignment]
