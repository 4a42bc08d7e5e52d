// Products inside a step: the core's kernels for prepared weights, the engine's own for plain rows, both as items that a team shares.
#pragma once
#include "dispatch.h"
#include "engine_isa.h"
#include "product_plan.h"

namespace lowbit {

// One matrix of the model: `header` for a prepared one, `tight` for a tight one, else plain rows; no rows when the model has none.
struct View {
    const Header* header = nullptr;
    const TightHeader* tight = nullptr;
    const void* data = nullptr;
    const float* bias = nullptr;
    int64_t rows = 0, cols = 0;
    int dtype = LOWBIT_FP32;

    explicit operator bool() const { return rows > 0; }
    int64_t bytes() const;
    int64_t group_bytes() const;  // of four rows that are not prepared
    // Plain and tight rows of bf16, when so many tokens are rounded to bf16 too.
    bool rounds_to_brains(int64_t tokens, int compute) const;
    PlainRows plain_rows() const;
};

View view_of(const lowbit_matrix& matrix, int64_t index = 0);

// Rows that several matrices are multiplied with: of fp32, or of bf16 where all of their forms are prepared ones.
struct Input {
    static constexpr int kMostForms = 4;
    const void* rows = nullptr;
    int dtype = LOWBIT_FP32;
    int64_t stride = 0, tokens = 0;
    int form_count = 0;
    Form forms[kMostForms];

    void start(const void* from, int type, int64_t row_stride, int64_t count);
    // The form that this weight needs, placed at `room` behind the ones before; nullptr where rows of fp32 meet plain and tight ones.
    const Form* form_for(const View& view, int compute, uint8_t* room, int64_t* used);
    // Once all rows are there and before any is made ready: what forms want to know of all tokens, in so many pieces.
    int64_t stretches() const;
    void balance(int64_t stretch) const;
    // Tokens that every form can be cut at.
    int64_t unit() const;
    // Make all forms ready for tokens [begin, end), which are whole tiles or the last ones; `from` is where the row of token 0 lies, or would.
    void make_ready(int64_t begin, int64_t end, const void* from) const;
    void make_all_ready() const;
};

// Bytes that form_for places at most, for up to `tokens` tokens.
int64_t room_for(const View& view, int64_t tokens, int compute);

constexpr int kNarrowBits = 6;

// What an item of a product covers.
struct Piece {
    int64_t token_begin, token_end, row_begin, row_end;
};

// y = x W^T, and with `second` also z = x V^T for a matrix of the same shape; then y = act(y) * z where an MLP is given.
struct Task {
    View view, second;
    const Form *form = nullptr, *second_form = nullptr;
    const Input* input = nullptr;
    void* y = nullptr;
    float* z = nullptr;
    int y_dtype = LOWBIT_FP32;
    int64_t y_stride = 0;
    const lowbit_mlp* mlp = nullptr;
    float multiplier = 1.0f, soft_cap = 0.0f;  // of logits
    int64_t items = 0;
    int64_t units = 0, per_item = 1;  // decoding: blocks, of plain and tight matrices groups of rows

    struct Span {
        int64_t begin, end;
    };
    // Cut into items for a team of this size.
    void plan(int team);
    void cut(int64_t count, int64_t unit_bytes, int team);
    Span span(int64_t item) const;
    // Where the weights of an item begin that is read front to back, else NULL.
    const uint8_t* begin_of(const View& of, int64_t item) const;
    // `next`: the weights that the same thread reads after these, if it is known.
    Piece run(int64_t item, const uint8_t* next = nullptr) const;
    bool pairs_with(const View& other, const Form* other_form) const;
    // Whether gate and up are multiplied and joined in one go, so that neither is written down.
    bool joins() const { return second && mlp && form && form->folded && !view.bias && !second.bias && form == second_form; }
    // Whether gate and up of an item stay beside each other until they are joined, so that neither is written down.
    bool pairs_near() const;
    void run_near(int64_t item) const;
    // Whether it may write bf16, which loses nothing beside what folding does, and halves what travels to memory and back. Not under weights
    // of 8 bits, of whose loss it would be a twentieth, and which as w8a8 give what torch's layers give.
    bool narrows() const { return form && form->folded && view.header->bits <= kNarrowBits && (joins() || (!second && !mlp)) && !caps(); }
    bool caps() const { return multiplier != 1.0f || soft_cap > 0.0f; }
};

}  // namespace lowbit
