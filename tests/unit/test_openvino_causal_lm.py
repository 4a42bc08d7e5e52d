"""OVModelForCausalLM and the light path beside transformers: the same tokens, scores and texts from one exported model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import lowbit
import lowbit.runtime
from cpu.test_openvino_export import held_codes, ready_made, written_codes
from interop.packed_linears import gptq_linear
from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.models.past import PAST_NAMES, past_of, transformers_name
from lowbit.openvino import (
    CompressWeightsMode,
    OVConfig,
    OVModelForCausalLM,
    OVWeightQuantizationConfig,
    compress_weights,
    native,
)
from lowbit.openvino.configs import read_config
from lowbit.openvino.opening import EXACT
from lowbit_assets import reference_model, tiny_model, tiny_model_in_memory

pytestmark = pytest.mark.transformers
PROMPT = [1, 50, 60, 70, 80]
BATCH = [[0, 0, 1, 50, 60, 70], [1, 90, 91, 92, 93, 94]]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def original(tiny: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")


@pytest.fixture(scope="module")
def model(tiny: Path) -> OVModelForCausalLM:
    return OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT)


@pytest.fixture(scope="module")
def folder(model: OVModelForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ir") / "model"
    model.save_pretrained(place)
    return place


def generate(model: Any, ids: list[list[int]] = BATCH, **settings: Any) -> Any:
    tokens = torch.tensor(ids)
    torch.manual_seed(0)
    given = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 12, "return_dict_in_generate": True}
    return model.generate(tokens, **given, **settings)


@torch.no_grad()
def test_logits(model: OVModelForCausalLM, original: Any) -> None:
    tokens = torch.tensor(BATCH)
    mask = (tokens != 0).long()
    ours, theirs = model(tokens, attention_mask=mask), original(tokens, attention_mask=mask)
    np.testing.assert_allclose(ours.logits[mask.bool()], theirs.logits[mask.bool()], **CLOSE)
    whole = model(tokens[1:], labels=tokens[1:])
    np.testing.assert_allclose(whole.loss, original(tokens[1:], labels=tokens[1:]).loss, **CLOSE)
    last = model(tokens[1:], logits_to_keep=1).logits
    np.testing.assert_allclose(last, whole.logits[:, -1:], **CLOSE)
    for name in PAST_NAMES:
        first = model(tokens[1:, :4])
        rest = model(tokens[1:, 4:], **{name: past_of(first)})
        np.testing.assert_allclose(rest.logits, whole.logits[:, 4:], **CLOSE)
    assert past_of(model(tokens, use_cache=False)) is None
    assert isinstance(model(tokens, return_dict=False), tuple)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "do_sample": True},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_generate_is_that_of_transformers(model: OVModelForCausalLM, original: Any, settings: dict[str, Any]) -> None:
    ours, theirs = (generate(each, output_scores=True, **settings) for each in (model, original))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        np.testing.assert_allclose(mine, other, **CLOSE)


def test_guesses_and_assistants(model: OVModelForCausalLM, original: Any) -> None:
    plain = generate(original, BATCH[1:]).sequences.tolist()
    assert generate(model, BATCH[1:], prompt_lookup_num_tokens=2).sequences.tolist() == plain
    assert generate(model, BATCH[1:], assistant_model=original).sequences.tolist() == plain
    assert generate(original, BATCH[1:], assistant_model=model).sequences.tolist() == plain


def test_a_past_is_gone_on_with(model: OVModelForCausalLM, original: Any) -> None:
    first = generate(model, BATCH[1:])
    past, more = past_of(first), torch.cat([first.sequences, torch.tensor([[77, 78]])], 1).tolist()
    copied = copy.deepcopy(past)
    generate(model, BATCH[1:])  # another answer in between
    expected = generate(original, more).sequences.tolist()
    for held in (past, copied):
        assert generate(model, more, **{transformers_name(): held}).sequences.tolist() == expected


def test_streamers_criteria_and_processors(model: OVModelForCausalLM, original: Any, tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    texts = []
    for each in (model, original):
        streamer = transformers.TextIteratorStreamer(tokenizer)
        generate(each, BATCH[1:], streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1]

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    class Only(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores + torch.where(torch.arange(scores.shape[-1]) == 99, 0.0, -torch.inf)

    ended = generate(model, stopping_criteria=[Stop()], logits_processor=[Only()])
    assert ended.sequences[:, 6:].tolist() == [[99] * 3] * 2
    written = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("hello", max_new_tokens=5)
    assert written[0]["generated_text"].startswith("hello")


def test_saved_and_loaded_again(model: OVModelForCausalLM, folder: Path, tiny: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {
        "openvino_model.xml",
        "openvino_model.bin",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    } <= names
    expected = generate(model).sequences.tolist()
    again = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)
    assert generate(again).sequences.tolist() == expected
    again.save_pretrained(folder)  # over the file that its weights are read from
    assert generate(again).sequences.tolist() == expected
    assert generate(OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT)).sequences.tolist() == expected
    lazy = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT, compile=False)
    lazy.to("cpu").compile()
    lazy.clear_requests()
    assert lazy.ov_device == "CPU" and lazy.device == torch.device("cpu") and lazy.dtype == torch.float32
    assert generate(lazy.to(torch.device("cpu"))).sequences.tolist() == expected


def kinds(model: OVModelForCausalLM) -> dict[str, int]:
    """How many numbers the constants of each type hold."""
    found: dict[str, int] = {}
    for node in model.model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            name = node.get_element_type().get_type_name()
            found[name] = found.get(name, 0) + int(np.prod(list(node.shape), dtype=np.int64))
    return found


@torch.no_grad()
def distance(model: OVModelForCausalLM, original: Any) -> float:
    tokens = torch.tensor(BATCH[1:])
    mine, other = (each(tokens).logits.log_softmax(-1) for each in (model, original))
    return float((other.exp() * (other - mine)).sum(-1).mean())


@pytest.mark.parametrize(
    ("asked", "kind", "limit"),
    [
        ({"load_in_8bit": True}, "u8", 1e-3),
        ({"load_in_4bit": True}, "u4", 0.1),
        ({"quantization_config": {"bits": 4, "sym": True, "group_size": 32, "ratio": 0.8}}, "i4", 0.05),
        ({"quantization_config": OVConfig(quantization_config={"bits": 8, "sym": True})}, "i8", 1e-3),
        ({"quantization_config": OVWeightQuantizationConfig(dtype="nf4", bits=4, group_size=32)}, "nf4", 0.1),
        (
            {"quantization_config": {"bits": 4, "group_size": 32, "ignored_scope": {"patterns": [".*q_proj.*"]}}},
            "u4",
            0.1,
        ),
        ({"quantization_config": lowbit.RtnConfig(bits=4)}, "i4", 0.1),
    ],
    ids=["8 bits", "4 bits", "ratio", "8 bits symmetric", "nf4", "with exceptions", "ours"],
)
def test_what_is_asked_of_weights_is_done(
    tiny: Path, original: Any, asked: dict[str, Any], kind: str, limit: float
) -> None:
    made = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT, **asked)
    weights = sum(parameter.numel() for parameter in original.parameters() if parameter.dim() == 2)
    found = kinds(made)
    left = (
        0.31
        if isinstance(asked.get("quantization_config"), lowbit.RtnConfig)
        else 0.09
        if "ignored" in str(asked)
        else 0.02
    )
    assert found.get(kind, 0) > (0.9 if kind in ("i8", "u8") else 0.5) * weights and found["f32"] < left * weights, (
        found
    )
    assert 0 < distance(made, original) < limit
    assert generate(made).sequences.shape[0] == 2


@pytest.mark.filterwarnings("ignore:.*windows:UserWarning", "ignore:the data set:UserWarning")
@pytest.mark.parametrize("asked", ["gptq of the graph", "awq of the torch model", "GPTQConfig of transformers"])
def test_what_looks_at_text(tiny: Path, original: Any, asked: str) -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 3] * 40
    config = {
        "gptq of the graph": {"bits": 4, "group_size": 32, "gptq": True, "dataset": texts, "num_samples": 8},
        "awq of the torch model": {
            "bits": 4,
            "group_size": 32,
            "quant_method": "awq",
            "dataset": texts,
            "num_samples": 2,
        },
        "GPTQConfig of transformers": transformers.GPTQConfig(
            bits=4, group_size=32, dataset=texts, tokenizer=str(tiny)
        ),
    }[asked]
    made = OVModelForCausalLM.from_pretrained(tiny, export=True, ov_config=EXACT, quantization_config=config)
    found = kinds(made)
    assert ("i4" if "transformers" in asked else "u4") in found and not {"i4", "u4"} <= found.keys()
    assert 0 < distance(made, original) < 0.1


def test_the_graph_may_be_changed(tiny: Path, folder: Path, original: Any, tmp_path: Path) -> None:
    """As the guide does it: the model without low bits, and its graph compressed."""
    model = OVModelForCausalLM.from_pretrained(tiny, export=True, load_in_8bit=False, ov_config=EXACT)
    model.model = compress_weights(model.model, mode=CompressWeightsMode.INT4_SYM, group_size=32, ratio=0.8)
    assert {"i4", "u8"} <= kinds(model).keys() and 0 < distance(model, original) < 0.1
    model.save_pretrained(tmp_path / "saved")
    again = OVModelForCausalLM.from_pretrained(tmp_path / "saved", ov_config=EXACT)
    assert generate(again).sequences.tolist() == generate(model).sequences.tolist()
    later = OVModelForCausalLM.from_pretrained(folder, load_in_8bit=True, ov_config=EXACT)
    assert kinds(later)["u8"] > 0 and 0 < distance(later, original) < 1e-3
    with pytest.raises(LowbitError, match=r"is an openvino\.Model"):
        model.model = original


def test_above_a_billion_weights_8_bits_are_taken(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowbit.openvino.export.LARGE", 10_000)
    made = OVModelForCausalLM.from_pretrained(tiny, export=True)
    assert "is written in 8 bits" in capsys.readouterr().err and "i8" in kinds(made)
    assert "i8" not in kinds(OVModelForCausalLM.from_pretrained(tiny, export=True, load_in_8bit=False))
    assert "8 bits" not in capsys.readouterr().err


def test_codes_of_a_low_bit_folder_stay(tiny: Path, tmp_path: Path) -> None:
    packed = lowbit.AutoModelForCausalLM.from_pretrained(tiny, load_in_low_bit="int4_g32")
    lowbit.save_low_bit(packed, tmp_path / "packed")
    made = OVModelForCausalLM.from_pretrained(tmp_path / "packed", ov_config=EXACT)
    expected = held_codes(tmp_path / "packed")
    assert len(expected) == 15 and written_codes(made.model, list(expected)) == expected
    tokens = torch.tensor(BATCH[1:])
    exact = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", kernel="reference", torch_dtype="float32")
    with torch.no_grad():
        np.testing.assert_allclose(made(tokens).logits, exact(tokens).logits, rtol=1e-3, atol=1e-3)


def test_what_is_refused(tiny: Path, folder: Path, model: OVModelForCausalLM, tmp_path: Path) -> None:
    tokens = torch.tensor(BATCH)
    load = OVModelForCausalLM.from_pretrained
    with pytest.raises(RecipeError, match="load_in_8bit and load_in_4bit ask for two things"):
        load(tiny, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(LowbitError, match=r"there is no device 'NPU' here: .* sees CPU"):
        load(folder, device="NPU")
    with pytest.raises(LowbitError, match="stateful=False"):
        load(folder, stateful=False)
    with pytest.raises(CheckpointError, match=r"has no openvino_model\.xml"):
        load(tiny, export=False)
    (tmp_path / "lost").mkdir()
    for name in ("openvino_model.xml", "config.json"):
        (tmp_path / "lost" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="without its weights"):
        load(tmp_path / "lost")
    with pytest.raises(LowbitError, match="quantises a torch model, and the folder holds a graph"):
        load(folder, quantization_config=lowbit.RtnConfig())
    with pytest.raises(LowbitError, match="logits alone"):
        model(tokens, output_hidden_states=True)
    with pytest.raises(LowbitError, match="takes no DynamicCache"):
        model.generate(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(LowbitError, match="leave out cache_implementation"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(LowbitError, match="INFERENCE_PRECISION_HINT"):
        model.to(torch.bfloat16)
    with pytest.raises(LowbitError, match="attention_mask has the shape"):
        model(tokens, attention_mask=torch.ones(2, 3))


def test_configurations_are_read() -> None:
    config = read_config({"bits": 4, "sym": True, "group_size": 32})
    assert isinstance(config, OVWeightQuantizationConfig) and config.mode == "int4_sym"
    assert config.recipe is not None and config.recipe.linear.name == "int4_g32"
    assert read_config(config.to_dict()) == config
    assert OVWeightQuantizationConfig(bits=4, ratio=0.5, dataset=["a"]).recipe is None
    assert isinstance(read_config({"quant_method": "gptq", "bits": 4, "scheme": "sym"}), lowbit.GPTQConfig)
    for wrong, said in (
        ({"bits": 3}, "4 or 8"), ({"bits": 4, "groupsize": 32}, "group_size"), ({"ratio": 2}, "share"), (3, "dict of its fields"),
        ({"dtype": "int5"}, "int4"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            read_config(wrong)
    with pytest.raises(RecipeError, match="hybrid"):
        _ = OVWeightQuantizationConfig(bits=8, quant_method="hybrid").arguments


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt_neox", "qwen3_moe"])
def test_the_light_path_chooses_as_transformers(family: str, tmp_path: Path) -> None:
    """Families whose attention is fused, and those where it is not, one answer after another."""
    source = tiny_model(family, tmp_path / "model")
    lowbit.openvino.write_decoder(source, tmp_path / "ir", tokenizer=False)
    light = native.load(tmp_path / "ir", ov_config=EXACT, slots=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    heavy = OVModelForCausalLM.from_pretrained(tmp_path / "ir", ov_config=EXACT)
    for prompt in (PROMPT, [1, 99, 100], [*PROMPT, 7]):
        expected = generate(model, [prompt], do_sample=False).sequences[0, len(prompt) :].tolist()
        assert generate(heavy, [prompt], do_sample=False).sequences[0, len(prompt) :].tolist() == expected
        answer = light.generate(prompt, max_new_tokens=12)
        assert list(answer.tokens) == expected
        beams = generate(model, [prompt], num_beams=4, num_return_sequences=2, length_penalty=0.5, do_sample=False)
        found = light.beams(prompt, num_beams=4, num_return_sequences=2, length_penalty=0.5, max_new_tokens=12)
        for theirs, ours in zip(beams.sequences[:, len(prompt) :].tolist(), found, strict=True):
            assert list(ours.tokens) == theirs[: len(ours.tokens)]


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("persimmon", {}), pytest.param("olmo3", {"sliding_window": 6, "num_hidden_layers": 4}, marks=pytest.mark.slow)],
)
def test_models_without_a_spec_are_followed(
    kind: str, extra: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 288,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes | tokens | extra)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(tmp_path / "model")
    made = OVModelForCausalLM.from_pretrained(tmp_path / "model", export=True, ov_config=EXACT)
    assert f"no spec of models of type '{kind}'" in capsys.readouterr().err
    for settings in ({}, {"num_beams": 3}):
        expected = generate(model, do_sample=False, **settings).sequences.tolist()
        assert generate(made, do_sample=False, **settings).sequences.tolist() == expected
    made.save_pretrained(tmp_path / "ir")
    light = native.load(tmp_path / "ir", ov_config=EXACT)
    expected = generate(model, [PROMPT], do_sample=False).sequences[0, len(PROMPT) :].tolist()
    assert list(light.generate(PROMPT, max_new_tokens=12).tokens) == expected
    eight = OVModelForCausalLM.from_pretrained(tmp_path / "model", load_in_8bit=True, ov_config=EXACT)
    assert kinds(eight)["u8"] > 0 and 0 < distance(eight, model) < 1e-3
    packed = OVModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=lowbit.RtnConfig(), ov_config=EXACT
    )
    assert kinds(packed)["i4"] > 0 and 0 < distance(packed, model) < 0.1


def test_a_past_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LowbitError, match="keeps more of its past than keys and values"):
        OVModelForCausalLM.from_pretrained(tmp_path)


def test_groups_of_beams_and_draws_are_those_of_the_engine(tiny: Path, folder: Path) -> None:
    light = native.load(folder, ov_config=EXACT, slots=6)
    engine = lowbit.runtime.load(tiny, slots=6, cache="fp32", compute="fp32")
    for settings in (
        {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "num_return_sequences": 6},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "length_penalty": 0.0},
    ):
        ours, theirs = (each.beams(PROMPT, max_new_tokens=10, **settings) for each in (light, engine))
        assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
        np.testing.assert_allclose([a.score for a in ours], [a.score for a in theirs], **CLOSE)
    for settings in ({"temperature": 0.9, "seed": 5}, {"top_p": 0.8, "seed": 6, "repetition_penalty": 1.2}):
        assert light.generate(PROMPT, **settings).tokens == engine.generate(PROMPT, **settings).tokens
    talk = [{"role": "user", "content": "hello"}]
    assert light.chat(talk, max_new_tokens=9).text == engine.chat(talk, max_new_tokens=9).text


@torch.no_grad()
def test_adapters_are_those_of_peft(tiny: Path, folder: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    torch.manual_seed(0)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **common)
    )
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    model.add_adapter(
        "two", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True, **patterns, **common)
    )
    model.save_pretrained(tmp_path)
    light = native.load(folder, ov_config=EXACT, adapters={"one": tmp_path, "two": tmp_path / "two"})
    tokens = torch.tensor([PROMPT])

    def expected(*names: str) -> np.ndarray:
        model.base_model.set_adapter(list(names))
        return model(tokens).logits[0].numpy()

    np.testing.assert_allclose(light.logits(PROMPT, adapters="one"), expected("default"), **CLOSE)
    np.testing.assert_allclose(light.logits(PROMPT, adapters="two"), expected("two"), **CLOSE)
    np.testing.assert_allclose(light.logits(PROMPT), expected("default", "two"), **CLOSE)
    with model.disable_adapter():
        np.testing.assert_allclose(light.logits(PROMPT, adapters=()), model(tokens).logits[0].numpy(), **CLOSE)
    model.set_adapter("default")
    fused = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(light.generate(PROMPT, adapters="one", max_new_tokens=12).tokens) == fused


@torch.no_grad()
def test_an_adapter_over_weights_whose_inputs_are_in_another_order(tmp_path: Path) -> None:
    """GPTQ with its columns ordered by activation: the adapter takes the inputs as they come."""
    source = ready_made(tmp_path / "gptq", "gptq", lambda w: gptq_linear(w, act_order=True), desc_act=True)
    lowbit.openvino.write_decoder(source, tmp_path / "ir", tokenizer=False)
    base = tiny_model_in_memory("llama")
    for name, parameter in base.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data = gptq_linear(parameter.data, act_order=True)[1]
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    tuned = peft.get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    light = native.load(tmp_path / "ir", ov_config=EXACT, adapters=tmp_path / "adapter")
    expected = tuned(torch.tensor([PROMPT])).logits[0]
    np.testing.assert_allclose(light.logits(PROMPT), expected, rtol=1e-3, atol=1e-3)
    assert np.abs(light.logits(PROMPT, adapters=()) - expected.numpy()).max() > 0.1


@pytest.mark.slow
def test_a_real_model_answers_word_for_word(tmp_path: Path) -> None:
    """SmolLM2 in float32: greedy, by beams and in a conversation, as transformers' own."""
    source = reference_model("plain")
    lowbit.openvino.write_decoder(source, tmp_path / "ir", tokenizer=False)
    light = native.load(tmp_path / "ir", ov_config=EXACT, slots=4)
    heavy = OVModelForCausalLM.from_pretrained(tmp_path / "ir", ov_config=EXACT)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    for settings in ({}, {"num_beams": 4, "length_penalty": 0.7}):
        expected = model.generate(ids, max_new_tokens=24, do_sample=False, **settings)[0, ids.shape[1] :]
        assert (
            heavy.generate(ids, max_new_tokens=24, do_sample=False, **settings)[0, ids.shape[1] :].tolist()
            == expected.tolist()
        )
        answer = light.chat(talk, max_new_tokens=24, **settings)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True) and "Paris" in answer.text
