"""Which saved recipes vLLM and SGLang can serve, by the conditions of their readers.

Neither runs here. The conditions are theirs, read in vLLM's `model_executor/layers/quantization/compressed_tensors/`
(`compressed_tensors.py` at be696453, `schemes/compressed_tensors_wNa16.py`, `utils.py`, and `../utils/marlin_utils.py`) and
in SGLang's `srt/layers/quantization/compressed_tensors/compressed_tensors.py` at b5535699, and said again in our words:

    a scheme        static packed integers without activations, per group or per channel, of 4 or 8 bits
    group sizes     32, 64, 128, or a whole row
    zero points     vLLM: with 4 bits; SGLang: none
    fused layers    q, k, v and gate, up become one layer each, found by its class before the names of its parts: all parts
                    have the scheme that holds for the class, or all are left out
    others          embedding and head are no linears there: dense
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import lowbit
from lowbit.cli import quantize as command
from lowbit.schemes import scheme_of
from unit.checkpoint_cases import make

pytestmark = pytest.mark.transformers
WIDE = {"hidden_size": 128, "intermediate_size": 256}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LAYER = "model.layers.0"
PARENTS = {"qkv_proj": f"{LAYER}.self_attn", "gate_up_proj": f"{LAYER}.mlp"}


def scheme_refusal(weights: dict[str, Any], zero_points: tuple[int, ...]) -> str | None:
    """Why a reader has no kernel for a scheme; `zero_points` are the widths that may have them."""
    if weights["type"] != "int" or weights["dynamic"] or weights["strategy"] not in ("group", "channel"):
        return "no static integers in groups or channels"
    if weights["num_bits"] not in (4, 8):
        return f"{weights['num_bits']} bits"
    if weights["group_size"] not in (None, 32, 64, 128) or (weights["group_size"] is None) != (
        weights["strategy"] == "channel"
    ):
        return f"groups of {weights['group_size']}"
    if not weights["symmetric"] and weights["num_bits"] not in zero_points:
        return "zero points"
    return None


def refusal(folder: Path, zero_points: tuple[int, ...]) -> str | None:
    """Why a saved folder cannot be served, or None."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if (config["quant_method"], config.get("format")) != ("compressed-tensors", "pack-quantized"):
        return "another form"
    groups = config["config_groups"].values()
    if any(group["input_activations"] for group in groups):
        return "activations"
    for group in groups:
        reason = scheme_refusal(group["weights"], zero_points)
        if reason:
            return reason
    for fused, parts in FUSED.items():
        paths = [f"{PARENTS[fused]}.{part}" for part in parts]
        left_out = {path in config["ignore"] for path in paths}
        of_class = scheme_of("a.layer.of.that.class", ("Linear",), config)
        if len(left_out) > 1 or (
            left_out == {False} and any(scheme_of(p, ("Linear",), config) != of_class for p in paths)
        ):
            return f"parts of {fused} differ"
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    dense = [name for name in ("lm_head", "model.embed_tokens") if f"{name}.weight" not in names]
    return f"packed {dense[0]}" if dense else None


VLLM, SGLANG = (4,), ()
# recipe: why vLLM refuses, why SGLang refuses (None: it serves the folder)
TABLE = [
    (lowbit.Recipe(lowbit.format_from_name("int4_g64")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int4_g128")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int4_g32")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int4_channel")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int8")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int8_channel")), None, None),
    (lowbit.Recipe(lowbit.format_from_name("int4_asym_g64")), None, "zero points"),
    (lowbit.Recipe(lowbit.format_from_name("int4_asym_g128")), None, "zero points"),
    (lowbit.Recipe(lowbit.format_from_name("int8_asym")), "zero points", "zero points"),
    (lowbit.Recipe(lowbit.format_from_name("int6_g64")), "6 bits", "6 bits"),
    (lowbit.Recipe(lowbit.format_from_name("int4_g16")), "groups of 16", "groups of 16"),
    (lowbit.Recipe(lowbit.format_from_name("nf4")), "another form", "another form"),
    ("int4", "6 bits", "6 bits"),
    ("int4_g64", "packed lm_head", "packed lm_head"),
    (
        lowbit.Recipe(
            lowbit.format_from_name("int4_g64"), overrides=((r"v_proj$", lowbit.format_from_name("int8_g64")),)
        ),
        "parts of qkv_proj differ",
        "parts of qkv_proj differ",
    ),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("served") / "dense", **WIDE)


def saved(dense: Path, folder: Path, recipe: lowbit.Recipe | str) -> Path:
    lowbit.AutoModelForCausalLM.from_pretrained(dense, recipe=recipe).save_low_bit(folder)
    return folder


@pytest.mark.parametrize(
    ("recipe", "vllm", "sglang"),
    TABLE,
    ids=lambda v: v if isinstance(v, str) else getattr(getattr(v, "linear", v), "name", "served"),
)
def test_what_vllm_and_sglang_serve(
    dense: Path, tmp_path: Path, recipe: lowbit.Recipe | str, vllm: str | None, sglang: str | None
) -> None:
    folder = saved(dense, tmp_path / "low", recipe)
    assert refusal(folder, VLLM) == vllm
    assert refusal(folder, SGLANG) == sglang


@pytest.mark.parametrize("name", ["int4_g64", "int8", "int4_asym_g64", "int4_channel"])
def test_tensors_have_the_shapes_that_their_parameters_have(dense: Path, tmp_path: Path, name: str) -> None:
    format = lowbit.format_from_name(name)
    folder = saved(dense, tmp_path / "low", lowbit.Recipe(format))
    rows, inputs = 256, 128
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        found = {
            part: opened.get_tensor(f"{LAYER}.mlp.up_proj.{part}")
            for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        zeros = opened.get_tensor(f"{LAYER}.mlp.up_proj.weight_zero_point") if not format.symmetric else None
    per_word, groups = 32 // format.bits, 1 if format.group_size < 0 else inputs // format.group_size
    assert tuple(found["weight_packed"].shape) == (rows, inputs // per_word)
    assert tuple(found["weight_scale"].shape) == (rows, groups) and found["weight_shape"].tolist() == [rows, inputs]
    assert zeros is None or tuple(zeros.shape) == (rows // per_word, groups)


def test_the_line_that_the_help_gives_for_them(dense: Path, tmp_path: Path) -> None:
    line = next(line for line in command.EXAMPLES.splitlines() if "vLLM" in line)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = line.split("  ")[1].split()[2:]
    folder = saved(dense, tmp_path / "low", command.recipe_from(parser.parse_args(words)))
    assert refusal(folder, VLLM) is None and refusal(folder, SGLANG) is None
