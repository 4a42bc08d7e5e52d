// Many tokens on tile registers: fold.h has the formula, tiles.h the instructions.
//
// An item is a block of tokens and up to 256 outputs. For every stretch of 1,024 inputs and every 32 outputs the weights are expanded
// to folded bytes, 32 KiB that stay in the nearest cache while all token tiles pass over them; the activations of the stretch stay in the
// second-level cache meanwhile, and are read past the nearest one, since each of their tiles is used once in a pass. Where all stretches
// fit there, 32 outputs are finished before the next ones begin, so that few sums are held. The sums of a token tile are stored as
// integers and closed in fp32 between the products of the next one, because a processor cannot look 200 instructions ahead to do that by
// itself.
//
// Two token tiles meet two weight tiles at a time. One by two needs fewer tile registers, which pays on a core that shares them with
// another hyperthread (1,990 against 1,450 GOP/s), but costs a fifth more on one that has them for itself (docs/notes/cpu.md).
#pragma once
#include "fold_lanes.h"
#include "tiles.h"

namespace lowbit {
namespace {

constexpr int kPairBlocks = 2;                     // blocks of 16 rows that meet a token tile together
constexpr int kFoldedBlocks = 16;                  // most of an item
constexpr int64_t kFoldedTokens = 512;             // of an item: the more, the less expanding weighs
constexpr int kPairTiles = 4;                      // of sums: two of tokens by two of rows
constexpr int64_t kNearBytes = 1 << 20;            // of activations that stay in a second-level cache of 2 MiB beside all else
static_assert(kTokenTile == 2 * kTileRows, "a pair of tiles");

struct FoldedRoom {
    alignas(64) uint8_t bytes[kPairBlocks][kFoldMost * kBlockRows];
    alignas(64) float scales[2][kPairBlocks][kBlockRows];  // of these weights and of those before
    alignas(64) int32_t partial[kPairTiles][kTileRows][kBlockRows];
    alignas(64) float sums[kFoldedTokens * kFoldedBlocks * kBlockRows];
};
static_assert(sizeof(FoldedRoom) <= kFoldedRoomBytes, "as fold.h says");

// Integer sums of a token tile on their way into the float sums: 64 rows of 16.
struct Closing {
    const int32_t* partial;      // [half][block][16][16]
    const float* scales;         // [block][16]
    const float* token_scales;   // [32]
    float* sums;                 // [32 tokens][block][16]
};
constexpr int kClosingRows = kPairTiles * kTileRows;

// Rows [from, from + kCount); always with a `from` that the compiler knows, or finding addresses costs more than the arithmetic.
template <int kCount, bool kFirst>
LOWBIT_INLINE void close_rows(const Closing& closing, int from) {
    const int tile = from / kTileRows, block = tile % kPairBlocks, token = tile / kPairBlocks * kTileRows + from % kTileRows;
    const Floats scales = load_floats(closing.scales + block * kBlockRows);
    LOWBIT_UNROLL_CLOSING
    for (int i = 0; i < kCount; ++i) {
        float* sum = closing.sums + ((token + i) * kPairBlocks + block) * kBlockRows;
        const Floats factor = multiply(scales, splat_floats(closing.token_scales[token + i]));
        const Floats whole = to_floats(load_bytes(closing.partial + (from + i) * kBlockRows));
        store_floats(sum, kFirst ? multiply(whole, factor) : multiply_add(whole, factor, load_floats(sum)));
    }
}

enum class Sums { kNone, kNew, kOld };  // what is closed beside a product: nothing, sums that begin, or sums to add to
constexpr int kStepsAtOnce = 4;

// The part of a closing that begins with one of its four tiles.
inline Closing closing_from(const Closing& closing, int tile) {
    const int block = tile % kPairBlocks, token = tile / kPairBlocks * kTileRows;
    return {closing.partial + tile * kTileRows * kBlockRows, closing.scales + block * kBlockRows, closing.token_scales + token,
            closing.sums + (token * kPairBlocks + block) * kBlockRows};
}

// Lines of the weights that are expanded next, of both blocks, and of outputs, asked for a few at a time between products: memory answers after hundreds
// of cycles, and a core has room for 16 questions, so that all at once would stop it.
struct Asking {
    const uint8_t* weights[kPairBlocks];
    int64_t lines, lines_at_once;
    // Of outputs that do not go past the caches, some rows after every step.
    const uint8_t* output;
    int64_t row, rows, bytes, rows_at_once;

