"""A language model of one head of attention as a graph of OpenVINO, small enough to be written by hand.

    x = embedding[token] + position, k = v = mix x,  y = softmax(x k over the past) v,  logits = head y

Its state, inputs and names are those of every exported model, so what reads, forgets, copies and adapts exported models can be held
against the same sum in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.openvino.library import ops, ov, states

VOCABULARY, WIDTH = 288, 8
MODULE = "model.mix"


@dataclass(frozen=True)
class Toy:
    """The three matrices of the model."""

    embedding: np.ndarray
    mix: np.ndarray
    head: np.ndarray

    @classmethod
    def make(cls, seed: int = 0) -> Toy:
        draw = np.random.default_rng(seed).standard_normal
        shapes = ((VOCABULARY, WIDTH), (WIDTH, WIDTH), (VOCABULARY, WIDTH))
        return cls(*(draw(shape).astype(np.float32) for shape in shapes))

    def logits(self, tokens: Any) -> np.ndarray:
        """What the graph gives after each token."""
        x = self.embedding[np.asarray(tokens)] + np.arange(len(tokens), dtype=np.float32)[:, None] / 4
        keys = x @ self.mix.T
        scores = np.where(np.tri(len(tokens)), x @ keys.T, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ keys @ self.head.T

    def graph(self) -> Any:
        whole = [-1, -1]
        tokens, mask, positions = (_input(name, whole) for name in ("input_ids", "attention_mask", "position_ids"))
        order = _input("beam_idx", [-1], ov.Type.i32)
        place = ops.multiply(ops.unsqueeze(ops.convert(positions, "f32"), _whole(2)), _number(0.25))
        x = ops.add(ops.gather(_number(self.embedding), tokens, _whole(0)), place)
        mixed = ops.matmul(x, _number(self.mix), False, True)
        mixed.set_friendly_name(MODULE)
        rows = ops.gather(ops.shape_of(tokens), _whole([0]), _whole(0))
        empty = ops.broadcast(_number(0.0), ops.concat([rows, _whole([1, 0, WIDTH])], 0))
        held = states.read_value(empty, "past.0", ov.Type.f32, ov.PartialShape([-1, 1, -1, WIDTH]))
        keys = ops.concat([ops.gather(held, order, _whole(0)), ops.unsqueeze(mixed, _whole(1))], -2)
        seen = ops.select(_visible(tokens, mask), _number(0.0), _number(-65504.0))
        attended = ops.scaled_dot_product_attention(
            ops.unsqueeze(x, _whole(1)), keys, keys, seen, _number(1.0), causal=False
        )
        attended = ops.squeeze(attended, _whole(1))
        logits = ops.matmul(attended, _number(self.head), False, True)
        logits.output(0).get_tensor().set_names({"logits"})
        return ov.Model([ops.result(logits)], [states.assign(keys, "past.0")], [tokens, mask, positions, order], "toy")

    def save(self, folder: Path, **config: Any) -> Path:
        """A folder as an export leaves it, without a tokenizer."""
        import json

        folder.mkdir(parents=True, exist_ok=True)
        ov.save_model(self.graph(), folder / "openvino_model.xml", compress_to_fp16=False)
        fields = {
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1, "eos_token_id": 2,
            "num_attention_heads": 1, "intermediate_size": WIDTH, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        } | config  # fmt: skip
        (folder / "config.json").write_text(json.dumps(fields))
        return folder


def _visible(tokens: Any, mask: Any) -> Any:
    """[rows, 1, new, all]: no token sees what follows it, nor padding."""
    everything, new = (ops.gather(ops.shape_of(port), _whole([1]), _whole(0)) for port in (mask, tokens))
    end = ops.squeeze(everything)
    keys = ops.range(_whole(0), end, _whole(1), "i64")
    queries = ops.range(ops.squeeze(ops.subtract(everything, new)), end, _whole(1), "i64")
    before = ops.less_equal(ops.unsqueeze(keys, _whole(0)), ops.unsqueeze(queries, _whole(1)))
    return ops.logical_and(
        ops.unsqueeze(before, _whole([0, 1])), ops.unsqueeze(ops.convert(mask, "boolean"), _whole([1, 2]))
    )


def _input(name: str, shape: list[int], kind: Any = ov.Type.i64) -> Any:
    made = ops.parameter(shape, kind, name=name)
    made.output(0).get_tensor().set_names({name})
    return made


def _whole(value: Any) -> Any:
    return ops.constant(np.asarray(value, np.int64))


def _number(value: Any) -> Any:
    return ops.constant(np.asarray(value, np.float32))
