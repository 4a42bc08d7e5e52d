// The engine: a model's description, the cache of its slots, and the room that a step works in.
//
//   engine.cpp           making and checking one, the C functions
//   cache.h, cache.cpp   keys and values of every layer and slot
//   workspace.h          buffers of a step, shared and of each thread
//   step.h, step.cpp     one step: embedding, layers, head; attention.cpp and experts.cpp are parts of it
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "cache.h"
#include "engine_product.h"
#include "workspace.h"

namespace lowbit {

// Tokens up to which every thread makes the norms and activations of a product by itself: cheaper than a barrier.
constexpr int64_t kAloneTokens = 4;

struct LayerPlan {
    View q, k, v, qkv, o, gate, up, gate_up, down, router, shared_gate, shared_up, shared_down, shared_router;
    const lowbit_layer* source;
    bool paired;  // gate and up are two matrices of one shape, so that an item computes both and the activation
};

// The description, copied so that the caller's structs may go; the weights stay where they are.
struct Plans {
    lowbit_model model;
    std::vector<lowbit_layer> layers;
    std::vector<lowbit_rope> ropes;
    std::vector<LayerPlan> plans;
    View embedding, embedding_in, head_in, head;
    int64_t widest_mlp = 0;  // numbers of gate and up together
    int group = 1;           // query heads of a key head
    // Where the heads lie in a row of q, k and v.
    std::vector<int64_t> q_places, k_places, v_places;
    int64_t qkv_size = 0, q_size = 0, kv_size = 0;

    bool sparse() const { return model.expert_count > 0; }
};

// Which tokens of a step continue which slot.
struct Sequence {
    int32_t slot;
    int64_t first, count, start;  // start: the position of its first token
};

// The first number that is none: NaN or infinite.
struct Fault {
    bool found = false;
    const char* stage = nullptr;
    int64_t layer = -1, token = 0;
};

struct Engine {
    Plans plans;
    lowbit_engine_options options;
    Cache cache;
    Workspace work;
    std::vector<std::atomic<int64_t>> lengths;  // of each slot; asked for by other threads while a step runs
    std::vector<float> logits;  // of tokens that are made without the caller
    std::atomic<bool> cancelled{false};
    std::atomic<bool> busy{false};
    bool profiling = false;
    bool checking = false;
    Fault fault;  // of the step under way, where `checking`
    int asked_threads = 0;  // what the pool was asked for when the workspace was made; it may give fewer
    int64_t profile[LOWBIT_PROFILE_PARTS] = {};
    std::vector<int64_t> expected;  // of each slot: how long it will be when the prompt is read whose parts it gets; 0: no prompt in parts
};

// One step over checked arguments; LOWBIT_OK or LOWBIT_CANCELLED.
int run_step(Engine& engine, const int32_t* tokens, const std::vector<Sequence>& sequences, const std::vector<int64_t>& wanted,
             int64_t count, float* logits);

// Whether all of these are numbers.
bool all_finite(const float* x, int64_t count);
// What to say of a step whose logits are not all numbers.
int refuse_logits(const Engine& engine);

// LOWBIT_OK, or a sentence where weights lie in a mapped file that was cut off.
int check_maps(const Plans& plans);

int check_sizes(const lowbit_model& model);  // everything but the weights
int make_plans(const lowbit_model& model, Plans* plans);
// The options with LOWBIT_CACHE_AUTO settled.
lowbit_engine_options with_cache_type(const lowbit_model& model, lowbit_engine_options options);
int make_workspace(const Plans& plans, const lowbit_engine_options& options, int threads, Workspace* work);

}  // namespace lowbit
