// Sixteen 32-bit lanes in plain C++, for processors without a file of their own. vec_avx512.h says what each name means.
#pragma once
#include <cmath>

#include "number.h"

#define LOWBIT_UNROLL 
#define LOWBIT_INLINE inline
#define LOWBIT_UNROLL_REPACK
#define LOWBIT_UNROLL_CLOSING

namespace lowbit {
namespace {

struct Bytes {
    uint32_t lane[16];
};
typedef Bytes Ints;
struct Floats {
    float lane[16];
};

constexpr int kPanelTokens = 2;
constexpr int kPanelBlocks = 1;
constexpr int kWideBias = 0;

template <class Operation>
inline Bytes each(Operation operation) {
    Bytes out;
    for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<uint32_t>(operation(i));
    return out;
}
template <class Operation>
inline Floats each_float(Operation operation) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.lane[i] = operation(i);
    return out;
}

inline Bytes load_bytes(const void* from) {
    Bytes out;
    memcpy(&out, from, sizeof out);
    return out;
}
inline void store_bytes(void* to, const Bytes& value) { memcpy(to, &value, sizeof value); }
// Always inlined: gcc takes a call that only prefetches for one without effect and drops it.
LOWBIT_INLINE void fetch(const void* address) { __builtin_prefetch(address); }
LOWBIT_INLINE void fetch_second(const void* address) { __builtin_prefetch(address, 0, 2); }
LOWBIT_INLINE void fetch_to_write(const void* address) { __builtin_prefetch(address, 1); }

template <int kRight, int kMask>
inline Bytes part(const Bytes& v) {
    return each([&](int i) { return (kRight > 0 ? v.lane[i] >> (kRight > 0 ? kRight : 0) : v.lane[i] << (kRight < 0 ? -kRight : 0)) & (kMask * 0x01010101u); });
}
inline Bytes merge(const Bytes& a, const Bytes& b) {
    return each([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Bytes subtract_bytes(const Bytes& a, const Bytes& b) {
    return each([&](int i) {
        // The top bit of each byte is kept out of the borrow and put right afterwards.
        const uint32_t high = 0x80808080u;
        return ((a.lane[i] | high) - (b.lane[i] & ~high)) ^ ((a.lane[i] ^ ~b.lane[i]) & high);
    });
}
inline Ints splat_ints(int32_t value) {
    return each([=](int) { return static_cast<uint32_t>(value); });
}
inline Ints multiply_ints(const Ints& a, const Ints& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Ints widen_bytes(const uint8_t* from) {
    return each([=](int i) { return from[i]; });
}
inline Ints subtract_ints(const Ints& a, const Ints& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Ints add_ints(const Ints& a, const Ints& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Bytes spread_bytes(const uint8_t* from) {
    return each([=](int i) { return from[i] * 0x01010101u; });
}

template <bool kWide>
inline Ints dot(const Ints& sums, const Bytes& weights, const Ints& x) {
    return each([&](int i) {
        int32_t sum = static_cast<int32_t>(sums.lane[i]);
        for (int k = 0; k < 32; k += 8)
            sum += static_cast<int32_t>((weights.lane[i] >> k) & 0xff) * static_cast<int8_t>((x.lane[i] >> k) & 0xff);
        return static_cast<uint32_t>(sum);
    });
}

inline Floats to_floats(const Ints& v) {
    return each_float([&](int i) { return static_cast<float>(static_cast<int32_t>(v.lane[i])); });
}
inline Floats splat_floats(float value) {
    return each_float([=](int) { return value; });
}
inline Floats multiply(const Floats& a, const Floats& b) {
    return each_float([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return each_float([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Floats add(const Floats& a, const Floats& b) {
    return each_float([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats load_floats(const float* from) {
    Floats out;
    memcpy(&out, from, sizeof out);
    return out;
}
inline void store_floats(float* to, const Floats& value) { memcpy(to, &value, sizeof value); }

inline uint16_t half_at(const void* from, int i) { return static_cast<const uint16_t*>(from)[i]; }
inline Floats halves_to_floats(const void* from) {
    return each_float([=](int i) { return from_fp16(half_at(from, i)); });
}
inline Floats brains_to_floats(const void* from) {
    return each_float([=](int i) { return from_bf16(half_at(from, i)); });
}
inline Floats even_brains(const Bytes& v) {
    return each_float([&](int i) { return float_of(v.lane[i] << 16); });
}
inline Floats odd_brains(const Bytes& v) {
    return each_float([&](int i) { return float_of(v.lane[i] & 0xffff0000u); });
}
inline Floats exponents_to_floats(const uint8_t* from) {
    return each_float([=](int i) { return from_e8m0(from[i]); });
}
inline Floats e4m3_to_floats(const uint8_t* from) {
    return each_float([=](int i) { return from_e4m3(from[i]); });
}
inline void floats_to_halves(void* to, const Floats& value) {
    for (int i = 0; i < 16; ++i) static_cast<uint16_t*>(to)[i] = to_fp16(value.lane[i]);
}
inline void floats_to_brains(void* to, const Floats& value) {
    for (int i = 0; i < 16; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(value.lane[i]);
}
inline Bytes join_brains(const Floats& first, const Floats& second) {
    Bytes both;
    floats_to_brains(&both, first);
    floats_to_brains(reinterpret_cast<uint16_t*>(&both) + 16, second);
    return both;
}
inline void stream_bytes(void* to, const Bytes& value) { store_bytes(to, value); }
inline void stream_floats(float* to, const Floats& value) { store_floats(to, value); }
inline void settle_streams() {}
inline Bytes pair_brains(const Floats& even, const Floats& odd) {
    return each([&](int i) { return static_cast<uint32_t>(to_bf16(even.lane[i])) | static_cast<uint32_t>(to_bf16(odd.lane[i])) << 16; });
}
inline void transpose_words(const uint16_t* const* rows, uint8_t* to) {
    for (int word = 0; word < 16; ++word)
        for (int row = 0; row < 16; ++row) memcpy(to + word * 64 + row * 4, rows[row] + 2 * word, 4);
}

struct Table {
    const uint8_t* bytes;
};
inline Table load_table(const uint8_t* bytes) { return {bytes}; }
template <int kBits>
inline Bytes look_up(const Table& table, const Bytes& codes) {
    uint8_t values[64];
    store_bytes(values, codes);
    for (uint8_t& value : values) value = table.bytes[value];
    return load_bytes(values);
}

inline Ints round_floats(const Floats& v) {
    return each([&](int i) { return static_cast<uint32_t>(static_cast<int32_t>(nearbyintf(v.lane[i]))); });
}

struct RowFactors {
    Ints factors, offsets;
};
inline RowFactors spread_factors(const Ints& factors, const Ints& offsets) { return {factors, offsets}; }

template <class Fold>
inline Bytes fold_each(const Bytes& v, const RowFactors& rows, const int16_t* balance, Fold fold) {
    return each([&](int i) {
        uint32_t out = 0;
        for (int k = 0; k < 4; ++k) {
            const int32_t byte = static_cast<int32_t>((v.lane[i] >> 8 * k) & 0xff);
            const int32_t whole = fold(byte, static_cast<int32_t>(rows.factors.lane[i]), static_cast<int32_t>(rows.offsets.lane[i]), balance[k]);
            out |= static_cast<uint32_t>((whole > 127 ? 127 : whole < -128 ? -128 : whole) & 0xff) << 8 * k;
        }
        return out;
    });
}
// As the processors with 16-bit products do it: rounded after 15 bits and once more after the rest.
inline int32_t high_product(int32_t a, int32_t b) { return (a * b + (1 << 14)) >> 15; }
template <int kRight>
inline Bytes fold_bytes(const Bytes& v, const RowFactors& rows, const int16_t* balance) {
    return fold_each(v, rows, balance, [](int32_t byte, int32_t factor, int32_t zero, int32_t one) {
        return (high_product((byte - zero) * one, factor) + ((1 << kRight) >> 1)) >> kRight;
    });
}
constexpr float kFoldMinimum = 64.0f;
inline Bytes fold_minimum(const Bytes& v, const RowFactors& rows, const int16_t* balance) {
    return fold_each(v, rows, balance, [](int32_t byte, int32_t factor, int32_t minimum, int32_t one) {
        const int32_t places = one * 256 < 0x7fff ? one * 256 : 0x7fff;
        return (high_product(high_product(byte * 256, factor) + minimum, places) + 32) >> 6;
    });
}

template <int kInput>
inline Ints byte_of(const Bytes& v) {
    return each([&](int i) { return (v.lane[i] >> (8 * kInput)) & 0xff; });
}
template <int kBits>
inline Floats look_up_floats(const float* levels, const Ints& codes) {
    return each_float([&](int i) { return levels[codes.lane[i]]; });
}

inline void floats_to_bytes(int8_t* to, const Floats& x, const Floats& inverse) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(nearbyintf(x.lane[i] * inverse.lane[i]));
}
inline Floats smaller(const Floats& a, const Floats& b) {
    return each_float([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats square_root(const Floats& v) { return each_float([&](int i) { return std::sqrt(v.lane[i]); }); }
inline Floats absolute_most(const Floats& most, const Floats& x) {
    return each_float([&](int i) { return fabsf(x.lane[i]) > most.lane[i] ? fabsf(x.lane[i]) : most.lane[i]; });
}
inline float most_of(const Floats& v) {
    float most = v.lane[0];
    for (float value : v.lane) most = value > most ? value : most;
    return most;
}
inline Ints larger_magnitude(const Ints& most, const Floats& x) {
    return each([&](int i) {
        const uint32_t magnitude = bits_of(x.lane[i]) & 0x7fffffffu;
        return magnitude > most.lane[i] ? magnitude : most.lane[i];
    });
}
inline float largest_magnitude(const Ints& v) {
    uint32_t most = v.lane[0];
    for (uint32_t value : v.lane) most = value > most ? value : most;
    return float_of(most);
}
inline void floats_to_line(int8_t* to, const float* x, const Floats& inverse) {
    for (int i = 0; i < 64; i += 16) floats_to_bytes(to + i, load_floats(x + i), inverse);
}
inline float sum_of(const Floats& v) {
    float sum = 0.0f;
    for (float value : v.lane) sum += value;
    return sum;
}

}  // namespace
}  // namespace lowbit
