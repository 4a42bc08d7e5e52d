"""A row of the table of families, and the one function that turns any row and a config into a `DecoderSpec`.

The defaults of a row are Llama: a row says where a family differs. `config.field` marks a place that the config
decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import RecipeError, nearest
from lowbit.models.config import Config, field
from lowbit.models.names import LLAMA, Names, weight_specs
from lowbit.models.rope import alibi_slopes
from lowbit.models.spec import (
    Activation,
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    ExpertsSpec,
    GateLayout,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    Pairing,
    QkvLayout,
    RopeSpec,
    TokenIds,
)

# transformers has several names for one function; gelu_new and its kin are the tanh approximation.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"
MLP_WIDENING = 4  # what families without an intermediate size in their config mean
RMS_NORM = NormSpec("rms", eps=0.0)  # a family's eps comes from its config
RMS_NORM_EPS = field("rms_norm_eps", default=1e-6)
KV_HEADS, HEAD_DIM, WIDTH = field("num_key_value_heads"), field("head_dim"), field("intermediate_size")
SILU, UNTIED = field("hidden_act", default="silu"), field("tie_word_embeddings", default=False)
LayerKinds = Callable[[Config, int], list[str]]
Flags = Callable[[Config, int], list[bool]]


def all_full(config: Config, count: int) -> list[str]:
    """No layer has a window."""
    return [FULL] * count


def every_layer(config: Config, count: int) -> list[bool]:
    return [True] * count


@dataclass(frozen=True)
class Family:
    """One row. Places typed `Any` may hold a plain value or a `field`."""

    names: Names = LLAMA
    # the norms
    norm: NormSpec = RMS_NORM
    eps: Any = RMS_NORM_EPS
    placement: Any = "pre"
    residual: Any = "sequential"
    # positions
    positions: Literal["rope", "learned", "alibi"] = "rope"
    pairing: Pairing = "halves"
    partial_rotary: bool = False
    rotary_dim: Any = None  # where the config gives it outright; else a fraction of the head dim
    position_offset: int = 0
    turned: Flags = every_layer
    # attention
    kv_heads: Any = KV_HEADS
    head_dim: Any = HEAD_DIM
    scale: Any = None
    scale_of: Any = None  # scale = scale_of ** -0.5; the head dim unless the row says otherwise
    alibi_scaled: bool = False  # ALiBi is scaled together with q.k
    qkv: QkvLayout = "separate"
    qk_norm: Any = "none"
    kinds: LayerKinds = all_full
    window: Any = None
    soft_cap: Any = None
    sinks: bool = False
    clip: Any = None
    # the MLP
    activation: Any = SILU
    intermediate_size: Any = WIDTH
    gate: GateLayout = "separate"
    experts: Callable[[Config, Activation], ExpertsSpec] | None = None
    sparse: Flags = every_layer
    # the way in and out
    embedding_width: Any = None
    embedding_norm: bool = False
    embedding_multiplier: Any = 1.0
    residual_multiplier: Any = 1.0
    logits_multiplier: Any = 1.0
    logits_divisor: Any = 1.0
    logits_cap: Any = None
    final_norm: bool = True
    tied: Any = UNTIED
    # which groups of `names.BIAS_GROUP` have biases
    biases: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # the config: fields that must have a value, that change nothing, that have another default than their absence
    requires: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vary: Callable[[Config, Family], Family] | None = None


def build(name: str, family: Family, fields: Mapping[str, Any]) -> DecoderSpec:
    """The `DecoderSpec` of a model of this family with this config."""
    config = Config(name, fields, family.defaults)
    for required, expected in family.requires.items():
        config.require(required, expected)
    if family.vary is not None:
        family = family.vary(config, family)
    hidden_size = int(config.get("hidden_size", "n_embd", "d_model", "n_embed"))
    max_positions = int(config.get("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=2048))
    biased = frozenset(group for group, place in family.biases.items() if config.value(place))
    attention = _attention(config, family, hidden_size)
    layers = _layers(config, family, attention.head_dim, max_positions)
    activation = _activation(name, config.value(family.activation))
    experts = _experts(config, family, activation, layers)
    mlp = _mlp(config, family, hidden_size, activation)
    width = int(config.value(family.embedding_width) or hidden_size)
    spec = DecoderSpec(
        family=name,
        hidden_size=hidden_size,
        vocab_size=int(config.get("vocab_size")),
        max_positions=max_positions,
        layers=layers,
        embedding=EmbeddingSpec(
            width=width,
            multiplier=float(config.value(family.embedding_multiplier)),
            norm=family.embedding_norm,
            position_offset=family.position_offset if family.positions == "learned" else None,
        ),
        norm=dataclasses.replace(family.norm, eps=float(config.value(family.eps)), bias="norm" in biased),
        attention=attention,
        mlp=None if all(layer.sparse for layer in layers) else mlp,
        head=HeadSpec(
            tied=bool(config.value(family.tied)),
            final_norm=family.final_norm,
            multiplier=float(config.value(family.logits_multiplier)) / float(config.value(family.logits_divisor)),
            soft_cap=_number(config.value(family.logits_cap)),
        ),
        weights=(),
        experts=experts,
        placement=config.value(family.placement),
        residual=config.value(family.residual),
        residual_multiplier=float(config.value(family.residual_multiplier)),
        tokens=_tokens(config),
        spellings=family.names.spellings,
    )
    config.refuse_unread(family.unused)
    return dataclasses.replace(spec, weights=weight_specs(spec, family.names, biased))


def _attention(config: Config, family: Family, hidden_size: int) -> AttentionSpec:
    heads = int(config.get("num_attention_heads", "n_head", "n_heads"))
    head_dim = int(config.value(family.head_dim) or hidden_size // heads)
    scale = config.value(family.scale)
    if scale is None:
        scale = float(config.value(family.scale_of) or head_dim) ** -0.5
    alibi = alibi_slopes(heads) if family.positions == "alibi" else ()
    if family.alibi_scaled:
        alibi = tuple(slope * scale for slope in alibi)
    return AttentionSpec(
        heads=heads,
        kv_heads=int(config.value(family.kv_heads) or heads),
        head_dim=head_dim,
        scale=float(scale),
        qkv=family.qkv,
        qk_norm=config.value(family.qk_norm),
        soft_cap=_number(config.value(family.soft_cap)),
        sinks=family.sinks,
        alibi=alibi,
        clip=_number(config.value(family.clip)),
    )


def _layers(config: Config, family: Family, head_dim: int, max_positions: int) -> tuple[LayerSpec, ...]:
    count = int(config.get("num_hidden_layers", "n_layer", "n_layers"))
    kinds, turned = family.kinds(config, count), family.turned(config, count)
    sparse = family.sparse(config, count) if family.experts is not None else [False] * count
    for column in (kinds, turned):
        if len(column) != count:
            raise RecipeError(
                f"the config of this {config.family} model describes {len(column)} layers and has {count}"
            )
    unknown = set(kinds) - {FULL, SLIDING}
    if unknown:
        raise RecipeError(f"lowbit has no layers of type {unknown.pop()!r}, only {FULL} and {SLIDING}")
    window = config.value(family.window)
    ropes = _ropes(config, family, head_dim, max_positions)
    return tuple(
        LayerSpec(
            rope=ropes.get(kind, ropes.get("")) if turns else None,
            window=int(window) if window and kind == SLIDING else None,
            sparse=is_sparse,
        )
        for kind, turns, is_sparse in zip(kinds, turned, sparse, strict=True)
    )


def _ropes(config: Config, family: Family, head_dim: int, max_positions: int) -> dict[str, RopeSpec]:
    """The rotary positions of each type of layer; none in families that know positions otherwise."""
    if family.positions != "rope":
        return {}
    ropes = config.ropes(head_dim, max_positions, family.pairing)
    rotary_dim = config.value(family.rotary_dim)
    if rotary_dim is not None:
        ropes = {kind: dataclasses.replace(rope, rotary_dim=int(rotary_dim)) for kind, rope in ropes.items()}
    for rope in ropes.values():
        if rope.rotary_dim != head_dim and not family.partial_rotary:
            raise RecipeError(
                f"{config.family} models turn all {head_dim} channels of a head, but this config's "
                f"partial_rotary_factor leaves {rope.rotary_dim}; remove it"
            )
        for factors in (rope.short_factors, rope.long_factors):
            if rope.kind == "longrope" and len(factors) != rope.rotary_dim // 2:
                raise RecipeError(
                    f"longrope needs a factor for each of {rope.rotary_dim // 2} pairs of channels, the config of this "
                    f"{config.family} model has {len(factors)}"
                )
    return ropes


def _mlp(config: Config, family: Family, hidden_size: int, activation: Activation) -> MlpSpec:
    size = config.value(family.intermediate_size) or MLP_WIDENING * hidden_size
    return MlpSpec(int(size), activation, family.gate)


def _experts(
    config: Config, family: Family, activation: Activation, layers: tuple[LayerSpec, ...]
) -> ExpertsSpec | None:
    if family.experts is None:
        return None
    experts = family.experts(config, activation)  # read in any case: it marks its fields as understood
    return experts if any(layer.sparse for layer in layers) else None


def _activation(family: str, name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise RecipeError(f"lowbit has no activation {name!r} for {family} models: {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _number(value: Any) -> float | None:
    """A cap or a clip; null and 0 both mean that there is none."""
    return float(value) if value else None


def _tokens(config: Config) -> TokenIds:
    eos = config.get("eos_token_id", default=())
    return TokenIds(
        bos=config.get("bos_token_id", default=None),
        eos=(eos,) if isinstance(eos, int) else tuple(eos),
        pad=config.get("pad_token_id", default=None),
    )