    LOWBIT_INLINE void some() {
        for (int64_t i = 0; i < rows_at_once && rows > 0; ++i, --rows, output += row)
            for (int64_t at = 0; at < bytes; at += kVector) __builtin_prefetch(output + at, 1, 2);
        for (int64_t i = 0; i < lines_at_once && lines > 0; ++i, --lines)
            for (const uint8_t*& line : weights) {
                __builtin_prefetch(line, 0, 2);
                line += kVector;
            }
    }
};

struct FoldedItem {
    int64_t first_tile, tiles, first_block;
    int blocks;
};

inline FoldedItem folded_item_at(const ProductJob& job, int64_t index) {
    const int64_t blocks = job.activations.header->blocks, panels = divide_up(blocks, job.panel_blocks);
    const int64_t tiles = divide_up(job.activations.tokens, kTokenTile), per_item = job.token_block / kTokenTile;
    const int64_t first_tile = index / panels * per_item, first_block = index % panels * job.panel_blocks;
    const int64_t tiles_left = tiles - first_tile, blocks_left = blocks - first_block;
    return {first_tile, tiles_left < per_item ? tiles_left : per_item, first_block,
            static_cast<int>(blocks_left < job.panel_blocks ? blocks_left : job.panel_blocks)};
}

// Two blocks of rows of an item, and which of its weights they belong to.
struct FoldedPair {
    const Header* header;
    int block, blocks;  // from the first of the item on
    float* sums;        // [tiles][32][2][16]
    const float* beside;  // likewise, of the first weight where this is the second

    int64_t place_of(int64_t tile) const { return tile * kTokenTile * kPairBlocks * kBlockRows; }
};

// Two blocks of whole rows as one line of bf16.
inline void stream_brains(const ProductJob& job, int64_t token, int64_t block, Floats first, Floats second) {
    const int64_t row = block * kBlockRows;
    if (job.bias) {
        first = add(first, load_floats(job.bias + row));
        second = add(second, load_floats(job.bias + row + kBlockRows));
    }
    stream_bytes(static_cast<uint16_t*>(job.y) + token * job.y_stride + row, join_brains(first, second));
}

// Sums of a token tile that are complete, on their way out. Some of its tokens after every step: a line that goes past the caches takes
// one of the core's 16 questions to memory until it has left, and in a burst of 32 none would be left for loads.
struct Leaving {
    const FoldedPair* pair = nullptr;
    int64_t tile = 0, token = kTokenTile;

    LOWBIT_INLINE void some(const ProductJob& job, const FoldedItem& item, int64_t count) {
        if (token < kTokenTile) store(job, item, count);
    }
    void all(const ProductJob& job, const FoldedItem& item) { some(job, item, kTokenTile); }

private:
    __attribute__((noinline)) void store(const ProductJob& job, const FoldedItem& item, int64_t count) {
        const int64_t from = token, most = token + count, until = most < kTokenTile ? most : kTokenTile, numbers = kPairBlocks * kBlockRows;
        const int64_t place = pair->place_of(tile) + from * numbers;
        float* sum = pair->sums + place;
        token = until;
        if (pair->beside) job.join(job.joined_by, pair->beside + place, sum, (until - from) * numbers, sum);
        const int64_t first = (item.first_tile + tile) * kTokenTile, left = job.activations.tokens - first, block = item.first_block + pair->block;
        const bool lines = job.streams && job.y_dtype == LOWBIT_BF16 && (block + kPairBlocks) * kBlockRows <= job.rows;
        for (int64_t i = from; i < until && i < left; ++i, sum += numbers) {
            if (lines) stream_brains(job, first + i, block, load_floats(sum), load_floats(sum + kBlockRows));
            else
                for (int b = 0; b < pair->blocks; ++b) store_outputs(job, first + i, block + b, load_floats(sum + b * kBlockRows));
        }
    }
};

// What is done between the products of a stretch.
struct Beside {
    const ProductJob& job;
    const FoldedItem& item;
    Asking& asking;
    Leaving& leaving;
    int64_t leaving_at_once;

