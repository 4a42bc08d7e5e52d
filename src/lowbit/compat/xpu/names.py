"""The rows of PyTorch's own names for Intel GPUs in the table of old names."""

from __future__ import annotations

import torch

from lowbit.compat.names import REFUSED, WORKS, Name
from lowbit.compat.xpu.on_cpu import ACCELERATOR_NAMES, XPU_NAMES

_TESTS = "tests/unit/test_compat_xpu.py::"
_CALLS = "tests/unit/test_compat_xpu_names.py::"
# What a module is besides its functions.
_NO_NAMES = ("streams",)

NAMES = (
    Name('tensor.to("xpu"), module.to("xpu"), .xpu()', "", WORKS, f"{_TESTS}test_tensors_and_modules_move"),
    Name('torch.zeros(device="xpu"), and each other maker', "", WORKS, f"{_TESTS}test_tensors_are_made"),
    Name('with torch.device("xpu"):', "", WORKS, f"{_TESTS}test_tensors_are_made"),
    Name('torch.Generator("xpu")', "", WORKS, f"{_TESTS}test_tensors_are_made"),
    Name('torch.autocast(device_type="xpu")', "", WORKS, f"{_TESTS}test_mixed_precision"),
    Name('torch.amp.GradScaler("xpu")', "", WORKS, f"{_TESTS}test_training_with_a_scaler"),
    Name('torch.load(map_location="xpu")', "", WORKS, f"{_TESTS}test_files_are_loaded"),
    Name("torch.profiler.ProfilerActivity.XPU", "", WORKS, f"{_TESTS}test_a_profile"),
    Name("torch.compile(model)", "", WORKS, f"{_TESTS}test_a_compiled_model"),
    Name('from_pretrained(device_map="xpu")', "", WORKS, f"{_TESTS}test_models_of_transformers"),
    Name("torch.xpu.amp.autocast", "", WORKS, f"{_TESTS}test_mixed_precision", "IPEX's, never torch's"),
    Name("torch.xpu.optimize", "", WORKS, f"{_TESTS}test_the_names_of_ipex", "IPEX's, never torch's"),
    *(Name(f"torch.xpu.{name}", "", WORKS, f"{_CALLS}test_each_name_is_called") for name in XPU_NAMES),
    *(Name(f"torch.accelerator.{name}", "", WORKS, f"{_CALLS}test_each_name_is_called") for name in ACCELERATOR_NAMES),
    *(
        Name(
            f"torch.xpu.{name}",
            "",
            REFUSED,
            f"{_CALLS}test_the_rest_of_torch_xpu_is_torchs_own",
            'needs an Intel GPU when "xpu" is the CPU; on an NVIDIA GPU torch.cuda\'s answers, where it has one',
        )
        for name in torch.xpu.__all__
        if name not in XPU_NAMES and name not in _NO_NAMES
    ),
)
