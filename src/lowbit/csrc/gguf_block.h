// The blocks of GGUF's types as numbers, and back byte for byte: k-quants of 256 weights, and the 32 weights of Q4_1 and Q5_1.
//
//   q2_k         16 groups of 16    w = d * scale * q - dmin * minimum     scale and minimum of 4 bits, in one byte
//   q4_k q5_k     8 groups of 32    w = d * scale * q - dmin * minimum     scale and minimum of 6 bits
//   q3_k q6_k    16 groups of 16    w = d * scale * (q - midpoint)         scale of 6 bits less 32, or a signed byte
//   q4_1 q5_1     1 group of 32     w = d * q + minimum
#pragma once
#include "layout.h"
#include "quantize.h"

namespace lowbit {

constexpr int kMostBlockWeights = 256;
constexpr int kMostBlockGroups = 16;

struct BlockLayout {
    int bits, weights, groups, bytes;
    int zero;  // the code that means 0 before the minimum
    ScaleCodes scales;
};

// nullptr when there is no such type.
const BlockLayout* block_layout(int block_type);

// Rows of blocks as numbers.
void dequantize_blocks(const DequantizeJob& job, int64_t begin, int64_t end);

}  // namespace lowbit
