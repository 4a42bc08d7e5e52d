// The tight form of a bf16 matrix: every weight exactly, in 12 bits and a little.
//
// A token reads every weight once, so bytes decide. The lower byte of a bf16 (a bit of the exponent, seven of the mantissa) is noise
// and is kept as it is; the upper one (sign, seven bits of the exponent) takes few values in a trained weight, so 4 bits name it in a
// table of 16 for each matrix: 0x00 first, then the 15 most frequent. A weight whose upper byte is another one is stored as 0 and
// listed with its column behind the blocks; its product is added after the row's sum.
//
//   header | block 0 | block 1 | ... | starts uint32 [blocks * 4 + 1] | others uint32 [count]: column << 16 | bf16, row after row
//   block = units of 64 inputs of 4 rows, 384 bytes each: lower bytes of the rows, 64 each; names of rows 0 (lower nibbles) and 1;
//           names of rows 2 and 3
//
// Inside a unit byte 16q + 8(j >> 1) + 2i + (j & 1) belongs to input 16j + 4q + i: interleaving the bytes of a register (which keeps to
// its quarters) and taking the even and odd halves of its lanes then gives 16 inputs in order, and no permutation is needed: about 10
// instructions for 64 weights. Rows and inputs are filled up with zeros.
#pragma once
#include "layout.h"

namespace lowbit {

constexpr int64_t kTightRows = 4, kTightUnit = 64;
constexpr int64_t kTightUnitBytes = kTightRows * kTightUnit * 3 / 2;
constexpr int64_t kTightHeaderBytes = 256;
// Of so many weights one may be an exception: each is 4 bytes and a few operations. Beyond, the matrix stays plain.
constexpr int64_t kTightLimit = 200;

struct TightHeader {
    char magic[8];
    uint64_t seal;
    int64_t rows, cols, blocks, units, block_bytes, starts_offset, others_offset, count, total_bytes;
    uint8_t high[16];

    const uint8_t* block(int64_t index) const { return reinterpret_cast<const uint8_t*>(this) + kTightHeaderBytes + index * block_bytes; }
    const uint32_t* starts() const { return reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(this) + starts_offset); }
    const uint32_t* others() const { return reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(this) + others_offset); }
};
static_assert(sizeof(TightHeader) <= kTightHeaderBytes, "the header has its fixed place");

// Where input `k` of a unit lies.
constexpr int tight_place(int k) { return k / 4 % 4 * 16 + k / 32 * 8 + k % 4 * 2 + k / 16 % 2; }

// The table of a matrix both ways; kNoName for upper bytes that are not in it.
constexpr uint8_t kNoName = 0xff;
struct TightTable {
    uint8_t high[16];
    uint8_t name[256];
};

// NULL with a sentence where the bytes are no tight matrix. Everything that a product follows is looked at.
const TightHeader* check_tight(const void* tight, int64_t bytes);
void read_tight_row(const TightHeader& header, int64_t row, float* to);

}  // namespace lowbit
