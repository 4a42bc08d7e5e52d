// Products with tight rows and their layout (tight.h). Included by each instruction set's file, behind engine_lanes.h.
#pragma once
#include "product.h"
#include "tight.h"

namespace lowbit {
namespace {

// 64 upper bytes by name, joined to their lower ones: four vectors of weights in order. `Pairs` holds them as they are interleaved.
// kTightTogether: rows whose pairs the registers hold beside the sums.
#if defined(__AVX512F__)

constexpr bool kTightPays = true;
constexpr int kTightTogether = 4;
typedef __m512i TightNames;
inline TightNames tight_table(const uint8_t* high) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high))); }
struct Pairs {
    __m512i low, high;
};
template <int kUpper>
inline Pairs join_bytes(const uint8_t* low, const uint8_t* names, const TightNames& table) {
    __m512i name = _mm512_loadu_si512(names);
    if (kUpper) name = _mm512_srli_epi16(name, 4);
    const __m512i upper = _mm512_shuffle_epi8(table, _mm512_and_si512(name, _mm512_set1_epi8(15))), lower = _mm512_loadu_si512(low);
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
}
template <int kVector>
inline F32 weights_of(const Pairs& pairs) {
    const __m512i both = kVector < 2 ? pairs.low : pairs.high;
    return {_mm512_castsi512_ps(kVector % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))) : _mm512_slli_epi32(both, 16))};
}
// A line asked for into the second-level cache and one into the nearest, behind the instructions that make `pairs` and before those that
// take them: gcc would put all prefetches of a unit together.
template <int kLine>
inline __attribute__((always_inline)) void ask_line(Pairs* pairs, const uint8_t* far, const uint8_t* near) {
    asm volatile("prefetcht1 %c3(%1)\n\tprefetcht0 %c3(%2)" : "+v"(pairs->low) : "r"(far), "r"(near), "i"(kLine * kCacheLine));
}
inline void store_pairs(uint16_t* to, const Pairs& pairs) {
    // Words 2i and 2i + 1 of a register belong to inputs i and 16 + i.
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), four = _mm512_set1_epi32(4);
    const __m512i even = _mm512_mullo_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(7)), four);
    const __m512i begin = _mm512_add_epi32(even, _mm512_srli_epi32(lanes, 3));
    const __m512i order = _mm512_or_si512(begin, _mm512_slli_epi32(_mm512_add_epi32(begin, _mm512_set1_epi32(2)), 16));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, pairs.low));
    _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(order, pairs.high));
}
// The way back; a bit for every byte whose upper half has no name.
inline uint64_t split_unit(const uint16_t* weights, const TightTable& table, uint8_t* low, uint8_t* names) {
    const auto wide = [&](int j) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 16 * j))); };
    const __m512i a = _mm512_or_si512(wide(0), _mm512_slli_epi32(wide(1), 16)), b = _mm512_or_si512(wide(2), _mm512_slli_epi32(wide(3), 16));
    const __m512i byte = _mm512_set1_epi16(0xff);
    const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    __mmask64 known = 0;
    __m512i name = _mm512_setzero_si512();
    for (int i = 0; i < 16; ++i) {
        const __mmask64 equal = _mm512_cmpeq_epi8_mask(upper, _mm512_set1_epi8(static_cast<char>(table.high[i])));
        name = _mm512_mask_mov_epi8(name, equal, _mm512_set1_epi8(static_cast<char>(i)));
        known |= equal;
    }
    _mm512_storeu_si512(low, _mm512_maskz_mov_epi8(known, lower));
    _mm512_storeu_si512(names, name);
    return ~static_cast<uint64_t>(known);
}

#elif defined(__AVX2__)

