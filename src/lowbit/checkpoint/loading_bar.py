"""One bar while transformers loads or writes weights: lowbit's own, in the place of the one that is drawn at once.

transformers lets its bars be made by somebody else (`logging.set_tqdm_hook`). The hook here answers for one bar, the one
that counts the weights, and then takes itself away; every other bar, and every bar of a user with a hook of his own,
is made as before. Versions of transformers without such a hook keep their bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from lowbit.progress import counted

# What transformers writes beside the bars that count weights.
_WEIGHTS = ("Loading weights", "Writing model shards")
_set_hook: Callable[[Any], Any] | None = getattr(logging, "set_tqdm_hook", None)


class _Hook:
    """Answers for the next bar over weights."""

    def __init__(self, label: str, show: bool | None) -> None:
        self.label, self.show = label, show
        self.bar: Any = None

    def __call__(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") not in _WEIGHTS or not args:
            return factory(*args, **kwargs)
        self.remove()
        # Who switched the bars of transformers off wants none of ours, unless this load asks for one.
        off = self.show is None and not logging.is_progress_bar_enabled()
        self.bar = counted(args[0], self.label, False if off else self.show)
        return self.bar

    def install(self) -> None:
        if _set_hook is not None:
            previous = _set_hook(self)
            if previous is not None:
                _set_hook(previous)

    def remove(self) -> None:
        """Take the hook away, if it is still there."""
        if _set_hook is not None:
            current = _set_hook(None)
            if current is not self:
                _set_hook(current)


@contextmanager
def weights_bar(label: str, show: bool | None = None) -> Iterator[None]:
    """Inside, the weights that transformers loads or writes are counted by lowbit's bar."""
    hook = _Hook(label, show)
    hook.install()
    try:
        yield
    finally:
        hook.remove()
        if hook.bar is not None:
            hook.bar.close()


def replace_next_bar(label: str) -> None:
    """The same for a load that began without lowbit: holds until the weights are counted."""
    _Hook(label, None).install()
