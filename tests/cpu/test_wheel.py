"""What is installed by `pip install lowbit` alone: one wheel for every Python and torch, and an engine that needs neither.

The wheel is built from the objects that the editable install left in build/, so that only linking is repeated. It is then put
into an environment of its own, which has what the wheel asks for and nothing else, and every command that promises to work
without torch runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import lowbit
from cpu.test_cpp_face import PROMPT, save_model
from lowbit.runtime import load

ROOT = Path(__file__).parents[2]
SECONDS = 1800
USE_THE_RUNTIME = """
import importlib.util, json, sys
from pathlib import Path
from lowbit.runtime import load
for name in ("torch", "transformers"):
    assert importlib.util.find_spec(name) is None, name
model = load(sys.argv[1])
answer = model.chat(sys.argv[2], max_new_tokens=8, temperature=0.0)
pieces = [piece.text for piece in model.stream("Once", max_new_tokens=4)]
print(json.dumps({"tokens": list(answer.tokens), "pieces": len(pieces), "logits": list(model.logits([3, 4, 5]).shape),
                  "embedding": len(model.embed("Hello"))}))
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, typed: str = "", paths: bool = False) -> str:
    """What a command prints. Unless `paths`, it sees no packages of ours through PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if paths or name != "PYTHONPATH"}
    words = list(map(str, command))
    result = subprocess.run(
        words, input=typed, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", ROOT, "-w", target]
    run(sys.executable, "-m", *build, paths=True)
    wheels = list(target.iterdir())
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin/python"
    pins = ROOT / "requirements/constraints.txt"
    run(interpreter, "-m", "pip", "install", "--quiet", "--constraint", pins, wheel)
    return interpreter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "int4")


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    name, version, python_tag, abi, platform = wheel.stem.split("-")
    assert (name, version) == ("lowbit", lowbit.__version__)
    assert (python_tag, abi) == ("py3", "none") and platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    assert "lowbit/liblowbit.so" in files and "lowbit/include/lowbit.hpp" in files
    assert {f"lowbit/texts/{name}.txt.xz" for name in ("sqlite_train", "sqlite_valid", "moby_dick")} <= set(files)
    assert not [file for file in files if "csrc" in file or file.startswith("tests")]
    assert [file for file in files if file.endswith(".so")] == ["lowbit/liblowbit.so"]


def test_the_runtime_needs_nothing_else(python: Path, saved: Path) -> None:
    told = json.loads(run(python, "-c", USE_THE_RUNTIME, saved, PROMPT))
    here = load(saved).chat(PROMPT, max_new_tokens=8, temperature=0.0)
    assert told["tokens"] == list(here.tokens)
    assert told["pieces"] == 4 and told["logits"] == [3, 512] and told["embedding"] == 64


def test_the_commands_need_nothing_else(python: Path, saved: Path, tmp_path: Path) -> None:
    lowbit_command = python.parent / "lowbit"
    text = tmp_path / "book.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely, " * 40)
    said = json.loads(run(lowbit_command, "generate", saved, "--prompt", PROMPT, "--max-new-tokens", "8", "--json"))
    assert said
    assert run(lowbit_command, "chat", saved, "--max-new-tokens", "4", typed="Hello\n")
    assert "erplexity" in run(lowbit_command, "evaluate", saved, "--text", text)
    assert run(lowbit_command, "bench", saved, "--new-tokens", "4")
    assert str(saved.name) in run(lowbit_command, "inspect", saved)
    assert "nothing is broken" in run(lowbit_command, "doctor")
