/* The C face of the engine: a decoder-only model as a table of numbers and pointers, and one call per step.
 *
 * A step takes tokens of one or more sequences ("slots" of the cache) and returns logits: one prompt chunk, or one token of each
 * of several sequences. Every weight is read once per step. The model's description mirrors lowbit.models.spec.DecoderSpec.
 *
 * The caller owns all weights and keeps them alive and unmoved; nothing is copied. Linear weights are [out, in], either prepared
 * by lowbit_prepare, laid out by lowbit_tighten or plain rows of numbers; vectors are fp32. A role that the family does not have stays zero.
 */
#pragma once
#include <stdint.h>

#include "lowbit.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Besides the codes of lowbit_status. */
enum lowbit_engine_status {
    LOWBIT_CANCELLED = 5,
    LOWBIT_NOT_FINITE = 6          /* NaN or infinite logits; lowbit_engine_set_check says which layer made them */
};

/* Tight: a bf16 matrix as lowbit_tighten lays it out. */
enum lowbit_matrix_kind { LOWBIT_ABSENT = 0, LOWBIT_PREPARED = 1, LOWBIT_PLAIN = 2, LOWBIT_TIGHT = 3 };

typedef struct lowbit_matrix {
    const void* data;    /* `count` matrices one after another (the experts of a layer; 1 elsewhere) */
    int64_t bytes;       /* of one prepared or tight matrix; plain ones: 0 */
    int64_t rows, cols, count;
    const float* bias;   /* [count, rows] or NULL */
    int32_t kind;        /* lowbit_matrix_kind */
    int32_t dtype;       /* lowbit_dtype of plain ones */
} lowbit_matrix;

typedef struct lowbit_vector {
    const float* weight; /* NULL: all ones (of a norm) */
    const float* bias;
} lowbit_vector;

enum lowbit_layer_matrix {
    LOWBIT_Q, LOWBIT_K, LOWBIT_V, LOWBIT_QKV, LOWBIT_O, LOWBIT_GATE, LOWBIT_UP, LOWBIT_GATE_UP, LOWBIT_DOWN, LOWBIT_ROUTER,
    LOWBIT_EXPERTS_GATE_UP, LOWBIT_EXPERTS_DOWN, LOWBIT_SHARED_GATE, LOWBIT_SHARED_UP, LOWBIT_SHARED_DOWN, LOWBIT_SHARED_ROUTER,
    LOWBIT_LAYER_MATRICES
};
enum lowbit_layer_vector {
    LOWBIT_ATTENTION_NORM, LOWBIT_Q_NORM, LOWBIT_K_NORM, LOWBIT_SINKS, LOWBIT_ATTENTION_POST_NORM, LOWBIT_MLP_NORM,
    LOWBIT_MLP_POST_NORM, LOWBIT_LAYER_VECTORS
};
enum lowbit_outer_matrix {
    LOWBIT_EMBEDDING, LOWBIT_POSITIONS, LOWBIT_EMBEDDING_IN, LOWBIT_HEAD_IN, LOWBIT_HEAD, LOWBIT_OUTER_MATRICES
};
enum lowbit_outer_vector { LOWBIT_EMBEDDING_NORM, LOWBIT_FINAL_NORM, LOWBIT_OUTER_VECTORS };

enum lowbit_norm_kind { LOWBIT_RMS = 0, LOWBIT_LAYER_NORM = 1 };
enum lowbit_placement { LOWBIT_PRE = 0, LOWBIT_POST = 1, LOWBIT_SANDWICH = 2, LOWBIT_AFTER_SUM = 3 };
enum lowbit_residual { LOWBIT_SEQUENTIAL = 0, LOWBIT_PARALLEL = 1, LOWBIT_PARALLEL_SHARED = 2 };
enum lowbit_qk_norm { LOWBIT_NO_QK_NORM = 0, LOWBIT_HEAD_NORM = 1, LOWBIT_HEADS_NORM = 2, LOWBIT_WIDTH_NORM = 3 };
enum lowbit_activation { LOWBIT_SILU = 0, LOWBIT_GELU = 1, LOWBIT_GELU_TANH = 2, LOWBIT_RELU = 3 };
enum lowbit_gate { LOWBIT_NO_GATE = 0, LOWBIT_SEPARATE = 1, LOWBIT_CONCATENATED = 2, LOWBIT_INTERLEAVED = 3 };
enum lowbit_pairing { LOWBIT_HALVES = 0, LOWBIT_NEIGHBOURS = 1 };
enum lowbit_rope_change { LOWBIT_ROPE_FIXED = 0, LOWBIT_ROPE_LONG = 1, LOWBIT_ROPE_DYNAMIC = 2 };
/* LOWBIT_CACHE_AUTO: int8 where the products that make queries, keys and values round their inputs to int8 in every layer (low-bit
 * weights, computed as LOWBIT_COMPUTE_INT8 or LOWBIT_COMPUTE_INT8_GROUPS), fp16 elsewhere. */
