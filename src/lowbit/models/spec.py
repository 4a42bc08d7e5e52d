"""What a decoder-only language model is, as data.

Every family that lowbit runs is the same machine with a few switches. With `h` of shape [tokens, hidden_size]:

    h = embedding[token] * multiplier (+ position table, + norm)
    for each layer:                                                      # residual = "sequential", placement = "pre"
        h = h + residual_multiplier * o @ attention(q, k, v of norm(h))
        h = h + residual_multiplier * down @ (act(gate @ norm(h)) * (up @ norm(h)))
    logits = soft_cap(head @ norm(h) * multiplier)

A `DecoderSpec` holds the position of each switch. Nothing here computes: four readers interpret the same value (the CPU
engine, the GPU engine, the OpenVINO writer, the GGUF writer), and `tests/unit/spec_interpreter.py` is the shortest of
them. `families.spec_from_config` makes one from a config.json.

The switches, by the family that made each known:

    norm        rms (Llama), of weight + 1 (Gemma), layer norm with bias (GPT-2), without (MPT), without weight (OLMo)
    placement   pre (Llama), post: norm of a branch's output (OLMo 2), sandwich: both (Gemma 2), after_sum (OPT 350m)
    residual    sequential (Llama), parallel: both branches read one h (GPT-NeoX), parallel_shared: one norm too (Phi)
    qkv         separate (Llama), concatenated q|k|v (GPT-2, MPT, Phi-3), grouped: per kv head its q heads, k, v (BLOOM)
    qk_norm     head: one weight for all heads (Qwen 3), heads: one each (Command R), width: across heads (OLMo 2)
    positions   rope (Llama), learned table (GPT-2; OPT, offset by 2), ALiBi (BLOOM), none in some layers (SmolLM 3)
    windows     per layer: all (Mistral), every other (Gemma 2), five of six (Gemma 3)
    caps        attention scores and logits squeezed by cap * tanh(x / cap) (Gemma 2)
    multipliers embeddings (Gemma: sqrt(hidden_size)), residual and logits (Granite)
    experts     top k of n (Mixtral), beside a shared one with its own gate (Qwen2-MoE)

Weights are known by role, the same in every family; `WeightSpec` has their names. Linear weights are [out, in].

    embedding  positions  embedding_norm  embedding_in           outside the layers, on the way in
    attention_norm  q k v | qkv  q_norm k_norm  sinks  o  attention_post_norm
    mlp_norm  gate up down | gate_up down  mlp_post_norm
    router  experts_gate_up  experts_down  shared_gate  shared_up  shared_down  shared_router
    final_norm  head_in  head                                    outside the layers, on the way out
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import CheckpointError, RecipeError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Placement = Literal["pre", "post", "sandwich", "after_sum"]
Residual = Literal["sequential", "parallel", "parallel_shared"]
QkvLayout = Literal["separate", "concatenated", "grouped"]
QkNorm = Literal["none", "head", "heads", "width"]
GateLayout = Literal["none", "separate", "concatenated", "interleaved"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]
Pairing = Literal["halves", "neighbours"]

DENSE_ROLES = ("gate", "up", "down", "gate_up")
SPARSE_ROLES = (
    "router",
    "experts_gate_up",
    "experts_down",
    "shared_gate",
    "shared_up",
    "shared_down",
    "shared_router",
)


@dataclass(frozen=True)
class NormSpec:
    """y = x / size(x) * (offset + weight) + bias; size is the root mean square, and `layer` removes the mean first.

    `weight` and `bias` say whether the norms of the layers have them; norms of q and k may differ in their bias.
    """

    kind: Literal["rms", "layer"]
    eps: float
    offset: float = 0.0
    weight: bool = True
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: the first `rotary_dim` channels of q and k turn in pairs, pair i by position * frequency i.

    `halves` pairs channel i with i + rotary_dim / 2 (GPT-NeoX, Llama); `neighbours` pairs 2i with 2i + 1 (GPT-J).
    Cosine and sine are multiplied by `attention_factor`. `rope.inverse_frequencies` has the formula of each kind.
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    pairing: Pairing = "halves"
    attention_factor: float = 1.0
    factor: float = 1.0
    trained_positions: int = 0  # the context before it was stretched
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope, one for each pair
    long_factors: tuple[float, ...] = ()
    turned_fraction: float = 1.0  # proportional: pairs beyond it have frequency 0

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change as the sequence grows: keys cached earlier were turned by other ones."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax over scale * q.k, with everything that families add to the scores before or after.

    q, k, v are clipped to +-`clip`. Scores are scaled, then squeezed by `soft_cap`, then alibi[head] * (key position -
    query position) is added. With `sinks` one learned logit per head joins the softmax and its share is dropped.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv: QkvLayout = "separate"
    qk_norm: QkNorm = "none"
    soft_cap: float | None = None
    sinks: bool = False
    alibi: tuple[float, ...] = ()
    clip: float | None = None

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def qkv_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Which rows of a fused qkv weight are q, k and v, in the order of the heads."""
        rows = np.arange(self.q_size + 2 * self.kv_size)
        if self.qkv != "grouped":
            q, k, v = np.split(rows, [self.q_size, self.q_size + self.kv_size])
            return q, k, v
        grouped = rows.reshape(self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim)
        return grouped[:, :-2].ravel(), grouped[:, -2].ravel(), grouped[:, -1].ravel()