    LOWBIT_INLINE void some() {
        asking.some();
        leaving.some(job, item, leaving_at_once);
    }
};

// 32 tokens x 32 rows over kCount steps of 64 inputs, while kClosed tiles of the sums before are closed, some rows after every two
// products.
template <int kCount, int kClosed, bool kFirst>
void some_steps(const int8_t* x, const uint8_t* w, const Closing closing, Beside& beside) {
    constexpr int kRows = kClosed * kTileRows, kExact = (kRows + 2 * kCount - 1) / (2 * kCount);
    constexpr int kShare = kExact > 8 ? kTileRows : kExact > 4 ? 8 : kExact > 2 ? 4 : 2;  // divides a tile
    constexpr int kTimes = (kExact + kShare - 1) / kShare;
    constexpr int64_t kBlockStep = kFoldMost * kBlockRows;
    LOWBIT_UNROLL
    for (int step = 0; step < kCount; ++step) {
        const auto share = [&](int which) __attribute__((always_inline)) {
            LOWBIT_UNROLL
            for (int i = 0; i < kTimes; ++i) {
                const int from = ((step * 2 + which) * kTimes + i) * kShare;
                if (from < kRows) close_rows<kShare, kFirst>(closing, from);
            }
        };
        load_tile_once<4>(x + step * 2 * kTileBytes);
        load_tile<6>(w + step * kTileBytes);
        load_tile<7>(w + kBlockStep + step * kTileBytes);
        load_tile_once<5>(x + (step * 2 + 1) * kTileBytes);
        dot_bytes<0, 4, 6>();
        dot_bytes<1, 4, 7>();
        share(0);
        beside.some();
        dot_bytes<2, 5, 6>();
        dot_bytes<3, 5, 7>();
        share(1);
    }
}

template <int kClosed, bool kFirst>
void up_to_four_steps(int64_t steps, const int8_t* x, const uint8_t* w, const Closing& closing, Beside& beside) {
    switch (steps) {
        case 1: return some_steps<1, kClosed, kFirst>(x, w, closing, beside);
        case 2: return some_steps<2, kClosed, kFirst>(x, w, closing, beside);
        case 3: return some_steps<3, kClosed, kFirst>(x, w, closing, beside);
        default: return some_steps<4, kClosed, kFirst>(x, w, closing, beside);
    }
}

// A whole stretch; what is closed is spread over its steps.
template <bool kFirst>
void run_stretch(int64_t steps, const int8_t* x, const uint8_t* w, bool closes, const Closing& closing, Beside& beside, int32_t* partial) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    int left = closes ? kPairTiles : 0;
    const int at_once = steps <= kStepsAtOnce ? 4 : steps <= 3 * kStepsAtOnce ? 2 : 1;
    for (int64_t step = 0; step < steps; step += kStepsAtOnce) {
        const int64_t count = steps - step;
        const int8_t* tokens = x + step * kTokenTile * kFoldStep;
        const uint8_t* rows = w + step * kTileBytes;
        const int closed = left < at_once ? left : at_once;
        const Closing from = closing_from(closing, kPairTiles - left);
        if (closed == 0) up_to_four_steps<0, kFirst>(count, tokens, rows, from, beside);
        else if (closed == 1) up_to_four_steps<1, kFirst>(count, tokens, rows, from, beside);
        else if (closed == 2) up_to_four_steps<2, kFirst>(count, tokens, rows, from, beside);
        else up_to_four_steps<4, kFirst>(count, tokens, rows, from, beside);
        left -= closed;
    }
    store_tile<0>(partial);
    store_tile<1>(partial + kTileRows * kBlockRows);
    store_tile<2>(partial + 2 * kTileRows * kBlockRows);
    store_tile<3>(partial + 3 * kTileRows * kBlockRows);
}

// The products of one item in their order, each of which closes the sums of the one before. Outputs are written two tiles behind the last
// products: whole columns at the end, thousands of bytes apart, would fall into few sets of the caches and wait for memory one by one.
class FoldedRun {
public:
    FoldedRun(const ProductJob& job, const FoldedItem& item, FoldedRoom& room)
        : job_(job),
          item_(item),
          fold_(fold_of(*job.activations.header)),
          balance_(balance_of(job.activations)),
          room_(room),
          near_(item.tiles * kTokenTile * fold_.steps * kFoldStep <= kNearBytes),
          weights_(job.second ? 2 : 1),
          pairs_(divide_up(item.blocks, kPairBlocks)),
          passes_(fold_.count * pairs_ * weights_) {}

