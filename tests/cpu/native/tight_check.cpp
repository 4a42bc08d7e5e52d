// bf16 matrices in their tight form: the same bits back, the same logits as plain rows, and layouts that were damaged.
#include <algorithm>
#include <cstring>

#include "refuse_each.h"
#include "tiny_llama.h"

namespace check {
namespace {

constexpr int64_t kRows = 37, kCols = 203;
// Of many sizes, so that no table has room for the upper bytes of all; two are none.
const uint16_t kRare[] = {0x4040, 0x4190, 0x4210, 0x3001, 0x2f02, 0x2003, 0x1004, 0x0505, 0x0001, 0x8000, 0x9001, 0xa002, 0xb003, 0xc0a0, 0xc190};
constexpr uint16_t kNan = 0x7fc1, kInfinite = 0xff80;

std::vector<uint16_t> brains(const float* numbers, int64_t count) {
    std::vector<uint16_t> halves;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits = 0;
        memcpy(&bits, numbers + i, sizeof bits);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
    return halves;
}

std::vector<uint16_t> with_rare(std::vector<uint16_t> halves, uint64_t seed) {
    Random random(seed);
    for (uint16_t rare : kRare) halves[static_cast<size_t>(random.below(static_cast<int64_t>(halves.size())))] = rare;
    return halves;
}

struct Tight {
    Aligned room;
    int64_t used = 0;

