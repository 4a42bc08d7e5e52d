"""AWQ, SmoothQuant and TEQ: each leaves less error than rounding alone where activations have outliers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lowbit.algorithms.awq import clip_weight, scale_by_awq_, search_clip, search_scale
from lowbit.algorithms.rtn import round_by_search
from lowbit.algorithms.scaling import collect_inputs
from lowbit.algorithms.smoothquant import scale_by_smoothquant_, search_alpha, smooth
from lowbit.algorithms.statistics import Statistics
from lowbit.algorithms.table import BlockWork
from lowbit.algorithms.teq import scale_by_teq_, train_scales
from lowbit.algorithms.trials import GroupTrial, parent_of
from lowbit.errors import RecipeError
from lowbit.formats import Format, format_from_name
from lowbit.models.capture import Call, run_block
from lowbit.models.folding import ScalingGroup, find_holder
from lowbit.models.groups import find_groups, first_tensor
from lowbit.models.walk import dense_weights, find_targets, is_router
from lowbit.options import AwqOptions, SmoothQuantOptions, TeqOptions
from unit.block_cases import block_of

SCALERS: dict[str, Any] = {
    "awq": (scale_by_awq_, AwqOptions(steps=10)),
    "smoothquant": (scale_by_smoothquant_, SmoothQuantOptions()),
    "teq": (scale_by_teq_, TeqOptions(steps=25, rate=0.05)),
}


def work_of(family: str, format: str, outliers: bool = True) -> BlockWork:
    block, call = block_of(family, outliers)
    targets = find_targets(block)
    linears = [t.path for t in targets if t.role == "linear" and not is_router(t.path, t.module)]
    experts = [f"{t.path}.{suffix}" for t in targets if t.role == "experts" for suffix, _ in dense_weights(t)]
    chosen = format_from_name(format)
    return BlockWork(block, dict.fromkeys(linears, chosen), [call], experts=dict.fromkeys(experts, chosen))


def block_error(work: BlockWork, wanted: torch.Tensor) -> float:
    """The relative squared error of the block once its weights are rounded, linears by the importance of their inputs."""
    changed = {}
    for name, format in (work.formats | work.experts).items():
        holder = find_holder(work.block, name)
        inputs = collect_inputs(work.block, work.calls, holder.target.module)
        importance = inputs.mean_square if inputs and name in work.formats else None
        changed[holder.parameter] = holder.turn(round_by_search(holder.read().detach(), format, importance))
    with torch.no_grad():
        given = first_tensor(functional_call(work.block, changed, work.calls[0].args, work.calls[0].kwargs))
    return float((given - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("format", ["int4_g32", "int3_g32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "gpt_neox", "mixtral", "phi3"])
def test_a_scaled_block_rounds_better(family: str, format: str, scaler: str) -> None:
    work = work_of(family, format)
    wanted = run_block(work.block, work.calls[0])
    before = block_error(work, wanted)
    scale_block_, options = SCALERS[scaler]
    notes = scale_block_(work, options)
    assert block_error(work, wanted) < before
    assert set(notes) <= set(work.formats | work.experts)
    assert all(note.startswith(scaler) or note == "clipped" for note in notes.values())


def trial_of(work: BlockWork, previous: str, **options: Any) -> GroupTrial:
    group = next(g for g in find_groups(work.block, work.calls[0])[0] if g.previous == previous)
    return GroupTrial(work.block, group, work.formats, work.calls, options.pop("tokens", 4096), **options)


def test_a_group_is_judged_by_its_parent() -> None:
    block, call = block_of("llama")
    parents = {g.previous: parent_of(block, g) for g in find_groups(block, call)[0]}
    assert parents == {
        "input_layernorm": "self_attn",
        "self_attn.v_proj": "self_attn.o_proj",
        "post_attention_layernorm": "mlp",
        "mlp.up_proj": "mlp.down_proj",
    }
    block, call = block_of("gptj")
    assert parent_of(block, find_groups(block, call)[0][0]) == ""


def test_the_rounding_that_is_asked_for_is_the_one_that_is_scored() -> None:
    work = work_of("llama", "nf4_g32")
    seen: set[str] = set()

    def round(weight: torch.Tensor, format: Format, importance: torch.Tensor | None) -> torch.Tensor:
        seen.add(format.name)
        return weight

    trial = trial_of(work, "input_layernorm", round=round)
    scale, name = search_scale(trial, AwqOptions(steps=2))
    assert seen == {"nf4_g32"}
    assert scale is None and name == "no scale is better than none"  # nothing was lost, so nothing can be won


def test_no_scale_is_a_candidate_and_the_best_one_is_kept() -> None:
    trial = trial_of(work_of("llama", "int3_g32"), "post_attention_layernorm")
    scale, name = search_scale(trial, AwqOptions())
    assert scale is not None and name.startswith("ratio")
    assert trial.loss(scale) < trial.loss(None)
    narrow, _ = search_scale(trial, AwqOptions(duo="off"))
    assert narrow is not None and trial.loss(scale) <= trial.loss(narrow)


class Bowl:
    """A trial whose loss is least at one exponent of the inputs' size."""

    def __init__(self, exponent: float) -> None:
        self.exponent, self.tried = exponent, 0
        self.group, self.weights = ScalingGroup(("up",), previous=""), {"up": torch.ones(2, 4)}
        self.formats = {"up": format_from_name("int4_g32")}
        self.statistics = Statistics(4, torch.device("cpu"), hessian=False)
        self.statistics.add_(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))

    def loss(self, scale: torch.Tensor | None) -> float:
        self.tried += 1
        exponent = 0.0 if scale is None else float((scale[1] / scale[0]).log2())
        return 1 + (exponent - self.exponent) ** 2


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.45, 0.55, 0.7, 0.95])
def test_the_best_of_all_ratios_is_found_by_trying_few(ratio: float) -> None:
    bowl = Bowl(ratio)
    _, name = search_scale(bowl, AwqOptions(duo="off"))
    assert name == f"ratio {ratio:g}"
    assert bowl.tried <= 9


