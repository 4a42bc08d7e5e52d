// What the core refuses: each with a code and a sentence, before a pointer is touched.
#include <algorithm>
#include <cmath>
#include <climits>
#include <cstring>

#include "tiny_llama.h"

namespace check {
namespace {

constexpr int kBad = LOWBIT_BAD_ARGUMENT, kUnknown = LOWBIT_UNSUPPORTED;

void refuse_weights() {
    const lowbit_format& good = format_named("int4_asym_g64");
    const Weight weight = quantized(good, 16, 64, 1);
    const std::vector<float> x(16 * 64, 1.0f);
    std::vector<int32_t> codes(weight.codes);
    std::vector<uint8_t> scales(weight.scales), zeros(weight.zeros);
    const auto quantize = [&](const lowbit_format* f, const void* w, int dtype, int64_t rows, int64_t cols, int64_t stride, const lowbit_search* s) {
        return lowbit_quantize(f, w, dtype, rows, cols, stride, s, codes.data(), scales.data(), zeros.data(), nullptr);
    };
    EXPECT_REFUSED(quantize(nullptr, x.data(), 0, 16, 64, 64, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, nullptr, 0, 16, 64, 64, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 3, 16, 64, 64, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 0, -16, 64, 64, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 0, 16, 0, 64, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 0, INT64_MAX, INT64_MAX, INT64_MAX, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 0, 16, 64, 63, nullptr), kBad);
    EXPECT_REFUSED(quantize(&good, x.data(), 0, 16, 64, INT64_MAX, nullptr), kBad);
    const lowbit_search search = {nullptr, 3, 0, nullptr};
    EXPECT_REFUSED(quantize(&good, x.data(), 0, 16, 64, 64, &search), kBad);
    std::vector<float> broken(x);
    broken[100] = NAN;
    EXPECT_REFUSED(quantize(&good, broken.data(), 0, 16, 64, 64, nullptr), LOWBIT_BAD_WEIGHT);
    EXPECT_REFUSED(lowbit_quantize(&good, x.data(), 0, 16, 64, 64, nullptr, codes.data(), scales.data(), nullptr, nullptr), kBad);
    EXPECT_REFUSED(lowbit_pack(9, 1, 1, zeros.data(), codes.data()), kUnknown);
    EXPECT_REFUSED(lowbit_pack(4, -1, 1, zeros.data(), codes.data()), kBad);
    EXPECT_REFUSED(lowbit_pack(4, INT64_MAX, 2, zeros.data(), codes.data()), kBad);
    EXPECT_REFUSED(lowbit_unpack(4, 1, 1, nullptr, zeros.data()), kBad);
    float dense[64];
    double sums[2];
    EXPECT_REFUSED(lowbit_dequantize(&good, 1, 64, nullptr, scales.data(), zeros.data(), nullptr, dense, 0, 64), kBad);
    EXPECT_REFUSED(lowbit_dequantize(&good, 1, 64, codes.data(), scales.data(), zeros.data(), nullptr, dense, 0, 1), kBad);
    EXPECT_REFUSED(lowbit_distance(&good, 1, 64, codes.data(), scales.data(), zeros.data(), nullptr, nullptr, 0, 64, sums), kBad);
    EXPECT_REFUSED(lowbit_distance(&good, 1, 64, codes.data(), scales.data(), zeros.data(), nullptr, dense, 0, 64, nullptr), kBad);
    EXPECT_REFUSED(lowbit_set_threads(-1), kBad);
    EXPECT_REFUSED(lowbit_set_isa("abacus"), kUnknown);
}

void refuse_products() {
    const Weight weight = quantized(format_named("int4_g64"), 37, 203, 1);
    const auto buffer = prepared(weight);
    std::vector<float> x(2 * 203), y(2 * 37), row(203);
    const auto run = [&](int64_t bytes, const void* from, int dtype, int64_t tokens, int64_t x_stride, int64_t y_stride, int compute) {
        return lowbit_run(buffer->data(), bytes, from, dtype, tokens, x_stride, nullptr, y.data(), 0, y_stride, compute);
    };
    const int64_t size = buffer->size();
    EXPECT_REFUSED(run(size - 64, x.data(), 0, 2, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(-1, x.data(), 0, 2, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(size, nullptr, 0, 2, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), -1, 2, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, -2, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, INT64_MAX, 203, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, 2, 202, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, 2, 203, 36, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, 2, INT64_MAX, 37, 0), kBad);
    EXPECT_REFUSED(run(size, x.data(), 0, 2, 203, 37, 99), kUnknown);
    EXPECT_REFUSED(lowbit_run(nullptr, size, x.data(), 0, 2, 203, nullptr, y.data(), 0, 37, 0), kBad);
    for (int64_t bad : {int64_t{-1}, int64_t{37}, INT64_MAX}) EXPECT_REFUSED(lowbit_read_rows(buffer->data(), size, &bad, 1, row.data()), kBad);
    EXPECT_REFUSED(lowbit_read_rows(buffer->data(), size, nullptr, 1, row.data()), kBad);
    EXPECT_REFUSED(lowbit_restore(buffer->data(), size, nullptr, nullptr, nullptr, nullptr), kBad);
    lowbit_prepare_job job{};
    job.format = &weight.format;
    job.rows = 16;
    job.cols = 64;
    EXPECT_REFUSED(lowbit_prepare_all(&job, -1), kBad);
    EXPECT_REFUSED(lowbit_prepare_all(nullptr, 1), kBad);
    EXPECT_REFUSED(lowbit_prepare_all(&job, 1), kBad);
    job.mapped_scales = -1;
    EXPECT_REFUSED(lowbit_prepare_all(&job, 1), kBad);
    EXPECT_REFUSED(lowbit_prepare(&weight.format, 37, 203, weight.codes.data(), weight.scales.data(), nullptr, nullptr, buffer->data(), size - 1), kBad);
    EXPECT_REFUSED(lowbit_prepare(&weight.format, 37, 203, weight.codes.data(), weight.scales.data(), nullptr, nullptr, nullptr, size), kBad);
    EXPECT_REFUSED(lowbit_prepare(&weight.format, 37, 203, weight.codes.data(), weight.scales.data(), nullptr, nullptr, buffer->data() + 1, size), kBad);
}

// A header in which anything was changed is refused, or is a header that the buffer really has room for.
void fuzz_headers() {
    const Weight weight = quantized(format_named("nf4_g64"), 37, 203, 1);
    Random random(3);
    std::vector<float> x(203), y(37);
    constexpr int64_t kFields = 200;  // bytes that hold sizes; the tables of levels follow
    for (int i = 0; i < 400; ++i) {
        const auto buffer = prepared(weight);
        const int64_t place = random.below(kFields / 4) * 4;
        const int32_t value = static_cast<int32_t>(kHostileSizes[random.below(11)]);
        if (!memcmp(buffer->data() + place, &value, 4)) continue;
        memcpy(buffer->data() + place, &value, 4);
        if (lowbit_run(buffer->data(), buffer->size(), x.data(), 0, 1, 203, nullptr, y.data(), 0, 37, 0)) EXPECT(strlen(lowbit_last_error()) > 10);
    }
}

void fuzz_formats() {
    Random random(4);
    float levels[256] = {0.0f, 1.0f};
    for (int i = 0; i < 4000; ++i) {
        const auto pick = [&] { return static_cast<int32_t>(random.below(3) ? random.below(10) - 1 : kHostileSizes[random.below(11)]); };
        lowbit_format format{};
        format.bits = pick();
        format.kind = pick();
        format.symmetric = pick();
        format.group_size = pick();
        format.scale_type = pick();
        format.level_count = pick();
        format.levels = random.below(2) ? levels : nullptr;
        const int64_t rows = kHostileSizes[random.below(11)], cols = kHostileSizes[random.below(11)];
        const int64_t bytes = lowbit_prepared_bytes(&format, rows, cols);
        EXPECT(bytes == -1 || bytes > 0);
        if (bytes < 0) EXPECT(strlen(lowbit_last_error()) > 10);
        EXPECT(lowbit_quantize(&format, nullptr, 0, rows, cols, cols, nullptr, nullptr, nullptr, nullptr, nullptr) != LOWBIT_OK);
        EXPECT(lowbit_dequantize(&format, rows, cols, nullptr, nullptr, nullptr, nullptr, nullptr, 0, cols) != LOWBIT_OK);
        EXPECT(lowbit_prepare(&format, rows, cols, nullptr, nullptr, nullptr, nullptr, nullptr, bytes) != LOWBIT_OK);
    }
}

void refuse_selection() {
    const std::vector<float> logits(10, 1.0f);
    std::vector<float> room(10);
    lowbit_selection s{};
    s.top_p = s.typical_p = s.repetition_penalty = 1.0f;
    uint64_t generator = 0;
    int32_t token = 0;
    const auto select = [&](const lowbit_selection& with) { return lowbit_select(logits.data(), 10, &with, nullptr, 0, &generator, &token, nullptr); };
    const auto changed = [&](float lowbit_selection::* field, float value) {
        lowbit_selection with = s;
        with.*field = value;
        return with;
    };
    for (float bad : {-1.0f, NAN}) {
        EXPECT_REFUSED(select(changed(&lowbit_selection::temperature, bad)), kBad);
        EXPECT_REFUSED(select(changed(&lowbit_selection::top_p, bad)), kBad);
        EXPECT_REFUSED(select(changed(&lowbit_selection::min_p, bad)), kBad);
        EXPECT_REFUSED(select(changed(&lowbit_selection::typical_p, bad)), kBad);
        EXPECT_REFUSED(select(changed(&lowbit_selection::repetition_penalty, bad)), kBad);
    }
    lowbit_selection biased = s;
    biased.bias_count = 1;
    EXPECT_REFUSED(select(biased), kBad);
    const int32_t outside = 10;
    for (int32_t end : {0, -1}) {
        lowbit_selection empty = s;
        empty.word_count = 1;
        empty.word_ends = &end;
        empty.word_tokens = &token;
        EXPECT_REFUSED(select(empty), kBad);
    }
    const int32_t one = 1;
    lowbit_selection words = s;
    words.word_count = 1;
    EXPECT_REFUSED(select(words), kBad);
    words.word_ends = &one;
    EXPECT_REFUSED(select(words), kBad);
    words.word_tokens = &outside;
    EXPECT_REFUSED(select(words), kBad);
    lowbit_selection banned = s;
    banned.banned_count = 1;
    EXPECT_REFUSED(select(banned), kBad);
    banned.banned_tokens = &outside;
    EXPECT_REFUSED(select(banned), kBad);
    EXPECT_REFUSED(lowbit_adjust(nullptr, 10, &s, nullptr, 0), kBad);
    EXPECT_REFUSED(lowbit_select(logits.data(), 10, &s, &outside, 1, &generator, &token, nullptr), kBad);
    EXPECT_REFUSED(lowbit_select(nullptr, 10, &s, nullptr, 0, &generator, &token, nullptr), kBad);
    EXPECT_REFUSED(lowbit_select(logits.data(), 0, &s, nullptr, 0, &generator, &token, nullptr), kBad);
    EXPECT_REFUSED(lowbit_select(logits.data(), 10, &s, nullptr, 0, nullptr, &token, nullptr), kBad);
    EXPECT_REFUSED(lowbit_probabilities(logits.data(), 10, &s, nullptr, 0, nullptr), kBad);
    const std::vector<float> nothing(10, NAN);
    EXPECT_REFUSED(lowbit_select(nothing.data(), 10, &s, nullptr, 0, &generator, &token, nullptr), kBad);
}

void refuse_steps() {
    const TinyLlama llama(nullptr);
    const lowbit_engine_options good = options(16, 2, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, 8);
    lowbit_engine* engine = lowbit_engine_create(&llama.model, &good);
    EXPECT(engine != nullptr);
    const std::vector<int32_t> tokens(9, 1), slots(9, 0);
    const std::vector<uint8_t> wanted(9, 1);
    std::vector<float> logits(static_cast<size_t>(9 * TinyLlama::kVocab));
    const auto step = [&](std::vector<int32_t> t, std::vector<int32_t> s, int64_t count, float* to) {
        return lowbit_engine_step(engine, t.data(), s.data(), wanted.data(), count, to);
    };
    EXPECT_REFUSED(step(tokens, slots, 0, logits.data()), kBad);
    EXPECT_REFUSED(step(tokens, slots, -1, logits.data()), kBad);
    EXPECT_REFUSED(step(tokens, slots, 9, logits.data()), kBad);
    EXPECT_REFUSED(step({TinyLlama::kVocab}, {0}, 1, logits.data()), kBad);
    EXPECT_REFUSED(step({-1}, {0}, 1, logits.data()), kBad);
    EXPECT_REFUSED(step({1}, {2}, 1, logits.data()), kBad);
    EXPECT_REFUSED(step({1}, {-1}, 1, logits.data()), kBad);
    EXPECT_REFUSED(step({1, 1, 1}, {0, 1, 0}, 3, logits.data()), kBad);
    EXPECT_REFUSED(step({1}, {0}, 1, nullptr), kBad);
    EXPECT_REFUSED(lowbit_engine_step(nullptr, tokens.data(), slots.data(), wanted.data(), 1, logits.data()), kBad);
    EXPECT_REFUSED(lowbit_engine_step(engine, nullptr, slots.data(), wanted.data(), 1, logits.data()), kBad);
    EXPECT(step(tokens, slots, 8, logits.data()) == LOWBIT_OK && step(tokens, slots, 8, logits.data()) == LOWBIT_OK);
    EXPECT_REFUSED(step(tokens, slots, 1, logits.data()), kBad);
    int32_t made[4];
    int64_t count = 0;
    EXPECT_REFUSED(lowbit_engine_greedy(engine, 0, 1, 4, nullptr, 0, made, &count), kBad);
    EXPECT_REFUSED(lowbit_engine_greedy(engine, 1, 1, -4, nullptr, 0, made, &count), kBad);
    EXPECT_REFUSED(lowbit_engine_greedy(engine, 1, 1, 4, nullptr, -1, made, &count), kBad);
    EXPECT_REFUSED(lowbit_engine_greedy(engine, 1, 1, 4, nullptr, 0, nullptr, &count), kBad);
    EXPECT_REFUSED(lowbit_engine_greedy(engine, 1, 1, INT64_MAX, nullptr, 0, made, &count), kBad);
    EXPECT_REFUSED(lowbit_engine_truncate(engine, 0, 17), kBad);
    EXPECT_REFUSED(lowbit_engine_truncate(engine, 0, -1), kBad);
    EXPECT_REFUSED(lowbit_engine_truncate(nullptr, 0, 0), kBad);
    EXPECT(lowbit_engine_length(engine, 7) == -1 && lowbit_engine_length(nullptr, 0) == -1);
    lowbit_engine_destroy(engine);
    lowbit_engine_destroy(nullptr);
}

// Descriptions in which one number was changed: refused with a sentence, or they are a model, which then runs.
void fuzz_descriptions() {
    const TinyLlama llama(&format_named("int4_g32_bf16"));
    const lowbit_engine_options good = options(16, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_INT8, 8);
    Random random(5);
    const int64_t integers = reinterpret_cast<const char*>(&llama.model.norm_eps) - reinterpret_cast<const char*>(&llama.model);
    for (int i = 0; i < 600; ++i) {
        lowbit_model model = llama.model;
        const int32_t value = static_cast<int32_t>(random.below(2) ? kHostileSizes[random.below(11)] : random.below(8));
        memcpy(reinterpret_cast<char*>(&model) + random.below(integers / 4) * 4, &value, 4);
        // How many layers and ropes lie behind the pointers only the caller knows.
        model.layer_count = std::min(model.layer_count, llama.model.layer_count);
        model.rope_count = std::min(model.rope_count, llama.model.rope_count);
        try_engine(model, good);
        EXPECT(lowbit_engine_bytes(&model, &good) >= -1);
    }
    for (int i = 0; i < 400; ++i) {
        std::vector<lowbit_layer> layers = llama.layers;
        lowbit_model model = llama.model;
        model.layers = layers.data();
        lowbit_matrix& matrix = random.below(4) ? layers[1].matrices[random.below(LOWBIT_LAYER_MATRICES)] : model.matrices[random.below(LOWBIT_OUTER_MATRICES)];
        const int64_t value = kHostileSizes[random.below(11)];
        switch (random.below(6)) {
            case 0: matrix.rows = value; break;
            case 1: matrix.cols = value; break;
            case 2: matrix.count = value; break;
            case 3: matrix.bytes = value; break;
            // Never plain: how long a plain weight is only the caller knows.
            case 4: matrix.kind = matrix.kind == LOWBIT_PREPARED ? (value == LOWBIT_PREPARED ? LOWBIT_ABSENT : -1) : LOWBIT_PREPARED; break;
            default: matrix.data = nullptr;
        }
        try_engine(model, good);
    }
    for (int i = 0; i < 400; ++i) {
        lowbit_engine_options with = good;
        const int64_t value = kHostileSizes[random.below(11)];
        switch (random.below(5)) {
            case 0: with.context = value; break;
            case 1: with.slots = static_cast<int32_t>(value); break;
            case 2: with.cache_type = static_cast<int32_t>(value); break;
            case 3: with.compute = static_cast<int32_t>(value); break;
            default: with.chunk = static_cast<int32_t>(value);
        }
        try_engine(llama.model, with);
    }
}

}  // namespace

void check_refusals() {
    refuse_weights();
    refuse_products();
    refuse_selection();
    refuse_steps();
    fuzz_headers();
    fuzz_formats();
    fuzz_descriptions();
}

}  // namespace check
