"""`from_pretrained` of every class here, with the words of optimum-intel's.

    a folder of graphs         opened; compressed where bits are asked for
    anything else              exported into a folder of its own, which is there as long as what was made of it

What a class finds, opens, compresses and exports is its own affair; the words, their order and what they mean are the same for all.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.checkpoint.temporary import TemporaryFolder
from lowbit.errors import LowbitError
from lowbit.openvino.configs import Quantization
from lowbit.openvino.exporting import quantization_asked
from lowbit.openvino.opening import MODEL, read_model

# How the temporary folders are called that models are exported into.
EXPORTED = "lowbit-openvino-"
# Words of optimum-intel: the class is the task, every graph takes inputs of any size, and nothing is copied twice.
_IDLE = ("task", "use_io_binding", "dynamic_shapes")
# And those that name what is always so, with the one value that they may have.
_ALWAYS = {"use_cache": True, "stateful": True, "use_safetensors": True, "from_onnx": False}
# What says whose copy of a model is meant; other keywords are for an export.
_WHERE = {"revision", "cache_dir", "token", "use_auth_token", "local_files_only", "force_download", "trust_remote_code"}


class FromPretrained:
    """What is made of a folder of graphs, and of anything that can be exported into one."""

    # The call that writes a model in memory into a folder, and what such models are written in.
    writes: ClassVar[str] = "lowbit.openvino.{kind}.export(model, folder)"
    library: ClassVar[str] = "transformers"
    # The file of the graph.
    graph_name: ClassVar[str] = MODEL
    # Where the graphs were written to by an export: they are read from there as long as the model lives.
    _kept: TemporaryFolder | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        export: bool | None = None,
        load_in_8bit: bool | None = None,
        load_in_4bit: bool | None = None,
        quantization_config: Any = None,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        compile: bool = True,
        config: Any = None,
        **keywords: Any,
    ) -> Self:
        """What lies in a folder in OpenVINO's form, or anything that transformers, diffusers or lowbit read, exported first.

        Without a word about bits a model above 1e9 weights is exported in 8, and says so; load_in_8bit=False keeps its own type.
        `keywords` are those of transformers that say whose copy of a model is meant, and trust_remote_code.
        """
        asked = quantization_asked(load_in_8bit, load_in_4bit, quantization_config)
        cls._check(model_id, ov_config, keywords)
        if keywords.get("subfolder") and Path(model_id).expanduser().is_dir():
            model_id = Path(model_id).expanduser() / keywords.pop("subfolder")
        opened = {"device": device, "ov_config": ov_config, "config": config}
        opened["trust_remote_code"] = bool(keywords.get("trust_remote_code"))
        found = cls._find(model_id, keywords)
        if found is not None and not (export and cls._has_source(found)):
            unused = sorted(keywords.keys() - _WHERE - {"subfolder"})
            if unused:
                warnings.warn(f"{', '.join(unused)}: is for an export, and {found} has its graph already", stacklevel=2)
            made = cls._open(found, compile=compile and asked is None, **opened)
            if asked is not None:
                made._compress_(asked, found, keywords)
                if compile:
                    made.compile()
            return made
        if export is False and Path(model_id).expanduser().is_dir():
            read_model(*cls._looked_for(Path(model_id).expanduser()))  # says what the folder lacks
        kept = TemporaryFolder(EXPORTED)
        folder = kept.path / "model"
        cls._write(model_id, folder, asked, load_in_8bit is None, keywords)
        made = cls._open(folder, compile=compile, **opened)
        made._kept = kept
        return made

    def reshape(self, *_: Any, **__: Any) -> None:
        """optimum-intel's word for fixing sizes."""
        raise LowbitError(
            "the graph takes inputs of any size, so leave reshape out: where a device needs fixed ones, set them with "
            "compile=False and model.model.reshape(...), which is OpenVINO's own, before the first call"
        )

    @classmethod
    def _check(cls, model_id: Any, ov_config: Any, keywords: dict[str, Any]) -> None:
        """Refuse what has no meaning here, and take away what changes nothing."""
        if not isinstance(model_id, str | Path):
            raise LowbitError(
                f"from_pretrained takes a folder or a name, not a {type(model_id).__name__}: "
                f"{cls.writes.format(kind=cls.__name__)} writes a model in memory into a folder to open here"
            )
        if not isinstance(ov_config, Mapping | None):
            raise LowbitError(f"ov_config is a dict of OpenVINO's properties, not a {type(ov_config).__name__}")
        for name, usual in (_ALWAYS | {"file_name": cls.graph_name, "library_name": cls.library}).items():
            given = keywords.pop(name, usual)
            if given not in (usual, None):
                raise LowbitError(f"{name}={given!r} is not what an exported model has here: leave it out")
        idle = [name for name in _IDLE if keywords.pop(name, None) is not None]
        if idle:
            warnings.warn(f"{', '.join(idle)}: does nothing here and may be left out", stacklevel=3)

    @classmethod
    @abstractmethod
    def _find(cls, model_id: str | Path, keywords: Mapping[str, Any]) -> Path | None:
        """The folder of graphs that is meant; None where there is none yet."""

    @classmethod
    @abstractmethod
    def _has_source(cls, folder: Path) -> bool:
        """Whether a folder of graphs holds the weights too that they could be made of anew."""

    @classmethod
    @abstractmethod
    def _looked_for(cls, folder: Path) -> tuple[Path, str]:
        """The folder and the name of a graph that it would hold."""

    @classmethod
    @abstractmethod
    def _open(cls, folder: Path, **words: Any) -> Self:
        """What a folder of graphs holds."""

    @classmethod
    @abstractmethod
    def _write(
        cls,
        source: str | Path,
        folder: Path,
        asked: Quantization | None,
        large_in_8_bits: bool,
        keywords: dict[str, Any],
    ) -> None:
        """Export into a folder that is not there yet."""

    @abstractmethod
    def _compress_(self, asked: Quantization, source: Path, keywords: Mapping[str, Any]) -> None:
        """Compress the graphs as a configuration asks for."""

    @abstractmethod
    def compile(self, *_: Any, **__: Any) -> None:
        """Make the graphs ready on their device."""