def test_every_call_counts_in_the_statistics() -> None:
    work = work_of("llama", "int4_g32")
    short = [work.calls[0].with_hidden(work.calls[0].hidden * factor) for factor in (1.0, 2.0, 3.0)]
    work.calls = short
    trial = trial_of(work, "self_attn.v_proj", tokens=1)
    assert trial.statistics.tokens == 3 * short[0].hidden.shape[:-1].numel()
    assert len(trial.calls) == 1


def test_clipping_is_kept_only_where_it_helps() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(256, 64, generator=generator)
    weight[:, ::32] *= 12  # on inputs that are nearly silent
    x[:, ::32] *= 1e-3
    format = format_from_name("int3_g32")

    def plain(weight: torch.Tensor, format: Format, importance: torch.Tensor | None) -> torch.Tensor:
        return round_by_search(weight, format, None)

    limit = search_clip(weight, x, format, plain)
    assert limit is not None and limit.shape == (16, 2)
    clipped = clip_weight(weight, limit, format)
    errors = [float((x @ (plain(w, format, None) - weight).t()).square().sum()) for w in (weight, clipped)]
    assert errors[1] < 0.8 * errors[0]
    assert search_clip(weight, x, format, lambda w, f, i: w) is None
    odd = torch.randn(4, 50, generator=generator)
    assert search_clip(odd, torch.randn(64, 50, generator=generator), format_from_name("int2_g32")) is not None


def test_queries_and_keys_are_not_clipped() -> None:
    for family in ("llama", "phi3", "gpt_neox"):
        notes = scale_by_awq_(work_of(family, "int2_g32"), AwqOptions(steps=2))
        clipped = [name for name, note in notes.items() if "clipped" in note]
        assert clipped
        assert not any(name.endswith(("q_proj", "k_proj", "qkv_proj", "query_key_value")) for name in clipped)


def test_a_fixed_alpha_is_the_formula_and_silent_inputs_keep_their_scale() -> None:
    work = work_of("opt", "int4_g32")
    trial = trial_of(work, "final_layer_norm")
    trial.statistics.largest[5] = 0
    scale = smooth(trial, 0.3)
    weight = find_holder(work.block, "fc1").read()
    wanted = trial.statistics.largest**0.3 / weight.abs().amax(0) ** 0.7
    wanted[5] = 1
    torch.testing.assert_close(scale, wanted.detach())
    notes = scale_by_smoothquant_(work, SmoothQuantOptions(alpha=0.7, search=False))
    assert set(notes.values()) == {"smoothquant: alpha 0.7"}


def test_the_best_alpha_lies_in_the_range_and_is_the_best() -> None:
    trial = trial_of(work_of("llama", "int3_g32"), "input_layernorm")
    options = SmoothQuantOptions(lowest=0.2, highest=0.6, steps=4)
    scale, name = search_alpha(trial, options)
    assert scale is not None
    assert name in {f"alpha {alpha:g}" for alpha in (0.2, 0.3, 0.4, 0.5, 0.6)}
    assert trial.loss(scale) == pytest.approx(min(trial.loss(smooth(trial, a)) for a in (0.2, 0.3, 0.4, 0.5, 0.6)))


