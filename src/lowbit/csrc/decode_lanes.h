// Few tokens: the weights stream past once, straight from the bit planes, and every unpacked vector meets all tokens of a tile.
//
//   y[t][r] = sum over segments  scale[r] * sx[t] * (sum(u x) - z sum(x)) + minimum[r] * sx[t] * sum(x)
//
// The integer sums start at -z sum(x) instead of 0, so that zero points cost nothing inside; one conversion and one fused product
// close a segment. Bound by memory: about 30 instructions go with the 40 cycles in which DRAM delivers 256 bytes to a core.
#pragma once
#include <utility>

#include "activation_lanes.h"
#include "unpack_lanes.h"

namespace lowbit {
namespace {

// Narrow codes through the nearest cache, on one Zen 5 with 82 GB/s: the 1.1 B in int4 takes 5 to 7% less time with 6 KiB than with 4 and as
// much with 8; codes of 8 bits, which pass twice as fast, 1 to 3% more.
constexpr int64_t kNarrowAhead = 6144;

// Asks for what will be read some KiB from now. Beyond the end of a range that is the range which the thread reads next: without
// this, the first bytes of every range come at the speed of a cold start, and the ranges of small models have 20 KiB.
struct Fetcher {
    const uint8_t* end;
    int64_t jump;
    bool second = asks_second_cache();
    int64_t reach;

    Fetcher(const Header& header, const ProductJob& job, int64_t end_block)
        : end(block_at(header, end_block)), jump(job.next ? job.next - end : 0), reach(second || header.bits > 6 ? kAhead : kNarrowAhead) {}

    LOWBIT_INLINE const uint8_t* place(const uint8_t* reading, int64_t distance) const {
        const uint8_t* ahead = reading + distance;
        return ahead + (ahead >= end ? jump : 0);
    }

    template <int kVectors>
    LOWBIT_INLINE void operator()(const uint8_t* reading) const {
        const uint8_t* ahead = place(reading, reach);
        if (second)
            LOWBIT_UNROLL
            for (int v = 0; v < kVectors; ++v) fetch_second(ahead + v * kVector);
        else
            LOWBIT_UNROLL
            for (int v = 0; v < kVectors; ++v) fetch(ahead + v * kVector);
    }
};

// One token on an Intel core: a burst of questions fills the places of the nearest cache, and the loads behind it wait for one. So lines are
// asked for one by one, far ahead into the second-level cache and once more for the nearest (docs/notes/cpu_engine.md, "Questions spread").
constexpr int64_t kFarAhead = 6144, kNearAhead = 2048;

#if defined(__AVX512F__)
constexpr bool kMaySpread = true;
// A line asked for into the second-level cache and one into the nearest, at this place among the products: gcc would put prefetches together.
LOWBIT_INLINE void ask_line(Ints& sum, const uint8_t* far, const uint8_t* near) {
    asm volatile("prefetcht1 (%1)\n\tprefetcht0 (%2)" : "+v"(sum) : "r"(far), "r"(near));
}
#else
constexpr bool kMaySpread = false;
LOWBIT_INLINE void ask_line(Ints&, const uint8_t*, const uint8_t*) {}
#endif

// The lines of a block in their order, scales and codes, asked for one at a time while its units are read.
class Asker {
public:
    Asker(const Fetcher& fetcher, const Header& header, const uint8_t* block, int64_t units)
        : fetcher_(fetcher), at_(block), units_(units), more_(divide_up(header.codes_offset, kVector)) {}

    LOWBIT_INLINE void begin_unit() {
        far_ = fetcher_.place(at_, kFarAhead);
        near_ = fetcher_.place(at_, kNearAhead);
    }
    template <int kLine>
    LOWBIT_INLINE void ask(Ints& sum) const {
        ask_line(sum, far_ + kLine * kVector, near_ + kLine * kVector);
    }
    // Those of the scales are shared out among the units.
    template <int kLines>
    LOWBIT_INLINE void end_unit(Ints& sum) {
        at_ += kLines * kVector;
        for (owed_ += more_; owed_ >= units_; owed_ -= units_, at_ += kVector) ask_line(sum, fetcher_.place(at_, kFarAhead), fetcher_.place(at_, kNearAhead));
    }

private:
    const Fetcher& fetcher_;
    const uint8_t *at_, *far_ = nullptr, *near_ = nullptr;
    int64_t units_, more_, owed_ = 0;
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

// A unit of one token, and its lines asked for among the products.
template <bool kWide, int... kLine>
LOWBIT_INLINE void dot_asking(const Bytes* steps, const int32_t* x, Ints* partial, const Asker& asker, std::integer_sequence<int, kLine...>) {
    constexpr int kLines = sizeof...(kLine);
    const auto some = [&](auto line) __attribute__((always_inline)) {
        constexpr int kFrom = line * kSteps / kLines, kTo = (line + 1) * kSteps / kLines;
        LOWBIT_UNROLL
        for (int s = kFrom; s < kTo; ++s) partial[s % kChains<1>] = dot<kWide>(partial[s % kChains<1>], steps[s], splat_ints(x[s]));
        asker.template ask<line>(partial[0]);
    };
    (some(std::integral_constant<int, kLine>()), ...);
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
template <int kBits, bool kTable, int kTokens, bool kPlain, bool kSpread>
LOWBIT_INLINE void decode_units(const Header& header, GroupReader<kPlain>& reader, const TileView& x, const Table& table, const Fetcher& fetcher,
                                Floats* total) {
    constexpr bool kWide = kTable || kBits == 8;
    const Plan& plan = header.plan;
    const uint8_t* planes = reader.block + header.codes_offset;
    const int32_t* inputs = x.bytes;
    const int64_t units = plan.segment / kUnit, segments = plan.segments;
    Asker asker(fetcher, header, reader.block, units * segments);
    for (int64_t s = 0; s < segments; ++s) {
        Ints partial[kTokens * kChains<kTokens>];
        reader.step();
        begin_segment<kTokens>(reader, x.sums + s * kTokens, partial);
        begin_chains<kTokens>(partial);
        for (int64_t u = 0; u < units; ++u) {
            if (kSpread) asker.begin_unit();
            else fetcher.template operator()<kBits>(planes);
            Bytes steps[kSteps];
            unpack_unit<kBits, kTable>(planes, table, steps);
            if constexpr (kSpread) {
                dot_asking<kWide>(steps, inputs, partial, asker, std::make_integer_sequence<int, kBits>());
                asker.template end_unit<kBits>(partial[0]);
            } else {
                dot_steps<kTokens, kWide, kSteps>(steps, inputs, partial);
            }
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
    const bool spread = kMaySpread && kTokens == 1 && fetcher.second && header.plan.segment >= kUnit;
    if (!spread)
        for (int64_t i = 0; i < header.codes_offset; i += kVector) fetcher.template operator()<1>(block + i);
    if (header.plan.segment < kUnit) decode_halves<kBits, kTable, kTokens>(header, reader, x, table, fetcher, sums);
    else if (spread) decode_units<kBits, kTable, kTokens, kPlain, kMaySpread && kTokens == 1>(header, reader, x, table, fetcher, sums);
    else decode_units<kBits, kTable, kTokens, kPlain, false>(header, reader, x, table, fetcher, sums);
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
