"""`ipex.quantization`: configurations, the two stages, weights alone, tuning; on small models of no particular kind."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping

from interop.packed_linears import awq_linear, gptq_linear
from lowbit.compat.faces import intel_extension_for_pytorch as ipex
from lowbit.compat.faces.intel_extension_for_pytorch.nn.modules import WeightOnlyQuantizedLinear
from lowbit.compat.faces.intel_extension_for_pytorch.quantization import (
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
    autotune,
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._qconfig import compute_of, format_of
from lowbit.compat.faces.intel_extension_for_pytorch.quantization._weight_only import round_activations
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import CheckpointError
from lowbit.layers import LowBitConv, LowBitLinear

X = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A norm with channels of very different size (`uneven` times), two linears, and something between."""

    def __init__(self, uneven: float = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(48), nn.Linear(48, 96), nn.Linear(96, 16)
        with torch.no_grad():
            self.norm.weight[::8] *= uneven
            self.up.weight[:, ::8] /= uneven

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def error_of(model: Any, original: Any, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        expected = original(x)
        return float((model(x).float() - expected).norm() / expected.norm())


def calibrated(original: nn.Module, settings: Any, **inputs: Any) -> Any:
    prepared = prepare(original, settings, **(inputs or {"example_inputs": X[:1]}))
    with torch.no_grad():
        for part in X.split(16):
            prepared(part)
    return prepared


# --- weights alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(WoqLowpMode))
@pytest.mark.parametrize("kind", list(WoqWeightDtype))
def test_every_weight_type_in_every_lowp_mode(kind: WoqWeightDtype, mode: WoqLowpMode) -> None:
    if kind is WoqWeightDtype.FP8 and mode is WoqLowpMode.INT8:
        with pytest.raises(AssertionError, match="lowp_mode=INT8 with FP8 weights"):
            get_weight_only_quant_qconfig_mapping(weight_dtype=kind, lowp_mode=mode)
        return
    original = Small(1).eval()
    made: Any = convert(
        prepare(original, get_weight_only_quant_qconfig_mapping(weight_dtype=kind, lowp_mode=mode, group_size=16))
    )
    layer = made.up
    assert isinstance(layer, WeightOnlyQuantizedLinear) and layer._lowp_mode == mode
    assert layer.weight.dtype == {1: torch.int8, 4: torch.float8_e4m3fn}.get(int(kind), torch.uint8)
    assert layer.weight.shape == ((96, 48) if kind in (1, 4) else (96, 24))
    wanted = {WoqLowpMode.NONE: "fp32", WoqLowpMode.FP16: "fp16", WoqLowpMode.BF16: "bf16", WoqLowpMode.INT8: "int8"}
    assert layer.packed_weight.compute == wanted[mode] and layer.packed_weight.kernel.name == "core"
    # What is computed is what the mode says: the exact product of the packed weight, of rounded sides, of rounded rows.
    dense, x = layer.packed_weight.dense(), torch.randn(7, 48)
    exact = x @ dense.t() + layer.bias
    found = layer(x)
    rounded = {WoqLowpMode.FP16: torch.float16, WoqLowpMode.BF16: torch.bfloat16}.get(mode)
    if rounded is not None:
        exact = x.to(rounded).float() @ dense.to(rounded).float().t() + layer.bias
    off = float((found - exact).norm() / exact.norm())
    assert 1e-4 < off < 0.02 if mode is WoqLowpMode.INT8 else off < 1e-5
    limit = 0.12 if kind in (WoqWeightDtype.INT4, WoqWeightDtype.NF4) else 0.04
    assert error_of(made, original) < limit
    assert type(original.up) is nn.Linear


def test_groups_and_schemes_become_formats() -> None:
    def name(**given: Any) -> str:
        return format_of(get_weight_only_quant_qconfig_mapping(**given).global_qconfig).name

    assert name() == "int8_asym_channel"
    assert name(weight_dtype=WoqWeightDtype.INT8, lowp_mode=WoqLowpMode.INT8) == "int8_channel"
    assert name(weight_dtype=WoqWeightDtype.INT4, group_size=128) == "int4_asym_g128"
    assert (
        name(weight_dtype=WoqWeightDtype.INT4, weight_qscheme=WoqWeightQScheme.SYMMETRIC, group_size=32) == "int4_g32"
    )
    assert name(weight_dtype=WoqWeightDtype.NF4) == "nf4_channel"
    assert name(weight_dtype=WoqWeightDtype.FP8) == "fp8_e4m3_channel"
    with pytest.warns(CompatWarning, match=r"torch\.qint8 for weights alone is WoqWeightDtype\.INT8"):
        assert name(weight_dtype=torch.qint8) == "int8_asym_channel"
    settings = get_weight_only_quant_qconfig_mapping().global_qconfig
    assert isinstance(settings, ipex.quantization.QConfigWoq)
    assert settings.act_quant_mode == WoqActQuantMode.NONE
    assert [compute_of(settings, d) for d in (torch.float32, torch.bfloat16, torch.float16)] == ["fp32", "bf16", "fp16"]


def test_configurations_that_contradict_themselves() -> None:
    for given, words in (
        ({"weight_dtype": WoqWeightDtype.NF4, "weight_qscheme": WoqWeightQScheme.ASYMMETRIC}, "NF4 has no zero points"),
        ({"lowp_mode": WoqLowpMode.INT8, "weight_qscheme": WoqWeightQScheme.ASYMMETRIC}, "do not fit int8 products"),
        ({"group_size": 48}, "a power of 2, not 48"),
        ({"lowp_mode": 9}, "9 is no WoqLowpMode"),
        ({"weight_dtype": "int3"}, "'int3' is no WoqWeightDtype"),
        ({"weight_dtype": "int8"}, "'int8' is a text: write WoqWeightDtype.INT8"),
    ):
        with pytest.raises(AssertionError, match=words):
            get_weight_only_quant_qconfig_mapping(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes an alpha from 0 to 1, not 2"):
        get_smooth_quant_qconfig_mapping(alpha=2)
    observers = ("act_observer", "act_ic_observer", "wei_observer", "wei_ic_observer")
    with pytest.warns(CompatWarning) as said:
        get_smooth_quant_qconfig_mapping(**dict.fromkeys(observers, MinMaxObserver), share_weight_observers=False)
    assert all(any(name in str(w.message) for w in said) for name in (*observers, "share_weight_observers"))


@pytest.mark.parametrize("mode", [m for m in WoqActQuantMode if m >= 0])
def test_activations_are_rounded_as_the_mode_says(mode: WoqActQuantMode) -> None:
    x = torch.randn(5, 3, 48) * torch.rand(5, 3, 1)
    rounded = round_activations(mode, x, 16)
    assert rounded.shape == x.shape and 0 < float((rounded - x).norm() / x.norm()) < 0.02
    rows = rounded.view(15, 3, 16)
    kind = mode % 4
    # As many values as codes in whatever shares a scale, and more than that across what does not.
    shared = [rows.reshape(1, -1), rows.transpose(0, 1).reshape(3, -1), rows.reshape(15, -1), rows.reshape(45, -1)][
        kind
    ]
    assert all(len(part.unique()) <= 256 for part in shared)
    original = Small().eval()
    settings = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT8, lowp_mode=WoqLowpMode.INT8, act_quant_mode=mode, group_size=16
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)
        made: Any = convert(prepare(original, settings))
    inputs = torch.randn(6, 48)
    layer = made.up
    expected = round_activations(mode, inputs, 16) @ layer.packed_weight.dense().t() + layer.bias
    assert torch.allclose(layer(inputs), expected, rtol=1e-3, atol=1e-3)
    assert layer._act_quant_mode == mode


def test_linears_made_by_hand() -> None:
    from lowbit.compat.faces.intel_extension_for_pytorch.llm.quantization import (
        IPEXWeightOnlyQuantizedLinear,
        QuantDtype,
        QuantMethod,
    )

    linear = nn.Linear(96, 48)
    x = torch.randn(4, 96)
    assert WeightOnlyQuantizedLinear.from_float(linear) is linear
    linear.qconfig = get_weight_only_quant_qconfig_mapping(lowp_mode=WoqLowpMode.BF16).global_qconfig  # type: ignore[assignment]
    made: Any = WeightOnlyQuantizedLinear.from_float(linear)
    assert made._lowp_mode == WoqLowpMode.BF16 and error_of(made, linear, x) < 0.02 and "lowp_mode=bf16" in repr(made)
    for write, method in ((gptq_linear, QuantMethod.GPTQ_GEMM), (awq_linear, QuantMethod.AWQ_GEMM)):
        tensors, meant = write(linear.weight.detach())
        known = {name: tensors.get(name) for name in ("qweight", "scales")}
        outer = IPEXWeightOnlyQuantizedLinear.from_weight(
            **known, zero_points=tensors["qzeros"], in_features=96, out_features=48, quant_method=method,
            dtype=QuantDtype.INT4, bias=linear.bias,
        )  # fmt: skip
        assert torch.allclose(outer(x), x @ meant.t() + linear.bias, atol=0.05)
    tensors, meant = gptq_linear(linear.weight.detach())
    inner = WeightOnlyQuantizedLinear.from_float_and_qweight(
        linear, tensors["qweight"], WoqWeightDtype.INT4, tensors["scales"], tensors["qzeros"], g_idx=tensors["g_idx"]
    )
    assert torch.allclose(inner.packed_weight.dense(), meant, atol=1e-6) and inner.weight.dtype == torch.uint8


@pytest.mark.parametrize("kind", list(WoqWeightDtype))
def test_codes_by_hand(kind: WoqWeightDtype) -> None:
    weight = torch.randn(24, 64)
    for symmetric in (True, False):
        codes, scales, zeros = ipex.quantization.quantize_per_channel(weight, kind, sym_quant=symmetric)
        again = ipex.quantization.dequantize_per_channel(codes, scales, zeros, kind, weight.shape)
        assert scales.shape == (24,) and float((again - weight).norm() / weight.norm()) < 0.2
        codes, scales, zeros = ipex.quantization.quantize_per_block(weight, kind, 16, sym_quant=symmetric)
        again = ipex.quantization.dequantize_per_block(codes, scales, zeros, kind, 16, weight.shape)
        assert scales.shape == (24, 4) and float((again - weight).norm() / weight.norm()) < 0.12


# --- weights and activations -----------------------------------------------------------------------------------------


def test_two_stages(tmp_path: Path) -> None:
    original = Small().eval()
    settings = get_smooth_quant_qconfig_mapping(alpha=0.5)
    assert isinstance(settings.global_qconfig, ipex.quantization.QConfigSmoothQuant)
    prepared = calibrated(original, settings)
    assert error_of(prepared, original) == 0
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    prepared.save_qconf_summary(qconf_summary=first)
    made: Any = convert(prepared)
    assert isinstance(made.up, LowBitLinear) and made.up.packed_weight.format.name == "w8a8_static"
    assert made.up.packed_weight.kernel.name == "core_fixed" and error_of(made, original) < 0.03
    assert not made._forward_pre_hooks and not made.up._forward_pre_hooks and not hasattr(made, "save_qconf_summary")
    by_keyword: Any = prepare(original, settings, example_kwarg_inputs={"x": X[:1]}, inplace=False)
    by_keyword.load_qconf_summary(qconf_summary=str(first))
    by_keyword.save_qconf_summary(qconf_summary=second)
    assert first.read_text() == second.read_text()
    observer = json.loads(first.read_text())[" "]["q_op_infos"]["0"]["activation_observer"]
    assert observer["name"] == "SmoothQuantActivationObserver" and observer["alpha"] == 0.5
    assert observer["smooth_quant_enabled"] is True and observer["dtype"] == "torch.quint8"
    again = convert(by_keyword)
    with torch.no_grad():
        assert torch.allclose(again(X), made(X), atol=1e-5)
    prepared(X)  # still there, and still in full precision
    assert error_of(prepared, original) == 0
    in_place = convert(prepared, inplace=True)
    assert in_place is prepared and error_of(in_place, original) < 0.03
    own = Small().eval()
    assert prepare(own, settings, example_inputs=(X[:1],), inplace=True) is own


def test_it_can_be_traced_and_frozen() -> None:
    original = Small().eval()
    made: Any = convert(calibrated(original, get_smooth_quant_qconfig_mapping()))
    weights: Any = convert(prepare(original, get_weight_only_quant_qconfig_mapping()))
    for model in (made, weights):
        with torch.no_grad():
            traced = torch.jit.freeze(torch.jit.trace(model, X[:2]))
            assert torch.allclose(traced(X), model(X), atol=1e-5)


def test_static_ranges_come_from_the_observer() -> None:
    original = Small(1).eval()
    static = ipex.quantization.default_static_qconfig_mapping
    for settings in (static, ipex.quantization.default_static_qconfig):
        assert error_of(convert(calibrated(original, settings)), original) < 0.05
    narrow = QConfig(
        activation=MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, dtype=torch.qint8),
        weight=PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
    )
    made: Any = convert(calibrated(original, narrow))
    low, high = made.up.packed_weight.tensors["input_range"].tolist()
    assert low == pytest.approx(-high * 128 / 127, rel=1e-3)
    partly = QConfigMapping().set_global(static.global_qconfig).set_module_name("down", None)
    made = convert(calibrated(original, partly))
    assert type(made.down) is nn.Linear and isinstance(made.up, LowBitLinear)


def test_dynamic_needs_no_calibration() -> None:
    original = Small(1).eval()
    for settings in (ipex.quantization.default_dynamic_qconfig_mapping, ipex.quantization.default_dynamic_qconfig):
        made: Any = convert(prepare(original, settings))
        assert made.up.packed_weight.format.name == "w8a8" and error_of(made, original) < 0.05


def test_a_convolution_and_a_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    both: list[Any] = []
    for folding in (False, True):
        configure = ipex.quantization.default_static_qconfig_mapping
        prepared = prepare(original, configure, example_inputs=x, bn_folding=folding)
        with torch.no_grad():
            prepared(x)
        both.append(convert(prepared))
    made = both[1]
    with torch.no_grad():
        assert torch.equal(both[0](x), made(x)) and isinstance(made[1], nn.BatchNorm2d)
    assert isinstance(made[0], LowBitConv) and made[0].packed_weight.format.bits == 8
    assert made[4].packed_weight.format.name == "w8a8_static" and error_of(made, original, x) < 0.05
    with torch.no_grad():  # as that library's examples go on
        torch.jit.freeze(torch.jit.trace(made, x)).save(tmp_path / "quantized.pt")
        loaded = torch.jit.load(tmp_path / "quantized.pt")
        torch.testing.assert_close(loaded(x), made(x), atol=1e-5, rtol=1e-4)


def test_the_wrong_stage_is_told(tmp_path: Path) -> None:
    original = Small().eval()
    settings = get_smooth_quant_qconfig_mapping()
    with pytest.raises(AssertionError, match="needs example_inputs or example_kwarg_inputs"):
        prepare(original, settings)
    with pytest.raises(AssertionError, match="not both"):
        prepare(original, settings, example_inputs=X, example_kwarg_inputs={"x": X})
    with pytest.raises(AssertionError, match="that nobody prepared"):
        convert(original)
    prepared: Any = prepare(original, settings, example_inputs=X[:1])
    with pytest.raises(AssertionError, match="has not been run yet"):
        convert(prepared)
    with pytest.raises(AssertionError, match="has not been run yet"):
        prepared.save_qconf_summary(qconf_summary=tmp_path / "a.json")
    with pytest.raises(AssertionError, match="is prepared already"):
        prepare(prepared, settings, example_inputs=X[:1])
    prepared(X)
    with pytest.raises(AssertionError, match="is low-bit already"):
        prepare(convert(prepared), settings, example_inputs=X[:1])
    with pytest.raises(AssertionError, match="takes a configuration of ipex"):
        prepare(original, "int8")
    for other in (get_weight_only_quant_qconfig_mapping(), ipex.quantization.default_dynamic_qconfig_mapping):
        alone: Any = prepare(original, other)
        for call in (alone.save_qconf_summary, alone.load_qconf_summary):
            with pytest.raises(
                AssertionError, match="a summary holds ranges of activations, and this configuration has none"
            ):
                call(qconf_summary=tmp_path / "a.json")
        assert not hasattr(convert(alone), "save_qconf_summary")
    prepared.save_qconf_summary(qconf_summary=tmp_path / "a.json")
    other = Small().eval()
    with torch.no_grad():
        other.down.weight.mul_(2)
    another: Any = prepare(other, settings, example_inputs=X[:1])
    with pytest.raises(CheckpointError, match="the weights of down are others"):
        another.load_qconf_summary(qconf_summary=tmp_path / "a.json")


def test_autotune_meets_a_criterion(capsys: Any) -> None:
    original = Small().eval()
    wanted = original(X).detach()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return 1 - float((model(X) - wanted).norm() / wanted.norm())

    def tuned(**given: Any) -> Any:
        return autotune(original, list(X.split(16)), eval_func=accuracy, sampling_sizes=[4], **given)

    prepared = tuned(accuracy_criterion={"relative": 0.03})
    assert accuracy(convert(prepared)) >= 0.97 and "keeps" in capsys.readouterr().out
    one = tuned(accuracy_criterion={"absolute": 0.5}, smoothquant_args={"alpha": 0.6}, tuning_time=0)
    assert one.lowbit_stage.alpha == 0.6
    calls: list[int] = []

    def calibrate(model: nn.Module) -> None:
        calls.append(1)
        model(X)

    with pytest.warns(CompatWarning, match="op_type_dict has no effect"):
        tuned(calib_func=calibrate, accuracy_criterion={"relative": 0.5}, op_type_dict={"linear": {}})
    assert calls == [1]
    # Only with a linear in full precision: what is left is named.
    strict = tuned(accuracy_criterion={"relative": 0.0065}, smoothquant_args={"alpha": [0.5]})
    assert sum(linear.is_left for linear in strict.lowbit_stage.summary()) == 1
    with pytest.raises(ValueError, match="none of 2 candidates keeps the accuracy of 1 within 0"):
        tuned(accuracy_criterion={"relative": 0.0}, smoothquant_args={"alpha": 0.5})
    with pytest.raises(AssertionError, match="needs eval_func"):
        autotune(original, [X])
    with pytest.raises(ValueError, match="a criterion is"):
        tuned(accuracy_criterion={"both": 1})