constexpr bool kTightPays = true;
constexpr int kTightTogether = 1;
typedef __m256i TightNames;
inline TightNames tight_table(const uint8_t* high) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high))); }
struct Pairs {
    __m256i low[2], high[2];
};
template <int kUpper>
inline Pairs join_bytes(const uint8_t* low, const uint8_t* names, const TightNames& table) {
    Pairs pairs;
    for (int i = 0; i < 2; ++i) {
        __m256i name = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(names + 32 * i));
        if (kUpper) name = _mm256_srli_epi16(name, 4);
        const __m256i upper = _mm256_shuffle_epi8(table, _mm256_and_si256(name, _mm256_set1_epi8(15)));
        const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + 32 * i));
        pairs.low[i] = _mm256_unpacklo_epi8(lower, upper);
        pairs.high[i] = _mm256_unpackhi_epi8(lower, upper);
    }
    return pairs;
}
template <int kVector>
inline F32 weights_of(const Pairs& pairs) {
    const __m256i* both = kVector < 2 ? pairs.low : pairs.high;
    const auto part = [](__m256i v) {
        return _mm256_castsi256_ps(kVector % 2 ? _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))) : _mm256_slli_epi32(v, 16));
    };
    return {part(both[0]), part(both[1])};
}
inline void store_pairs(uint16_t* to, const Pairs& pairs) {
    const auto store = [](uint16_t* place, F32 weights) {
        uint32_t bits[kLane];
        memcpy(bits, &weights, sizeof bits);
        for (int i = 0; i < kLane; ++i) place[i] = static_cast<uint16_t>(bits[i] >> 16);
    };
    store(to, weights_of<0>(pairs));
    store(to + kLane, weights_of<1>(pairs));
    store(to + 2 * kLane, weights_of<2>(pairs));
    store(to + 3 * kLane, weights_of<3>(pairs));
}
// Half a unit each time: the quarters of a register are those of the unit.
inline uint64_t split_unit(const uint16_t* weights, const TightTable& table, uint8_t* low, uint8_t* names) {
    const __m256i byte = _mm256_set1_epi16(0xff);
    uint64_t all_known = 0;
    for (int h = 0; h < 2; ++h) {
        const auto wide = [&](int j) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16 * j + 8 * h))); };
        const __m256i a = _mm256_or_si256(wide(0), _mm256_slli_epi32(wide(1), 16)), b = _mm256_or_si256(wide(2), _mm256_slli_epi32(wide(3), 16));
        const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        __m256i known = _mm256_setzero_si256(), name = known;
        for (int i = 0; i < 16; ++i) {
            const __m256i equal = _mm256_cmpeq_epi8(upper, _mm256_set1_epi8(static_cast<char>(table.high[i])));
            name = _mm256_or_si256(name, _mm256_and_si256(equal, _mm256_set1_epi8(static_cast<char>(i))));
            known = _mm256_or_si256(known, equal);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 32 * h), _mm256_and_si256(lower, known));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(names + 32 * h), name);
        all_known |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(known))) << (32 * h);
    }
    return ~all_known;
}

#else

constexpr bool kTightPays = false;
constexpr int kTightTogether = 1;
typedef const uint8_t* TightNames;
inline TightNames tight_table(const uint8_t* high) { return high; }
struct Pairs {
    uint16_t weights[kTightUnit];
};
template <int kUpper>
inline Pairs join_bytes(const uint8_t* low, const uint8_t* names, const TightNames& table) {
    Pairs pairs;
    for (int k = 0; k < kTightUnit; ++k) {
        const int place = tight_place(k), name = kUpper ? names[place] >> 4 : names[place] & 15;
        pairs.weights[k] = static_cast<uint16_t>(table[name] << 8 | low[place]);
    }
    return pairs;
}
template <int kVector>
inline F32 weights_of(const Pairs& pairs) {
    return load_brain(pairs.weights + kVector * kLane);
}
inline void store_pairs(uint16_t* to, const Pairs& pairs) { memcpy(to, pairs.weights, sizeof pairs.weights); }
inline uint64_t split_unit(const uint16_t* weights, const TightTable& table, uint8_t* low, uint8_t* names) {
    uint64_t unknown = 0;
    for (int k = 0; k < kTightUnit; ++k) {
        const int place = tight_place(k);
        const uint8_t name = table.name[weights[k] >> 8];
        if (name == kNoName) unknown |= uint64_t{1} << place;
        low[place] = name == kNoName ? 0 : static_cast<uint8_t>(weights[k]);
        names[place] = name == kNoName ? 0 : name;
    }
    return unknown;
}

#endif

#if !defined(__AVX512F__)
template <int kLine>
inline __attribute__((always_inline)) void ask_line(Pairs*, const uint8_t* far, const uint8_t* near) {
    __builtin_prefetch(far + kLine * kCacheLine, 0, 2);
    __builtin_prefetch(near + kLine * kCacheLine);
}
#endif

// How far ahead a single token asks through the second-level cache: whole units, so that none lies across the end of a block.
constexpr int64_t kTightFar = 11 * kTightUnitBytes, kTightNear = 3 * kTightUnitBytes;

// Memory is asked for kAhead bytes before it is read, beyond the end of these rows where the thread reads next.
struct TightFetcher {
    const uint8_t *end, *next;
    bool second = asks_second_cache();

    __attribute__((always_inline)) const uint8_t* place(const uint8_t* reading, int64_t distance) const {
        const uint8_t* ahead = reading + distance;
        return ahead >= end && next ? next + (ahead - end) : ahead;
    }

    // Always inlined: gcc drops a call that only prefetches.
    __attribute__((always_inline)) void operator()(const uint8_t* reading) const {
        const uint8_t* ahead = place(reading, kAhead);
        if (second)
#pragma GCC unroll 6
            for (int64_t i = 0; i < kTightUnitBytes; i += kCacheLine) __builtin_prefetch(ahead + i, 0, 2);
        else
#pragma GCC unroll 6
            for (int64_t i = 0; i < kTightUnitBytes; i += kCacheLine) __builtin_prefetch(ahead + i);
    }
};

