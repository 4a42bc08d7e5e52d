"""The two values of `quant_method` that lowbit writes into a config.json: its own, and compressed-tensors'."""

OWN_METHOD = "lowbit"
COMPRESSED_METHOD = "compressed-tensors"
