"""Quantise while loading -> save -> load: the same logits, in every family and form, with lowbit and without it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from unit.checkpoint_cases import EVEN, EVEN_EXPERTS, IDS, logits, make

pytestmark = pytest.mark.transformers
Auto = lowbit.AutoModelForCausalLM

# Two symmetric formats: whatever the default recipe is, this is what compressed-tensors says of a mixture.
MIXED = lowbit.Recipe(
    lowbit.format_from_name("int4"),
    head=lowbit.format_from_name("int5_g32"),
    embedding=lowbit.format_from_name("int5_g32"),
    name="mixed",
)

# Reads a folder as somebody does who has never heard of lowbit.
WITHOUT_LOWBIT = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
for folder in sys.argv[2:]:
    ids, expected = torch.load(folder + "/../expected.pt")
    with torch.no_grad():
        print(float((transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits - expected).abs().max()))
assert "lowbit" not in sys.modules
"""


def asked(low_bit: str | lowbit.Recipe) -> dict:
    return {"load_in_low_bit": low_bit} if isinstance(low_bit, str) else {"recipe": low_bit}


def quantization_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("family", "overrides", "low_bit", "method"),
    [
        ("llama", EVEN, MIXED, "compressed-tensors"),
        ("llama", {**EVEN, "tie_word_embeddings": True}, MIXED, "compressed-tensors"),
        ("llama", EVEN, "asym_int5", "compressed-tensors"),
        ("llama", EVEN, "int4", None),
        ("llama", {}, "int4", "lowbit"),
        ("llama", EVEN, "int4_fine_g32", "lowbit"),
        ("llama", {"tie_word_embeddings": True}, "nf4_g64_dq", "lowbit"),
        ("llama", {"hidden_size": 256, "intermediate_size": 256}, "q4_k", "lowbit"),
        ("qwen3_moe", EVEN_EXPERTS, MIXED, "compressed-tensors"),
        ("qwen3_moe", {}, "fp8_e4m3", "lowbit"),
        ("mixtral", EVEN, "sym_int8", "compressed-tensors"),
        ("gpt2", {}, "int4", "lowbit"),
        ("opt", {}, "int4_g32", "compressed-tensors"),
        ("gemma2", EVEN, MIXED, "compressed-tensors"),
    ],
)
def test_saved_model_gives_the_same_logits(
    tmp_path: Path, family: str, overrides: dict, low_bit: str, method: str
) -> None:
    model = Auto.from_pretrained(make(family, tmp_path / "dense", **overrides), **asked(low_bit))
    expected = logits(model)
    model.save_low_bit(tmp_path / "low")
    model.save_pretrained(tmp_path / "plain")
    assert method in (None, quantization_config(tmp_path / "low")["quant_method"])
    for folder in (tmp_path / "low", tmp_path / "plain"):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(again), expected)
        assert not [n for n, p in again.named_parameters() if p.device.type == "meta"]