template <int kVector, int kRows, int kTokens>
inline __attribute__((always_inline)) void add_vector(const Pairs* pairs, const F32* x, F32 (*total)[kTokens]) {
    F32 w[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) w[r] = weights_of<kVector>(pairs[r]);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) total[r][t] = multiply_add(w[r], x[t], total[r][t]);
}

// Where the lines lie that are asked for while a unit is read, if any are.
struct TightAsks {
    const uint8_t *far, *near;
};

// A unit of rows kFirst to kFirst + kRows; load(j, t) gives the inputs of a token that meet vector j.
template <int kFirst, int kRows, int kTokens, bool kAsks, class Load>
inline __attribute__((always_inline)) void add_rows(const uint8_t* unit, const TightNames& table, const Load& load, F32 (*total)[kTokens], const TightAsks& asks) {
    const uint8_t* names = unit + kTightRows * kTightUnit;
    Pairs pairs[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const uint8_t *low = unit + (kFirst + r) * kTightUnit, *name = names + (kFirst + r) / 2 * kTightUnit;
        pairs[r] = (kFirst + r) % 2 ? join_bytes<1>(low, name, table) : join_bytes<0>(low, name, table);
    }
    if (kAsks) {
        ask_line<kFirst>(pairs, asks.far, asks.near);
        if (kFirst % 2) ask_line<kTightRows + kFirst / 2>(pairs, asks.far, asks.near);
    }
    F32 x[kTokens];
    const auto inputs = [&](int j) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) x[t] = load(j, t);
    };
    inputs(0);
    add_vector<0, kRows, kTokens>(pairs, x, total + kFirst);
    inputs(1);
    add_vector<1, kRows, kTokens>(pairs, x, total + kFirst);
    inputs(2);
    add_vector<2, kRows, kTokens>(pairs, x, total + kFirst);
    inputs(3);
    add_vector<3, kRows, kTokens>(pairs, x, total + kFirst);
}

template <int kTokens, bool kAsks, class Load>
inline __attribute__((always_inline)) void add_unit(const uint8_t* unit, const TightNames& table, const Load& load, F32 (*total)[kTokens], const TightAsks& asks) {
    constexpr int kTogether = kAsks ? 1 : kTightTogether;
    if (kTogether == kTightRows) return add_rows<0, kTogether, kTokens, kAsks>(unit, table, load, total, asks);
    add_rows<0, 1, kTokens, kAsks>(unit, table, load, total, asks);
    add_rows<1, 1, kTokens, kAsks>(unit, table, load, total, asks);
    add_rows<2, 1, kTokens, kAsks>(unit, table, load, total, asks);
    add_rows<3, 1, kTokens, kAsks>(unit, table, load, total, asks);
}

// kAsks: memory is asked for line by line between the rows of a unit, not for a whole unit before it, and once more for the nearest cache:
// on an Intel core, where a burst of questions keeps the loads behind it waiting, one token of the 1.1 B takes 53.5 ms so, not 60.5.
template <int kTokens, bool kAsks>
inline void tight_tile(const DenseJob& job, const TightHeader& header, int64_t block, int64_t token, const TightFetcher& fetcher) {
    F32 total[kTightRows][kTokens];
    for (int r = 0; r < kTightRows; ++r)
        for (int t = 0; t < kTokens; ++t) total[r][t] = splat(0.0f);
    const float* x = job.x + token * job.x_stride;
    const int64_t stride = job.x_stride, whole = header.cols / kTightUnit, left = header.cols % kTightUnit;
    const TightNames table = tight_table(header.high);
    const uint8_t* unit = header.block(block);
    const uint32_t *starts = header.starts() + block * kTightRows, *others = header.others();
    __builtin_prefetch(others + starts[0]);
    for (int64_t u = 0; u < whole; ++u, unit += kTightUnitBytes, x += kTightUnit) {
        TightAsks asks = {};
        if (kAsks) asks = {fetcher.place(unit, kTightFar), fetcher.place(unit, kTightNear)};
        else if (token == 0) fetcher(unit);
        add_unit<kTokens, kAsks>(unit, table, [&](int j, int t) __attribute__((always_inline)) { return load(x + t * stride + j * kLane); }, total, asks);
    }
    if (left > 0)
        add_unit<kTokens, false>(unit, table, [&](int j, int t) {
            const int64_t count = left - j * kLane;
            return count >= kLane ? load(x + t * stride + j * kLane) : count > 0 ? load_first(x + t * stride + j * kLane, static_cast<int>(count)) : splat(0.0f);
        }, total, {});
    x = job.x + token * stride;
    for (int64_t r = 0; r < kTightRows && block * kTightRows + r < header.rows; ++r)
        for (int t = 0; t < kTokens; ++t) {
            const int64_t row = block * kTightRows + r;
            float sum = sum_of(total[r][t]);
            for (uint32_t i = starts[r]; i < starts[r + 1]; ++i) sum += from_bf16(static_cast<uint16_t>(others[i])) * x[t * stride + (others[i] >> 16)];
            job.y[(token + t) * job.y_stride + row] = sum + (job.bias ? job.bias[row] : 0.0f);
        }
}

