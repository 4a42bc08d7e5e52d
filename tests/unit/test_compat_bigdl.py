"""The face of bigdl.llm and ipex_llm: every old name and keyword does what it did, is refused, or says that it does nothing."""

from __future__ import annotations

import importlib
import re
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowbit
import lowbit.compat
from lowbit.bridge import EngineGenerate
from lowbit.cli import FAILED, OK, main
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import CheckpointError, FormatError, LowbitError, RecipeError
from lowbit.formats import CASTS, IQ_TYPES
from lowbit.interop.ipex_blocks import OLD_TYPES, UNREADABLE
from lowbit.layers import LowBitLinear, PackedWeight, packed_weights
from unit.checkpoint_cases import EVEN, logits, make

pytestmark = pytest.mark.transformers
PROMPT = torch.tensor([[5, 9, 11, 4, 8, 5, 9, 11, 4, 8, 5, 9, 11]])


@pytest.fixture(autouse=True)
def old_names() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("face") / "dense", **EVEN)


def old(name: str) -> Any:
    return importlib.import_module(f"ipex_llm.{name}")


def load(dense: Path, **keywords: Any) -> Any:
    return old("transformers").AutoModelForCausalLM.from_pretrained(dense, **keywords)


def test_optimize_model_saves_and_loads_as_the_guide_does(dense: Path, tmp_path: Path) -> None:
    from bigdl.llm import optimize_model  # type: ignore[import-not-found]
    from bigdl.llm.optimize import load_low_bit, low_memory_init  # type: ignore[import-not-found]

    model = transformers.LlamaForCausalLM.from_pretrained(dense, dtype="auto")
    model = optimize_model(model)
    assert model.lowbit_report.layers and model.config.bigdl_transformers_low_bit == "sym_int4"
    model.save_low_bit(str(tmp_path / "saved"))
    with low_memory_init():
        empty = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    again = load_low_bit(empty, str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_optimize_model_takes_any_module_and_pipeline() -> None:
    optimize_model = old("optimize").optimize_model
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    assert isinstance(optimize_model(network, low_bit="sym_int8", optimize_llm=False)[0], LowBitLinear)
    left = optimize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), modules_to_not_convert=["1"])
    assert isinstance(left[0], LowBitLinear) and not isinstance(left[1], LowBitLinear)

    class StableDiffusionPipeline:
        def __init__(self) -> None:
            self.unet = nn.Sequential(nn.Linear(64, 64))

    assert isinstance(optimize_model(StableDiffusionPipeline(), "sym_int4").unet[0], LowBitLinear)
    with pytest.raises(LowbitError, match="not a str"):
        optimize_model("model")
    plain = nn.Sequential(nn.Linear(64, 64))
    assert type(optimize_model(plain, low_bit=None)[0]) is nn.Linear
    with pytest.raises(LowbitError, match="contradict"):
        optimize_model(plain, low_bit="fp16", torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "value"), [("lightweight_bmm", True), ("disable_optimize_pre", True), ("optimize_llm", False)]
)
def test_keywords_of_optimize_model_without_meaning(name: str, value: bool) -> None:
    with pytest.warns(CompatWarning, match=f"{name} has no effect"):
        old("optimize").optimize_model(nn.Sequential(nn.Linear(64, 64)), **{name: value})


