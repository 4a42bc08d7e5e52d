"""compressed-tensors' part of a config.json: which of its schemes holds for a weight, and the format that a scheme means.

    config_groups: {group_0: {targets: ["Linear"], weights: {num_bits, symmetric, strategy, group_size, ..}}, ..}
    ignore:        targets that no scheme holds for

Groups that round activations too say so under input_activations, which a scheme brings along, and their weights lie there
as int8 (`int-quantized`). A target is the path of a module, a regular expression (`re:...`) or the name of a class, and the
most exact one wins. Two readers ask: the one over torch (`checkpoint.compressed`) and the engine's (`runtime.packed_names`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.formats import PER_CHANNEL, Format, format_from_name

STRATEGIES = ("group", "channel")
ACTIVATIONS = "input_activations"
_EXPRESSION = "re:"


def scheme_of(path: str, classes: tuple[str, ...], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a configuration says about the weights of a module: by path, then by expression, then by class; None if nothing."""
    if any(_matches(path, classes, target) for target in config.get("ignore") or ()):
        return None
    found: dict[int, dict[str, Any]] = {}
    for group in (config.get("config_groups") or {}).values():
        for target in group.get("targets") or ():
            if _matches(path, classes, target):
                rank = 0 if target == path else 1 if target.startswith(_EXPRESSION) else 2
                rounded = {ACTIVATIONS: group[ACTIVATIONS]} if group.get(ACTIVATIONS) else {}
                found.setdefault(rank, {**(group.get("weights") or {}), **rounded})
    return found[min(found)] if found else None


def _matches(path: str, classes: tuple[str, ...], target: str) -> bool:
    if target.startswith(_EXPRESSION):
        return re.match(target.removeprefix(_EXPRESSION), path) is not None
    return target == path or target in classes


def rounded_format(activations: Mapping[str, Any]) -> Format:
    """The format of weights whose activations are rounded as a scheme says."""
    return format_from_name("w8a8" if activations.get("dynamic") else "w8a8_static")


def format_of(path: str, scheme: Mapping[str, Any], scale_dtype: str) -> Format:
    """The format of packed integers that a scheme describes; the type of the scales is that of the file."""
    strategy = scheme.get("strategy")
    if scheme.get("type", "int") != "int" or strategy not in STRATEGIES:
        raise CheckpointError(
            f"{path} is packed as {scheme.get('type')} by {strategy}, and lowbit reads integers by {' or '.join(STRATEGIES)}"
        )
    base = Format(f"int{scheme['num_bits']}", int(scheme["num_bits"]))
    if scheme.get(ACTIVATIONS):
        base = rounded_format(scheme[ACTIVATIONS])
    return base.replace(
        symmetric=bool(scheme.get("symmetric", True)),
        group_size=PER_CHANNEL if strategy == "channel" else int(scheme["group_size"]),
        scale_dtype=scale_dtype,
    )
