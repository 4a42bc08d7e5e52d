"""Functions that transformers took away, and what scripts of old get when they call them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

# What is said of each when a script first asks for it, and of the AdamW beside them.
REASONS = {
    "AdamW": "is torch's today",
    "get_full_repo_name": "is gone; the name is put together here",
    "is_flax_available": "is gone with Flax's models: it says no",
    "is_ipex_available": "is gone; lowbit answers that package's name, so it says yes",
    "is_safetensors_available": "is gone: it says yes, transformers needs them",
    "is_tf_available": "is gone with TensorFlow's models: it says no",
    "no_init_weights": "is transformers.initialization.no_init_weights today",
    "send_example_telemetry": "is gone, and sends nothing",
}


def is_ipex_available() -> bool:
    """Its name is answered."""
    return True


def is_safetensors_available() -> bool:
    return True


def is_tf_available() -> bool:
    return False


def is_flax_available() -> bool:
    return False


def send_example_telemetry(*_: Any, **__: Any) -> None:
    """Nothing is sent."""


def get_full_repo_name(model_id: str, organization: str | None = None, token: str | None = None) -> str:
    """A model's name behind that of its owner, whom the hub is asked for where nobody says it."""
    if organization is None:
        import huggingface_hub

        organization = huggingface_hub.whoami(token)["name"]
    return f"{organization}/{model_id}"


def no_init_weights(_enable: bool = True) -> AbstractContextManager[Any]:
    """Models that are made inside get no numbers drawn, if `_enable`."""
    if not _enable:
        return nullcontext()
    from transformers.initialization import no_init_weights as now

    context: AbstractContextManager[Any] = now()
    return context
