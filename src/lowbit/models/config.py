"""Read a Hugging Face config.json so that nothing in it is overlooked.

A config is a flat dict of a few dozen fields. Some change what a model computes, some do not (dropout, how it was
initialised, which class wrote it), and nothing in the file says which is which. `Config` therefore remembers each field
it was asked for; at the end `refuse_unread` raises when a field is left that nobody asked for, that is set, and whose
name reads as if it meant arithmetic. A family that lowbit half understands must not run half right.

Two spellings of rotary positions exist: `rope_theta` beside `rope_scaling` (before transformers 5) and both in
`rope_parameters`, which may hold one dict for each type of layer (Gemma 3). `Config.rope` reads them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import RecipeError, nearest
from lowbit.models.rope import longrope_attention_factor, yarn_attention_factor
from lowbit.models.spec import Pairing, RopeKind, RopeSpec

# Set by every config class or trainer; none of them changes the logits of a text.
_HARMLESS = frozenset(
    """
    architectures auto_map model_type dtype torch_dtype transformers_version _name_or_path name_or_path
    use_cache initializer_range init_std emb_init_std init_config init_device fan_mode layer_norm_init
    attn_implementation _attn_implementation attn_impl chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id finetuning_task id2label label2id is_decoder is_encoder_decoder num_labels
    output_attentions output_hidden_states output_router_logits return_dict router_aux_loss_coef
    router_jitter_noise problem_type tokenizer_class prefix task_specific_params torchscript use_bfloat16
    gradient_checkpointing layerdrop embedding_fraction unk_token_id sep_token_id mask_token_id bos_token_id
    eos_token_id pad_token_id classifier_dropout summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels scale_embedding_gradients quantization_config pretraining_tp
    max_length min_length num_beams do_sample temperature top_k top_p cache_implementation is_llama_config n_ctx
    seq_length attn_uses_sequence_id masked_softmax_fusion attention_softmax_in_fp32 bias_dropout_fusion
    skip_bias_add skip_bias_add_qkv slow_but_exact reorder_and_upcast_attn
    """.split()  # noqa: SIM905 - as words it fits on a page
)
_DROPOUT = re.compile(r"dropout|pdrop")
_ARITHMETIC = re.compile(
    r"norm|rope|rotary|scal|bias|attn|attention|window|expert|moe|router|cap(ping)?$|multipl|clip|alibi|act(ivation)?|resid"
    r"|position|layer|head|mlp|ffn|softmax|causal|bidirect|theta|tie|embed|factor|pattern|chunk|interval|sink|gate|logit"
    r"|temperature|sparse|size|dim|beta|alpha|eps"
)
_TRAINED = "original_max_position_embeddings"
# What each kind of rotary positions must be told, and what it may be told.
_ROPE_FIELDS: dict[RopeKind, tuple[str, str]] = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor", _TRAINED),
    "yarn": ("", f"factor attention_factor beta_fast beta_slow truncate mscale mscale_all_dim {_TRAINED}"),
    "longrope": ("short_factor long_factor", f"factor attention_factor {_TRAINED}"),
    "proportional": ("", "factor"),
}
_ROPE_EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_REQUIRED: Any = object()


@dataclass(frozen=True)
class Field:
    """A place in a row that the config decides: the first of `names` that is set, or the default."""

    names: tuple[str, ...]
    default: Any = None


def field(*names: str, default: Any = None) -> Any:
    """A `Field`, typed loosely so that a row can put it where a plain value may stand."""
    return Field(names, default)


class Config:
    """The fields of a config.json, and which of them were read."""

    def __init__(self, family: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.family = family
        self._fields = {**defaults, **fields}
        self._given = dict(fields)
        self._read: set[str] = set()

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of these names that is set.

        A null is not set, yet keeps the family's own default away: Mistral without `sliding_window` has one of 4096,
        with `"sliding_window": null` it has none.
        """
        self._read.update(names)
        for name in names:
            if self._fields.get(name) is not None:
                return self._fields[name]
        if default is _REQUIRED:
            raise RecipeError(f"the config of this {self.family} model has no {names[0]}, which its computation needs")
        return default

    def value(self, place: Any) -> Any:
        """What stands at a place of a row: itself, or what the config says if it is a `Field`."""
        return self.get(*place.names, default=place.default) if isinstance(place, Field) else place

    def require(self, name: str, expected: Any, default: Any = None) -> None:
        """Refuse a model whose field asks for arithmetic that lowbit does not have."""
        value = self.get(name, default=expected if default is None else default)
        if value != expected:
            raise RecipeError(
                f"lowbit does not run {self.family} models with {name} = {value!r}, only with {expected!r}; "
                "run this one in transformers"
            )

    def group(self, name: str) -> Config:
        """A dict inside the config, read with the same care."""
        self._read.add(name)
        return Config(f"{self.family} {name}", self._fields.get(name) or {}, {})

    def refuse_unread(self, unused: frozenset[str] = frozenset()) -> None:
        """Raise if a field is set that reads like arithmetic and that nobody asked for."""
        for name, value in self._given.items():
            known = name in self._read or name in _HARMLESS or name in unused or _DROPOUT.search(name)
            if not known and value not in (None, 0, False, "", [], {}) and _ARITHMETIC.search(name):
                raise RecipeError(
                    f"the config of this {self.family} model sets {name} = {value!r}, which lowbit does not know for "
                    "this family and which may change what it computes; remove the field if it has no effect"
                )

    def ropes(self, head_dim: int, max_positions: int, pairing: Pairing) -> dict[str, RopeSpec]:
        """The rotary positions of each type of layer; one entry named "" where all layers share them."""
        table = self.get("rope_parameters", "rope_scaling", default={})
        local_theta = self.get("rope_local_base_freq", default=None)
        nested = {name: inner for name, inner in table.items() if isinstance(inner, dict)}
        if nested and set(nested) != set(table):
            raise RecipeError(f"the rope_parameters of this {self.family} model mix layer types with plain fields")
        if local_theta is not None:
            # Gemma 3 turns sliding layers at a rate of their own, kept in this field before transformers 5.
            local = {"rope_theta": local_theta, **nested.get("sliding_attention", {})}
            nested = {"full_attention": nested.get("full_attention", table), "sliding_attention": local}
        tables = nested or {"": table}
        return {name: self._rope(inner, head_dim, max_positions, pairing) for name, inner in tables.items()}

    def _rope(self, table: dict[str, Any], head_dim: int, max_positions: int, pairing: Pairing) -> RopeSpec:
        kind: RopeKind = table.get("rope_type", table.get("type", "default"))
        kind = "longrope" if str(kind) == "su" else kind  # its name in the first Phi-3 configs
        if kind not in _ROPE_FIELDS:
            raise RecipeError(f"unknown kind of rotary positions {kind!r}: {nearest(str(kind), _ROPE_FIELDS)}")
        self._check_rope_fields(kind, {name for name, value in table.items() if value is not None})
        theta = float(table.get("rope_theta") or self.get("rope_theta", "rotary_emb_base", default=10000.0))
        beside = self.get("partial_rotary_factor", "rotary_pct", default=1.0)
        fraction = float(table.get("partial_rotary_factor") or beside)
        numbers = self._rope_numbers(kind, table, max_positions)
        if kind == "proportional":
            return RopeSpec(kind, theta, head_dim, pairing, turned_fraction=fraction, **numbers)
        return RopeSpec(kind, theta, int(head_dim * fraction), pairing, **numbers)

    def _check_rope_fields(self, kind: RopeKind, given: set[str]) -> None:
        required, optional = (set(names.split()) for names in _ROPE_FIELDS[kind])
        for name in sorted(required - given):
            raise RecipeError(f"rotary positions of kind {kind} need {name}, which this {self.family} config lacks")
        for name in sorted(given - required - optional - _ROPE_EVERYWHERE):
            if kind != "default":  # transformers leaves fields of other kinds beside it and does not read them
                raise RecipeError(
                    f"rotary positions of kind {kind} have no field {name}; remove it or correct the kind"
                )

    def _rope_numbers(self, kind: RopeKind, table: dict[str, Any], max_positions: int) -> dict[str, Any]:
        """The fields of a RopeSpec that only some kinds have."""
        beside = self.get(_TRAINED, default=None)  # Phi-3 keeps it outside, and there it wins
        if kind == "default":
            return {}
        trained = int(beside or table.get(_TRAINED) or max_positions)
        factor = table.get("factor")
        factor = float(factor if factor is not None else max_positions / trained)
        numbers: dict[str, Any] = {"factor": factor, "trained_positions": trained}
        if kind == "dynamic":
            numbers["trained_positions"] = max_positions
        if kind == "llama3":
            numbers["low_frequency_factor"] = float(table["low_freq_factor"])
            numbers["high_frequency_factor"] = float(table["high_freq_factor"])
        if kind == "yarn":
            numbers["beta_fast"] = float(table.get("beta_fast") or 32)
            numbers["beta_slow"] = float(table.get("beta_slow") or 1)
            numbers["truncate"] = bool(table.get("truncate", True))
            numbers["attention_factor"] = _yarn_factor(table, factor)
        if kind == "longrope":
            numbers["short_factors"] = tuple(map(float, table["short_factor"]))
            numbers["long_factors"] = tuple(map(float, table["long_factor"]))
            given = table.get("attention_factor")
            numbers["attention_factor"] = longrope_attention_factor(factor, trained) if given is None else float(given)
        return numbers


def _yarn_factor(table: dict[str, Any], factor: float) -> float:
    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])
    over, under = table.get("mscale"), table.get("mscale_all_dim")
    if over and under:
        return yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
    return yarn_attention_factor(factor)
