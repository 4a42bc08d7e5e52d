"""auto-round, by its own defaults. Settings: `bits`, `group`, `symmetric`, `iterations`.

With iterations: `extended` by its extension for few bits, `searched` from scales and zero points of its joint search.
Without: `algorithm` awq, or rounding to nearest, `optimised` or not. It casts a model to bf16 before it rounds, and what
is read back is bf16 too, unless `amp` is false.
"""

import rounding
from auto_round import AutoRound
from transformers import AutoTokenizer


def round_model(settings, given, tokens, meter):
    model = rounding.load_model(given.model, "cpu")  # it moves what it works on by itself
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    more = {}
    if settings.get("algorithm"):
        more = {"algorithm": settings["algorithm"]}
    elif not settings["iterations"]:
        more = {"disable_opt_rtn": not settings["optimised"], "disable_model_free": True}
    if settings.get("extended"):
        more["enable_alg_ext"] = True
    if settings.get("searched"):
        more["enable_neuqi"] = True
    if "amp" in settings:
        more["amp"] = settings["amp"]
    with meter:
        rounder = AutoRound(
            model,
            tokenizer=tokenizer,
            bits=settings["bits"],
            group_size=settings["group"] or -1,
            sym=settings["symmetric"],
            iters=settings["iterations"],
            dataset=list(tokens.split(1)),
            nsamples=len(tokens),
            seqlen=tokens.shape[1],
            seed=rounding.SEED,
            device_map=given.device,
            **more,
        )
        rounded, _ = rounder.quantize()
    return rounding.dense_weights(rounded), {"zero_bits": 0 if settings["symmetric"] else settings["bits"]}


if __name__ == "__main__":
    rounding.serve(round_model)
