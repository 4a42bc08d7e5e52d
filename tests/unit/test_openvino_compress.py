"""compress_weights on graphs of any maker: every mode, the ratio, what is left out, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from lowbit.errors import RecipeError, WeightError
from lowbit.formats import format_from_name
from lowbit.grid import quantize, unpack
from lowbit.openvino import (
    AdvancedCompressionParameters,
    BackupMode,
    CompressWeightsMode,
    Dataset,
    GroupSizeFallbackMode,
    IgnoredScope,
    SensitivityMetric,
    compress_weights,
    compression_report,
)
from lowbit.openvino.activations import EXACT, collect
from lowbit.openvino.library import core, ops, ov
from lowbit.openvino.sites import find_sites, low_bit_weights
from lowbit.openvino.tracing import trace
from lowbit.search import Search

Mode = CompressWeightsMode
WIDE, NARROW = 128, 64


def inputs(rows: int = 2, length: int = 9) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(rows).integers(3, 96, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@cache
def graph(kind: Any = BertModel, output: str = "last_hidden_state") -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": WIDE, "hidden_size": NARROW}
    model = kind(BertConfig(vocab_size=96, max_position_embeddings=32, **sizes)).eval()
    example = {name: torch.from_numpy(value) for name, value in inputs().items()}
    return trace(model, example, [output]).model


def run(model: Any, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    return core().compile_model(model, "CPU", EXACT)(given or inputs())[0].copy()


def error(model: Any) -> float:
    expected = run(graph())
    return float(np.linalg.norm(run(model) - expected) / np.linalg.norm(expected))


def written(model: Any, folder: Path, halves: bool = False) -> Any:
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=halves)
    return core().read_model(folder / "openvino_model.xml")


def product(weight: np.ndarray, transposed: bool = False) -> Any:
    """x W^T with one weight [out, in], or stored as [in, out]."""
    x = ops.parameter([-1, weight.shape[1]], ov.Type.f32, name="x")
    held = ops.constant(np.ascontiguousarray(weight.T) if transposed else weight)
    held.set_friendly_name("w")
    return ov.Model([ops.result(ops.matmul(x, held, False, not transposed))], [x], "product")


# Mode -> format of the products, format of the rest, type of the constants, the most that outputs may move by.
MODES = {
    Mode.INT8_SYM: ("int8_channel", "int8_channel", "i8", 0.01),
    Mode.INT8_ASYM: ("int8_asym_channel", "int8_asym_channel", "u8", 0.01),
    Mode.INT4_SYM: ("int4_g32", "int8_asym_channel", "i4", 0.02),
    Mode.INT4_ASYM: ("int4_asym_g32", "int8_asym_channel", "u4", 0.02),
    Mode.INT3_SYM: ("int3_g32", "int8_asym_channel", "i4", 0.03),
    Mode.INT2_SYM: ("int2_g32", "int8_asym_channel", "u2", 0.05),
    Mode.NF4: ("nf4_g32", "int8_asym_channel", "nf4", 0.02),
    Mode.FP4: ("fp4_e2m1", "int8_asym_channel", "f4e2m1", 0.02),
    Mode.MXFP4: ("mxfp4", "mxfp8", "f4e2m1", 0.05),
    Mode.NVFP4: ("nvfp4", "fp8_e4m3_channel", "f4e2m1", 0.05),
    Mode.FP8_E4M3: ("fp8_e4m3_channel", "fp8_e4m3_channel", "f8e4m3", 0.04),
    Mode.MXFP8_E4M3: ("mxfp8", "mxfp8", "f8e4m3", 0.05),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_types_also_from_disk(mode: CompressWeightsMode, tmp_path: Path) -> None:
    format, backup, kind, most = MODES[mode]
    sized = {} if mode in (Mode.INT8_SYM, Mode.INT8_ASYM, Mode.FP8_E4M3, Mode.NVFP4) else {"group_size": 32}
    made = written(compress_weights(graph(), mode, **sized), tmp_path)
    report = compression_report(made)
    assert {row.format for row in report.layers if row.role == "embedding"} == {backup}
    products = [row for row in report.layers if row.role == "linear"]
    assert {row.format for row in products[:-1]} == {format} and products[-1].format == backup
    types = {node.get_element_type().to_string() for node in made.get_ops() if node.get_type_name() == "Constant"}
    assert kind in types and "f32" in types
    assert 0 < error(made) < most
    assert len(low_bit_weights(made)) == len(report.layers) == 15


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["int4_g64", "int8_channel"])
def test_codes_are_those_of_the_grid(name: str, transposed: bool) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    mode, group = (Mode.INT4_SYM, 64) if "4" in name else (Mode.INT8_SYM, None)
    made = compress_weights(product(weight.numpy(), transposed), mode, group_size=group, all_layers=True)
    found = run(made, {"x": np.eye(128, dtype=np.float32)}).T
    np.testing.assert_array_equal(found, unpack(quantize(weight, format_from_name(name), Search())).numpy())


def test_the_model_that_is_given_stays_as_it_was() -> None:
    before = run(graph())
    compress_weights(graph(), Mode.INT4_SYM, group_size=32)
    np.testing.assert_array_equal(run(graph()), before)
    assert not low_bit_weights(graph())


def test_halves_from_disk_are_read(tmp_path: Path) -> None:
    made = compress_weights(written(graph(), tmp_path, halves=True), Mode.INT4_SYM, group_size=32)
    assert len(compression_report(made).layers) == 15 and error(made) < MODES[Mode.INT4_SYM][3]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8])
def test_the_ratio_is_a_share_and_the_least_error(ratio: float) -> None:
    rows = compression_report(compress_weights(graph(), Mode.INT4_SYM, ratio, 32)).layers
    whole = {row.path: row for row in compression_report(compress_weights(graph(), Mode.INT4_SYM, 1.0, 32)).layers}
    may = [row for row in rows if whole[row.path].format == "int4_g32"]
    sizes = {row.path: row.shape[0] * row.shape[1] for row in may}
    chosen = {row.path for row in may if row.format == "int4_g32"}
    share = sum(sizes[path] for path in chosen) / sum(sizes.values())
    assert ratio <= share < ratio + 0.15
    # No weight that was spared could change places with an equally large one that was not, to anybody's gain.
    hurt = {path: whole[path].error for path in sizes}
    for inside in chosen:
        assert all(hurt[inside] <= hurt[out] + 1e-2 for out in set(sizes) - chosen if sizes[out] == sizes[inside])


@pytest.mark.parametrize("metric", list(SensitivityMetric))
def test_every_metric_chooses_within_the_ratio(metric: SensitivityMetric) -> None:
    made = compress_weights(
        graph(), Mode.INT4_SYM, 0.6, 32, dataset=Dataset([inputs(), inputs(3)]), sensitivity_metric=metric
    )
    formats = compression_report(made).formats()
    assert formats["int4_g32"] >= 4 and formats["int8_asym_channel"] >= 5


def test_activations_decide_which_weight_is_spared() -> None:
    """Of two weights that round equally badly, the one that meets the larger inputs in its worst columns is spared."""
    generator = np.random.default_rng(0)
    rough = generator.standard_normal((64, 64)).astype(np.float32)
    rough[:, :4] *= 30  # these columns make the others of their groups coarse
    x = ops.parameter([-1, 64], ov.Type.f32, name="x")
    loud = np.ones(64, np.float32)
    loud[4:32] = 100
    results = []
    for name, scale in (("quiet", np.ones(64, np.float32)), ("loud", loud)):
        held = ops.constant(rough.copy())
        held.set_friendly_name(name)
        results.append(ops.result(ops.matmul(ops.multiply(x, ops.constant(scale)), held, False, True)))
    model = ov.Model(results, [x], "two")
    data = [generator.standard_normal((32, 64)).astype(np.float32)]
    made = compress_weights(model, Mode.INT4_SYM, 0.5, 32, all_layers=True, dataset=data)
    formats = {row.path: row.format for row in compression_report(made).layers}
    assert formats["quiet"] == "int4_g32" and formats["loud"] == "int8_asym_channel"


def test_data_lessens_the_error_and_gptq_lessens_it_more() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((96, 128)).astype(np.float32)
    mixed = generator.standard_normal((128, 128)) * np.exp(generator.standard_normal(128))
    data = [(generator.standard_normal((512, 128)) @ mixed).astype(np.float32) for _ in range(2)]

    def left(**keywords: Any) -> float:
        made = compress_weights(product(weight), Mode.INT4_SYM, group_size=64, all_layers=True, **keywords)
        return float(np.linalg.norm(run(made, {"x": data[0]}) - data[0] @ weight.T))

    plain, weighted, gptq = left(), left(dataset=data, scale_estimation=True), left(dataset=data, gptq=True)
    assert weighted < 0.95 * plain and gptq < 0.8 * weighted
    assert left(dataset=data, scale_estimation=False) == plain


def test_statistics_are_those_of_the_inputs() -> None:
    model = product(np.eye(64, dtype=np.float32)[:8])
    data = [np.full((3, 64), 2, np.float32), np.full((1, 64), -2, np.float32)]
    seen = collect(model, list(find_sites(model)), data, 8, hessian=True)["w"]
    assert seen.statistics.tokens == 4 and len(model.outputs) == 1
    torch.testing.assert_close(seen.statistics.hessian, torch.full((64, 64), 8.0))
    torch.testing.assert_close(seen.variance, torch.full((64,), 3.0))


def test_what_is_named_is_left_out() -> None:
    scope = IgnoredScope(names=["pooler.dense"], patterns=[r"encoder\.layer\.0\..*"], types=["Gather"])
    report = compression_report(compress_weights(graph(), Mode.INT4_SYM, group_size=32, ignored_scope=scope))
    assert all(row.path.startswith("encoder.layer.1") for row in report.layers) and len(report.layers) == 6
    assert {row.reason for row in report.skipped} == {"ignored_scope names it"} and len(report.skipped) == 9


def test_backup_none_and_all_layers() -> None:
    kept = compression_report(compress_weights(graph(), Mode.INT4_SYM, group_size=32, backup_mode=BackupMode.NONE))
    assert kept.formats() == {"int4_g32": 11} and len(kept.skipped) == 4
    all_of_them = compression_report(compress_weights(graph(), Mode.INT4_SYM, group_size=32, all_layers=True))
    assert all_of_them.formats() == {"int4_g32": 15}


def test_a_tied_head_has_eight_bits() -> None:
    made = compress_weights(graph(BertForMaskedLM, "logits"), Mode.INT4_SYM, group_size=32)
    rows = {row.path: row for row in compression_report(made).layers}
    assert rows["bert.embeddings.word_embeddings"].format == "int8_asym_channel"
    assert rows["cls.predictions.transform.dense"].format == "int4_g32"


def test_a_group_that_does_not_divide_falls_back_as_asked() -> None:
    def of(fallback: GroupSizeFallbackMode, columns: int = 96) -> str:
        model = product(np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32))
        parameters = AdvancedCompressionParameters(group_size_fallback_mode=fallback)
        made = compress_weights(model, Mode.INT4_SYM, all_layers=True, advanced_parameters=parameters)
        return compression_report(made).layers[0].format

    assert of(GroupSizeFallbackMode.ADJUST) == "int4_g32"
    with pytest.raises(RecipeError, match=r"no group of 128 inputs, .* divides any of the 1 products"):
        of(GroupSizeFallbackMode.ADJUST, 72)
    assert of(GroupSizeFallbackMode.IGNORE) == "int8_asym_channel"
    with pytest.raises(RecipeError, match=r"groups of 128 do not divide w \[16, 96\]: take another group_size"):
        of(GroupSizeFallbackMode.ERROR)


def test_convolutions_are_stored_in_eight_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
    x = ops.parameter([1, 8, 9, 9], ov.Type.f32, name="x")
    y = ops.convolution(x, ops.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1])
    model = ov.Model([ops.result(y)], [x], "conv")
    made = compress_weights(model, Mode.INT4_SYM)
    (row,) = compression_report(made).layers
    assert (row.role, row.format, row.shape) == ("conv", "int8_asym_channel", [16, 72])
    given = {"x": np.random.default_rng(1).standard_normal((1, 8, 9, 9)).astype(np.float32)}
    np.testing.assert_allclose(run(made, given), run(model, given), atol=0.3)


def test_what_is_low_bit_is_not_rounded_again() -> None:
    made = compress_weights(graph(), Mode.INT8_ASYM)
    with pytest.raises(RecipeError, match=r"15 weights of this model are low-bit already .* load_in_8bit=False"):
        compress_weights(made, Mode.INT4_SYM)


REFUSED = {
    "a ratio is the share of 4-bit weights and INT8_SYM has none": {"mode": Mode.INT8_SYM, "ratio": 0.8},
    "a ratio of 80; it is a share": {"mode": Mode.INT4_SYM, "ratio": 80},
    "MXFP4 has groups of 32": {"mode": Mode.MXFP4, "group_size": 128},
    "a group size of 0": {"mode": Mode.INT4_SYM, "group_size": 0},
    "scale_estimation rounds by what the model is given: pass a dataset": {"scale_estimation": True},
    "gptq rounds by what the model is given": {"gptq": True},
    "lora_correction adds two products": {"lora_correction": True},
    "the metric mean_activation_variance looks at activations": {"sensitivity_metric": "mean_activation_variance"},
    "the dataset is empty": {"mode": Mode.INT4_SYM, "dataset": []},
    "an item of the dataset names text, and the model takes input_ids": {"dataset": [{"text": "a"}]},
    "an item of the dataset has 'hello' for input_ids, which takes numbers": {"dataset": ["hello"]},
    "CompressWeightsMode has no 'int5': did you mean": {"mode": "int5"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_one_sentence(sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        compress_weights(graph(), **REFUSED[sentence])


def test_a_broken_weight_and_a_torch_module_are_named() -> None:
    weight = np.ones((8, 64), np.float32)
    weight[3, 5] = np.nan
    with pytest.raises(WeightError, match=r"w holds 1 values that are NaN"):
        compress_weights(product(weight))
    with pytest.raises(RecipeError, match=r"takes an openvino.Model, not a Linear: a torch module becomes low-bit by"):
        compress_weights(torch.nn.Linear(4, 4))
    with pytest.raises(RecipeError, match="was not compressed by lowbit"):
        compression_report(graph())
