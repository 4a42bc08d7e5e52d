#include "product_plan.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace lowbit {
namespace {

constexpr int kWidestTile = 8;
constexpr int64_t kActivationBytes = 544 << 10;  // of one token block: about half of a 1 MiB second-level cache
constexpr int64_t kLeastTokenBlock = 48;
constexpr int64_t kMostTokenBlock = 258;  // as panel_lanes.h: 256 or 512 tokens in one or two, whatever the tile

int64_t padded_bytes(int64_t bytes) { return divide_up(bytes, kVector) * kVector; }

int tile_of(int64_t tokens, bool integer, bool few) {
    for (int tile : {1, 2, 4})
        if (tokens <= tile && (few || !integer)) return tile;
    return few ? kWidestTile : isa().panel_tokens;
}

ZeroPlan plan_zeros(const Header& header, bool panel) {
    const bool rows = has_whole_zeros(header), fold = rows && panel && header.bits < 8;
    ZeroPlan plan{};
    plan.wide = header.table || header.bits == 8 || fold;
    plan.per_row = rows && !fold;
    plan.constant = header.table || fold ? 128 : header.zero;
    if (plan.wide) plan.constant -= isa().wide_bias;
    if (plan.per_row) plan.constant = 1;
    return plan;
}

int64_t tile_bytes(const Header& header, int tile, bool integer) {
    const Plan& plan = header.plan;
    if (!integer) return padded_bytes(plan.positions() * tile * 4);
    const int arrays = header.scales.minima ? 3 : 2;  // scales, sums, scaled sums
    return padded_bytes(plan.positions() * tile) + arrays * padded_bytes(plan.segments * tile * 4);
}

// As many as keep the activations in the second-level cache.
int64_t token_block_for(const Header& header, int tile, int64_t bytes_per_number) {
    const int64_t fitting = kActivationBytes / (header.plan.positions() * bytes_per_number);
    return std::max<int64_t>(std::clamp<int64_t>(fitting, kLeastTokenBlock, kMostTokenBlock) / tile, 1) * tile;
}

// The more rows an item has, the seldomer its activations come from beyond the second-level cache; narrow weights get items of fewer
// rows and then of fewer tokens, so that there is something to share out.
constexpr int64_t kItemsPerThread = 4;
constexpr int kLeastFoldedPanel = 4;
constexpr int64_t kLeastFoldedBlock = 128;
constexpr int kLeastBrainPanel = 2;

void fold_form(const Header& header, const FoldedProducts& folded, Form* form) {
    Activations& x = form->activations;
    form->panel_blocks = folded.panel_blocks;
    x.tile = folded.token_tile;
    x.tile_bytes = folded_tile_bytes(header, folded.token_tile);
    x.zero_constant = 0;
    form->token_block = folded.token_block;
    while (form->panel_blocks > kLeastFoldedPanel && form->items(header) < kItemsPerThread * thread_count()) form->panel_blocks /= 2;
    while (form->token_block > kLeastFoldedBlock && form->items(header) < kItemsPerThread * thread_count()) form->token_block /= 2;
}

}  // namespace

uint8_t* folded_room() {
    alignas(64) static thread_local uint8_t room[std::max(kFoldedRoomBytes, kBrainRoomBytes)];
    return room;
}

bool rounds_to_int8(const Header& header, int compute) {
    return (compute == LOWBIT_COMPUTE_INT8 || compute == LOWBIT_COMPUTE_INT8_GROUPS) && header.kind != LOWBIT_DENSE;
}

bool rounds_to_brains(bool brains, int64_t tokens, int compute) {
    const BrainProducts* products = isa().brains;
    if (!products || tokens <= kFewTokens) return false;
    return compute == LOWBIT_COMPUTE_BF16 || (brains && compute == LOWBIT_COMPUTE_INT8 && products->by_default);
}

Form plan_brains(int64_t rows, int64_t cols, int64_t tokens) {
    const BrainProducts& products = *isa().brains;
    Form form{};
    form.brains = true;
    form.panel_blocks = products.panel_blocks;
    form.token_block = products.token_block;
    Activations& x = form.activations;
    x.cols = cols;
    x.tokens = tokens;
    x.tile = kBrainTokens;
    x.tile_bytes = brain_steps(x) * 2 * kBrainTile;
    while (form.panel_blocks > kLeastBrainPanel && form.items(rows) < kItemsPerThread * thread_count()) form.panel_blocks /= 2;
    return form;
}

namespace {

Form plan_prepared_brains(const Header& header, int64_t tokens) {
    Form form = plan_brains(header.rows, header.plan.positions(), tokens);
    form.activations.header = &header;
    return form;
}

}  // namespace

