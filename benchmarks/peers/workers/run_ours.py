"""lowbit's engine, without torch. Options: `cache`, `context`, `slots`, `isa` (an instruction set)."""

import os
import random
import signal
import threading
import time

import serve

INTERRUPTS = 5  # in one reading, each at another moment
LATEST = 0.1  # seconds of work before one, at most
PASSES = 4  # over the weights of a repack in one reading
LAID_OUT = 48_000_000  # bytes in one reading, at least: more than the second-level caches hold


def load(given):
    from lowbit.core.calls import set_instruction_set, set_threads
    from lowbit.runtime import load as load_model

    serve.mark("imports")
    set_threads(given.threads)
    options = {"context": 2048, "slots": 1} | given.options
    if "isa" in options:
        set_instruction_set(options.pop("isa"))
    model = load_model(given.model, **options)
    engine = model.engine
    serve.mark("load")

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

    def profile(context, new, sequences, seed):
        """Nanoseconds of one thread by part, for decode (`new` tokens, of `sequences` at once) or prefill (none)."""
        for slot in range(sequences):
            engine.reset(slot)
            if new:
                engine.prefill(serve.prompt(context, seed + slot), slot)
        if not new:  # a first prompt takes up its memory
            engine.prefill(serve.prompt(context, seed + 1))
            engine.reset()
        engine.profile(True)
        if sequences > 1:
            for _ in range(new):
                engine.step([serve.FIRST_PLAIN_TOKEN] * sequences, range(sequences))
        elif new:
            engine.continue_greedy(serve.FIRST_PLAIN_TOKEN, new)
        else:
            engine.prefill(serve.prompt(context, seed))
        return engine.profile(False)

    def interrupt(context, new, _sequences, seed):
        """The longest of some waits for the end of a call after Ctrl-C: while a prompt is read, or tokens are made (`new`)."""
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # which a process in the background may have inherited ignored
        moments, prompt, waits = random.Random(seed), serve.prompt(context, seed), []
        for _ in range(INTERRUPTS):
            engine.reset()
            if new:
                engine.prefill(prompt)
            held, moment, sent = engine.length(), moments.uniform(0, LATEST), []

            def press(moment=moment, held=held, sent=sent):
                while engine.length() == held:  # the first chunk, or the first token
                    time.sleep(1e-4)
                time.sleep(moment)
                sent.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGINT)

            presser = threading.Thread(target=press)
            presser.start()
            try:
                engine.continue_greedy(serve.FIRST_PLAIN_TOKEN, new) if new else engine.prefill(prompt)
            except KeyboardInterrupt:
                waits.append(time.perf_counter() - sent[0])
            presser.join()
            if engine.length() != held:
                raise RuntimeError("an interrupted call left tokens behind")
        if len(waits) < INTERRUPTS:
            raise RuntimeError("a call was over before Ctrl-C came; give more tokens")
        return max(waits)

    def repack(rows, _new, _sequences, _seed):
        """GB/s of packed bytes: weights of that many rows, from memory into memory that was written to before."""
        seconds, size = laid_out(given.model, rows)
        return size / 1e9 / seconds

    # The engine beside which `model.generate` is measured does the same work: decode.
    measures = {"decode": decode, "generate": decode, "prefill": prefill, "batch": batch}
    return measures | {"profile": profile, "interrupt": interrupt, "repack": repack}


def laid_out(folder, rows):
    """Seconds and bytes of laying out the first weights of a folder that have so many rows."""
    from lowbit.core import calls
    from lowbit.core.arena import weight_memory
    from lowbit.packing import PackedTensor
    from lowbit.runtime.files import open_files, read_spec, read_weights
    from lowbit.runtime.stored import addresses

    files, jobs, size = open_files(folder), [], 0
    for loaded in read_weights(files, read_spec(files), None):
        weight = loaded.weight
        if (
            loaded.role == "embedding"
            or not isinstance(weight, PackedTensor)
            or weight.shape[0] != rows
            or size >= LAID_OUT
        ):
            continue
        buffers = {name: array.copy() for name, array in weight.tensors().items()}
        place = weight_memory(calls.prepared_bytes(weight.format, *weight.shape))
        jobs.append((weight, buffers, place))
        size += place.size
    if not jobs:
        raise ValueError(f"{folder} has no packed weight of {rows} rows")
    for turn in range(1 + PASSES):
        if turn == 1:  # the first touches the memory
            start = time.perf_counter()
        for weight, buffers, place in jobs:
            calls.prepare(weight.format, *weight.shape, addresses(buffers), int(place.ctypes.data), place.size)
    return (time.perf_counter() - start) / PASSES, size


if __name__ == "__main__":
    serve.serve(load)
