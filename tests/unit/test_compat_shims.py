"""What old scripts call, on today's transformers and peft: each row of the table of shims, used in the old way."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit.compat
from lowbit.compat import ignored
from lowbit.compat.shims.gone import MOVED_MODULES
from lowbit.compat.shims.trainer import ARGUMENTS
from lowbit.errors import LowbitError
from lowbit.layers import LowBitLinear
from lowbit_assets import reference_model
from unit.checkpoint_cases import EVEN, IDS, logits, make

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::lowbit.compat.ignored.CompatWarning"),
]


@pytest.fixture(autouse=True)
def old_world() -> Iterator[None]:
    with lowbit.compat.install(children=False):
        yield


# What transformers takes itself is not ours to translate: versions before the newest know some of these still.
ACCEPTED = inspect.signature(transformers.TrainingArguments.__init__).parameters
OLD = {
    name
    for name in (
        *(
            "per_gpu_train_batch_size",
            "evaluation_strategy",
            "warmup_ratio",
            "optim_of_old",
            "group_by_length",
            "no_cuda",
        ),
        *("use_ipex", "save_safetensors", "logging_dir", "overwrite_output_dir"),
    )
    if name not in ACCEPTED
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("shims") / "dense", **EVEN)


def test_training_arguments(tmp_path: Path) -> None:
    with pytest.warns(ignored.CompatWarning) as seen:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_gpu_train_batch_size=3,
            evaluation_strategy="steps",
            eval_steps=5,
            warmup_ratio=0.03,
            optim="adamw_hf",
            group_by_length=True,
            no_cuda=True,
            use_ipex=False,
            save_safetensors=False,
            logging_dir=str(tmp_path / "logs"),
            overwrite_output_dir=True,
            report_to=None,
            ddp_backend="ccl",
        )
    assert arguments.report_to in ("none", [], ["none"])
    assert arguments.eval_strategy == "steps" and arguments.use_cpu
    assert arguments.get_warmup_steps(1000) == 30 and arguments.per_device_train_batch_size == 3
    assert (
        arguments.optim == "adamw_torch"
        and arguments.ddp_backend is None
        and arguments.train_sampling_strategy == "group_by_length"
    )
    said = [str(warning.message) for warning in seen if warning.category is ignored.CompatWarning]
    assert "TrainingArguments(evaluation_strategy=) is called eval_strategy today" in said
    assert "TrainingArguments(report_to=None) is 'none' today" in said
    assert "TrainingArguments(ddp_backend='ccl') is None today" in said
    assert len(said) == len(OLD) + 2 and {warning.filename for warning in seen} == {__file__}


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in ACCEPTED])
def test_each_old_argument_is_taken(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "evaluation_strategy": "no",
        "xpu_backend": None,
        "torchdynamo": "eager",
        "push_to_hub_token": "none",
        "push_to_hub_model_id": "none",
    }
    given = {name: values.get(name, 1)}
    assert transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)


def test_a_class_made_from_training_arguments(tmp_path: Path) -> None:
    @dataclass
    class Own(transformers.TrainingArguments):
        cache_dir: str | None = field(default=None)

    for kind in (Own, transformers.Seq2SeqTrainingArguments):
        arguments = kind(output_dir=str(tmp_path), evaluation_strategy="epoch", use_cpu=True, report_to="none")
        assert arguments.eval_strategy == "epoch"
    with pytest.raises(TypeError, match="no_such_argument"):
        Own(output_dir=str(tmp_path), no_such_argument=1)  # type: ignore[call-arg]


def test_arguments_on_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--output_dir", str(tmp_path), "--evaluation_strategy=steps", "--warmup_ratio", "0.1", "--group_by_length"]
    flags += ["--no_cuda", "--logging_dir", "logs", "--report_to", "none", "--num_train_epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    (arguments,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses()
    assert arguments.eval_strategy == "steps" and arguments.get_warmup_steps(100) == 10 and arguments.use_cpu
    assert arguments.train_sampling_strategy == "group_by_length" and arguments.num_train_epochs == 2


def test_trainer_with_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), no_cuda=True, report_to="none")

    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            return model(**inputs).loss

    trainer = Own(model=model, args=arguments, tokenizer=tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tokenizer
    inputs = {"input_ids": IDS, "labels": IDS}
    assert float(trainer.compute_loss(model, inputs, num_items_in_batch=1).detach()) > 0


def test_llama_tokenizer_on_another_tokenizer() -> None:
    smol = reference_model("plain")
    tokenizer = transformers.LlamaTokenizer.from_pretrained(smol, trust_remote_code=True)
    expected = transformers.AutoTokenizer.from_pretrained(smol)
    assert tokenizer.decode(tokenizer("What is AI?")["input_ids"]) == "What is AI?"
    assert tokenizer("What is AI?")["input_ids"] == expected("What is AI?")["input_ids"]


def test_llama_tokenizer_on_its_own(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    transformers.LlamaTokenizer(vocabulary, [("▁", "a")]).save_pretrained(tmp_path)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ in ("LlamaTokenizer", "LlamaTokenizerFast")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [5]


def test_words_of_tokenizers_that_are_gone(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    one = tokenizer("hello", "there")
    assert tokenizer.encode_plus("hello", "there") == tokenizer.encode_plus("hello", text_pair="there") == one
    assert (
        tokenizer.encode_plus("hello", None, False).input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    )
    asked = {"padding": True, "return_tensors": "pt"}
    batch = tokenizer.batch_encode_plus(["hello", "a"], **asked)
    assert torch.equal(batch["input_ids"], tokenizer(["hello", "a"], **asked)["input_ids"])
    pairs = tokenizer.batch_encode_plus(batch_text_or_text_pairs=[("hello", "there"), ("a", "b")])
    assert pairs.input_ids == tokenizer(["hello", "a"], ["there", "b"]).input_ids
    with tokenizer.as_target_tokenizer():
        labels = tokenizer("hello").input_ids
    assert labels == tokenizer(text_target="hello").input_ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    assert tokenizer.additional_special_tokens == ["<one>", "<two>"]
    assert tokenizer.additional_special_tokens_ids == tokenizer.convert_tokens_to_ids(["<one>", "<two>"])


def test_chat_template_gives_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert isinstance(ids, torch.Tensor) and ids.shape[0] == 1
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == ids[0].tolist()
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(asked["input_ids"], ids)
    assert isinstance(tokenizer.apply_chat_template(chat, tokenize=False), str)


def test_keywords_of_loading(folder: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(folder, use_auth_token=None, resume_download=True, load_in_8bit=False, torch_dtype=torch.float32)
    assert not any(isinstance(module, LowBitLinear) for module in plain.modules())
    packed = {bits: load(folder, **{f"load_in_{bits}bit": True}, torch_dtype=torch.float32) for bits in (4, 8)}
    for model in packed.values():
        assert any(isinstance(module, LowBitLinear) for module in model.modules())
    distance = {bits: float((logits(model) - logits(plain)).norm()) for bits, model in packed.items()}
    assert 0 < distance[8] < distance[4] / 4
    if importlib.util.find_spec("bitsandbytes") is None:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        again = load(folder, quantization_config=config, torch_dtype=torch.float32)
        assert torch.equal(logits(again), logits(packed[8]))
    assert load(folder, torchscript=True)(IDS)[0].shape[:2] == IDS.shape
    with pytest.raises(TypeError, match="no_such_keyword"):
        load(folder, no_such_keyword=1)


@torch.no_grad()
def test_caches_as_tuples(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = model(IDS, use_cache=True)
    first = model(IDS[:, :-4], use_cache=True)
    past = first.past_key_values
    assert past[0][0].shape[2] == IDS.shape[1] - 4 == past.get_usable_length(4) == past.seen_tokens
    pairs = tuple((keys.clone(), values.clone()) for keys, values in past)
    assert [len(layer) for layer in past.to_legacy_cache()] == [2] * len(past)
    assert torch.equal(past.key_cache[1], past[1][0]) and torch.equal(past.value_cache[1], past[1][1])
    rest = model(IDS[:, -4:], past_key_values=pairs, use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, -4:], atol=1e-4, rtol=1e-4)
    made = transformers.DynamicCache.from_legacy_cache(pairs)
    again = model(IDS[:, -4:], past_key_values=made, use_cache=True)
    assert torch.equal(again.logits, rest.logits)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, past_key_values=pairs), expected)


def test_pipelines_that_are_gone(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = t5(len(tokenizer))
    ids = model.generate(**tokenizer("hello there", return_tensors="pt"), max_new_tokens=4)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    for task, name in (
        ("text2text-generation", "generated_text"),
        ("summarization", "summary_text"),
        ("translation_en_to_fr", "translation_text"),
    ):
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer)
        assert pipe("hello there", max_new_tokens=4) == [{name: expected}]
        assert pipe(["hello there", "hello there"], max_new_tokens=4) == [{name: expected}] * 2
    found = transformers.LlamaForQuestionAnswering.from_pretrained(folder)
    pipe = transformers.pipeline("question-answering", model=found, tokenizer=tokenizer)
    context = "the model runs on a CPU"
    answer = pipe(question="where?", context=context)
    assert answer["answer"] == context[answer["start"] : answer["end"]] and 0 < answer["score"] <= 1
    assert pipe({"question": "where?", "context": context}) == answer
    assert len(pipe(question=["where?", "what?"], context=context)) == 2
    with pytest.raises(KeyError):
        transformers.pipeline("no-such-task", model=found, tokenizer=tokenizer)


def test_names_that_are_elsewhere() -> None:
    from transformers.models.llama import modeling_llama

    assert modeling_llama.LlamaSdpaAttention is modeling_llama.LlamaAttention
    assert transformers.AutoModelForVision2Seq is transformers.AutoModelForImageTextToText
    assert callable(transformers.is_torch_tpu_available)
    assert transformers.CLIPFeatureExtractor is transformers.CLIPImageProcessor
    for place in (transformers.generation, transformers.generation.utils):
        assert place.GreedySearchDecoderOnlyOutput is place.SampleDecoderOnlyOutput is place.GenerateDecoderOnlyOutput
        assert place.BeamSearchEncoderDecoderOutput is place.GenerateBeamEncoderDecoderOutput
    for place in (transformers, transformers.generation, transformers.generation.logits_process):
        assert place.LogitsWarper is place.LogitsProcessor
    for place in (transformers, transformers.utils):
        assert place.is_ipex_available() and place.is_safetensors_available()
        assert not place.is_tf_available() and not place.is_flax_available()
        place.send_example_telemetry("run_clm", {}, framework="pytorch")
        assert place.get_full_repo_name("model", organization="owner") == "owner/model"
    for draws in (False, True):
        numbers = torch.zeros(2)
        with transformers.modeling_utils.no_init_weights(_enable=not draws):
            torch.nn.init.ones_(numbers)
        assert bool(numbers.all()) is draws
    weights = torch.nn.Parameter(torch.ones(2))
    for adamw in (transformers.AdamW, importlib.import_module("transformers.optimization").AdamW):
        (group,) = adamw([weights], lr=1e-4, correct_bias=True).param_groups
        assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-4, 1e-6, 0.0)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = transformers.NoSuchName


LLAMA = "transformers.models.llama.tokenization_llama"


@pytest.mark.parametrize(("old", "now"), (*MOVED_MODULES.items(), (f"{LLAMA}_fast", LLAMA)))
def test_modules_that_are_elsewhere(old: str, now: str) -> None:
    home = importlib.import_module(now)
    if importlib.import_module(old) is not home:
        pytest.skip(f"this transformers has {old} itself")
    assert [text for text in ignored._SAID if old in text] == [f"import {old} is {now} today"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformers.models.llama.tokenization_lama_fast")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("import transformers.onnx", "use torch.onnx.export"),
        ("from transformers.onnx import FeaturesManager", "use torch.onnx.export"),
        ("from transformers import onnx", "onnx"),
        ("from transformers.utils.fx import symbolic_trace", "use torch.export.export"),
    ],
)
def test_modules_that_are_gone(statement: str, said: str) -> None:
    with pytest.raises(ImportError, match=said):
        exec(statement)


def t5(words: int) -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=max(words, 40), decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def test_tokens_that_are_forced(folder: Path) -> None:
    model = t5(40)
    out = model.generate(IDS[:, :5].expand(2, -1), forced_decoder_ids=[(2, 9), (1, 7)], max_new_tokens=3)
    begun = torch.tensor([[0, 7, 9]] * 2)
    assert torch.equal(out[:, :3], begun)
    assert torch.equal(out, model.generate(IDS[:, :5].expand(2, -1), decoder_input_ids=begun, max_new_tokens=3))
    assert model.generate(IDS[:, :5], forced_decoder_ids=None, max_new_tokens=1).shape[1] == 2
    with pytest.raises(LowbitError, match="a token for each place"):
        model.generate(IDS[:, :5], forced_decoder_ids=[(2, 9)], max_new_tokens=3)
    with pytest.raises(LowbitError, match="has an encoder"):
        transformers.AutoModelForCausalLM.from_pretrained(folder).generate(IDS, forced_decoder_ids=[(1, 7)])


FEATURES = torch.zeros(1, 80, 60)


def whisper() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 30}
    special = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**sizes, **special, suppress_tokens=None, begin_suppress_tokens=None)
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_tokens_that_are_forced_on_whisper() -> None:
    """As Whisper's own decoder says what follows them, token by token."""
    model, forced = whisper(), [(1, 7), (2, 9)]
    out = model.generate(FEATURES, forced_decoder_ids=forced, max_new_tokens=4, do_sample=False)
    begun = torch.tensor([[3, 7, 9]])
    with torch.no_grad():
        for _ in range(4):
            logits = model(FEATURES, decoder_input_ids=begun).logits[:, -1]
            begun = torch.cat([begun, logits.argmax(-1, keepdim=True)], 1)
    assert out[0].tolist()[-4:] == begun[0].tolist()[-4:]
    assert not hasattr(model.generation_config, "forced_decoder_ids") or not model.generation_config.forced_decoder_ids


def test_tokens_that_are_forced_on_a_packed_whisper(tmp_path: Path) -> None:
    """As scripts of ipex_llm say it: their `generate` hands transformers' a configuration by place."""
    whisper().save_pretrained(tmp_path)
    kind = importlib.import_module("ipex_llm.transformers").AutoModelForSpeechSeq2Seq
    model = kind.from_pretrained(str(tmp_path), load_in_4bit=True, optimize_model=False, use_cache=True)
    asked = {"max_new_tokens": 4, "do_sample": False}
    out = model.generate(FEATURES, forced_decoder_ids=[(1, 7), (2, 9)], **asked)
    begun = torch.tensor([[3, 7, 9]])
    with torch.no_grad():
        for _ in range(4):
            begun = torch.cat([begun, model(FEATURES, decoder_input_ids=begun).logits[:, -1:].argmax(-1)], 1)
    assert out[0].tolist()[-4:] == begun[0].tolist()[-4:]


def test_names_of_peft(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.import_utils import is_inc_available

    assert not is_inc_available()
    model = peft.prepare_model_for_int8_training(
        transformers.AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    )
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad) > 0