enum lowbit_cache_type { LOWBIT_CACHE_FP32 = 0, LOWBIT_CACHE_FP16 = 1, LOWBIT_CACHE_INT8 = 2, LOWBIT_CACHE_AUTO = 3 };

/* Rotary positions; frequencies that change with the length of the sequence do so past `trained_positions`. */
typedef struct lowbit_rope {
    const float* frequencies;      /* [rotary_dim / 2] */
    const float* long_frequencies; /* LOWBIT_ROPE_LONG only */
    int32_t rotary_dim, pairing, change, trained_positions;
    float attention_factor;
    float factor;                  /* LOWBIT_ROPE_DYNAMIC */
    double theta;
} lowbit_rope;

typedef struct lowbit_layer {
    lowbit_matrix matrices[LOWBIT_LAYER_MATRICES];
    lowbit_vector vectors[LOWBIT_LAYER_VECTORS];
    int32_t rope;                  /* index, or -1 */
    int32_t window;                /* 0: sees everything before it */
    int32_t sparse;                /* experts in place of the MLP */
    int32_t reserved;
} lowbit_layer;

typedef struct lowbit_mlp {
    int32_t size, activation, gate;
    float limit;                   /* 0: none */
    float sigmoid_scale;
} lowbit_mlp;

typedef struct lowbit_model {
    int32_t struct_bytes;          /* sizeof(lowbit_model), so that a caller built for another version is refused */
    int32_t hidden_size, vocab_size, layer_count, rope_count;
    int32_t embedding_width, position_offset, position_rows; /* offset -1: no table */
    int32_t embedding_norm, final_norm;
    int32_t norm_kind, placement, residual;
    int32_t heads, kv_heads, head_dim, qk_norm, qkv_grouped;
    int32_t expert_count, top_k, normalize_experts;
    float norm_eps, embedding_multiplier, residual_multiplier, attention_scale, attention_soft_cap, clip, head_multiplier, head_soft_cap;
    lowbit_mlp mlp, expert, shared;
    const float* alibi;            /* [heads] or NULL */
    const lowbit_rope* ropes;
    const lowbit_layer* layers;
    lowbit_matrix matrices[LOWBIT_OUTER_MATRICES];
    lowbit_vector vectors[LOWBIT_OUTER_VECTORS];
} lowbit_model;

typedef struct lowbit_engine_options {
    int64_t context;               /* tokens that a slot can hold */
    int32_t slots, cache_type, compute, chunk; /* chunk: most tokens of one step */
} lowbit_engine_options;

/* Nanoseconds of the first thread since the engine was made or the profile was read. */
enum lowbit_profile_part {
    LOWBIT_PART_EMBED, LOWBIT_PART_NORM, LOWBIT_PART_QKV, LOWBIT_PART_ROPE, LOWBIT_PART_ATTENTION, LOWBIT_PART_OUTPUT,
    LOWBIT_PART_MLP, LOWBIT_PART_HEAD, LOWBIT_PART_BARRIER, LOWBIT_PART_STEPS, LOWBIT_PART_BARRIERS, LOWBIT_PROFILE_PARTS
};

typedef struct lowbit_engine lowbit_engine;

/* A bf16 matrix [rows, cols] exactly, in 12 bits a weight and 4 bytes for each of the few that need more: what a token reads of it is a
 * quarter less. lowbit_tight_pays: whether decoding is then faster on the instruction set in use. lowbit_tight_bytes: the room that the
 * layout asks for at most, or -1 with a sentence; *used is what it took, all that has to be kept. LOWBIT_UNSUPPORTED with a sentence
 * where more than one of 200 weights would need more: such a matrix stays plain. lowbit_loosen writes the bf16 matrix again, bit for
 * bit. */
LOWBIT_API int lowbit_tight_pays(void);
LOWBIT_API int64_t lowbit_tight_bytes(int64_t rows, int64_t cols);
LOWBIT_API int lowbit_tighten(const void* weight, int64_t rows, int64_t cols, void* tight, int64_t tight_bytes, int64_t* used);
LOWBIT_API int lowbit_loosen(const void* tight, int64_t tight_bytes, void* weight);