Form plan_form(const Header& header, int64_t tokens, int compute) {
    if (rounds_to_brains(holds_brains(header), tokens, compute)) return plan_prepared_brains(header, tokens);
    Form form{};
    form.integer = rounds_to_int8(header, compute);
    form.few = form.integer && tokens <= kFewTokens;
    form.folded = form.integer && !form.few && compute == LOWBIT_COMPUTE_INT8 && isa().folded;
    form.panel_blocks = isa().panel_blocks;
    Activations& x = form.activations;
    x.header = &header;
    x.tokens = tokens;
    x.rounding = compute == LOWBIT_COMPUTE_BF16 ? LOWBIT_BF16 : compute == LOWBIT_COMPUTE_FP16 ? LOWBIT_FP16 : LOWBIT_FP32;
    if (form.folded) {
        fold_form(header, *isa().folded, &form);
        return form;
    }
    x.tile = tile_of(tokens, form.integer, form.few);
    x.zero_constant = plan_zeros(header, !form.few).constant;
    x.tile_bytes = tile_bytes(header, x.tile, form.integer);
    form.token_block = token_block_for(header, x.tile, form.integer ? 1 : 4);
    return form;
}

bool same_form(const Form& a, const Form& b) {
    if (a.brains || b.brains) {
        const Activations &x = a.activations, &y = b.activations;
        return a.brains == b.brains && !x.header == !y.header && x.cols == y.cols &&
               (!x.header || (x.header->cols == y.header->cols && !memcmp(&x.header->plan, &y.header->plan, sizeof(Plan))));
    }
    const Header &x = *a.activations.header, &y = *b.activations.header;
    return a.integer == b.integer && a.folded == b.folded && a.activations.zero_constant == b.activations.zero_constant &&
           !memcmp(&x.plan, &y.plan, sizeof x.plan) && (!a.folded || fold_of(x).length == fold_of(y).length) && x.cols == y.cols && !x.scales.minima == !y.scales.minima &&
           (!a.integer || x.unit * x.byte_factor == y.unit * y.byte_factor);
}

int64_t Form::tiles() const { return divide_up(activations.tokens, activations.tile); }

int64_t Form::bytes() const { return tiles() * activations.tile_bytes + (folded ? balance_bytes(*activations.header) : 0); }

int64_t Form::stretches() const { return folded ? fold_of(*activations.header).count : 0; }

void Form::balance(int64_t stretch) const { isa().folded->balance(activations, stretch); }

void Form::make_ready(int64_t tile) const {
    const Isa& set = isa();
    (brains ? set.brains->round_tile : folded ? set.folded->quantize_tile : integer ? set.quantize_tile : set.widen_tile)(activations, tile);
}

int64_t Form::items(const Header& header, int joined) const {
    if (few) return header.blocks;
    return divide_up(activations.tokens, token_block) * divide_up(header.blocks, panel_blocks / joined);
}

int64_t Form::items(int64_t rows) const {
    return divide_up(activations.tokens, token_block) * divide_up(divide_up(rows, kBlockRows), panel_blocks);
}

namespace {

// Outputs that a second-level cache of 2 MiB does not hold are fetched from far to be written over, and later stores wait for that; tiles
// are so fast that they wait for nearer ones too. A prompt of 512 (1.1 B) took 5% longer without tiles on Intel and 9% longer with them (in
// bf16 either way), 4% longer on Zen. A product that is called by itself into what its caller reads at once loses.
constexpr int64_t kFarBytes = 2 << 20;

bool writes_past_caches(const ProductJob& job, bool folded) {
    const int64_t row = job.y_stride * dtype_bytes(job.y_dtype);
    const bool far = (folded && job.y_dtype == LOWBIT_BF16) || job.activations.tokens * row >= kFarBytes;
    return far && job.later && job.y_dtype != LOWBIT_FP16 && row % kVector == 0 && reinterpret_cast<uintptr_t>(job.y) % kVector == 0;
}

}  // namespace

void Form::run(const ProductJob& given, int64_t begin, int64_t end) const {
    const Isa& set = isa();
    if (few) return set.decode_rows(given, begin, end);
    ProductJob job = given;
    job.streams = writes_past_caches(job, folded);
    (brains ? set.brains->panel_items : folded ? set.folded->panel_items : integer ? set.panel_items : set.float_items)(job, begin, end);
}

ProductJob Form::job(const Header& header, int joined) const {
    ProductJob job{};
    job.activations = activations;
    job.activations.header = &header;
    job.rows = header.rows;
    job.zeros = plan_zeros(header, !few);
    job.token_block = token_block;
    job.panel_blocks = panel_blocks / joined;
    return job;
}

ProductJob Form::job(const PlainRows& plain) const {
    ProductJob job{};
    job.activations = activations;
    job.plain = plain;
    job.rows = plain.rows;
    job.token_block = token_block;
    job.panel_blocks = panel_blocks;
    return job;
}

}  // namespace lowbit
