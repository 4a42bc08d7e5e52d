"""Old scripts in a process of their own: what Python gives a script, it has under the runner too, and the old names besides."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = [sys.executable, "-m", "lowbit.compat"]


def run(*arguments: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUNNER, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )


def written(folder: Path, text: str, name: str = "script.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_a_script_sees_what_python_gives_it(tmp_path: Path) -> None:
    written(tmp_path / "scripts", "helper = 'beside the script'", "beside.py")
    script = "import sys, beside\nprint(sys.argv, sys.path[0], __name__, __file__, beside.helper, sys.stdin.read())"
    path = written(tmp_path / "scripts", script)
    arguments = ["scripts/script.py", "--prompt", "a b", "-m", "--help"]
    plain = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, input="typed", capture_output=True, text=True, check=True
    )
    result = run(*arguments, folder=tmp_path, stdin="typed")
    assert result.stdout == plain.stdout
    assert str(path.parent) in result.stdout and "__main__" in result.stdout and "typed" in result.stdout


def test_both_old_names_are_one_module(tmp_path: Path) -> None:
    script = """
import bigdl.llm, ipex_llm, sys
from bigdl import llm
assert bigdl.llm is ipex_llm is llm is sys.modules["ipex_llm"]
assert ipex_llm.__name__ == ipex_llm.__spec__.name == "lowbit.compat.faces.ipex_llm"
print("torch" in sys.modules)
"""
    written(tmp_path, script)
    result = run("script.py", folder=tmp_path)
    assert result.stdout == "False\n", result.stderr


def test_without_the_runner_no_name_is_answered(tmp_path: Path) -> None:
    written(tmp_path, "import lowbit\nimport bigdl.llm")
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "No module named 'bigdl'" in result.stderr


@pytest.mark.parametrize(
    "ending, code", [("exit(0)", 0), ("import sys; sys.exit(7)", 7), ("raise SystemExit('no')", 1)]
)
def test_exit_codes(tmp_path: Path, ending: str, code: int) -> None:
    written(tmp_path, f"print('before')\n{ending}\nprint('after')")
    result = run("script.py", folder=tmp_path)
    assert (result.returncode, result.stdout) == (code, "before\n")


def test_a_traceback_is_the_scripts_own(tmp_path: Path) -> None:
    written(tmp_path, "def fall():\n    raise ValueError('over')\n\nfall()\n")
    result = run("script.py", folder=tmp_path)
    plain = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr == plain.stderr
    assert "ValueError: over" in result.stderr and "lowbit" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent in another way there")
def test_ctrl_c_ends_the_script_as_it_does_without_us(tmp_path: Path) -> None:
    written(tmp_path, "import time\nprint('ready', flush=True)\ntime.sleep(900)")
    with subprocess.Popen(
        [*RUNNER, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in errors


def test_child_pythons_are_answered_and_threads_of_the_pool_too(tmp_path: Path) -> None:
    script = """
import multiprocessing, subprocess, sys
def named(_):
    import bigdl.llm
    return bigdl.llm.__name__
if __name__ == "__main__":
    code = "import ipex_llm, sys; print(ipex_llm.__name__, sys.argv)"
    print(subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True, check=True).stdout, end="")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(named, [0]))
"""
    written(tmp_path, script)
    result = run("script.py", folder=tmp_path)
    face = "lowbit.compat.faces.ipex_llm"
    assert result.stdout == f"{face} ['-c', 'x']\n['{face}']\n", result.stderr


def test_a_sitecustomize_of_the_machine_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "site", "import sys\nsys.from_the_machine = 'yes'", "sitecustomize.py")
    written(tmp_path, "import sys, bigdl.llm\nprint(sys.from_the_machine, [p for p in sys.path if 'compat' in p])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    result = run("script.py", folder=tmp_path)
    assert result.stdout == "yes []\n", result.stderr


def test_modules_code_and_the_options_of_python(tmp_path: Path) -> None:
    written(tmp_path, "import sys, bigdl.llm\nprint(sys.argv[1:], sys.flags.optimize)", "tool.py")
    assert run("-m", "tool", "one", folder=tmp_path).stdout == "['one'] 0\n"
    assert run("-c", "import bigdl.llm; print('code')", folder=tmp_path).stdout == "code\n"
    command = [sys.executable, "-OO", "-m", "lowbit.compat", "tool.py", "two"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "['two'] 2\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["--verbose", "script.py"], "--verbose is no option"),
        (["-m"], "needs the module"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


def test_help_shows_how(tmp_path: Path) -> None:
    result = run("--help", folder=tmp_path)
    assert result.returncode == 0 and "python -m lowbit.compat generate.py" in result.stdout
    assert run(folder=tmp_path).returncode == 2


def test_one_call_under_pytest(tmp_path: Path) -> None:
    written(tmp_path, "import lowbit.compat\nlowbit.compat.install()", "conftest.py")
    test = """
import subprocess, sys
from bigdl import llm

def test_old_names():
    import ipex_llm
    assert ipex_llm is llm

def test_of_a_child():
    subprocess.run([sys.executable, "-c", "import intel_extension_for_pytorch"], check=True)
"""
    written(tmp_path, test, "test_old.py")
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(plain, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout
    (tmp_path / "conftest.py").unlink()
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=tmp_path).stdout


def test_a_child_without_lowbit_on_its_path_has_it_all_the_same(tmp_path: Path) -> None:
    """A child of an empty path, where the names are answered from where lowbit lies; nothing else of that place is importable."""
    script = """
import os, subprocess, sys
folder, *_ = os.environ["PYTHONPATH"].split(os.pathsep)
code = "import sys, bigdl.llm; print(bigdl.llm.__name__, [p for p in sys.path if 'lowbit' in p])"
command = [sys.executable, "-s", "-c", code]
print(subprocess.run(command, env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True).stdout, end="")
"""
    written(tmp_path, script)
    result = run("script.py", folder=tmp_path)
    assert result.stdout.startswith("lowbit.compat.faces.ipex_llm "), result.stderr
