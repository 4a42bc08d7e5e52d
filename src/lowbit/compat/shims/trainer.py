"""Arguments of training that were renamed or taken away in transformers 5."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from lowbit.compat.replacing import Replacement
from lowbit.compat.shims.shim import Keyword, dropped, renamed, say, translated

_ONE_FORM = "checkpoints are always saved as safetensors"
_LAUNCHER = "the launcher and accelerate decide on processes and devices"
_PROFILE = "half precision is torch's own, through bf16 and fp16"
_PER_DEVICE = {
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


_UNSAID = object()


def _by_length(value: Any) -> dict[str, Any]:
    return {"train_sampling_strategy": "group_by_length"} if value in (True, "True", "true", "1") else {}


def _inputs_for_metrics(value: Any) -> dict[str, Any]:
    return {"include_for_metrics": ["inputs"]} if value else {}


def _warm(value: Any) -> dict[str, Any]:
    """A part of all steps; 0 says nothing."""
    return {"warmup_steps": float(value)} if float(value or 0) else {}


ARGUMENTS = {
    keyword.old: keyword
    for keyword in (
        renamed("evaluation_strategy", "eval_strategy"),
        renamed("no_cuda", "use_cpu"),
        renamed("push_to_hub_token", "hub_token"),
        renamed("push_to_hub_model_id", "hub_model_id"),
        renamed("torchdynamo", "torch_compile_backend"),
        renamed("xpu_backend", "ddp_backend"),
        *(renamed(old, new) for old, new in _PER_DEVICE.items()),
        Keyword("warmup_ratio", "is warmup_steps today, which takes a part of all steps too", _warm),
        Keyword("group_by_length", 'is train_sampling_strategy="group_by_length" today', _by_length),
        Keyword("include_inputs_for_metrics", 'is include_for_metrics=["inputs"] today', _inputs_for_metrics),
        dropped("fp16_backend", _PROFILE),
        dropped("fp16_opt_level", _PROFILE),
        dropped("half_precision_backend", _PROFILE),
        dropped("include_tokens_per_second", "speed is reported without asking"),
        dropped("jit_mode_eval", "use torch_compile"),
        dropped("logging_dir", "logs lie under output_dir, or where TENSORBOARD_LOGGING_DIR says"),
        dropped("mp_parameters", _LAUNCHER),
        dropped("overwrite_output_dir", "output_dir is always written to"),
        dropped("past_index", "models keep their caches themselves"),
        dropped("ray_scope", _LAUNCHER),
        dropped("save_safetensors", _ONE_FORM),
        dropped("sharded_ddp", "use fsdp"),
        dropped("tpu_metrics_debug", _LAUNCHER),
        dropped("tpu_num_cores", _LAUNCHER),
        dropped("use_ipex", "lowbit's layers need no second optimiser of the graph"),
        dropped("use_legacy_prediction_loop", "there is one loop"),
        dropped("use_mps_device", _LAUNCHER),
    )
}
# Values of today for those of old, where the argument is the same.
VALUES: dict[str, dict[Any, Any]] = {
    "report_to": {None: "none"},
    "optim": {
        "adamw_hf": "adamw_torch",
        "adamw_apex_fused": "adamw_torch_fused",
        "adamw_torch_npu": "adamw_torch_npu_fused",
    },
    # torch-ccl is gone, and torch takes what the device has: xccl on Intel GPUs, gloo on a CPU.
    "ddp_backend": {"ccl": None},
}


def _make(cls: type, *args: Any, **kwargs: Any) -> Any:
    return object.__new__(cls)


_plain_new = staticmethod(_make)


def _with_values(owner: str, given: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with values of today."""
    for name, values in VALUES.items():
        value = given.get(name, _UNSAID)
        if isinstance(value, str | None) and value in values:
            say(f"{owner}({name}={value!r})", f"is {values[value]!r} today")
            given = given | {name: values[value]}
    return given


def training_arguments(module: ModuleType) -> Iterator[Replacement]:
    """Scripts make classes of their own from this one, and each gets an `__init__` of its own, after it is made: it is met in
    `__new__`, which Python calls before it."""
    base = module.TrainingArguments
    if "__new__" not in vars(
        base
    ):  # taken away again, Python would refuse all arguments: so one that does nothing stays
        base.__new__ = _plain_new

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        home = next(kind for kind in cls.__mro__ if "__init__" in vars(kind))
        begin = vars(home)["__init__"]
        if not hasattr(begin, "of_old"):
            home.__init__ = _taking_old_arguments(begin, base)  # type: ignore[misc]
        return object.__new__(cls)

    yield Replacement(base, "__new__", staticmethod(new))


def _taking_old_arguments(begin: Callable[..., None], base: type) -> Callable[..., None]:
    """An `__init__` that translates first, as long as the shim is in force."""
    accepted = inspect.signature(begin).parameters

    @functools.wraps(begin)
    def begin_old(self: Any, *args: Any, **kwargs: Any) -> None:
        if vars(base)["__new__"] is not _plain_new:
            owner = type(self).__name__
            kwargs = _with_values(owner, translated(owner, ARGUMENTS, kwargs, accepted))
        begin(self, *args, **kwargs)

    begin_old.of_old = True  # type: ignore[attr-defined]
    return begin_old


def argument_parser(module: ModuleType) -> Iterator[Replacement]:
    """The same words on a command line that HfArgumentParser reads."""
    parse = module.HfArgumentParser.parse_args_into_dataclasses

    @functools.wraps(parse)
    def parse_old(self: Any, args: list[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        import sys

        return parse(self, translated_flags(self, sys.argv[1:] if args is None else list(args)), *rest, **kwargs)

    yield Replacement(module.HfArgumentParser, "parse_args_into_dataclasses", parse_old)


def translated_flags(parser: Any, args: list[str]) -> list[str]:
    """A command line in today's words: `--warmup_ratio 0.03` becomes `--warmup_steps 0.03`."""
    from transformers import TrainingArguments

    if not any(issubclass(kind, TrainingArguments) for kind in parser.dataclass_types):
        return args
    now: list[str] = []
    while args:
        flag, *args = args
        name, has_value, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or name not in ARGUMENTS or flag.split("=")[0] in parser._option_string_actions:
            now.append(flag)
            continue
        if not has_value and args and not args[0].startswith("--"):
            value, *args = args
        say(f"--{name}", ARGUMENTS[name].reason)
        for new, given in ARGUMENTS[name].translate(value or True).items():
            now += [f"--{new}", str(given)]
    return now


def trainer(module: ModuleType) -> Iterator[Replacement]:
    """`Trainer(tokenizer=...)`, and `trainer.tokenizer`."""
    begin = module.Trainer.__init__
    keywords = {"tokenizer": renamed("tokenizer", "processing_class")}

    @functools.wraps(begin)
    def begin_old(self: Any, *args: Any, **kwargs: Any) -> None:
        accepted = inspect.signature(begin).parameters
        begin(self, *args, **translated("Trainer", keywords, kwargs, accepted))

    yield Replacement(module.Trainer, "__init__", begin_old)
    yield Replacement(module.Trainer, "__init_subclass__", classmethod(_of_old_trainers))
    if not hasattr(module.Trainer, "tokenizer"):
        yield Replacement(module.Trainer, "tokenizer", property(_tokenizer))


def _tokenizer(trainer: Any) -> Any:
    say("trainer.tokenizer", "is called processing_class today")
    return trainer.processing_class


def _of_old_trainers(cls: type, /, **kwargs: Any) -> None:
    """A class of the script's own whose compute_loss does not know the third argument that today's Trainer gives."""
    object.__init_subclass__(**kwargs)
    compute = vars(cls).get("compute_loss")
    if compute is None:
        return
    accepted = inspect.signature(compute).parameters
    added = "num_items_in_batch"
    if added in accepted or any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return

    @functools.wraps(compute)
    def compute_loss(self: Any, *args: Any, **given: Any) -> Any:
        say(f"{cls.__name__}.compute_loss", f"is given {added} today; it is left out")
        given.pop(added, None)
        return compute(self, *args, **given)

    cls.compute_loss = compute_loss  # type: ignore[attr-defined]
