"""The face of `intel_extension_for_pytorch`: found by its old name, `ipex.optimize`, small names, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowbit.compat
from lowbit.compat.faces import intel_extension_for_pytorch as ipex
from lowbit.compat.faces.intel_extension_for_pytorch import frontend
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import LowbitError, RecipeError
from lowbit_assets import tiny_model_in_memory

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))


def test_it_answers_by_its_old_name_and_costs_nothing() -> None:
    code = (
        "import lowbit.compat; lowbit.compat.install()\n"
        "import sys, intel_extension_for_pytorch as ipex\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), ipex.__version__)\n"
        "from intel_extension_for_pytorch.quantization import prepare\n"
        "assert prepare is ipex.quantization.prepare and ipex.llm.optimize and ipex.optimize\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("] ")[0] == "[" and done.stdout.strip().endswith(ipex.__version__)


# Types, and how far a small model may be from fp32 in them.
@pytest.mark.parametrize(
    ("dtype", "limit"), [(None, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.005)], ids=str
)
def test_optimize_of_any_model(dtype: torch.dtype | None, limit: float) -> None:
    original = pictures().eval()
    made = ipex.optimize(original, dtype=dtype)
    assert made is not original and original[0].weight.dtype == torch.float32  # type: ignore[index]
    assert made[0].weight.dtype == (dtype or torch.float32) and made[1].weight.dtype == torch.float32
    low = dtype if dtype in (torch.bfloat16, torch.float16) else None
    with torch.no_grad(), torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
        found = made(X)
    assert found.dtype == (dtype or torch.float32) and torch.allclose(found.float(), original(X), atol=limit)
    assert ipex.optimize(original, dtype=dtype, inplace=True) is original
    dense = tiny_model_in_memory("llama")
    language = ipex.optimize(dense, dtype=dtype)
    assert language.dtype == (dtype or torch.float32) and dense.dtype == torch.float32
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        logits = dense(ids).logits
        assert float((language(ids).logits.float() - logits).norm() / logits.norm()) <= limit
    answer = language.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 18) and int(answer[0, 12]) == int(logits[0, -1].argmax())
    assert language.generate.why_not is None


def test_optimize_with_an_optimizer_is_a_pair() -> None:
    model = pictures().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(CompatWarning, match="autocast computes in the other"):
        made, same = ipex.optimize(model, dtype=torch.bfloat16, optimizer=optimizer)
    assert made is model and same is optimizer and model[0].weight.dtype == torch.float32  # type: ignore[index]
    wanted, losses = torch.tensor([0, 1, 2, 3]), []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(made(X), wanted)
        same.zero_grad()
        loss.backward()
        same.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


SWITCHES: dict[str, Any] = {
    "level": "O0", "conv_bn_folding": False, "linear_bn_folding": False, "weights_prepack": False, "graph_mode": True,
    "replace_dropout_with_identity": False, "optimize_lstm": True, "split_master_weight_for_bf16": False,
    "fuse_update_step": False, "auto_kernel_selection": True, "sample_input": X, "concat_linear": False,
    "use_optimized_kernels": True,
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch(name: str) -> None:
    with pytest.warns(CompatWarning, match=f"{name} has no effect: "):
        ipex.optimize(pictures().eval(), **{name: SWITCHES[name]})


def test_switches_say_once_why_they_do_nothing() -> None:
    switches = dict.fromkeys(frontend._IGNORED, True)
    assert switches.keys() == SWITCHES.keys()
    with pytest.warns(CompatWarning) as said:
        ipex.optimize(pictures().eval(), **switches)
    texts = [str(one.message) for one in said]
    assert len(texts) == len(switches) and all(
        any(f": {name} has no effect: " in t for t in texts) for name in switches
    )
    with pytest.raises(TypeError, match="has no parameter 'graph'"):
        ipex.optimize(pictures().eval(), graph=True)
    with pytest.raises(RecipeError, match=r"not in torch\.int8"):
        ipex.optimize(pictures().eval(), dtype=torch.int8)
    with pytest.raises(RecipeError, match="takes a torch module, not a list"):
        ipex.optimize([])


def test_the_backend_of_compile() -> None:
    importlib.import_module("torch._dynamo")
    from torch._dynamo import list_backends

    assert "ipex" in list_backends()
    function = torch.compile(lambda x: torch.relu(x) + 1, backend="ipex")
    assert torch.allclose(function(X), torch.relu(X) + 1)


def test_small_names(capsys: Any) -> None:
    ipex.version()
    assert "answered by lowbit" in capsys.readouterr().out
    before = torch.get_float32_matmul_precision()
    ipex.set_fp32_math_mode(ipex.FP32MathMode.BF32)
    assert torch.get_float32_matmul_precision() == "medium" and ipex.get_fp32_math_mode() is ipex.FP32MathMode.BF32
    torch.set_float32_matmul_precision(before)
    ipex.set_logging_level("info")
    with ipex.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = nn.Linear(2, 2)
    assert layer.weight.device.type == "meta" and layer.weight.dtype == torch.bfloat16
    with ipex.OnDevice(enabled=False):
        assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
    with ipex.verbose(0):
        assert ipex.xpu.is_available is torch.xpu.is_available
    model = pictures().eval()
    assert ipex.fast_bert(model, dtype=torch.float32)[0].weight.dtype == torch.float32
    ipex.disable_auto_channels_last()


def test_small_switches() -> None:
    """Each says once that it turns nothing."""
    model = pictures().eval()
    switches: dict[str, Callable[[], Any]] = {
        "disable_jit_linear_repack": lambda: ipex._C.disable_jit_linear_repack(),
        "enable_jit_linear_repack": lambda: ipex._C.enable_jit_linear_repack(),
        "enable_auto_channels_last": lambda: ipex.enable_auto_channels_last(),
        "enable_onednn_fusion": lambda: ipex.enable_onednn_fusion(True),
        "_set_optimized_model_for_generation": lambda: ipex._set_optimized_model_for_generation(
            model, optimized_model=model
        ),
    }
    for name, turn in switches.items():
        with pytest.warns(CompatWarning, match=f"{name}.* has no effect"):
            made = turn()
        assert made is (model if name.startswith("_") else None)


@pytest.mark.parametrize(
    ("place", "name", "words"),
    [
        ("", "deepspeed", "several devices"),
        ("", "optimise", "did you mean .*optimize"),
        ("llm", "generation", "model.generate"),
        ("llm.modules", "PagedAttention", "scaled_dot_product_attention"),
        ("llm.functional", "bgmv_shrink", "peft"),
        ("llm.functional.utils", "ipex_update_causal_mask", "create_causal_mask"),
        ("transformers.optimize", "convert_function", "changes no model's code"),
        ("optim", "_lamb", "AdamW"),
        ("quantization", "gptq", "GPTQConfig"),
        ("quantization", "preparr", "did you mean .*prepare"),
        ("xpu", "synchronise", "did you mean synchronize"),
        ("cpu", "runtime", "set_num_threads"),
        ("nn.modules", "MergedEmbeddingBag", "EmbeddingBag"),
    ],
)
def test_names_without_a_meaning_say_what_to_use(place: str, name: str, words: str) -> None:
    module: Any = ipex
    for part in filter(None, place.split(".")):
        module = getattr(module, part)
    with pytest.raises(LowbitError, match=words):
        getattr(module, name)
    with lowbit.compat.install(children=False), pytest.raises(LowbitError, match=words):
        exec(f"from intel_extension_for_pytorch{'.' + place if place else ''} import {name}")
