// One step of the engine, run by a team of threads from the embedding to the logits.
//
// Stages of a dense layer, with a barrier after each but the ones in brackets:
//
//   [norm] q k v | [rotate, store] attention | [join] output | [norm] gate and up with the activation | down
//
// With few tokens every thread makes the bracketed parts for itself, into its own copy of the hidden state: a norm of one token takes
// less time than a barrier. With many tokens they are shared out by tokens, with a barrier of their own. What a branch adds lies
// in a buffer until the next norm joins it to the hidden state. The last layer of a prompt goes on behind its keys and values with those
// tokens alone whose logits are wanted.
#pragma once
#include <chrono>
#include <cstring>
#include <initializer_list>

#include "engine.h"

namespace lowbit {

class Step {
public:
    Step(Engine& engine, const int32_t* tokens, const std::vector<Sequence>& sequences, const std::vector<int64_t>& wanted, int64_t count,
         float* logits);
    void work(int index);
    bool stopped() const { return stopped_; }

private:
    // Branches that were computed and not yet added to the hidden state, by layer; -1: none.
    struct Pending {
        int64_t attention = -1, mlp = -1;
    };
    struct Member {
        int index;
        Room& room;
        float* hidden;  // [count][hidden_size], its own or the shared one
        Pending pending;
        Input input;
        std::chrono::steady_clock::time_point last;
        int64_t layer = -1;  // -1: outside the layers
        const uint8_t* coming = nullptr;  // weights that this thread reads first in the next products
        // What the last products wrote: fp32, or bf16 (Task::narrows).
        int qkv_type = LOWBIT_FP32, gate_type = LOWBIT_FP32, branch_types[2] = {LOWBIT_FP32, LOWBIT_FP32};
    };
    // The matrices of the products that come next; `second` is read in turns with the first.
    struct Following {
        const View* views[3] = {nullptr, nullptr, nullptr};
        const View* second = nullptr;
    };
    // An item of several tasks that are shared out together.
    struct Place {
        const Task* task = nullptr;
        int64_t item = 0;
    };
    struct Rows {
        float* data;
        int64_t stride;
        int type = LOWBIT_FP32;  // bf16 where there is nothing to fill
        float* near = nullptr;   // room for rows that nobody but the products reads
    };
    // A stretch of one sequence's tokens whose queries go over the keys together.
    struct Tile {
        int64_t first, count, position;
        int32_t slot;
    };

    void plan_attention();
    void embed(Member& me);
    void read_embedding(Member& me, int64_t token);
    void finish_embedding(Member& me, int64_t token);
    void turn_angles(int64_t token, const Sequence& sequence);
    void heads(Member& me, int64_t layer);
    void attention(Member& me, int64_t layer);
    // Whether this is the last layer of a prompt few of whose logits are wanted: there the others end with their keys and values.
    bool narrows_at(int64_t layer) const { return narrows_ && layer == model_.layer_count - 1; }
    void narrow();
    void dense_mlp(Member& me, int64_t layer);
    void head(Member& me);

    // attention.cpp
    void prepare_heads(Member& me, int64_t layer, int64_t item);
    int64_t head_items() const { return divide_up(count_, kKeyBlock) * (turns_whole_rows() ? 1 : model_.kv_heads); }
    bool turns_whole_rows() const { return model_.qk_norm == LOWBIT_WIDTH_NORM; }
    void read_head(const Member& me, int64_t token, int64_t place, float* to) const;
    void take_head(const Member& me, int64_t layer, int64_t token, int64_t head, bool key, const float* whole, float* to) const;
    void ask_for_queries(const Member& me, const Tile& tile, int64_t head) const;
    void ask_for_head(const Member& me, int64_t token, int64_t place) const;
    void gather_queries(Member& me, int64_t layer, int64_t token, int64_t head, float* to);
    void turn_queries(Member& me, int64_t layer, int64_t token, int64_t head_begin, int64_t head_end, float* out);
    void store_heads(Member& me, int64_t layer, int64_t token, int64_t count, int64_t head, const float* whole);
    HeadJob head_of(const Member& me, int64_t layer, int64_t token, int64_t place) const;
    bool turns_neighbours(int64_t layer) const;
    void attend_one(Member& me, int64_t layer, int64_t item);
    void attend_tile(Member& me, int64_t layer, const Tile& tile, int64_t head);
    void finish_head(int64_t layer, int64_t head, const float* out, float most, float total, float* to) const;
    void merge_splits(const Member& me, int64_t layer, int64_t token, float* to) const;
    const float* source_of_heads(Member& me, int64_t layer, int64_t token, bool keys);

    // experts.cpp
    void sparse_mlp(Member& me, int64_t layer);
    void route(int64_t layer);
    void choose_experts(int64_t token);
    void expert_products(Member& me, int64_t layer);
    void sum_experts(int64_t token, float* to) const;

