"""The engine on a CPU, without torch: a saved folder or a GGUF file in, text out."""
