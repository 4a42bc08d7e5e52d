#include "tiny_llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace check {
namespace {

using Rows = std::vector<double>;
constexpr double kEps = 1e-5;

Rows times(const Rows& x, const std::vector<double>& weight, int64_t count, int64_t rows, int64_t cols) {
    Rows y(static_cast<size_t>(count * rows));
    for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0.0;
            for (int64_t c = 0; c < cols; ++c) sum += x[static_cast<size_t>(t * cols + c)] * weight[static_cast<size_t>(r * cols + c)];
            y[static_cast<size_t>(t * rows + r)] = sum;
        }
    return y;
}

Rows normed(const Rows& x, const std::vector<float>& weight) {
    const size_t size = weight.size();
    Rows y(x.size());
    for (size_t t = 0; t < x.size(); t += size) {
        double sum = 0.0;
        for (size_t i = 0; i < size; ++i) sum += x[t + i] * x[t + i];
        const double scale = 1.0 / std::sqrt(sum / static_cast<double>(size) + kEps);
        for (size_t i = 0; i < size; ++i) y[t + i] = x[t + i] * scale * static_cast<double>(weight[i]);
    }
    return y;
}

void add(Rows& x, const Rows& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

// Rotary positions, the two halves of a head making the pairs.
void rotate(Rows& x, int64_t count, int64_t heads, int64_t size, const std::vector<float>& frequencies) {
    const int64_t half = size / 2;
    for (int64_t t = 0; t < count; ++t)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < half; ++i) {
                const double angle = static_cast<double>(t) * static_cast<double>(frequencies[static_cast<size_t>(i)]);
                double& a = x[static_cast<size_t>((t * heads + h) * size + i)];
                double& b = x[static_cast<size_t>((t * heads + h) * size + half + i)];
                const double first = a;
                a = first * std::cos(angle) - b * std::sin(angle);
                b = b * std::cos(angle) + first * std::sin(angle);
            }
}

}  // namespace

TinyLlama::Linear TinyLlama::linear(const lowbit_format* format, int64_t rows, int64_t cols) {
    Linear made;
    made.rows = rows;
    made.cols = cols;
    const float size = 1.0f / std::sqrt(static_cast<float>(cols));
    if (format) {
        const Weight weight = quantized(*format, rows, cols, random_.next(), size);
        made.values = weight.values();
        made.packed = prepared(weight);
        return made;
    }
    made.plain = random_.bells(rows * cols);
    for (float& number : made.plain) number *= size;
    made.values.assign(made.plain.begin(), made.plain.end());
    return made;
}

lowbit_matrix TinyLlama::face(const Linear& linear) {
    lowbit_matrix matrix{};
    matrix.kind = linear.packed ? LOWBIT_PREPARED : LOWBIT_PLAIN;
    matrix.data = linear.packed ? static_cast<const void*>(linear.packed->data()) : linear.plain.data();
    matrix.bytes = linear.packed ? linear.packed->size() : 0;
    matrix.rows = linear.rows;
    matrix.cols = linear.cols;
    matrix.count = 1;
    matrix.dtype = LOWBIT_FP32;
    return matrix;
}

TinyLlama::TinyLlama(const lowbit_format* format, int head_dim) : head_dim(head_dim) {
    const auto near_one = [&](int64_t count) {
        std::vector<float> numbers = random_.bells(count);
        for (float& number : numbers) number = 1.0f + 0.1f * number;
        return numbers;
    };
    embedding_ = linear(format, kVocab, kHidden);
    for (int i = 0; i < kLayers; ++i) {
        LayerWeights w;
        w.q = linear(format, kHeads * head_dim, kHidden);
        w.k = linear(format, kKeyHeads * head_dim, kHidden);
        w.v = linear(format, kKeyHeads * head_dim, kHidden);
        w.o = linear(format, kHidden, kHeads * head_dim);
        w.gate = linear(format, kMlp, kHidden);
        w.up = linear(format, kMlp, kHidden);
        w.down = linear(format, kHidden, kMlp);
        w.attention_norm = near_one(kHidden);
        w.mlp_norm = near_one(kHidden);
        weights_.push_back(std::move(w));
    }
    final_norm_ = near_one(kHidden);
    for (int i = 0; i < head_dim / 2; ++i) frequencies_.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / head_dim)));
    describe_layers();
    describe_sizes();
}

void TinyLlama::describe_layers() {
    for (int i = 0; i < kLayers; ++i) {
        const LayerWeights& w = weights_[static_cast<size_t>(i)];
        lowbit_layer layer{};
        layer.matrices[LOWBIT_Q] = face(w.q);
        layer.matrices[LOWBIT_K] = face(w.k);
        layer.matrices[LOWBIT_V] = face(w.v);
        layer.matrices[LOWBIT_O] = face(w.o);
        layer.matrices[LOWBIT_GATE] = face(w.gate);
        layer.matrices[LOWBIT_UP] = face(w.up);
        layer.matrices[LOWBIT_DOWN] = face(w.down);
        layer.vectors[LOWBIT_ATTENTION_NORM].weight = w.attention_norm.data();
        layer.vectors[LOWBIT_MLP_NORM].weight = w.mlp_norm.data();
        layer.window = i == 1 ? kWindow : 0;
        layers.push_back(layer);
    }
}

