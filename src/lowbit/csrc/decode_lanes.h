// Few tokens: the weights stream past once, straight from the bit planes, and every unpacked vector meets all tokens of a tile.
//
//   y[t][r] = sum over segments  scale[r] * sx[t] * (sum(u x) - z sum(x)) + minimum[r] * sx[t] * sum(x)
//
// The integer sums start at -z sum(x) instead of 0, so that zero points cost nothing inside; one conversion and one fused product
// close a segment. Bound by memory: about 30 instructions go with the 40 cycles in which DRAM delivers 256 bytes to a core.
#pragma once
#include "activation_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

// Asks for what will be read kAhead bytes from now. Beyond the end of a range that is the range which the thread reads next: without
// this, the first bytes of every range come at the speed of a cold start, and the ranges of small models have 20 KiB.
struct Fetcher {
    const uint8_t* end;
    int64_t jump;
    bool second = asks_second_cache();

    Fetcher(const Header& header, const ProductJob& job, int64_t end_block) : end(block_at(header, end_block)), jump(job.next ? job.next - end : 0) {}

    template <int kVectors>
    LOWBIT_INLINE void operator()(const uint8_t* reading) const {
        const uint8_t* ahead = reading + kAhead;
        ahead += ahead >= end ? jump : 0;
        if (second)
            LOWBIT_UNROLL
            for (int v = 0; v < kVectors; ++v) fetch_second(ahead + v * kVector);
        else
            LOWBIT_UNROLL
            for (int v = 0; v < kVectors; ++v) fetch(ahead + v * kVector);
    }
};

// The scales and zero points of the group that a segment belongs to.
template <bool kPlain>
struct GroupReader {
    const Header& header;
    const uint8_t* block;
    ScaleReader<kPlain> scales;
    bool row_zeros;
    int32_t zero_bias;
    int64_t group = 0, left = 0;
    Ints zeros = splat_ints(0);

    LOWBIT_INLINE void step() {
        if (left == 0) {
            scales.read(group);
            if (row_zeros)
                zeros = subtract_ints(widen_bytes(block + header.zeros_offset + group * kBlockRows), splat_ints(zero_bias));
            ++group;
            left = header.plan.split;
        }
        --left;
    }
};

template <int kTokens, bool kPlain>
LOWBIT_INLINE void begin_segment(const GroupReader<kPlain>& reader, const int32_t* sums, Ints* partial) {
    LOWBIT_UNROLL
    for (int t = 0; t < kTokens; ++t) {
        partial[t] = splat_ints(sums[t]);
        if (reader.row_zeros) partial[t] = multiply_ints(partial[t], reader.zeros);
    }
}

// `place`: of the segment in the tile's arrays.
template <int kBits, bool kTable, int kTokens, bool kPlain>
LOWBIT_INLINE void end_segment(const GroupReader<kPlain>& reader, const TileView& x, int64_t place, const Ints* partial, Floats* total) {
    LOWBIT_UNROLL
    for (int t = 0; t < kTokens; ++t)
        total[t] = multiply_add(to_floats(partial[t]), multiply(reader.scales.scales, splat_floats(x.scales[place + t])), total[t]);
    if (kPlain || !kMayHaveMinima<kBits, kTable> || !x.scaled_sums) return;
    LOWBIT_UNROLL
    for (int t = 0; t < kTokens; ++t) total[t] = multiply_add(reader.scales.minima, splat_floats(x.scaled_sums[place + t]), total[t]);
}

// With one or two tokens every second step has sums of its own: one chain of dot products would wait for itself.
template <int kTokens>
constexpr int kChains = kTokens <= 2 ? 2 : 1;

template <int kTokens, bool kWide, int kCount>
LOWBIT_INLINE void dot_steps(const Bytes* steps, const int32_t* x, Ints* partial) {
    LOWBIT_UNROLL
    for (int s = 0; s < kCount; ++s)
        LOWBIT_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            Ints& sum = partial[s % kChains<kTokens> * kTokens + t];
            sum = dot<kWide>(sum, steps[s], splat_ints(x[s * kTokens + t]));
        }
}

template <int kTokens>
LOWBIT_INLINE void begin_chains(Ints* partial) {
    LOWBIT_UNROLL
    for (int i = kTokens; i < kTokens * kChains<kTokens>; ++i) partial[i] = splat_ints(0);
}

template <int kTokens>
LOWBIT_INLINE void join_chains(Ints* partial) {
    LOWBIT_UNROLL
    for (int i = kTokens; i < kTokens * kChains<kTokens>; ++i) partial[i - kTokens] = add_ints(partial[i - kTokens], partial[i]);
}

// Segments of whole units.
template <int kBits, bool kTable, int kTokens, bool kPlain>
LOWBIT_INLINE void decode_units(const Header& header, GroupReader<kPlain>& reader, const TileView& x, const Table& table, const Fetcher& fetcher,
                                Floats* total) {
    constexpr bool kWide = kTable || kBits == 8;
    const Plan& plan = header.plan;
    const uint8_t* planes = reader.block + header.codes_offset;
    const int32_t* inputs = x.bytes;
    const int64_t units = plan.segment / kUnit, segments = plan.segments;
    for (int64_t s = 0; s < segments; ++s) {
        Ints partial[kTokens * kChains<kTokens>];
        reader.step();
        begin_segment<kTokens>(reader, x.sums + s * kTokens, partial);
        begin_chains<kTokens>(partial);
        for (int64_t u = 0; u < units; ++u) {
            fetcher.template operator()<kBits>(planes);
            Bytes steps[kSteps];
            unpack_unit<kBits, kTable>(planes, table, steps);
            dot_steps<kTokens, kWide, kSteps>(steps, inputs, partial);
            planes += kBits * kVector;
            inputs += kSteps * kTokens;
        }
        join_chains<kTokens>(partial);
        end_segment<kBits, kTable, kTokens>(reader, x, s * kTokens, partial, total);
    }
}

