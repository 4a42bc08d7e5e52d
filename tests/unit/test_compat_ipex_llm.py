"""`ipex.llm.optimize`: a language model in three types, low-bit in every way, by stages, from others' checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowbit
from interop.packed_linears import awq_linear, gptq_linear
from lowbit.compat.faces import intel_extension_for_pytorch as ipex
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import (
    WoqLowpMode,
    WoqWeightDtype,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit_assets import tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 24), generator=torch.Generator().manual_seed(0))
PROMPT = IDS[:1, :12]
SMOOTH = get_smooth_quant_qconfig_mapping(alpha=0.5)
pytestmark = pytest.mark.transformers


@torch.no_grad()
def error_of(model: Any, original: Any, ids: torch.Tensor = IDS) -> float:
    expected = original(ids).logits
    return float((model(ids).logits.float() - expected).norm() / expected.norm())


def summary_of(model: Any, file: Path) -> Path:
    prepared: Any = prepare(ipex.llm.optimize(model, quantization_config=SMOOTH), SMOOTH, example_inputs=IDS[:1])
    with torch.no_grad():
        for part in IDS.split(2):
            prepared(part)
    prepared.save_qconf_summary(qconf_summary=file)
    return file


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 0), (torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str
)
def test_three_types(dtype: torch.dtype, limit: float) -> None:
    original = tiny_model_in_memory("llama")
    made = ipex.llm.optimize(original, dtype=dtype, device="cpu")
    assert made is not original and original.dtype == torch.float32 and made.dtype == dtype
    assert error_of(made, original) <= limit
    assert "the engine" in lowbit.explain(made).generate or made.generate.model_refusal() is None
    output = made.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = type(original).generate(original, PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    same = 6 if dtype == torch.float32 else 1  # a token that rounding turned leads elsewhere
    assert output.shape == (1, 18) and torch.equal(output[:, : 12 + same], expected[:, : 12 + same])
    assert made.generate.why_not is None
    assert ipex.llm.optimize(original, inplace=True) is original
    with pytest.warns(CompatWarning) as said:
        ipex.llm.optimize(original, sample_inputs=(IDS,), deployment_mode=False)
    assert [name for w in said for name in ("sample_inputs", "deployment_mode") if name in str(w.message)]


@torch.no_grad()
def test_trace_graph() -> None:
    """A loop of tokens over what that library had traced, begun with its empty keys and values."""
    made = ipex.llm.optimize(tiny_model_in_memory("llama"), dtype=torch.float32)
    expected = made.generate(PROMPT, max_new_tokens=5, do_sample=False, eos_token_id=None)
    empty = (torch.zeros(1, 0, 0, 1, dtype=torch.long), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    past = tuple((*empty, torch.zeros(2048, 1, dtype=torch.long)) for _ in range(2))
    ids, given, mask = PROMPT, PROMPT, torch.ones_like(PROMPT)
    for step in range(5):
        places = torch.arange(ids.shape[1] - given.shape[1], ids.shape[1])[None]
        logits, past = made.trace_graph(given, mask, places, past)
        given = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, given], 1), torch.ones(1, PROMPT.shape[1] + step + 1, dtype=torch.long)
    assert torch.equal(ids, expected)
    named = made.trace_graph(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT))[0]
    assert torch.equal(named, made(PROMPT).logits)
    assert copy.deepcopy(made).trace_graph.model is not made
    with pytest.raises(LowbitError, match="that it gave back"):
        made.trace_graph(PROMPT, past_key_values=((torch.ones(1, 4, 4, 1),),))
    assert not hasattr(ipex.llm.optimize(tiny_model_in_memory("llama"), deployment_mode=False), "trace_graph")


@pytest.mark.parametrize("kind", list(WoqWeightDtype))
def test_weights_alone(kind: WoqWeightDtype) -> None:
    original = tiny_model_in_memory("llama")
    settings = get_weight_only_quant_qconfig_mapping(weight_dtype=kind, group_size=32)
    made = ipex.llm.optimize(original, quantization_config=settings)
    assert error_of(made, original) < {1: 0.02, 4: 0.1}.get(int(kind), 0.3)
    assert type(made.lm_head).__name__ == "WeightOnlyQuantizedLinear" and type(original.lm_head) is nn.Linear
    assert made.generate.model_refusal() is None
    assert made.generate(PROMPT, max_new_tokens=4, do_sample=False).shape == (1, 16)
    shorter = ipex.llm.optimize(original, dtype=torch.bfloat16, quantization_config=settings)
    weight = shorter.model.layers[0].mlp.up_proj
    assert weight.packed_weight.compute == "bf16" and weight._lowp_mode == WoqLowpMode.NONE
    assert torch.equal(weight.weight.view(torch.uint8), made.model.layers[0].mlp.up_proj.weight.view(torch.uint8))
    half = made.half().to(memory_format=torch.channels_last) if kind == 1 else made
    assert torch.equal(half.lm_head.weight.view(torch.uint8), shorter.lm_head.weight.view(torch.uint8))


def test_an_architecture_without_a_spec_is_quantised_all_the_same() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    torch.manual_seed(0)
    original = transformers.BertForMaskedLM(config).eval()
    made = ipex.llm.optimize(original, quantization_config=get_weight_only_quant_qconfig_mapping())
    packed = {type(module).__name__ for module in made.modules()}
    assert "WeightOnlyQuantizedLinear" in packed and len(made.lowbit_report.layers) >= 12
    assert error_of(made, original) < 0.05
    stage_two = ipex.llm.optimize(original, quantization_config=SMOOTH)
    prepared: Any = prepare(stage_two, SMOOTH, example_inputs=IDS[:1])
    with torch.no_grad():
        prepared(IDS)
    assert error_of(ipex.quantization.convert(prepared), original) < 0.1


def test_two_stages_of_a_language_model(tmp_path: Path) -> None:
    original = tiny_model_in_memory("llama")
    file = summary_of(original, tmp_path / "qconf.json")
    with pytest.warns(CompatWarning, match="each row of activations gets a scale of its own"):
        made = ipex.llm.optimize(original, quantization_config=SMOOTH, qconfig_summary_file=str(file))
    assert error_of(made, original) < 0.04
    rows = {row.path: row for row in made.lowbit_report.layers}
    assert {row.format for row in rows.values()} == {"w8a8"} and {row.kernel for row in rows.values()} == {"core"}
    assert "smoothed; each row" in rows["model.layers.0.self_attn.q_proj"].note
    assert made.generate.model_refusal() is None
    assert made.generate(PROMPT, max_new_tokens=4, num_beams=2, do_sample=False).shape == (1, 16)
    assert (
        ipex.llm.optimize(original, dtype=torch.bfloat16, quantization_config=SMOOTH, qconfig_summary_file=file).dtype
        == torch.bfloat16
    )
    made.save_pretrained(tmp_path / "saved")
    again = lowbit.AutoModelForCausalLM.load_low_bit(tmp_path / "saved")
    assert error_of(again, made) < 0.02


def test_a_range_that_was_edited_in_the_summary_holds(tmp_path: Path) -> None:
    original = tiny_model_in_memory("llama")
    file = summary_of(original, tmp_path / "qconf.json")

    def made() -> Any:
        return ipex.llm.optimize(original, quantization_config=SMOOTH, qconfig_summary_file=str(file))

    before = made()
    assert {row.format for row in lowbit.explain(before).rows} == {"w8a8"}
    fields = json.loads(file.read_text())
    info = fields["model.layers.1.mlp"]["q_op_infos"]["2"]["input_tensor_infos"][0]
    info["scale"], info["zero_point"] = [0.001], [100]
    file.write_text(json.dumps(fields))
    edited, path = made(), "model.layers.1.mlp.down_proj"
    assert edited.get_submodule(path).packed_weight.tensors["input_range"].tolist() == pytest.approx([-0.1, 0.155])
    formats = {row.path: (row.format, row.kernel) for row in lowbit.explain(edited).rows}
    assert formats.pop(path) == ("w8a8_static", "core_fixed") and {name for name, _ in formats.values()} == {"w8a8"}
    with torch.no_grad():
        assert not torch.allclose(edited(IDS).logits, before(IDS).logits, atol=1e-3)
    assert edited.generate(PROMPT, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 16)
    assert "down_proj" in edited.generate.why_not
    # It stays edited where the summary is read and written again.
    prepared: Any = prepare(ipex.llm.optimize(original, quantization_config=SMOOTH), SMOOTH, example_inputs=IDS[:1])
    prepared.load_qconf_summary(qconf_summary=file)
    prepared.save_qconf_summary(qconf_summary=file)
    with torch.no_grad():
        assert torch.allclose(made()(IDS).logits, edited(IDS).logits, atol=1e-4)


def test_the_private_cache_of_calibration_loops_is_left_out() -> None:
    """Scripts hand in an empty cache of that library's own layout while they calibrate."""
    original = tiny_model_in_memory("llama")
    empty = tuple(
        (
            torch.zeros(1, 0, 0, 1, dtype=torch.long),
            torch.zeros(1, 2, 1, 16),
            torch.zeros(1, 2, 1, 16),
            torch.zeros(64, 1).long(),
        )
        for _ in range(2)
    )
    places = torch.arange(24)[None]
    inputs = (IDS[:1], torch.ones(1, 24).long(), places, empty)
    prepared: Any = prepare(original, SMOOTH, example_inputs=inputs)
    with torch.no_grad():
        prepared(IDS[:1], attention_mask=inputs[1], position_ids=places, past_key_values=empty)
    assert error_of(ipex.quantization.convert(prepared), original, IDS[:1]) < 0.1


