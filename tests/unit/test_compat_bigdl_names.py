"""The names of bigdl.llm and ipex_llm one by one: each class, each keyword, each that is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lowbit
from interop.test_gguf import METADATA, byte_level_vocabulary, llama_tensors, write_gguf, write_llama
from lowbit.compat.faces.ipex_llm import _NEAREST as NEAREST
from lowbit.compat.faces.ipex_llm import models
from lowbit.compat.faces.ipex_llm.transformers import _NATIVE, _NEAREST
from lowbit.compat.ignored import CompatWarning
from lowbit.compat.missing import UnknownModuleError, UnknownNameError
from lowbit.errors import RecipeError
from unit.checkpoint_cases import logits
from unit.test_compat_bigdl import dense, formats, load, old, old_names

__all__ = ["dense", "old_names"]  # fixtures
pytestmark = pytest.mark.transformers


AUTO = [
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction", "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification", "AutoModelForSpeechSeq2Seq", "AutoModelForTokenClassification",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTO)
def test_every_auto_class_is_there(name: str) -> None:
    kind = getattr(old("transformers"), name)
    assert kind is getattr(importlib.import_module("bigdl.llm.transformers"), name)
    assert kind.HF_Model is getattr(transformers, name) and kind.OURS is getattr(lowbit, name)
    for method in ("from_pretrained", "load_convert", "load_low_bit", "from_gguf"):
        assert callable(getattr(kind, method))


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
SPOKEN = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 100}
SPOKEN |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 30}
SPOKEN |= {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
CONFIGS: dict[str, Any] = {
    "AutoModelForSeq2SeqLM": lambda: transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, vocab_size=100),
    "AutoModelForSpeechSeq2Seq": lambda: transformers.WhisperConfig(**SPOKEN),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTO)
def test_every_auto_class_loads_saves_and_loads_again(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CONFIGS.get(name, lambda: transformers.BertConfig(**SIZES, is_decoder=name == "AutoModelForCausalLM"))()
    dense = getattr(transformers, name).from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    kind = getattr(old("transformers"), name)
    model = kind.from_pretrained(str(tmp_path / "dense"), load_in_4bit=True, torch_dtype=torch.float32)
    assert type(model) is type(dense) and formats(model) and model.config.bigdl_transformers_low_bit == "sym_int4"
    model.save_low_bit(str(tmp_path / "low"))
    again = kind.load_low_bit(str(tmp_path / "low"))
    ids = torch.arange(4, 12)[None]
    asked = {"input_ids": ids}
    if name == "AutoModelForMultipleChoice":
        asked = {"input_ids": ids[None].expand(1, 2, -1)}
    elif config.is_encoder_decoder:
        speaks = name == "AutoModelForSpeechSeq2Seq"
        asked = {"input_features" if speaks else "input_ids": torch.rand(1, 80, 60) if speaks else ids}
        asked["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        expected, found, repeated = (one(**asked)[0].float() for one in (dense, model, again))
    assert torch.equal(found, repeated) and found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 0.5


def test_qwen2_vl(tmp_path: Path) -> None:
    """A model that sees: its text is packed, and it answers about a picture."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    text |= {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    sight = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    places = {"image_token_id": 9, "video_token_id": 10, "vision_start_token_id": 11, "vision_end_token_id": 12}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=False, **places)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    kind = old("transformers").Qwen2VLForConditionalGeneration
    model = kind.from_pretrained(str(tmp_path), load_in_4bit=True, optimize_model=True, torch_dtype=torch.float32)
    assert formats(model)["model.language_model.layers.1.mlp.up_proj"] == "int4"
    picture = torch.rand(16, 3 * 2 * 4 * 4)
    ids = torch.tensor([[5, 11, *[9] * 4, 12, 7]])
    seen = {"pixel_values": picture, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == 9).int()}
    out = model.generate(ids, **seen, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] == ids.shape[1] + 3
    model.save_low_bit(str(tmp_path / "low"))
    again = kind.load_low_bit(str(tmp_path / "low"))
    assert torch.equal(again.generate(ids, **seen, max_new_tokens=3, do_sample=False, eos_token_id=None), out)


