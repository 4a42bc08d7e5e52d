"""The five configurations, field by field as Neural Compressor has them, and the one that lies beside a saved model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.configs.base import (
    BATCHES,
    CONFIG_FILE,
    DISCOVERED,
    IDLE,
    PILE,
    QuantizationMethod,
    WeightOnlyConfig,
    build_recipe,
    check_counts,
)
from lowbit.contents import read_json
from lowbit.errors import RecipeError
from lowbit.options import AutoRoundOptions, AwqOptions, GptqOptions, TeqOptions
from lowbit.recipe import Recipe


@dataclass
class RtnConfig(WeightOnlyConfig):
    """Round to nearest, with the scale of each group searched."""

    bits: int = 4
    group_size: int = 32
    compute_dtype: Any = None
    scale_dtype: Any = None
    sym: bool = True
    use_layer_wise: bool | None = None
    quant_lm_head: bool = False
    weight_dtype: Any = field(default=None, kw_only=True)

    quant_method = QuantizationMethod.RTN

    def to_recipe(self) -> Recipe:
        return build_recipe(self, "rtn")


@dataclass
class GPTQConfig(WeightOnlyConfig):
    """GPTQ. `desc_act` is kept to where no input has to be gathered: inside groups, or over all with `static_groups`."""

    bits: int = 4
    tokenizer: Any = None
    dataset: Any = PILE
    batch_size: int = 8
    group_size: int = 32
    compute_dtype: Any = None
    scale_dtype: Any = None
    sym: bool = True
    blocksize: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    n_samples: int = 128
    seq_len: int = 2048
    static_groups: bool = False
    use_mse_search: bool = False
    true_sequential: bool = False
    use_layer_wise: bool | None = None
    quant_lm_head: bool = False
    weight_dtype: Any = field(default=None, kw_only=True)

    quant_method = QuantizationMethod.GPTQ
    without_effect = IDLE | {"batch_size": BATCHES, "use_mse_search": "scales are always searched"}

    def idle(self) -> dict[str, str]:
        alone = self.desc_act and not self.static_groups
        gathered = "columns go by activation inside their groups, so that no call has to gather its inputs"
        return super().idle() | ({"desc_act": gathered} if alone else {})

    def to_recipe(self) -> Recipe:
        check_counts(self, "n_samples", "seq_len", "blocksize")
        if not 0 < self.damp_percent < 1:
            raise RecipeError(f"GPTQConfig takes a damp_percent between 0 and 1, and was given {self.damp_percent!r}")
        options = GptqOptions(
            damping=float(self.damp_percent),
            order="activation" if self.desc_act and self.static_groups else "group",
            static_groups=self.static_groups,
            true_sequential=self.true_sequential,
            block_columns=self.blocksize,
        )
        return build_recipe(self, "gptq", options)


@dataclass
class AwqConfig(WeightOnlyConfig):
    """AWQ. `zero_point` is what asymmetric is called here."""

    bits: int = 4
    tokenizer: Any = None
    dataset: Any = PILE
    group_size: int = 32
    compute_dtype: Any = None
    weight_dtype: Any = None
    scale_dtype: Any = None
    use_layer_wise: bool | None = None
    n_samples: int = 128
    seq_len: int = 2048
    auto_scale: bool = True
    auto_clip: bool = True
    zero_point: bool = True
    absorb_layer_dict: dict[str, Any] = field(default_factory=dict)
    quant_lm_head: bool = False
    backend: str | None = None
    batch_size: int = field(default=8, kw_only=True)

    quant_method = QuantizationMethod.AWQ
    without_effect = IDLE | DISCOVERED | {"batch_size": BATCHES, "backend": "there is one way to run a model"}

    @classmethod
    def in_its_words(cls, named: dict[str, Any]) -> dict[str, Any]:
        """`sym`, which the other four have, is `zero_point` the other way round; that system drops it without a word."""
        named = dict(named)
        if "sym" not in named:
            return named
        sym = bool(named.pop("sym"))
        if bool(named.setdefault("zero_point", not sym)) is sym:
            raise RecipeError(
                f"AwqConfig: sym={sym} and zero_point={sym} contradict each other, since weights with zero points are asymmetric: "
                f"leave one of them out, or say zero_point={not sym} for sym={sym}"
            )
        return named

    @property
    def sym(self) -> bool:
        return not self.zero_point

    def to_recipe(self) -> Recipe:
        check_counts(self, "n_samples", "seq_len")
        recipe = build_recipe(self, "rtn")
        if not (self.auto_scale or self.auto_clip):
            return recipe
        return recipe.replace(scaler="awq", scaler_options=AwqOptions(scale=self.auto_scale, clip=self.auto_clip))


@dataclass
class TeqConfig(WeightOnlyConfig):
    """TEQ, which trains its scales."""

    bits: int = 4
    tokenizer: Any = None
    dataset: Any = PILE
    group_size: int = 32
    compute_dtype: Any = None
    weight_dtype: Any = None
    scale_dtype: Any = None
    use_layer_wise: bool | None = None
    n_samples: int = 128
    seq_len: int = 2048
    sym: bool = True
    folding: bool = False
    absorb_layer_dict: dict[str, Any] = field(default_factory=dict)
    quant_lm_head: bool = False
    batch_size: int = field(default=8, kw_only=True)

    quant_method = QuantizationMethod.TEQ
    without_effect = IDLE | DISCOVERED | {"batch_size": BATCHES, "folding": "scales are always folded"}

    def to_recipe(self) -> Recipe:
        check_counts(self, "n_samples", "seq_len")
        return build_recipe(self, "rtn").replace(scaler="teq", scaler_options=TeqOptions())


@dataclass
class AutoRoundConfig(WeightOnlyConfig):
    """AutoRound. `calib_iters` is an older name of `iters`."""

    bits: int = 4
    tokenizer: Any = None
    dataset: Any = PILE
    group_size: int = 128
    compute_dtype: Any = None
    weight_dtype: Any = None
    scale_dtype: Any = None
    sym: bool = False
    lr: float | None = None
    minmax_lr: float | None = None
    disable_quanted_input: bool = True
    n_samples: int = 128
    seq_len: int = 2048
    iters: int = 200
    use_layer_wise: bool | None = None
    quant_lm_head: bool = False
    quant_nontext_module: bool = False
    truncation: bool = False
    gradient_accumulate_steps: int = 1
    export_format: str = "itrex"
    batch_size: int = field(default=8, kw_only=True)
    calib_iters: int | None = field(default=None, kw_only=True)

    quant_method = QuantizationMethod.AUTOROUND
    without_effect = IDLE | {
        "quant_nontext_module": "modules_to_not_convert names what is left out",
        "truncation": "the text is cut into windows",
        "export_format": "there is one form to save in",
    }

    def __post_init__(self) -> None:
        if self.calib_iters is not None:
            usual = type(self).iters
            if self.iters not in (None, usual, self.calib_iters):
                raise RecipeError(
                    f"AutoRoundConfig: iters={self.iters} and calib_iters={self.calib_iters} contradict each other: leave one out"
                )
            self.iters = self.calib_iters
        super().__post_init__()

    def to_recipe(self) -> Recipe:
        check_counts(self, "n_samples", "seq_len", "iters", "batch_size", "gradient_accumulate_steps")
        options = AutoRoundOptions(
            iterations=self.iters,
            # Gradients that are summed before a step are those of a larger batch.
            batch_rows=self.batch_size * self.gradient_accumulate_steps,
            rate=self.lr or 0.0,
            range_rate=self.minmax_lr or 0.0,
            enable_quanted_input=not self.disable_quanted_input,
            samples=self.n_samples,
        )
        return build_recipe(self, "autoround", options)


CONFIGS: dict[str, type[WeightOnlyConfig]] = {
    kind.quant_method.value: kind for kind in (RtnConfig, GPTQConfig, AwqConfig, TeqConfig, AutoRoundConfig)
}


def saved_config(folder: Path) -> WeightOnlyConfig | None:
    """The configuration that lies beside a model which was made with one, or None."""
    path = folder / CONFIG_FILE
    fields = read_json(path) if path.is_file() else {}
    # Other tools write a file of this name too, without the fields that only this system has.
    return config_from(fields) if "scheme" in fields else None


def config_from(fields: dict[str, Any]) -> WeightOnlyConfig | None:
    """The configuration that saved fields describe, or None where they name none of the five."""
    kind = CONFIGS.get(str(fields.get("quant_method")))
    if kind is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what changes nothing was said when the model was made
        config: WeightOnlyConfig = kind.from_dict(fields)
    return config
