// One product y = x W^T over a prepared weight: what product.cpp plans and product_lanes.h computes, once per instruction set.
#pragma once
#include "layout.h"

namespace lowbit {

// How the integer product treats zero points:  sum((u - z) x) = sum(u x) - z sum(x), the second part starting the sum.
struct ZeroPlan {
    bool wide;       // weights exceed 127 as unsigned bytes
    bool per_row;    // z is read beside the scales; else it is `constant`
    int32_t constant;
};

// Activations of one call, laid out in tiles of `tile` tokens:
//   integer   bytes [positions / 4][tile][4] | scales [segments][tile] | -constant * sum [segments][tile] |
//             scale * sum [segments][tile] where the weight has minima
//   float     fp32 [positions][tile]
struct Activations {
    const Header* header;  // NULL: of rows that are not prepared, whose columns lie in order
    const void* x;
    int dtype;
    int64_t tokens, stride;
    int tile;
    int32_t zero_constant;
    int rounding;  // float: the element type that activations and weights are rounded to before they meet
    uint8_t* data;
    int64_t tile_bytes;
    int64_t cols;  // without a header
};

// Rows of bf16 that are not prepared: [rows][cols], or what `read` gives of one of them.
struct PlainRows {
    int64_t rows, cols;
    const uint16_t* data;
    void (*read)(const void* from, int64_t row, int64_t first, int64_t count, uint16_t* to);
    const void* from;
};

// How far ahead of the numbers being read memory is asked for more, but for codes through the nearest cache (decode_lanes.h). int4 g64 on
// one Zen 5 core: 12 GB/s without, 20 at 2 KiB, 26 at 4 KiB and at 8 KiB.
constexpr int kAhead = 4096;

// Whether what was asked for waits in the second-level cache: on Intel's processors, where 16 questions at most go out from the nearest
// one, against 48 from the second (one Granite Rapids core, 16 GB/s: int4 11 through the nearest, 15 through the second; bf16 held
// tight 24 and 27 on two). Zen was measured with the nearest.
bool asks_second_cache();

struct ProductJob {
    Activations activations;
    PlainRows plain;      // where activations have no header
    int64_t rows;         // of the weight
    ZeroPlan zeros;
    const float* bias;
    void* y;
    int y_dtype;
    int64_t y_stride;
    int64_t token_block;  // tokens of a panel item
    int panel_blocks;     // blocks of 16 rows of a panel item
    // Folded products of a second weight of the same shape with the same activations: y = join(joined_by, first, second), element by element.
    const Header* second = nullptr;
    void (*join)(const void* by, const float* first, const float* second, int64_t count, float* y) = nullptr;
    const void* joined_by = nullptr;
    bool later = false;    // outputs are read in another stage, after a barrier: the engine's
    bool streams = false;  // outputs are whole lines and go past the caches: Form::run finds out
    const uint8_t* next = nullptr;  // decoding: what the thread reads after this range; NULL: what lies behind it
};

}  // namespace lowbit
