"""Neural Compressor's configurations: every parameter and default, what each means, and models made and saved with them."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit import AutoRoundConfig, AwqConfig, GPTQConfig, RtnConfig, TeqConfig
from lowbit.configs.base import PILE, QuantizationMethod, WeightOnlyConfig
from lowbit.configs.classes import CONFIGS, saved_config
from lowbit.errors import CheckpointError, FormatError, RecipeError
from lowbit.options import AutoRoundOptions, AwqOptions, GptqOptions, TeqOptions
from unit.checkpoint_cases import EVEN, logits, make

Auto = lowbit.AutoModelForCausalLM
# The parameters that can be given by place, in their order, with their defaults: neural_compressor 3.10.
_SHARED = {"compute_dtype": None, "scale_dtype": None}
_TYPES = {"compute_dtype": None, "weight_dtype": None, "scale_dtype": None}
_TEXT = {"bits": 4, "tokenizer": None, "dataset": PILE}
SIGNATURES: dict[type[WeightOnlyConfig], dict[str, Any]] = {
    RtnConfig: {"bits": 4, "group_size": 32, **_SHARED, "sym": True, "use_layer_wise": None, "quant_lm_head": False},
    GPTQConfig: _TEXT
    | {"batch_size": 8, "group_size": 32, **_SHARED, "sym": True, "blocksize": 128, "damp_percent": 0.1}
    | {"desc_act": False, "n_samples": 128, "seq_len": 2048, "static_groups": False, "use_mse_search": False}
    | {"true_sequential": False, "use_layer_wise": None, "quant_lm_head": False},
    AwqConfig: _TEXT
    | {"group_size": 32, **_TYPES, "use_layer_wise": None, "n_samples": 128, "seq_len": 2048, "auto_scale": True}
    | {"auto_clip": True, "zero_point": True, "absorb_layer_dict": {}, "quant_lm_head": False, "backend": None},
    TeqConfig: _TEXT
    | {"group_size": 32, **_TYPES, "use_layer_wise": None, "n_samples": 128, "seq_len": 2048, "sym": True}
    | {"folding": False, "absorb_layer_dict": {}, "quant_lm_head": False},
    AutoRoundConfig: _TEXT
    | {"group_size": 128, **_TYPES, "sym": False, "lr": None, "minmax_lr": None, "disable_quanted_input": True}
    | {"n_samples": 128, "seq_len": 2048, "iters": 200, "use_layer_wise": None, "quant_lm_head": False}
    | {"quant_nontext_module": False, "truncation": False, "gradient_accumulate_steps": 1, "export_format": "itrex"},
}
PROSE = ["A page of a database holds rows, and every row holds columns. " * 20]
SHORT: dict[str, Any] = {"dataset": PROSE, "n_samples": 2, "seq_len": 16}
EXAMPLES: list[WeightOnlyConfig] = [
    RtnConfig(group_size=64),
    GPTQConfig(**SHORT, group_size=64),
    AwqConfig(**SHORT, group_size=64),
    TeqConfig(**SHORT, group_size=64),
    AutoRoundConfig(**SHORT, group_size=64, iters=4),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("configs") / "dense", **EVEN)


@pytest.mark.parametrize("kind", SIGNATURES, ids=lambda kind: kind.__name__)
def test_parameters_and_defaults_are_those_of_that_system(kind: type[WeightOnlyConfig]) -> None:
    places = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in places[1:]] == list(SIGNATURES[kind])
    config: Any = kind()
    assert {name: getattr(config, name) for name in SIGNATURES[kind]} == SIGNATURES[kind] | (
        {"weight_dtype": "int4"} if "weight_dtype" in SIGNATURES[kind] else {}
    )
    assert config.modules_to_not_convert == ["lm_head", "transformer.output_layer", "embed_out"]
    assert (config.device, config.weight_dtype, kind(bits=8).weight_dtype) == ("auto", "int4", "int8")
    assert config.quant_method is QuantizationMethod(config.quant_method.value) and config.to_diff_dict() == {}
    assert kind(quant_lm_head=True).modules_to_not_convert == [] and getattr(config, "batch_size", 8) == 8


def test_what_they_mean() -> None:
    recipe = RtnConfig(bits=3, group_size=-1, scale_dtype=torch.bfloat16, sym=False, quant_lm_head=True).to_recipe()
    assert (recipe.linear.name, recipe.head, recipe.rounder) == ("int3_asym_channel_bf16", recipe.linear, "rtn")
    assert RtnConfig().to_recipe().head is None and RtnConfig(modules_to_not_convert=["k_proj"]).to_recipe().skip == (
        "k_proj",
    )
    assert RtnConfig(weight_dtype="int4_fullrange").to_recipe().linear.name == "int4_g32"
    assert RtnConfig(weight_dtype="nf4").to_recipe().linear.name == "nf4_g32"
    assert RtnConfig(compute_dtype=torch.float16).compute == "fp16" and RtnConfig().compute == "auto"
    assert GPTQConfig(
        damp_percent=0.05, blocksize=64, desc_act=True, static_groups=True
    ).to_recipe().rounder_options == (
        GptqOptions(0.05, "activation", static_groups=True, true_sequential=False, block_columns=64)
    )
    awq = AwqConfig(auto_scale=False).to_recipe()
    assert (awq.linear.name, awq.scaler_options) == ("int4_asym_g32", AwqOptions(scale=False))
    assert AwqConfig(auto_scale=False, auto_clip=False).to_recipe().scaler == ""
    assert AwqConfig(zero_point=False).scheme == "sym" and TeqConfig().to_recipe().scaler_options == TeqOptions()
    for sym in (True, False):
        assert AwqConfig(sym=sym).sym is AwqConfig(sym=sym, zero_point=not sym).sym is sym
    tuned = AutoRoundConfig(calib_iters=50, lr=0.01, gradient_accumulate_steps=2, disable_quanted_input=False)
    assert tuned.to_recipe().rounder_options == AutoRoundOptions(50, 16, 0.01, enable_quanted_input=True)
    assert AutoRoundConfig().to_recipe().rounder_options == AutoRoundOptions(enable_quanted_input=False)


def test_what_changes_nothing_is_taken_with_one_line() -> None:
    with pytest.warns(UserWarning) as caught:
        config: Any = GPTQConfig(use_layer_wise=True, batch_size=4, block_size=64, desc_act=True)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("GPTQConfig: what changes nothing here is ignored: ") and "\n" not in message
    for name in ("use_layer_wise (", "batch_size (", "block_size (did you mean blocksize", "desc_act ("):
        assert name in message
    assert caught[0].filename == __file__ and config.batch_size == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPTQConfig(use_layer_wise=None, weight_dtype="int4", static_groups=True, desc_act=True)


IDLE: dict[tuple[type[WeightOnlyConfig], str], Any] = {
    (RtnConfig, "model_path"): "model",
    (RtnConfig, "use_layer_wise"): True,
    (GPTQConfig, "batch_size"): 4,
    (GPTQConfig, "use_mse_search"): True,
    (AwqConfig, "absorb_layer_dict"): {"norm": ["q_proj"]},
    (AwqConfig, "backend"): "inc",
    (TeqConfig, "folding"): True,
    (AutoRoundConfig, "export_format"): "auto_round",
    (AutoRoundConfig, "quant_nontext_module"): True,
    (AutoRoundConfig, "truncation"): True,
}


@pytest.mark.parametrize(("kind", "name"), IDLE)
def test_each_field_that_changes_nothing(kind: type[WeightOnlyConfig], name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{kind.__name__}: what changes nothing here is ignored: {name} \("):
        made = kind(**{name: IDLE[kind, name]})
    assert made.to_recipe() == kind().to_recipe() and vars(made)[name] == IDLE[kind, name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RtnConfig(bits=1), "RtnConfig takes 2 to 8 bits, and was given 1"),
        (lambda: GPTQConfig(bits=16), "takes 2 to 8 bits"),
        (lambda: RtnConfig(bits="4"), "2 to 8 bits, and was given '4'"),
        (lambda: AwqConfig(group_size=0), "a group_size from 1 up, or -1"),
        (lambda: RtnConfig(bits=4, weight_dtype="int8"), "bits=4 and weight_dtype='int8' contradict each other"),
        (lambda: RtnConfig(weight_dtype="nf4", sym=False), "only integer formats can be asymmetric"),
        (lambda: RtnConfig(scale_dtype="fp8"), "no scale_dtype 'fp8': did you mean"),
        (lambda: TeqConfig(compute_dtype="int9"), "no compute_dtype 'int9': did you mean int8"),
        (lambda: GPTQConfig(damp_percent=1.0), "damp_percent between 0 and 1"),
        (lambda: GPTQConfig(n_samples=0), "n_samples from 1 up, and was given 0"),
        (lambda: AutoRoundConfig(iters=100, calib_iters=50), "iters=100 and calib_iters=50 contradict each other"),
        (
            lambda: AwqConfig(sym=True, zero_point=True),
            "sym=True and zero_point=True contradict each other, .*: leave one of them out, or say zero_point=False for sym=True",
        ),
        (lambda: AwqConfig(sym=False, zero_point=False), "sym=False and zero_point=False contradict each other"),
        (lambda: AutoRoundConfig(lr=-1.0), "rates are positive"),
        (lambda: RtnConfig().update(bits=9), "takes 2 to 8 bits, and was given 9"),
    ],
)
def test_fields_that_contradict_one_another_or_are_out_of_range(make: Any, message: str) -> None:
    with pytest.raises((RecipeError, FormatError), match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.quant_method)
def test_they_return_from_their_saved_form(config: WeightOnlyConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "quantize_config.json").read_text())
    assert fields == config.to_dict() and fields["quant_method"] == config.quant_method
    again = saved_config(tmp_path)
    assert again is not None and again.to_dict() == config.to_dict() and type(again) is type(config)
    kind = type(config)
    assert kind.get_config_dict(tmp_path) == (fields, {}) and kind.from_json_file(
        tmp_path / "quantize_config.json"
    ).to_dict() == (fields)
    assert kind.from_dict(fields, return_unused_kwargs=True, bits=8, other=1)[1] == {"other": 1}
    assert config.update(device="cpu", nothing=1) == {"nothing": 1} and config.update(device="auto") == {}
    assert json.loads(config.to_json_string())["group_size"] == 64
    with pytest.raises(CheckpointError, match="name a folder"):
        config.save_pretrained(tmp_path / "quantize_config.json")


@pytest.mark.transformers
@pytest.mark.parametrize(
    "config",
    # TEQ trains for seconds.
    [pytest.param(c, marks=pytest.mark.slow) if isinstance(c, TeqConfig) else c for c in EXAMPLES],
    ids=lambda config: config.quant_method,
)
def test_models_are_made_saved_and_loaded(config: WeightOnlyConfig, dense: Path, tmp_path: Path) -> None:
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    model = Auto.from_pretrained(dense, quantization_config=config, for_inference=True, use_layer_wise=None)
    recipe = config.to_recipe()
    assert model.lowbit_report.formats() == {recipe.linear.name: 14} and model.lowbit_recipe == recipe
    assert type(model.lm_head) is torch.nn.Linear and model.quantization_config is config
    expected = logits(model)
    # Random weights of so small a model leave little room: four bits move its logits by a third.
    assert float((expected - logits(original)).norm() / logits(original).norm()) < 0.5
    model.save_pretrained(tmp_path / "saved")
    again = Auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), expected) and again.quantization_config.to_dict() == config.to_dict()
    again.save_low_bit(tmp_path / "twice")
    assert saved_config(tmp_path / "twice") is not None
    guide = {"do_sample": False, "temperature": 0.9, "num_beams": 4}
    assert again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, **guide).shape == (1, 6)


@pytest.mark.transformers
def test_the_arguments_of_that_systems_own_script(dense: Path) -> None:
    """run_generation_gpu_woq.py, with the device named that is here."""
    asked = {"compute_dtype": "fp16", "weight_dtype": "int4_fullrange", "group_size": 128, "scale_dtype": "fp16"}
    config = RtnConfig(**asked, quant_lm_head=True, use_layer_wise=None)
    more = {"trust_remote_code": False, "torch_dtype": torch.float16, "for_inference": False}
    model = Auto.from_pretrained(dense, device_map="cpu", quantization_config=config, **more)
    assert model.dtype == torch.float16 and model.lowbit_report.formats() == {"int4_g128": 15}
    assert {row.kernel for row in lowbit.explain(model).rows} == {"core"}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.slow
@pytest.mark.transformers
def test_without_a_tokenizer_or_a_data_set_they_take_what_is_there(dense: Path) -> None:
    """As the guide's example for AWQ, whose letter asks for 128 windows of 2048 tokens of a data set on the hub."""
    with pytest.warns(UserWarning) as caught:
        model = Auto.from_pretrained(dense, quantization_config=AwqConfig(bits=4, n_samples=4, auto_clip=False))
    messages = [str(one.message) for one in caught]
    assert any(f"{PILE} lies on the hub" in message and "lowbit's default text" in message for message in messages)
    assert any("windows of 2048 tokens are cut to the model's" in message for message in messages)
    assert any("awq" in row.note for row in model.lowbit_report.layers)


