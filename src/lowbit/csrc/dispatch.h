// The functions that exist once per instruction set, and the choice among them by CPUID.
#pragma once
#include "brains.h"
#include "fold.h"
#include "product.h"
#include "quantize.h"
#include "repack.h"

namespace lowbit {

// Every function works on a range of items and starts no threads: the pool drives them.
struct Isa {
    const char* name;
    int panel_tokens, panel_blocks;  // register tile of the many-token products
    int wide_bias;                   // what the dot product takes from weights that exceed 127
    void (*quantize_rows)(const QuantizeJob& job, int64_t begin, int64_t end);
    void (*dequantize_rows)(const DequantizeJob& job, int64_t begin, int64_t end);
    void (*prepare_block)(const RepackJob& job, int64_t block, uint8_t* bytes);
    void (*restore_block)(const RepackJob& job, int64_t block, uint8_t* bytes);
    void (*quantize_tile)(const Activations& job, int64_t tile);
    void (*widen_tile)(const Activations& job, int64_t tile);
    void (*decode_rows)(const ProductJob& job, int64_t begin, int64_t end);  // items: blocks of 16 rows
    void (*panel_items)(const ProductJob& job, int64_t begin, int64_t end);  // items: token blocks x panels
    void (*float_items)(const ProductJob& job, int64_t begin, int64_t end);  // items: token blocks x panels
    const FoldedProducts* folded = nullptr;  // products of many tokens with the scales folded, where there are tiles
    const BrainProducts* brains = nullptr;   // products of many tokens in bf16, where there are instructions for it
};

const Isa& isa();  // the one in use

extern const Isa kPortable;
#if defined(LOWBIT_AVX2)
extern const Isa kAvx2;
#endif
#if defined(LOWBIT_AVX_VNNI)
extern const Isa kAvxVnni;
#endif
#if defined(LOWBIT_AVX512)
extern const Isa kAvx512, kAvx512Vnni;
extern const FoldedProducts kEmulatedProducts;
extern const BrainProducts kEmulatedBrains;
#endif
#if defined(LOWBIT_AVX512_BF16)
extern const BrainProducts kPairsOfBrains;
#endif
#if defined(LOWBIT_NEON)
extern const Isa kNeon;
#endif
#if defined(LOWBIT_NEON_I8MM)
extern const Isa kNeonI8mm;
#endif
#if defined(LOWBIT_AMX)
extern const FoldedProducts kAmxProducts;
extern const BrainProducts kAmxBrains;
#endif
extern const FoldedProducts kPortableTiles;
extern const BrainProducts kPortableBrains;

}  // namespace lowbit
