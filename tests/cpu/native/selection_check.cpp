// Choosing tokens: filters, penalties, biases, and that draws follow the distribution.
#include <cmath>

#include "check.h"

namespace check {
namespace {

constexpr int64_t kVocab = 300;

lowbit_selection plain_selection(float temperature) {
    lowbit_selection selection{};
    selection.temperature = temperature;
    selection.top_p = selection.typical_p = selection.repetition_penalty = 1.0f;
    return selection;
}

std::vector<float> distribution(const std::vector<float>& logits, const lowbit_selection& selection, const std::vector<int32_t>& history) {
    std::vector<float> probabilities(logits.size());
    EXPECT(lowbit_probabilities(logits.data(), kVocab, &selection, history.data(), static_cast<int64_t>(history.size()), probabilities.data()) ==
           LOWBIT_OK);
    double sum = 0.0;
    for (float p : probabilities) sum += static_cast<double>(p);
    EXPECT(std::fabs(sum - 1.0) < 1e-4);
    return probabilities;
}

int64_t kept(const std::vector<float>& probabilities) {
    int64_t count = 0;
    for (float p : probabilities) count += p > 0.0f;
    return count;
}

void check_filters(const std::vector<float>& logits) {
    lowbit_selection selection = plain_selection(0.7f);
    EXPECT(kept(distribution(logits, selection, {})) == kVocab);
    selection.top_k = 7;
    EXPECT(kept(distribution(logits, selection, {})) == 7);
    selection = plain_selection(1.0f);
    selection.top_p = 0.5f;
    const int64_t nucleus = kept(distribution(logits, selection, {}));
    EXPECT(nucleus > 1 && nucleus < kVocab / 2);
    selection = plain_selection(1.0f);
    selection.min_p = 0.9f;
    EXPECT(kept(distribution(logits, selection, {})) < 20);
    selection = plain_selection(1.0f);
    selection.typical_p = 0.3f;
    EXPECT(kept(distribution(logits, selection, {})) < kVocab / 2);
}

void check_draws(const std::vector<float>& logits) {
    constexpr int kDraws = 4000;
    lowbit_selection selection = plain_selection(1.0f);
    selection.top_k = 3;
    const std::vector<float> expected = distribution(logits, selection, {});
    std::vector<int> counts(static_cast<size_t>(kVocab));
    uint64_t generator = 1;
    for (int i = 0; i < kDraws; ++i) {
        int32_t token = -1;
        EXPECT(lowbit_select(logits.data(), kVocab, &selection, nullptr, 0, &generator, &token, nullptr) == LOWBIT_OK);
        ++counts[static_cast<size_t>(token)];
    }
    for (size_t i = 0; i < counts.size(); ++i) EXPECT(std::fabs(static_cast<float>(counts[i]) / kDraws - expected[i]) < 0.03f);
}

void check_penalties(const std::vector<float>& logits, int32_t best) {
    lowbit_selection selection = plain_selection(0.0f);
    uint64_t generator = 1;
    int32_t token = -1;
    float log_probability = 1.0f;
    const std::vector<int32_t> history = {best, best, 4};
    EXPECT(lowbit_select(logits.data(), kVocab, &selection, history.data(), 3, &generator, &token, &log_probability) == LOWBIT_OK);
    EXPECT(token == best && log_probability < 0.0f);
    selection.presence_penalty = 100.0f;
    EXPECT(lowbit_select(logits.data(), kVocab, &selection, history.data(), 3, &generator, &token, nullptr) == LOWBIT_OK && token != best);
    selection = plain_selection(0.0f);
    const float never = -INFINITY;
    selection.bias_count = 1;
    selection.bias_tokens = &best;
    selection.bias_values = &never;
    EXPECT(lowbit_select(logits.data(), kVocab, &selection, nullptr, 0, &generator, &token, nullptr) == LOWBIT_OK && token != best);
}

void check_forbidden(const std::vector<float>& logits, int32_t best) {
    lowbit_selection selection = plain_selection(0.0f);
    uint64_t generator = 1;
    int32_t token = -1;
    const std::vector<int32_t> history = {4, 5}, words = {4, 5, best, 9, best}, ends = {3, 5};
    const auto select = [&](int64_t length) {
        return lowbit_select(logits.data(), kVocab, &selection, history.data(), length, &generator, &token, nullptr);
    };
    selection.word_count = 2;
    selection.word_ends = ends.data();
    selection.word_tokens = words.data();
    EXPECT(select(2) == LOWBIT_OK && token != best);
    EXPECT(select(1) == LOWBIT_OK && token == best);
    EXPECT(select(0) == LOWBIT_OK && token == best);
    selection.banned_count = 1;
    selection.banned_tokens = &best;
    EXPECT(select(0) == LOWBIT_OK && token != best);
    std::vector<float> scores = logits;
    EXPECT(lowbit_adjust(scores.data(), kVocab, &selection, nullptr, 0) == LOWBIT_OK && std::isinf(scores[static_cast<size_t>(best)]));
}

}  // namespace

void check_selection() {
    std::vector<float> logits = Random(8).bells(kVocab);
    const int32_t best = 17;
    logits[static_cast<size_t>(best)] = 5.0f;
    check_penalties(logits, best);
    check_forbidden(logits, best);
    logits[static_cast<size_t>(best)] = 2.0f;
    for (float& logit : logits) logit *= 2.0f;
    check_filters(logits);
    check_draws(logits);
}

}  // namespace check
