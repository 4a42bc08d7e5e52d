// Choosing the next token: biases, penalties, filters, one draw.
//
// Nothing is sorted. Every filter keeps the tokens of the largest keys, and a key is the logit l but for the last filter:
//   top-k      the k largest                   top-p   the fewest largest with mass p
//   min-p      l >= top + T ln min_p, since e^((l - top) / T) is the probability in units of the largest
//   typical-p  the fewest with mass p by -|l - c|, c = sum p(l) l, since |-ln p(l) - entropy| = |l - c| / T
// Where they must end is found by halving: each try is one pass over keys and weights that counts what is left (choice_lanes.h). For
// 49,152 tokens some 15 passes of 2 microseconds are enough; sorting them took 4 milliseconds.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "engine_isa.h"
#include "error.h"
#include "format.h"

namespace lowbit {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr float kWidest = 88.0f;     // temperatures below the largest logit: further down weights are 0
constexpr int64_t kDrawBlock = 1024;  // tokens that a draw passes by at a time
constexpr int64_t kFew = 1024;        // so many tokens are gathered and looked at by themselves

// Room that is reused from token to token; counts are all zero between two uses.
struct Scratch {
    std::vector<float> logits, weights, folded, few_keys, few_weights;
    std::vector<int32_t> counts, tokens;
};

Scratch& scratch() {
    thread_local Scratch room;
    return room;
}

// --- what is refused ---

int check_numbers(const lowbit_selection& s) {
    if (!(s.temperature >= 0.0f && s.temperature <= FLT_MAX)) return fail(LOWBIT_BAD_ARGUMENT, "temperature is %g; it must be 0 or above", s.temperature);
    if (s.top_k < 0) return fail(LOWBIT_BAD_ARGUMENT, "top_k is %d; it must be 0 (off) or above", s.top_k);
    if (!(s.top_p > 0.0f && s.top_p <= 1.0f)) return fail(LOWBIT_BAD_ARGUMENT, "top_p is %g; it must be in (0, 1]", s.top_p);
    if (!(s.min_p >= 0.0f && s.min_p <= 1.0f)) return fail(LOWBIT_BAD_ARGUMENT, "min_p is %g; it must be in [0, 1]", s.min_p);
    if (!(s.typical_p > 0.0f && s.typical_p <= 1.0f)) return fail(LOWBIT_BAD_ARGUMENT, "typical_p is %g; it must be in (0, 1]", s.typical_p);
    if (!(s.repetition_penalty > 0.0f)) return fail(LOWBIT_BAD_ARGUMENT, "repetition_penalty is %g; it must be above 0", s.repetition_penalty);
    return LOWBIT_OK;
}

int check_tokens(const int32_t* tokens, int64_t count, int64_t vocab, const char* what) {
    if (count < 0 || count > kMostElements || (count > 0 && !tokens)) return fail(LOWBIT_BAD_ARGUMENT, "%s has %lld tokens and no place for them", what, (long long)count);
    for (int64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return fail(LOWBIT_BAD_ARGUMENT, "%s holds token %d, outside the vocabulary of %lld", what, tokens[i], (long long)vocab);
    return LOWBIT_OK;
}

int check_words(const lowbit_selection& s, int64_t vocab) {
    if (s.word_count < 0 || (s.word_count > 0 && !s.word_ends)) return fail(LOWBIT_BAD_ARGUMENT, "%d words were given without their ends", s.word_count);
    for (int32_t i = 0; i < s.word_count; ++i)
        if (s.word_ends[i] <= (i ? s.word_ends[i - 1] : 0)) return fail(LOWBIT_BAD_ARGUMENT, "forbidden word %d has no tokens", i);
    return check_tokens(s.word_tokens, s.word_count ? s.word_ends[s.word_count - 1] : 0, vocab, "a forbidden word");
}

int check(const float* logits, int64_t vocab, const lowbit_selection* s, const int32_t* history, int64_t length) {
    if (!logits || !s || vocab < 1 || vocab > INT32_MAX) return fail(LOWBIT_BAD_ARGUMENT, "a token is chosen from at least one logit");
    if (int status = check_numbers(*s)) return status;
    if (int status = check_tokens(history, length, vocab, "the history")) return status;
    if (s->bias_count > 0 && !s->bias_values) return fail(LOWBIT_BAD_ARGUMENT, "biases need as many tokens as values");
    if (std::max(s->bias_count, s->banned_count) > vocab)
        return fail(LOWBIT_BAD_ARGUMENT, "%d biases and %d banned tokens are more than the vocabulary of %lld", s->bias_count, s->banned_count, (long long)vocab);
    if (int status = check_tokens(s->bias_tokens, s->bias_count, vocab, "the list of biases")) return status;
    if (int status = check_words(*s, vocab)) return status;
    return check_tokens(s->banned_tokens, s->banned_count, vocab, "the list of banned tokens");
}

// --- biases and penalties ---

struct History {
    const int32_t* tokens;
    int64_t length;
};

bool has_penalties(const lowbit_selection& s) { return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f; }

void penalize(const lowbit_selection& s, const History& history, int64_t vocab, float* scores) {
    std::vector<int32_t>& counts = scratch().counts;
    if (static_cast<int64_t>(counts.size()) < vocab) counts.resize(static_cast<size_t>(vocab), 0);
    for (int64_t i = 0; i < history.length; ++i) {
        float& score = scores[history.tokens[i]];
        if (counts[static_cast<size_t>(history.tokens[i])]++ == 0) {
            score = score > 0.0f ? score / s.repetition_penalty : score * s.repetition_penalty;
            score -= s.presence_penalty;
        }
        score -= s.frequency_penalty;
    }
    for (int64_t i = 0; i < history.length; ++i) counts[static_cast<size_t>(history.tokens[i])] = 0;
}

void forbid(const lowbit_selection& s, const History& history, float* scores) {
    for (int32_t i = 0, begin = 0; i < s.word_count; begin = s.word_ends[i++]) {
        const int32_t before = s.word_ends[i] - begin - 1;
        const int32_t* word = s.word_tokens + begin;
        if (before <= history.length && std::equal(word, word + before, history.tokens + (history.length - before))) scores[word[before]] = kForbidden;
    }
    for (int32_t i = 0; i < s.banned_count; ++i) scores[s.banned_tokens[i]] = kForbidden;
}

void adjust(const lowbit_selection& s, const History& history, int64_t vocab, float* scores) {
    for (int32_t i = 0; i < s.bias_count; ++i) scores[s.bias_tokens[i]] += s.bias_values[i];
    if (has_penalties(s)) penalize(s, history, vocab, scores);
    forbid(s, history, scores);
}

// Logits as adjusted, or the caller's own where nothing moves them.
const float* adjusted(const float* logits, int64_t vocab, const lowbit_selection& s, const History& history) {
    if (!s.bias_count && !s.word_count && !s.banned_count && (!has_penalties(s) || !history.length)) return logits;
    std::vector<float>& room = scratch().logits;
    room.assign(logits, logits + vocab);
    adjust(s, history, vocab, room.data());
    return room.data();
}

// --- filters ---

// The distribution of one token: those whose key is at least `low_` count, by their weights. Keys are logits until typical-p makes
// distances of them; once few tokens are left, they alone are looked at.
class Distribution {
public:
    Distribution(const float* logits, int64_t vocab, float top, float temperature)
        : count_(vocab), top_(top), temperature_(temperature), low_(std::max(top - kWidest * temperature, -FLT_MAX)) {
        std::vector<float>& weights = scratch().weights;
        weights.resize(static_cast<size_t>(vocab));
        engine_isa().weigh(logits, vocab, top, std::min(1.0f / temperature, FLT_MAX), weights.data());
        choice_ = {logits, weights.data()};
    }

    void filter(const lowbit_selection& s) {
        if (s.top_k > 0) narrow(low_, [&](const Tally& held) { return held.count >= s.top_k; });
        if (s.top_p < 1.0f) {
            const double mass = tally(low_).mass;
            narrow(floor_of(s.top_p, mass), [&](const Tally& held) { return held.mass >= s.top_p * mass; });
        }
        if (s.min_p > 0.0f) low_ = std::max(low_, top_ + temperature_ * std::log(s.min_p));
        if (s.typical_p < 1.0f) {
            const double mass = tally(low_).mass;
            const float middle = static_cast<float>(top_ - engine_isa().moment(choice_, count_, low_, top_) / mass);
            const float farthest = std::max(top_ - middle, middle - floor_of(s.typical_p, mass));
            fold(middle);
            narrow(-farthest, [&](const Tally& held) { return held.mass >= s.typical_p * mass; });
        }
    }

    // The token at which the weights, one after another, have passed a share of the whole.
    int32_t at(double share, int64_t fallback) const {
        double left = share * tally(low_).mass;
        for (int64_t begin = 0; begin < count_; begin += kDrawBlock) {
            const int64_t end = std::min(begin + kDrawBlock, count_);
            const double mass = engine_isa().tally(choice_, begin, end, low_).mass;
            if (mass > left) return within(begin, end, left, fallback);
            left -= mass;
        }
        return static_cast<int32_t>(fallback);  // the last bit of a sum
    }

    void write(float* probabilities, int64_t vocab) const {
        const double mass = tally(low_).mass;
        std::fill(probabilities, probabilities + vocab, 0.0f);
        for (int64_t i = 0; i < count_; ++i)
            if (choice_.keys[i] >= low_) probabilities[token(i)] = static_cast<float>(static_cast<double>(choice_.weights[i]) / mass);
    }

private:
    Tally tally(float low) const { return engine_isa().tally(choice_, 0, count_, low); }
    int32_t token(int64_t i) const { return few_ ? scratch().tokens[static_cast<size_t>(i)] : static_cast<int32_t>(i); }

    int32_t within(int64_t begin, int64_t end, double left, int64_t fallback) const {
        for (int64_t i = begin; i < end; ++i) {
            if (choice_.keys[i] < low_ || choice_.weights[i] == 0.0f) continue;
            fallback = token(i);
            if ((left -= static_cast<double>(choice_.weights[i])) < 0.0) break;
        }
        return static_cast<int32_t>(fallback);
    }

    // A logit above which a share of the mass lies for certain: all the others together have less than what is left.
    float floor_of(float share, double mass) const {
        const double left = std::max((1.0 - static_cast<double>(share)) * mass, DBL_MIN);
        return std::max(low_, static_cast<float>(top_ - temperature_ * std::log(static_cast<double>(count_) / left)));
    }

    // Keep the tokens of the largest keys, as few as are enough; those from `most` on should be.
    template <class Enough>
    void narrow(float most, const Enough& enough) {
        float least = top_;  // too few from here on
        Tally held = tally(most), inside = tally(least);
        if (!enough(held)) most = low_, held = tally(most);
        if (!enough(held)) return;
        if (enough(inside)) most = least, held = inside;
        while (held.count - inside.count > 1) {
            const float middle = 0.5f * most + 0.5f * least;
            if (middle <= most || middle >= least) break;  // equal keys
            const Tally found = tally(middle);
            if (enough(found)) most = middle, held = found;
            else least = middle, inside = found;
            if (!few_ && held.count <= kFew) gather(most);
        }
        low_ = most;
    }

    void gather(float low) {
        Scratch& room = scratch();
        room.tokens.resize(kFew);
        count_ = engine_isa().gather(choice_.keys, count_, low, room.tokens.data());
        room.few_keys.resize(kFew);
        room.few_weights.resize(kFew);
        for (int64_t i = 0; i < count_; ++i) {
            const size_t at = static_cast<size_t>(i);
            room.few_keys[at] = choice_.keys[room.tokens[at]];
            room.few_weights[at] = choice_.weights[room.tokens[at]];
        }
        choice_ = {room.few_keys.data(), room.few_weights.data()};
        few_ = true;
    }

    // Prefer the tokens nearest to the middle.
    void fold(float middle) {
        std::vector<float>& folded = scratch().folded;
        folded.resize(static_cast<size_t>(count_));
        engine_isa().fold(choice_.keys, count_, low_, middle, folded.data());
        choice_.keys = folded.data();
        low_ = -std::max(top_ - middle, middle - low_);
        top_ = 0.0f;
    }

    int64_t count_;
    float top_, temperature_, low_;
    Choice choice_{};
    bool few_ = false;
};

// splitmix64: one multiply-xor chain per draw, every seed good.
double draw(uint64_t& state) {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

float log_probability_of(const float* logits, int64_t vocab, int64_t token) {
    const double top = logits[engine_isa().largest(logits, vocab)];
    double sum = 0.0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - top);
    return static_cast<float>(logits[token] - top - std::log(sum));
}

int find_best(const float* scores, int64_t vocab, int64_t* best) {
    *best = engine_isa().largest(scores, vocab);
    if (!std::isfinite(scores[*best])) return fail(LOWBIT_BAD_ARGUMENT, "no token can be chosen: the logits are NaN, infinite or all forbidden");
    return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_select(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                             int64_t history_length, uint64_t* generator, int32_t* token, float* log_probability) try {
    if (int status = check(logits, vocab, selection, history, history_length)) return status;
    if (!token || !generator) return fail(LOWBIT_BAD_ARGUMENT, "a chosen token needs room, and a draw its generator");
    const float* scores = adjusted(logits, vocab, *selection, {history, history_length});
    int64_t best = 0;
    if (int status = find_best(scores, vocab, &best)) return status;
    *token = static_cast<int32_t>(best);
    if (selection->temperature > 0.0f) {
        Distribution distribution(scores, vocab, scores[best], selection->temperature);
        distribution.filter(*selection);
        *token = distribution.at(draw(*generator), best);
    }
    if (log_probability) *log_probability = log_probability_of(logits, vocab, *token);
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int lowbit_probabilities(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                                    int64_t history_length, float* probabilities) try {
    if (int status = check(logits, vocab, selection, history, history_length)) return status;
    if (!probabilities) return fail(LOWBIT_BAD_ARGUMENT, "the distribution needs room");
    const float* scores = adjusted(logits, vocab, *selection, {history, history_length});
    int64_t best = 0;
    if (int status = find_best(scores, vocab, &best)) return status;
    if (selection->temperature > 0.0f) {
        Distribution distribution(scores, vocab, scores[best], selection->temperature);
        distribution.filter(*selection);
        distribution.write(probabilities, vocab);
        return LOWBIT_OK;
    }
    std::fill(probabilities, probabilities + vocab, 0.0f);
    probabilities[best] = 1.0f;
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int lowbit_adjust(float* scores, int64_t vocab, const lowbit_selection* selection, const int32_t* history, int64_t history_length) try {
    if (int status = check(scores, vocab, selection, history, history_length)) return status;
    adjust(*selection, {history, history_length}, vocab, scores);
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
