// The passes over a vocabulary from which every filter of select.cpp is made. Included by each instruction set's file.
#pragma once
#include "engine_isa.h"
#include "engine_lanes.h"

namespace lowbit {
namespace {

void weigh_logits(const float* logits, int64_t count, float top, float inverse, float* weights) {
    constexpr float kLeast = -87.0f;  // e^-87 is near the smallest normal number
    sweep(count, [&](int64_t i, int n) {
        const F32 x = (load_up_to(logits + i, n) - splat(top)) * splat(inverse);
        store_up_to(weights + i, select_negative(x - splat(kLeast), splat(0.0f), exponential(x)), n);
    });
}

inline F32 where_at_least(F32 key, F32 low, F32 value) { return select_negative(key - low, splat(0.0f), value); }

// Sums in floats go no further than a block, so that they stay good to the last bits of a probability.
constexpr int64_t kTallyBlock = 1024;

Tally tally_block(const float* keys, const float* weights, int64_t count, F32 low) {
    constexpr int kChains = 4;  // a sum waits four cycles for the one before it
    F32 found[kChains], mass[kChains];
    for (int c = 0; c < kChains; ++c) found[c] = mass[c] = splat(0.0f);
    int64_t i = 0;
    for (; i + kChains * kLane <= count; i += kChains * kLane)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
            const F32 key = load(keys + i + c * kLane);
            found[c] = found[c] + where_at_least(key, low, splat(1.0f));
            mass[c] = mass[c] + where_at_least(key, low, load(weights + i + c * kLane));
        }
    for (; i < count; i += kLane) {
        const int n = count - i < kLane ? static_cast<int>(count - i) : kLane;
        const F32 key = inside(load_up_to(keys + i, n), 0, n, -INFINITY);
        found[0] = found[0] + where_at_least(key, low, splat(1.0f));
        mass[0] = mass[0] + where_at_least(key, low, load_up_to(weights + i, n));
    }
    for (int c = 1; c < kChains; ++c) found[0] = found[0] + found[c], mass[0] = mass[0] + mass[c];
    return {static_cast<int64_t>(sum_of(found[0])), static_cast<double>(sum_of(mass[0]))};
}

Tally tally_from(const Choice& choice, int64_t begin, int64_t end, float low) {
    Tally whole{};
    for (int64_t i = begin; i < end; i += kTallyBlock) {
        const Tally part = tally_block(choice.keys + i, choice.weights + i, i + kTallyBlock < end ? kTallyBlock : end - i, splat(low));
        whole.count += part.count;
        whole.mass += part.mass;
    }
    return whole;
}

double moment_from(const Choice& choice, int64_t count, float low, float top) {
    double whole = 0.0;
    for (int64_t begin = 0; begin < count; begin += kTallyBlock) {
        F32 moment = splat(0.0f);
        sweep(begin + kTallyBlock < count ? kTallyBlock : count - begin, [&](int64_t i, int n) {
            const F32 key = load_up_to(choice.keys + begin + i, n), part = (splat(top) - key) * load_up_to(choice.weights + begin + i, n);
            moment = moment + inside(where_at_least(key, splat(low), part), 0, n, 0.0f);
        });
        whole += static_cast<double>(sum_of(moment));
    }
    return whole;
}

void fold_keys(const float* keys, int64_t count, float low, float middle, float* to) {
    sweep(count, [&](int64_t i, int n) {
        const F32 key = load_up_to(keys + i, n), away = key - splat(middle);
        store_up_to(to + i, select_negative(key - splat(low), splat(-INFINITY), smaller(away, splat(middle) - key)), n);
    });
}

// Stretches without one are passed by at the speed of memory.
int64_t gather_from(const float* keys, int64_t count, float low, int32_t* places) {
    constexpr int64_t kStretch = 4 * kLane;
    int64_t found = 0;
    for (int64_t begin = 0; begin < count; begin += kStretch) {
        const int64_t end = begin + kStretch < count ? begin + kStretch : count;
        if (end - begin == kStretch) {
            const F32 first = larger(load(keys + begin), load(keys + begin + kLane));
            if (largest_of(larger(first, larger(load(keys + begin + 2 * kLane), load(keys + begin + 3 * kLane)))) < low) continue;
        }
        for (int64_t i = begin; i < end; ++i)
            if (keys[i] >= low) places[found++] = static_cast<int32_t>(i);
    }
    return found;
}

}  // namespace
}  // namespace lowbit