def test_streaming_packs_what_optimize_model_packs(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3_moe", "mixtral"):
        folder = make(family, tmp_path / family)
        streamed = Auto.from_pretrained(folder, load_in_4bit=True)
        whole = lowbit.optimize_model(transformers.AutoModelForCausalLM.from_pretrained(folder))
        assert torch.equal(logits(streamed), logits(whole)), family
        rows = {(row.path, row.format, row.role) for row in streamed.lowbit_report.layers}
        assert rows == {(row.path, row.format, row.role) for row in whole.lowbit_report.layers}, family


def test_plain_transformers_reads_our_folders_without_lowbit(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    cases = {
        "untied": ("llama", EVEN, MIXED),
        "tied": ("llama", {**EVEN, "tie_word_embeddings": True}, MIXED),
        "asymmetric": ("llama", EVEN, "int3_asym_channel"),
        "ranges": ("llama", EVEN, lowbit.Recipe(lowbit.format_from_name("w8a8_static"), scaler="smoothquant")),
    }
    if importlib.util.find_spec("transformers.integrations.compressed_tensors"):
        # Older transformers have no reader of fused experts for this form, with or without us.
        cases["experts"] = ("qwen3_moe", EVEN_EXPERTS, MIXED)
    folders = []
    for name, (family, overrides, low_bit) in cases.items():
        folder = tmp_path / name
        ranges = {"calibration": IDS} if name == "ranges" else {}
        model = Auto.from_pretrained(make(family, folder / "dense", **overrides), **asked(low_bit), **ranges)
        model.save_low_bit(folder / "low")
        # The unpacked weights themselves: kernels may round activations, other readers do where the folder says so.
        torch.save((IDS, logits(model if ranges else model.dequantize())), folder / "expected.pt")
        folders.append(str(folder / "low"))
    # An isolated interpreter finds no lowbit unless it is asked for, which the script checks at its end.
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOWBIT, "-", *folders], capture_output=True, text=True, check=True
    )
    errors = dict(zip(cases, (float(line) for line in result.stdout.split()), strict=True))
    assert errors["untied"] < 1e-5 and errors["tied"] < 1e-5, errors
    # A number on the edge of two steps may go the other way.
    assert errors["ranges"] < 1e-1, errors
    # What is unpacked while loading is unpacked in the type of the scales, fp16.
    assert errors["asymmetric"] < 2e-2 and errors.get("experts", 0.0) < 2e-2, errors


def test_tied_weight_is_packed_once_and_shared_after_loading(tmp_path: Path) -> None:
    for name, low_bit in (("compressed", "int8"), ("own", "nf4")):
        folder = make("llama", tmp_path / "dense", **EVEN, tie_word_embeddings=True)
        model = Auto.from_pretrained(folder, load_in_low_bit=low_bit, embedding=low_bit)
        assert model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
        model.save_low_bit(tmp_path / name)
        again = Auto.load_low_bit(tmp_path / name)
        assert again.lm_head.packed_weight is again.model.embed_tokens.packed_weight