// Segments of half a unit (groups of 16): two of them close within each unit.
template <int kBits, bool kTable, int kTokens, bool kPlain>
LOWBIT_INLINE void decode_halves(const Header& header, GroupReader<kPlain>& reader, const TileView& x, const Table& table, const Fetcher& fetcher,
                                 Floats* total) {
    constexpr bool kWide = kTable || kBits == 8;
    constexpr int kHalf = kSteps / 2;
    const uint8_t* planes = reader.block + header.codes_offset;
    const int64_t segments = header.plan.segments;
    for (int64_t s = 0; s < segments; s += 2, planes += kBits * kVector) {
        fetcher.template operator()<kBits>(planes);
        Bytes steps[kSteps];
        unpack_unit<kBits, kTable>(planes, table, steps);
        LOWBIT_UNROLL
        for (int half = 0; half < 2; ++half) {
            if (s + half == segments) break;
            Ints partial[kTokens * kChains<kTokens>];
            reader.step();
            begin_segment<kTokens>(reader, x.sums + (s + half) * kTokens, partial);
            begin_chains<kTokens>(partial);
            dot_steps<kTokens, kWide, kHalf>(steps + half * kHalf, x.bytes + (s + half) * kHalf * kTokens, partial);
            join_chains<kTokens>(partial);
            end_segment<kBits, kTable, kTokens>(reader, x, (s + half) * kTokens, partial, total);
        }
    }
}

template <int kBits, bool kTable, int kTokens, bool kPlain>
void decode_block(const Header& header, const uint8_t* block, const TileView& x, const ZeroPlan& zeros, const Fetcher& fetcher, Floats* total) {
    GroupReader<kPlain> reader{header, block, ScaleReader<kPlain>(header, block), zeros.per_row, kTable || kBits == 8 ? kWideBias : 0};
    const Table table = load_table(header.bytes);
    Floats sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = splat_floats(0.0f);
    for (int64_t i = 0; i < header.codes_offset; i += kVector) fetcher.template operator()<1>(block + i);
    if (header.plan.segment < kUnit) decode_halves<kBits, kTable, kTokens>(header, reader, x, table, fetcher, sums);
    else decode_units<kBits, kTable, kTokens>(header, reader, x, table, fetcher, sums);
    for (int t = 0; t < kTokens; ++t) total[t] = sums[t];
}

// Blocks [begin, end) for all tokens, tile by tile. A block of a few thousand inputs stays in the nearest cache between tiles.
template <int kBits, bool kTable, int kTokens>
void decode_blocks(const ProductJob& job, int64_t begin, int64_t end) {
    const Header& header = *job.activations.header;
    const int64_t tiles = divide_up(job.activations.tokens, kTokens);
    const Fetcher fetcher(header, job, end);
    for (int64_t block = begin; block < end; ++block)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            Floats total[kTokens];
            const TileView x = view_tile(job.activations, tile);
            if (is_plain(header)) decode_block<kBits, kTable, kTokens, true>(header, block_at(header, block), x, job.zeros, fetcher, total);
            else decode_block<kBits, kTable, kTokens, false>(header, block_at(header, block), x, job.zeros, fetcher, total);
            for (int t = 0; t < kTokens; ++t)
                if (tile * kTokens + t < job.activations.tokens) store_outputs(job, tile * kTokens + t, block, total[t]);
        }
}

template <int kBits, bool kTable>
void decode_tokens(const ProductJob& job, int64_t begin, int64_t end) {
    switch (job.activations.tile) {
        case 1: return decode_blocks<kBits, kTable, 1>(job, begin, end);
        case 2: return decode_blocks<kBits, kTable, 2>(job, begin, end);
        case 4: return decode_blocks<kBits, kTable, 4>(job, begin, end);
        default: return decode_blocks<kBits, kTable, 8>(job, begin, end);
    }
}

void decode_rows(const ProductJob& job, int64_t begin, int64_t end) {
    const Header& header = *job.activations.header;
    switch (header.bits + (header.table ? 16 : 0)) {
        case 2: return decode_tokens<2, false>(job, begin, end);
        case 3: return decode_tokens<3, false>(job, begin, end);
        case 4: return decode_tokens<4, false>(job, begin, end);
        case 5: return decode_tokens<5, false>(job, begin, end);
        case 6: return decode_tokens<6, false>(job, begin, end);
        case 7: return decode_tokens<7, false>(job, begin, end);
        case 8: return decode_tokens<8, false>(job, begin, end);
        case 16 + 3: return decode_tokens<3, true>(job, begin, end);
        case 16 + 4: return decode_tokens<4, true>(job, begin, end);
        case 16 + 6: return decode_tokens<6, true>(job, begin, end);
        default: return decode_tokens<8, true>(job, begin, end);
    }
}

}  // namespace
}  // namespace lowbit