/* NULL with a sentence in lowbit_last_error() when the description contradicts itself or memory is short. */
LOWBIT_API lowbit_engine* lowbit_engine_create(const lowbit_model* model, const lowbit_engine_options* options);
LOWBIT_API void lowbit_engine_destroy(lowbit_engine* engine);
/* Bytes that an engine of these options would allocate, the cache above all; -1 with a sentence. */
LOWBIT_API int64_t lowbit_engine_bytes(const lowbit_model* model, const lowbit_engine_options* options);

/* The type of its cache, which LOWBIT_CACHE_AUTO has become; -1 for no engine. */
LOWBIT_API int lowbit_engine_cache_type(const lowbit_engine* engine);

/* tokens[count] continue slots[count]; tokens of one slot follow one another. wanted[count] says whose logits to write, one row of
 * vocab_size floats each, in order. Returns LOWBIT_CANCELLED when lowbit_engine_cancel was called: then the lengths are as
 * before the step. */
LOWBIT_API int lowbit_engine_step(lowbit_engine* engine, const int32_t* tokens, const int32_t* slots, const uint8_t* wanted,
                                  int64_t count, float* logits);
/* A prompt longer than a chunk is read in several steps. Where frequencies depend on the length (LOWBIT_ROPE_LONG, LOWBIT_ROPE_DYNAMIC),
 * its first parts must know how long the slot will be: say it before the first; cutting the slot forgets it. Keys stay turned as they were
 * cached: whoever lets a slot grow past trained_positions of a LOWBIT_ROPE_LONG cuts it to 0 there and appends everything again. */
LOWBIT_API int lowbit_engine_expect(lowbit_engine* engine, int32_t slot, int64_t length);
/* The most likely token again and again, from `token` (not yet in the cache), until `count` are made or one of `stops` is: writes
 * them and their number. Ends early with LOWBIT_CANCELLED. */
LOWBIT_API int lowbit_engine_greedy(lowbit_engine* engine, int32_t slot, int32_t token, int64_t count, const int32_t* stops,
                                    int64_t stop_count, int32_t* made, int64_t* made_count);
/* Likewise, with each token chosen as lowbit_select does: tokens [length + count] holds the sequence so far, of which the last one is
 * not in the cache yet, and the new ones are written behind it. Before `least` are made, none of `stops` is chosen. */
LOWBIT_API int lowbit_engine_choose(lowbit_engine* engine, int32_t slot, int32_t* tokens, int64_t length, int64_t count,
                                    const lowbit_selection* selection, int64_t least, const int32_t* stops, int64_t stop_count,
                                    uint64_t* generator, int64_t* made_count);
/* Tokens in a slot, or -1. */
LOWBIT_API int64_t lowbit_engine_length(const lowbit_engine* engine, int32_t slot);
/* Forget what follows the first `length` tokens of a slot. A model with sliding windows keeps only the windows: such a slot can be
 * emptied, or cut to lowbit_engine_shortest() tokens or more. */
LOWBIT_API int lowbit_engine_truncate(lowbit_engine* engine, int32_t slot, int64_t length);
LOWBIT_API int64_t lowbit_engine_shortest(const lowbit_engine* engine, int32_t slot);
/* Make slot `to` hold the first `length` tokens of slot `from`, of which it holds the first `common` already (0: nothing). */
LOWBIT_API int lowbit_engine_copy(lowbit_engine* engine, int32_t from, int32_t to, int64_t common, int64_t length);
/* The first `length` tokens of a slot as bytes, to be taken up again by an engine of the same model, cache type and instruction set or
 * any other: a first call with `bytes` NULL says how many bytes there are in *size. */
LOWBIT_API int lowbit_engine_save(lowbit_engine* engine, int32_t slot, int64_t length, void* bytes, int64_t* size);
LOWBIT_API int lowbit_engine_restore(lowbit_engine* engine, int32_t slot, int64_t length, const void* bytes, int64_t size);
/* May be called from any thread or signal handler; the step under way, or the next one where none is, ends within one layer. Who knows
 * that no step is left to end takes it back with lowbit_engine_resume. */
LOWBIT_API void lowbit_engine_cancel(lowbit_engine* engine);
LOWBIT_API void lowbit_engine_resume(lowbit_engine* engine);
/* Look at every stage of a step for NaN and infinity: slower, and a step that meets one says in which layer. */
LOWBIT_API void lowbit_engine_set_check(lowbit_engine* engine, int on);
LOWBIT_API void lowbit_engine_set_profile(lowbit_engine* engine, int on);
LOWBIT_API void lowbit_engine_profile(lowbit_engine* engine, int64_t* nanoseconds);

#ifdef __cplusplus
}
#endif
