/* The C face of the core library. Plain pointers and sizes; no exception crosses it.
 *
 * Every function that can fail returns LOWBIT_OK or an error code, and lowbit_last_error() then holds one sentence for the
 * person at the keyboard. Sizes are checked before any pointer is touched.
 *
 * The canonical form of a weight [out, in] (shared with compressed-tensors):
 *   codes   int32 [out, ceil(in * bits / 32)]  per row a bit stream, least significant bit first, element i at bit i * bits
 *   scales  [out, G], G = ceil(in / group_size)
 *   zeros   uint8 [out, G], asymmetric integers only; fine ones count 2^bits / 256 of a code
 *   w = scale * (code - zero), or scale * levels[code]
 * Scales that are quantised themselves (scale_block > 0) are uint8 codes: scale = (code - 128) * scale_scales[i / scale_block] +
 * scale_offset[0], i counting scales over the whole tensor. Blocks (LOWBIT_BLOCKS) are GGUF's, byte for byte in `codes`: uint8
 * [out, blocks of a row * bytes of a block], the end of a row filled up, and nothing beside them.
 * The prepared form of the same weight is one buffer of lowbit_prepared_bytes() bytes, described in layout.h.
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define LOWBIT_OPTIONAL = nullptr
#else
#define LOWBIT_OPTIONAL
#endif

#define LOWBIT_API __attribute__((visibility("default")))

enum lowbit_status {
    LOWBIT_OK = 0,
    LOWBIT_BAD_ARGUMENT = 1,   /* sizes or options that contradict each other */
    LOWBIT_BAD_WEIGHT = 2,     /* NaN or infinite weights; a file of them that was cut off */
    LOWBIT_UNSUPPORTED = 3,    /* a format that has no code here */
    LOWBIT_NO_MEMORY = 4
};

/* Element types of weights, activations and outputs. */
enum lowbit_dtype { LOWBIT_FP32 = 0, LOWBIT_BF16 = 1, LOWBIT_FP16 = 2 };
/* Types of stored scales; the first three equal lowbit_dtype. */
enum lowbit_scale { LOWBIT_SCALE_FP32 = 0, LOWBIT_SCALE_BF16 = 1, LOWBIT_SCALE_FP16 = 2, LOWBIT_SCALE_E8M0 = 3, LOWBIT_SCALE_E4M3 = 4 };
/* Zero points of integers: a byte for each group that counts codes; 2^(bits-1); or a byte that counts 2^bits / 256 of a code (2 to 5
 * bits, scales of fp16, bf16 or fp32). */
enum lowbit_symmetry { LOWBIT_ASYMMETRIC = 0, LOWBIT_SYMMETRIC = 1, LOWBIT_FINE_ZEROS = 2 };
enum lowbit_kind { LOWBIT_INT = 0, LOWBIT_LEVELS = 1, LOWBIT_DENSE = 2, LOWBIT_BLOCKS = 3 };
/* GGUF's types of blocks that have scales inside. */
enum lowbit_block { LOWBIT_Q2_K = 1, LOWBIT_Q3_K = 2, LOWBIT_Q4_K = 3, LOWBIT_Q5_K = 4, LOWBIT_Q6_K = 5, LOWBIT_Q4_1 = 6, LOWBIT_Q5_1 = 7 };
/* Precision of the product: activations as int8, or everything in fp32. Activations have one scale per group; only the products of
 * more than 16 tokens may have one per up to lowbit_fold_length() inputs, for which weights are rounded to int8 once more, unless
 * LOWBIT_COMPUTE_INT8_GROUPS forbids that. */
enum lowbit_compute {
    LOWBIT_COMPUTE_INT8 = 0,
    LOWBIT_COMPUTE_FP32 = 1,
    LOWBIT_COMPUTE_BF16 = 2,       /* activations and weights rounded to bf16 (or fp16), sums in fp32 */
    LOWBIT_COMPUTE_FP16 = 3,
    LOWBIT_COMPUTE_INT8_GROUPS = 4
};

typedef struct lowbit_format {
    int32_t bits;          /* 2..8; dense: 16 or 32 */
    int32_t kind;          /* lowbit_kind */
    int32_t symmetric;     /* integers: lowbit_symmetry */
    int32_t group_size;    /* > 0, or -1 for whole rows, or 0 for one scale per tensor */
    int32_t scale_type;    /* lowbit_scale; dense: the lowbit_dtype of the weight */
    int32_t level_count;   /* LOWBIT_LEVELS: 2^bits */
    const float* levels;   /* value of each code; NaN for codes that mean nothing */
    int32_t scale_block;   /* > 0: scales are codes under a second level, for so many of them each */
    int32_t block_type;    /* LOWBIT_BLOCKS: lowbit_block; group size and scale type follow from it */
} lowbit_format;

typedef struct lowbit_search {
    const double* ratios;     /* factors of the plain scale to try; none: plain rounding */
    int32_t ratio_count;
    int32_t zero_steps;       /* asymmetric: zero points tried on each side */
    const float* importance;  /* [in] weight of each input's squared error, or NULL for sqrt|w| */
} lowbit_search;

LOWBIT_API const char* lowbit_version(void);
/* Cores that a cgroup's cpu.max file pays for, rounded up; 0 where it sets no limit. */
LOWBIT_API int lowbit_quota(const char* cpu_max);
LOWBIT_API const char* lowbit_last_error(void);
/* The instruction set in use: "portable", "avx2", "avx_vnni", "avx512_vnni", "avx512", "avx512_bf16", "amx", "neon" or
   "neon_i8mm". */
