"""The exceptions that lowbit raises on purpose.

    LowbitError
    ├── FormatError          a number format that does not exist, or that contradicts itself
    ├── RecipeError          options that contradict each other or the model
    ├── WeightError          weights that cannot be quantised: NaN, infinite, of a wrong shape
    ├── CheckpointError      a folder or file that is missing, truncated or not what it says it is
    ├── KernelError          a kernel asked for by name that refuses, or the core library failing
    └── MissingPackageError  an optional package is absent; the message holds the line that installs it

Every message is one sentence for the person at the keyboard: what is wrong, where, and what to do about it.
The command line prints it as it stands and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LowbitError(Exception):
    """Base of everything lowbit raises on purpose."""


class FormatError(LowbitError, ValueError):
    """A number format that does not exist, or that contradicts itself."""


class RecipeError(LowbitError, ValueError):
    """Options that contradict each other or the model."""


class WeightError(LowbitError, ValueError):
    """Weights that cannot be quantised."""


class CheckpointError(LowbitError, OSError):
    """A folder or file that is missing, truncated, or not what it says it is."""


class KernelError(LowbitError, RuntimeError):
    """A kernel that was asked for by name and refuses, or the core library reporting a failure."""


class MissingPackageError(LowbitError, ImportError):
    """An optional package is absent."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'lowbit[{extra}]'"
        )
        self.package = package


LONGEST_SENTENCE = 400


def one_line(text: str) -> str:
    """A paragraph as one line, cut at a word if it is very long."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_SENTENCE else words[:LONGEST_SENTENCE].rpartition(" ")[0] + " ..."


def check_text(text: str, what: str) -> str:
    """A text that is one: Python hands on bytes that are no UTF-8 as characters that nothing else takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise LowbitError(f"{what} is no text in UTF-8: convert or rename it first")
    return text


@contextmanager
def understood(sentence: str) -> Iterator[None]:
    """What a file says may be of any kind; which value is odd, only the code that fell over it knows."""
    try:
        yield
    except LowbitError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{sentence} ({one_line(str(error))})") from error


class BareErrors:
    """Errors of the tokenizers library as one sentence: it raises nothing narrower than Exception, and only that is taken."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is Exception:
            raise CheckpointError(f"{self.sentence}: {one_line(str(error))}") from error


def nearest(name: str, known: Iterable[str], count: int = 4) -> str:
    """The tail of an error about an unknown name: the closest names that exist."""
    import difflib  # only who errs needs it

    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=count, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(names)}"
