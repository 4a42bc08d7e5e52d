"""OpenVINO GenAI. Options are properties of its pipeline (INFERENCE_PRECISION_HINT, KV_CACHE_PRECISION, ...).

Its own clocks are read: the time of the first token for prefill, the mean time of the later ones for decode.
"""

import serve


def load(given):
    import numpy
    import openvino
    import openvino_genai

    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": given.threads} | given.options
    pipeline = openvino_genai.LLMPipeline(given.model, "CPU", **properties)

    def run(context, new, seed):
        tokens = openvino.Tensor(numpy.array([serve.prompt(context, seed)], numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, context), numpy.int64))
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = new, True, False
        return pipeline.generate(openvino_genai.TokenizedInputs(tokens, mask), wanted).perf_metrics

    def decode(context, new, _sequences, seed):
        return 1000 / run(context, new + 1, seed).get_tpot().mean

    def prefill(context, _new, _sequences, seed):
        return 1000 * context / run(context, 1, seed).get_ttft().mean

    return {"decode": decode, "prefill": prefill}


if __name__ == "__main__":
    serve.serve(load)