LOWBIT_API const char* lowbit_isa(void);
/* Inputs whose scales the products of many tokens fold into one at most, 0 where every group keeps its own. */
LOWBIT_API int lowbit_fold_length(void);
/* From so many tokens on weights in bf16 meet activations rounded to bf16 when LOWBIT_COMPUTE_INT8 leaves that open; 0: they never do. */
LOWBIT_API int lowbit_bf16_tokens(void);
/* Choose an instruction set by name (tests, benchmarks); NULL chooses the best again. "amx_emulated" is only chosen by name. */
LOWBIT_API int lowbit_set_isa(const char* name);
LOWBIT_API int lowbit_set_threads(int threads);
LOWBIT_API int lowbit_threads(void);

/* Round a weight [rows, cols] (row_stride in elements) onto a fitted grid. scale_scales: the global factor of E4M3 scales. */
LOWBIT_API int lowbit_quantize(const lowbit_format* format, const void* weight, int dtype, int64_t rows, int64_t cols,
                               int64_t row_stride, const lowbit_search* search, int32_t* codes, void* scales, uint8_t* zeros,
                               float* scale_scales);
/* uint8 codes [rows, cols] to the canonical stream and back. */
LOWBIT_API int lowbit_pack(int bits, int64_t rows, int64_t cols, const uint8_t* values, int32_t* codes);
LOWBIT_API int lowbit_unpack(int bits, int64_t rows, int64_t cols, const int32_t* codes, uint8_t* values);
/* The canonical form back to a dense weight. */
LOWBIT_API int lowbit_dequantize(const lowbit_format* format, int64_t rows, int64_t cols, const int32_t* codes, const void* scales,
                                 const uint8_t* zeros, const float* scale_scales, void* weight, int dtype, int64_t row_stride,
                                 const float* scale_offset LOWBIT_OPTIONAL);

/* sums[0] = sum of (w - w^)^2, sums[1] = sum of w^2, of a dense weight against its canonical form. */
LOWBIT_API int lowbit_distance(const lowbit_format* format, int64_t rows, int64_t cols, const int32_t* codes, const void* scales,
                               const uint8_t* zeros, const float* scale_scales, const void* weight, int dtype, int64_t row_stride,
                               double* sums, const float* scale_offset LOWBIT_OPTIONAL);

/* Bytes of the prepared form, or -1 with a sentence when the format has no kernel. */
LOWBIT_API int64_t lowbit_prepared_bytes(const lowbit_format* format, int64_t rows, int64_t cols);
LOWBIT_API int lowbit_prepare(const lowbit_format* format, int64_t rows, int64_t cols, const void* codes, const void* scales,
                              const uint8_t* zeros, const float* scale_scales, void* prepared, int64_t prepared_bytes,
                              const float* scale_offset LOWBIT_OPTIONAL);
/* Several weights at once, which threads share out among them: the arguments of lowbit_prepare for each. Where codes or scales lie in a
 * file that is mapped for reading only, their bytes are named, and their pages go back as soon as they were read. */
typedef struct lowbit_prepare_job {
    const lowbit_format* format;
    int64_t rows, cols;
    const void* codes;
    const void* scales;
    const uint8_t* zeros;
    const float* scale_scales;
    const float* scale_offset;
    void* prepared;
    int64_t prepared_bytes;
    int64_t mapped_codes, mapped_scales;
} lowbit_prepare_job;
LOWBIT_API int lowbit_prepare_all(const lowbit_prepare_job* jobs, int64_t count);
LOWBIT_API int lowbit_restore(const void* prepared, int64_t prepared_bytes, void* codes, void* scales, uint8_t* zeros,
                              float* scale_scales, float* scale_offset LOWBIT_OPTIONAL);
/* Some rows of a prepared weight as fp32 [count, cols]: what an embedding looks up. */
LOWBIT_API int lowbit_read_rows(const void* prepared, int64_t prepared_bytes, const int64_t* rows, int64_t count, float* to);
/* y [tokens, rows] = x [tokens, cols] times the prepared weight, plus bias [rows] in fp32 when it is not NULL. */
LOWBIT_API int lowbit_run(const void* prepared, int64_t prepared_bytes, const void* x, int x_dtype, int64_t tokens,
                          int64_t x_stride, const float* bias, void* y, int y_dtype, int64_t y_stride, int compute);
/* Rows of x sorted by expert, each times its own of `experts` weights of expert_bytes that lie one after another: rows begins[e] to
 * begins[e + 1] are those of expert e (begins has experts + 1 entries). Rows of no expert are left as they are. */
LOWBIT_API int lowbit_run_experts(const void* prepared, int64_t expert_bytes, int64_t experts, const int64_t* begins, const void* x,
                                  int x_dtype, int64_t rows, int64_t x_stride, void* y, int y_dtype, int64_t y_stride, int compute);

/* A mapped file that is cut off while somebody reads it ends the process (SIGBUS). Between these addresses what is gone reads as zeros
 * instead, and lowbit_check_map and the steps of engines over weights that lie there return LOWBIT_BAD_WEIGHT with the file's name.
 * The first call installs a handler of SIGBUS, which hands on what is not its own. Release a map before it is unmapped. */
LOWBIT_API int lowbit_guard_map(const void* address, int64_t bytes, const char* name);
LOWBIT_API int lowbit_check_map(const void* address);
LOWBIT_API int lowbit_release_map(const void* address);

#ifdef __cplusplus
}
#endif

#include "select_api.h"
