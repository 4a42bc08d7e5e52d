"""The command line itself: help without heavy imports, usage errors, exit codes, failures in one line."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lowbit.checkpoint.folder import unwritten
from lowbit.cli import COMMANDS, FAILED, INTERRUPTED, OK, PIPE_CLOSED, USAGE, command_parser, doctor, main
from lowbit.cli.failures import explain_failure
from lowbit.cli.options import COUNT, SHARE
from lowbit.cli.output import Output, count_text, seconds_text, size_text, table_lines
from lowbit.cli.source import find_source
from lowbit.errors import LONGEST_SENTENCE, CheckpointError, one_line

HEAVY = ("torch", "rich", "transformers", "numpy")


def imported_by(arguments: list[str], missing: str = "") -> tuple[int, set[str], str]:
    """Run the command in a fresh Python, with one package hidden if asked for: exit code, heavy imports, stderr."""
    program = (
        "import sys\n"
        f"sys.modules.update({{name: None for name in {missing.split()!r}}})\n"
        "from lowbit.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print(*(m for m in {HEAVY!r} if sys.modules.get(m)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    lines = done.stderr.splitlines()
    return done.returncode, set(lines[-1].split()), "\n".join(lines[:-1])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failure leaves on stderr."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("lowbit: error: ")
    assert "Traceback" not in captured.err
    return lines[0]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == OK
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text and command.help in text
    assert main([]) == OK
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["quantise"], ["quantize", "--help"], ["chat", "--help"]]
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    _, heavy, _ = imported_by(arguments)
    assert heavy == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_of_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == OK
    text = capsys.readouterr().out
    assert f"  lowbit {name}" in text.partition("examples:")[2]
    assert main(["help", name]) == OK
    assert capsys.readouterr().out == text


def test_one_option_has_one_meaning_in_every_command() -> None:
    """Whatever two commands call alike takes the same values."""
    seen: dict[str, tuple[str | None, object]] = {}
    for name, command in COMMANDS.items():
        for action in command_parser(name, importlib.import_module(command.module))._actions:
            for word in action.option_strings:
                shown = seen.setdefault(word, (action.metavar, action.type))
                assert (action.metavar, action.type) == shown, f"{word} of {name}"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "--version"], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.split()[0]) == (OK, "lowbit")


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantise", "a", "b"]) == USAGE
    assert error_line(capsys).endswith("there is no command 'quantise': did you mean quantize?")
    assert main(["--nonsense"]) == USAGE
    assert "there is no option '--nonsense'" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "only-a-source"], "OUT"),
        (["generate", "model"], "--prompt"),
        (["generate", "model", "--prompt", "a", "--top-p", "2"], "'2' is not a number between 0 and 1"),
        (["generate", "model", "--prompt", "a", "--max-new-tokens", "no"], "'no' is not a number from 1 up"),
        (["generate", "model", "--prompt", "a", "--threads", "99999"], "from 1 to 1024"),
        (["bench", "model", "--new-tokens", "1"], "'1' is not a number from 2 up"),
        (["generate", "model", "--prompt", "a", "--max-new-tokens", "9" * 12], "is too large: 2147483648 is the most"),
        (["generate", "model", "--prompt", "a", "--seed", "9" * 20], "is too large: 9223372036854775807 is the most"),
        (["chat", "model", "--sytem", "a"], "there is no option --sytem: did you mean --system?"),
        (["generate", "model", "--promt=a"], "there is no option --promt: did you mean --prompt?"),
        (["quantize", "model", "--output", "a"], "--output: OUT has no name in 'lowbit quantize SOURCE OUT'"),
        (["quantize", "--model=a", "b"], "--model: SOURCE has no name in 'lowbit quantize SOURCE OUT'"),
    ],
)
def test_wrong_arguments_are_one_line_with_the_way_to_the_help(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == USAGE
    line = error_line(capsys)
    assert said in line and f"see 'lowbit {arguments[0]} --help'" in line


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        warnings.warn("a thing\nto know", stacklevel=1)
        return OK

    shown = warnings.showwarning
    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == OK
    assert capsys.readouterr().err == "lowbit: warning: a thing to know\n"
    assert warnings.showwarning is shown


def test_ctrl_c_is_130() -> None:
    """While the command waits for a prompt that never comes: pressed as soon as it asks for one, however long its start takes."""
    program = (
        "import io, os, signal, sys, threading\n"
        "from lowbit.cli import main\n"
        "class Asked(io.TextIOWrapper):\n"
        "    def read(self):\n"
        "        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "        return super().read()\n"
        "sys.stdin = Asked(sys.stdin.detach())\n"
        "sys.exit(main(['generate', 'model', '--prompt', '-']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.wait(timeout=300) == INTERRUPTED
        assert process.stderr is not None and process.stderr.read() == "\nlowbit: stopped\n"


TIDY = """
import os, signal, sys, threading, time
from pathlib import Path
from lowbit.cli import doctor, main