def test_torch_dtype(dense: Path) -> None:
    model = load(dense, load_in_low_bit="nf4", torch_dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert load(dense, load_in_low_bit="nf4", torch_dtype=torch.float32).model.norm.weight.dtype == torch.float32


def test_keywords_of_load_low_bit(dense: Path, tmp_path: Path) -> None:
    model = load(dense, load_in_4bit=True)
    model.save_low_bit(str(tmp_path / "models" / "small"))
    load_low_bit = old("transformers").AutoModelForCausalLM.load_low_bit
    assert torch.equal(logits(load_low_bit(str(tmp_path / "models"), subfolder="small")), logits(model))
    idle = {
        "variant": "fp16",
        "offload_folder": "offload",
        "offload_state_dict": True,
        "disk_embedding": True,
        "optimize_model": False,
    }
    said = {"cpu_embedding": True, "embedding_qtype": "q4_k", "modules_to_not_convert": ["lm_head"]}
    for name, value in (idle | said).items():
        with pytest.warns(UserWarning, match=f"{name} has no effect" if name in idle else f"{name}.* changes nothing"):
            again = load_low_bit(str(tmp_path / "models" / "small"), **{name: value})
        assert torch.equal(logits(again), logits(model))
    small = load_low_bit(
        str(tmp_path / "models" / "small"), optimize_model=True, trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert small.model.norm.weight.dtype == torch.bfloat16 and formats(small) == formats(model)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("disk_embedding", True),
        ("lightweight_bmm", True),
        ("model_hub", "modelscope"),
        ("disable_optimize_pre", True),
        ("offload_folder", "offload"),
        ("offload_state_dict", True),
        ("optimize_model", False),
    ],
)
def test_keywords_without_meaning_are_said_once(keyword: str, value: object, dense: Path) -> None:
    with pytest.warns(CompatWarning, match=f"{keyword} has no effect"):
        load(dense, load_in_4bit=True, **{keyword: value})


