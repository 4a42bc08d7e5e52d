"""The exporter by itself: without torch, and within the memory that its page names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_assets import tiny_model

WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"


def ran(code: str, *arguments: str) -> str:
    line = [sys.executable, "-c", f"{WITHOUT_TORCH}\n{code}", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def test_a_folder_is_written_without_torch(tiny: Path, tmp_path: Path) -> None:
    code = (
        "from lowbit.openvino import write_decoder\n"
        "print(write_decoder(sys.argv[1], sys.argv[2], 'int4_g32', ratio=0.8, tokenizer=False).report.formats())"
    )
    assert "int4_g32" in ran(code, str(tiny), str(tmp_path / "out"))
    command = "from lowbit.cli import main\nsys.exit(main(sys.argv[1:]))"
    made = ran(command, "export", "openvino", "--model", str(tiny), "--format", "int4_g32", str(tmp_path / "ov"))
    assert "written to" in made and "against the source" in made
