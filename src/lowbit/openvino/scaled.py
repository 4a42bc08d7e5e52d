"""AWQ in the words of optimum-intel: `quant_method="awq"`, done to the torch model, where a scale is judged by what a block makes
of it. Every other wish of the configuration becomes a part of the recipe, or is refused with what to do instead.

    gptq=True                    AWQ's scales first, then GPTQ's codes
    scale_estimation=False       scales of codes are searched without looking at what the model is given
    dtype, sym, group_size       the format of the products
    backup_precision, all_layers the format of head and embedding: 8 bits unless said otherwise
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowbit.configs.classes import AwqConfig
from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.openvino.modes import BackupMode, as_member, backup_format
from lowbit.options import RtnOptions
from lowbit.recipe import Recipe

if TYPE_CHECKING:
    from lowbit.openvino.configs import OVWeightQuantizationConfig

_REFUSED = {
    "lora_correction": "adds two products to every layer at each inference: gptq=True wins more in the same bits",
}


@dataclass
class ScaledConfig(AwqConfig):
    """AWQ with the formats and the rounder of a recipe."""

    recipe: Recipe | None = field(default=None, kw_only=True)

    def to_recipe(self) -> Recipe:
        return self.recipe or super().to_recipe()


def scaled(config: OVWeightQuantizationConfig, format: Format, eight: Format) -> ScaledConfig:
    """What the torch model is quantised by: products in a format, head and embedding in `eight` unless another is named."""
    if format.bits == eight.bits:
        raise RecipeError("quant_method='awq' is for 4 bits: leave it out with bits=8, where scales win nothing")
    for name, reason in _REFUSED.items():
        if getattr(config, name):
            raise RecipeError(f"{name}={getattr(config, name)!r} with quant_method='awq' {reason}")
    backup: Format | None = eight
    if config.all_layers:
        backup = format
    elif config.backup_precision is not None:
        backup = backup_format(as_member(BackupMode, config.backup_precision))
    rounder = "gptq" if config.gptq else "rtn"
    options = RtnOptions(importance=config.scale_estimation is not False) if rounder == "rtn" else None
    name = f"awq and {rounder} {format}"
    recipe = Recipe(
        format, head=backup, embedding=backup, rounder=rounder, rounder_options=options, scaler="awq", name=name
    )
    found: dict[str, Any] = {} if config.dataset in (None, "auto") else {"dataset": config.dataset}
    if config.num_samples is not None:
        found["n_samples"] = config.num_samples
    return ScaledConfig(4, config.tokenizer, group_size=format.group_size, recipe=recipe, **found)
