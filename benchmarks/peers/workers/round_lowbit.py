"""Ours. Settings: `format`, `rounder`, `options`, `scaler`, `calibrated`, and `budget` where bits are allocated."""

import rounding

from lowbit.calibration import Calibration
from lowbit.formats import as_format
from lowbit.grid import unpack
from lowbit.layers import packed_weights
from lowbit.options import ROUNDER_OPTIONS, options_from
from lowbit.quantize import allocate_bits, quantize_
from lowbit.recipe import Recipe


def round_model(settings, given, tokens, meter):
    model = rounding.load_model(given.model, given.device)
    rounder = settings["rounder"]
    options = options_from("rounder", rounder, settings.get("options", {}), ROUNDER_OPTIONS)
    scaler = settings.get("scaler", "")
    recipe = Recipe(as_format(settings["format"]), rounder=rounder, rounder_options=options, scaler=scaler)
    calibration = Calibration(tokens, "sqlite_train") if settings["calibrated"] else None
    with meter:
        if "budget" in settings:
            recipe = allocate_bits(model, recipe, calibration, settings["budget"])
        report = quantize_(model, recipe, show_progress=False, prepare=False, calibration=calibration)
    weights = rounding.dense_weights(model)
    for name, packed in packed_weights(model).items():
        weights[f"{name.removesuffix('.packed_weight')}.weight"] = unpack(packed.packed())
    return weights, {"bits": report.bits_per_weight, "formats": report.formats()}


if __name__ == "__main__":
    rounding.serve(round_model)
