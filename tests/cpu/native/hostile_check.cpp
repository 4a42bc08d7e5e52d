// Every function of lowbit.h, select_api.h and engine_api.h with each of its arguments wrong in turn (folder_api.h: face_check.cpp), and
// prepared weights and descriptions that were moved, cut off or written over.
#include "refuse_each.h"
#include "sparse_llama.h"

namespace check {
namespace {

constexpr int64_t kRows = 37, kCols = 203;

void refuse_storing(const char* name) {
    const lowbit_format& format = format_named(name);
    Weight weight = quantized(format, kRows, kCols, 1);
    const std::vector<float> numbers = Random(1).bells(kRows * kCols);
    std::vector<float> dense(numbers);
    std::vector<uint8_t> values(static_cast<size_t>(kRows * kCols), 1);
    double sums[2];
    const uint8_t* zeros = weight.zeros_or_null();
    const unsigned zeros_free = zeros ? 0 : 1u;
    const lowbit_search plain = {nullptr, 0, 0, nullptr};
    const auto buffer = prepared(weight);
    REFUSE_EACH(lowbit_quantize, free_at(6, 10) | zeros_free << 9, &format, numbers.data(), 0, kRows, kCols, kCols, &plain, weight.codes.data(),
                weight.scales.data(), weight.zeros.data(), &weight.unit);
    REFUSE_EACH(lowbit_pack, 0, format.bits, kRows, kCols, values.data(), weight.codes.data());
    REFUSE_EACH(lowbit_unpack, 0, format.bits, kRows, kCols, weight.codes.data(), values.data());
    REFUSE_EACH(lowbit_dequantize, free_at(6, 10) | zeros_free << 5, &format, kRows, kCols, weight.codes.data(), weight.scales.data(), zeros,
                &weight.unit, dense.data(), 0, kCols, nullptr);
    REFUSE_EACH(lowbit_distance, free_at(6, 11) | zeros_free << 5, &format, kRows, kCols, weight.codes.data(), weight.scales.data(), zeros, &weight.unit,
                numbers.data(), 0, kCols, sums, nullptr);
    REFUSE_EACH(lowbit_prepare, free_at(6, 9) | zeros_free << 5, &format, kRows, kCols, weight.codes.data(), weight.scales.data(), zeros, &weight.unit,
                buffer->data(), buffer->size(), nullptr);
    REFUSE_EACH(lowbit_restore, free_at(5, 6) | zeros_free << 4, buffer->data(), buffer->size(), weight.codes.data(), weight.scales.data(),
                weight.zeros.data(), &weight.unit, nullptr);
    EXPECT(lowbit_prepared_bytes(nullptr, kRows, kCols) == -1);
    for (int64_t size : {INT64_MIN, int64_t{-1}, int64_t{0}, INT64_MAX})
        EXPECT(lowbit_prepared_bytes(&format, size, kCols) == -1 && lowbit_prepared_bytes(&format, kRows, size) == -1);
}

// Scales that are codes themselves need their second level, and tables their levels.
void refuse_second_levels() {
    lowbit_format format = format_named("int4_g64");
    format.scale_block = 16;
    std::vector<int32_t> codes(static_cast<size_t>(kRows * ((kCols * 4 + 31) / 32)), 0x12345678);
    std::vector<uint8_t> scales(static_cast<size_t>(kRows * 4), 99);
    std::vector<float> steps(static_cast<size_t>((kRows * 4 + 15) / 16), 0.5f), dense(static_cast<size_t>(kRows * kCols));
    float offset = 0.1f;
    Aligned buffer(lowbit_prepared_bytes(&format, kRows, kCols));
    REFUSE_EACH(lowbit_dequantize, free_at(5), &format, kRows, kCols, codes.data(), scales.data(), nullptr, steps.data(), dense.data(), 0, kCols, &offset);
    REFUSE_EACH(lowbit_prepare, free_at(5), &format, kRows, kCols, codes.data(), scales.data(), nullptr, steps.data(), buffer.data(), buffer.size(), &offset);
    REFUSE_EACH(lowbit_restore, free_at(4), buffer.data(), buffer.size(), codes.data(), scales.data(), nullptr, steps.data(), &offset);
    for (int block : {INT_MIN, -1}) {
        format.scale_block = block;
        EXPECT(lowbit_prepared_bytes(&format, kRows, kCols) == -1);
    }
    format = format_named("nf4_g64");
    format.levels = nullptr;
    EXPECT(lowbit_prepared_bytes(&format, kRows, kCols) == -1);
    format.kind = LOWBIT_BLOCKS;
    for (int type : {INT_MIN, -1, 0, 8, INT_MAX}) {
        format.block_type = type;
        EXPECT(lowbit_prepared_bytes(&format, kRows, kCols) == -1);
    }
}

void refuse_multiplying() {
    constexpr int64_t kTokens = 3, kExperts = 2;
    const Weight weight = quantized(format_named("int4_g64"), kRows, kCols, 1);
    const auto one = prepared(weight);
    Aligned both(kExperts * one->size());
    for (int64_t e = 0; e < kExperts; ++e) memcpy(both.data() + e * one->size(), one->data(), static_cast<size_t>(one->size()));
    std::vector<float> x(static_cast<size_t>(kTokens * kCols), 1.0f), y(static_cast<size_t>(kTokens * kRows)), rows(2 * kCols);
    const int64_t begins[] = {0, 1, kTokens}, wanted[] = {kRows - 1, 0};
    REFUSE_EACH(lowbit_run, free_at(6), one->data(), one->size(), x.data(), 0, kTokens, kCols, nullptr, y.data(), 0, kRows, 0);
    REFUSE_EACH(lowbit_run_experts, 0, both.data(), one->size(), kExperts, begins, x.data(), 0, kTokens, kCols, y.data(), 0, kRows, 0);
    REFUSE_EACH(lowbit_read_rows, 0, one->data(), one->size(), wanted, 2, rows.data());
    const int64_t wrong[][3] = {{-1, 1, 3}, {0, 2, 1}, {0, 1, 4}, {INT64_MIN, 0, INT64_MAX}, {3, 2, 1}};
    for (const auto& bad : wrong)
        EXPECT_REFUSED(lowbit_run_experts(both.data(), one->size(), kExperts, bad, x.data(), 0, kTokens, kCols, y.data(), 0, kRows, 0), LOWBIT_BAD_ARGUMENT);
    // The second expert's header is another's.
    both.data()[one->size() + 9] ^= 1;
    EXPECT_REFUSED(lowbit_run_experts(both.data(), one->size(), kExperts, begins, x.data(), 0, kTokens, kCols, y.data(), 0, kRows, 0), LOWBIT_BAD_ARGUMENT);
    const auto narrow = prepared(quantized(format_named("int4_g64"), kRows, kCols - 64, 1));
    if (narrow->size() <= one->size()) {
        memcpy(both.data() + one->size(), narrow->data(), static_cast<size_t>(narrow->size()));
        EXPECT_REFUSED(lowbit_run_experts(both.data(), one->size(), kExperts, begins, x.data(), 0, kTokens, kCols, y.data(), 0, kRows, 0), LOWBIT_BAD_ARGUMENT);
    }
}

// Prepared weights that lie elsewhere than on a boundary, or end too early: what is behind the header's own size is never read.
void refuse_moved_and_cut() {
    const auto whole = prepared(quantized(format_named("int4_asym_g64"), kRows, kCols, 1));
    std::vector<float> x(static_cast<size_t>(kCols)), y(static_cast<size_t>(kRows));
    const auto run = [&](const uint8_t* data, int64_t bytes) {
        return lowbit_run(data, bytes, x.data(), LOWBIT_FP32, 1, kCols, nullptr, y.data(), LOWBIT_FP32, kRows, LOWBIT_COMPUTE_INT8);
    };
    for (int64_t step : {1, 4, 8, 32}) {
        Aligned moved(whole->size() + step);
        memcpy(moved.data() + step, whole->data(), static_cast<size_t>(whole->size()));
        EXPECT_REFUSED(run(moved.data() + step, whole->size()), LOWBIT_BAD_ARGUMENT);
        EXPECT_REFUSED(lowbit_restore(moved.data() + step, whole->size(), x.data(), x.data(), nullptr, nullptr), LOWBIT_BAD_ARGUMENT);
    }
    for (int64_t bytes : {int64_t{64}, int64_t{2047}, int64_t{2048}, int64_t{2049}, whole->size() - 64, whole->size() - 1}) {
        Aligned cut(bytes);
        memcpy(cut.data(), whole->data(), static_cast<size_t>(bytes));
        EXPECT_REFUSED(run(cut.data(), bytes), LOWBIT_BAD_ARGUMENT);
    }
}

void refuse_choosing() {
    const std::vector<float> logits = Random(1).bells(10);
    std::vector<float> room(10);
    lowbit_selection s{};
    const int32_t history[] = {1, 2, 3};
    const float values[] = {1.0f, 2.0f};
    s.top_p = s.typical_p = 1.0f;
    s.temperature = 0.7f;
    s.repetition_penalty = 1.1f;
    s.bias_count = 2;
    s.bias_tokens = history;
    s.bias_values = values;
    uint64_t generator = 1;
    int32_t token = 0;
    float log_probability = 0.0f;
    REFUSE_EACH(lowbit_select, free_at(7), logits.data(), 10, &s, history, 3, &generator, &token, &log_probability);
    REFUSE_EACH(lowbit_probabilities, 0, logits.data(), 10, &s, history, 3, room.data());
    REFUSE_EACH(lowbit_adjust, 0, room.data(), 10, &s, history, 3);
    for (int32_t bad : {INT_MIN, -1, 10, INT_MAX}) {
        const int32_t tokens[] = {0, bad};
        EXPECT_REFUSED(lowbit_probabilities(logits.data(), 10, &s, tokens, 2, room.data()), LOWBIT_BAD_ARGUMENT);
        lowbit_selection biased = s;
        biased.bias_tokens = tokens;
        EXPECT_REFUSED(lowbit_probabilities(logits.data(), 10, &biased, nullptr, 0, room.data()), LOWBIT_BAD_ARGUMENT);
    }
    const auto refuse = [&](int32_t lowbit_selection::* field, int32_t value) {
        lowbit_selection wrong = s;
        wrong.*field = value;
        EXPECT_REFUSED(lowbit_select(logits.data(), 10, &wrong, nullptr, 0, &generator, &token, nullptr), LOWBIT_BAD_ARGUMENT);
    };
    for (int32_t count : {INT_MIN, -1, 1, INT_MAX}) {
        if (count != 1) refuse(&lowbit_selection::bias_count, count);
        refuse(&lowbit_selection::word_count, count);    // and no words
        refuse(&lowbit_selection::banned_count, count);  // and no tokens
    }
    const int32_t ends[][2] = {{0, 1}, {2, 1}, {INT_MIN, 1}, {1, INT_MIN}, {-1, 1}};
    for (const auto& wrong : ends) {
        lowbit_selection words = s;
        words.word_count = 2;
        words.word_ends = wrong;
        words.word_tokens = history;
        EXPECT_REFUSED(lowbit_adjust(room.data(), 10, &words, history, 3), LOWBIT_BAD_ARGUMENT);
    }
    for (int32_t most : {INT_MIN, -1}) refuse(&lowbit_selection::top_k, most);
}

void refuse_stepping() {
    const TinyLlama llama(&format_named("int4_g32_bf16"));
    const lowbit_engine_options good = options(64, 2, LOWBIT_CACHE_INT8, LOWBIT_COMPUTE_INT8, 8);
    const auto create = +[](const lowbit_model* model, const lowbit_engine_options* with) {
        lowbit_engine* engine = lowbit_engine_create(model, with);
        lowbit_engine_destroy(engine);
        return engine;
    };
    refuse_each("lowbit_engine_create", create, 0, &llama.model, &good);
    REFUSE_EACH(lowbit_engine_bytes, 0, &llama.model, &good);
    lowbit_engine* engine = lowbit_engine_create(&llama.model, &good);
    const int32_t tokens[] = {1, 2}, slots[] = {0, 0}, stops[] = {1};
    const uint8_t wanted[] = {0, 1};
    std::vector<float> logits(2 * TinyLlama::kVocab);
    std::vector<int32_t> made(2);
    int64_t count = 0, size = 0;
    REFUSE_EACH(lowbit_engine_step, free_at(3), engine, tokens, slots, wanted, 2, logits.data());
    REFUSE_EACH(lowbit_engine_greedy, 0, engine, 0, 1, 2, stops, 1, made.data(), &count);
    lowbit_selection selection{};
    selection.top_p = selection.typical_p = selection.repetition_penalty = 1.0f;
    selection.temperature = 0.5f;
    uint64_t generator = 1;
    std::vector<int32_t> sequence(5, 1);
    // `least` may be any number: none or all of the tokens.
    REFUSE_EACH(lowbit_engine_choose, free_at(6), engine, 0, sequence.data(), 3, 2, &selection, 1, stops, 1, &generator, &count);
    REFUSE_EACH(lowbit_engine_length, 0, engine, 0);
    REFUSE_EACH(lowbit_engine_shortest, 0, engine, 0);
    REFUSE_EACH(lowbit_engine_expect, 0, engine, 0, 3);
    REFUSE_EACH(lowbit_engine_copy, 0, engine, 0, 1, 0, 3);
    REFUSE_EACH(lowbit_engine_save, free_at(3), engine, 0, 3, nullptr, &size);
    std::vector<uint8_t> bytes(static_cast<size_t>(size));
    for (int64_t wrong : {INT64_MIN, int64_t{-1}, int64_t{0}, size - 1, size + 1, INT64_MAX})
        EXPECT_REFUSED(lowbit_engine_save(engine, 0, 3, bytes.data(), &wrong), LOWBIT_BAD_ARGUMENT);
    EXPECT(lowbit_engine_save(engine, 0, 3, bytes.data(), &size) == LOWBIT_OK);
    REFUSE_EACH(lowbit_engine_restore, 0, engine, 1, 3, bytes.data(), size);
    REFUSE_EACH(lowbit_engine_truncate, 0, engine, 0, 2);
    // These have nothing to refuse with: they do nothing.
    lowbit_engine_cancel(nullptr);
    lowbit_engine_resume(nullptr);
    lowbit_engine_set_check(nullptr, 1);
    lowbit_engine_set_profile(nullptr, 1);
    lowbit_engine_profile(nullptr, &count);
    lowbit_engine_profile(engine, nullptr);
    lowbit_engine_destroy(engine);
    lowbit_engine_destroy(nullptr);
}

void refuse_settings() {
    for (int threads : {INT_MIN, -1}) EXPECT_REFUSED(lowbit_set_threads(threads), LOWBIT_BAD_ARGUMENT);
    EXPECT(lowbit_set_threads(INT_MAX) == LOWBIT_OK && lowbit_threads() >= 1 && lowbit_threads() <= 4096);
    EXPECT(lowbit_set_threads(0) == LOWBIT_OK && lowbit_threads() >= 1);
    EXPECT_REFUSED(lowbit_set_isa(""), LOWBIT_UNSUPPORTED);
    EXPECT(lowbit_quota(nullptr) == 0 && lowbit_quota("") == 0 && lowbit_quota("/") == 0);
    static const char map[4096] = {};
    REFUSE_EACH(lowbit_guard_map, 0, map, 4096, "a file");
    EXPECT(lowbit_check_map(map) == LOWBIT_OK && lowbit_check_map(nullptr) == LOWBIT_OK);
    EXPECT(lowbit_release_map(map) == LOWBIT_OK && lowbit_release_map(map) == LOWBIT_OK);  // guarded twice above
    for (const char* wrong : {static_cast<const char*>(nullptr), map, map + 1}) EXPECT_REFUSED(lowbit_release_map(wrong), LOWBIT_BAD_ARGUMENT);
    EXPECT(strlen(lowbit_version()) > 0 && lowbit_fold_length() >= 0);
}

// Ropes and layers in which one number was changed; how many frequencies there are only the caller knows.
void fuzz_layers_and_ropes() {
    const TinyLlama llama(&format_named("int4_g32_bf16"));
    const lowbit_engine_options good = options(16, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_INT8, 8);
    Random random(12);
    for (int i = 0; i < 600; ++i) {
        lowbit_model model = llama.model;
        std::vector<lowbit_layer> layers = llama.layers;
        lowbit_rope rope = llama.model.ropes[0];
        model.layers = layers.data();
        model.ropes = &rope;
        const int32_t value = static_cast<int32_t>(random.below(2) ? kHostileSizes[random.below(11)] : random.below(8));
        switch (random.below(10)) {
            case 9:  // a weight that the model's sizes do not ask for is not looked at
                layers[1].matrices[random.below(2) ? LOWBIT_GATE_UP : LOWBIT_SHARED_GATE] = {llama.layers[0].matrices, value, value, value, 1, nullptr, LOWBIT_PREPARED, 0};
                model.matrices[LOWBIT_EMBEDDING_IN] = layers[1].matrices[LOWBIT_GATE_UP];
                break;
            case 0: layers[1].rope = value; break;
            case 1: layers[1].window = value; break;
            case 2: layers[1].sparse = value; break;
            case 3: rope.rotary_dim = std::min(value, rope.rotary_dim); break;
            case 4: rope.pairing = value; break;
            case 5: rope.change = value; break;
            case 6: rope.trained_positions = value; break;
            case 7: rope.frequencies = nullptr; break;
            default: (random.below(2) ? model.mlp.size : model.mlp.gate) = value;
        }
        try_engine(model, good);
    }
}

// One number of the description changed: refused with a sentence, or it is a model, which then runs.
void fuzz_experts() {
    const lowbit_format& format = format_named("int4_g32_bf16");
    const TinyLlama llama(&format);
    const SparseLlama sparse(llama, &format);
    const lowbit_engine_options good = options(16, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_INT8, 8);
    for (int64_t value : kHostileSizes) {
        const int32_t small = static_cast<int32_t>(value);
        const auto with = [&](auto change) {
            lowbit_model model = sparse.model;
            std::vector<lowbit_layer> layers = sparse.layers;
            model.layers = layers.data();
            change(model, layers[0]);
            try_engine(model, good);
        };
        with([&](lowbit_model& m, lowbit_layer&) { m.expert_count = small; });
        with([&](lowbit_model& m, lowbit_layer&) { m.top_k = small; });
        with([&](lowbit_model& m, lowbit_layer&) { m.expert.size = small; });
        with([&](lowbit_model& m, lowbit_layer&) { m.expert.gate = small; });
        with([&](lowbit_model& m, lowbit_layer&) { m.shared.size = small; });
        with([&](lowbit_model& m, lowbit_layer&) { m.shared.gate = small; });
        with([&](lowbit_model&, lowbit_layer& l) { l.sparse = small; });
        for (int role = LOWBIT_ROUTER; role <= LOWBIT_SHARED_ROUTER; ++role) {
            with([&](lowbit_model&, lowbit_layer& l) { l.matrices[role].rows = value; });
            with([&](lowbit_model&, lowbit_layer& l) { l.matrices[role].cols = value; });
            with([&](lowbit_model&, lowbit_layer& l) { l.matrices[role].count = value; });
            with([&](lowbit_model&, lowbit_layer& l) { l.matrices[role].kind = LOWBIT_ABSENT; });
        }
    }
    // A layer of experts of no size at all, and one without experts.
    lowbit_model model = sparse.model;
    std::vector<lowbit_layer> layers = sparse.layers;
    model.layers = layers.data();
    model.expert.size = 0;
    layers[0].matrices[LOWBIT_EXPERTS_GATE_UP] = layers[0].matrices[LOWBIT_EXPERTS_DOWN] = layers[0].matrices[LOWBIT_ROUTER];
    layers[0].matrices[LOWBIT_EXPERTS_GATE_UP].rows = layers[0].matrices[LOWBIT_EXPERTS_DOWN].cols = 0;
    layers[0].matrices[LOWBIT_EXPERTS_DOWN].rows = TinyLlama::kHidden;
    layers[0].matrices[LOWBIT_EXPERTS_GATE_UP].count = layers[0].matrices[LOWBIT_EXPERTS_DOWN].count = SparseLlama::kExperts;
    EXPECT(lowbit_engine_create(&model, &good) == nullptr);
}

}  // namespace

void check_hostile() {
    for (const char* name : {"int4_g64", "int4_asym_g64", "int4_fine_g64", "nf4_g64"}) refuse_storing(name);
    refuse_second_levels();
    refuse_multiplying();
    refuse_moved_and_cut();
    refuse_choosing();
    refuse_stepping();
    refuse_settings();
    fuzz_layers_and_ropes();
    fuzz_experts();
}

}  // namespace check