@pytest.mark.parametrize("name", ["cpu_embedding", "replace_embedding"])
def test_optimize_model_with_a_dense_embedding(name: str, dense: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    made = old("optimize").optimize_model(model, "asym_int4", **{name: True})
    assert type(made.model.embed_tokens) is nn.Embedding


LAYOUT = "q4_k_gguf"  # how the bytes of a folder lie, and not what a script asks for
NAMES_OF_TYPES = sorted(set(OLD_TYPES) - {LAYOUT} | set(UNREADABLE) | set(CASTS) | {"gguf_q4k_s", "gguf_q4k_m"})


@pytest.mark.parametrize("name", NAMES_OF_TYPES)
def test_every_low_bit_name_packs(name: str) -> None:
    """All names of the old table."""
    quantize = old("ggml.quantize")
    assert set(NAMES_OF_TYPES) >= set(quantize.ggml_tensor_qtype) | set(quantize.gguf_mixed_qtype)
    model = nn.Sequential(nn.Linear(256, 64))
    with pytest.warns(UserWarning, match="q2_k stands in") if name in IQ_TYPES else nullcontext():
        made = old("optimize").optimize_model(model, low_bit=name)
    assert isinstance(made[0], LowBitLinear) == (name not in CASTS)
    if name == "fp32":
        return  # lowbit's own word for a cast
    (remark,) = (row.remark for row in quantize.NAMES if row.old == f'low_bit="{name}"')
    became = str(made[0].weight.dtype) if name in CASTS else made[0].packed_weight.format.name
    said = re.findall(r"\w+", remark)
    assert became.removeprefix("torch.") in said or f"{became}_g64" in said
    assert torch.isfinite(made(torch.ones(1, 256, dtype=next(iter(made.parameters())).dtype))).all()


def test_an_unknown_type_is_named(dense: Path) -> None:
    with pytest.raises(FormatError, match="did you mean"):
        load(dense, load_in_low_bit="sym_int44")


def formats(model: Any) -> dict[str, str]:
    return {row.path: row.format for row in model.lowbit_report.layers}


def test_load_in_4bit_and_load_in_low_bit(dense: Path, tmp_path: Path) -> None:
    model = load(dense, load_in_4bit=True, optimize_model=True, trust_remote_code=True, use_cache=True)
    assert formats(model)["model.layers.0.mlp.up_proj"] == "int4"
    nf4 = load(dense, load_in_low_bit="nf4", optimize_model=False, modules_to_not_convert=["lm_head", "down_proj"])
    found = formats(nf4)
    assert set(found.values()) == {"nf4"} and not [path for path in found if "lm_head" in path or "down_proj" in path]
    nf4.save_low_bit(tmp_path / "nf4", safe_serialization=False)
    again = old("transformers").AutoModelForCausalLM.load_low_bit(str(tmp_path / "nf4"), optimize_model=False)
    assert formats(again) == found and again.config.bigdl_transformers_low_bit == "nf4"
    assert torch.equal(logits(again), logits(nf4))


def test_load_convert_puts_the_format_in_front(dense: Path) -> None:
    made = old("transformers").AutoModelForCausalLM.load_convert("asym_int4", True, str(dense), torch_dtype="auto")
    assert formats(made)["model.layers.0.mlp.up_proj"] == "int4_asym"


def test_keywords_that_change_what_is_packed(dense: Path) -> None:
    mixed = load(dense, load_in_low_bit="asym_int4", mixed_precision=True, cpu_embedding=True)
    assert type(mixed.model.embed_tokens) is nn.Embedding
    found = formats(mixed)
    assert (found["lm_head"], found["model.layers.0.mlp.up_proj"]) == ("int6_g16", "int4_asym")
    with pytest.warns(
        UserWarning, match="mixed_precision gives the head 6 bits and changes nothing here: it has 8 bits"
    ):
        assert formats(load(dense, load_in_low_bit="sym_int8", mixed_precision=True))["lm_head"] == "int8"
    embedded = load(dense, load_in_low_bit="sym_int8", embedding_qtype="q4_k")
    assert formats(embedded)["model.embed_tokens"].startswith(("q4_k", "int4_asym_g32"))
    of_q2 = load(dense, load_in_low_bit="q2_k")
    assert "model.embed_tokens" in formats(of_q2)
    as_bf16 = load(dense, load_in_low_bit="bf16")
    assert as_bf16.dtype == torch.bfloat16 and isinstance(as_bf16.generate, EngineGenerate)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    bits = load(dense, quantization_config=config)
    assert bits.dtype == torch.bfloat16
    assert set(formats(bits).values()) == {"nf4"} and "lm_head" not in formats(bits)


@pytest.mark.parametrize(
    ("fields", "named", "format"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4", "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "sym_int4", "int4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "bf16"}, "bf16", ""),
        ({"load_in_8bit": True}, "sym_int8", "int8"),
    ],
)
def test_each_way_to_ask_by_a_configuration_of_bitsandbytes(
    fields: dict[str, Any], named: str, format: str, dense: Path
) -> None:
    """As an object, and as the dictionary of its fields."""
    for config in (transformers.BitsAndBytesConfig(**fields), fields):
        model = load(dense, quantization_config=config)
        assert model.config.bigdl_transformers_low_bit == named and model.save_low_bit
        if format:
            assert formats(model)["model.layers.0.mlp.up_proj"] == format and "lm_head" not in formats(model)
        else:
            assert model.dtype == torch.bfloat16 and not packed_weights(model)


def test_a_cast_model_is_saved_and_loaded(dense: Path, tmp_path: Path) -> None:
    model = load(dense, load_in_low_bit="bf16")
    model.save_low_bit(str(tmp_path / "cast"))
    again = old("transformers").AutoModelForCausalLM.load_low_bit(str(tmp_path / "cast"))
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))


def write_importance(path: Path, layers: int = 2, width: int = 64, first: float = 100.0) -> Path:
    """An importance matrix in which the first input of two weights of each layer matters most."""
    names = [f"blk.{layer}.{stem}.weight" for layer in range(layers) for stem in ("attn_q", "ffn_up")]
    data = struct.pack("<i", len(names))
    for name in names:
        values = [first, *[0.01] * (width - 1)]
        data += struct.pack(f"<i{len(name)}sii{width}f", len(name), name.encode(), 3, width, *values)
    path.write_bytes(data + struct.pack("<i", 7))
    return path