    // h + branches, where the family wants them added.
    void join(Member& me, int64_t token);
    void add_branch(Member& me, int64_t layer, int branch, int64_t token);
    void norm(const lowbit_vector& vector, const float* x, int64_t count, float* y) const;
    // Fill rows of an input and make it ready for these matrices; with many tokens everybody takes a part.
    template <class Fill>
    void ready(Member& me, Rows rows, int64_t tokens, std::initializer_list<const View*> views, const Fill& fill);
    Rows own_rows(Member& me) const;
    // Normed rows of the hidden state, which nobody reads but the products.
    Rows passing_rows(Member& me) const;
    void meet(Member& me, lowbit_profile_part part, bool may_stop = false);
    void mark(Member& me, lowbit_profile_part part);

    // step_products.cpp
    Task task_of(Member& me, const View& view, float* y, int64_t y_stride);
    // Outputs of these products, side by side in rows; of fp32 where that is asked for, else as they may be written. Returns which.
    static int write_to(Task* tasks, int count, float* to, bool wide);
    // `after`: the products that come next, whose weights are asked for in time.
    void run_tasks(Member& me, Task* tasks, int count, const Following& after);
    static Place place_of(const Task* tasks, int64_t item);
    Following first_of(int64_t layer) const;
    const uint8_t* first_part(const Member& me, const Following& after) const;

    // engine_check.cpp: remember where the first number that is none appeared, once everybody has finished a stage.
    void inspect(const Member& me, lowbit_profile_part part, bool end_of_layer);
    void inspect_layer(const Member& me, lowbit_profile_part part, bool end_of_layer);
    void expect_numbers(const Member& me, const char* stage, const float* data, int64_t rows, int64_t width, int type = LOWBIT_FP32);

    Engine& engine_;
    const Plans& plans_;
    const lowbit_model& model_;
    const EngineIsa& isa_;
    Workspace& work_;
    const int32_t* tokens_;
    const std::vector<Sequence>& sequences_;
    std::vector<int64_t> wanted_;
    int64_t count_;
    float* logits_;
    const bool alone_;
    bool decoding_ = false;  // every sequence has one token
    bool stopped_ = false;
    int64_t splits_ = 1;
    std::vector<int64_t> positions_;
    std::vector<int32_t> slots_;
    bool narrows_ = false;
    std::vector<Tile> tiles_, last_tiles_;  // last_tiles_: of the last layer, where it narrows
    int64_t turn_stride_ = 0;
};

template <class Fill>
void Step::ready(Member& me, Rows rows, int64_t tokens, std::initializer_list<const View*> views, const Fill& fill) {
    me.input.start(rows.data, rows.type, rows.stride, tokens);
    uint8_t* packed = alone_ ? me.room.packed.get() : work_.packed.get();
    int64_t used = 0;
    bool formed = true;
    for (const View* view : views)
        if (*view) formed = me.input.form_for(*view, engine_.options.compute, packed, &used) && formed;
    const auto fill_row = [&](int64_t token) { fill(token, rows.data + token * rows.stride); };
    if (alone_) {
        for (int64_t t = 0; t < tokens; ++t) fill_row(t);
        me.input.make_all_ready();
        mark(me, LOWBIT_PART_NORM);
        return;
    }
    // The tokens that are asked first; the others are made ready while they still lie in the nearest cache.
    int64_t step = 0;
    if (const int64_t stretches = me.input.stretches()) {
        step = balance_step(tokens);
        work_.team.share(divide_up(tokens, step), 1, [&](int64_t index, int64_t) { fill_row(index * step); });
        meet(me, LOWBIT_PART_NORM);
        work_.team.share(stretches, 1, [&](int64_t stretch, int64_t) { me.input.balance(stretch); });
        meet(me, LOWBIT_PART_NORM);
    }
    // Rows that end as forms need no place of their own, which would have to come from beyond the caches and to go there again.
    const int64_t unit = me.input.unit();
    const bool near = rows.near && formed && unit <= kNearTokens;
    work_.team.share(tokens, unit, [&](int64_t begin, int64_t end) {
        float* place = near ? rows.near - begin * rows.stride : rows.data;
        for (int64_t t = begin; t < end; ++t) {
            float* to = place + t * rows.stride;
            if (step == 0 || t % step != 0) fill(t, to);
            else if (near) memcpy(to, rows.data + t * rows.stride, static_cast<size_t>(rows.stride) * sizeof(float));
        }
        me.input.make_ready(begin, end, place);
    });
    meet(me, LOWBIT_PART_NORM);
}

constexpr int64_t kTileRows = 48;       // rows of queries that pass over the keys together
constexpr int64_t kSplitKeys = 64;      // keys below which splitting them over threads does not pay
constexpr int64_t kItemsPerThread = 4;
constexpr int kIdleFetches = 128;       // of two lines each: what a waiting thread may ask for of the next weights

}  // namespace lowbit
