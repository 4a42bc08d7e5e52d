"""Saving and loading low-bit models: ordinary Hugging Face folders of safetensors."""

from lowbit.checkpoint.load import load_low_bit, low_memory_init
from lowbit.checkpoint.save import save_low_bit

__all__ = ["load_low_bit", "low_memory_init", "save_low_bit"]
