// The engine's inner functions that exist once per instruction set: everything between the products of a token.
#pragma once
#include <cstdint>

#include "engine_api.h"
#include "tight.h"

namespace lowbit {

constexpr int kKeyBlock = 16;  // keys whose channels lie side by side in the cache
constexpr int kKeyTile = 128;  // keys that share one step of the online softmax
constexpr int kValueStep = 64; // keys whose values meet in one product of register tiles

struct NormJob {
    int kind;  // lowbit_norm_kind
    float eps;
    lowbit_vector vector;
};

// Rows of queries over a range of the keys and values of one head of one sequence (attention_lanes.h has the formula).
struct AttendJob {
    const float* queries;  // [rows][head_dim], already scaled
    int64_t rows;
    int head_dim, padded;  // padded: head_dim rounded up to whole vectors, the width of a value
    int cache_type;
    const void* keys;      // [blocks of 16 keys][head_dim][16]; int8 as in attention_bytes.h
    const void* values;    // [keys][padded]
    const float* key_scales;    // int8 only, one for each key
    const float* value_scales;
    const int64_t* positions;   // of each row: it sees keys up to its own
    int64_t window;             // 0: all of them
    const float* slopes;        // ALiBi of each row, or NULL
    float soft_cap;             // 0: none
    int64_t key_begin, key_end;
    float* scores;         // room for [rows][kKeyTile]
    float* out;            // [rows][padded], not yet divided by `total`
    float* most;           // [rows] largest score
    float* total;          // [rows] sum of e^(score - most)
    uint8_t* room;         // attend_room() bytes; int8 only
};

// By row queries in two planes of bytes, a tile's probabilities in two, five numbers, a flag; the last values of a tile (attention_tiles.h).
inline int64_t attend_room(int64_t rows, int64_t padded) { return rows * (2 * padded + 2 * kKeyTile + 21) + kValueStep * padded; }

// A head of a token as the products left it, to be widened, turned and scaled. Pairs that turn lie `half` apart; 0: nothing turns.
struct HeadJob {
    const void* from;  // rows of numbers
    int dtype;
    int64_t index, size;  // the head's place and width in them
    const float* cosines;
    const float* sines;
    int64_t half;
    float factor;
};

// Keys or values of one head at successive positions that share a block of the cache.
struct StoreJob {
    int cache_type, head_dim, padded;
    const float* rows;  // [count][head_dim]
    int64_t position, count;
    void* to;       // the head's keys or values
    float* scales;  // int8 only
};

// y[t][r] = bias[r] + sum x[t][k] w[r][k] for rows [row_begin, row_end) of a plain or a tight matrix.
struct DenseJob {
    const float* x;
    int64_t x_stride, tokens;
    const void* weight;  // rows of numbers, or the TightHeader
    int dtype;
    int64_t cols, row_begin, row_end;
    const float* bias;
    float* y;
    int64_t y_stride;
    const uint8_t* next;  // what this thread reads after these rows, or NULL
};

// Tokens to choose among: by how much each is preferred, and e^((logit - top) / temperature).
struct Choice {
    const float* keys;
    const float* weights;
};

// How many tokens, and their weights together.
struct Tally {
    int64_t count;
    double mass;
};

struct EngineIsa {
    void (*normalize)(const NormJob& job, const float* x, int64_t count, float* y);
    // act(gate) * up, or act(gate) without up.
    void (*activate)(const lowbit_mlp& mlp, const float* gate, const float* up, int64_t count, float* y);
    void (*add_scaled)(float* to, const float* from, float factor, int64_t count);
    // Pairs of a rotary position: a = a c - b s, b = b c + a s.
    void (*turn)(float* a, float* b, const float* cosines, const float* sines, int64_t count);
    void (*scale)(const float* from, float factor, int64_t count, float* to);
    void (*cap)(float* x, float multiplier, float soft_cap, int64_t count);
    void (*widen)(const void* from, int dtype, int64_t index, int64_t count, float* to);
    void (*turn_head)(const HeadJob& job, float* to);
    int64_t (*largest)(const float* x, int64_t count);
    // e^((logit - top) * inverse), 0 where that is no normal number.
    void (*weigh)(const float* logits, int64_t count, float top, float inverse, float* weights);
    // Of the tokens [begin, end) those whose key is at least `low`, which is finite; so too below.
    Tally (*tally)(const Choice& choice, int64_t begin, int64_t end, float low);
    // Sum of weight * (top - key).
    double (*moment)(const Choice& choice, int64_t count, float low, float top);
    // -|key - middle|, and -infinity for the others.
    void (*fold)(const float* keys, int64_t count, float low, float middle, float* to);
    // Where they are; returns how many.
    int64_t (*gather)(const float* keys, int64_t count, float low, int32_t* places);
    void (*dense)(const DenseJob& job);
    void (*tight)(const DenseJob& job);
    // One row of bf16 into its lane of a block that was zero; its exceptions, as they are listed; returns how many.
    int64_t (*split_row)(const uint16_t* row, int64_t cols, int lane, const TightTable& table, uint8_t* block, uint32_t* others);
    // Inputs [first, first + count) of a row of a TightHeader.
    void (*read_tight)(const void* tight, int64_t row, int64_t first, int64_t count, uint16_t* to);
    bool tight_pays;  // decoding reads tight rows at least as fast as plain ones
    void (*attend)(const AttendJob& job);
    void (*store_keys)(const StoreJob& job);
    void (*store_values)(const StoreJob& job);
};

const EngineIsa& engine_isa();  // follows isa()

// What sets with register tiles have instead of the `attend` of their lanes.
#if defined(LOWBIT_AMX)
void attend_amx(const AttendJob& job);
#endif
#if defined(LOWBIT_AVX512)
void attend_amx_emulated(const AttendJob& job);
#endif
void attend_tiles_portable(const AttendJob& job);

extern const EngineIsa kEnginePortable;
#if defined(LOWBIT_AVX2)
extern const EngineIsa kEngineAvx2;
#endif
#if defined(LOWBIT_AVX_VNNI)
extern const EngineIsa kEngineAvxVnni;
#endif
#if defined(LOWBIT_AVX512)
extern const EngineIsa kEngineAvx512;
#endif
#if defined(LOWBIT_NEON)
extern const EngineIsa kEngineNeon;
#endif
#if defined(LOWBIT_NEON_I8MM)
extern const EngineIsa kEngineNeonI8mm;
#endif

}  // namespace lowbit
