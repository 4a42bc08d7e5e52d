// A Llama of two layers with random weights, described to the engine by hand, and its logits in plain loops in double precision.
#pragma once
#include "check.h"

namespace check {

class TinyLlama {
public:
    static constexpr int kHidden = 40, kHeads = 4, kKeyHeads = 2, kHeadDim = 12, kMlp = 72, kVocab = 61, kLayers = 2;
    static constexpr int kWindow = 9;  // of the second layer

    // Linear weights as plain fp32 rows, or packed in a format.
    explicit TinyLlama(const lowbit_format* format, int head_dim = kHeadDim);
    TinyLlama(const TinyLlama&) = delete;
    TinyLlama& operator=(const TinyLlama&) = delete;

    const int head_dim;
    lowbit_model model{};
    std::vector<lowbit_layer> layers;
    // Logits at every position of one sequence, [tokens, vocab].
    std::vector<double> logits(const std::vector<int32_t>& tokens) const;

private:
    struct Linear {
        std::vector<float> plain;
        std::unique_ptr<Aligned> packed;
        std::vector<double> values;
        int64_t rows, cols;
    };
    struct LayerWeights {
        Linear q, k, v, o, gate, up, down;
        std::vector<float> attention_norm, mlp_norm;
    };

    Linear linear(const lowbit_format* format, int64_t rows, int64_t cols);
    static lowbit_matrix face(const Linear& linear);
    void describe_layers();
    void describe_sizes();
    std::vector<double> attend(const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v, int64_t count, int window) const;

    Random random_{11};
    std::vector<LayerWeights> weights_;
    Linear embedding_;
    std::vector<float> final_norm_, frequencies_;
    lowbit_rope rope_{};
};

lowbit_engine_options options(int64_t context, int slots, int cache_type, int compute, int chunk);
std::vector<int32_t> some_tokens(int64_t count, uint64_t seed);
// An engine of a description that may be wrong: none and a sentence, or one that makes a step.
void try_engine(const lowbit_model& model, const lowbit_engine_options& with);

}  // namespace check
