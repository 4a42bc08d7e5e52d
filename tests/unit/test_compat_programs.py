"""The old command line programs, through the runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unit.checkpoint_cases import EVEN, make


def run(*arguments: object, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit.compat", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llm-convert wrote."""
    folder = tmp_path_factory.mktemp("programs")
    dense = make("llama", folder / "dense", **EVEN)
    ran = run("llm-convert", dense, "-o", "out", "-x", "llama", "-f", "pth", "-t", "int4", "-p", "tmp", folder=folder)
    assert ran.returncode == 0 and "tmp_path has no effect" in ran.stderr, ran.stderr[-2000:]
    assert "bigdl_llm_llama_q4_0.bin" in ran.stdout
    return folder / "out" / "bigdl_llm_llama_q4_0.bin"


def test_convert_and_continue(converted: Path) -> None:
    """llm-convert, then llm-cli on what it wrote."""
    asked = ("-x", "llama", "-m", converted.name, "-t", 1, "-n", 4, "-p", "abc", "--temp", 0)
    ran = run("llm-cli", *asked, folder=converted.parent)
    assert ran.returncode == 0 and ran.stdout.startswith("abc") and len(ran.stdout) > len("abc\n"), ran.stderr[-2000:]
    refused = run("llm-cli", *asked, "--mirostat", 2, folder=converted.parent)
    assert refused.returncode == 1 and refused.stderr.startswith(
        "llm-cli: llm-cli takes no --mirostat 2 here: use `lowbit"
    )
    wrong = run("llm-convert", converted, "-o", "x", "-x", "lama", folder=converted.parent)
    assert wrong.returncode == 2 and "choose from" in wrong.stderr


def test_chat(converted: Path) -> None:
    """llm-chat is lowbit chat: the lines are answered one after another."""
    ran = run("llm-chat", "-x", "llama", "-m", converted, "-t", 1, folder=converted.parent, stdin="/help\n")
    assert ran.returncode == 0 and "/exit" in ran.stdout + ran.stderr, ran.stderr[-2000:]


@pytest.mark.parametrize("name", ["ipex-llm-init", "bigdl-llm-init"])
def test_setting_up(name: str, tmp_path: Path) -> None:
    ran = run(name, "-t", "--device", "Arc", folder=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "") and "leave the line out" in ran.stderr


def test_a_script_of_that_name_goes_first(tmp_path: Path) -> None:
    (tmp_path / "llm-cli").write_text("print('mine')")
    assert run("llm-cli", folder=tmp_path).stdout == "mine\n"
