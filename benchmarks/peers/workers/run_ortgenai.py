"""onnxruntime-genai. The number of threads is written into the model's own configuration, as it asks for."""

import time

import serve


def load(given):
    import numpy
    import onnxruntime_genai

    config = onnxruntime_genai.Config(given.model)
    threads = {"intra_op_num_threads": given.threads, "inter_op_num_threads": 1}
    config.overlay(serve.json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = onnxruntime_genai.Model(config)

    def started(context, room, sequences, seed):
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(
            max_length=context + room, min_length=context + room, do_sample=False, batch_size=sequences
        )
        generator = onnxruntime_genai.Generator(model, settings)
        prompts = [serve.prompt(context, seed + index) for index in range(sequences)]
        generator.append_tokens(numpy.array(prompts, numpy.int32))
        return generator

    def decode(context, new, sequences, seed):
        generator = started(context, new + 2, sequences, seed)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return new * sequences / (time.perf_counter() - start)

    def prefill(context, _new, sequences, seed):
        start = time.perf_counter()
        started(context, 2, sequences, seed).generate_next_token()
        return context / (time.perf_counter() - start)

    return {"decode": decode, "prefill": prefill, "batch": decode}


if __name__ == "__main__":
    serve.serve(load)