@pytest.mark.transformers
def test_contradictions_between_keywords(dense: Path, tmp_path: Path) -> None:
    for second in ({"load_in_low_bit": "nf4"}, {"load_in_8bit": True}, {"recipe": "int3"}):
        with pytest.raises(RecipeError, match=r"quantization_config=RtnConfig\(bits=4, ...\) and .* both say how"):
            Auto.from_pretrained(dense, quantization_config=RtnConfig(), **second)
    model = Auto.from_pretrained(dense, quantization_config=RtnConfig(), load_in_4bit=True, load_in_8bit=False)
    assert model.lowbit_report.formats() == {"int4_g32": 14}
    model.save_pretrained(tmp_path / "low")
    with pytest.warns(UserWarning, match="low-bit already and is loaded as it is"):
        again = Auto.from_pretrained(tmp_path / "low", quantization_config=GPTQConfig())
    assert isinstance(again.quantization_config, RtnConfig)


@pytest.mark.transformers
def test_where_models_are_quantised(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RtnConfig(group_size=64)
    monkeypatch.setenv("INC_TARGET_DEVICE", "CPU")
    assert Auto.from_pretrained(dense, quantization_config=config, device_map="cpu").device.type == "cpu"
    with pytest.raises(
        RecipeError, match="INC_TARGET_DEVICE=cpu quantises on one device, and device_map='auto' spreads"
    ):
        Auto.from_pretrained(dense, quantization_config=config, device_map="auto")
    monkeypatch.setenv("INC_TARGET_DEVICE", "tpu")
    with pytest.raises(
        RecipeError, match="INC_TARGET_DEVICE=tpu names no device to quantise on: it is one of cpu, cuda"
    ):
        Auto.from_pretrained(dense, quantization_config=config)
    monkeypatch.delenv("INC_TARGET_DEVICE")
    if not torch.xpu.is_available():
        for keywords in (
            {"quantization_config": config, "device_map": "xpu"},
            {"quantization_config": RtnConfig(device="xpu")},
        ):
            with pytest.raises(CheckpointError, match="torch sees no xpu device here"):
                Auto.from_pretrained(dense, **keywords)
        monkeypatch.setenv("INC_TARGET_DEVICE", "XPU")
        with pytest.raises(CheckpointError, match="torch sees no xpu device here"):
            Auto.from_pretrained(dense, quantization_config=config)


def test_every_class_is_a_row() -> None:
    assert set(CONFIGS) == {method.value for method in QuantizationMethod} and set(CONFIGS.values()) == set(SIGNATURES)
