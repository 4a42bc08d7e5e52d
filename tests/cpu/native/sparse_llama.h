// A tiny Llama whose first layer is a mixture of experts that are all alike: chosen weights that add up to one make of them the dense
// layer that they were copied from, so that its logits are known. A shared expert beside them adds nothing, being zero.
#pragma once
#include "tiny_llama.h"

namespace check {

class SparseLlama {
public:
    static constexpr int kExperts = 5, kChosen = 2, kShared = 24;

    // Experts plain, or packed in the format that the Llama was made with.
    SparseLlama(const TinyLlama& llama, const lowbit_format* format);
    SparseLlama(const SparseLlama&) = delete;
    SparseLlama& operator=(const SparseLlama&) = delete;

    lowbit_model model{};
    std::vector<lowbit_layer> layers;

private:
    lowbit_matrix plain(std::vector<float> numbers, int64_t rows, int64_t cols, int64_t count);
    lowbit_matrix copies(const std::vector<const lowbit_matrix*>& parts, const lowbit_format* format);

    std::vector<std::vector<float>> plain_;
    std::vector<std::unique_ptr<Aligned>> packed_;
};

}  // namespace check
