"""Failures as one sentence: what is wrong, where, and what to do about it.

lowbit's own errors are sentences already. The operating system's are numbers, other libraries' are paragraphs; here
both become one line. What is not recognised is a bug, and stays a traceback.
"""

from __future__ import annotations

import errno

from lowbit.errors import LowbitError, MissingPackageError, one_line

# What to say for an error of the operating system; {file} is the file it is about.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full while writing {file}: free some room, or name a folder on another disk",
    errno.EDQUOT: "the disk quota is used up while writing {file}: free some room, or name a folder on another disk",
    errno.EFBIG: "{file} would be larger than this user or disk allows (see ulimit -f): name a folder on another disk",
    errno.ENOENT: "there is no file or folder {file}: check the path",
    errno.EACCES: "{file} may not be read or written by you: check its permissions",
    errno.EPERM: "{file} may not be read or written by you: check its permissions",
    errno.EROFS: "{file} lies on a read-only disk: name another folder",
    errno.ENOTDIR: "{file} lies under something that is a file: name a folder",
    errno.EISDIR: "{file} is a folder, and a file is expected",
    errno.EEXIST: "{file} exists already: name another one",
}
# Optional packages: what needs them, and the extra that installs them.
_OPTIONAL = {
    "torch": ("running a model", "torch"),
    "transformers": ("running a model", "torch"),
    "huggingface_hub": ("loading a model of the hub", "torch"),
    "accelerate": ("loading a model piece by piece", "torch"),
    "gguf": ("reading a GGUF file", "gguf"),
    "peft": ("fine-tuning", "finetune"),
}
_NO_MEMORY = "not enough memory: close other programs, take a smaller model, or name a format with fewer bits"
_SIGNS_OF_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def explain_failure(error: BaseException) -> str | None:
    """The sentence for the user, or None if the error is nothing that a user can do something about."""
    if isinstance(error, LowbitError):
        return one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return str(MissingPackageError(package, *_OPTIONAL[package])) if package in _OPTIONAL else None
    if isinstance(error, ImportError) and error.name is None:  # transformers asking for a package
        return one_line(str(error))
    if isinstance(error, OSError):
        return _explain_system_error(error)
    return _NO_MEMORY if is_no_memory(error) else None


def is_no_memory(error: BaseException) -> bool:
    """Whether memory ran out, Python's, torch's or a GPU's."""
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY)
    return told or isinstance(error, MemoryError)


def _explain_system_error(error: OSError) -> str:
    if error.errno in _SYSTEM_ERRORS:
        return _SYSTEM_ERRORS[error.errno].format(file=error.filename or "the file")
    return one_line(error.strerror or str(error) or type(error).__name__)
