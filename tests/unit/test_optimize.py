"""optimize_model for any module, explain, and models without weights."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.core import calls
from lowbit.layers import LowBitConv, LowBitLinear


class Net(nn.Module):
    """A small residual network: convolutions, a norm with running statistics, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.last = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last((x + self.second(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made.norm.running_mean.normal_()
    return made.eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_any_module_with_convolutions_on_request() -> None:
    model, expected = net(), net()(IMAGE)
    assert lowbit.optimize_model(model, "int8") is model
    assert isinstance(model.last, LowBitLinear) and isinstance(model.first, nn.Conv2d)
    other = lowbit.optimize_model(net(), "int8", conv="int8")
    assert isinstance(other.first, LowBitConv) and isinstance(other.second, LowBitConv)
    assert torch.allclose(other(IMAGE), expected, atol=0.02)


def test_casts_and_nothing() -> None:
    assert lowbit.optimize_model(net(), "bf16").last.weight.dtype == torch.bfloat16
    untouched = lowbit.optimize_model(net(), None)
    assert type(untouched.last) is nn.Linear and untouched.last.weight.dtype == torch.float32


def test_unknown_keywords_are_named_and_wrong_models_refused() -> None:
    with pytest.warns(UserWarning, match="'roundr'.*rounder"):
        lowbit.optimize_model(net(), "int8", roundr="rtn")
    with pytest.warns(UserWarning, match="lightweight_bmm"):
        lowbit.optimize_model(net(), "int8", lightweight_bmm=True)
    with pytest.raises(lowbit.RecipeError, match="torch module"):
        lowbit.optimize_model("model")
    with pytest.raises(lowbit.RecipeError, match="floating point"):
        lowbit.optimize_model(net(), "int8", torch_dtype="int8")


def test_recipe_rounder_and_skips() -> None:
    recipe = lowbit.Recipe(lowbit.format_from_name("int4_g32"), rounder="plain_rtn")
    with pytest.raises(lowbit.RecipeError, match="nothing was packed"):
        lowbit.optimize_model(net(), modules_to_not_convert=["last"])
    model = lowbit.optimize_model(net(), recipe=recipe, conv="int8")
    assert model.lowbit_report.formats() == {"int8": 2, "int4_g32": 1}
    assert model.lowbit_recipe.rounder == "plain_rtn"
    with pytest.warns(UserWarning, match="low-bit already"):
        assert lowbit.optimize_model(model) is model


def test_save_and_fill_an_empty_model(tmp_path: Path) -> None:
    model = lowbit.optimize_model(net(), "int4", conv="nf4")
    model.save_low_bit(tmp_path / "net")
    assert (tmp_path / "net" / "lowbit.json").exists()
    with lowbit.low_memory_init():
        empty = Net().eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    filled = lowbit.load_low_bit(empty, tmp_path / "net")
    assert filled is empty and torch.equal(filled(IMAGE), model(IMAGE))
    filled.save_low_bit(tmp_path / "again")
    assert torch.equal(lowbit.load_low_bit(Net().eval(), tmp_path / "again")(IMAGE), model(IMAGE))


def test_filling_another_model_is_refused(tmp_path: Path) -> None:
    lowbit.optimize_model(net(), "int4").save_low_bit(tmp_path / "net")
    wider = net()
    wider.norm = nn.BatchNorm2d(17)
    with pytest.raises(lowbit.CheckpointError, match="norm"):
        lowbit.load_low_bit(wider, tmp_path / "net")
    with pytest.raises(lowbit.CheckpointError, match="does not have"):
        lowbit.load_low_bit(nn.Sequential(nn.Linear(4, 4)), tmp_path / "net")


@pytest.mark.parametrize("is_empty", [False, True])
def test_what_the_folder_lacks_does_not_stay_as_it_was(tmp_path: Path, is_empty: bool) -> None:
    lowbit.optimize_model(net(), "int4").save_low_bit(tmp_path / "net")
    file = tmp_path / "net" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".bias"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with lowbit.low_memory_init() if is_empty else nullcontext():
        model = Net()
    with pytest.raises(lowbit.CheckpointError, match=f"lacks {name}"):
        lowbit.load_low_bit(model, tmp_path / "net")


@pytest.mark.transformers
def test_transformers_model_without_weights(tmp_path: Path) -> None:
    import transformers

    from unit.checkpoint_cases import EVEN, logits, make

    folder = make("llama", tmp_path / "dense", **EVEN)
    model = lowbit.optimize_model(transformers.AutoModelForCausalLM.from_pretrained(folder))
    model.save_low_bit(tmp_path / "low")
    with lowbit.low_memory_init():
        empty = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(lowbit.load_low_bit(empty, tmp_path / "low")), logits(model))


def test_explain_names_kernels_and_refusals() -> None:
    explanation = lowbit.explain(lowbit.optimize_model(net(), "int8", conv="int8"))
    assert [row.path for row in explanation.rows] == ["first", "second", "last"]
    text = str(explanation)
    assert all(row.kernel in text for row in explanation.rows)
    for row in explanation.rows:
        assert all(reason for _, reason in row.refused)
    assert "no weight of this model is packed" in str(lowbit.explain(net()))
    assert "computed in" not in str(explanation)
    assert "computed in fp16" in str(lowbit.explain(lowbit.optimize_model(net(), "int8", compute="fp16")))


def test_explain_says_where_scales_are_folded() -> None:
    model = lowbit.optimize_model(net(), "int8")
    exact = lowbit.optimize_model(net(), "int8", compute="int8")
    try:
        calls.set_instruction_set("amx_emulated")
        assert "prefill: with more than 16 tokens, scales are folded" in str(lowbit.explain(model))
        assert "prefill" not in str(lowbit.explain(exact))
        calls.set_instruction_set("portable")
        assert "prefill" not in str(lowbit.explain(model))
    finally:
        calls.set_instruction_set(None)


def test_what_names_no_format_and_what_holds_no_numbers(tmp_path: Path) -> None:
    for wrong in (3, "", " "):
        with pytest.raises(lowbit.FormatError, match="names no format"):
            lowbit.optimize_model(net(), wrong)
    with pytest.raises(lowbit.RecipeError, match="by a part of their path"):
        lowbit.optimize_model(net(), modules_to_not_convert=[3])
    with pytest.warns(UserWarning, match="'atention' in its path"):
        lowbit.optimize_model(net(), modules_to_not_convert=["atention"])
    with pytest.raises(lowbit.RecipeError, match="meta device"):
        lowbit.optimize_model(net().to("meta"))
    narrow = lowbit.optimize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0)))
    assert [row.path for row in narrow.lowbit_report.layers] == ["0"]
    assert "zero wide" in narrow.lowbit_report.skipped[0].reason
    with pytest.raises(lowbit.CheckpointError, match="not low-bit"):
        lowbit.optimize_model(net(), "bf16").save_low_bit(tmp_path / "cast")
