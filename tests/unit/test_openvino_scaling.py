"""AWQ in a graph: where each scale goes, that it changes nothing but rounding, and that it lessens what rounding costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.algorithms.statistics import Statistics
from lowbit.errors import RecipeError
from lowbit.formats import format_from_name
from lowbit.openvino import CompressWeightsMode, compress_weights, compression_report, write_decoder
from lowbit.openvino.activations import collect
from lowbit.openvino.library import core, ops
from lowbit.openvino.opening import EXACT, read_model
from lowbit.openvino.scaling import ROWS, scale_inputs_
from lowbit.openvino.sites import find_sites
from lowbit_assets import tiny_model_in_memory
from unit.test_openvino_compress import product, run

Mode = CompressWeightsMode
DATA = [np.random.default_rng(seed).integers(3, 256, (1, 64)) for seed in range(4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A decoder some of whose channels are loud, as those of trained models are."""
    model = tiny_model_in_memory("llama")
    loud = torch.ones(64)
    loud[::9] = 12
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= loud
            layer.mlp.up_proj.weight[::11] *= 12
    folder = tmp_path_factory.mktemp("llama") / "out"
    write_decoder(model, folder, tokenizer=False)
    return read_model(folder)


def logits(model: Any, tokens: np.ndarray = DATA[0]) -> np.ndarray:
    request = core().compile_model(model, "CPU", EXACT).create_infer_request()
    places, order = np.arange(tokens.shape[1])[None], np.zeros(1, np.int32)
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": places, "beam_idx": order}
    return request.infer(given)["logits"][0].copy()


def test_a_scale_goes_where_it_costs_nothing(llama: Any) -> None:
    made = compress_weights(llama, Mode.INT4_SYM, group_size=32, dataset=DATA, awq=True)
    notes = {row.path: row.note for row in compression_report(made).layers}
    for layer in range(2):
        home = f"model.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert notes[f"{home}.{name}"].startswith("awq: ratio ") and notes[f"{home}.{name}"].endswith("norm before")
        assert notes[f"{home}.mlp.down_proj"].endswith(f"in {home}.mlp.up_proj")
        assert notes[f"{home}.self_attn.o_proj"].endswith(("by a product of its own", "no scale is better than none"))
    # What the plugin knows for one operation stays one.
    found: Counter[str] = Counter()
    for node in core().compile_model(made, "CPU", {}).get_runtime_model().get_ordered_ops():
        kind = node.get_rt_info()["layerType"].value
        found[
            kind + (f" {node.input_value(1).get_element_type().to_string()}" if kind == "FullyConnected" else "")
        ] += 1
    assert found["FullyConnected i4"] == 14 and found["RMS"] == 5 and found["ScaledDotProductAttention"] == 2


def test_scales_alone_change_nothing(llama: Any) -> None:
    model = llama.clone()
    sites = [site for site in find_sites(model) if site.role == "linear"][:-1]
    format = format_from_name("int4_g32")
    factors = scale_inputs_(
        sites, dict.fromkeys((s.name for s in sites), format), collect(model, sites, DATA, 4, False, ROWS)
    )
    assert len(factors.inputs) >= 12 and set(factors.outputs) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    for site in sites:
        weight = factors.applied(site.name, torch.from_numpy(site.read()))
        assert not torch.equal(weight, torch.from_numpy(site.read())) or site.name not in factors.inputs
        site.replace_(ops.constant(np.ascontiguousarray(weight.numpy())).output(0))
    expected = logits(llama)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("gptq", [False, True])
def test_it_lessens_what_rounding_costs(llama: Any, gptq: bool) -> None:
    expected = logits(llama)

    def left(**more: Any) -> float:
        made = compress_weights(llama, Mode.INT4_SYM, group_size=32, dataset=DATA, gptq=gptq, **more)
        return float(np.linalg.norm(logits(made) - expected) / np.linalg.norm(expected))

    assert left(awq=True) < left()  # which is rounded by the importance of inputs already


def test_with_a_ratio_the_rest_is_left_alone(llama: Any) -> None:
    made = compress_weights(llama, Mode.INT4_SYM, 0.5, 32, dataset=DATA, awq=True)
    rows = compression_report(made).layers
    assert all(("awq" in row.note) == (row.format == "int4_g32") for row in rows)
    assert {row.format for row in rows} == {"int4_g32", "int8_asym_channel"}
    assert float(np.linalg.norm(logits(made) - logits(llama)) / np.linalg.norm(logits(llama))) < 0.2


def test_an_input_of_the_model_is_divided_by_a_product_of_its_own() -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((96, 128)).astype(np.float32)
    loud = np.where(np.arange(128) % 16, 1, 40)
    data = [(generator.standard_normal((64, 128)) * loud).astype(np.float32) for _ in range(2)]
    made = compress_weights(product(weight), Mode.INT4_SYM, group_size=64, all_layers=True, dataset=data, awq=True)
    (row,) = compression_report(made).layers
    assert row.note.endswith("by a product of its own")
    plain = compress_weights(product(weight), Mode.INT4_SYM, group_size=64, all_layers=True, dataset=data)
    expected = data[0] @ weight.T
    errors = [np.linalg.norm(run(model, {"x": data[0]}) - expected) for model in (made, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_statistics_of_a_divided_input() -> None:
    x, scale = torch.randn(50, 8), torch.rand(8) + 0.5
    divided, direct = Statistics(8, "cpu"), Statistics(8, "cpu")
    divided.add_(x)
    direct.add_(x / scale)
    found = divided.divided(scale)
    assert found.tokens == 50
    for name in ("mean_square", "mean_size", "largest", "hessian"):
        torch.testing.assert_close(getattr(found, name), getattr(direct, name))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": Mode.INT4_SYM}, "awq rounds by what the model is given: pass a dataset"),
        ({"mode": Mode.CB4, "dataset": DATA}, "awq is for few bits .* leave it out with CB4"),
        ({"mode": Mode.INT8_ASYM, "dataset": DATA}, "awq is for few bits .* leave it out with INT8_ASYM"),
    ],
)
def test_what_cannot_be_is_one_sentence(llama: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        compress_weights(llama, awq=True, **asked)
