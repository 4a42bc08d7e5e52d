// Choosing the next token: penalties, filters, one draw.
//
// Candidates are kept as (logit, token) in falling order, cut shorter by each filter. With top-k on, only k of them are ever sorted
// and exponentiated; with top-p alone, tokens that cannot belong to the nucleus are dropped before sorting: those whose probability is
// below (1 - p) / vocab together hold less than 1 - p.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "error.h"
#include "lowbit.h"

namespace lowbit {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

struct Candidate {
    float logit;  // after temperature; its probability once `normalize` has run
    int32_t token;
};

// Room that is reused from token to token.
struct Scratch {
    std::vector<float> logits;
    std::vector<int32_t> counts;
    std::vector<Candidate> candidates;
};

Scratch& scratch() {
    thread_local Scratch room;
    return room;
}

bool falling(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

int check(const float* logits, int64_t vocab, const lowbit_selection* s, const int32_t* history, int64_t length) {
    if (!logits || !s || vocab < 1 || vocab > INT32_MAX || length < 0 || (length > 0 && !history))
        return fail(LOWBIT_BAD_ARGUMENT, "a token is chosen from at least one logit and a history");
    if (!(s->temperature >= 0.0f)) return fail(LOWBIT_BAD_ARGUMENT, "temperature is %g; it must be 0 or above", s->temperature);
    if (s->top_k < 0) return fail(LOWBIT_BAD_ARGUMENT, "top_k is %d; it must be 0 (off) or above", s->top_k);
    if (!(s->top_p > 0.0f && s->top_p <= 1.0f)) return fail(LOWBIT_BAD_ARGUMENT, "top_p is %g; it must be in (0, 1]", s->top_p);
    if (!(s->min_p >= 0.0f && s->min_p <= 1.0f)) return fail(LOWBIT_BAD_ARGUMENT, "min_p is %g; it must be in [0, 1]", s->min_p);
    if (!(s->typical_p > 0.0f && s->typical_p <= 1.0f))
        return fail(LOWBIT_BAD_ARGUMENT, "typical_p is %g; it must be in (0, 1]", s->typical_p);
    if (!(s->repetition_penalty > 0.0f))
        return fail(LOWBIT_BAD_ARGUMENT, "repetition_penalty is %g; it must be above 0", s->repetition_penalty);
    if (s->bias_count < 0 || (s->bias_count > 0 && (!s->bias_tokens || !s->bias_values)))
        return fail(LOWBIT_BAD_ARGUMENT, "biases need as many tokens as values");
    return LOWBIT_OK;
}

int check_tokens(const int32_t* tokens, int64_t count, int64_t vocab, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return fail(LOWBIT_BAD_ARGUMENT, "%s holds token %d, outside the vocabulary of %lld", what, tokens[i], (long long)vocab);
    return LOWBIT_OK;
}

// Logits with penalties and biases, or the caller's own when there are none.
const float* adjusted(const float* logits, int64_t vocab, const lowbit_selection& s, const int32_t* history, int64_t length) {
    const bool penalties = s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
    if (!s.bias_count && (!penalties || length == 0)) return logits;
    Scratch& room = scratch();
    room.logits.assign(logits, logits + vocab);
    if (penalties) {
        room.counts.assign(static_cast<size_t>(vocab), 0);
        for (int64_t i = 0; i < length; ++i) {
            const int32_t token = history[i];
            float& logit = room.logits[static_cast<size_t>(token)];
            if (room.counts[static_cast<size_t>(token)]++ == 0) {
                logit = logit > 0.0f ? logit / s.repetition_penalty : logit * s.repetition_penalty;
                logit -= s.presence_penalty;
            }
            logit -= s.frequency_penalty;
        }
    }
    for (int32_t i = 0; i < s.bias_count; ++i) room.logits[static_cast<size_t>(s.bias_tokens[i])] += s.bias_values[i];
    return room.logits.data();
}

int64_t largest(const float* logits, int64_t vocab) {
    return std::max_element(logits, logits + vocab) - logits;
}

// Turn the logits of the candidates, in falling order, into probabilities that sum to 1.
void normalize(std::vector<Candidate>& candidates) {
    const float top = candidates.front().logit;
    double sum = 0.0;
    for (Candidate& c : candidates) sum += c.logit = std::exp(c.logit - top);
    for (Candidate& c : candidates) c.logit = static_cast<float>(c.logit / sum);
}

void renormalize(std::vector<Candidate>& candidates) {
    double sum = 0.0;
    for (const Candidate& c : candidates) sum += c.logit;
    for (Candidate& c : candidates) c.logit = static_cast<float>(c.logit / sum);
}

// Keep the fewest leading candidates whose probabilities reach p.
void keep_mass(std::vector<Candidate>& candidates, float p) {
    double sum = 0.0;
    size_t kept = 0;
    while (kept < candidates.size() && sum < p) sum += candidates[kept++].logit;
    candidates.resize(std::max<size_t>(kept, 1));
}

void keep_typical(std::vector<Candidate>& candidates, float p) {
    double entropy = 0.0;
    for (const Candidate& c : candidates)
        if (c.logit > 0.0f) entropy -= c.logit * std::log(static_cast<double>(c.logit));
    const auto surprise = [entropy](const Candidate& c) { return std::fabs(-std::log(static_cast<double>(c.logit)) - entropy); };
    std::stable_sort(candidates.begin(), candidates.end(), [&](const Candidate& a, const Candidate& b) { return surprise(a) < surprise(b); });
    keep_mass(candidates, p);
    std::sort(candidates.begin(), candidates.end(), falling);
}

// The candidates of the largest logits, in falling order.
void gather(const float* logits, int64_t vocab, const lowbit_selection& s, std::vector<Candidate>& candidates) {
    candidates.clear();
    const float inverse = 1.0f / s.temperature;
    const float top = logits[largest(logits, vocab)];
    float floor = kForbidden;
    if (s.top_k == 0 && s.top_p < 1.0f && s.typical_p == 1.0f) {
        double sum = 0.0;
        for (int64_t i = 0; i < vocab; ++i) sum += std::exp((logits[i] - top) * inverse);
        floor = top + s.temperature * static_cast<float>(std::log(sum * (1.0 - s.top_p) / static_cast<double>(vocab)));
    }
    for (int64_t i = 0; i < vocab; ++i)
        if (logits[i] >= floor && logits[i] > kForbidden) candidates.push_back({logits[i] * inverse, static_cast<int32_t>(i)});
    if (s.top_k > 0 && static_cast<size_t>(s.top_k) < candidates.size()) {
        const auto last = candidates.begin() + s.top_k;
        std::nth_element(candidates.begin(), last, candidates.end(), falling);
        candidates.erase(last, candidates.end());
    }
    std::sort(candidates.begin(), candidates.end(), falling);
}

// The distribution after every filter: candidates with their probabilities. The floor of `gather` drops what top-p would, so the
// sum that top-p compares with must be the whole one.
int distribute(const float* logits, int64_t vocab, const lowbit_selection& s, std::vector<Candidate>& candidates) {
    const double largest_logit = logits[largest(logits, vocab)];
    if (!std::isfinite(largest_logit))
        return fail(LOWBIT_BAD_ARGUMENT, "no token can be chosen: the logits are NaN, infinite or all forbidden");
    gather(logits, vocab, s, candidates);
    if (s.top_k == 0 && s.top_p < 1.0f && s.typical_p == 1.0f) {
        double sum = 0.0;
        for (int64_t i = 0; i < vocab; ++i) sum += std::exp((logits[i] - largest_logit) / s.temperature);
        const float top = candidates.front().logit;
        for (Candidate& c : candidates) c.logit = static_cast<float>(std::exp(c.logit - top) / sum);
    } else {
        normalize(candidates);
    }
    if (s.top_p < 1.0f) {
        keep_mass(candidates, s.top_p);
        renormalize(candidates);
    }
    if (s.min_p > 0.0f) {
        const float least = s.min_p * candidates.front().logit;
        while (candidates.size() > 1 && candidates.back().logit < least) candidates.pop_back();
        renormalize(candidates);
    }
    if (s.typical_p < 1.0f) {
        keep_typical(candidates, s.typical_p);
        renormalize(candidates);
    }
    return LOWBIT_OK;
}

// splitmix64: one multiply-xor chain per draw, every seed good.
double draw(uint64_t& state) {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

float log_probability_of(const float* logits, int64_t vocab, int64_t token) {
    const double top = logits[largest(logits, vocab)];
    double sum = 0.0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - top);
    return static_cast<float>(logits[token] - top - std::log(sum));
}

int check_all(const float* logits, int64_t vocab, const lowbit_selection* s, const int32_t* history, int64_t length) {
    if (int status = check(logits, vocab, s, history, length)) return status;
    if (int status = check_tokens(history, length, vocab, "the history")) return status;
    return check_tokens(s->bias_tokens, s->bias_count, vocab, "the list of biases");
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_select(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                             int64_t history_length, uint64_t* generator, int32_t* token, float* log_probability) try {
    if (int status = check_all(logits, vocab, selection, history, history_length)) return status;
    if (!token || !generator) return fail(LOWBIT_BAD_ARGUMENT, "a chosen token needs room, and a draw its generator");
    const float* scores = adjusted(logits, vocab, *selection, history, history_length);
    if (selection->temperature == 0.0f) {
        const int64_t best = largest(scores, vocab);
        if (!std::isfinite(scores[best]))
            return fail(LOWBIT_BAD_ARGUMENT, "no token can be chosen: the logits are NaN, infinite or all forbidden");
        *token = static_cast<int32_t>(best);
    } else {
        std::vector<Candidate>& candidates = scratch().candidates;
        if (int status = distribute(scores, vocab, *selection, candidates)) return status;
        double left = draw(*generator);
        size_t chosen = 0;
        while (chosen + 1 < candidates.size() && (left -= candidates[chosen].logit) >= 0.0) ++chosen;
        *token = candidates[chosen].token;
    }
    if (log_probability) *log_probability = log_probability_of(logits, vocab, *token);
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int lowbit_probabilities(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                                    int64_t history_length, float* probabilities) try {
    if (int status = check_all(logits, vocab, selection, history, history_length)) return status;
    if (!probabilities) return fail(LOWBIT_BAD_ARGUMENT, "the distribution needs room");
    const float* scores = adjusted(logits, vocab, *selection, history, history_length);
    std::fill(probabilities, probabilities + vocab, 0.0f);
    if (selection->temperature == 0.0f) {
        probabilities[largest(scores, vocab)] = 1.0f;
        return LOWBIT_OK;
    }
    std::vector<Candidate>& candidates = scratch().candidates;
    if (int status = distribute(scores, vocab, *selection, candidates)) return status;
    for (const Candidate& c : candidates) probabilities[c.token] = c.logit;
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