inline void tight_tokens(const DenseJob& job, const TightHeader& header, int64_t block, int64_t token, int64_t end, const TightFetcher& fetcher) {
    if (fetcher.second && end - token == 1 && token == 0) return tight_tile<1, true>(job, header, block, token, fetcher);
    for (; token + kDenseTokens <= end; token += kDenseTokens) tight_tile<kDenseTokens, false>(job, header, block, token, fetcher);
    switch (end - token) {
        case 1: return tight_tile<1, false>(job, header, block, token, fetcher);
        case 2: return tight_tile<2, false>(job, header, block, token, fetcher);
        case 3: return tight_tile<3, false>(job, header, block, token, fetcher);
        default: return;
    }
}

// Rows are whole blocks, or end with the last row. Four tokens cost as many instructions as with plain rows, whose halves have to be
// widened too: so rows are not expanded first, however many tokens there are.
void tight_product(const DenseJob& job) {
    const TightHeader& header = *static_cast<const TightHeader*>(job.weight);
    const int64_t first = job.row_begin / kTightRows, last = divide_up(job.row_end, kTightRows);
    const TightFetcher fetcher = {header.block(last), job.next};
    for (int64_t begin = 0; begin < job.tokens; begin += kDenseBlock) {
        const int64_t end = begin + kDenseBlock < job.tokens ? begin + kDenseBlock : job.tokens;
        for (int64_t block = first; block < last; ++block) tight_tokens(job, header, block, begin, end, fetcher);
    }
}

// Inputs [first, first + count) of a row, both multiples of a unit but for the end of the row.
void read_tight(const void* tight, int64_t row, int64_t first, int64_t count, uint16_t* to) {
    const TightHeader& header = *static_cast<const TightHeader*>(tight);
    const TightNames table = tight_table(header.high);
    const int64_t lane = row % kTightRows;
    const uint8_t* unit = header.block(row / kTightRows) + first / kTightUnit * kTightUnitBytes;
    for (int64_t k = 0; k < count; k += kTightUnit, unit += kTightUnitBytes) {
        const uint8_t *low = unit + lane * kTightUnit, *names = unit + kTightRows * kTightUnit + lane / 2 * kTightUnit;
        const Pairs pairs = lane % 2 ? join_bytes<1>(low, names, table) : join_bytes<0>(low, names, table);
        uint16_t all[kTightUnit];
        const bool whole = k + kTightUnit <= count;
        store_pairs(whole ? to + k : all, pairs);
        if (!whole) memcpy(to + k, all, static_cast<size_t>(count - k) * sizeof(uint16_t));
    }
    const uint32_t *starts = header.starts() + row, *others = header.others();
    for (uint32_t i = starts[0]; i < starts[1]; ++i) {
        const int64_t place = static_cast<int64_t>(others[i] >> 16) - first;
        if (place >= 0 && place < count) to[place] = static_cast<uint16_t>(others[i]);
    }
}

// One row into its places of a block, which is zero before; writes what has no name as column << 16 | bf16 and returns how many.
int64_t split_row(const uint16_t* row, int64_t cols, int lane, const TightTable& table, uint8_t* block, uint32_t* others) {
    int64_t count = 0;
    for (int64_t k = 0; k < cols; k += kTightUnit, block += kTightUnitBytes) {
        const int64_t width = cols - k < kTightUnit ? cols - k : kTightUnit;
        uint16_t padded[kTightUnit];
        const uint16_t* weights = row + k;
        if (width < kTightUnit) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, weights, static_cast<size_t>(width) * sizeof(uint16_t));
            weights = padded;
        }
        uint8_t names[kTightUnit];
        const uint64_t unknown = split_unit(weights, table, block + lane * kTightUnit, names);
        uint8_t* pairs = block + kTightRows * kTightUnit + lane / 2 * kTightUnit;
        const int shift = lane % 2 * 4;
        for (int i = 0; i < kTightUnit; ++i) pairs[i] = static_cast<uint8_t>(pairs[i] | names[i] << shift);
        if (unknown)
            for (int i = 0; i < width; ++i)
                if (unknown >> tight_place(i) & 1) others[count++] = static_cast<uint32_t>(k + i) << 16 | weights[i];
    }
    return count;
}

}  // namespace
}  // namespace lowbit