class Slow:
    def __del__(self):
        if DURING_DELETION:
            os.kill(os.getpid(), NUMBER)

def run(options):
    print("begun", flush=True)
    try:
        if DURING_DELETION:
            Slow()
        else:
            os.kill(os.getpid(), NUMBER)
        time.sleep(900)
    finally:
        print("tidied up", flush=True)

signal.signal(NUMBER, AT_START)  # whatever this run of the tests has inherited
doctor.run = run
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize("during_deletion", [False, True], ids=["anywhere", "in a __del__"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_whatever_ends_a_command_unwinds_it(number: signal.Signals, code: int, during_deletion: bool) -> None:
    at_start = "signal.default_int_handler" if number == signal.SIGINT else "signal.SIG_DFL"
    program = TIDY.replace("NUMBER", str(int(number))).replace("DURING_DELETION", str(during_deletion))
    program = program.replace("AT_START", at_start)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (code, "begun\ntidied up\n")
    assert done.stderr == "\nlowbit: stopped\n"


def test_a_closed_terminal_ends_nothing_under_nohup() -> None:
    program = (
        TIDY.replace("NUMBER", "signal.SIGHUP").replace("DURING_DELETION", "False").replace("time.sleep(900)", "pass")
    )
    program = program.replace("AT_START", "signal.SIG_IGN").replace(
        'sys.exit(main(["doctor"]))', 'print(main(["doctor"]))'
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\ntidied up\nNone\n", "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_empty_ones(closed: str, tmp_path: Path) -> None:
    """A file that takes the number of a closed stream would be written to."""
    program = (
        f"import os, sys; from lowbit.cli import main; code = main(['help']); f = open({str(tmp_path / 'f')!r}, 'w'); \
print('seen', file=sys.stderr); sys.exit(code if f.fileno() > 2 and sys.stdin.read() == '' else 9)"
    )
    command = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, program],
        input="",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, (tmp_path / "f").read_text()) == (OK, "")


def test_missing_torch_is_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    code, heavy, said = imported_by(["generate", str(tmp_path), "--prompt", "Hello"], missing="torch")
    assert (code, heavy & {"torch"}) == (FAILED, set())
    assert said.startswith("lowbit: error: running this model (lowbit has no engine for models of type 'bert'")
    assert "needs the package 'torch'" in said
    assert said.endswith("pip install 'lowbit[torch]'") and "\n" not in said


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


# --- sources and targets ---------------------------------------------------------------------------------------------


def test_wrong_paths_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty", tmp_path / "notes.txt"
    empty.mkdir()
    text.write_text("notes")
    (tmp_path / "smollm2").mkdir()
    told = {
        str(tmp_path / "smolm2"): f"did you mean {tmp_path / 'smollm2'}?",
        str(tmp_path / "absent" / "deep"): f"the path is right up to {tmp_path}",
        str(tmp_path / "absent.gguf"): "there is no file or folder",
        str(empty): "is no model: it has no config.json (it is empty)",
        str(tmp_path): "it holds empty, notes.txt, smollm2",
        str(text): "name a Hugging Face folder, a .gguf file, or a model of the hub",
    }
    for path, sentence in told.items():
        assert main(["quantize", path, str(tmp_path / "out")]) == FAILED
        assert sentence in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_mistyped_paths_that_are_no_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2").mkdir()
    for name in ("./smollm", "model.gguf", "./gpt2", "a/b/c", "two words"):
        with pytest.raises(CheckpointError, match="there is no file or folder"):
            find_source(name)
    with pytest.raises(CheckpointError, match=r"did you mean SmolLM2\?"):
        find_source("./smollm")


def test_a_mistyped_name_is_told_without_torch() -> None:
    code, heavy, said = imported_by(
        ["generate", "no-such-model-here", "--prompt", "Hello"], missing="torch transformers"
    )
    assert (code, heavy & {"torch", "transformers"}) == (FAILED, set())
    assert said.startswith("lowbit: error: there is no file or folder no-such-model-here") and "\n" not in said
    with pytest.raises(CheckpointError, match="the name of the model is empty"):
        find_source("")


def test_home_is_known_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = command_parser("quantize", importlib.import_module("lowbit.cli.quantize"))
    assert parser.parse_args(["./model", "~/small"]).out == tmp_path / "small"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find_source("~/model").path == tmp_path / "model"


def test_paths_that_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    told = {
        "dangling": "dangling is a link to nowhere, and nothing is there",
        "loop": "loop is a link to loop, and nothing is there",
        "fifo": "fifo is neither a file nor a folder",
        "\udcff": "the name of the model is no text in UTF-8",
    }
    for name, sentence in told.items():
        assert main(["generate", str(tmp_path / name), "--prompt", "Hi"]) == FAILED
        assert sentence in error_line(capsys)
    assert main(["quantize", str(tmp_path), str(tmp_path / "\udcff")]) == FAILED
    assert "is no model" in error_line(capsys)
    (tmp_path / "config.json").write_text("{}")
    assert main(["quantize", str(tmp_path), str(tmp_path / "\udcff")]) == FAILED
    assert "the name of OUT is no text in UTF-8" in error_line(capsys)


def test_words_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["generate", "m", "--prompt", "\udcff"], ["chat", "m", "--system", "\udcff"]):
        assert main(words) == USAGE
        assert f"argument {words[2]}: this is no text in UTF-8" in error_line(capsys)
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "generate", "m", "--prompt", "-"],
        input=b"Gr\xfc\xdfe",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        FAILED,
        b"lowbit: error: stdin is no text in UTF-8: convert or rename it first\n",
    )
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "generate", "m", "--prompt", "-"], input=b"", capture_output=True, check=False
    )
    assert b"the prompt is empty" in done.stderr


