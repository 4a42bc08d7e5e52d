// Mixtures of experts: many products in one call against one call each, and a layer of experts in the engine.
#include <cstring>

#include "sparse_llama.h"

namespace check {
namespace {

constexpr int64_t kRows = 37, kCols = 203;
constexpr float kUntouched = 7.0f;

// Rows of several experts at once; experts without rows and rows without experts lie between them.
void check_products_of(const lowbit_format& format, const std::vector<int64_t>& begins, int64_t tokens, int compute) {
    const int64_t experts = static_cast<int64_t>(begins.size()) - 1;
    const int64_t bytes = lowbit_prepared_bytes(&format, kRows, kCols);
    Aligned all(experts * bytes);
    for (int64_t e = 0; e < experts; ++e) {
        const auto one = prepared(quantized(format, kRows, kCols, static_cast<uint64_t>(e)));
        memcpy(all.data() + e * bytes, one->data(), static_cast<size_t>(bytes));
    }
    const std::vector<float> x = Random(5).bells(tokens * kCols);
    std::vector<float> y(static_cast<size_t>(tokens * kRows), kUntouched), expected(y);
    for (int64_t e = 0; e < experts; ++e) {
        const size_t at = static_cast<size_t>(e);
        EXPECT(lowbit_run(all.data() + e * bytes, bytes, x.data() + begins[at] * kCols, LOWBIT_FP32, begins[at + 1] - begins[at], kCols, nullptr,
                          expected.data() + begins[at] * kRows, LOWBIT_FP32, kRows, compute) == LOWBIT_OK);
    }
    EXPECT(lowbit_run_experts(all.data(), bytes, experts, begins.data(), x.data(), LOWBIT_FP32, tokens, kCols, y.data(), LOWBIT_FP32, kRows, compute) ==
           LOWBIT_OK);
    // A stretch of 1024 rows may end within an expert, which then has fewer tokens in one of them, or takes another kind of product.
    EXPECT(distance(y.data(), std::vector<double>(expected.begin(), expected.end())) < (tokens > 1024 ? 0.02 : 1e-6));
}

void check_engine_of(const lowbit_format* format, int32_t chosen = SparseLlama::kChosen) {
    constexpr int64_t kTokens = 40;
    const TinyLlama llama(format);
    SparseLlama sparse(llama, format);
    sparse.model.top_k = chosen;
    const std::vector<int32_t> tokens = some_tokens(kTokens, 1);
    const std::vector<double> expected = llama.logits(tokens);
    const std::vector<uint8_t> wanted(static_cast<size_t>(kTokens), 1);
    const std::vector<int32_t> slots(static_cast<size_t>(kTokens), 0);
    for (int compute : {LOWBIT_COMPUTE_FP32, LOWBIT_COMPUTE_INT8}) {
        const lowbit_engine_options made = options(64, 1, LOWBIT_CACHE_FP32, compute, kTokens);
        lowbit_engine* engine = lowbit_engine_create(&sparse.model, &made);
        EXPECT(engine != nullptr);
        for (int64_t chunk : {kTokens, int64_t{7}, int64_t{1}}) {
            if (!engine) break;
            std::vector<float> logits(expected.size());
            EXPECT(lowbit_engine_truncate(engine, 0, 0) == LOWBIT_OK);
            for (int64_t i = 0; i < kTokens; i += chunk)
                EXPECT(lowbit_engine_step(engine, tokens.data() + i, slots.data(), wanted.data(), std::min(chunk, kTokens - i),
                                          logits.data() + i * TinyLlama::kVocab) == LOWBIT_OK);
            EXPECT(distance(logits.data(), expected) < (compute == LOWBIT_COMPUTE_FP32 ? 1e-5 : 0.06));
        }
        lowbit_engine_destroy(engine);
    }
}

}  // namespace

void check_experts() {
    for (const char* name : {"int4_g64", "int4_asym_g64", "int4_fine_g64", "nf4_g64", "int7_g20"})
        for (int compute : {LOWBIT_COMPUTE_FP32, LOWBIT_COMPUTE_INT8})
            check_products_of(format_named(name), {0, 0, 3, 3, 20, 21, 21, 60}, 62, compute);
    check_products_of(format_named("int4_g64"), {1, 40, 1100, 1101}, 1110, LOWBIT_COMPUTE_INT8);
    check_engine_of(nullptr);
    for (const char* name : {"int4_g32_bf16", "int6_asym_channel", "nf4_g64"}) check_engine_of(&format_named(name));
    // Every expert has all 40 tokens: a tile of 32 and a part of one each, on the sets that have such tiles.
    check_engine_of(&format_named("int4_g32_bf16"), SparseLlama::kExperts);
}

}  // namespace check
