"""The engine without torch: a saved model answers as transformers would, streams, stops, and survives its callers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.formats import format_from_name
from lowbit.recipe import Recipe
from lowbit.runtime import Model, load
from lowbit.runtime.engine import Engine
from lowbit.runtime.slots import Slot
from lowbit_assets import smollm2_gguf, tiny_model

PROMPT = "Hello there"
FAMILIES = ("llama", "qwen3_moe", "gemma2", "gpt2", "phi3")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runtime")
    return {family: tiny_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Model:
    return load(folders["llama"], cache="fp32", compute="fp32")


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()


def greedy(reference: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = reference.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return ids[0, len(prompt) :].tolist()


# --- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], cache="fp32", compute="fp32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    prompt = model.tokenizer.encode(PROMPT)
    answer = model.generate(PROMPT, max_new_tokens=16, min_new_tokens=16)
    assert list(answer.tokens) == greedy(reference, prompt, 16)
    assert (answer.prompt_tokens, answer.finish) == (len(prompt), "length")


def test_chat_is_the_template_and_the_answer(
    model: Model, reference: transformers.PreTrainedModel, folders: dict[str, Path]
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Naïve 雪?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert model.chat_prompt(messages) == list(prompt)
    answer = model.chat(messages, max_new_tokens=8, min_new_tokens=8)
    assert list(answer.tokens) == greedy(reference, list(prompt), 8)
    assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert model.chat_prompt("Hi") == model.chat_prompt([{"role": "user", "content": "Hi"}])


def test_logits_and_log_probabilities(model: Model, reference: transformers.PreTrainedModel) -> None:
    prompt = model.tokenizer.encode(PROMPT)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert np.allclose(model.logits(PROMPT), expected.numpy(), atol=1e-4)
    scores = torch.log_softmax(expected[-1], -1)
    best = scores.topk(3)
    chosen = model.generate(PROMPT, max_new_tokens=1, log_probabilities=3).chosen[0]
    assert [token for token, _ in chosen.alternatives] == best.indices.tolist()
    assert [score for _, score in chosen.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert chosen.log_probability == pytest.approx(float(best.values[0]), abs=1e-4)
    assert model.generate(PROMPT, max_new_tokens=1).chosen[0].log_probability is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_embeddings_are_the_last_states(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], cache="fp32", compute="fp32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    prompt = model.tokenizer.encode(PROMPT)
    with torch.no_grad():
        states = reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].numpy()
    assert np.allclose(model.embed(PROMPT, normalize=False), states.mean(0), atol=1e-4)
    assert np.allclose(model.embed(PROMPT, "last"), states[-1] / np.linalg.norm(states[-1]), atol=1e-4)
    with pytest.raises(RecipeError, match="pooling='max' is unknown"):
        model.embed(PROMPT, "max")  # type: ignore[arg-type]


def test_draws_follow_the_seed(model: Model) -> None:
    drawn = {model.generate(PROMPT, max_new_tokens=12, temperature=1.5, seed=seed).tokens for seed in (1, 1, 2)}
    assert len(drawn) == 2


@pytest.mark.slow
def test_a_real_model_knows_paris() -> None:
    model = load(smollm2_gguf())
    assert "Paris" in model.generate("The capital of France is", max_new_tokens=12).text
    assert model.chat("What is the capital of France?", max_new_tokens=24).tokens


# --- streams and ends ------------------------------------------------------------------------------------------------


def test_pieces_add_up_to_the_answer(model: Model) -> None:
    answer = model.generate(PROMPT, max_new_tokens=20, ignore_end=True)
    pieces = list(model.stream(PROMPT, max_new_tokens=20, ignore_end=True))
    assert "".join(map(str, pieces)) == answer.text
    assert tuple(piece.chosen.token for piece in pieces) == answer.tokens
    assert [piece.finish for piece in pieces] == [None] * 19 + ["length"]


def test_a_stop_token_ends_the_answer_and_is_not_shown(model: Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=12, ignore_end=True)
    end = whole.tokens[6]
    first = whole.tokens.index(end)
    answer = model.generate(PROMPT, max_new_tokens=12, stop_tokens=[end])
    assert (answer.tokens, answer.finish) == (whole.tokens[: first + 1], "stop")
    assert answer.text == model.tokenizer.decode(whole.tokens[:first])
    longer = model.generate(PROMPT, max_new_tokens=12, stop_tokens=[end], min_new_tokens=10)
    assert len(longer.tokens) >= 10


def test_a_stop_string_may_cross_tokens(model: Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=24, ignore_end=True, bias=dict.fromkeys(range(68, 94), 50.0))
    stop = whole.text[5:8]
    assert len(whole.tokens) == 24 and whole.text.isascii()
    pieces = list(model.stream(PROMPT, max_new_tokens=24, stop=stop, bias=dict.fromkeys(range(68, 94), 50.0)))
    assert "".join(map(str, pieces)) == whole.text[: whole.text.index(stop)]
    assert pieces[-1].finish == "stop"
    assert len(pieces) == whole.text.index(stop) + 3


def test_the_context_ends_an_answer(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], context=20)
    answer = model.generate(list(range(5, 17)), max_new_tokens=100, ignore_end=True)
    assert (len(answer.tokens), answer.finish) == (8, "length")


def test_the_next_message_reads_only_what_is_new(model: Model) -> None:
    first = list(range(10, 40))
    model.generate(first, max_new_tokens=2)
    slot = model.slots[0]
    assert slot.common(np.array([*first, 7, 8], np.int32)) == 30
    assert slot.common(np.array([*first[:20], 7, 8], np.int32)) == 20
    model.forget()
    assert slot.common(np.array(first, np.int32)) == 0 and model.engine.length(0) == 0
    model.generate(first, max_new_tokens=2)
    again = model.generate([*first[:20], 7, 8], max_new_tokens=6, ignore_end=True)
    assert again.tokens == Fresh(model).generate([*first[:20], 7, 8], 6)


class Fresh:
    """Greedy answers of an engine whose cache is empty."""

    def __init__(self, model: Model) -> None:
        self.engine = model.engine

    def generate(self, prompt: list[int], count: int) -> tuple[int, ...]:
        slot = Slot(self.engine)
        slot.clear()
        tokens = np.array(prompt, np.int32)
        while len(tokens) < len(prompt) + count:
            tokens = np.append(tokens, np.int32(slot.advance(tokens).argmax()))
        return tuple(tokens[len(prompt) :].tolist())


# --- callers that misbehave ------------------------------------------------------------------------------------------


def test_a_reader_that_stops_leaves_the_engine_usable(model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=8, ignore_end=True).tokens
    stream = model.stream(PROMPT, max_new_tokens=100, ignore_end=True)
    next(stream)
    stream.close()
    abandoned = model.stream("something else", max_new_tokens=100)
    next(abandoned)
    assert model.generate(PROMPT, max_new_tokens=8, ignore_end=True).tokens == expected
    assert next(abandoned).chosen.token >= 0
    abandoned.close()
    assert model.slots[0].readers == 0


def test_streams_may_take_turns(model: Model) -> None:
    expected = [model.generate(p, max_new_tokens=6, ignore_end=True).tokens for p in (PROMPT, "other")]
    streams = [model.stream(p, max_new_tokens=6, ignore_end=True) for p in (PROMPT, "other")]
    turns = [[piece.chosen.token for piece in pair] for pair in zip(*streams, strict=True)]
    assert [tuple(row) for row in zip(*turns, strict=True)] == expected


def test_two_threads_at_once(model: Model) -> None:
    prompts = ["one", "another one"]
    expected = [model.generate(p, max_new_tokens=24, ignore_end=True).tokens for p in prompts]
    found: dict[str, tuple[int, ...]] = {}

    def work(prompt: str) -> None:
        found[prompt] = model.generate(prompt, max_new_tokens=24, ignore_end=True).tokens

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


def test_ctrl_c_ends_the_answer_and_not_the_model(model: Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=30, ignore_end=True).tokens
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for piece in model.stream(PROMPT, max_new_tokens=30, ignore_end=True):
            made.append(piece.chosen.token)
            if len(made) == 3:
                signal.raise_signal(signal.SIGINT)
    assert tuple(made) == expected[:3]
    assert model.generate(PROMPT, max_new_tokens=30, ignore_end=True).tokens == expected


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("half \ud83d", {}, "the prompt is no text in UTF-8"),
        ([5, 288], {}, "token 288 is outside the vocabulary of 288"),
        ([-1], {}, "token -1 is outside the vocabulary"),
        ([[5, 6], [7, 8]], {}, "one list of token numbers"),
        ([5] * 128, {}, "the prompt has 128 tokens and leaves no room for an answer in a context of 128"),
        (PROMPT, {"top_p": 1.5}, "top_p=1.5 is out of range"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 is out of range"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        (PROMPT, {"max_new_tokens": "3"}, "max_new_tokens='3' is out of range; use a whole number"),
        (PROMPT, {"top_k": 0.5}, "top_k=0.5 is out of range; use a whole number"),
        (PROMPT, {"temperature": "hot"}, "temperature='hot' is out of range; use a number"),
        (PROMPT, {"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan is out of range; use a finite"),
        (PROMPT, {"draft": "a name"}, "draft='a name' is no model"),
        (PROMPT, {"stop": ""}, "an empty stop string"),
        (PROMPT, {"max_new_token": 3}, "there is no setting 'max_new_token': did you mean max_new_tokens"),
        (PROMPT, {"num_beams": 3, "num_beam_groups": 2}, "3 beams do not divide into 2 groups"),
        (PROMPT, {"num_beams": 2}, "2 beams need as many slots and the model has 1: load it with slots=2"),
    ],
    ids=str,
)
def test_mistakes_are_said(model: Model, prompt: object, settings: dict[str, object], message: str) -> None:
    with pytest.raises(LowbitError, match=message.replace("(", "\\(")):
        model.generate(prompt, **settings)  # type: ignore[arg-type]


def test_a_prompt_beyond_the_sliding_window_is_refused_where_asked(folders: dict[str, Path]) -> None:
    model, whole = load(folders["gemma2"]), load(folders["llama"])
    window = model.spec.shortest_window
    assert window is not None and window < model.context - 1 and whole.spec.shortest_window is None
    fitting, long = [5] * window, [5] * (window + 1)
    said = f"the prompt has {window + 1} tokens and the model's sliding window shows {window}: shorten it"
    with pytest.raises(LowbitError, match=said):
        model.generate(long, max_new_tokens=2, within_window=True)
    with pytest.raises(LowbitError, match=said):
        next(model.stream(long, max_new_tokens=2, within_window=True))
    assert len(model.generate(fitting, max_new_tokens=2, within_window=True, ignore_end=True).tokens) == 2
    assert len(model.generate(long, max_new_tokens=2, ignore_end=True).tokens) == 2
    model.settings = model.settings.change(within_window=True)
    for call in (model.encode, model.logits, model.embed, model.beams):
        with pytest.raises(LowbitError, match=said):
            call(long)
    assert len(whole.generate(long, max_new_tokens=2, within_window=True, ignore_end=True).tokens) == 2


def test_mistakes_in_a_conversation_are_said(model: Model) -> None:
    with pytest.raises(LowbitError, match="the conversation is empty"):
        model.chat([])
    with pytest.raises(LowbitError, match="a message needs a role"):
        model.chat([{"content": "Hi"}])


def test_contexts_out_of_range_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="context=129 is out of range; this model was made for 1 to 128 tokens"):
        load(folders["llama"], context=129)


@pytest.mark.parametrize(
    ("format", "compute", "cache"),
    [
        (None, "auto", "fp16"),
        ("int4", "auto", "int8"),
        ("int4", "int8", "int8"),
        ("nf4", "auto", "int8"),
        ("int4", "fp32", "fp16"),
        ("int4", "bf16", "fp16"),
        (Recipe(format_from_name("int4"), overrides=((r"layers\.1\.self_attn\.v_proj", None),)), "auto", "fp16"),
        (Recipe(format_from_name("int4"), overrides=((r"mlp", None),)), "auto", "int8"),
    ],
    ids=["plain", "int4", "int8 products", "nf4", "fp32 products", "bf16 products", "plain values", "plain MLP"],
)
def test_the_cache_is_int8_where_the_products_of_keys_and_values_are(
    format: str | Recipe | None, compute: str, cache: str, folders: dict[str, Path]
) -> None:
    for family in ("llama", "gpt2"):
        if family == "gpt2" and isinstance(format, Recipe):
            continue  # its q, k and v are one weight
        model = load(folders[family], format=format, compute=compute)
        assert isinstance(model.engine, Engine) and model.engine.cache == cache
        named = load(folders[family], format=format, compute=compute, cache=cache)
        assert np.array_equal(model.logits([5, 6, 7]), named.logits([5, 6, 7]))
        assert model.embed([5, 6, 7]).tolist() == named.embed([5, 6, 7]).tolist()
    other = load(folders["llama"], format=format, compute=compute, cache="fp32")
    assert isinstance(other.engine, Engine) and other.engine.cache == "fp32"


def test_a_model_without_a_tokenizer_takes_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["llama"] / name).read_bytes())
    model = load(tmp_path)
    assert len(model.generate([5, 6, 7], max_new_tokens=3, ignore_end=True).tokens) == 3
    with pytest.raises(LowbitError, match="has no tokenizer"):
        model.generate("text")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged, copy it again"):
        load(tmp_path)


def test_settings_come_from_the_generation_config(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "eos_token_id": [2, 9], "max_new_tokens": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    settings = load(tmp_path).settings
    assert (settings.selection.temperature, settings.selection.top_k, settings.selection.top_p) == (0.5, 50, 0.9)
    assert (settings.stop_tokens, settings.max_new_tokens) == ((2, 9), 7)
    assert settings.change(do_sample=False).selection.temperature == 0


def test_nothing_of_torch_is_imported(folders: dict[str, Path]) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf', 'rich'): sys.modules[name] = None\n"
        "from lowbit.runtime import load\n"
        f"model = load({str(folders['llama'])!r}, format='int4')\n"
        "print(len(model.chat('Hello', max_new_tokens=5, ignore_end=True).tokens))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "5", done.stderr