@pytest.mark.parametrize("write", [gptq_linear, awq_linear], ids=["gptq", "awq"])
def test_checkpoints_that_others_packed(write: Any, tmp_path: Path) -> None:
    original = tiny_model_in_memory("llama")
    state = {}
    for name, tensor in original.state_dict().items():
        if name.endswith("proj.weight"):
            tensors, _ = write(tensor)
            state |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in tensors.items()}
        elif "proj" not in name:
            state[name] = tensor
    method = "gptq" if write is gptq_linear else "awq"
    config = {"quant_method": method, "group_size": 32, "desc_act": False, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    settings = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.BF16)
    given = [(state, config), str(tmp_path), ipex.llm.utils.load_low_precision_checkpoint(tmp_path)]
    logits = []
    for checkpoint in [*given, *([state] if method == "gptq" else [(state, "awq")])]:
        made = ipex.llm.optimize(original, quantization_config=settings, low_precision_checkpoint=checkpoint)
        layer = made.model.layers[0].mlp.down_proj
        assert layer.packed_weight.format.name == "int4_asym_g32" and layer.packed_weight.compute == "bf16"
        logits.append(made(IDS).logits.detach())
        assert made.generate.model_refusal() is None
    assert all(torch.equal(one, logits[0]) for one in logits)
    assert error_of(made, original) < 0.3
    other = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=128)
    with pytest.raises(AssertionError, match="says groups of 32 and the configuration group_size=128"):
        ipex.llm.optimize(original, quantization_config=other, low_precision_checkpoint=(state, config))
    with pytest.raises(
        RecipeError, match=r"q_proj: the checkpoint has groups of 32 inputs, and group_size=128 was said"
    ):
        ipex.llm.optimize(
            original, quantization_config=settings, low_precision_checkpoint=(state, config | {"group_size": 128})
        )


