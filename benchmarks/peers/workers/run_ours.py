"""lowbit's engine, without torch. Options: `cache`, `context`, `slots`, `isa` (an instruction set)."""

import time

import serve


def load(given):
    from lowbit.core.calls import set_instruction_set, set_threads
    from lowbit.runtime import load as load_model

    set_threads(given.threads)
    options = {"context": 2048, "slots": 1} | given.options
    if "isa" in options:
        set_instruction_set(options.pop("isa"))
    model = load_model(given.model, **options)
    engine = model.engine

    def decode(context, new, _sequences, seed):
        engine.reset()
        engine.prefill(serve.prompt(context, seed))
        start = time.perf_counter()
        made = engine.continue_greedy(serve.FIRST_PLAIN_TOKEN, new)
        return len(made) / (time.perf_counter() - start)

    def prefill(context, _new, _sequences, seed):
        engine.reset()
        tokens = serve.prompt(context, seed)
        start = time.perf_counter()
        engine.prefill(tokens)
        return context / (time.perf_counter() - start)

    def batch(context, new, sequences, seed):
        slots = list(range(sequences))
        for slot in slots:
            engine.reset(slot)
            engine.prefill(serve.prompt(context, seed + slot), slot)
        tokens = [serve.FIRST_PLAIN_TOKEN + slot for slot in slots]
        start = time.perf_counter()
        for _ in range(new):
            tokens = engine.step(tokens, slots).argmax(-1).tolist()
        return new * sequences / (time.perf_counter() - start)

    def profile(context, new, _sequences, seed):
        """Nanoseconds of one thread by part, for decode (`new` tokens) or prefill (none)."""
        engine.reset()
        if new:
            engine.prefill(serve.prompt(context, seed))
        engine.profile(True)
        if new:
            engine.continue_greedy(serve.FIRST_PLAIN_TOKEN, new)
        else:
            engine.prefill(serve.prompt(context, seed))
        return engine.profile(False)

    # The engine beside which `model.generate` is measured does the same work: decode.
    return {"decode": decode, "generate": decode, "prefill": prefill, "batch": batch, "profile": profile}


if __name__ == "__main__":
    serve.serve(load)