@dataclass(frozen=True)
class MlpSpec:
    """down @ act(up @ x), or down @ (act(gate @ x) * (up @ x)) with a gate.

    `gate` says how gate and up are stored: two weights, one with gate above up, or one with their rows alternating.
    With a `limit` (GPT-OSS) gate is clamped from above and up from both sides, the activation is
    gate * sigmoid(sigmoid_scale * gate), and up + 1 takes the place of up.
    """

    intermediate_size: int
    activation: Activation
    gate: GateLayout = "separate"
    limit: float | None = None
    sigmoid_scale: float = 1.0


@dataclass(frozen=True)
class ExpertsSpec:
    """The `top_k` experts most probable to the router, weighted by probability; and `shared` times sigmoid(its router).

    Probabilities are a softmax over all experts. `normalize` divides the chosen ones by their sum, which is the same as
    a softmax over the chosen logits only (GPT-OSS).
    """

    count: int
    top_k: int
    normalize: bool
    expert: MlpSpec
    shared: MlpSpec | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What one layer has of its own. Query i sees keys j with i - window < j <= i, or all j <= i without a window."""

    rope: RopeSpec | None = None
    window: int | None = None
    sparse: bool = False


@dataclass(frozen=True)
class EmbeddingSpec:
    """The way in. `width` differs from the hidden size in OPT 350m, where `embedding_in` projects up to it.

    `position_offset` is the row of the position table that position 0 reads; None without such a table. The multiplier
    is rounded to the type of the weights before it is used: Gemma's sqrt(3072) is 55.5 in bfloat16.
    """

    width: int
    multiplier: float = 1.0
    norm: bool = False
    position_offset: int | None = None


@dataclass(frozen=True)
class HeadSpec:
    """The way out. A `tied` head is the embedding itself; logits are multiplied, then capped."""

    tied: bool
    final_norm: bool = True
    multiplier: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class TokenIds:
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class WeightSpec:
    """One weight: its role, its shape once it is [out, in], and its name, where `{layer}` stands for the layer.

    `name` is what transformers 5 calls the parameter. Files may store the weight in `stack` pieces instead, one for
    each `{index}` (an expert, or a head), which are its `parts` one above the other. If `transposed` it is stored
    [in, out].
    """

    role: str
    name: str
    shape: tuple[int, ...]
    bias: str | None = None
    transposed: bool = False
    parts: tuple[str, ...] = ()
    stack: int = 1

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True)
class Located:
    """Where a weight lies in a file: names[index][part], a single name unless it is stored in pieces."""

    weight: WeightSpec
    layer: int | None
    names: tuple[tuple[str, ...], ...]
    bias: str | None = None
    in_pieces: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name of the file that the weight and its bias are made of."""
        return (*(name for names in self.names for name in names), *([self.bias] if self.bias else []))


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only model. Frozen and hashable; checks that its sizes agree."""

    family: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    embedding: EmbeddingSpec
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec | None
    head: HeadSpec
    weights: tuple[WeightSpec, ...]
    experts: ExpertsSpec | None = None
    placement: Placement = "pre"
    residual: Residual = "sequential"
    residual_multiplier: float = 1.0
    tokens: TokenIds = TokenIds()
    spellings: tuple[tuple[str, str], ...] = ()  # (start or middle of a name in transformers 5, the same in files)

    def __post_init__(self) -> None:
        heads, kv_heads = self.attention.heads, self.attention.kv_heads
        if heads % kv_heads:
            raise RecipeError(f"{self.family}: {heads} query heads cannot share {kv_heads} key heads evenly")
        for rope in {layer.rope for layer in self.layers if layer.rope is not None}:
            if rope.rotary_dim % 2 or rope.rotary_dim > self.attention.head_dim:
                raise RecipeError(
                    f"{self.family}: rotary positions turn pairs of channels inside a head, which {rope.rotary_dim} of "
                    f"{self.attention.head_dim} channels do not make"
                )
        if self.experts is not None and not 0 < self.experts.top_k <= self.experts.count:
            raise RecipeError(f"{self.family}: cannot choose {self.experts.top_k} of {self.experts.count} experts")
        if any(layer.sparse for layer in self.layers) and self.experts is None:
            raise RecipeError(f"{self.family}: has sparse layers but says nothing of its experts")

    @property
    def shortest_window(self) -> int | None:
        """The fewest tokens that a layer with a sliding window sees; None where every layer sees all."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    def weight(self, role: str) -> WeightSpec | None:
        """The weight of a role, or None in families without it."""
        return next((weight for weight in self.weights if weight.role == role), None)

    def layer_weights(self, layer: int) -> tuple[WeightSpec, ...]:
        """The weights that a layer has: those of a dense or of a sparse MLP, and the rest."""
        absent = DENSE_ROLES if self.layers[layer].sparse else SPARSE_ROLES
        return tuple(w for w in self.weights if w.in_layer and w.role not in absent)

    def outer_weights(self) -> tuple[WeightSpec, ...]:
        """The weights outside the layers."""
        return tuple(w for w in self.weights if not w.in_layer)

    def names_in_files(self, name: str) -> tuple[str, ...]:
        """What files may call a parameter: its name in transformers 5 first, then the older spellings."""
        names = [name]
        for new, old in self.spellings:
            names += [n.replace(new, old, 1) for n in names if n.startswith(new) or (new.startswith(".") and new in n)]
        return tuple(dict.fromkeys(names))

    def locate(self, present: Collection[str]) -> dict[tuple[str, int | None], Located]:
        """Find every weight of the model among the names of a file, by (role, layer); layer is None outside the layers.

        A packed weight is looked for under the name of the dense one: give `x.weight` for `x.packed_weight.codes`.
        """
        outer = ((weight, None) for weight in self.outer_weights())
        inner = ((weight, i) for i in range(len(self.layers)) for weight in self.layer_weights(i))
        located = {}
        for weight, layer in chain[tuple[WeightSpec, int | None]](outer, inner):
            located[weight.role, layer] = self._locate(weight, layer, present)
        return located

    def _locate(self, weight: WeightSpec, layer: int | None, present: Collection[str]) -> Located:
        def find(template: str, index: int = 0) -> str:
            names = self.names_in_files(template.format(layer=layer, index=index))
            found = next((name for name in names if name in present), None)
            if found is None:
                raise CheckpointError(
                    f"the checkpoint lacks {names[0]}, part of the {weight.role} weight of a {self.family} model; "
                    "is a shard of it missing, or does its config.json belong to another model?"
                )
            return found

        whole = self.names_in_files(weight.name.format(layer=layer))
        in_pieces = bool(weight.parts) and not any(name in present for name in whole)
        templates, count = (weight.parts, weight.stack) if in_pieces else ((weight.name,), 1)
        names = tuple(tuple(find(template, i) for template in templates) for i in range(count))
        return Located(weight, layer, names, None if weight.bias is None else find(weight.bias), in_pieces)