def test_checkpoints_of_eight_bits() -> None:
    original = tiny_model_in_memory("llama")
    tensors, meant = gptq_linear(original.model.layers[0].mlp.down_proj.weight, bits=8)
    state = {f"model.layers.0.mlp.down_proj.{part}": value for part, value in tensors.items()}
    settings = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8, lowp_mode=WoqLowpMode.NONE)
    made = ipex.llm.optimize(original, quantization_config=settings, low_precision_checkpoint=state, inplace=False)
    layer, x = made.model.layers[0].mlp.down_proj, torch.randn(3, 160)
    assert layer.packed_weight.format.name == "int8_asym_g32" and torch.allclose(layer(x), x @ meant.t(), atol=1e-3)
    other = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    with pytest.raises(RecipeError, match="down_proj: the checkpoint has 8 bits, and 4 were said"):
        ipex.llm.optimize(original, quantization_config=other, low_precision_checkpoint=state)


def test_act_order_goes_through_layers_and_not_through_the_engine() -> None:
    original = tiny_model_in_memory("llama")
    tensors, meant = gptq_linear(original.model.layers[0].mlp.down_proj.weight, act_order=True)
    state = {f"model.layers.0.mlp.down_proj.{part}": value for part, value in tensors.items()}
    settings = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4)
    made = ipex.llm.optimize(original, quantization_config=settings, low_precision_checkpoint=state)
    layer = made.model.layers[0].mlp.down_proj
    x = torch.randn(3, 160)
    assert torch.allclose(layer(x), x @ meant.t(), atol=1e-3)
    assert "in another order" in made.generate.model_refusal()
    assert made.generate(PROMPT, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_low_bit_models_are_taken_as_they_are() -> None:
    from lowbit import RtnConfig

    original = tiny_model_in_memory("llama")
    ready = lowbit.optimize_model(tiny_model_in_memory("llama"), recipe=RtnConfig(bits=4).to_recipe())
    made = ipex.optimize_transformers(ready, dtype=torch.bfloat16, inplace=True)
    assert made is ready and made.dtype == torch.bfloat16 and made.generate.model_refusal() is None
    assert ipex.optimize_transformers(ready, dtype=torch.float16, inplace=True, woq=True).dtype == torch.float16
    with pytest.raises(AssertionError, match=r"woq=True\) takes a model whose weights are packed"):
        ipex.optimize_transformers(original, woq=True)
    by_config = ipex.llm.optimize(original, quantization_config=RtnConfig(bits=4))
    assert error_of(by_config, original) < 0.3 and by_config.model.layers[0].mlp.up_proj.packed_weight.format.bits == 4
    with pytest.raises(AssertionError, match="a low-bit model and a quantization_config"):
        ipex.llm.optimize(ready, quantization_config=SMOOTH)
    assert ipex.transformers.optimize.optimize_transformers is ipex.optimize_transformers


def test_the_seconds_of_each_token() -> None:
    made = ipex.llm.optimize(tiny_model_in_memory("llama"))
    plain = made.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for beams in (1, 2):
        output, seconds = made.generate(
            PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, token_latency=True
        )
        assert output.shape == plain.shape and len(seconds) == 5 and all(second > 0 for second in seconds)
    made.config.token_latency = True
    output, seconds = made.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(output, plain) and len(seconds) == 5
    made.config.token_latency = False
    assert torch.equal(made.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False), plain)


