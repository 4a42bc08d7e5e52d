"""What old scripts expect of transformers and peft, and what these are today: one table, a row each with its reason.

An old script meets today's libraries before it meets lowbit: an argument has another name, a class is gone, a call that gave a
tensor gives a dictionary. Each row waits for the import of the module that it is about and changes one thing there, so that the old
call works; it says so, once, when a script really makes that call. The rows apply inside the process of a script that the runner or
`install` was asked for, and nowhere else; `undo` takes them back.

    trainer.py     arguments of training        tokenizers.py  how text becomes tokens
    loading.py     keywords of from_pretrained  caches.py      keys and values as tuples
    pipelines.py   tasks that are gone          generating.py  keywords of generate
    gone.py        names and modules that are elsewhere, or nowhere
"""

from __future__ import annotations

from lowbit.compat.shims.table import SHIMS, Applied

__all__ = ["SHIMS", "Applied"]
