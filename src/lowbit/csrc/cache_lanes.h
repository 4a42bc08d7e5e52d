// Keys and values on their way into the cache: plain numbers, or bytes with a scale for each head and token, as attention_bytes.h reads
// them. Keys lie in blocks of 16, [channel][16], int8 [channel / 4][16][4]; values row by row, int8 [key / 4][channel][4].
//
// One row of bytes goes to a line of every four channels (keys) or to every fourth byte (values). Sixteen rows that are a block of the
// cache fill its lines, so AVX-512 brings them in order in registers and stores each line once.
#pragma once
#include "attention_shares.h"
#if defined(__AVX512F__)
#include "quarters_avx512.h"
#endif

namespace lowbit {
namespace {

// Beyond what fp16 holds there is an infinity, and a score of minus infinity would hide the key in silence; NaN shows.
inline uint16_t half_or_none(float x) {
    constexpr uint16_t kExponent = 0x7c00, kNone = 0x7e00;
    const uint16_t half = to_fp16(x);
    return (half & kExponent) == kExponent ? kNone : half;
}

// What a byte of these numbers is worth, the largest being 127, and how many bytes a 1 is.
struct ByteScale {
    float scale, inverse;
};

inline ByteScale byte_scale(float largest, float poison) {
    if (poison != 0.0f) return {NAN, 0.0f};
    return {largest / 127.0f, largest > kLeast ? 127.0f / largest : 0.0f};
}

inline F32 part_of(const float* x, int i, int count) { return i + kLane <= count ? load(x + i) : load_first(x + i, count - i); }

// By lane the largest magnitudes of a row, and zeros unless one of its numbers is none.
inline void search_row(const float* x, int count, F32* most, F32* poison) {
    *most = *poison = splat(0.0f);
    for (int i = 0; i < count; i += kLane) {
        const F32 value = part_of(x, i, count);
        *most = larger(*most, larger(value, splat(0.0f) - value));
        *poison = multiply_add(value, splat(0.0f), *poison);
    }
}

inline ByteScale byte_scale_of(const float* x, int count) {
    F32 most, poison;
    search_row(x, count, &most, &poison);
    return byte_scale(largest_of(most), sum_of(poison));
}

// Bytes of a key or value, sixteen at a time, zero beyond its end and where it is none.
template <class Put>
inline void round_head(const float* x, int head_dim, int padded, float inverse, Put put) {
    for (int i = 0; i < padded; i += kLane) {
        alignas(64) int8_t bytes[kLane] = {};
        if (inverse > 0.0f && i < head_dim) store_bytes(bytes, part_of(x, i, head_dim) * splat(inverse));
        put(i, bytes);
    }
}

// With 128 added.
inline float store_key_bytes(const float* key, int head_dim, int padded, uint8_t* keys, int64_t position) {
    const ByteScale by = byte_scale_of(key, head_dim);
    uint8_t* to = keys + position / kKeyBlock * kKeyBlock * padded + position % kKeyBlock * 4;
    round_head(key, head_dim, padded, by.inverse, [&](int i, const int8_t* bytes) {
        for (int four = 0; four < kLane; four += 4) {
            uint32_t word;
            memcpy(&word, bytes + four, sizeof word);
            word ^= 0x80808080u;
            memcpy(to + (i + four) * kKeyBlock, &word, sizeof word);
        }
    });
    return by.scale;
}

inline float store_value_bytes(const float* value, int head_dim, int padded, uint8_t* values, int64_t position) {
    const ByteScale by = byte_scale_of(value, head_dim);
    uint8_t* to = values + position / 4 * 4 * padded + position % 4;
    round_head(value, head_dim, padded, by.inverse, [&](int i, const int8_t* bytes) {
        for (int k = 0; k < kLane; ++k) to[4 * (i + k)] = static_cast<uint8_t>(bytes[k]);
    });
    return by.scale;
}

#if defined(__AVX512F__)

inline bool fills_block(const StoreJob& job) { return job.count == kKeyBlock && job.position % kKeyBlock == 0; }

// The scales of a block, and the inverse of each.
inline void find_scales(const StoreJob& job, float* inverses) {
    alignas(64) float most[kLane][kLane], poison[kLane][kLane], largest[kLane], poisons[kLane];
    for (int r = 0; r < kKeyBlock; ++r) {
        F32 by_lane, none;
        search_row(job.rows + r * job.head_dim, job.head_dim, &by_lane, &none);
        store(most[r], by_lane);
        store(poison[r], none);
    }
    store(largest, each_largest(most, kLane));
    store(poisons, each_sum(poison, kLane));
    for (int r = 0; r < kKeyBlock; ++r) {
        const ByteScale by = byte_scale(largest[r], poisons[r]);
        job.scales[job.position + r] = by.scale;
        inverses[r] = by.inverse;
    }
}

// Sixteen channels as whole numbers, zeros where the row is none.
inline __m512i whole_numbers(const StoreJob& job, int r, int i, float inverse) {
    const __mmask16 there = inverse > 0.0f ? 0xffff : 0;
    return _mm512_maskz_cvtps_epi32(there, (part_of(job.rows + r * job.head_dim, i, job.head_dim) * splat(inverse)).v);
}

// Bytes of sixteen keys, four channels a word, as a line for every four channels.
inline void store_key_block(const StoreJob& job) {
    alignas(64) float inverses[kKeyBlock];
    find_scales(job, inverses);
    uint8_t* to = static_cast<uint8_t*>(job.to) + job.position * job.padded;
    const __m512i moved = _mm512_set1_epi8(-128);
    for (int i = 0; i < job.padded; i += kLane, to += kLane * kKeyBlock) {
        const auto bytes = [&](int r) { return _mm512_cvtsepi32_epi8(whole_numbers(job, r, i, inverses[r])); };
        transpose_quarters(bytes, [&](int line, __m512i v) { _mm512_storeu_si512(to + line * 4 * kKeyBlock, _mm512_xor_si512(v, moved)); });
    }
}

// A lane is a channel, whose bytes of four keys are one word.
inline void store_value_block(const StoreJob& job) {
    alignas(64) float inverses[kKeyBlock];
    find_scales(job, inverses);
    uint8_t* to = static_cast<uint8_t*>(job.to) + job.position * job.padded;
    const __m512i byte = _mm512_set1_epi32(255);
    for (int r = 0; r < kKeyBlock; r += 4)
        for (int i = 0; i < job.padded; i += kLane, to += 4 * kLane) {
            const auto whole = [&](int k) { return whole_numbers(job, r + k, i, inverses[r + k]); };
            __m512i words = _mm512_slli_epi32(whole(3), 24);
            words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_and_si512(whole(2), byte), 16));
            words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_and_si512(whole(1), byte), 8));
            _mm512_storeu_si512(to, _mm512_or_si512(words, _mm512_and_si512(whole(0), byte)));
        }
}