    void all() {
        for (int64_t index = 0; index < passes_; ++index) pass(index);
        leaving_.all(job_, item_);
        if (before_.sums == Sums::kNew) close_all<true>();
        else close_all<false>();
        finish();
        leaving_.all(job_, item_);
    }

private:
    // One stretch of all tokens with two blocks of one weight.
    struct Pass {
        int64_t stretch;
        FoldedPair pair;
    };
    // What the last product left to be done. Never copied as a whole: what was stored in parts cannot be loaded in one before all stores
    // ahead of it have left the core.
    struct Before {
        Sums sums = Sums::kNone;
        Closing closing{};
        const FoldedPair* pair = nullptr;
        int64_t tile = 0;
        bool store = false;
    };

    Pass pass_at(int64_t index) const {
        const bool other = index % weights_ != 0;
        index /= weights_;
        const int block = static_cast<int>(near_ ? index / fold_.count : index % pairs_) * kPairBlocks;
        const int64_t first = near_ ? 0 : block, left = item_.blocks - block;
        float* sums[2] = {room_.sums + first * kFoldedTokens * kBlockRows, room_.sums + (job_.panel_blocks + first) * kFoldedTokens * kBlockRows};
        const FoldedPair pair = {other ? job_.second : job_.activations.header, block, static_cast<int>(left < kPairBlocks ? left : kPairBlocks),
                                 sums[other], other ? sums[0] : nullptr};
        return {near_ ? index % fold_.count : index / pairs_, pair};
    }

    void pass(int64_t index) {
        const Pass here = pass_at(index);
        const int64_t stretch = here.stretch;
        const FoldedPair& pair = held_[index % 2] = here.pair;
        const FoldRange range = fold_range(*pair.header);
        turn_ = 1 - turn_;
        float(*scales)[kBlockRows] = room_.scales[turn_];
        for (int b = 0; b < pair.blocks; ++b)
            fold_weights(*pair.header, block_at(*pair.header, item_.first_block + pair.block + b), range, balance_, fold_, stretch, room_.bytes[b], scales[b]);
        const bool store = stretch == fold_.count - 1 && (!job_.second || pair.beside);
        const int64_t first = stretch * fold_.length, steps = fold_.steps_of(stretch);
        Asking asking{};
        if (index + 1 < passes_) ask_for_weights(pass_at(index + 1), item_.tiles * steps, &asking);
        for (int64_t tile = 0; tile < item_.tiles; ++tile) {
            const FoldedView x = view_folded(job_.activations, fold_, item_.first_tile + tile);
            if (store && !job_.streams) ask_for_outputs(pair, tile, steps, &asking);
            multiply(steps, x.bytes + first * kTokenTile, asking);
            finish();
            before_.sums = stretch == 0 ? Sums::kNew : Sums::kOld;
            before_.closing.partial = room_.partial[0][0];
            before_.closing.scales = scales[0];
            before_.closing.token_scales = x.scales + stretch * kTokenTile;
            before_.closing.sums = pair.sums + pair.place_of(tile);
            before_.pair = &pair;
            before_.tile = tile;
            before_.store = store;
        }
    }

