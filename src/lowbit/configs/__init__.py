"""The configurations of Neural Compressor's transformers-like API, as recipes."""
