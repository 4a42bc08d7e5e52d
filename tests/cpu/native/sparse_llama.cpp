#include "sparse_llama.h"

#include <cstring>

namespace check {
namespace {

Weight restored(const lowbit_matrix& matrix, const lowbit_format& format) {
    Weight weight(format, matrix.rows, matrix.cols);
    EXPECT(lowbit_restore(matrix.data, matrix.bytes, weight.codes.data(), weight.scales.data(), weight.has_zeros() ? weight.zeros.data() : nullptr,
                          &weight.unit) == LOWBIT_OK);
    return weight;
}

}  // namespace

lowbit_matrix SparseLlama::plain(std::vector<float> numbers, int64_t rows, int64_t cols, int64_t count) {
    plain_.push_back(std::move(numbers));
    lowbit_matrix matrix{};
    matrix.kind = LOWBIT_PLAIN;
    matrix.data = plain_.back().data();
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.count = count;
    matrix.dtype = LOWBIT_FP32;
    return matrix;
}

// One expert after the other, each made of the rows of `parts`.
lowbit_matrix SparseLlama::copies(const std::vector<const lowbit_matrix*>& parts, const lowbit_format* format) {
    const int64_t cols = parts[0]->cols;
    int64_t rows = 0;
    std::vector<float> numbers;
    Weight joined(format ? *format : format_named("int4_g64"), 0, cols);
    for (const lowbit_matrix* part : parts) {
        rows += part->rows;
        const float* data = static_cast<const float*>(part->data);
        if (!format) {
            numbers.insert(numbers.end(), data, data + part->rows * cols);
            continue;
        }
        const Weight own = restored(*part, *format);
        joined.codes.insert(joined.codes.end(), own.codes.begin(), own.codes.end());
        joined.scales.insert(joined.scales.end(), own.scales.begin(), own.scales.end());
        joined.zeros.insert(joined.zeros.end(), own.zeros.begin(), own.zeros.end());
    }
    if (!format) {
        const std::vector<float> one = numbers;
        for (int i = 1; i < kExperts; ++i) numbers.insert(numbers.end(), one.begin(), one.end());
        return plain(std::move(numbers), rows, cols, kExperts);
    }
    joined.rows = rows;
    const auto one = prepared(joined);
    packed_.push_back(std::make_unique<Aligned>(kExperts * one->size()));
    for (int i = 0; i < kExperts; ++i) memcpy(packed_.back()->data() + i * one->size(), one->data(), static_cast<size_t>(one->size()));
    lowbit_matrix matrix{};
    matrix.kind = LOWBIT_PREPARED;
    matrix.data = packed_.back()->data();
    matrix.bytes = one->size();
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.count = kExperts;
    return matrix;
}

SparseLlama::SparseLlama(const TinyLlama& llama, const lowbit_format* format) : model(llama.model), layers(llama.layers) {
    constexpr int64_t kHidden = TinyLlama::kHidden;
    lowbit_matrix* m = layers[0].matrices;
    m[LOWBIT_EXPERTS_GATE_UP] = copies({&m[LOWBIT_GATE], &m[LOWBIT_UP]}, format);
    m[LOWBIT_EXPERTS_DOWN] = copies({&m[LOWBIT_DOWN]}, format);
    m[LOWBIT_GATE] = m[LOWBIT_UP] = m[LOWBIT_DOWN] = lowbit_matrix{};
    Random random(21);
    m[LOWBIT_ROUTER] = plain(random.bells(kExperts * kHidden), kExperts, kHidden, 1);
    m[LOWBIT_SHARED_GATE] = plain(random.bells(kShared * kHidden), kShared, kHidden, 1);
    m[LOWBIT_SHARED_UP] = plain(random.bells(kShared * kHidden), kShared, kHidden, 1);
    m[LOWBIT_SHARED_DOWN] = plain(std::vector<float>(static_cast<size_t>(kHidden * kShared), 0.0f), kHidden, kShared, 1);
    m[LOWBIT_SHARED_ROUTER] = plain(random.bells(kHidden), 1, kHidden, 1);
    layers[0].sparse = 1;
    model.layers = layers.data();
    model.expert = model.shared = model.mlp;
    model.expert.gate = LOWBIT_CONCATENATED;
    model.shared.size = kShared;
    model.expert_count = kExperts;
    model.top_k = kChosen;
    model.normalize_experts = 1;
}

}  // namespace check