    void multiply(int64_t steps, const int8_t* x, Asking& asking) {
        const bool closes = before_.sums != Sums::kNone;
        Beside beside{job_, item_, asking, leaving_, divide_up(kTokenTile, steps)};
        if (before_.sums == Sums::kNew) run_stretch<true>(steps, x, room_.bytes[0], closes, before_.closing, beside, room_.partial[0][0]);
        else run_stretch<false>(steps, x, room_.bytes[0], closes, before_.closing, beside, room_.partial[0][0]);
    }

    template <bool kFirst>
    void close_all() {
        LOWBIT_UNROLL
        for (int from = 0; from < kClosingRows; from += kTileRows) close_rows<kTileRows, kFirst>(before_.closing, from);
    }

    // The sums before are complete now. They leave beside the next products but one, unless these close other sums at the same place.
    void finish() {
        if (!before_.store) return;
        leaving_ = {before_.pair, before_.tile, 0};
        if (item_.tiles == 1) leaving_.all(job_, item_);
    }

    void ask_for_outputs(const FoldedPair& pair, int64_t tile, int64_t steps, Asking* asking) const {
        const int64_t token = (item_.first_tile + tile) * kTokenTile, left = job_.activations.tokens - token, number = dtype_bytes(job_.y_dtype);
        asking->row = job_.y_stride * number;
        asking->output = static_cast<const uint8_t*>(job_.y) + token * asking->row + (item_.first_block + pair.block) * kBlockRows * number;
        asking->rows = left < kTokenTile ? left : kTokenTile;
        asking->bytes = pair.blocks * kBlockRows * number;
        asking->rows_at_once = divide_up(kTokenTile, steps);
    }

    // The weights that are expanded after these, within so many steps.
    void ask_for_weights(const Pass& next, int64_t steps, Asking* asking) const {
        const Header& header = *next.pair.header;
        const Stretched codes = codes_of(header, fold_, next.stretch);
        asking->lines = codes.lines;
        asking->lines_at_once = divide_up(codes.lines, steps);
        for (int b = 0; b < kPairBlocks; ++b) {
            const uint8_t* from = block_at(header, item_.first_block + next.pair.block + (b < next.pair.blocks ? b : 0));
            asking->weights[b] = from + codes.codes;
            fetch_scales(header, from, fold_, next.stretch);
        }
    }

    const ProductJob& job_;
    const FoldedItem& item_;
    const Fold fold_;
    const Balance balance_;
    FoldedRoom& room_;
    const bool near_;  // the activations of all stretches stay in the second-level cache
    const int64_t weights_, pairs_, passes_;
    FoldedPair held_[2];  // of this pass and of the one before
    Before before_;
    Leaving leaving_;
    int turn_ = 0;
};

void folded_items(const ProductJob& job, int64_t begin, int64_t end) {
    FoldedRoom& room = *reinterpret_cast<FoldedRoom*>(folded_room());
    const TileSession session;
    for (int64_t index = begin; index < end; ++index) {
        const FoldedItem item = folded_item_at(job, index);
        FoldedRun(job, item, room).all();
    }
    if (job.streams) settle_streams();
}

constexpr FoldedProducts kFoldedProducts = {kTokenTile, kFoldedBlocks, kFoldedTokens, balance_folded, quantize_folded, folded_items};

}  // namespace
}  // namespace lowbit
