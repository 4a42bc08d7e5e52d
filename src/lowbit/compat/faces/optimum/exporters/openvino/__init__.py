"""`optimum.exporters.openvino`: an export by one call, `main_export`."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import REFUSED, WORKS, Name

_FROM_PRETRAINED = "OVModelForCausalLM.from_pretrained(..., export=True).save_pretrained(folder)"

__all__ = ["main_export"]
__getattr__ = refuse_unknown(
    __name__,
    dict.fromkeys(("export", "export_from_model", "export_models"), _FROM_PRETRAINED),
    {"main_export": "lowbit.compat.optimum_export"},
)

_PLACE = "optimum.exporters.openvino"
_UNIT = "tests/unit/test_compat_optimum.py::"
_CLI = f"{_UNIT}test_optimum_cli"
_CHOICES = f"{_UNIT}test_choices_of_optimum_cli"
_AWQ = "tests/unit/test_openvino_wishes.py::test_awq_and_gptq_of_optimum_cli"
_AS_PROGRAM = "`python -m lowbit.compat` in front of the line"
_COMMAND = "lowbit export openvino"
NAMES = (
    Name(f"{_PLACE}.main_export", _COMMAND, WORKS, f"{_UNIT}test_main_export"),
    Name(
        f"{_PLACE}.export_from_model", "", REFUSED, f"{_UNIT}test_what_is_not_there_is_named", f"use {_FROM_PRETRAINED}"
    ),
    Name("optimum-cli export openvino --model", _COMMAND, WORKS, _CLI, _AS_PROGRAM),
    Name("optimum-cli export openvino --int8", _COMMAND, WORKS, _CLI, "and `--int4`, which that program never took"),
    *(
        Name(f"optimum-cli export openvino {option}", _COMMAND, WORKS, _CHOICES)
        for option in ("--weight-format", "--sym", "--group-size", "--ratio")
    ),
    *(
        Name(f"optimum-cli export openvino {option}", "", WORKS, _CHOICES)
        for option in ("--task", "--dataset", "--gptq", "--all-layers", "--backup-precision")
    ),
    Name("optimum-cli export openvino --awq", "", WORKS, _AWQ),
    Name("optimum-cli export openvino --quant-mode", "", REFUSED, _CHOICES, "activations are the plugins' affair"),
)
