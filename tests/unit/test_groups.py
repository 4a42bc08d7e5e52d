"""Scaling groups are found without class names, fold exactly, and what does not fold says why."""

import copy

import pytest
import torch
from torch import nn

from lowbit.models.capture import Call, run_block
from lowbit.models.folding import ScalingGroup, find_holder, fold_scale_
from lowbit.models.groups import find_groups, short_call
from unit.block_cases import CONFIGS, block_of

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = {
    ("input_layernorm", _QKV),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", _GATED),
    ("mlp.up_proj", ("mlp.down_proj",)),
}
FOUND: dict[str, set[tuple[str, tuple[str, ...]]]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA - {("post_attention_layernorm", _GATED)} | {("pre_feedforward_layernorm", _GATED)},
    "phi3": {
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", ("mlp.down_proj",)),
    },
    "olmo2": {("self_attn.v_proj", ("self_attn.o_proj",)), ("mlp.up_proj", ("mlp.down_proj",))},
    "cohere": {
        ("input_layernorm", _QKV + _GATED),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    },
    "opt": {
        ("self_attn_layer_norm", _QKV),
        ("self_attn.v_proj", ("self_attn.out_proj",)),
        ("final_layer_norm", ("fc1",)),
        ("fc1", ("fc2",)),
    },
    "gpt_neox": {
        ("input_layernorm", ("attention.query_key_value",)),
        ("attention.query_key_value", ("attention.dense",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    },
    "gpt2": {("ln_1", ("attn.c_attn",)), ("attn.c_attn", ("attn.c_proj",)), ("ln_2", ("mlp.c_fc",))},
    "gptj": {
        ("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),
        ("attn.v_proj", ("attn.out_proj",)),
    },
    "falcon": {
        ("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ("self_attention.query_key_value", ("self_attention.dense",)),
    },
    "mixtral": {
        ("input_layernorm", _QKV),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.experts.gate_up_proj",)),
        ("mlp.experts.gate_up_proj", ("mlp.experts.down_proj",)),
    },
    "deepseek_v2": {
        ("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        ("self_attn.kv_b_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", _GATED),
        ("mlp.up_proj", ("mlp.down_proj",)),
    },
}
REFUSED = {
    "olmo2": {_QKV: "block's own input", _GATED: "not linear"},
    "gpt_neox": {("mlp.dense_4h_to_h",): "not linear"},
    "gpt2": {("mlp.c_proj",): "not linear"},
    "gptj": {("mlp.fc_out",): "not linear"},
    "falcon": {("mlp.dense_4h_to_h",): "not linear"},
}


def random_scale(block: nn.Module, group: ScalingGroup) -> torch.Tensor:
    width = find_holder(block, group.linears[0]).read().shape[-1]
    generator = torch.Generator().manual_seed(1)
    size = (group.experts, width) if group.experts else (width,)
    return group.tie(torch.randn(size, generator=generator).mul(0.5).exp())


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_are_found_and_fold_exactly(family: str) -> None:
    block, call = block_of(family)
    groups, refusals = find_groups(block, short_call(block, call))
    assert {(group.previous, group.linears) for group in groups} == FOUND[family]
    expected = REFUSED.get(family, {})
    assert {refusal.linears for refusal in refusals} == set(expected)
    assert all(expected[refusal.linears] in refusal.reason for refusal in refusals)
    wanted = run_block(block, call)
    for group in groups:
        scale = random_scale(block, group)
        before = find_holder(block, group.linears[0]).read().clone()
        fold_scale_(block, group, scale)
        assert not torch.allclose(find_holder(block, group.linears[0]).read(), before)
    torch.testing.assert_close(run_block(block, call), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_norms_that_add_one_and_routers_are_known_by_their_numbers() -> None:
    block, call = block_of("gemma2")
    assert [g.offset for g in find_groups(block, call)[0]] == [1.0, 0.0, 1.0, 0.0]
    block, call = block_of("mixtral")
    by_previous = {group.previous: group for group in find_groups(block, call)[0]}
    assert by_previous["post_attention_layernorm"].others == ("mlp.gate",)
    assert by_previous["mlp.experts.gate_up_proj"].experts == 4


def test_heads_that_share_values_share_their_scale() -> None:
    block, call = block_of("llama")
    group = next(group for group in find_groups(block, call)[0] if group.previous == "self_attn.v_proj")
    assert group.rows is not None
    heads = group.rows.view(4, 16)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3])
    scale = group.tie(torch.arange(1.0, 65.0)).view(4, 16)
    torch.testing.assert_close(scale[0], scale[1])
    torch.testing.assert_close(scale[0], (torch.arange(1.0, 17.0) * torch.arange(17.0, 33.0)).sqrt())


def test_rows_shared_by_more_and_by_fewer_channels_get_one_scale_each() -> None:
    group = ScalingGroup((), "", rows=torch.tensor([2, 0, 2, 5, 2, 0]))
    scale = torch.tensor([[1.0, 2.0, 3.0, 7.0, 9.0, 8.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]], requires_grad=True)
    tied = group.tie(scale)
    torch.testing.assert_close(tied[0], torch.tensor([3.0, 4.0, 3.0, 7.0, 3.0, 4.0]))
    torch.testing.assert_close(tied[1], scale[1])
    tied.sum().backward()  # d/ds of n (s s' ..)^(1/n) is the mean over s
    torch.testing.assert_close(scale.grad[0], tied[0].detach() / scale[0].detach())
    alone = ScalingGroup((), "", rows=torch.tensor([3, 0, 1]))
    assert torch.equal(alone.tie(scale[0, :3]), scale[0, :3])


def test_a_fold_in_bfloat16_costs_nothing_at_the_norm() -> None:
    block, call = block_of("llama")
    half = copy.deepcopy(block).to(torch.bfloat16)
    group = next(g for g in find_groups(block, call)[0] if g.previous == "input_layernorm")
    norm, linear = half.get_submodule("input_layernorm").weight, half.get_submodule("self_attn.q_proj").weight
    product = norm.float() * linear.float()
    fold_scale_(half, group, random_scale(block, group))
    error = (norm.float() * linear.float() / product - 1).abs()
    assert error.max() <= 2**-8  # the linear's own rounding; with the norm's on top it would reach twice that


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_groups_are_found_in_half_precision(family: str, dtype: torch.dtype) -> None:
    block, call = block_of(family)
    moved = {key: _cast(value, dtype) for key, value in call.kwargs.items()}
    half = Call(tuple(_cast(value, dtype) for value in call.args), moved, call.slot)
    groups, _ = find_groups(block.to(dtype), half)
    assert {(group.previous, group.linears) for group in groups} == FOUND[family]


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_a_short_call_gives_the_first_tokens() -> None:
    for family in ("llama", "opt", "falcon"):
        block, call = block_of(family)
        long = call.with_hidden(call.hidden.repeat_interleave(2, 0)[:4])
        short = short_call(block, long)
        assert short.hidden.shape == (1, 32, 64)
        torch.testing.assert_close(run_block(block, short), run_block(block, long)[:1, :32], rtol=1e-4, atol=1e-4)


class _Leaky(nn.Module):
    """A norm whose output is read by a linear and added to what comes out: nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.idle = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = self.norm(x)
        return x + self.up(x), None


def test_what_reads_a_norm_beside_the_linears_is_noticed() -> None:
    torch.manual_seed(0)
    groups, refusals = find_groups(_Leaky(), Call((torch.randn(2, 5, 8),), {}))
    assert groups == []
    assert {r.linears: r.reason for r in refusals} == {
        ("up",): "folding into norm changes the block's output: something besides these weights reads its output",
        ("idle",): "no token of the trial reached it",
    }


class _Centred(nn.Module):
    """A norm of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) * self.weight


class _Unheard(nn.Module):
    """A block as no family has it, by names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r, self.s = _Centred(), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.p(x)
        return x + self.s(self.q(y) * self.r(y).sigmoid())


def test_a_block_of_classes_nobody_has_heard_of_is_known_by_its_numbers() -> None:
    torch.manual_seed(0)
    block, call = _Unheard(), Call((torch.randn(2, 5, 8),), {})
    groups, refusals = find_groups(block, call)
    assert {(group.previous, group.linears) for group in groups} == {("p", ("q", "r")), ("q", ("s",))} and not refusals
    wanted = run_block(block, call)
    for group in groups:
        fold_scale_(block, group, random_scale(block, group))
    torch.testing.assert_close(run_block(block, call), wanted)
