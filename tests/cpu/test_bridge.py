"""`model.generate` through the engine: transformers' own tokens, and its own loop wherever the engine must not answer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.bridge import EngineGenerate
from lowbit.errors import LowbitError
from lowbit.layers import LowBitLinear, packed_weights
from lowbit_assets import FAMILIES, tiny_model_in_memory

pytestmark = pytest.mark.transformers
IDS = torch.arange(3, 14).view(1, -1)


def packed_model(family: str = "llama", low_bit: str = "int8_g32", cache: str = "fp32") -> Any:
    model: Any = tiny_model_in_memory(family).eval()
    lowbit.optimize_model(model, low_bit=low_bit, compute="fp32")
    assert isinstance(model.generate, EngineGenerate)
    model.generate.cache = cache
    return model


def own_generate(model: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    return type(model).generate(model, *arguments, **keywords)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str) -> None:
    model = packed_model(family)
    expected = own_generate(model, IDS, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=16, do_sample=False), expected)
    assert model.generate.why_not is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_plain_bf16_model_after_optimize_model(family: str) -> None:
    """The tokens are those of the same numbers in fp32: no activation is rounded."""
    model: Any = tiny_model_in_memory(family).eval()
    lowbit.optimize_model(model, low_bit="bf16")
    assert isinstance(model.generate, EngineGenerate) and model.dtype == torch.bfloat16
    model.generate.cache = "fp32"
    widened = copy.deepcopy(model).float()
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    expected = own_generate(widened, IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), expected)
    assert model.generate.why_not is None


@pytest.mark.parametrize(
    "keywords",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 8},
        {"bad_words_ids": [[5], [7, 9]]},
        {"attention_mask": torch.ones_like(IDS)},
        {"eos_token_id": [11, 12, 13]},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=6, repetition_penalty=1.2)},
    ],
    ids=lambda k: next(iter(k)),
)
def test_settings_that_the_engine_honours(keywords: dict[str, Any]) -> None:
    model = packed_model()
    limit = {} if "generation_config" in keywords else {"max_new_tokens": 12}
    expected = own_generate(model, input_ids=IDS, **limit, **keywords)
    assert torch.equal(model.generate(input_ids=IDS, **limit, **keywords), expected)
    assert model.generate.why_not is None


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 6])}, "mask hides"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0]])}, "mask hides"),
        ({"logits_processor": transformers.LogitsProcessorList([transformers.MinLengthLogitsProcessor(3, 2)])}, "logits_processor"),
        ({"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_time": 5.0}, "max_time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_the_engine_does_not_do_goes_to_transformers(keywords: dict[str, Any], reason: str) -> None:
    model = packed_model()
    out = model.generate(IDS, max_new_tokens=4, **keywords)
    assert reason in model.generate.why_not
    assert (out.sequences if hasattr(out, "sequences") else out).shape[1] <= 15


def test_training_and_hooks_go_to_transformers() -> None:
    model = packed_model()
    model.train()
    model.generate(IDS, max_new_tokens=2)
    assert "training mode" in model.generate.why_not
    model.eval()
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(IDS, max_new_tokens=2)
    assert "forward hooks" in model.generate.why_not and seen
    handle.remove()
    assert lowbit.explain(model).generate == "the engine of the compiled core, keys and values in fp32"


def test_low_bit_models_keep_the_cache_that_transformers_has() -> None:
    """The engine by itself takes int8 for such a model; `generate` promised transformers' tokens."""
    model: Any = tiny_model_in_memory("llama").eval()
    lowbit.optimize_model(model, low_bit="int4")
    assert lowbit.explain(model).generate == "the engine of the compiled core, keys and values in fp16"
    model.generate(IDS, max_new_tokens=2)
    assert model.generate.engine(20).cache == "fp16"


def test_formats_without_a_core_kernel_say_so() -> None:
    model: Any = tiny_model_in_memory("llama", hidden_size=256, intermediate_size=256).eval()
    lowbit.optimize_model(model, low_bit="w8a8", compute="fp32")
    out = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert "reference" in model.generate.why_not and out.shape == (1, 14)
    assert "transformers' own loop" in str(lowbit.explain(model))


def test_changed_weights_are_seen() -> None:
    model = packed_model()
    first = model.generate(IDS, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1.0)
    second = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert not torch.equal(first, second)
    assert torch.equal(second, own_generate(model, IDS, max_new_tokens=12, do_sample=False))
    model.load_state_dict(packed_model().state_dict())
    assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), first)