def test_from_gguf_gives_model_and_tokenizer(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf", "Q8_0")
    load_gguf = old("transformers").AutoModelForCausalLM.from_gguf
    model, tokenizer = load_gguf(str(path))
    ids = tokenizer("a b", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3
    assert (
        formats(model)["model.layers.0.mlp.up_proj"] == "int4" and model.config.bigdl_transformers_low_bit == "sym_int4"
    )
    # A head that shares the embedding's weight is packed with it: this file has one of its own.
    tensors = llama_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"][::-1].copy()
    untied = write_gguf(tmp_path / "untied.gguf", "llama", METADATA | byte_level_vocabulary(), tensors, "F32")
    with pytest.warns(CompatWarning, match="from_gguf: optimize_model has no effect"):
        other, _ = load_gguf(str(untied), optimize_model=False, cpu_embedding=True, low_bit="sym_int8")
    assert formats(other)["model.layers.0.mlp.up_proj"] == "int8" and type(other.model.embed_tokens) is nn.Embedding


def test_llm_convert_and_the_native_classes(dense: Path, tmp_path: Path) -> None:
    from ipex_llm import llm_convert
    from ipex_llm.transformers import BigdlNativeForCausalLM, LlamaForCausalLM  # type: ignore[import-not-found]

    path = llm_convert(str(dense), str(tmp_path), "llama", outtype="int4")
    assert Path(path).name == "bigdl_llm_llama_q4_0.bin"
    model = LlamaForCausalLM.from_pretrained(path, native=True, dtype="int4", n_threads=1)
    ids = model.tokenize("abc")
    tokens = model.generate(ids, max_new_tokens=5, temperature=0.0)
    assert 1 <= len(tokens) <= 5 and isinstance(model.decode(tokens), str)
    answer = BigdlNativeForCausalLM.from_pretrained(path, model_family="llama")("abc", max_tokens=4, temperature=0.0)
    assert (
        answer["usage"]["completion_tokens"] <= 4
        and answer["choices"][0]["text"] == model.batch_decode([tokens[:4]])[0]
    )
    pieces = list(model("abc", max_tokens=4, temperature=0.0, stream=True))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == answer["choices"][0]["text"]
    for wrong in ({"model_family": "lama"}, {"outtype": "int3"}, {"model_format": "ggml"}):
        with pytest.raises(RecipeError):
            llm_convert(str(dense), str(tmp_path), **{"model_family": "llama", **wrong})


NATIVE = {
    "LlamaForCausalLM": "Llama",
    "BloomForCausalLM": "Bloom",
    "GptneoxForCausalLM": "Gptneox",
    "StarcoderForCausalLM": "Starcoder",
}


@pytest.fixture(scope="module")
def converted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = lowbit.AutoModelForCausalLM.from_pretrained(dense, load_in_4bit=True)
    return str(made.save_low_bit(tmp_path_factory.mktemp("native") / "converted"))


@pytest.mark.parametrize("name", NATIVE)
def test_each_native_class(name: str, converted: str, dense: Path) -> None:
    """Without torch, the engine finds out itself what family a model is of; with native=False it is the auto class."""
    kind = getattr(old("transformers"), name)
    model = kind.from_pretrained(converted, native=True, dtype="int4", n_threads=1)
    assert type(model) is getattr(models, NATIVE[name])
    assert 1 <= len(model.generate(model.tokenize("abc"), max_new_tokens=3, temperature=0.0)) <= 3
    assert formats(kind.from_pretrained(dense, native=False, load_in_4bit=True))


def test_the_native_class_of_chatglm(dense: Path) -> None:
    kind = old("transformers").ChatGLMForCausalLM
    assert formats(kind.from_pretrained(dense, native=False, load_in_4bit=True))
    with pytest.raises(RecipeError, match="no native form: pass native=False"):
        kind.from_pretrained(dense)
    assert {*NATIVE, "ChatGLMForCausalLM", "BigdlNativeForCausalLM"} == set(_NATIVE)


# What no face has: how a script asks for it, and a word of what it shall use instead.
REFUSED = {
    "import ipex_llm.cli": "llm-cli",
    "import ipex_llm.gptq": "AutoModelForCausalLM",
    "import ipex_llm.langchain": "langchain's own",
    "import ipex_llm.llamaindex": "HuggingFaceLLM",
    "import ipex_llm.serving": "lowbit chat",
    "import ipex_llm.vllm": "vLLM itself",
    "from ipex_llm.transformers import PPModelWorker": "lowbit chat",
    "from ipex_llm.transformers import ggml_convert_low_bit": "optimize_model",
    "from ipex_llm.transformers.lisa import DynamicLayerActivationCallback": "Trainer",
    "from ipex_llm.transformers.loader import load_model": "from_pretrained",
    "from ipex_llm.transformers.npu_model import AutoModelForCausalLM": "no kernels for an NPU",
    "from ipex_llm.transformers.relora import ReLoRATrainer": "Trainer",
    "from ipex_llm.transformers.qlora import LoraBF16Linear": "peft.tuners.lora.Linear",
    "from ipex_llm.transformers.qlora import LoraLowBitLinear": "peft.tuners.lora.Linear",
    "from ipex_llm.transformers import AutoModelForCausalML": "did you mean AutoModelForCausalLM",
    "import bigdl.llm.optimise": "did you mean optimize",
    "from ipex_llm.transformers.models.utils import update_past_key_value": "transformers' own models",
    "from ipex_llm.transformers.speculative import speculative_generate": "model.speculative_generate",
    "from ipex_llm.transformers.lookup import lookup_generate": "model.lookup_generate",
    "from ipex_llm.transformers.kv import DynamicFp8Cache": "keeps its own cache",
    "from ipex_llm.transformers.gguf.api import load_gguf_model": "AutoModelForCausalLM.from_gguf",
    "from ipex_llm.transformers.training_patch import fix_torch_fsdp": "transformers' Trainer",
    "from ipex_llm.transformers.utils import get_autocast_dtype": "ipex_llm.utils, or torch itself",
}


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_not_there_says_what_to_use(statement: str) -> None:
    with pytest.raises((UnknownModuleError, UnknownNameError), match=REFUSED[statement]):
        exec(statement)


def test_each_refusal_is_tried() -> None:
    tried = " ".join(REFUSED)
    assert [name for name in (*NEAREST, *_NEAREST) if name not in tried] == []
