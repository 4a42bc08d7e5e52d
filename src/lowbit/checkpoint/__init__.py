"""Saving and loading low-bit models: ordinary Hugging Face folders of safetensors.

Nothing is imported here: `hub`, which the command line asks for a name, works without torch.
"""