def test_sampling_repeats_under_torch_manual_seed_and_streams() -> None:
    model = packed_model()
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(model.generate(IDS, max_new_tokens=10, do_sample=True, temperature=0.8, top_k=20))
    assert torch.equal(*texts) and model.generate.why_not is None

    class Collect:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    out = model.generate(IDS, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.got == out[0].tolist() and streamer.ended


def test_copies_have_an_engine_of_their_own() -> None:
    model = packed_model()
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    other = copy.deepcopy(model)
    assert other.generate.model is other
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(other.generate(IDS, max_new_tokens=6, do_sample=False), expected)


def test_weights_are_held_once() -> None:
    model = packed_model()
    model.generate(IDS, max_new_tokens=2)
    _, weights = model.generate._parts
    packed = {held.tensors["prepared"].data_ptr() for held in packed_weights(model).values()}
    assert packed <= {matrix.address for matrix in weights.matrices.values()}


@pytest.mark.parametrize("length", [133, 126])
def test_a_text_beyond_the_learned_positions_is_said(length: int) -> None:
    """Whether the prompt is too long or the answer would be; the model answers afterwards."""
    model = packed_model("gpt2")
    with pytest.raises(LowbitError, match="more than the model's 128 learned positions"):
        model.generate(torch.full((1, length), 5), max_new_tokens=10, do_sample=False)
    expected = own_generate(model, IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)


# Relative to the logits of transformers over the same numbers in fp32. No two overlap, so none is another one's.
ERRORS = {"fp32": (0, 1e-5), "fp16": (1e-4, 2e-3), "bf16": (4e-3, 0.015), "int8": (0.015, 0.05)}


@pytest.mark.parametrize("low_bit", ["int4_g32", "nf4"])
def test_the_engine_computes_in_what_was_asked_for_as_the_layers_do(low_bit: str) -> None:
    ids = torch.arange(3, 43)
    for compute, (least, most) in ERRORS.items():
        model: Any = tiny_model_in_memory("llama").eval().float()
        lowbit.optimize_model(model, low_bit=low_bit, compute=compute)
        model.generate.cache = "fp32"
        plain: Any = tiny_model_in_memory("llama").eval().float()
        for name, module in model.named_modules():
            if isinstance(module, LowBitLinear):
                plain.get_submodule(name).weight.data = module.weight.float()
        with torch.no_grad():
            expected, layers = (m(ids.view(1, -1)).logits[0] for m in (plain, model))
        model.generate(ids.view(1, -1), max_new_tokens=2, do_sample=False)
        assert model.generate.why_not is None
        engine = model.generate.engine(len(ids))
        prompt = torch.from_numpy(engine.logits(ids.tolist()))
        engine.reset()
        tokens = torch.stack([torch.from_numpy(engine.decode(token)) for token in ids.tolist()])
        for found in (prompt, tokens):
            assert least <= float((found - expected).norm() / expected.norm()) < most, compute
            assert float((found - layers).norm() / expected.norm()) < max(least, most / 5), compute
        assert f"computed in {compute}" in str(lowbit.explain(model))


@pytest.mark.parametrize("low_bit", ["bf16", "fp32"])
def test_dense_weights_are_held_once_and_transposed_ones_turned(low_bit: str, tmp_path: Path) -> None:
    """GPT-2 keeps [in, out], the engine reads [out, in]: one storage serves both, and nobody who asks torch sees a difference."""
    model: Any = tiny_model_in_memory("gpt2").eval()
    lowbit.optimize_model(model, low_bit=low_bit)
    expected, weights = own_generate(model, IDS, max_new_tokens=6, do_sample=False), copy.deepcopy(model.state_dict())
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert model.generate.why_not is None
    engine, (_, held) = model.generate._engine, model.generate._parts
    assert {m.address for m in held.matrices.values()} <= {p.data_ptr() for p in model.parameters()}
    model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert model.generate._engine is engine
    assert torch.equal(own_generate(model, IDS, max_new_tokens=6, do_sample=False), expected)
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) and torch.equal(read[name], weights[name]), name


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False, "min_new_tokens": 12},
        {"do_sample": False, "repetition_penalty": 1.3, "bad_words_ids": [[3], [5, 7]]},
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
    ],
    ids=["least", "penalised", "drawn"],
)
def test_tokens_chosen_in_the_core_are_those_chosen_one_by_one(asked: dict[str, object]) -> None:
    """A streamer makes the engine hand out every token by itself; without one the core runs the whole loop."""

    class Silent:
        def put(self, tokens: torch.Tensor) -> None: ...
        def end(self) -> None: ...

    model = packed_model()
    ids = torch.tensor([[2, 9, 4, 11]])
    torch.manual_seed(5)
    alone = model.generate(ids, max_new_tokens=24, **asked)
    torch.manual_seed(5)
    handed_out = model.generate(ids, max_new_tokens=24, streamer=Silent(), **asked)
    assert model.generate.why_not is None
    assert torch.equal(alone, handed_out)
