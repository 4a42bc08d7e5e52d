"""Eight bits for weights and activations: a scale for each row, or a range for each layer that stands in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.blockwise import Where
from lowbit.calibration import Calibration
from lowbit.checkpoint import compressed
from lowbit.cli import OK, main
from lowbit.contents import ACTIVATIONS, REPORT
from lowbit.errors import CheckpointError, FormatError, LowbitError, RecipeError
from lowbit.formats import Format, format_from_name
from lowbit.grid import quantize, unpack
from lowbit.kernels import fixed_rows, reference
from lowbit.layers import LowBitLinear, PackedWeight
from lowbit.packing import PackedTensor
from lowbit.quantize import quantize_
from lowbit.recipe import Recipe, recipe_named
from lowbit.runtime import load as load_engine
from lowbit.schemes import scheme_of
from lowbit_assets import text, tiny_model, tiny_model_in_memory

IDS = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(IDS)
STATIC = recipe_named("w8a8_static").replace(scaler="smoothquant", head=None)
DYNAMIC = recipe_named("w8a8").replace(scaler="smoothquant", head=None)
PLACE = "model.layers.1.mlp.down_proj"


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(HELD_OUT).logits
    return result


def made(recipe: Recipe, family: str = "llama", **keywords: Any) -> Any:
    return lowbit.optimize_model(tiny_model_in_memory(family), recipe=recipe, calibration=CALIBRATION, **keywords)


def inner(model: Any, path: str = PLACE) -> LowBitLinear:
    module = model.get_submodule(path)
    assert isinstance(module, LowBitLinear)
    return module


def edit(folder: Path, ranges: Any) -> None:
    (folder / ACTIVATIONS).write_text(json.dumps({"ranges": ranges}))


# --- one layer -------------------------------------------------------------------------------------------------------


def test_a_range_has_256_steps_and_an_exact_zero() -> None:
    x = torch.linspace(-3, 3, 1001)
    found = reference.round_to_range(x, torch.tensor([-1.0, 2.0]))
    step = 3 / 255
    inside = (x >= -1) & (x <= 2)
    assert float((found - x)[inside].abs().max()) <= step * 1.01
    assert len(found.unique()) == 256 and 0.0 in found.tolist()
    assert float(found.min()) == pytest.approx(-1, abs=step) and float(found.max()) == pytest.approx(2, abs=step)
    assert torch.equal(reference.round_to_range(x, torch.tensor([0.0, 1.0]))[:500], torch.zeros(500))


def test_the_format_says_what_it_is() -> None:
    format = format_from_name("w8a8_static")
    assert format.fixed_range and format.act_bits == 8 and format.unfixed == format_from_name("w8a8")
    assert format.replace(scale_dtype="float32").name == "w8a8_static_fp32"
    with pytest.raises(FormatError, match="a fixed range is one of rounded activations"):
        Format("odd", 8, fixed_range=True)


@pytest.mark.parametrize("inputs", [20, 127, 128, 160, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_core_computes_what_the_reference_does(dtype: torch.dtype, inputs: int) -> None:
    torch.manual_seed(0)
    packed = quantize(torch.randn(48, inputs), format_from_name("w8a8_static"))
    fixed = PackedTensor(packed.format, packed.shape, **packed.tensors(), input_range=torch.tensor([-2.0, 2.5]))
    # Rows that reach both ends of the range, and rows that nowhere come near.
    x = (torch.randn(5, inputs) * torch.tensor([[1], [0.1], [1], [0.03], [0.3]])).to(dtype)
    expected = reference.run(x, reference.prepare(fixed), fixed.format, fixed.shape, "auto")
    by_hand = reference.round_to_range(x, fixed.input_range) @ unpack(fixed).t()
    assert torch.allclose(expected.float(), by_hand, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    buffers = fixed_rows.prepare(fixed)
    found = fixed_rows.run(x, buffers, fixed.format, fixed.shape, "auto")
    assert found.dtype == dtype and torch.allclose(
        found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3
    )
    if dtype == torch.float32:  # nothing is rounded but to the range
        assert (found - expected).norm(dim=1).le(1e-6 * expected.norm(dim=1)).all()
    again = fixed_rows.restore(buffers, fixed.format, fixed.shape)
    assert torch.equal(again.input_range, fixed.input_range) and torch.equal(again.codes, fixed.codes)
    ids = torch.tensor([3, 0])
    assert torch.equal(fixed_rows.rows(buffers, fixed.format, fixed.shape, ids), unpack(fixed)[ids])
    held = PackedWeight(fixed)
    held.set_dense_(held.dense() * 2)
    assert torch.equal(held.packed().input_range, fixed.input_range)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_both_kinds_are_near_the_original(family: str) -> None:
    expected = logits_of(tiny_model_in_memory(family))
    for recipe in (STATIC, DYNAMIC):
        model = made(recipe, family)
        error = float((logits_of(model) - expected).norm() / expected.norm())
        assert error < (0.1 if recipe is STATIC else 0.05)
        rows = model.lowbit_report.layers
        fixed = [row for row in rows if row.format == "w8a8_static"]
        assert bool(fixed) is (recipe is STATIC)
        assert all("inputs from -" in row.note or "inputs from 0" in row.note for row in fixed)
        for row in rows:
            if row.role == "experts":
                assert row.format == "w8a8" and ("no range of its own" in row.note) is (recipe is STATIC)


def test_ranges_hold_everything_that_was_seen() -> None:
    model = tiny_model_in_memory("llama")
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    quantize_(model, STATIC.replace(scaler=""), calibration=CALIBRATION)
    low, high = inner(model, "model.layers.0.self_attn.q_proj").packed_weight.packed().input_range.tolist()
    assert (low, high) == (pytest.approx(float(seen[0].min()), rel=1e-5), pytest.approx(float(seen[0].max()), rel=1e-5))


def test_what_has_no_range_says_so() -> None:
    model = made(STATIC.replace(head=format_from_name("w8a8_static")))
    (head,) = [row for row in model.lowbit_report.layers if row.role == "head"]
    assert head.format == "w8a8" and "its input has no range of its own" in head.note
    for call in (lambda: lowbit.optimize_model(tiny_model_in_memory("llama"), "w8a8_static"),):
        with pytest.raises(RecipeError, match="w8a8_static looks at activations and needs calibration tokens"):
            call()


@pytest.mark.transformers
@pytest.mark.parametrize("writer", ["save_low_bit", "save_pretrained"])
def test_ranges_are_text_that_may_be_edited(writer: str, tmp_path: Path) -> None:
    model = made(STATIC)
    expected = logits_of(model)
    getattr(model, writer)(tmp_path / "low")
    said = json.loads((tmp_path / "low" / ACTIVATIONS).read_text())["ranges"]
    assert len(said) == 14 and set(said[PLACE]) == {"low", "high"} and said[PLACE]["low"] < 0 < said[PLACE]["high"]
    load = lowbit.AutoModelForCausalLM.from_pretrained
    assert torch.equal(logits_of(load(tmp_path / "low")), expected)
    edit(tmp_path / "low", {PLACE: {"low": -0.01, "high": 0.01}})
    edited = load(tmp_path / "low")
    assert not torch.allclose(logits_of(edited), expected)
    assert inner(edited).packed_weight.packed().input_range.tolist() == [pytest.approx(-0.01), pytest.approx(0.01)]
    edited.save_low_bit(tmp_path / "again")
    again = json.loads((tmp_path / "again" / ACTIVATIONS).read_text())["ranges"]
    assert again[PLACE]["high"] == pytest.approx(0.01) and len(again) == 14
    # Without the file the ranges are those that are stored with the weights, as scales and zero points.
    (tmp_path / "low" / ACTIVATIONS).unlink()
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    assert torch.allclose(logits_of(alone), expected, atol=0.05) and not torch.allclose(
        logits_of(alone), logits_of(edited)
    )


@pytest.mark.transformers
def test_the_saved_form_is_compressed_tensors(tmp_path: Path) -> None:
    for recipe in (STATIC, DYNAMIC):
        model = made(recipe)
        for compact, method in ((False, "compressed-tensors"), (True, "lowbit")):
            model.save_low_bit(tmp_path / "low", compact=compact)
            said = json.loads((tmp_path / "low" / "config.json").read_text())["quantization_config"]
            assert said["quant_method"] == method
            again = lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "low")
            assert torch.equal(logits_of(again), logits_of(model))
            assert again.lowbit_report.formats() == model.lowbit_report.formats()
            if recipe is DYNAMIC:  # the engine reads both
                ids = HELD_OUT[0].tolist()
                engine = torch.from_numpy(load_engine(tmp_path / "low", cache="fp32").logits(ids)).float()
                assert torch.allclose(engine, logits_of(model)[0], atol=1e-3)
    mixed = made(DYNAMIC.replace(overrides=((r"k_proj$", format_from_name("int4_g32")),)))
    mixed.save_low_bit(tmp_path / "mixed")
    said = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert said["reason"] == "some layers round activations and others do not"


@pytest.mark.parametrize("name", ["w8a8", "w8a8_static", "w8a8_fp32"])
def test_int8_of_compressed_tensors_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    packed = quantize(torch.randn(24, 96), format_from_name(name))
    if packed.format.fixed_range:
        packed = PackedTensor(packed.format, packed.shape, **packed.tensors(), input_range=torch.tensor([-2.0, 3.1]))
    config = compressed.config_for({"a": packed.format}, None, [])
    assert compressed.unreadable(config) is None and config["format"] == "int-quantized"
    scheme = scheme_of("a", ("Linear",), config)
    assert scheme is not None
    again = compressed.from_tensors("a", compressed.to_tensors(packed), packed.shape, scheme)
    assert again.format == packed.format and torch.equal(again.codes, packed.codes)
    x = torch.randn(3, 96)
    runs = [reference.run(x, p.tensors(), p.format, p.shape, "auto") for p in (packed, again)]
    assert torch.allclose(runs[0], runs[1], atol=2e-2)
    with pytest.raises(CheckpointError, match="lacks its weight"):
        compressed.from_tensors("a", {"weight_scale": packed.scales}, packed.shape, scheme)


def test_a_torch_module_keeps_its_ranges(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 32)
            self.layers = torch.nn.ModuleList([Block(), Block()])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    ids = torch.randint(0, 50, (4, 8))
    model: Any = Model()
    lowbit.optimize_model(model, "w8a8_static", calibration=ids)
    model.save_low_bit(tmp_path / "low")
    with torch.no_grad():
        assert torch.equal(lowbit.load_low_bit(Model(), tmp_path / "low")(ids), model(ids))
        edit(tmp_path / "low", {"layers.0.inner": {"low": 0.0, "high": 0.5}})
        assert not torch.equal(lowbit.load_low_bit(Model(), tmp_path / "low")(ids), model(ids))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"model.layers.1.mlp.down_prj": {"low": -1, "high": 1}}, "has no range in this model: did you mean"),
        ({PLACE: {"low": 1, "high": 2}}, "a low of at most 0"),
        ({PLACE: {"low": -1}}, "a low of at most 0"),
        ({PLACE: {"low": 0, "high": 0}}, "is not empty"),
        ({PLACE: {"low": -1, "high": float("inf")}}, "a high of at least 0"),
        ([], 'has no "ranges"'),
    ],
)
def test_ranges_that_are_none_are_refused(tmp_path: Path, ranges: Any, message: str) -> None:
    made(STATIC).save_low_bit(tmp_path / "low")
    edit(tmp_path / "low", ranges)
    with pytest.raises(CheckpointError, match=message):
        lowbit.AutoModelForCausalLM.from_pretrained(tmp_path / "low")


def test_a_killed_run_keeps_its_ranges(tmp_path: Path) -> None:
    first, second = (tiny_model_in_memory("llama") for _ in range(2))
    for model in (first, second):  # the second finds both blocks finished
        quantize_(model, STATIC, calibration=CALIBRATION, where=Where(resume=tmp_path / "run"))
    assert torch.equal(logits_of(first), logits_of(second))


# --- who runs them ---------------------------------------------------------------------------------------------------


def test_the_engine_runs_rows_and_leaves_ranges(tmp_path: Path) -> None:
    dynamic, static = made(DYNAMIC), made(STATIC)
    dynamic.generate(HELD_OUT[:1], max_new_tokens=3, do_sample=False)
    assert dynamic.generate.why_not is None
    static.generate(HELD_OUT[:1], max_new_tokens=3, do_sample=False)
    assert "rounds its input to a fixed range" in static.generate.why_not
    assert {row.kernel for row in lowbit.explain(static).rows} == {"core_fixed"}
    static.save_low_bit(tmp_path / "low")
    assert not (tmp_path / "low" / "lowbit_engine.json").exists()
    with pytest.raises(LowbitError, match="rounds activations to the range of their layer"):
        load_engine(tmp_path / "low")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_model("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(text("sqlite_train")[:20000])
    given = ["--format", "w8a8_static", "--scaler", "smoothquant", "--calibration", str(tmp_path / "text.txt")]
    given += ["--samples", "8", "--length", "32", "--scaler-option", "search=false"]
    assert main(["quantize", str(dense), str(tmp_path / "low"), *given]) == OK
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "low")]) == OK
    shown = capsys.readouterr().out
    assert "rounded to the ranges of 14 layers in lowbit_activations.json" in shown and "w8a8_static" in shown
    assert main(["inspect", str(tmp_path / "low"), "--json"]) == OK
    assert len(json.loads(capsys.readouterr().out)["activation_ranges"]) == 14
    assert "alpha 0.5" in (tmp_path / "low" / REPORT).read_text()
    assert main(["generate", str(tmp_path / "low"), "--prompt", "a", "--max-new-tokens", "2"]) == OK
    assert "runs through transformers: w8a8_static rounds activations" in capsys.readouterr().err