def test_both_copies_of_a_tied_weight_in_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("llama", tmp_path / "dense", **EVEN, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    same = Auto.from_pretrained(folder, load_in_4bit=True)
    assert same.lm_head.packed_weight is same.model.embed_tokens.packed_weight
    tensors["lm_head.weight"] = -tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other = Auto.from_pretrained(folder, load_in_4bit=True)
    assert torch.allclose(other.lm_head.weight, -other.model.embed_tokens.weight, atol=0.1)


def test_shards_tokenizer_code_and_report_travel_along(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "dense")
    (folder / "modeling_mine.py").write_text("# remote code\n")
    (folder / "LICENSE.md").write_text("free\n")
    (folder / "preprocessor_config.json").write_text("{}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    model = Auto.from_pretrained(folder, load_in_4bit=True)
    model.save_low_bit(tmp_path / "low", max_shard_size="40KB")
    names = {path.name for path in (tmp_path / "low").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "modeling_mine.py",
        "LICENSE.md",
        "generation_config.json",
        "preprocessor_config.json",
    } <= names
    assert (tmp_path / "low" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert {"model.safetensors.index.json", "lowbit_report.json"} <= names
    index = json.loads((tmp_path / "low" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
    again = Auto.load_low_bit(tmp_path / "low")
    assert torch.equal(logits(again), logits(model))
    assert [row.error for row in again.lowbit_report.layers] == [row.error for row in model.lowbit_report.layers]
    assert again.lowbit_report.seconds == model.lowbit_report.seconds > 0
    again.save_low_bit(tmp_path / "low")
    assert torch.equal(logits(Auto.load_low_bit(tmp_path / "low")), logits(model))


def test_dequantized_model_is_dense_and_means_the_same(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3_moe", "gemma2"):
        model = Auto.from_pretrained(make(family, tmp_path / family), load_in_low_bit="int8", kernel="reference")
        expected = logits(model)
        model.dequantize()
        assert not lowbit.explain(model).rows, family
        assert torch.allclose(logits(model), expected, atol=1e-4), family
        model.save_pretrained(tmp_path / "dense_again" / family)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense_again" / family)
        assert torch.allclose(logits(plain), expected, atol=1e-4), family


def test_peft_trains_on_a_low_bit_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_4bit=True).save_low_bit(tmp_path / "low")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    packed = {name: tensor.clone() for name, tensor in base.state_dict().items() if tensor.dtype == torch.int32}
    base = peft.prepare_model_for_kbit_training(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = transformers.trainer_utils.validate_quantization_for_training(model)
    assert trainer is None
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = base.state_dict()
    assert all(
        torch.equal(after[name.replace("packed_weight", "base_layer.packed_weight")], tensor)
        if name.replace("packed_weight", "base_layer.packed_weight") in after
        else torch.equal(after[name], tensor)
        for name, tensor in packed.items()
    )


def test_an_adapter_is_merged_into_dense_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_low_bit="nf4").save_low_bit(tmp_path / "low")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    options = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, options).save_pretrained(tmp_path / "adapter")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low").dequantize()
    before = logits(dense)
    model = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_merged_into_packed_weights_is_rounded_once_more_and_said_so(tmp_path: Path, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_low_bit="int8").save_low_bit(tmp_path / "low")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    before = logits(base)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, options).eval()
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"rounded to int8\S* again: dequantize\(\)"):
        merged = model.merge_and_unload(safe_merge=safe)
    assert merged.model.layers[0].mlp.down_proj.packed_weight.format.bits == 8
    spread = float((expected - before).abs().max())
    assert float((logits(merged) - expected).abs().max()) < 0.1 * spread
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_half_and_save_through_the_old_ways(tmp_path: Path) -> None:
    model = Auto.from_pretrained(make("llama", tmp_path / "dense"), load_in_4bit=True).half()
    assert model.dtype == torch.float16 and logits(model).dtype == torch.float16
    assert model.num_parameters() > 0
    model.save_low_bit(tmp_path / "low")
    # `.half()` rounds the rotary frequencies too, which loading keeps in fp32.
    assert torch.allclose(logits(Auto.load_low_bit(tmp_path / "low")), logits(model), atol=0.1)


def test_encoder_decoder_and_encoder(tmp_path: Path) -> None:
    t5 = transformers.T5Config(
        vocab_size=288, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    bert = transformers.BertConfig(
        vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    cases = (
        (transformers.T5ForConditionalGeneration(t5), lowbit.AutoModelForSeq2SeqLM, {"decoder_input_ids": IDS[:, :4]}),
        (transformers.BertForMaskedLM(bert), lowbit.AutoModelForMaskedLM, {}),
    )
    for dense, auto, inputs in cases:
        folder = tmp_path / type(dense).__name__
        dense.eval().save_pretrained(folder / "dense")
        model = auto.from_pretrained(folder / "dense", load_in_low_bit="int8")
        with torch.no_grad():
            expected = model(IDS, **inputs).logits
            assert torch.allclose(dense(IDS, **inputs).logits, expected, atol=0.2 * float(expected.std()) + 0.05)
            model.save_low_bit(folder / "low")
            assert torch.equal(auto.load_low_bit(folder / "low")(IDS, **inputs).logits, expected)


def test_foreign_compressed_tensors_folder_goes_to_its_own_reader(tmp_path: Path) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    from lowbit.checkpoint.hf import LowBitConfig, reads

    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": "float-quantized"}
    fields = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
              "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip
    assert not reads(fields)
    assert not isinstance(AutoQuantizationConfig.from_dict(fields), LowBitConfig)


def test_a_compact_folder_stores_every_weight_once(tmp_path: Path) -> None:
    model = Auto.from_pretrained(
        make("llama", tmp_path / "dense", **EVEN | {"tie_word_embeddings": True}), load_in_4bit=True
    )
    model.save_low_bit(tmp_path / "wide")
    model.save_low_bit(tmp_path / "compact", compact=True)
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("wide", "compact")]
    assert sizes[1] < sizes[0]
    assert torch.equal(logits(Auto.load_low_bit(tmp_path / "compact")), logits(model))
