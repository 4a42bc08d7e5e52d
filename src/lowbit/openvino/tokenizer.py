"""Tokenizer and detokenizer as graphs, by openvino-tokenizers; the one door to that package.

The converter knows most tokenizers and not all of them exactly, so the numbers of a few texts are compared with those of
tokenizer.json, which stays the truth. It reads the tokenizer through transformers. A tokenizer that cannot be converted
is a remark and no failure: everything but OpenVINO's own pipelines reads tokenizer.json.

transformers imports torch, which takes 3.5 s of a processor and 270 MB, and no tokenizer needs it. So where torch is not there yet
a process of its own converts the tokenizer without it, beside whatever else is done (`Conversion`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from lowbit.errors import LowbitError, MissingPackageError, one_line
from lowbit.openvino.library import core, ov, release, save
from lowbit.runtime.files import read_tokenizer

TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
# Words, numbers, code, accents, another script, an emoji, spaces and lines.
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, 3.14159 of 1,000 people didn't know it!",
    "def add(a, b):\n    return a + b  # comment\n",
    "Füße, naïve café, año",
    "你好，世界",
    "A smile 🙂 at the end",
    "  spaces   and\ttabs\n\nand lines ",
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def write_tokenizers(folder: Path) -> list[str]:
    """Write both graphs beside the tokenizer's files; returns remarks."""
    if not has_tokenizer(folder):
        return ["the model has no tokenizer, so none is written"]
    try:
        _check_release()
        tokenizer, detokenizer = _convert(folder)
    except MissingPackageError as error:
        return [f"no tokenizer for OpenVINO's own pipelines is written: {error}"]
    except LowbitError as error:
        return [str(error)]
    save(tokenizer, folder / TOKENIZER)
    save(detokenizer, folder / DETOKENIZER)
    return differences(folder)


# Without the collector, which would look through a vocabulary's lists a dozen times, a tenth of all that such a process does.
_WITHOUT_TORCH = """
import gc, json, sys
from pathlib import Path
gc.disable()
sys.modules["torch"] = None
from lowbit.openvino.tokenizer import write_tokenizers
print(json.dumps(write_tokenizers(Path(sys.argv[1]))))
"""


class Conversion:
    """`write_tokenizers`, begun; `notes` waits for its end. The tokenizer's files lie in the folder already."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, None
        if sys.modules.get("torch") is None and sys.executable and has_tokenizer(folder):
            line = [sys.executable, "-c", _WITHOUT_TORCH, str(folder)]
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(line, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True)

    def __enter__(self) -> Conversion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def notes(self) -> list[str]:
        """The remarks."""
        if self._process is not None:
            said, _ = self._process.communicate()
            if self._process.returncode == 0:
                found: list[str] = json.loads(said.splitlines()[-1])
                return found
        return write_tokenizers(self._folder)


def differences(folder: Path) -> list[str]:
    """The texts that the graph cuts otherwise than tokenizer.json, in a sentence; nothing where all are alike."""
    truth = read_tokenizer(folder)
    if truth is None:
        return []
    cut = compiled_tokenizer(folder)
    odd = [text for text in SAMPLES if cut(text) != truth.encode(text)]
    if not odd:
        return []
    return [
        f"{len(odd)} of {len(SAMPLES)} sample texts get other token numbers from {TOKENIZER} than from tokenizer.json "
        f"({odd[0]!r} for one): OpenVINO's own pipelines read the former"
    ]


def compiled_tokenizer(folder: Path) -> Any:
    """A function from a text to its numbers, by the graph."""
    request = tokenizer_core().compile_model(str(folder / TOKENIZER), "CPU").create_infer_request()

    def cut(text: str) -> list[int]:
        return [int(number) for number in request.infer([ov.Tensor([text])])["input_ids"][0]]

    return cut


@cache
def tokenizer_core() -> Any:
    """The process's Core, which from here on knows the operations of these graphs.

    One of its own would be let go one day. The CPU plugin of a Core puts a stack for signals under the thread and takes it away
    with itself, and when two go in the order in which they came the thread is left with one that is gone: Ctrl-C then ends in a
    crash.
    """
    import openvino_tokenizers

    found = core()
    found.add_extension(str(openvino_tokenizers._ext_path))
    return found


def _check_release() -> None:
    """Both packages call each other's compiled code: another release ends in a crash."""
    try:
        import openvino_tokenizers
    except ModuleNotFoundError as error:
        raise MissingPackageError("openvino-tokenizers", "OpenVINO's form of a tokenizer", "openvino") from error
    found = str(openvino_tokenizers.__version__)
    if not found.startswith(release()):
        raise LowbitError(
            f"openvino-tokenizers {found} does not belong to openvino {release()}, so no tokenizer is written: "
            "pip install 'lowbit[openvino]' installs one release of both"
        )


def _convert(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingPackageError("transformers", "converting a tokenizer", "torch") from error
    from openvino_tokenizers import convert_tokenizer

    try:
        found: tuple[Any, Any] = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise LowbitError(
            f"openvino-tokenizers cannot convert this tokenizer ({one_line(str(error))}), which OpenVINO's own pipelines need; "
            "tokenizer.json is there for everything else"
        ) from error
    return found