void TinyLlama::describe_sizes() {
    rope_.frequencies = frequencies_.data();
    rope_.rotary_dim = head_dim;
    rope_.attention_factor = rope_.factor = 1.0f;
    rope_.theta = 10000.0;
    model.struct_bytes = sizeof model;
    model.hidden_size = model.embedding_width = kHidden;
    model.vocab_size = kVocab;
    model.layer_count = kLayers;
    model.rope_count = 1;
    model.position_offset = -1;
    model.final_norm = 1;
    model.heads = kHeads;
    model.kv_heads = kKeyHeads;
    model.head_dim = head_dim;
    model.norm_eps = static_cast<float>(kEps);
    model.embedding_multiplier = model.residual_multiplier = model.head_multiplier = 1.0f;
    model.attention_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    model.mlp.size = kMlp;
    model.mlp.activation = LOWBIT_SILU;
    model.mlp.gate = LOWBIT_SEPARATE;
    model.mlp.sigmoid_scale = 1.0f;
    model.ropes = &rope_;
    model.layers = layers.data();
    model.matrices[LOWBIT_EMBEDDING] = model.matrices[LOWBIT_HEAD] = face(embedding_);
    model.vectors[LOWBIT_FINAL_NORM].weight = final_norm_.data();
}

std::vector<double> TinyLlama::attend(const Rows& q, const Rows& k, const Rows& v, int64_t count, int window) const {
    Rows out(q.size());
    for (int64_t t = 0; t < count; ++t)
        for (int64_t h = 0; h < kHeads; ++h) {
            const int64_t from = (t * kHeads + h) * head_dim, key_head = h / (kHeads / kKeyHeads);
            const int64_t first = window ? std::max<int64_t>(0, t - window + 1) : 0;
            double total = 0.0;
            for (int64_t s = first; s <= t; ++s) {
                const int64_t at = (s * kKeyHeads + key_head) * head_dim;
                double score = 0.0;
                for (int64_t i = 0; i < head_dim; ++i) score += q[static_cast<size_t>(from + i)] * k[static_cast<size_t>(at + i)];
                const double weight = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
                total += weight;
                for (int64_t i = 0; i < head_dim; ++i) out[static_cast<size_t>(from + i)] += weight * v[static_cast<size_t>(at + i)];
            }
            for (int64_t i = 0; i < head_dim; ++i) out[static_cast<size_t>(from + i)] /= total;
        }
    return out;
}

std::vector<double> TinyLlama::logits(const std::vector<int32_t>& tokens) const {
    const int64_t count = static_cast<int64_t>(tokens.size());
    const auto multiply = [count](const Rows& x, const Linear& w) { return times(x, w.values, count, w.rows, w.cols); };
    Rows x;
    for (int32_t token : tokens) x.insert(x.end(), embedding_.values.begin() + token * kHidden, embedding_.values.begin() + (token + 1) * kHidden);
    for (int i = 0; i < kLayers; ++i) {
        const LayerWeights& w = weights_[static_cast<size_t>(i)];
        const Rows h = normed(x, w.attention_norm);
        Rows q = multiply(h, w.q), k = multiply(h, w.k);
        rotate(q, count, kHeads, head_dim, frequencies_);
        rotate(k, count, kKeyHeads, head_dim, frequencies_);
        add(x, multiply(attend(q, k, multiply(h, w.v), count, i == 1 ? kWindow : 0), w.o));
        const Rows m = normed(x, w.mlp_norm);
        Rows gate = multiply(m, w.gate);
        const Rows up = multiply(m, w.up);
        for (size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1.0 + std::exp(-gate[j]));
        add(x, multiply(gate, w.down));
    }
    return multiply(normed(x, final_norm_), embedding_);
}

lowbit_engine_options options(int64_t context, int slots, int cache_type, int compute, int chunk) {
    lowbit_engine_options made{};
    made.context = context;
    made.slots = slots;
    made.cache_type = cache_type;
    made.compute = compute;
    made.chunk = chunk;
    return made;
}

std::vector<int32_t> some_tokens(int64_t count, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(random.below(TinyLlama::kVocab)));
    return tokens;
}

void try_engine(const lowbit_model& model, const lowbit_engine_options& with) {
    lowbit_engine* engine = lowbit_engine_create(&model, &with);
    if (!engine) EXPECT(strlen(lowbit_last_error()) > 10);
    if (!engine) return;
    const int32_t token = 1, slot = 0;
    const uint8_t wanted = 1;
    std::vector<float> logits(static_cast<size_t>(model.vocab_size));
    lowbit_engine_step(engine, &token, &slot, &wanted, 1, logits.data());
    lowbit_engine_destroy(engine);
}

}  // namespace check
