"""Processors that this machine is not: the whole of the torch-free runtime under an emulator that has only their instructions.

An instruction that the processor lacks ends the emulated process, so that what runs here also shows that nothing newer is executed
before or beside the choice by CPUID: in the core, in Python's part, or in the way that the library was compiled.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.runtime import load
from lowbit_assets import tiny_model

PROMPT = list(range(5, 45))
SETTINGS = {"cache": "fp32", "compute": "fp32"}
CODE = f"""
import json, sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from lowbit.core import calls
    from lowbit.runtime import load
    for format in (None, "int4"):
        model = load(sys.argv[1], format, **{SETTINGS})
        logits = model.engine.logits({PROMPT}).tolist()
        print(json.dumps([calls.instruction_set(), logits, [str(warning.message) for warning in said]]))
"""


def emulator() -> str:
    found = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64":
        pytest.skip("the core and Python are not built for the processors that are emulated here")
    if found is None:
        pytest.skip("no emulator: apt install qemu-user-static")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "instruction_set", "warned"), [("Nehalem", "portable", 1), ("Haswell", "avx2", 0)]
)
def test_the_engine_runs_on(processor: str, instruction_set: str, warned: int, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    done = subprocess.run(
        [emulator(), "-cpu", processor, sys.executable, "-c", CODE, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    for (chosen, logits, said), format in zip(rows, (None, "int4"), strict=True):
        assert chosen == instruction_set
        expected = load(folder, format, cache="fp32", compute="fp32").engine.logits(PROMPT)
        assert np.abs(np.asarray(logits) - expected).max() < 1e-4, format
        assert len([text for text in said if "has no AVX2" in text]) == warned
