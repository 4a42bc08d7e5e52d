// Memory that runs out: every call is made with room for no allocation, for one, for two, until it succeeds.
#include "allocation.h"
#include "tiny_llama.h"

namespace check {
namespace {

// Runs a call again and again, with memory for one allocation more each time, until it succeeds.
template <class Call>
void starve(const char* what, const Call& call) {
    constexpr int64_t kMost = 2000;
    for (int64_t given = 0; given < kMost; ++given) {
        allow_allocations(given);
        const int status = call();
        const bool ran_out = allow_every_allocation();
        if (!ran_out && status == LOWBIT_OK) return;
        if (status != LOWBIT_OK) expect_refused(status, LOWBIT_NO_MEMORY, what, __FILE__, __LINE__);
    }
    expect(false, what, __FILE__, __LINE__);
}

void starve_all() {
    const TinyLlama llama(&format_named("int4_g32_bf16"));
    const lowbit_engine_options good = options(600, 2, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_INT8, 300);
    lowbit_engine* engine = nullptr;
    // An engine that was refused tells its reason through the sentence alone.
    starve("create", [&] {
        engine = lowbit_engine_create(&llama.model, &good);
        return engine ? LOWBIT_OK : LOWBIT_NO_MEMORY;
    });
    const std::vector<int32_t> tokens = some_tokens(300, 1), slots(300, 0);
    const std::vector<uint8_t> wanted(300, 0);
    int32_t made[3];
    int64_t count = 0;
    starve("a prompt", [&] {
        lowbit_engine_truncate(engine, 0, 0);
        return lowbit_engine_step(engine, tokens.data(), slots.data(), wanted.data(), 300, nullptr);
    });
    starve("greedy", [&] { return lowbit_engine_greedy(engine, 0, 1, 3, nullptr, 0, made, &count); });
    lowbit_engine_destroy(engine);
    const std::vector<float> x = Random(1).bells(40 * 203);
    for (const NamedFormat& named : formats()) {
        Weight weight(named.format, 40, 203);
        starve("quantize", [&] {
            return lowbit_quantize(&weight.format, x.data(), 0, 40, 203, 203, nullptr, weight.codes.data(), weight.scales.data(),
                                   weight.has_zeros() ? weight.zeros.data() : nullptr, &weight.unit);
        });
        double sums[2];
        starve("distance", [&] {
            return lowbit_distance(&weight.format, 40, 203, weight.codes.data(), weight.scales.data(), weight.zeros_or_null(), &weight.unit, x.data(), 0,
                                   203, sums);
        });
        const auto buffer = prepared(weight);
        std::vector<float> y(40 * 40);
        starve("run", [&] { return lowbit_run(buffer->data(), buffer->size(), x.data(), 0, 40, 203, nullptr, y.data(), 0, 40, 0); });
    }
}

}  // namespace

void check_memory() { starve_all(); }

}  // namespace check
