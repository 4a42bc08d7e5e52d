"""Temporary folders go with whoever keeps them, and what a killed process left goes with the next one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lowbit.checkpoint.temporary import TemporaryFolder
from lowbit.openvino.causal_lm import OVModelForCausalLM
from lowbit.openvino.pretrained import EXPORTED
from lowbit_assets import tiny_model

LONG_AGO = (0.0, 0.0)


def test_a_folder_goes_with_its_keeper(tmp_path: Path) -> None:
    kept = TemporaryFolder("kept-", tmp_path)
    (kept.path / "deep").mkdir()
    assert kept.path.parent == tmp_path and kept.path.name.startswith("kept-")
    with TemporaryFolder("kept-", tmp_path) as inside:
        (inside / "file").touch()
    assert not inside.exists() and kept.path.is_dir()
    path = kept.path
    del kept
    gc.collect()
    assert not path.exists()


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """Of three alike: one of a process that was killed, one that is in use, and a young one that may be about to be locked."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lowbit.checkpoint.temporary import TemporaryFolder\n"
        "kept = TemporaryFolder('kept-', Path(sys.argv[1]))\n"
        "(kept.path / 'openvino_model.bin').write_bytes(bytes(1000))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert killed.returncode == -signal.SIGKILL and (left / "openvino_model.bin").is_file()
    used = TemporaryFolder("kept-", tmp_path)
    young = tmp_path / "kept-young"
    young.mkdir()
    os.utime(left, LONG_AGO)
    os.utime(used.path, LONG_AGO)
    with TemporaryFolder("kept-", tmp_path):
        assert not left.exists() and used.path.exists() and young.exists()


def test_an_exported_model_keeps_one_and_clears_those_that_were_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{EXPORTED}left").mkdir()
    os.utime(tmp_path / f"{EXPORTED}left", LONG_AGO)
    source = tiny_model("llama", tmp_path / "tiny")
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False)
    (kept,) = tmp_path.glob(f"{EXPORTED}*")
    assert kept.name != f"{EXPORTED}left" and (kept / "model" / "openvino_model.bin").is_file()
    model.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    del model
    gc.collect()
    assert not list(tmp_path.glob(f"{EXPORTED}*"))
