// The engine against plain loops: prompts whole, in chunks and token by token, several sequences at once, every type of cache.
#include <algorithm>

#include "tiny_llama.h"

namespace check {
namespace {

constexpr int64_t kTokens = 40, kContext = 64;

struct Cache {
    int type;
    double tolerance;  // keys and values in fp16 have 11 bits, in int8 with a scale per head and token 7
};
const Cache kCaches[] = {{LOWBIT_CACHE_FP32, 1e-5}, {LOWBIT_CACHE_FP16, 3e-3}, {LOWBIT_CACHE_INT8, 0.05}};

struct Destroy {
    void operator()(lowbit_engine* engine) const { lowbit_engine_destroy(engine); }
};
using Engine = std::unique_ptr<lowbit_engine, Destroy>;

Engine make(const TinyLlama& llama, const lowbit_engine_options& options) {
    Engine engine(lowbit_engine_create(&llama.model, &options));
    EXPECT(engine != nullptr);
    return engine;
}

// Logits of every token, given in steps of `chunk`.
std::vector<float> in_chunks(lowbit_engine* engine, const std::vector<int32_t>& tokens, int32_t slot, int64_t chunk) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    std::vector<float> logits(static_cast<size_t>(count * TinyLlama::kVocab));
    for (int64_t i = 0; i < count; i += chunk) {
        const int64_t part = std::min(chunk, count - i);
        const std::vector<int32_t> slots(static_cast<size_t>(part), slot);
        const std::vector<uint8_t> wanted(static_cast<size_t>(part), 1);
        // A copy that ends where the step does.
        const std::vector<int32_t> given(tokens.begin() + i, tokens.begin() + i + part);
        EXPECT(lowbit_engine_step(engine, given.data(), slots.data(), wanted.data(), part, logits.data() + i * TinyLlama::kVocab) == LOWBIT_OK);
    }
    EXPECT(lowbit_engine_length(engine, slot) == count);
    return logits;
}

void check_logits(const TinyLlama& llama) {
    const std::vector<int32_t> tokens = some_tokens(kTokens, 1);
    const std::vector<double> expected = llama.logits(tokens);
    for (const Cache& cache : kCaches) {
        const Engine engine = make(llama, options(kContext, 3, cache.type, LOWBIT_COMPUTE_FP32, kTokens));
        if (!engine) return;
        EXPECT(distance(in_chunks(engine.get(), tokens, 0, kTokens).data(), expected) < cache.tolerance);
        EXPECT(distance(in_chunks(engine.get(), tokens, 1, 11).data(), expected) < cache.tolerance);
        EXPECT(distance(in_chunks(engine.get(), tokens, 2, 1).data(), expected) < cache.tolerance);
        EXPECT(lowbit_engine_truncate(engine.get(), 0, 0) == LOWBIT_OK);
        EXPECT(distance(in_chunks(engine.get(), tokens, 0, 3).data(), expected) < cache.tolerance);
    }
    constexpr double kByteTolerance = 0.06;  // activations rounded to int8 in every layer
    const Engine engine = make(llama, options(kContext, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_INT8, kTokens));
    if (engine) EXPECT(distance(in_chunks(engine.get(), tokens, 0, kTokens).data(), expected) < kByteTolerance);
}

// A step may hold a chunk of one sequence and single tokens of others.
void check_mixed(const TinyLlama& llama) {
    const std::vector<int32_t> first = some_tokens(20, 2), second = some_tokens(9, 3);
    const Engine engine = make(llama, options(kContext, 2, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, kTokens));
    if (!engine) return;
    in_chunks(engine.get(), std::vector<int32_t>(second.begin(), second.end() - 1), 1, 8);
    std::vector<int32_t> tokens = first, slots(first.size(), 0);
    std::vector<uint8_t> wanted(first.size(), 0);
    wanted.back() = 1;
    tokens.push_back(second.back());
    slots.push_back(1);
    wanted.push_back(1);
    std::vector<float> logits(static_cast<size_t>(2 * TinyLlama::kVocab));
    EXPECT(lowbit_engine_step(engine.get(), tokens.data(), slots.data(), wanted.data(), static_cast<int64_t>(tokens.size()), logits.data()) == LOWBIT_OK);
    std::vector<double> expected, all = llama.logits(first);
    expected.assign(all.end() - TinyLlama::kVocab, all.end());
    all = llama.logits(second);
    expected.insert(expected.end(), all.end() - TinyLlama::kVocab, all.end());
    EXPECT(distance(logits.data(), expected) < 1e-5);
    EXPECT(lowbit_engine_length(engine.get(), 0) == 20 && lowbit_engine_length(engine.get(), 1) == 9);
}

// LOWBIT_CACHE_AUTO follows the products.
void expect_auto_cache(const TinyLlama& llama, int compute, int type) {
    const lowbit_engine_options asked = options(kContext, 1, LOWBIT_CACHE_AUTO, compute, 8), named = options(kContext, 1, type, compute, 8);
    const Engine engine = make(llama, asked);
    EXPECT(lowbit_engine_cache_type(engine.get()) == type);
    EXPECT(lowbit_engine_bytes(&llama.model, &asked) == lowbit_engine_bytes(&llama.model, &named));
}

void check_auto_cache(const TinyLlama& plain) {
    const TinyLlama packed(&format_named("int4_g32_bf16"));
    for (int compute : {LOWBIT_COMPUTE_INT8, LOWBIT_COMPUTE_INT8_GROUPS}) {
        expect_auto_cache(packed, compute, LOWBIT_CACHE_INT8);
        expect_auto_cache(plain, compute, LOWBIT_CACHE_FP16);
    }
    for (int compute : {LOWBIT_COMPUTE_FP32, LOWBIT_COMPUTE_BF16, LOWBIT_COMPUTE_FP16}) expect_auto_cache(packed, compute, LOWBIT_CACHE_FP16);
    EXPECT(lowbit_engine_cache_type(nullptr) == -1);
}

// The most likely token again and again, by one call and by steps.
void check_greedy(const TinyLlama& llama) {
    constexpr int64_t kMade = 12;
    const Engine engine = make(llama, options(kContext, 2, LOWBIT_CACHE_FP16, LOWBIT_COMPUTE_FP32, 8));
    if (!engine) return;
    std::vector<int32_t> made(static_cast<size_t>(kMade)), stepped;
    int64_t count = 0;
    EXPECT(lowbit_engine_greedy(engine.get(), 0, 5, kMade, nullptr, 0, made.data(), &count) == LOWBIT_OK);
    EXPECT(count == kMade && lowbit_engine_length(engine.get(), 0) == kMade);
    for (int32_t token = 5; static_cast<int64_t>(stepped.size()) < kMade;) {
        const std::vector<float> logits = [&] {
            std::vector<float> room(static_cast<size_t>(TinyLlama::kVocab));
            const int32_t slot = 1;
            const uint8_t wanted = 1;
            EXPECT(lowbit_engine_step(engine.get(), &token, &slot, &wanted, 1, room.data()) == LOWBIT_OK);
            return room;
        }();
        token = static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        stepped.push_back(token);
    }
    EXPECT(made == stepped);
    const int32_t stop = made[3];
    const int64_t until = std::find(made.begin(), made.end(), stop) - made.begin() + 1;
    EXPECT(lowbit_engine_truncate(engine.get(), 0, 0) == LOWBIT_OK);
    EXPECT(lowbit_engine_greedy(engine.get(), 0, 5, kMade, &stop, 1, made.data(), &count) == LOWBIT_OK && count == until);
}

}  // namespace

void check_engine() {
    const TinyLlama plain(nullptr);
    check_logits(plain);
    check_logits(TinyLlama(nullptr, 64));  // as wide as register tiles; 11 tokens are then a tile and a part of one
    check_mixed(plain);
    check_greedy(plain);
    check_auto_cache(plain);
    for (const char* name : {"int4_g32_bf16", "int5_g128_fp32", "int6_asym_channel", "nf4_g64"}) check_logits(TinyLlama(&format_named(name)));
}

}  // namespace check