def test_a_mount_point_is_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["quantize", str(tmp_path), "/"]) == FAILED
    assert "/ is a mount point, which cannot be replaced by a folder: name one below it, /model" in error_line(capsys)


def test_targets_in_use_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other, model, file = (tmp_path / name for name in ("source", "other", "model", "file"))
    for folder in (source, other, model):
        folder.mkdir()
    for path in (source / "config.json", other / "letter.txt", model / "config.json", file):
        path.write_text("{}")
    told = {
        file: "is a file: name a folder",
        source: "is the source itself",
        other: "what it holds is no model",
        model: "replace it with --force",
        file / "deep" / "out": f"{file} is a file",
    }
    for target, sentence in told.items():
        assert main(["quantize", str(source), str(target)]) == FAILED
        assert sentence in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "int44"], "unknown format 'int44': did you mean int4"),
        (["--override", "down_proj"], "is not REGEX=FORMAT"),
        (["--override", "(=int8"], "is not a regular expression"),
        (["--rounder", "magic"], "no rounder is called 'magic'"),
        (["--skip", ""], "--skip needs a part of a weight's path"),
    ],
)
def test_wrong_recipes_are_told_before_any_work(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tmp_path / "absent"), str(tmp_path / "out"), *arguments]) == FAILED
    assert said in error_line(capsys)


