"""Chat with a model on the engine alone: neither torch nor transformers is imported."""

import sys

import lowbit

model = lowbit.runtime.load(lowbit.demo.model_path(), format="int4")
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(model.chat(messages, max_new_tokens=24).text)
assert "torch" not in sys.modules
