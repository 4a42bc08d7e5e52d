"""What each family calls its weights: one table from role to name, for transformers 5 and for older files.

Names leave out the ending: linears and norms end in `.weight` and `.bias`; fused experts and sinks are parameters by
themselves, with `_bias` for a bias. Most families speak Llama's dialect and say only what they call otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lowbit.models.spec import DecoderSpec, WeightSpec

# Which switch of a row gives a role its bias. Roles that are missing here never have one.
_BIAS_GROUPS = {
    "attention": ("q", "k", "v", "qkv"),
    "output": ("o",),
    "mlp": ("gate", "up", "gate_up", "down"),
    "experts": ("router", "experts_gate_up", "experts_down"),
    "norm": ("embedding_norm", "attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "final_norm"),
    "qk_norm": ("q_norm", "k_norm"),
    "head": ("head",),
}
BIAS_GROUP = {role: group for group, roles in _BIAS_GROUPS.items() for role in roles}
_BARE = ("sinks", "experts_gate_up", "experts_down")


@dataclass(frozen=True)
class Names:
    """The names of one dialect. `pieces`: roles that files store in parts. `spellings`: what files write otherwise."""

    layer: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    pieces: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()

    def but(self, *, outside: Mapping[str, str] | None = None, **inside: str) -> Names:
        """The same dialect with some words of its own."""
        return dataclasses.replace(self, inside={**self.inside, **inside}, outside={**self.outside, **(outside or {})})

    def with_pieces(self, **pieces: tuple[str, ...]) -> Names:
        return dataclasses.replace(self, pieces={**self.pieces, **pieces})

    def spelt(self, *spellings: tuple[str, str]) -> Names:
        return dataclasses.replace(self, spellings=spellings)

    def with_transposed(self, *roles: str) -> Names:
        return dataclasses.replace(self, transposed=roles)


def weight_specs(spec: DecoderSpec, names: Names, biased: frozenset[str]) -> tuple[WeightSpec, ...]:
    """The weights of a spec; `biased` holds the bias groups that are switched on."""
    return tuple(
        _weight_spec(role, shape, spec, names, BIAS_GROUP.get(role) in biased) for role, shape in _shapes(spec)
    )


def _weight_spec(role: str, shape: tuple[int, ...], spec: DecoderSpec, names: Names, bias: bool) -> WeightSpec:
    path = names.outside[role] if role in names.outside else names.layer + names.inside[role]
    weight, bias_ending = ("", "_bias") if role in _BARE else (".weight", ".bias")
    parts = tuple(names.layer + part + ".weight" for part in names.pieces.get(role, ()))
    return WeightSpec(
        role=role,
        name=path + weight,
        shape=shape,
        bias=path + bias_ending if bias else None,
        transposed=role in names.transposed,
        parts=parts,
        stack=shape[0] if parts else 1,
    )


def _shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every role that a model of this spec has, in the order of the computation, with its shape."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    norm = (hidden,)
    yield "embedding", (vocab, spec.embedding.width)
    if spec.embedding.position_offset is not None:
        yield "positions", (spec.max_positions + spec.embedding.position_offset, hidden)
    if spec.embedding.norm:
        yield "embedding_norm", norm
    if spec.embedding.width != hidden:
        yield "embedding_in", (hidden, spec.embedding.width)
    yield from _attention_shapes(spec)
    yield from _mlp_shapes(spec)
    if spec.head.final_norm and spec.norm.weight:
        yield "final_norm", norm
    if spec.embedding.width != hidden:
        yield "head_in", (spec.embedding.width, hidden)
    if not spec.head.tied:
        yield "head", (vocab, spec.embedding.width)


def _attention_shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention, hidden = spec.attention, spec.hidden_size
    q, kv, head_dim = attention.q_size, attention.kv_size, attention.head_dim
    if spec.norm.weight and spec.placement != "post":
        yield "attention_norm", (hidden,)
    if attention.qkv == "separate":
        yield from (("q", (q, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)))
    else:
        yield "qkv", (q + 2 * kv, hidden)
    if attention.qk_norm != "none":
        of_q = {"head": (head_dim,), "heads": (attention.heads, head_dim), "width": (q,)}
        of_k = {"head": (head_dim,), "heads": (attention.kv_heads, head_dim), "width": (kv,)}
        yield from (("q_norm", of_q[attention.qk_norm]), ("k_norm", of_k[attention.qk_norm]))
    if attention.sinks:
        yield "sinks", (attention.heads,)
    yield "o", (hidden, q)
    if spec.norm.weight and spec.placement in ("post", "sandwich"):
        yield "attention_post_norm", (hidden,)


def _mlp_shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, size = spec.hidden_size, spec.mlp.intermediate_size if spec.mlp else 0
    if spec.norm.weight and spec.placement != "post" and spec.residual != "parallel_shared":
        yield "mlp_norm", (hidden,)
    if spec.mlp is not None:
        if spec.mlp.gate == "separate":
            yield "gate", (size, hidden)
        fused = spec.mlp.gate == "concatenated"
        yield ("gate_up", (2 * size, hidden)) if fused else ("up", (size, hidden))
        yield "down", (hidden, size)
    if spec.experts is not None:
        count, size = spec.experts.count, spec.experts.expert.intermediate_size
        yield "router", (count, hidden)
        yield "experts_gate_up", (count, 2 * size, hidden)
        yield "experts_down", (count, hidden, size)
        if spec.experts.shared is not None:
            size = spec.experts.shared.intermediate_size
            yield from (("shared_gate", (size, hidden)), ("shared_up", (size, hidden)), ("shared_down", (hidden, size)))
            yield "shared_router", (1, hidden)
    if spec.norm.weight and spec.placement in ("post", "sandwich"):
        yield "mlp_post_norm", (hidden,)


LLAMA = Names(
    layer="model.layers.{layer}.",
    outside={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    inside={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    spellings=(("model.", ""),),  # a base model saved without its head
)
PHI3 = LLAMA.but(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")
OLMO2 = LLAMA.but(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
GEMMA2 = OLMO2.but(mlp_norm="pre_feedforward_layernorm")
# Gemma 3 with eyes keeps its text model one level deeper, and called it otherwise before transformers 5.
GEMMA3 = GEMMA2.spelt(
    ("model.", "model.language_model."), ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")
)
STARCODER2 = LLAMA.but(up="mlp.c_fc", down="mlp.c_proj")
STABLELM = LLAMA.but(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm").with_pieces(
    q_norm=("self_attn.q_layernorm.norms.{index}",), k_norm=("self_attn.k_layernorm.norms.{index}",)
)
PHI = LLAMA.but(
    outside={"final_norm": "model.final_layernorm"},
    o="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    up="mlp.fc1",
    down="mlp.fc2",
)
# transformers 5 keeps all experts of a layer in one tensor, files keep one for each.
QWEN_MOE = LLAMA.but(
    router="mlp.gate",
    experts_gate_up="mlp.experts.gate_up_proj",
    experts_down="mlp.experts.down_proj",
    shared_gate="mlp.shared_expert.gate_proj",
    shared_up="mlp.shared_expert.up_proj",
    shared_down="mlp.shared_expert.down_proj",
    shared_router="mlp.shared_expert_gate",
).with_pieces(
    experts_gate_up=("mlp.experts.{index}.gate_proj", "mlp.experts.{index}.up_proj"),
    experts_down=("mlp.experts.{index}.down_proj",),
)
MIXTRAL = QWEN_MOE.with_pieces(
    experts_gate_up=("mlp.experts.{index}.w1", "mlp.experts.{index}.w3"), experts_down=("mlp.experts.{index}.w2",)
).spelt((".mlp.", ".block_sparse_moe."))
GPT_OSS = LLAMA.but(
    sinks="self_attn.sinks",
    router="mlp.router",
    experts_gate_up="mlp.experts.gate_up_proj",
    experts_down="mlp.experts.down_proj",
).with_transposed("experts_gate_up", "experts_down")
GPT2 = Names(
    layer="transformer.h.{layer}.",
    outside={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    inside={
        "attention_norm": "ln_1",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    spellings=(("transformer.", ""),),
    transposed=("qkv", "o", "up", "down"),  # its Conv1D computes x @ weight
)
GPTJ = GPT2.but(
    q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", o="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"
).with_transposed()
MPT = GPT2.but(outside={"final_norm": "transformer.norm_f"}).with_transposed()
MPT = dataclasses.replace(
    MPT.but(
        attention_norm="norm_1",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        mlp_norm="norm_2",
        up="ffn.up_proj",
        down="ffn.down_proj",
    ),
    layer="transformer.blocks.{layer}.",
)
BLOOM = GPT2.but(
    outside={"embedding": "transformer.word_embeddings", "embedding_norm": "transformer.word_embeddings_layernorm"},
    attention_norm="input_layernorm",
    qkv="self_attention.query_key_value",
    o="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
).with_transposed()
FALCON_TWO_NORMS = BLOOM.but(attention_norm="ln_attn", mlp_norm="ln_mlp")
GPT_NEOX = Names(
    layer="gpt_neox.layers.{layer}.",
    outside={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    inside={**BLOOM.inside, "qkv": "attention.query_key_value", "o": "attention.dense"},
    spellings=(("lm_head.", "embed_out."), ("gpt_neox.", "")),
)
OPT = Names(
    layer="model.decoder.layers.{layer}.",
    outside={
        "embedding": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "embedding_in": "model.decoder.project_in",
        "final_norm": "model.decoder.final_layer_norm",
        "head_in": "model.decoder.project_out",
        "head": "lm_head",
    },
    inside={
        "attention_norm": "self_attn_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    },
    spellings=(("model.decoder.", "decoder."),),
)
