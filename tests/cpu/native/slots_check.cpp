// Sequences that move: copied from slot to slot, out as bytes and in again; and bytes that were damaged on the way.
#include <algorithm>
#include <cstring>

#include "tiny_llama.h"

namespace check {
namespace {

constexpr int64_t kContext = 96, kLong = 60;
const int kCaches[] = {LOWBIT_CACHE_FP32, LOWBIT_CACHE_FP16, LOWBIT_CACHE_INT8};

struct Destroy {
    void operator()(lowbit_engine* engine) const { lowbit_engine_destroy(engine); }
};
using Engine = std::unique_ptr<lowbit_engine, Destroy>;

Engine make(const TinyLlama& llama, int cache, int64_t context = kContext) {
    const lowbit_engine_options made = options(context, 3, cache, LOWBIT_COMPUTE_FP32, 16);
    Engine engine(lowbit_engine_create(&llama.model, &made));
    EXPECT(engine != nullptr);
    return engine;
}

// The logits after the last of these tokens.
std::vector<float> go_on(lowbit_engine* engine, int32_t slot, const std::vector<int32_t>& tokens) {
    std::vector<float> logits(static_cast<size_t>(TinyLlama::kVocab));
    for (size_t i = 0; i < tokens.size(); i += 16) {
        const std::vector<int32_t> part(tokens.begin() + static_cast<int64_t>(i), tokens.begin() + static_cast<int64_t>(std::min(i + 16, tokens.size())));
        const std::vector<int32_t> slots(part.size(), slot);
        std::vector<uint8_t> wanted(part.size(), 0);
        wanted.back() = 1;
        EXPECT(lowbit_engine_step(engine, part.data(), slots.data(), wanted.data(), static_cast<int64_t>(part.size()), logits.data()) == LOWBIT_OK);
    }
    return logits;
}

std::vector<uint8_t> saved(lowbit_engine* engine, int32_t slot, int64_t length) {
    int64_t size = 0;
    EXPECT(lowbit_engine_save(engine, slot, length, nullptr, &size) == LOWBIT_OK);
    std::vector<uint8_t> bytes(static_cast<size_t>(size));
    EXPECT(lowbit_engine_save(engine, slot, length, bytes.data(), &size) == LOWBIT_OK && size == static_cast<int64_t>(bytes.size()));
    return bytes;
}

void check_copies(const TinyLlama& llama, int cache) {
    const Engine engine = make(llama, cache);
    const std::vector<int32_t> first = some_tokens(kLong, 1), next = some_tokens(9, 2);
    go_on(engine.get(), 0, first);
    for (int64_t length : {int64_t{1}, int64_t{16}, int64_t{33}, kLong}) {
        for (int64_t common : {int64_t{0}, length / 2, length}) {
            EXPECT(lowbit_engine_copy(engine.get(), 0, 1, 0, length) == LOWBIT_OK);
            go_on(engine.get(), 1, some_tokens(5, 3));
            EXPECT(lowbit_engine_copy(engine.get(), 0, 1, common, length) == LOWBIT_OK && lowbit_engine_length(engine.get(), 1) == length);
            EXPECT(lowbit_engine_copy(engine.get(), 0, 2, 0, length) == LOWBIT_OK);
            EXPECT(go_on(engine.get(), 1, next) == go_on(engine.get(), 2, next));
        }
    }
    EXPECT(lowbit_engine_copy(engine.get(), 0, 0, 0, 20) == LOWBIT_OK && lowbit_engine_length(engine.get(), 0) == 20);
    EXPECT_REFUSED(lowbit_engine_copy(engine.get(), 0, 1, 0, 21), LOWBIT_BAD_ARGUMENT);
    EXPECT_REFUSED(lowbit_engine_copy(engine.get(), 0, 1, 21, 20), LOWBIT_BAD_ARGUMENT);
}

void check_saved(const TinyLlama& llama, int cache) {
    const Engine engine = make(llama, cache), other = make(llama, cache, 2 * kContext);
    go_on(engine.get(), 1, some_tokens(kLong, 1));
    const std::vector<uint8_t> bytes = saved(engine.get(), 1, kLong), part = saved(engine.get(), 1, 37);
    EXPECT(part.size() < bytes.size());
    EXPECT(lowbit_engine_restore(other.get(), 2, kLong, bytes.data(), static_cast<int64_t>(bytes.size())) == LOWBIT_OK);
    const std::vector<int32_t> next = some_tokens(9, 2);
    EXPECT(go_on(engine.get(), 1, next) == go_on(other.get(), 2, next));
    EXPECT(lowbit_engine_restore(other.get(), 2, 37, part.data(), static_cast<int64_t>(part.size())) == LOWBIT_OK);
    EXPECT(lowbit_engine_length(other.get(), 2) == 37);
}

// A window of 9 keeps little of 800 tokens, and what was let go cannot come back.
void check_windows(const TinyLlama& llama) {
    constexpr int64_t kTokens = 800;
    const Engine engine = make(llama, LOWBIT_CACHE_INT8, 900), other = make(llama, LOWBIT_CACHE_INT8, 900);
    go_on(engine.get(), 0, some_tokens(kTokens, 1));
    const int64_t shortest = lowbit_engine_shortest(engine.get(), 0);
    EXPECT(shortest > 0 && shortest < kTokens);
    EXPECT_REFUSED(lowbit_engine_truncate(engine.get(), 0, shortest - 1), LOWBIT_BAD_ARGUMENT);
    EXPECT_REFUSED(lowbit_engine_copy(engine.get(), 0, 1, 0, shortest - 1), LOWBIT_BAD_ARGUMENT);
    int64_t size = 0;
    EXPECT_REFUSED(lowbit_engine_save(engine.get(), 0, shortest - 1, nullptr, &size), LOWBIT_BAD_ARGUMENT);
    const std::vector<uint8_t> bytes = saved(engine.get(), 0, kTokens);
    EXPECT(lowbit_engine_restore(other.get(), 1, kTokens, bytes.data(), static_cast<int64_t>(bytes.size())) == LOWBIT_OK);
    EXPECT(lowbit_engine_copy(engine.get(), 0, 2, 0, kTokens) == LOWBIT_OK);
    const std::vector<int32_t> next = some_tokens(30, 2);
    const std::vector<float> expected = go_on(engine.get(), 0, next);
    EXPECT(go_on(engine.get(), 2, next) == expected && go_on(other.get(), 1, next) == expected);
}

// What a slot can do whatever it holds: a step that ends in logits or in a sentence.
void use(lowbit_engine* engine, int32_t slot) {
    const int32_t token = 3;
    const uint8_t wanted = 1;
    std::vector<float> logits(static_cast<size_t>(TinyLlama::kVocab));
    const int status = lowbit_engine_step(engine, &token, &slot, &wanted, 1, logits.data());
    EXPECT(status == LOWBIT_OK || status == LOWBIT_NOT_FINITE);
}

// Bytes changed anywhere, and in the numbers that say how long what follows is; cut off; continued; of another length or cache.
void fuzz_saved(const TinyLlama& llama, int cache) {
    const Engine engine = make(llama, cache);
    go_on(engine.get(), 0, some_tokens(kLong, 1));
    const std::vector<uint8_t> whole = saved(engine.get(), 0, kLong);
    const size_t second = whole.size() / 2;  // both layers keep as much, so that the second begins here
    Random random(8);
    for (int i = 0; i < 300; ++i) {
        std::vector<uint8_t> bytes = whole;
        int64_t length = kLong;
        const int64_t value = kHostileSizes[random.below(11)];
        switch (random.below(5)) {
            case 0: bytes[static_cast<size_t>(random.below(static_cast<int64_t>(bytes.size())))] = static_cast<uint8_t>(random.below(256)); break;
            case 1: memcpy(bytes.data() + (random.below(2) ? second : 0) + 8 * static_cast<size_t>(random.below(2)), &value, sizeof value); break;
            case 2: bytes.resize(static_cast<size_t>(random.below(static_cast<int64_t>(bytes.size())))); break;
            case 3: bytes.resize(bytes.size() + 1 + static_cast<size_t>(random.below(100)), 0xff); break;
            default: length = random.below(2) ? value : random.below(kContext);
        }
        bytes.shrink_to_fit();  // so that a sanitizer sees the end
        const int status = lowbit_engine_restore(engine.get(), 1, length, bytes.data(), static_cast<int64_t>(bytes.size()));
        if (status) EXPECT(strlen(lowbit_last_error()) > 10);
        EXPECT(lowbit_engine_length(engine.get(), 1) == (status ? 0 : length) || length < 1 || length > kContext);
        use(engine.get(), 1);
        EXPECT(lowbit_engine_truncate(engine.get(), 1, 0) == LOWBIT_OK);
    }
    const Engine other = make(llama, cache == LOWBIT_CACHE_INT8 ? LOWBIT_CACHE_FP16 : LOWBIT_CACHE_INT8);
    EXPECT_REFUSED(lowbit_engine_restore(other.get(), 0, kLong, whole.data(), static_cast<int64_t>(whole.size())), LOWBIT_BAD_ARGUMENT);
    EXPECT(lowbit_engine_restore(engine.get(), 1, kLong, whole.data(), static_cast<int64_t>(whole.size())) == LOWBIT_OK);
    const std::vector<int32_t> next = some_tokens(9, 2);
    EXPECT(go_on(engine.get(), 1, next) == go_on(engine.get(), 0, next));
}

}  // namespace

void check_slots() {
    const TinyLlama llama(nullptr);
    for (int cache : kCaches) {
        check_copies(llama, cache);
        check_saved(llama, cache);
        fuzz_saved(llama, cache);
    }
    check_windows(llama);
}

}  // namespace check