#else

inline bool fills_block(const StoreJob&) { return false; }
inline void store_key_block(const StoreJob&) {}
inline void store_value_block(const StoreJob&) {}

#endif

// One row at `place` of `to`, its numbers `step` apart and `width` of them, zeros behind the head's.
template <class Number, class Narrow>
inline void store_row(const float* x, int head_dim, int width, int64_t step, void* to, int64_t place, const Narrow& narrow) {
    Number* numbers = static_cast<Number*>(to) + place;
    for (int i = 0; i < width; ++i) numbers[i * step] = i < head_dim ? narrow(x[i]) : Number{0};
}

inline void store_keys(const StoreJob& job) {
    if (job.cache_type == LOWBIT_CACHE_INT8 && fills_block(job)) return store_key_block(job);
    for (int64_t r = 0; r < job.count; ++r) {
        const float* key = job.rows + r * job.head_dim;
        const int64_t position = job.position + r, place = position / kKeyBlock * kKeyBlock * job.head_dim + position % kKeyBlock;
        if (job.cache_type == LOWBIT_CACHE_INT8)
            job.scales[position] = store_key_bytes(key, job.head_dim, job.padded, static_cast<uint8_t*>(job.to), position);
        else if (job.cache_type == LOWBIT_CACHE_FP16)
            store_row<uint16_t>(key, job.head_dim, job.head_dim, kKeyBlock, job.to, place, half_or_none);
        else store_row<float>(key, job.head_dim, job.head_dim, kKeyBlock, job.to, place, [](float x) { return x; });
    }
}

inline void store_values(const StoreJob& job) {
    if (job.cache_type == LOWBIT_CACHE_INT8 && fills_block(job)) return store_value_block(job);
    for (int64_t r = 0; r < job.count; ++r) {
        const float* value = job.rows + r * job.head_dim;
        const int64_t position = job.position + r, place = position * job.padded;
        if (job.cache_type == LOWBIT_CACHE_INT8)
            job.scales[position] = store_value_bytes(value, job.head_dim, job.padded, static_cast<uint8_t*>(job.to), position);
        else if (job.cache_type == LOWBIT_CACHE_FP16) store_row<uint16_t>(value, job.head_dim, job.padded, 1, job.to, place, to_fp16);
        else store_row<float>(value, job.head_dim, job.padded, 1, job.to, place, [](float x) { return x; });
    }
}

}  // namespace
}  // namespace lowbit
