"""The generation engine: from a saved model to its answers, with numpy, tokenizers, jinja2 and the compiled core.

    from lowbit.runtime import load
    model = load("folder-or-file.gguf")
    print(model.chat("Why is the sky blue?"))

Neither torch nor transformers is imported.
"""

from lowbit.runtime.generation import Answer, Chosen, Piece
from lowbit.runtime.loading import load
from lowbit.runtime.model import Model
from lowbit.runtime.selection import Selection
from lowbit.runtime.settings import BeamSettings, Settings
from lowbit.runtime.text import Tokenizer

__all__ = ["Answer", "BeamSettings", "Chosen", "Model", "Piece", "Selection", "Settings", "Tokenizer", "load"]
