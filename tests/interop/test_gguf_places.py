"""Which GGUF file a path means: the same for the command line, transformers' way in and the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowbit
from interop.test_gguf import write_llama
from lowbit.checkpoint.gguf_source import gguf_file
from lowbit.cli.inspect import read_checkpoint
from lowbit.cli.source import find_source
from lowbit.contents import gguf_in
from lowbit.errors import CheckpointError
from lowbit.runtime.files import open_files


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF"])
def test_a_file_and_the_folder_it_is_alone_in(tmp_path: Path, name: str) -> None:
    file = write_llama(tmp_path / name, "Q8_0")
    (tmp_path / "README.md").write_text("a model")
    for path in (tmp_path, file):
        assert find_source(str(path)).path == gguf_file(path, None) == open_files(path).path == file
        assert read_checkpoint(path).facts["quant_method"] == "gguf"
        assert lowbit.AutoModelForCausalLM.from_pretrained(path, load_in_4bit=True).lowbit_report.layers


def test_of_a_split_series_the_first_and_of_several_none(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"model-{number:05d}-of-00003.gguf").touch()
    assert gguf_in(tmp_path) == tmp_path / "model-00001-of-00003.gguf"
    (tmp_path / "other.gguf").touch()
    for reader in (
        gguf_in,
        lambda path: find_source(str(path)),
        open_files,
        read_checkpoint,
        lambda path: gguf_file(path, None),
    ):
        with pytest.raises(
            CheckpointError, match=r"holds 2 GGUF files: name one of them \(model-00001.*, other.gguf\)"
        ):
            reader(tmp_path)
    assert gguf_file(tmp_path, "other.gguf") == tmp_path / "other.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert gguf_in(tmp_path) is None
