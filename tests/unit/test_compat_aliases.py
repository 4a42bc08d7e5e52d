"""Old import names inside this process: install, what is refused and how, and undo."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
import warnings

import pytest

import lowbit.compat
from lowbit.compat import ignored
from lowbit.compat.aliases import ALIASES, face_of
from lowbit.compat.missing import FACES, UnknownNameError, refuse_unknown


def test_install_and_undo_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    finders = list(sys.meta_path)
    with lowbit.compat.install():
        module = importlib.import_module("bigdl.llm")
        assert module is importlib.import_module("ipex_llm")
        assert "PYTHONPATH" in os.environ
        with lowbit.compat.install():  # a second one changes nothing, and takes nothing back
            pass
        assert importlib.import_module("neural_compressor").__name__ == f"{FACES}.neural_compressor"
    assert sys.meta_path == finders and "PYTHONPATH" not in os.environ
    assert not [name for name in sys.modules if face_of(name) is not None]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ipex_llm")


@pytest.mark.parametrize("name", ALIASES)
def test_every_old_top_name_has_a_face(name: str) -> None:
    with lowbit.compat.install(children=False):
        assert importlib.import_module(name).__name__ == ALIASES[name]


@pytest.mark.parametrize("statement", ["import ipex_llm.transformer", "from ipex_llm import transformer"])
def test_a_module_that_nobody_documented(statement: str) -> None:
    with (
        lowbit.compat.install(children=False),
        pytest.raises(ModuleNotFoundError, match=r"^lowbit has no ipex_llm\.transformer"),
    ):
        exec(statement)


@pytest.mark.parametrize(
    "name", ["optimum.quanto", "optimum.neuron", "ipex_llm.transformer", "neural_compressor.torch"]
)
def test_a_question_is_answered_and_not_refused(name: str) -> None:
    """Libraries look for a module before they import it."""
    with lowbit.compat.install(children=False):
        assert importlib.util.find_spec(name) is None
        assert importlib.util.find_spec("ipex_llm.transformers") is not None
        with pytest.raises(ModuleNotFoundError, match=r"^lowbit has no "):
            importlib.import_module(name)


@pytest.mark.transformers
def test_what_transformers_asks_for_is_not_there() -> None:
    from transformers.utils import import_utils

    questions = (import_utils.is_optimum_quanto_available, import_utils.is_optimum_neuron_available)
    with lowbit.compat.install(children=False):
        for question in questions:
            question.cache_clear()
        assert [question() for question in questions] == [False, False]
    for question in questions:
        question.cache_clear()


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType(f"{FACES}.ipex_llm.sample")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__all__ = ["load_low_bit"]  # type: ignore[attr-defined]
    answer = refuse_unknown(
        module.__name__, {"GgmlModel": "lowbit.load_low_bit on the .gguf file"}, {"optimize_model": "lowbit.optimize"}
    )
    module.__getattr__ = answer  # type: ignore[method-assign]
    return module


def test_a_missing_name_says_what_to_use(face: types.ModuleType) -> None:
    with pytest.raises(UnknownNameError, match=r"use lowbit\.load_low_bit on the \.gguf file"):
        _ = face.GgmlModel
    with pytest.raises(
        AttributeError, match=r"^lowbit has no ipex_llm\.sample\.load_lowbit: did you mean load_low_bit"
    ):
        _ = face.load_lowbit
    assert not hasattr(face, "anything")
    with (
        lowbit.compat.install(children=False),
        pytest.raises(ImportError, match="did you mean load_low_bit"),
    ):
        exec(f"from {face.__name__} import load_lowbit")


def test_a_name_with_a_home_is_found_when_it_is_used(face: types.ModuleType) -> None:
    from lowbit.optimize import optimize_model

    assert face.optimize_model is optimize_model
    assert face.__dict__["optimize_model"] is optimize_model


def test_an_ignored_parameter_is_named_once() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            ignored.say_ignored("optimize_model", "lightweight_bmm", "every matmul is one kernel here")
    assert [str(warning.message) for warning in seen] == [
        "optimize_model: lightweight_bmm has no effect: every matmul is one kernel here"
    ]
    assert seen[0].filename == __file__


def test_import_is_light() -> None:
    code = "import sys, lowbit.compat; print(sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
