"""The auto classes: every keyword of the old systems, GGUF as a source, and a plain call that stays plain."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.layers import packed_weights
from lowbit_assets import smollm2_gguf
from unit.checkpoint_cases import EVEN, IDS, logits, make

pytestmark = pytest.mark.transformers
Auto = lowbit.AutoModelForCausalLM
NAMES = [name for name in lowbit.__all__ if name.startswith("AutoModel")]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("auto") / "dense", **EVEN)


def bits_and_bytes(**options: Any) -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **options)


def formats(model: torch.nn.Module) -> dict[str, str]:
    return {row.path: row.format for row in model.lowbit_report.layers}


def test_there_are_ten_and_each_stands_for_its_own() -> None:
    assert len(NAMES) == 10
    for name in NAMES:
        assert getattr(lowbit, name).transformers_class is getattr(transformers, name)


TWELVE = IDS[:, :12]
BERT = transformers.BertConfig(
    vocab_size=288, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
)
T5 = transformers.T5Config(vocab_size=288, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
WHISPER = transformers.WhisperConfig(
    vocab_size=288, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
    pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, begin_suppress_tokens=None,
)  # fmt: skip
OTHERS = {
    "AutoModelForMultipleChoice": (BERT, {"input_ids": IDS.view(1, 4, 8)}),
    "AutoModelForSeq2SeqLM": (T5, {"input_ids": TWELVE, "decoder_input_ids": TWELVE}),
    "AutoModelForSpeechSeq2Seq": (WHISPER, {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": TWELVE}),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AutoModelForCausalLM"])
def test_each_class_packs_while_it_loads_and_reads_what_it_saved(name: str, tmp_path: Path) -> None:
    """AutoModelForCausalLM has the rest of this file."""
    ours, theirs = getattr(lowbit, name), getattr(transformers, name)
    config, inputs = OTHERS.get(name, (BERT, {"input_ids": TWELVE}))
    torch.manual_seed(0)
    original = theirs.from_config(config).eval()
    original.save_pretrained(tmp_path / "dense")
    packed = ours.from_pretrained(tmp_path / "dense", load_in_low_bit="int8_g32")
    assert packed.lowbit_report.formats() == {"int8_g32": len(packed.lowbit_report.layers)}
    packed.save_low_bit(tmp_path / "low")
    with torch.no_grad():
        expected, found = original(**inputs)[0], packed(**inputs)[0]
        assert float((found - expected).norm() / expected.norm()) < 0.05
        for again in (ours.load_low_bit(tmp_path / "low"), theirs.from_pretrained(tmp_path / "low")):
            assert torch.equal(again.eval()(**inputs)[0], found)


def test_without_a_low_bit_keyword_it_is_transformers_own_load(dense: Path) -> None:
    model = Auto.from_pretrained(dense, dtype=torch.bfloat16)
    assert not hasattr(model, "lowbit_report") and model.dtype == torch.bfloat16
    assert type(model.lm_head) is torch.nn.Linear
    for keywords in (
        {"load_in_low_bit": "fp16"},
        {"quantization_config": bits_and_bytes(bnb_4bit_quant_type="fp16")},
        {"quantization_config": transformers.BitsAndBytesConfig(), "dtype": torch.float16},
    ):
        cast = Auto.from_pretrained(dense, **keywords)
        assert cast.dtype == torch.float16 and type(cast.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("modules_not_to_convert", "modules_to_not_convert"),
        ("load_in_4_bit", "load_in_4bit"),
        ("cpu_embeding", "cpu_embedding"),
    ],
)
def test_a_slip_in_a_keyword_is_told(dense: Path, slip: str, meant: str) -> None:
    with pytest.raises(lowbit.RecipeError, match=f"no keyword '{slip}': did you mean '{meant}'"):
        Auto.from_pretrained(dense, load_in_low_bit="int4", **{slip: True})


@pytest.mark.parametrize(
    ("keywords", "path", "format"),
    [
        ({"load_in_4bit": True}, "model.layers.0.mlp.up_proj", "int4"),
        ({"load_in_8bit": True}, "model.layers.0.mlp.up_proj", "int8"),
        ({"load_in_low_bit": "asym_int5"}, "lm_head", "int5_asym"),
        ({"load_in_4bit": True, "modules_to_not_convert": ["lm_head"]}, "lm_head", None),
        ({"load_in_4bit": True, "cpu_embedding": True}, "model.embed_tokens", None),
        ({"load_in_low_bit": "nf4", "embedding_qtype": "q4_k"}, "model.embed_tokens", "int4_asym_g32"),
        ({"load_in_4bit": True, "mixed_precision": True}, "lm_head", "int6_g16"),
        (
            {"load_in_4bit": True, "optimize_model": False, "low_cpu_mem_usage": True},
            "model.layers.0.mlp.up_proj",
            "int4",
        ),
        ({"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}, "lm_head", None),
        ({"quantization_config": bits_and_bytes(bnb_4bit_quant_type="nf4")}, "model.layers.0.mlp.up_proj", "nf4"),
        (
            {"quantization_config": bits_and_bytes(bnb_4bit_use_double_quant=True)},
            "model.layers.0.mlp.up_proj",
            "fp4_dq",
        ),
        ({"quantization_config": bits_and_bytes(bnb_4bit_quant_type="int4")}, "model.layers.0.mlp.up_proj", "int4"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            "model.layers.0.mlp.up_proj",
            "nf4",
        ),
    ],
)
def test_keywords(dense: Path, keywords: dict, path: str, format: str | None) -> None:
    model = Auto.from_pretrained(dense, **keywords)
    assert formats(model).get(path) == format
    if format is None:
        assert path in {row.path for row in model.lowbit_report.skipped}


def test_dtype_under_both_names(dense: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        model = Auto.from_pretrained(dense, load_in_4bit=True, **{name: torch.bfloat16})
        assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16


def test_a_low_bit_folder_is_computed_as_asked(dense: Path, tmp_path: Path) -> None:
    exact = Auto.from_pretrained(dense, load_in_4bit=True, compute="fp32", dtype=torch.float32)
    exact.save_low_bit(tmp_path / "low")
    for load in (Auto.from_pretrained, Auto.load_low_bit):
        model = load(tmp_path / "low", compute="fp32", kernel="reference")
        held = packed_weights(model).values()
        assert {(weight.compute, weight.kernel.name) for weight in held} == {("fp32", "reference")}
        assert torch.allclose(logits(model), logits(exact), atol=1e-4)
    assert not torch.allclose(logits(Auto.load_low_bit(tmp_path / "low")), logits(exact), atol=1e-4)
    with pytest.warns(UserWarning, match="compute= and kernel= say how packed weights are multiplied"):
        Auto.from_pretrained(dense, compute="fp32")


def test_low_bit_folder_loads_as_it_is_with_one_warning(dense: Path, tmp_path: Path) -> None:
    Auto.from_pretrained(dense, load_in_low_bit="int8").save_low_bit(tmp_path / "low")
    with pytest.warns(UserWarning, match="low-bit already") as caught:
        model = Auto.from_pretrained(tmp_path / "low", load_in_4bit=True)
    assert len([w for w in caught if "low-bit already" in str(w.message)]) == 1
    assert formats(model)["lm_head"] == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Auto.from_pretrained(tmp_path / "low")


def test_device_map_and_generation(dense: Path) -> None:
    model = Auto.from_pretrained(dense, load_in_4bit=True, device_map="cpu")
    tokens = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] <= 7 and torch.equal(tokens[:, :4], IDS[:, :4])


def test_kernel_by_name(dense: Path) -> None:
    model = Auto.from_pretrained(dense, load_in_4bit=True, kernel="reference")
    assert {row.kernel for row in lowbit.explain(model).rows} == {"reference"}


def test_gguf_as_a_source(tmp_path: Path) -> None:
    """The embedded model, straight from its file: what transformers makes of the unpacked weights, packed."""
    model = Auto.from_pretrained(smollm2_gguf(), load_in_low_bit="int8_g32", rounder="plain_rtn", kernel="reference")
    assert model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
    tokenizer_text = "The capital of France is"
    model.save_low_bit(tmp_path / "low")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "low")
    ids = tokenizer(tokenizer_text, return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert "Paris" in tokenizer.decode([best])


def test_a_gguf_file_is_a_language_model() -> None:
    with pytest.raises(
        lowbit.CheckpointError, match=r"AutoModelForMaskedLM has no class for.*use AutoModelForCausalLM"
    ):
        lowbit.AutoModelForMaskedLM.from_pretrained(smollm2_gguf(), load_in_4bit=True)


def test_load_low_bit_says_what_changes_nothing(dense: Path, tmp_path: Path) -> None:
    Auto.from_pretrained(dense, load_in_4bit=True).save_low_bit(tmp_path / "low")
    idle = {
        "cpu_embedding": True,
        "disk_embedding": True,
        "embedding_qtype": "q4_k",
        "modules_to_not_convert": ["lm_head"],
    }
    with pytest.warns(UserWarning) as caught:
        Auto.load_low_bit(tmp_path / "low", optimize_model=True, **idle)
    said = [str(warning.message) for warning in caught if "changes nothing" in str(warning.message)]
    assert sorted(text.split("'")[1] for text in said) == sorted(idle)
    with pytest.warns(UserWarning, match="'disk_embedding' has no meaning here.*stay mapped"):
        Auto.from_pretrained(tmp_path / "low", disk_embedding=True)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(lowbit.CheckpointError, match=r"did you mean .*smollm2"):
        Auto.from_pretrained(tmp_path / "smolm2", load_in_4bit=True)
    for name in ("./nowhere", "~/nowhere/deep", "nowhere.gguf"):
        with pytest.raises(lowbit.CheckpointError, match="there is no file or folder"):
            Auto.from_pretrained(name)


def test_import_is_light_and_the_hook_waits() -> None:
    script = (
        "import sys, lowbit\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "from transformers.quantizers import auto\n"
        "assert 'lowbit' in auto.AUTO_QUANTIZER_MAPPING and 'lowbit.checkpoint' not in sys.modules\n"
        "assert auto.__spec__.loader.__class__.__module__.startswith('importlib') or '_frozen' in repr(auto.__spec__.loader)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    late = "import sys\nfrom transformers.quantizers import auto\nimport lowbit\nassert 'lowbit' in auto.AUTO_QUANTIZER_MAPPING\n"
    subprocess.run([sys.executable, "-c", late], check=True)