    Tight(const std::vector<uint16_t>& weight, int64_t rows, int64_t cols) : room(lowbit_tight_bytes(rows, cols)) {
        memset(room.data(), 0xa5, static_cast<size_t>(room.size()));
        EXPECT(lowbit_tighten(weight.data(), rows, cols, room.data(), room.size(), &used) == LOWBIT_OK);
        EXPECT(used > 0 && used <= room.size());
    }
};

void check_back(const std::vector<uint16_t>& weight, int64_t rows, int64_t cols) {
    const Tight tight(weight, rows, cols);
    // A copy that ends where the layout does.
    Aligned kept(tight.used);
    memcpy(kept.data(), tight.room.data(), static_cast<size_t>(tight.used));
    std::vector<uint16_t> back(weight.size(), 0x1234);
    EXPECT(lowbit_loosen(kept.data(), kept.size(), back.data()) == LOWBIT_OK);
    EXPECT(back == weight);
}

void check_contents() {
    const int64_t shapes[][2] = {{1, 1}, {1, 64}, {3, 65}, {kRows, kCols}, {4, 128}, {70, 320}};
    for (const auto& shape : shapes) {
        const int64_t rows = shape[0], cols = shape[1], count = rows * cols;
        const std::vector<uint16_t> usual = brains(Random(1).bells(count).data(), count);
        check_back(usual, rows, cols);
        check_back(with_rare(usual, 2), rows, cols);
        for (uint16_t same : {uint16_t{0}, uint16_t{0x8000}, uint16_t{0x0001}, kNan, kInfinite}) {
            check_back(std::vector<uint16_t>(static_cast<size_t>(count), same), rows, cols);
            std::vector<uint16_t> ends = usual;
            ends.front() = ends.back() = same;
            check_back(ends, rows, cols);
        }
    }
    // Every upper byte as often as any other: that is no trained weight.
    std::vector<uint16_t> noise(static_cast<size_t>(64 * 256));
    for (size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<uint16_t>(i * 4);
    Aligned room(lowbit_tight_bytes(64, 256));
    int64_t used = 0;
    EXPECT_REFUSED(lowbit_tighten(noise.data(), 64, 256, room.data(), room.size(), &used), LOWBIT_UNSUPPORTED);
}

struct Destroy {
    void operator()(lowbit_engine* engine) const { lowbit_engine_destroy(engine); }
};
using Engine = std::unique_ptr<lowbit_engine, Destroy>;

// A model in bf16, and the same one tight.
struct Models {
    TinyLlama llama{nullptr};
    std::vector<std::vector<uint16_t>> halves;
    std::vector<std::unique_ptr<Tight>> tights;
    std::vector<lowbit_layer> plain_layers, tight_layers;
    lowbit_model plain, tight;

    Models() : plain_layers(llama.layers), tight_layers(llama.layers), plain(llama.model), tight(llama.model) {
        for (size_t i = 0; i < llama.layers.size(); ++i)
            for (int role = 0; role < LOWBIT_LAYER_MATRICES; ++role) change(llama.layers[i].matrices[role], &plain_layers[i].matrices[role], &tight_layers[i].matrices[role]);
        for (int role = 0; role < LOWBIT_OUTER_MATRICES; ++role) change(llama.model.matrices[role], &plain.matrices[role], &tight.matrices[role]);
        plain.layers = plain_layers.data();
        tight.layers = tight_layers.data();
    }

    void change(const lowbit_matrix& from, lowbit_matrix* as_halves, lowbit_matrix* as_tight) {
        if (from.kind == LOWBIT_ABSENT) return;
        halves.push_back(with_rare(brains(static_cast<const float*>(from.data), from.rows * from.cols), halves.size()));
        as_halves->data = halves.back().data();
        as_halves->dtype = as_tight->dtype = LOWBIT_BF16;
        tights.push_back(std::make_unique<Tight>(halves.back(), from.rows, from.cols));
        as_tight->kind = LOWBIT_TIGHT;
        as_tight->data = tights.back()->room.data();
        as_tight->bytes = tights.back()->room.size();
    }
};

std::vector<float> logits_of(const lowbit_model& model, const std::vector<int32_t>& tokens) {
    const int32_t count = static_cast<int32_t>(tokens.size());
    std::vector<float> logits(static_cast<size_t>(count * TinyLlama::kVocab));
    const lowbit_engine_options with = options(64, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, count);
    const Engine engine(lowbit_engine_create(&model, &with));
    EXPECT(engine != nullptr);
    if (!engine) return logits;
    const std::vector<int32_t> slots(tokens.size(), 0);
    const std::vector<uint8_t> wanted(tokens.size(), 1);
    EXPECT(lowbit_engine_step(engine.get(), tokens.data(), slots.data(), wanted.data(), count, logits.data()) == LOWBIT_OK);
    return logits;
}

void check_products_of(const Models& models) {
    for (int64_t count : {1, 3, 4, 9, 40}) {
        const std::vector<int32_t> tokens = some_tokens(count, 5);
        const std::vector<float> plain = logits_of(models.plain, tokens), tight = logits_of(models.tight, tokens);
        EXPECT(distance(tight.data(), std::vector<double>(plain.begin(), plain.end())) < 1e-5);
    }
}

void refuse_damage(const Models& models) {
    const std::vector<float> numbers = Random(6).bells(kRows * kCols);
    const std::vector<uint16_t> weight = with_rare(brains(numbers.data(), kRows * kCols), 7);
    Tight tight(weight, kRows, kCols);
    std::vector<uint16_t> back(weight.size());
    int64_t used = 0;
    REFUSE_EACH(lowbit_tight_bytes, 0, kRows, kCols);
    REFUSE_EACH(lowbit_tighten, 0, weight.data(), kRows, kCols, tight.room.data(), tight.room.size(), &used);
    REFUSE_EACH(lowbit_loosen, 0, tight.room.data(), tight.used, back.data());
    EXPECT_REFUSED(lowbit_tighten(weight.data(), kRows, kCols, tight.room.data() + 4, tight.room.size(), &used), LOWBIT_BAD_ARGUMENT);
    EXPECT(lowbit_tight_bytes(kRows, (1 << 16) + 1) == -1);
    EXPECT_REFUSED(lowbit_loosen(tight.room.data(), tight.used - 64, back.data()), LOWBIT_BAD_ARGUMENT);
    // The header, the last row's end, and the column of an exception; the layout itself may hold anything.
    const int64_t bytes[] = {0, 8, 17, 31, 63, 88, 100, tight.used - 61};
    for (int64_t at : bytes) {
        tight.room.data()[at] ^= 0xff;
        EXPECT_REFUSED(lowbit_loosen(tight.room.data(), tight.used, back.data()), LOWBIT_BAD_ARGUMENT);
        tight.room.data()[at] ^= 0xff;
    }
    EXPECT(lowbit_loosen(tight.room.data(), tight.used, back.data()) == LOWBIT_OK);
    const lowbit_engine_options with = options(64, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, 8);
    std::vector<lowbit_layer> layers = models.tight_layers;
    lowbit_model model = models.tight;
    model.layers = layers.data();
    lowbit_matrix& down = layers[0].matrices[LOWBIT_DOWN];
    down.data = tight.room.data();
    down.bytes = tight.used;
    EXPECT(lowbit_engine_create(&model, &with) == nullptr);
    down = models.tight_layers[0].matrices[LOWBIT_DOWN];
    for (int64_t size : {INT64_MIN, int64_t{-1}, int64_t{0}, down.bytes / 2}) {
        down.bytes = size;
        EXPECT(lowbit_engine_create(&model, &with) == nullptr);
    }
}

}  // namespace

void check_tight() {
    check_contents();
    const Models models;
    check_products_of(models);
    refuse_damage(models);
}

}  // namespace check
