"""From a `DecoderSpec` and weights to the struct that the core reads.

Names become numbers, None becomes zero, frequencies of rotary positions are computed, and Gemma's `weight + 1` of the norms
is added here once. `Description` keeps every array alive that the struct points to.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.core.library import DTYPES
from lowbit.errors import WeightError
from lowbit.models.rope import inverse_frequencies
from lowbit.models.spec import DecoderSpec, MlpSpec, RopeSpec
from lowbit.runtime import abi
from lowbit.runtime.weights import EngineWeights, Key

NO_TABLE = -1


class Description:
    """`model` is the struct; the rest of this object is what it points to."""

    def __init__(self, spec: DecoderSpec, weights: EngineWeights) -> None:
        self.spec, self.weights = spec, weights
        self._kept: list[Any] = [weights]
        self.ropes = list(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None))
        self.model = abi.CModel(struct_bytes=ctypes.sizeof(abi.CModel))
        self._sizes()
        self._attention()
        self._mlps()
        self._layers()
        self._outer()

    def _sizes(self) -> None:
        model, spec = self.model, self.spec
        model.hidden_size, model.vocab_size, model.layer_count = spec.hidden_size, spec.vocab_size, len(spec.layers)
        model.embedding_width, model.embedding_multiplier = spec.embedding.width, spec.embedding.multiplier
        offset = spec.embedding.position_offset
        model.position_offset = NO_TABLE if offset is None else offset
        table = self.weights.matrices.get(("positions", None))
        model.position_rows = 0 if table is None else table.rows
        model.embedding_norm, model.final_norm = spec.embedding.norm, spec.head.final_norm
        model.norm_kind, model.norm_eps = abi.NORM_KINDS.index(spec.norm.kind), spec.norm.eps
        model.placement, model.residual = abi.PLACEMENTS.index(spec.placement), abi.RESIDUALS.index(spec.residual)
        model.residual_multiplier = spec.residual_multiplier
        model.head_multiplier, model.head_soft_cap = spec.head.multiplier, spec.head.soft_cap or 0.0

    def _attention(self) -> None:
        model, attention = self.model, self.spec.attention
        model.heads, model.kv_heads, model.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        model.qk_norm, model.qkv_grouped = abi.QK_NORMS.index(attention.qk_norm), attention.qkv == "grouped"
        model.attention_scale, model.attention_soft_cap = attention.scale, attention.soft_cap or 0.0
        model.clip = attention.clip or 0.0
        if attention.alibi:
            model.alibi = self._address(np.array(attention.alibi, np.float32))
        table = (abi.CRope * max(len(self.ropes), 1))(*(self._rope(rope) for rope in self.ropes))
        self._kept.append(table)
        model.rope_count, model.ropes = len(self.ropes), table

    def _rope(self, rope: RopeSpec) -> abi.CRope:
        changes = {"longrope": abi.ROPE_LONG, "dynamic": abi.ROPE_DYNAMIC}
        longer = inverse_frequencies(rope, rope.trained_positions + 1)
        return abi.CRope(
            frequencies=self._address(inverse_frequencies(rope, 1)),
            long_frequencies=self._address(longer),
            rotary_dim=rope.rotary_dim,
            pairing=abi.PAIRINGS.index(rope.pairing),
            change=changes.get(rope.kind, abi.ROPE_FIXED),
            trained_positions=rope.trained_positions,
            attention_factor=rope.attention_factor,
            factor=rope.factor,
            theta=rope.theta,
        )

    def _mlps(self) -> None:
        model, experts = self.model, self.spec.experts
        model.mlp = c_mlp(self.spec.mlp)
        if experts is not None:
            model.expert_count, model.top_k, model.normalize_experts = experts.count, experts.top_k, experts.normalize
            model.expert, model.shared = c_mlp(experts.expert), c_mlp(experts.shared)

    def _layers(self) -> None:
        layers = (abi.CLayer * len(self.spec.layers))()
        for index, (layer, into) in enumerate(zip(self.spec.layers, layers, strict=True)):
            into.rope = NO_TABLE if layer.rope is None else self.ropes.index(layer.rope)
            into.window, into.sparse = layer.window or 0, layer.sparse
            for place, role in enumerate(abi.LAYER_MATRICES):
                into.matrices[place] = self._matrix((role, index))
            for place, role in enumerate(abi.LAYER_VECTORS):
                into.vectors[place] = self._vector((role, index))
        self._kept.append(layers)
        self.model.layers = layers

    def _outer(self) -> None:
        for place, role in enumerate(abi.OUTER_MATRICES):
            key: Key = (role, None)
            if role == "head" and key not in self.weights.matrices and self.spec.head.tied:
                key = ("embedding", None)
            self.model.matrices[place] = self._matrix(key)
        for place, role in enumerate(abi.OUTER_VECTORS):
            self.model.vectors[place] = self._vector((role, None))

    def _matrix(self, key: Key) -> abi.CMatrix:
        matrix = self.weights.matrices.get(key)
        if matrix is None:
            return abi.CMatrix()
        if matrix.bias is not None and matrix.bias.size != matrix.count * matrix.rows:
            raise WeightError(f"the {key[0]} weight has {matrix.rows} rows and a bias of {matrix.bias.size}")
        bias = None if matrix.bias is None else self._address(matrix.bias)
        return abi.CMatrix(
            matrix.address,
            matrix.bytes,
            matrix.rows,
            matrix.cols,
            matrix.count,
            bias,
            matrix.kind,
            DTYPES[matrix.dtype],
        )

    def _vector(self, key: Key) -> abi.CVector:
        weight, bias = self.weights.vectors.get(key, (None, None))
        if weight is None:
            return abi.CVector()
        expected = self.spec.weight(key[0])
        if expected is not None and weight.size != int(np.prod(expected.shape)):
            raise WeightError(
                f"the {key[0]} weight has {weight.size} numbers, the model's sizes ask for {expected.shape}"
            )
        if self.spec.norm.offset and key[0] != "sinks":
            weight = weight + np.float32(self.spec.norm.offset)
        return abi.CVector(self._address(weight), None if bias is None else self._address(bias))

    def _address(self, array: NDArray[np.float32]) -> int:
        array = np.ascontiguousarray(array, np.float32)
        self._kept.append(array)
        return int(array.ctypes.data)


def c_mlp(spec: MlpSpec | None) -> abi.CMlp:
    if spec is None:
        return abi.CMlp()
    return abi.CMlp(
        spec.intermediate_size,
        abi.ACTIVATIONS.index(spec.activation),
        abi.GATES.index(spec.gate),
        spec.limit or 0.0,
        spec.sigmoid_scale,
    )