def test_a_full_disk_is_named() -> None:
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("No space left on device (os error 28)"),
    ):
        assert "the disk is full; free some room" in unwritten(Path("out"), error)
    assert "Permission denied" in unwritten(Path("out"), PermissionError(errno.EACCES, "Permission denied"))


# --- failures as sentences -------------------------------------------------------------------------------------------


def test_system_errors_become_sentences() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/out/model.safetensors")
    assert explain_failure(full) == (
        "the disk is full while writing /out/model.safetensors: free some room, or name a folder on another disk"
    )
    assert explain_failure(PermissionError(errno.EACCES, "denied", "/root/x")) == (
        "/root/x may not be read or written by you: check its permissions"
    )
    assert explain_failure(OSError("a\n  paragraph of\n\nanother library")) == "a paragraph of another library"
    assert explain_failure(MemoryError()) == explain_failure(
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    )
    assert explain_failure(CheckpointError("x is truncated")) == "x is truncated"


def test_bugs_keep_their_traceback() -> None:
    assert explain_failure(RuntimeError("size mismatch")) is None
    assert explain_failure(ModuleNotFoundError("no", name="lowbit.typo")) is None
    assert explain_failure(ValueError("bug")) is None


def test_long_paragraphs_are_cut_at_a_word() -> None:
    line = one_line("word " * 200)
    assert len(line) <= LONGEST_SENTENCE + 4 and line.endswith("word ...")


# --- output ----------------------------------------------------------------------------------------------------------


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True)
    output.say("for people")
    output.table(("a", "b"), [("1", "2")])
    output.result({"a": 1})
    captured = capsys.readouterr()
    assert captured.out == '{\n "a": 1\n}\n'
    assert captured.err.splitlines() == ["for people", "a  b", "1  2"]


def test_json_is_json_whatever_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"ppl": float("inf"), "rows": [{"error": float("nan")}, (1, 2.5, "nan")]})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"ppl": None, "rows": [{"error": None}, [1, 2.5, "nan"]]}


def test_plain_table_aligns_numbers_to_the_right() -> None:
    assert table_lines(("name", "size"), [("a", "10.0 MB"), ("long name", "1 B")], right=("size",)) == [
        "name          size",
        "a          10.0 MB",
        "long name      1 B",
    ]
    assert table_lines(("name",), []) == ["name"]


def test_long_names_are_folded_to_fit_a_terminal() -> None:
    table = ("weight", "size"), [("model.layers.*.self_attn.q_proj", "1 B"), ("lm_head", "12.0 MB")]
    assert table_lines(*table, right=("size",), width=33) == [
        "weight                       size",
        "model.layers.*.               1 B",
        "self_attn.q_proj",
        "lm_head                   12.0 MB",
    ]
    # Where too little would be left of the names, the terminal may break the lines.
    assert table_lines(*table, right=("size",), width=12) == table_lines(*table, right=("size",))
    word = table_lines(("weight",), [("abcdefghijklmnopqrstuvwxyz",)], width=20)
    assert word == ["weight", "abcdefghijklmnopqrst", "uvwxyz"]


def test_numbers_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 93_100_000, 5e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "93.1 MB",
        "5000.0 TB",
    ]
    assert [count_text(n) for n in (12, 134_515_008, 7e12)] == ["12", "134.5 M", "7000.0 G"]
    assert [seconds_text(s) for s in (0.0123, 4.567)] == ["12.3 ms", "4.57 s"]


def test_number_types_keep_their_limits() -> None:
    assert (COUNT("7"), SHARE("0.5")) == (7, 0.5)
    for kind, text in ((COUNT, "0"), (COUNT, "1.5"), (SHARE, "0"), (SHARE, "nan")):
        with pytest.raises(Exception, match="is not a number"):
            kind(text)
