"""Names of the hub, asked of a hub that runs here: what is found, what is not, and what is done when nobody answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unit.checkpoint_cases import EVEN, make
from unit.ir_cases import Toy
from unit.test_packed_saves import KINDS, write

pytestmark = [pytest.mark.transformers, pytest.mark.slow]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import lowbit
from lowbit.cli.source import find_source
from lowbit.errors import CheckpointError

def said(name, **keywords):
    try:
        lowbit.AutoModelForCausalLM.from_pretrained(name, **keywords)
    except (CheckpointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"
"""
PRINT = "import json\nprint(json.dumps(told))"
# A port that no server listens on.
NOBODY = "http://127.0.0.1:9"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: whether a model is there, and its files."""

    root: Path

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")[0]
        if name != self.path and (self.root / name).is_dir():
            home = self.root / name
            files = [{"rfilename": str(path.relative_to(home))} for path in home.rglob("*") if path.is_file()]
            return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode())
        name, _, rest = self.path.removeprefix("/").partition("/resolve/")
        file = self.root / name / rest.partition("/")[2]
        if rest and file.is_file():
            return self.answer(file.read_bytes())
        kind = "EntryNotFound" if rest and (self.root / name).is_dir() else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", kind)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        for header, value in {
            "ETag": f'"{len(body)}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub that has the models in a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHere", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    make("llama", root / "owner" / "tiny", **EVEN)
    make("llama", root / "owner" / "pickled", **EVEN)
    (root / "owner" / "pickled" / "model.safetensors").rename(root / "owner" / "pickled" / "pytorch_model.bin")
    write(root / "owner" / "tiny", root / "owner" / "gptq", *KINDS["gptq"][:2])
    Toy.make().save(root / "owner" / "graph")
    (root / "tiny").symlink_to(root / "owner" / "tiny")
    with serving(root) as endpoint:
        yield endpoint


def run(script: str, endpoint: str, home: Path) -> dict[str, Any]:
    """What a script prints, in a process of its own: the hub's client reads its address when it is imported."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script + PRINT],
        cwd=home,
        env={
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "cache"),
            "PATH": "",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def fetched(hub: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """What was said while the hub answered, and the folder of the process that asked."""
    home = tmp_path_factory.mktemp("home")
    # What lies here under a similar name hides no model of the hub.
    for name in ("Tiny-4bit", "tiny2", "owner"):
        (home / name).mkdir()
    script = """
told = {
    "packed": said("owner/tiny", load_in_4bit=True),
    "one word": said("tiny", load_in_4bit=True),
    "packed elsewhere": said("owner/gptq", load_in_4bit=True),
    "source": str(find_source("owner/tiny")),
    "mistyped": said("tiny-4bits"),
    "another": said("owner/large"),
    "no file": said("owner/tiny", gguf_file="tiny.gguf"),
    "pickled": said("owner/pickled", load_in_4bit=True),
}
"""
    return run(script, hub, home), home


def test_names_of_the_hub_are_found_whatever_lies_here(fetched: tuple[dict[str, str], Path]) -> None:
    told, _ = fetched
    assert told["packed"] == told["one word"] == told["packed elsewhere"] == "loaded"
    assert told["source"] == "Source(kind='hub', name='owner/tiny')"


def test_what_belongs_to_a_model_of_the_hub_is_saved_with_it(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "hub" / "owner" / "tiny", **EVEN)
    write(folder, folder.parent / "gptq", *KINDS["gptq"][:2])
    (folder.parent / "gptq" / "original").mkdir()
    for name in (
        "preprocessor_config.json",
        "LICENSE",
        "weights.bin",
        "../gptq/merges.txt",
        "../gptq/original/a.safetensors",
    ):
        (folder / name).write_text("{}")
    script = f"""
import transformers, warnings
from pathlib import Path
from lowbit.checkpoint.hub import _ask

def saved(model, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_low_bit(name)
    return sorted(path.name for path in Path(name).iterdir()), [str(warning.message) for warning in caught]

model = lowbit.AutoModelForCausalLM.from_pretrained("owner/tiny", load_in_4bit=True)
plain = lowbit.optimize_model(transformers.AutoModelForCausalLM.from_pretrained("owner/tiny"))
told = {{"packed": saved(model, "packed"), "plain": saved(plain, "plain")}}
elsewhere = lowbit.AutoModelForCausalLM.from_pretrained("owner/gptq", load_in_4bit=True)
told["packed elsewhere"] = saved(elsewhere, "elsewhere")
told["unread"] = [str(path) for path in Path(".").rglob("a.safetensors")]
Path({str(folder)!r}).rename("gone")  # from now on the hub knows no such model
_ask.cache_clear()
told["gone"] = saved(model, "packed")
"""
    with serving(tmp_path / "hub") as endpoint:
        told = run(script, endpoint, tmp_path / "home")
    files, warned = told["packed"]
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "LICENSE"} <= set(files)
    assert not warned and "weights.bin" not in files
    assert told["plain"] == [files, []]
    files_elsewhere, warned = told["packed elsewhere"]
    assert {"tokenizer.json", "merges.txt"} <= set(files_elsewhere) and not warned and not told["unread"]
    files_then, warned_then = told["gone"]
    assert files_then == files  # they are in the cache by now
    assert "beside its weights (tokenizer, processor, code) could not be fetched" in warned_then[0]


def test_what_the_hub_does_not_have_is_one_sentence_with_what_lies_here(fetched: tuple[dict[str, str], Path]) -> None:
    told, home = fetched
    assert told["mistyped"].startswith("CheckpointError: there is no file or folder tiny-4bits (did you mean Tiny-4bit")
    assert "and the hub has no such model for you: 404" in told["mistyped"]
    assert f"(the path is right up to {home / 'owner'}), and the hub has no such model" in told["another"]
    assert told["no file"] == "CheckpointError: the hub's owner/tiny has no file tiny.gguf"


def test_pickles_of_the_hub_are_refused(fetched: tuple[dict[str, str], Path]) -> None:
    assert "weights in owner/pickled are pickles (pytorch_model.bin)" in fetched[0]["pickled"]


def test_where_nobody_answers_what_was_fetched_is_taken(fetched: tuple[dict[str, str], Path]) -> None:
    script = """
told = {
    "again": said("owner/tiny", load_in_4bit=True),
    "packed elsewhere": said("owner/gptq", load_in_4bit=True),
    "source": find_source("owner/tiny").kind,
    "mistyped": said("tiny-4bits"),
    "not to be asked": said("owner/large", local_files_only=True),
}
"""
    told = run(script, NOBODY, fetched[1])
    assert (told["again"], told["packed elsewhere"], told["source"]) == ("loaded", "loaded", "folder")
    assert "did you mean Tiny-4bit" in told["mistyped"] and "and the hub does not answer: " in told["mistyped"]
    assert "was not to be asked (local_files_only)" in told["not to be asked"]


def test_a_graph_on_the_hub_is_fetched_and_not_exported(hub: str, tmp_path: Path) -> None:
    script = """
from lowbit.openvino import OVModelForCausalLM
model = OVModelForCausalLM.from_pretrained("owner/graph")
told = {"kinds": sorted({op.get_type_name() for op in model.model.get_ordered_ops()})[:2], "folder": str(model.folder)}
"""
    told = run(script, hub, tmp_path / "home")
    assert told["kinds"] and COMMIT in told["folder"]