def test_an_importance_matrix_weighs_inputs(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_importance(tmp_path / "imatrix.dat")
    original = transformers.AutoModelForCausalLM.from_pretrained(dense)

    def error_of_first(model: Any, path: str) -> float:
        difference = model.get_submodule(path).weight - original.get_submodule(path).weight.detach()
        return float(difference[:, 0].square().mean())

    asked = {"load_in_low_bit": "asym_int4", "torch_dtype": torch.float32}
    plain, weighed = load(dense, **asked), load(dense, imatrix=str(file), **asked)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert error_of_first(weighed, path) < 0.7 * error_of_first(plain, path)
    words = ["quantize", str(dense), str(tmp_path / "out"), "--format", "asym_int4", "--imatrix"]
    assert main([*words, str(file)]) == OK
    quantised = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(quantised.get_submodule(path).weight, weighed.get_submodule(path).weight)
    assert main([*words, str(tmp_path / "absent.dat"), "--force"]) == FAILED
    for more in (["--bits", "4.5"], ["--calibration", "default"], ["--algorithm", "gptq"]):
        assert main([*words, str(file), "--force", *more]) == FAILED
        assert "--imatrix takes the place of a text: leave out --calibration, --bits" in capsys.readouterr().err
    untouched = "model.layers.0.mlp.down_proj"
    assert torch.equal(weighed.get_submodule(untouched).weight, plain.get_submodule(untouched).weight)
    with pytest.raises(CheckpointError, match="measured on another model"):
        load(dense, imatrix=write_importance(tmp_path / "other.dat", width=32), **asked)
    with pytest.raises(RecipeError, match="leave out calibration"):
        load(dense, imatrix=file, rounder="hqq", **asked)
    with pytest.raises(RecipeError, match="nothing is rounded"):
        load(dense, imatrix=file)
    for content, said in ((b"GGUF", "GGUF's form"), (file.read_bytes()[:99], "damaged"), (b"\x01\0\0\0", "damaged")):
        (tmp_path / "bad.dat").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            load(dense, imatrix=tmp_path / "bad.dat", **asked)


def test_the_wrapper_measures_first_and_later_tokens(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapper = old("utils").BenchmarkWrapper(load(dense, load_in_4bit=True), do_print=True, verbose=True)
    out = wrapper.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out.shape[1] == PROMPT.shape[1] + 6
    assert wrapper.first_cost > 0 and wrapper.rest_cost_mean > 0 and wrapper.peak_memory > 0.01
    printed = capsys.readouterr().out
    assert "First token" in printed and "(5 of them)" in printed
    assert wrapper.config.model_type == "llama" and wrapper(PROMPT).logits.shape[0] == 1


def test_submodules_that_scripts_import(dense: Path) -> None:
    linear = old("transformers.low_bit_linear")
    assert linear.LowBitLinear is LowBitLinear and linear.FP4Params is PackedWeight
    assert (linear.get_block_size("sym_int4"), linear.get_block_size("q4_k"), linear.get_block_size("mixed_fp4")) == (
        64,
        256,
        64,
    )
    assert old("transformers.convert").get_enable_ipex() is False
    assert old("ggml.quantize").ggml_tensor_qtype["nf4"] == 10
    checker = old("utils.isa_checker").ISAChecker()
    assert isinstance(checker.check_avx2(), bool) and isinstance(checker.check_avx512(), bool)
    common = old("utils.common")
    common.invalidInputError(True, "fine")
    with pytest.raises(RuntimeError, match="too few"):
        common.invalidInputError(False, "too few", "add some")
    with pytest.raises(KeyError):
        old("utils.common.log4Error").invalidOperationError(False, "odd", cause=KeyError("x"))


def test_a_batch_streams_its_texts(dense: Path) -> None:
    class Letters:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(" " if token == 0 else chr(96 + token) for token in tokens)

    streamer = old("transformers.streamer").BatchTextIteratorStreamer(2, Letters(), skip_prompt=True)
    streamer.put(torch.tensor([[1, 2], [3, 4]]))
    for step in ([1, 2], [0, 3], [5, 0]):
        streamer.put(torch.tensor(step))
    streamer.end()
    texts = list(streamer)
    assert ["".join(part) for part in zip(*texts, strict=True)] == ["a e", "bc "]


def test_llm_patch_and_unpatch(dense: Path) -> None:
    peft = pytest.importorskip("peft")
    before = (transformers.AutoModelForCausalLM, transformers.TrainingArguments, peft.get_peft_model, peft.LoraConfig)
    from ipex_llm import llm_patch, llm_unpatch  # type: ignore[import-not-found]

    llm_patch(train=True)
    llm_patch(train=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, load_in_low_bit="nf4")
    assert set(formats(model).values()) == {"nf4"} and "lm_head" not in formats(model)
    assert transformers.LlamaForCausalLM.from_pretrained(dense).dtype == torch.bfloat16
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], training_mode="qlora")
    assert [n for n, p in peft.get_peft_model(model, lora).named_parameters() if p.requires_grad]
    assert transformers.TrainingArguments(output_dir="x", report_to=[], use_cpu=True).bf16
    llm_unpatch()
    assert before == (
        transformers.AutoModelForCausalLM,
        transformers.TrainingArguments,
        peft.get_peft_model,
        peft.LoraConfig,
    )


def test_a_draft_beside_the_model_is_not_saved(dense: Path, tmp_path: Path) -> None:
    model = load(dense, load_in_low_bit="sym_int8", speculative=True)
    model.save_low_bit(tmp_path / "main")
    assert formats(old("transformers").AutoModelForCausalLM.load_low_bit(tmp_path / "main")) == formats(model)