def test_what_contradicts_itself(tmp_path: Path) -> None:
    original = tiny_model_in_memory("llama")
    weights = get_weight_only_quant_qconfig_mapping()
    file = summary_of(original, tmp_path / "qconf.json")
    for given, words in (
        ({"quantization_config": weights, "qconfig_summary_file": file}, "holds ranges of activations"),
        ({"quantization_config": SMOOTH, "low_precision_checkpoint": {}}, "is not for weights alone"),
        ({"qconfig_summary_file": file}, "needs the quantization_config"),
        ({"low_precision_checkpoint": {}}, "needs the quantization_config"),
        ({"quantization_config": {"bits": 4}}, "not a dict"),
        ({"cache_weight_for_large_batch": True}, "is for bf16"),
        ({"quantization_config": weights, "low_precision_checkpoint": 3}, "not a int"),
    ):
        with pytest.raises(AssertionError, match=words):
            ipex.llm.optimize(original, **given)
    with pytest.raises(RecipeError, match=r"ipex\.optimize\(model, optimizer=optimizer\)"):
        ipex.llm.optimize(original, torch.optim.SGD(original.parameters(), 0.1))
    with pytest.raises(RecipeError, match=r"not in torch\.int8"):
        ipex.llm.optimize(original, dtype=torch.int8)
    with pytest.raises(RecipeError, match="takes a torch module, not a str"):
        ipex.llm.optimize("model")
    with pytest.raises(CheckpointError, match=r"summary is of another model: .*layers\.2"):
        ipex.llm.optimize(
            tiny_model_in_memory("llama", num_hidden_layers=3), quantization_config=SMOOTH, qconfig_summary_file=file
        )
    with pytest.raises(CheckpointError, match="there is no summary"):
        ipex.llm.optimize(original, quantization_config=SMOOTH, qconfig_summary_file=tmp_path / "absent.json")
    with pytest.warns(CompatWarning, match="cache_weight_for_large_batch has no effect"):
        ipex.llm.optimize(original, dtype=torch.bfloat16, cache_weight_for_large_batch=True)


def test_names_of_several_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="one process runs on all its cores"):
        ipex.llm.utils.load_low_precision_checkpoint(tmp_path, 0, 2)
    with pytest.raises(LowbitError, match="shard_low_precision_checkpoint"):
        _ = ipex.llm.utils.shard_low_precision_checkpoint
