"""What travels along with a model: everything small that is not weights, from a folder or out of a GGUF file."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.configs.base import CONFIG_FILE
from lowbit.contents import ACTIVATIONS, CONFIG, GENERATION_CONFIG, INDEX, OWN_CONFIG, REPORT
from lowbit.interop.gguf import open_gguf
from lowbit.runtime.engine_file import ENGINE_FILE

# These suffixes, and licences whatever they are called.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".py")
_TEMPLATES = "additional_chat_templates"
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_WRITTEN = (
    CONFIG,
    OWN_CONFIG,
    REPORT,
    ACTIVATIONS,
    INDEX,
    ENGINE_FILE,
    GENERATION_CONFIG,
    "pytorch_model.bin.index.json",
    CONFIG_FILE,
)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, processor, remote code, templates and licences."""
    if source.is_file():
        open_gguf(source).write_tokenizer(folder)
        return
    for path in (*sorted(source.iterdir()), *sorted(source.glob(f"{_TEMPLATES}/*"))):
        name = path.relative_to(source)
        if path.is_file() and travels(str(name)):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)


def travels(name: str) -> bool:
    """Whether a file of a model goes along when it is saved low-bit: everything small that is not weights."""
    if name in _WRITTEN or name.endswith(".safetensors.index.json") or Path(name).parent.name not in ("", _TEMPLATES):
        return False
    return Path(name).suffix in _COMPANIONS or name.upper().startswith(_LICENCES)
