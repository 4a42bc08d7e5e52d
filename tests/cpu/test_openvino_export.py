"""Folders for OpenVINO: every source's codes arrive unrounded, the graph runs fused, and its own pipeline reads it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lowbit
from cpu.gguf_rows import random_rows
from interop.gguf_writing import byte_level_vocabulary, write_gguf
from interop.packed_linears import awq_linear, gptq_linear
from lowbit.errors import LowbitError, RecipeError
from lowbit.interop.gguf import open_gguf
from lowbit.models.families import spec_from_config
from lowbit.openvino import write_decoder
from lowbit.openvino.constants import hold
from lowbit.openvino.export import recipe_by_size, weight_count
from lowbit.openvino.library import core
from lowbit.openvino.opening import EXACT
from lowbit.openvino.recipes import beyond_ratio, export_recipe
from lowbit.openvino.sources import open_source
from lowbit.packing import PackedTensor
from lowbit.runtime import load
from lowbit.runtime.files import read_spec, read_weights
from lowbit.runtime.loading import load_files
from lowbit_assets import tiny_model, tiny_model_in_memory

IDS = list(range(5, 40))
PLAIN = {"cache": "fp32", "compute": "fp32"}


def graph(folder: Path) -> Any:
    return core().read_model(folder / "openvino_model.xml")


def logits(folder: Path, ids: list[int] = IDS) -> np.ndarray:
    request = core().compile_model(graph(folder), "CPU", EXACT).create_infer_request()
    row = np.array([ids], np.int64)
    places, beams = np.arange(len(ids))[None], np.zeros(1, np.int32)
    given = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": places, "beam_idx": beams}
    return request.infer(given)["logits"][0].copy()


def kinds(folder: Path) -> Counter[str]:
    """What the CPU plugin runs, and the type of the weights that its products read."""
    found: Counter[str] = Counter()
    for node in core().compile_model(graph(folder), "CPU", {}).get_runtime_model().get_ordered_ops():
        kind = node.get_rt_info()["layerType"].value
        if kind in ("FullyConnected", "GatherMatmul"):
            kind += f" {node.input_value(1).get_element_type().to_string()}"
        found[kind] += 1
    return found


def held_codes(source: Any) -> dict[str, bytes]:
    """The codes of every packed weight of a source, as OpenVINO is to have them."""
    files = open_source(source)
    spec = read_spec(files)
    found = {}
    for loaded in read_weights(files, spec):
        if isinstance(loaded.weight, PackedTensor):
            described = spec.weight(loaded.role)
            assert described is not None
            found[described.name.format(layer=loaded.layer)] = hold(loaded.weight).codes.array.tobytes()
    return found


def written_codes(written: Any, names: list[str]) -> dict[str, bytes]:
    """The codes of these weights in a folder, or in a graph."""
    model = graph(written) if isinstance(written, Path) else written
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    return {name: np.ascontiguousarray(constants[name].data).tobytes() for name in names}


# --- sources ---------------------------------------------------------------------------------------------------------


def own_folder(folder: Path) -> Path:
    model = lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="nf4", kernel="reference")
    model.save_low_bit(folder / "nf4")
    return folder / "nf4"


def compressed_folder(folder: Path) -> Path:
    model = lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="int4_asym_g32", kernel="reference")
    model.save_low_bit(folder / "ct")
    return folder / "ct"


def ready_made(folder: Path, method: str, write: Any, **fields: Any) -> Path:
    model = tiny_model_in_memory("llama")
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            tensors, _ = write(tensor)
            state |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in tensors.items()}
        else:
            state[name] = tensor.contiguous()
    packing = {"quant_method": method, "bits": 4, "group_size": 32, **fields}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"quantization_config": packing}))
    save_file(state, folder / "model.safetensors")
    return folder


def gptq_folder(folder: Path) -> Path:
    return ready_made(folder / "gptq", "gptq", gptq_linear, desc_act=False)


def awq_folder(folder: Path) -> Path:
    return ready_made(folder / "awq", "awq", awq_linear, version="gemm", zero_point=True)


def gguf_file(folder: Path) -> Path:
    """One of every type of block that has a place of its own."""
    width, matrices = 256, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = ["Q4_0", "Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_1", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "MXFP4"]
    names = [f"blk.{layer}.{matrix}.weight" for layer in range(2) for matrix in matrices] + ["token_embd.weight"]
    rows = {name: 300 if name == "token_embd.weight" else width for name in names}
    blocks = {}
    for number, name in enumerate(names):
        kind = types[number % len(types)]
        blocks[name] = (kind, random_rows(kind, rows[name], width))
    norms = ["output_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in range(2) for n in ("attn", "ffn"))]
    tensors = {name: np.ones(width, np.float32) for name in norms} | {n: np.empty((rows[n], width)) for n in names}
    sizes = {"block_count": 2, "embedding_length": width, "feed_forward_length": width, "context_length": 64}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    return write_gguf(folder / "all.gguf", "llama", sizes | heads | byte_level_vocabulary(), tensors, blocks=blocks)


@pytest.mark.parametrize("make", [own_folder, compressed_folder, gptq_folder, awq_folder, gguf_file])
def test_codes_arrive_as_they_are_and_logits_with_them(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path)
    write_decoder(source, tmp_path / "out", tokenizer=False)
    expected = held_codes(source)
    assert len(expected) >= 14
    assert written_codes(tmp_path / "out", list(expected)) == expected
    ours = load_files(open_source(source), **PLAIN).logits(IDS)
    assert np.abs(logits(tmp_path / "out") - ours).max() <= 1e-4 * max(np.abs(ours).max(), 1)


def test_inputs_in_another_order(tmp_path: Path) -> None:
    """GPTQ by activation: the product reads its inputs in the order of the codes."""
    source = ready_made(tmp_path / "gptq", "gptq", lambda w: gptq_linear(w, act_order=True), desc_act=True)
    write_decoder(source, tmp_path / "out", tokenizer=False)
    model = tiny_model_in_memory("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = gptq_linear(parameter.data, act_order=True)[1]
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(logits(tmp_path / "out") - expected).max() <= 1e-4


def test_a_model_in_memory_and_one_rounded_on_the_way(tmp_path: Path) -> None:
    plain, recipe = tiny_model("llama", tmp_path / "plain"), export_recipe("int4_g32")
    written = write_decoder(plain, tmp_path / "a", recipe, tokenizer=False)
    assert written.report.formats() == {"int4_g32": 14, "int8_channel": 2}
    expected = load(plain, recipe, **PLAIN).logits(IDS)
    assert np.abs(logits(tmp_path / "a") - expected).max() <= 1e-4
    model = lowbit.optimize_model(tiny_model_in_memory("llama"), recipe=recipe)
    write_decoder(model, tmp_path / "b", tokenizer=False)
    assert np.array_equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


# --- how it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "type"), [("int4_g32", "i4"), ("int4_asym_g32", "u4"), ("nf4", "nf4"), ("int3_g32", "i4")]
)
def test_the_plugin_keeps_weights_packed_and_attention_whole(format: str, type: str, tmp_path: Path) -> None:
    write_decoder(tiny_model("llama", tmp_path / "plain"), tmp_path / "out", format, tokenizer=False)
    found = kinds(tmp_path / "out")
    assert found[f"FullyConnected {type}"] == 14 and found["FullyConnected i8"] == 1
    assert found["ScaledDotProductAttention"] == 2 and found["RMS"] == 5 and found["RoPE"] == 4
    assert not {"MatMul", "Softmax", "Concatenation_kv"} & set(found)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    ("format", "type"), [("int4_g32", "i4"), ("int4_asym_g32", "u4"), ("int8", "i8"), (None, "bf16")]
)
def test_only_the_chosen_experts_are_computed(family: str, format: str | None, type: str, tmp_path: Path) -> None:
    plain = tiny_model(family, tmp_path / "plain")
    written = write_decoder(plain, tmp_path / "out", format, tokenizer=False)
    assert kinds(tmp_path / "out")[f"GatherMatmul {type}"] == 3 * len(written.spec.layers)
    expected = load(plain, format and export_recipe(format), **PLAIN).logits(IDS)
    assert np.abs(logits(tmp_path / "out") - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "format"),
    [("gpt2", "int4_g64_dq"), ("bloom", "mxfp4"), ("gemma2", "int8"), ("mixtral", "nvfp4"), ("mixtral", "int4_fine")],
)
def test_formats_of_every_kind_of_weight(family: str, format: str, tmp_path: Path) -> None:
    plain = tiny_model(family, tmp_path / "plain")
    written = write_decoder(plain, tmp_path / "out", format, tokenizer=False)
    if format.endswith("_dq"):  # the core does not round to it
        model = lowbit.optimize_model(tiny_model_in_memory(family), recipe=export_recipe(format), kernel="reference")
        with torch.no_grad():
            expected = model(torch.tensor([IDS])).logits[0].numpy()
    else:
        expected = load(plain, written.recipe, **PLAIN).logits(IDS)  # with groups that divide its weights
    assert np.abs(logits(tmp_path / "out") - expected).max() <= 2e-4 * max(np.abs(expected).max(), 1)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_ratio_leaves_8_bits_where_4_hurt_most(tmp_path: Path) -> None:
    plain = tiny_model("llama", tmp_path / "plain")
    written = write_decoder(plain, tmp_path / "out", "int4_g32", ratio=0.5, tokenizer=False)
    rows = {row.path: row for row in written.report.layers if row.role == "linear"}
    counts = {path: int(np.prod(row.shape)) for path, row in rows.items()}
    share = sum(counts[path] for path, row in rows.items() if row.format == "int4_g32") / sum(counts.values())
    assert 0.35 <= share <= 0.6 and {row.format for row in rows.values()} == {"int4_g32", "int8_channel"}
    assert beyond_ratio({"a": 10, "b": 10}, {"a": (2.0, 0.1), "b": (1.0, 0.1)}, 0.5) == {"a"}


def test_large_models_become_8_bits() -> None:
    wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "vocab_size": 32000}
    config = {"model_type": "llama", "num_hidden_layers": 22, "num_key_value_heads": 4, **wide}
    large, small = spec_from_config(config), spec_from_config(config | {"num_hidden_layers": 10})
    assert weight_count(large) == 1_100_048_384 and weight_count(small) < 1e9
    recipe = recipe_by_size(large)
    assert recipe is not None and recipe.linear.name == "int8_channel" and recipe_by_size(small) is None


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    plain = tiny_model("llama", tmp_path / "plain")
    with pytest.raises(RecipeError, match="share of weights"):
        write_decoder(plain, tmp_path / "out", "int8", ratio=0.5)
    for rounder, ratio, said in (
        ("hqq", None, "in torch"),
        ("clip_rtn", 0.5, "in torch"),
        ("gptq", 0.5, "activations"),
    ):
        recipe = export_recipe("int4_g32").replace(rounder=rounder)
        with pytest.raises(RecipeError, match=f"{rounder} .*{said}.* 'lowbit quantize' first"):
            write_decoder(plain, tmp_path / "out", recipe, ratio=ratio)
    with pytest.raises(LowbitError, match="already"):
        write_decoder(own_folder(tmp_path), tmp_path / "out", "int4")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(LowbitError, match="not a model"):
        write_decoder(plain, tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_openvinos_own_pipeline_reads_the_folder(tmp_path: Path) -> None:
    import openvino_genai

    plain = tiny_model("llama", tmp_path / "plain", vocab_size=300)
    open_gguf(gguf_file(tmp_path)).write_tokenizer(plain)
    written = write_decoder(plain, tmp_path / "out", "int4_g32")
    assert not written.notes
    config = openvino_genai.GenerationConfig(
        max_new_tokens=12, do_sample=False, apply_chat_template=False, ignore_eos=True
    )
    ours = load(plain, export_recipe("int4_g32"), **PLAIN)
    prompt = "hello world, it is 12 o'clock"
    expected = ours.generate(prompt, max_new_tokens=12, do_sample=False, stop_tokens=()).text
    for attention in ("SDPA", "PA"):
        pipeline = openvino_genai.LLMPipeline(tmp_path / "out", "CPU", ATTENTION_BACKEND=attention, **EXACT)
        assert pipeline.generate(prompt, config) == expected
