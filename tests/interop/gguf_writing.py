"""Writes small GGUF files the way llama.cpp's converters do, so that reading has something real to undo.

Names come from the `gguf` package's own map. The changes of layout are written out here a second time, forwards, as
the converters state them; the reader's are row orders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

QUANTISABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16", "F32")

_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def rotary_pairs(weight: Array, heads: int) -> Array:
    """llama.cpp's permutation of query and key rows: the halves of a head become pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def by_role(weight: Array, heads: int) -> Array:
    """BLOOM's and GPT-NeoX's q, k, v of each head become all q, all k, all v."""
    parts = weight.reshape(heads, 3, -1, *weight.shape[1:])
    return np.concatenate([parts[:, role].reshape(-1, *weight.shape[1:]) for role in range(3)])


def by_group(weight: Array, heads: int, groups: int) -> Array:
    """Falcon's groups of queries with one key and value become all q, all k, all v."""
    parts = weight.reshape(groups, heads // groups + 2, -1, *weight.shape[1:])
    roles = (parts[:, :-2], parts[:, -2], parts[:, -1])
    return np.concatenate([role.reshape(-1, *weight.shape[1:]) for role in roles])


def convert_weights(architecture: str, config: Any, weights: Mapping[str, Array]) -> dict[str, Array]:
    """A Hugging Face checkpoint's weights under GGUF's names and in its layout."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], config.num_hidden_layers)
    changed = {name: _change(architecture, config, name, weight) for name, weight in weights.items()}
    converted: dict[str, Array] = {}
    for name, weight in _stack(changed).items():
        if architecture == "bloom":
            name = name.removeprefix("transformer.")  # as its converter does
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, f"gguf knows no name for {name}"
        converted[mapped] = weight
    return converted


def _change(architecture: str, config: Any, name: str, weight: Array) -> Array:
    heads = config.num_attention_heads
    if architecture in ("llama", "smollm3", "granite") and re.search(r"\.[qk]_proj\.", name):
        return rotary_pairs(weight, heads if "q_proj" in name else config.num_key_value_heads)
    if architecture in ("bloom", "gptneox") and "query_key_value" in name:
        return by_role(weight, heads)
    if architecture == "falcon" and "query_key_value" in name:
        return by_group(weight, heads, config.num_kv_heads if config.new_decoder_architecture else 1)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.float32(1)
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(weight.T)
    return weight.reshape(-1) if "shared_expert_gate" in name else weight


def _stack(weights: Mapping[str, Array]) -> dict[str, Array]:
    """One tensor for all experts of a kind (and for StableLM's norms per head)."""
    stacks: dict[str, dict[int, Array]] = {}
    single: dict[str, Array] = {}
    for name, weight in weights.items():
        part = re.fullmatch(r"(.+\.(?:experts|norms))\.(\d+)\.(.+)", name)
        if part is None:
            single[name] = weight
        else:
            merged = f"{part[1]}.{part[3]}".replace(".norms", "").replace("block_sparse_moe", "feed_forward")
            merged = merged.replace("model.layers", "layers") if "feed_forward" in merged else merged
            stacks.setdefault(merged, {})[int(part[2])] = weight
    return single | {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in stacks.items()}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Array],
    type_name: str = "F32",
    blocks: Mapping[str, tuple[str, Array]] | None = None,
) -> Path:
    """A GGUF file. Keys of no general section get the architecture's prefix; matrices are stored as `type_name`, but those
    in `blocks` as the type and the bytes [rows, bytes] given there."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{key}"
        _add_value(writer, full, value)
    kind = gguf.GGMLQuantizationType[type_name]
    elements = gguf.GGML_QUANT_SIZES[kind][0]
    for name, (type_of, data) in (blocks or {}).items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_of])
    for name, tensor in tensors.items():
        if name in (blocks or {}):
            continue
        values = np.ascontiguousarray(tensor, np.float32)
        stored = kind if values.ndim > 1 and values.shape[-1] % elements == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def byte_level_vocabulary(size: int = 300) -> dict[str, Any]:
    """The tokenizer part of the metadata: 256 bytes, a few merges, the rest control tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    tokens = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "Ġ Ġ", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [1] * len(tokens)
    control = ["<s>", "</s>", "<|user|>"]
    tokens += control
    types += [3] * len(control)
    tokens += ["<tool>"]
    types += [4]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types += [5] * (size - len(types))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }
