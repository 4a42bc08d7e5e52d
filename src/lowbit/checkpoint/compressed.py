"""compressed-tensors' forms and ours: the same bits under other names.

pack-quantized, for weights alone

    ours     codes  [out, words]   scales [out, G]   zeros  uint8 [out, G]
    theirs   weight_packed         weight_scale      weight_zero_point int32 [ceil(out * bits / 32), G]
    weight_shape int64 [2]

int-quantized, for weights and activations of 8 bits

    ours     codes [out, words]    scales [out, 1]   input_range [2]
    theirs   weight int8 [out, in] weight_scale      input_scale [1], input_zero_point int8 [1]     (fixed ranges only)

Both keep the codes of a row as one dense stream of unsigned numbers, least significant bit first, and both mean
w = scale * (code - zero); only their zero points are packed too, along the outputs. So a folder is theirs or ours at
the price of its names, and transformers reads ours without lowbit (docs/saved_form.md says what is known of vLLM and
SGLang). What their form cannot say (`refusal`) is saved under our own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from lowbit.bits import pack_codes, unpack_codes
from lowbit.checkpoint.layout import Held, stands_for
from lowbit.errors import CheckpointError
from lowbit.formats import PER_CHANNEL, Format
from lowbit.methods import COMPRESSED_METHOD, OWN_METHOD
from lowbit.packing import PackedTensor, code_shape, scale_shape
from lowbit.schemes import ACTIVATIONS, STRATEGIES, format_of

FORMAT, INTEGERS = "pack-quantized", "int-quantized"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
NAMES = (PACKED, SCALE, SHAPE, ZERO)
WHOLE, INPUT_SCALE, INPUT_ZERO = "weight", "input_scale", "input_zero_point"
INTEGER_NAMES = (WHOLE, SCALE, INPUT_SCALE, INPUT_ZERO)
# Codes of 8 bits are unsigned, and int8 is what is above the middle of them.
_MIDDLE, _STEPS = 128, 255
_SCALE_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
EXPERTS_TARGET = r"re:.*experts\..*"


def refusal(held: Held) -> str | None:
    """Why a packed weight cannot be said in their form, or None."""
    format, in_features = held.weight.format, held.weight.shape[-1]
    if held.role == "embedding" and not held.tied_to:
        return None  # written dense
    if format.kind != "int":
        return f"{format} is not an integer format"
    if format.fine_zeros:
        return f"{format} counts zero points in fractions of a code, and theirs are whole (_asym has such)"
    if format.scale_block:
        return f"{format} has doubly quantised scales"
    if format.act_bits != 16 and held.role == "experts":
        return f"{format} quantises the activations of experts"
    if format.group_size == 0 or (format.group_size > 0 and in_features % format.group_size):
        return f"{in_features} inputs in groups of {format.group_size} leave a tail"
    if "order" in held.weight.tensors:
        return "its inputs are reordered"
    if held.role not in ("linear", "embedding", "experts") or stands_for(held.module) == "Conv1D":
        return f"a {stands_for(held.module)} has no place in it"
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


def to_tensors(packed: PackedTensor) -> dict[str, torch.Tensor]:
    """A packed weight [out, in] under their names."""
    if packed.format.act_bits != 16:
        return _to_integers(packed)
    tensors = {
        PACKED: packed.codes.contiguous(),
        SCALE: packed.scales.contiguous(),
        SHAPE: torch.tensor(packed.shape, dtype=torch.int64),
    }
    if packed.zeros is not None:
        # Along the outputs: one stream per group.
        tensors[ZERO] = pack_codes(packed.zeros.t().contiguous(), packed.format.bits).t().contiguous()
    return tensors


def _to_integers(packed: PackedTensor) -> dict[str, torch.Tensor]:
    codes = unpack_codes(packed.codes, packed.format.bits, packed.shape[-1]).to(torch.int16)
    tensors = {WHOLE: (codes - _MIDDLE).to(torch.int8), SCALE: packed.scales.contiguous()}
    if packed.input_range is not None:
        low, high = packed.input_range[0].clamp_max(0), packed.input_range[1].clamp_min(0)
        scale = (high - low) / _STEPS
        tensors[INPUT_SCALE] = scale.reshape(1)
        tensors[INPUT_ZERO] = ((-low / scale).round() - _MIDDLE).to(torch.int8).reshape(1)
    return tensors


def config_for(linears: dict[str, Format], experts: Format | None, others: Iterable[str]) -> dict[str, Any]:
    """Their configuration: the format of each packed linear and of all experts, and the paths that stay as they are."""
    counts = Counter(linears.values())
    main = counts.most_common(1)[0][0] if counts else None
    groups: dict[Format, list[str]] = {} if main is None else {main: ["Linear"]}
    for path, format in linears.items():
        if format != main:
            groups.setdefault(format, []).append(path)
    if experts is not None and experts != main:
        # By expression: a reader that fuses experts asks for one scheme for all.
        groups.setdefault(experts, []).append(EXPERTS_TARGET)
    return {
        "quant_method": COMPRESSED_METHOD,
        "format": _form_of(main) if main else FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(format, targets) for i, (format, targets) in enumerate(groups.items())},
        "ignore": sorted(others),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(format: Format, targets: list[str]) -> dict[str, Any]:
    channel = format.group_size == PER_CHANNEL
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else format.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _activations(format),
        "output_activations": None,
        "format": _form_of(format),
    }


def _form_of(format: Format) -> str:
    return FORMAT if format.act_bits == 16 else INTEGERS


def _activations(format: Format) -> dict[str, Any] | None:
    if format.act_bits == 16:
        return None
    return {
        "num_bits": format.act_bits,
        "type": "int",
        "symmetric": not format.fixed_range,
        "strategy": "tensor" if format.fixed_range else "token",
        "dynamic": not format.fixed_range,
        "group_size": None,
        "actorder": None,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def unreadable(config: dict[str, Any]) -> str | None:
    """Why lowbit leaves a configuration of theirs to their own package, or None when it reads it."""
    asks_for_dense = config.get("dequantize") and OWN_METHOD not in config
    if config.get("kv_cache_scheme") or config.get("transform_config") or asks_for_dense:
        return "it does more than pack weights"
    if config.get("quantization_status") not in ("compressed", "frozen"):
        return "its weights are not packed"
    groups = config.get("config_groups") or {}
    if not groups or not all(isinstance(group, dict) for group in groups.values()):
        return "its groups are named presets"
    for group in groups.values():
        weights, activations = group.get("weights") or {}, group.get(ACTIVATIONS)
        expected = INTEGERS if activations else FORMAT
        if (group.get("format") or config.get("format")) != expected or weights.get("type", "int") != "int":
            return "not all of its groups are packed integers"
        if group.get("output_activations") or (activations and not _is_w8a8(weights, activations)):
            return "it quantises activations"
        if weights.get("strategy") not in STRATEGIES or weights.get("actorder") in ("group", True):
            return f"its strategy is {weights.get('strategy')} with actorder {weights.get('actorder')}"
    return None


def _is_w8a8(weights: dict[str, Any], activations: dict[str, Any]) -> bool:
    """Whether a scheme is 8 bits by 8: weights by row, activations by row or by a range of the layer."""
    dynamic = bool(activations.get("dynamic"))
    by = activations.get("strategy") == ("token" if dynamic else "tensor")
    eight = weights.get("num_bits") == activations.get("num_bits") == 8 and activations.get("type", "int") == "int"
    whole = weights.get("strategy") == "channel" and weights.get("symmetric", True)
    return bool(by and eight and whole and (activations.get("symmetric", True) or not dynamic))


def from_tensors(
    name: str, tensors: dict[str, torch.Tensor], shape: tuple[int, ...], scheme: dict[str, Any]
) -> PackedTensor:
    """A packed weight of theirs [.., out, in] in canonical form."""
    missing = [part for part in (WHOLE if scheme.get(ACTIVATIONS) else PACKED, SCALE) if part not in tensors]
    if missing:
        raise CheckpointError(f"{name}: the checkpoint lacks its {missing[0]}")
    format = format_of(name, scheme, _SCALE_DTYPES[tensors[SCALE].dtype])
    if tensors[SCALE].shape != scale_shape(format, shape):
        raise CheckpointError(
            f"{name}: scales of shape {list(tensors[SCALE].shape)} do not fit a {format} weight {list(shape)} of config.json"
        )
    if format.act_bits != 16:
        return _from_integers(name, tensors, format, shape)
    codes = _dense_codes(name, tensors[PACKED], format, shape)
    zeros = None
    if not format.symmetric:
        if ZERO not in tensors:
            raise CheckpointError(f"{name}: the checkpoint lacks its {ZERO}")
        columns = unpack_codes(tensors[ZERO].transpose(-1, -2).contiguous(), format.bits, shape[-2])
        zeros = columns.transpose(-1, -2).contiguous()
    return PackedTensor(format, shape, codes, tensors[SCALE], zeros)


def _from_integers(name: str, tensors: dict[str, torch.Tensor], format: Format, shape: tuple[int, ...]) -> PackedTensor:
    whole, input_range = tensors[WHOLE], None
    if whole.dtype != torch.int8 or tuple(whole.shape) != shape:
        raise CheckpointError(
            f"{name}: the checkpoint has {whole.dtype} {list(whole.shape)}, and int8 {list(shape)} is meant"
        )
    if format.fixed_range:
        if INPUT_SCALE not in tensors:
            raise CheckpointError(f"{name}: the checkpoint lacks its {INPUT_SCALE}")
        scale = tensors[INPUT_SCALE].float().reshape(())
        zero = tensors[INPUT_ZERO].float().reshape(()) + _MIDDLE if INPUT_ZERO in tensors else scale.new_tensor(_MIDDLE)
        input_range = torch.stack([-zero * scale, (_STEPS - zero) * scale])
    codes = pack_codes((whole.to(torch.int16) + _MIDDLE).to(torch.uint8), format.bits)
    return PackedTensor(format, shape, codes, tensors[SCALE], input_range=input_range)


def _dense_codes(name: str, codes: torch.Tensor, format: Format, shape: tuple[int, ...]) -> torch.Tensor:
    """Their codes as one dense stream: before mid 2026 they left the bits over at the end of each word unused."""
    expected = code_shape(format, shape)
    if tuple(codes.shape) == expected:
        return codes
    per_word = 32 // format.bits
    if tuple(codes.shape) != (*expected[:-1], -(-shape[-1] // per_word)):
        raise CheckpointError(
            f"{name}: codes of shape {list(codes.shape)} do not fit a {format} weight {list(shape)} of config.json"
        )
    shifts = torch.arange(per_word, device=codes.device) * format.bits
    loose = (codes.to(torch.int64).unsqueeze(-1) >> shifts) & format.max_code
    return pack_codes(loose.flatten(-2)[..., : shape[-1]].to(torch.uint8), format.bits)