def test_each_group_of_linears_has_an_alpha_of_its_own() -> None:
    notes = scale_by_smoothquant_(work_of("llama", "int3_g32"), SmoothQuantOptions())
    together = [{notes[f"self_attn.{name}_proj"] for name in "qkv"}, {notes["mlp.gate_proj"], notes["mlp.up_proj"]}]
    assert all(len(said) == 1 for said in together)
    assert all("alpha" in note for note in notes.values()) and len(set(notes.values())) > 1


def test_rounded_activations_are_part_of_the_loss() -> None:
    work = work_of("llama", "w8a8")
    trial = trial_of(work, "input_layernorm")
    weights_only = GroupTrial(
        work.block, trial.group, dict.fromkeys(work.formats, format_from_name("int8_channel")), work.calls, 4096
    )
    assert trial.loss(None) > 2 * weights_only.loss(None)
    scale, _ = search_alpha(trial, SmoothQuantOptions())
    assert scale is not None and trial.loss(scale) < 0.7 * trial.loss(None)


def test_teq_trains() -> None:
    work = work_of("llama", "int3_g32")
    groups = find_groups(work.block, work.calls[0])[0]
    trained = train_scales(work, groups, TeqOptions(steps=40, rate=0.03))
    assert trained.after < 0.9 * trained.before
    for group, scale in zip(groups, trained.scales, strict=True):
        assert scale.shape == find_holder(work.block, group.linears[0]).read().shape[-1:]  # one for each input
        assert bool((scale > 0).all()) and float((scale - 1).abs().max()) > 0.05
        torch.testing.assert_close(group.tie(scale), scale)


def test_teq_keeps_what_it_began_with_where_training_does_not_help() -> None:
    work = work_of("llama", "int4_g32", outliers=False)
    groups = find_groups(work.block, work.calls[0])[0]
    trained = train_scales(work, groups, TeqOptions(steps=2, rate=5.0, checks=1))
    assert trained.after == trained.before
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in trained.scales)


def test_teq_gradient_sees_the_range_of_a_group() -> None:
    """With one input far above its group, a larger scale for it would widen the step of all: the loss must feel that."""
    linear = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16, bias=False))
    torch.manual_seed(0)
    nn.init.normal_(linear[1].weight)
    with torch.no_grad():
        linear[1].weight[:, 3] = 8.0
    call = Call((torch.randn(64, 32),), {})
    work = BlockWork(linear, {"1": format_from_name("int4_g32")}, [call])
    group = ScalingGroup(("1",), "0")
    trained = train_scales(work, [group], TeqOptions(steps=40, rate=0.05))
    assert trained.after < 0.7 * trained.before
    assert trained.scales[0][3] < 0.7 * trained.scales[0].median()


@pytest.mark.parametrize("scaler", SCALERS)
def test_every_expert_has_a_scale_of_its_own(scaler: str) -> None:
    work = work_of("mixtral", "int3_g32")
    wanted, before = (
        run_block(work.block, work.calls[0]),
        find_holder(work.block, "mlp.experts.down_proj").read().clone(),
    )
    scale_block_, options = SCALERS[scaler]
    notes = scale_block_(work, options)
    after = find_holder(work.block, "mlp.experts.down_proj").read()
    scales = (after / before).median(1).values
    assert scales.shape == (4, 96) and not torch.allclose(scales[0], scales[1], rtol=1e-3)
    if scaler == "awq":
        scaled = sum(not torch.allclose(scale, torch.ones_like(scale)) for scale in scales)
        assert notes["mlp.experts.down_proj"] == f"awq: {scaled} of 4 experts have a scale"
    else:  # nothing but scales was changed
        torch.testing.assert_close(run_block(work.block, work.calls[0]), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AwqOptions(duo="never"), "awq has no duo 'never'"),
        (lambda: AwqOptions(steps=0), "awq needs steps of at least 1, and was given 0"),
        (lambda: SmoothQuantOptions(alpha=1.5), "the alpha of smoothquant is from 0 to 1, and was given as 1.5"),
        (lambda: SmoothQuantOptions(lowest=0.9, highest=0.1), "so highest cannot be 0.1"),
        (lambda: TeqOptions(rate=0.0), "teq trains with a rate above 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_inputs_that_are_all_zero_are_survived() -> None:
    work = work_of("llama", "int4_g32")
    work.calls = [work.calls[0].with_hidden(torch.zeros_like(work.calls[0].hidden))]
    untouched = copy.deepcopy(work.block.state_dict())
    for scale_block_, options in SCALERS.values():
        scale_block_(work, options)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in work.block.state_dict().values())
    assert untouched.keys() == work.block.state_dict().keys()
