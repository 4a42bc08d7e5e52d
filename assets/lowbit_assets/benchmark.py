"""The benchmark model, "the 1.1 B": a random Llama of the size of the small models that people run.

Speed and memory do not depend on what the weights say, so they are drawn: w ~ N(0, 0.02^2), norms one, each tensor
from a seed made of its name, one tensor in memory at a time. The head is not tied, the tokenizer is SmolLM2's.
"""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.interop.safetensors_stream import write_safetensors
from lowbit_assets.cache import cached_folder, files_digest, seed_of
from lowbit_assets.reference import WEIGHTS, reference_model

VERSION = 1  # raise it when the content of the folder changes
SEED = 0
STD = 0.02
SHARDS = 4
THREADS = 2  # numpy draws outside the interpreter lock
PIECE = 1 << 18  # elements drawn at once: 1 MB of float32 stays in a core's cache
BFLOAT16_ONE = 0x3F80


Plan = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """What tells one benchmark model from another."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 49152  # SmolLM2's


SIZES = {
    "1.1b": Size(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632),
    "13m": Size(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=352),  # to try a benchmark script
}


def benchmark_model(size: str = "1.1b", cache: Path | None = None) -> Path:
    """A Hugging Face folder with the benchmark model of that size, built in the cache at the first call."""
    if size not in SIZES:
        raise ValueError(f"no benchmark model has size {size!r}; there are {', '.join(SIZES)}")
    tokenizer = reference_model("plain", cache)
    tokens = files_digest(tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json")
    versions: dict[str, object] = {"version": VERSION, "seed": SEED, "size": repr(SIZES[size]), "tokens": tokens}
    return cached_folder(
        f"benchmark_{size}", versions, lambda folder: write_benchmark(SIZES[size], tokenizer, folder), cache
    )


def config_of(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": STD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensor_plan(size: Size) -> Plan:
    """All tensors of the model, [out, in] each, in the order in which the model uses them."""
    kv = size.hidden // size.heads * size.kv_heads
    layer: Plan = {
        "input_layernorm": (size.hidden,),
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (kv, size.hidden),
        "self_attn.v_proj": (kv, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "post_attention_layernorm": (size.hidden,),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
    }
    plan: Plan = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for index in range(size.layers):
        plan |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    return plan | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def split_plan(plan: Plan) -> list[Plan]:
    """The plan in consecutive shards of about one size; a tensor goes where its middle lies."""
    total = sum(map(math.prod, plan.values()))
    shards: list[Plan] = [{} for _ in range(SHARDS)]
    end = 0
    for name, shape in plan.items():
        begin, end = end, end + math.prod(shape)
        shards[(begin + end) * SHARDS // (2 * total)][name] = shape
    return shards


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def draw(name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """The bfloat16 bits of one tensor."""
    bits = np.full(math.prod(shape), BFLOAT16_ONE, np.uint16)
    if len(shape) > 1:  # all vectors of a Llama are norms
        generator = np.random.default_rng(seed_of(SEED, name))
        for start in range(0, bits.size, PIECE):
            piece = bits[start : start + PIECE]
            piece[:] = to_bfloat16(generator.standard_normal(piece.size, np.float32) * np.float32(STD))
    return bits.reshape(shape)


def write_shard(path: Path, shard: Plan) -> int:
    """Write one file and return how many bytes its tensors have."""
    layout = {name: ("BF16", shape) for name, shape in shard.items()}
    write_safetensors(path, layout, (draw(name, shape) for name, shape in shard.items()))
    return sum(map(math.prod, shard.values())) * np.dtype(np.uint16).itemsize


def write_benchmark(size: Size, tokenizer: Path, folder: Path) -> None:
    shards = split_plan(tensor_plan(size))
    names = [f"model-{index:05d}-of-{SHARDS:05d}.safetensors" for index in range(1, SHARDS + 1)]
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(size), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(write_shard, (folder / name for name in names), shards))
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
