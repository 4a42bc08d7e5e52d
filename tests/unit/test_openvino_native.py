"""Generating from a graph of OpenVINO without torch: slots, beams, adapters, and folders that are not what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowbit.errors import CheckpointError, LowbitError, MissingPackageError, RecipeError
from lowbit.openvino.library import ops, ov
from lowbit.openvino.native import AdaptedModel, load, read_adapter
from lowbit.openvino.native.graph import ask_for_logits
from lowbit.openvino.opening import EXACT, compile_model, read_model
from lowbit_assets import tiny_model
from unit.ir_cases import MODULE, WIDTH, Toy

PROMPT = [5, 60, 7, 81, 200]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.make()


@pytest.fixture(scope="module")
def folder(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save(tmp_path_factory.mktemp("toy") / "ir")


@pytest.fixture(scope="module")
def model(folder: Path) -> AdaptedModel:
    return load(folder, ov_config=EXACT, slots=4)


def test_a_slot_goes_on_where_it_stands(model: AdaptedModel, toy: Toy) -> None:
    engine = model.engine
    engine.clear()
    whole = toy.logits([*PROMPT, 9, 10, 11])
    np.testing.assert_allclose(engine.prefill(PROMPT), whole[4], **CLOSE)
    np.testing.assert_allclose(engine.decode(9), whole[5], **CLOSE)
    np.testing.assert_allclose(engine.step([10, 11], [0, 0]), whole[6:], **CLOSE)
    engine.truncate(0, 5)
    assert engine.length() == 5
    np.testing.assert_allclose(engine.logits([9, 10]), whole[5:7], **CLOSE)
    engine.truncate(0, 0)
    np.testing.assert_allclose(engine.logits(PROMPT), whole[:5], **CLOSE)


def test_slots_part_and_are_read_together(model: AdaptedModel, toy: Toy) -> None:
    engine = model.engine
    engine.clear()
    engine.prefill(PROMPT)
    engine.copy(0, 1, 5)
    engine.copy(0, 2, 5)
    after = [toy.logits([*PROMPT, token])[-1] for token in (9, 10, 11)]
    np.testing.assert_allclose(engine.step([9, 10, 11], [0, 1, 2]), after, **CLOSE)
    # The second is given up: the two others are one inference, in another order.
    after = [toy.logits([*PROMPT, 11, 20])[-1], toy.logits([*PROMPT, 9, 21])[-1]]
    np.testing.assert_allclose(engine.step([20, 21], [2, 0]), after, **CLOSE)
    assert [engine.length(slot) for slot in range(4)] == [7, 0, 7, 0]
    # A start of one of them, and sequences of different lengths.
    engine.copy(2, 3, 6)
    after = [toy.logits([*PROMPT, 11, 30])[-1], toy.logits([*PROMPT, 9, 21, 31])[-1]]
    np.testing.assert_allclose(engine.step([30, 31], [3, 0]), after, **CLOSE)
    # Slots that share an inference go their own ways.
    np.testing.assert_allclose(engine.decode(40, 2), toy.logits([*PROMPT, 11, 20, 40])[-1], **CLOSE)


def test_greedy_is_the_argmax(model: AdaptedModel, toy: Toy) -> None:
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(toy.logits(tokens)[-1].argmax()))
    answer = model.generate(PROMPT, max_new_tokens=12, ignore_end=True)
    assert [*PROMPT, *answer.tokens] == tokens
    assert (
        list(model.generate(PROMPT, max_new_tokens=12, ignore_end=True, prompt_lookup_num_tokens=3).tokens)
        == tokens[5:]
    )


def test_as_many_beams_as_texts_find_the_likeliest(model: AdaptedModel, toy: Toy) -> None:
    def log_probabilities(tokens: list[int]) -> np.ndarray:
        last = toy.logits(tokens)[-1].astype(np.float64)
        return last - last.max() - np.log(np.exp(last - last.max()).sum())

    firsts = log_probabilities(PROMPT)
    kept = [int(token) for token in np.argsort(-firsts)[:4]]
    seconds = {(a, b): firsts[a] + p for a in kept for b, p in enumerate(log_probabilities([*PROMPT, a]))}
    best = sorted(seconds, key=lambda pair: -seconds[pair])[:4]
    found = model.beams(
        PROMPT, num_beams=4, num_return_sequences=4, max_new_tokens=2, ignore_end=True, length_penalty=2.0
    )
    assert [answer.tokens for answer in found] == best
    np.testing.assert_allclose([a.score for a in found], [seconds[pair] / 2**2.0 for pair in best], rtol=1e-4)
    groups = model.beams(
        PROMPT,
        num_beams=4,
        num_beam_groups=4,
        diversity_penalty=1e4,
        num_return_sequences=4,
        max_new_tokens=1,
        ignore_end=True,
    )
    assert {answer.tokens[0] for answer in groups} == set(kept)


def test_logits_are_made_where_they_are_asked_for(toy: Toy) -> None:
    graph = toy.graph()
    assert ask_for_logits(graph)
    compiled = compile_model(graph, "CPU", EXACT)
    tokens = np.asarray([PROMPT])
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(5)[None]}
    found = compiled(inputs | {"beam_idx": np.zeros(1, np.int32), "logits_at": np.asarray([1, 4])})["logits"]
    np.testing.assert_allclose(found[0], toy.logits(PROMPT)[[1, 4]], **CLOSE)
    x = ops.parameter([-1, -1, 4], ov.Type.f32, name="x")
    assert not ask_for_logits(ov.Model([_named(ops.softmax(x, -1))], [x], "without a head"))


def _named(node: Any) -> Any:
    node.output(0).get_tensor().set_names({"logits"})
    return ops.result(node)


def save_adapter(
    folder: Path, rank: int, name: str = MODULE, height: int = WIDTH, seed: int = 1, base: str = "", **config: Any
) -> Path:
    """An adapter as peft saves it, with the weight of the module `base` beside."""
    folder.mkdir()
    draw = np.random.default_rng(seed).standard_normal
    matrices = {"A": draw((rank, WIDTH)).astype(np.float32), "B": draw((height, rank)).astype(np.float32)}
    named = {f"base_model.model.{name}.lora_{side}.weight": m for side, m in matrices.items()}
    if base:
        named[f"base_model.model.{base}.base_layer.weight"] = np.ones((height, WIDTH), np.float32)
    save_file(named, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_adapters_are_put_on_for_a_call(folder: Path, toy: Toy, tmp_path: Path) -> None:
    one = save_adapter(tmp_path / "one", 3)
    two = save_adapter(tmp_path / "two", 2, seed=2, use_rslora=True)
    model = load(folder, ov_config=EXACT, adapters={"one": one, "two": two}, slots=2)
    changes = [(pair := read_adapter(path).pairs[MODULE])[1] @ pair[0] for path in (one, two)]

    def expected(*weights: float) -> np.ndarray:
        mix = toy.mix + sum(weight * change for weight, change in zip(weights, changes, strict=True))
        return Toy(toy.embedding, mix, toy.head).logits(PROMPT)

    for wanted, weights in (
        (None, (1, 1)), ("one", (1, 0)), (["two"], (0, 1)), ((), (0, 0)), ({"one": 0.5, "two": -1}, (0.5, -1)), ("one", (1, 0)),
    ):  # fmt: skip
        np.testing.assert_allclose(model.logits(PROMPT, adapters=wanted), expected(*weights), rtol=1e-4, atol=1e-4)
    alone = load(save_and_merge(tmp_path / "merged", toy, changes[0]), ov_config=EXACT)
    assert model.generate(PROMPT, adapters="one").tokens == alone.generate(PROMPT).tokens
    assert model.beams(PROMPT, adapters="one", num_beams=2)[0].tokens == alone_beams(alone, tmp_path)
    with pytest.raises(RecipeError, match="there is no adapter 'three': known are one, two"):
        model.generate(PROMPT, adapters="three")
    with pytest.raises(RecipeError, match="loaded without adapters"):
        alone.generate(PROMPT, adapters="one")


def save_and_merge(folder: Path, toy: Toy, change: np.ndarray) -> Path:
    return Toy(toy.embedding, toy.mix + change, toy.head).save(folder)


def alone_beams(alone: AdaptedModel, tmp_path: Path) -> tuple[int, ...]:
    return load(tmp_path / "merged", ov_config=EXACT, slots=2).beams(PROMPT, num_beams=2)[0].tokens


def test_no_answer_changes_its_adapters_half_way(folder: Path, tmp_path: Path) -> None:
    model = load(folder, adapters=save_adapter(tmp_path / "one", 3), slots=2)
    pieces = model.stream(PROMPT, adapters=(), max_new_tokens=4, ignore_end=True)
    next(pieces)
    with pytest.raises(LowbitError, match="an answer with other adapters is under way"):
        model.generate(PROMPT, adapters="one", max_new_tokens=2)
    assert len(list(pieces)) == 3
    assert model.generate(PROMPT, adapters="one", max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "model.other"}, "the graph has no product of that name"),
        ({"height": 9}, "is 8 wide and 9 high, the model's 8 and 8"),
        ({"use_dora": True}, "merge the adapter"),
        ({"modules_to_save": ["lm_head"]}, "merge the adapter"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"base": "lm_head"}, "holds base_model.model.lm_head.base_layer.weight, which is no LoRA of a linear layer"),
        ({"name": "model.mix.lora_magnitude_vector"}, "no product of that name"),
    ],
)
def test_adapters_of_other_models(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(folder, adapters=save_adapter(tmp_path / "odd", 2, **change))


def test_the_weight_that_peft_saves_with_an_adapted_head_is_left(folder: Path, tmp_path: Path) -> None:
    alone, beside = save_adapter(tmp_path / "alone", 3), save_adapter(tmp_path / "beside", 3, base=MODULE)
    plain, whole = (load(folder, ov_config=EXACT, adapters=path).logits(PROMPT) for path in (alone, beside))
    np.testing.assert_array_equal(whole, plain)
    assert not np.array_equal(whole, load(folder, ov_config=EXACT).logits(PROMPT))


def test_damaged_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read_adapter(tmp_path / "nowhere")
    whole = save_adapter(tmp_path / "whole", 2)
    weights = whole / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        read_adapter(whole)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        read_adapter(whole)


def test_without_torch_and_transformers(folder: Path, tmp_path: Path) -> None:
    """Tokenise, choose, draw, search, stream, talk, take text apart again; with an adapter."""
    tiny = tiny_model("llama", tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from lowbit.openvino.native import load
model = load({str(folder)!r}, adapters={str(save_adapter(tmp_path / "one", 2))!r}, slots=2)
answer = model.generate("hello", max_new_tokens=8, ignore_end=True)
assert "".join(map(str, model.stream("hello", max_new_tokens=8, ignore_end=True))) == answer.text
print(len(answer.tokens), len(model.generate("hello", num_beams=2, max_new_tokens=4, ignore_end=True).tokens))
print(len(model.chat([{{"role": "user", "content": "hello"}}], temperature=0.8, seed=1, max_new_tokens=3, adapters=()).tokens))
used = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(used & {{"torch", "transformers", "peft", "huggingface_hub", "openvino_genai", "openvino_tokenizers"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "8 4" and 1 <= int(lines[1]) <= 3 and lines[2] == "['torch', 'transformers']"


def test_without_openvino() -> None:
    code = "import sys\nsys.modules['openvino'] = None\nfrom lowbit.openvino.native import load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert MissingPackageError.__name__ in done.stderr and "pip install 'lowbit[openvino]'" in done.stderr


def test_the_file_of_the_graph_names_its_folder(folder: Path, model: AdaptedModel) -> None:
    found = load(folder / "openvino_model.xml", ov_config=EXACT)
    np.testing.assert_array_equal(found.logits(PROMPT), model.logits(PROMPT))


def test_folders_that_lack_something(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="lowbit export openvino"):
        load(tmp_path)
    folder = toy.save(tmp_path / "ir", vocab_size=300)
    with pytest.raises(LowbitError, match=r"gives 288 logits and config.json says vocab_size = 300"):
        load(folder)
    (folder / "openvino_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"without its weights openvino_model.bin"):
        load(folder)
    (folder / "openvino_model.bin").write_bytes(b"")
    (folder / "openvino_model.xml").write_text("<net")
    with pytest.raises(CheckpointError, match="export the model again"):
        read_model(folder)


def test_threads_are_not_pinned_unless_asked(folder: Path) -> None:
    graph = read_model(folder)
    assert compile_model(graph).get_property("ENABLE_CPU_PINNING") is False
    assert compile_model(graph, "CPU", {"ENABLE_CPU_PINNING": "YES"}).get_property("ENABLE_CPU_PINNING") is True


def test_what_cannot_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"there is no device 'GPU.7' here: .* sees CPU"):
        load(folder, device="GPU.7")
    with pytest.raises(RecipeError, match="made for 1 to 64 tokens"):
        load(folder, context=65)
    with pytest.raises(RecipeError, match="do not fit the context of 6"):
        load(folder, context=6).engine.prefill(list(range(7)))
    with pytest.raises(LowbitError, match="OpenVINO refuses the model on CPU"):
        load(folder, ov_config={"NO_SUCH_PROPERTY": 1})
    stateless = tmp_path / "stateless"
    stateless.mkdir()
    x = ops.parameter([-1, -1], ov.Type.f32, name="input_ids")
    x.output(0).get_tensor().set_names({"input_ids"})
    ov.save_model(ov.Model([_named(ops.relu(x))], [x], "plain"), stateless / "openvino_model.xml")
    with pytest.raises(LowbitError, match="the graph has no beam_idx"):
        load(stateless)
