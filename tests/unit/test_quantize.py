"""The driver: any model in, the same model with packed weights out, and a report that leaves nothing unsaid."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

from lowbit.errors import RecipeError, WeightError
from lowbit.formats import as_format
from lowbit.layers import LowBitExperts, LowBitLinear, packed_weights
from lowbit.models.walk import find_targets
from lowbit.quantize import quantize_
from lowbit.recipe import RECIPES, Recipe, recipe_named
from lowbit.report import Report

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
LLAMA = transformers.LlamaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2)
TIED = transformers.LlamaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2, tie_word_embeddings=True)
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "moe_intermediate_size": 96,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LLAMA,
    "tied": TIED,
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, **MOE),
    "mixtral": transformers.MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=4, num_key_value_heads=2),
    "gpt_oss": transformers.GptOssConfig(**SMALL, intermediate_size=64, num_local_experts=4, head_dim=16, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, bos_token_id=1, eos_token_id=2),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=200, word_embed_proj_dim=64
    ),
}  # fmt: skip
IDS = torch.arange(12).view(1, 12) * 7 % 200


def model_of(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():  # gpt_oss leaves its experts uninitialised, others leave biases at zero
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_model_computes_with_the_unpacked_weights(name: str) -> None:
    """int8 in small groups stays within one percent of the dense model, whatever the family."""
    model = model_of(name)
    with torch.no_grad():
        dense = model(IDS).logits
        quantize_(model, recipe_named("int8_g32"))
        packed = model(IDS).logits
    assert float((packed - dense).norm() / dense.norm()) < 0.02
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 15)


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_packed_and_routers_are_not(name: str) -> None:
    model = model_of(name)
    report = quantize_(model, recipe_named("int8_g32"))
    experts = [m for m in model.modules() if isinstance(m, LowBitExperts)]
    assert len(experts) == 2
    assert not [n for n, p in model.named_parameters() if p.dim() == 3]
    assert sum(row.role == "experts" for row in report.layers) == 4
    state = model.state_dict()
    assert any(key.endswith("experts.down_proj.codes") for key in state)


def test_tied_head_and_embedding_share_one_packed_weight() -> None:
    model = model_of("tied")
    report = quantize_(model, Recipe(as_format("int4"), head=as_format("int8"), embedding=as_format("int2")))
    assert model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
    assert model.lm_head.packed_weight.format.name == "int8"
    assert len(packed_weights(model)) == len(report.layers) == 15


def test_tied_weight_stays_when_either_name_is_skipped() -> None:
    model = model_of("tied")
    report = quantize_(model, recipe_named("int4").replace(skip=("lm_head",)))
    assert {row.path for row in report.skipped} == {"lm_head", "model.embed_tokens"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_overrides_and_skips_are_obeyed_and_reported() -> None:
    model = model_of("llama")
    recipe = recipe_named("int4").replace(
        skip=("layers.1",), overrides=((r"down_proj$", as_format("int8")), (r"q_proj$", None))
    )
    report = quantize_(model, recipe)
    formats = {row.path: row.format for row in report.layers}
    assert formats["model.layers.0.mlp.down_proj"] == "int8"
    assert formats["model.layers.0.mlp.up_proj"] == RECIPES["int4"].linear.name
    reasons = {row.path: row.reason for row in report.skipped}
    assert "modules_to_not_convert" in reasons["model.layers.1.mlp.down_proj"]
    assert "override" in reasons["model.layers.0.self_attn.q_proj"]
    assert set(formats) | set(reasons) == {target.path for target in find_targets(model_of("llama"))}


def test_report_counts_every_byte() -> None:
    model = model_of("llama")
    before = sum(p.nbytes for p in model.parameters())
    report = quantize_(model, recipe_named("int4"))
    after = sum(p.nbytes for p in model.parameters()) + sum(
        held.packed().nbytes for held in packed_weights(model).values()
    )
    assert report.bytes_before == before
    assert report.bytes_after == after
    assert Report.from_dict(report.to_dict()).to_dict() == report.to_dict()
    assert all(0 < row.error < 0.2 and row.kernel for row in report.layers)


def test_mixed_formats_take_the_better_one() -> None:
    model = model_of("llama")
    best = {row.path: row.error for row in quantize_(copy.deepcopy(model), recipe_named("mixed_fp4")).layers}
    for name in ("int4_g64", "fp4"):
        for row in quantize_(copy.deepcopy(model), Recipe(as_format(name))).layers:
            assert best[row.path] <= row.error * 1.0001


def test_kquants_fall_back_where_blocks_would_be_padding() -> None:
    model = nn.Sequential(nn.Linear(512, 32), nn.Linear(32, 8))
    report = quantize_(model, recipe_named("q4_k"))
    assert [row.format for row in report.layers] == ["q4_k", "int4_asym_g32"]
    assert "no multiple of 256" in report.layers[1].note


def test_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Embedding(5, 8))
    dense = copy.deepcopy(model)
    everything = Recipe(as_format("int8"), embedding=as_format("int8"), conv=as_format("int8"))
    report = quantize_(model, everything)
    assert [row.role for row in report.layers] == ["conv", "linear", "embedding"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model[:3](x), dense[:3](x), atol=0.05)
    assert not report.skipped


def test_searched_scales_beat_plain_ones() -> None:
    searched = quantize_(model_of("llama"), recipe_named("int4"))
    plain = quantize_(model_of("llama"), recipe_named("int4").replace(rounder="plain_rtn"))
    for better, worse in zip(searched.layers, plain.layers, strict=True):
        assert better.error < worse.error


def test_bad_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 5] = float("nan")
    with pytest.raises(WeightError, match=r"1 holds 1 values that are NaN or infinite \(the first at \[3, 5\]\)"):
        quantize_(model, recipe_named("int4"))


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no Linear"):
        quantize_(nn.Sequential(nn.ReLU()), recipe_named("int4"))
    with pytest.raises(RecipeError, match="modules_to_not_convert"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), recipe_named("int4").replace(skip=("0",)))


def test_a_packed_model_is_not_packed_twice() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, recipe_named("int4"))
    assert isinstance(model[0], LowBitLinear)
    with pytest.raises(RecipeError):
        quantize_(model, recipe_named("int8"))


@pytest.mark.parametrize("name", [*RECIPES, "nf4", "q4_k", "mixed_fp8", "gguf_q4k_m", "int3_asym_g32"])
def test_recipes_return_from_their_saved_form(name: str) -> None:
    recipe = recipe_named(name).replace(skip=("lm_head",), overrides=(("up_proj", as_format("nf4")), ("x", None)))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_recipe_errors_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean rtn"):
        Recipe(as_format("int4"), rounder="rnt")
    with pytest.raises(RecipeError, match="regular expression"):
        Recipe(as_format("int4"), overrides=(("(", None),))
    with pytest.raises(ValueError, match="did you mean int4"):
        recipe_named("imt4")


def test_a_layer_used_twice_is_packed_once_and_used_twice() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize_(model, recipe_named("int8"))
    assert isinstance(model[2], LowBitLinear) and model[2].packed_weight is model[0].packed_weight
    assert len(report.layers) == 1


def test_a_lone_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match="wrap it"):
        quantize_(nn.Linear(64, 64), recipe_named("int4"))


def test_hooks_stay_where_they_were_put() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].register_forward_hook(lambda module, inputs, output: output * 0)
    quantize_(model, recipe_named("int4"))
    assert not model(torch.randn(2, 64)).any()


def computed_weight(kind: str) -> nn.Module:
    """A model whose first layer is more than a matrix that stays."""
    first = nn.Linear(64, 64)
    if kind == "weight_norm":
        with pytest.warns(FutureWarning):
            first = nn.utils.weight_norm(first)
    elif kind == "parametrised":
        first = nn.utils.parametrizations.weight_norm(first)
    elif kind == "pruned":
        prune.l1_unstructured(first, "weight", 0.5)
    elif kind == "max_norm":
        return nn.Sequential(nn.Embedding(9, 64, max_norm=1.0), nn.Linear(64, 64))
    return nn.Sequential(first, nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("kind", "said"),
    [("weight_norm", "made anew"), ("parametrised", "made anew"), ("pruned", "made anew"), ("max_norm", "looked up")],
)
def test_weights_that_are_computed_are_left_and_named(kind: str, said: str) -> None:
    model = computed_weight(kind)
    report = quantize_(model, recipe_named("int8").replace(embedding=as_format("int8")))
    assert [row.path for row in report.layers] == ["1"]
    assert [row.path for row in report.skipped] == ["0"] and said in report.skipped[0].reason
    x = torch.arange(9) if kind == "max_norm" else torch.randn(2, 64)
    assert torch.isfinite(model(x)).all()


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Shifting(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight + 1, bias)


def test_subclasses_that_compute_something_else_are_left() -> None:
    model = nn.Sequential(Shifting(3, 8, 3), nn.Flatten(), Doubling(8 * 36, 16), nn.Linear(16, 4))
    x, dense = torch.randn(2, 3, 8, 8), copy.deepcopy(model)
    report = quantize_(model, recipe_named("int8_g1_fp32").replace(conv=as_format("int8")))
    assert [row.path for row in report.layers] == ["3"]
    assert {row.path: row.reason.split()[-1] for row in report.skipped} == {
        "0.weight": "Shifting",
        "2.weight": "Doubling",
    }
    assert torch.allclose(model(x), dense(x), rtol=1e-2, atol=1e-2)


def test_weights_without_a_shape_yet_are_told() -> None:
    with pytest.raises(RecipeError, match=r"0\.weight takes its shape from the first input"):
        quantize_(nn.Sequential(nn.LazyLinear(8)), recipe_named("int4"))


@pytest.mark.parametrize("size", [1e9, 1e-9])
def test_numbers_that_scales_do_not_hold_are_told(size: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(size)
    first, second = quantize_(copy.deepcopy(model), recipe_named("int8")).layers
    assert "its numbers are lost" in first.note and not second.note
    if size > 1:
        assert not any(row.note for row in quantize_(model, recipe_named("int8_bf16")).layers)


def test_bad_dense_weights_are_named_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with torch.no_grad():
        model[1].weight[3] = float("inf")
    with pytest.raises(WeightError, match=r"1.weight holds 1 values"):
        quantize_(model, recipe_named("int4"))


def test_plain_types_are_no_formats() -> None:
    with pytest.raises(ValueError, match="bf16 packs nothing"):
        recipe_named("bf16")


def test_weights_of_unknown_kinds_are_named() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "lstm": nn.LSTM(8, 8), "norm": nn.LayerNorm(64)})
    report = quantize_(model, recipe_named("int4"))
    reasons = {row.path: row.reason for row in report.skipped}
    assert "MultiheadAttention" in reasons["attention.in_proj_weight"]
    assert "LSTM" in reasons["lstm.weight_ih_l0"] and "norm.weight" not in reasons
    before = sum(p.nbytes for p in nn.ModuleDict({"a": nn.MultiheadAttention(64, 4), "l": nn.LSTM(8, 8)}).parameters())
    assert report.bytes_before == before + 2 * 64 * 4


def test_exceptions_that_meet_nothing_are_told() -> None:
    nowhere = recipe_named("int4").replace(skip=("nowhere",), overrides=((r"q_proj$", None), (r"qq_proj$", None)))
    with pytest.warns(UserWarning) as caught:
        quantize_(model_of("llama"), nowhere)
    assert [str(warning.message).partition(",")[0] for warning in caught] == [
        "no weight of this model has 'nowhere' in its path",
        "no path of this model matches the override 'qq_proj$'",
    ]
    fused = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64)
    )  # has none of the weights that recipes make exceptions of
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("int4", "gguf_q4k_m"):
            quantize_(copy.deepcopy(fused), recipe_named(name))
