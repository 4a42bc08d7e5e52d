// The tile registers of AMX, eight matrices of 16 rows x 64 bytes, and the products between them:
//
//   dot_bytes            C[m][n] += sum over k < 64 of A[m][k] B[k][n], signed bytes into int32; B lies as [k / 4][n][k % 4]
//   dot_signed_unsigned  the same with unsigned bytes in B
//   dot_unsigned_signed  the same with unsigned bytes in A
//   dot_brains           the same with bf16 into fp32, k < 32; B lies as [k / 2][n][k % 2]
//
// This is the only file that knows tile instructions. With LOWBIT_TILES_EMULATED the registers are plain arrays, so that everything
// above runs on processors without AMX. Instructions are written out, with memory named as read and written: what gcc 12 offers
// instead says nothing about memory, so that a store before a tile load, and the tile configuration itself, could be dropped.
#pragma once
#include <cstdint>
#include <cstring>

#include "number.h"

namespace lowbit {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileRow = 64;                      // bytes
constexpr int64_t kTileBytes = kTileRows * kTileRow;

#if defined(LOWBIT_TILES_EMULATED)

struct TileFile {
    alignas(64) uint8_t tiles[8][kTileRows][kTileRow];
};
inline TileFile& tile_file() {
    static thread_local TileFile file;
    return file;
}

// While it lives, this thread may use tiles; what they hold at first is unknown.
class TileSession {
public:
    TileSession() { memset(&tile_file(), 0xa5, sizeof(TileFile)); }
    ~TileSession() {}
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
inline void zero_tile() {
    memset(tile_file().tiles[kTile], 0, kTileBytes);
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride = kTileRow) {
    for (int row = 0; row < kTileRows; ++row) memcpy(tile_file().tiles[kTile][row], static_cast<const uint8_t*>(from) + row * stride, kTileRow);
}
template <int kTile>
inline void load_tile_once(const void* from) {
    load_tile<kTile>(from);
}
template <int kTile>
inline void store_tile(void* to, int64_t stride = kTileRow) {
    for (int row = 0; row < kTileRows; ++row) memcpy(static_cast<uint8_t*>(to) + row * stride, tile_file().tiles[kTile][row], kTileRow);
}
template <class Left, class Right, int kSum, int kLeft, int kRight>
inline void dot_tiles() {
    TileFile& file = tile_file();
    for (int m = 0; m < kTileRows; ++m) {
        int32_t sums[16];
        memcpy(sums, file.tiles[kSum][m], sizeof sums);
        for (int k = 0; k < kTileRow; ++k) {
            const int32_t left = static_cast<Left>(file.tiles[kLeft][m][k]);
            for (int n = 0; n < 16; ++n) sums[n] += left * static_cast<Right>(file.tiles[kRight][k / 4][4 * n + k % 4]);
        }
        memcpy(file.tiles[kSum][m], sums, sizeof sums);
    }
}
template <int kSum, int kLeft, int kRight>
inline void dot_bytes() {
    dot_tiles<int8_t, int8_t, kSum, kLeft, kRight>();
}
template <int kSum, int kLeft, int kRight>
inline void dot_signed_unsigned() {
    dot_tiles<int8_t, uint8_t, kSum, kLeft, kRight>();
}
template <int kSum, int kLeft, int kRight>
inline void dot_unsigned_signed() {
    dot_tiles<uint8_t, int8_t, kSum, kLeft, kRight>();
}
template <int kSum, int kLeft, int kRight>
inline void dot_brains() {
    TileFile& file = tile_file();
    for (int m = 0; m < kTileRows; ++m) {
        float sums[16];
        uint16_t left[32], right[32];
        memcpy(sums, file.tiles[kSum][m], sizeof sums);
        memcpy(left, file.tiles[kLeft][m], sizeof left);
        for (int k = 0; k < 32; ++k) {
            memcpy(right, file.tiles[kRight][k / 2], sizeof right);
            for (int n = 0; n < 16; ++n) sums[n] += from_bf16(left[k]) * from_bf16(right[2 * n + k % 2]);
        }
        memcpy(file.tiles[kSum][m], sums, sizeof sums);
    }
}

#else

// Of all eight tiles the full size. Static, since the instruction reads all 64 bytes of it from memory.
struct TileShape {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShape) == 64, "as the instruction reads it");
alignas(64) const TileShape kTileShape;

class TileSession {
public:
    TileSession() { asm volatile("ldtilecfg %0" : : "m"(kTileShape) : "memory"); }
    ~TileSession() { asm volatile("tilerelease" : : : "memory"); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

template <int kTile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride = kTileRow) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
// What will not be read again soon and had better not drive other data out of the nearest cache.
template <int kTile>
inline void load_tile_once(const void* from) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(kTileRow), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride = kTileRow) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kSum, int kLeft, int kRight>
inline void dot_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
inline void dot_signed_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
inline void dot_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
inline void dot_brains() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace
}  // namespace lowbit
