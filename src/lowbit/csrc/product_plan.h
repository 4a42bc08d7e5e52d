// How one product is cut, decided in one place for lowbit_run and for the engine: integer or float, straight from the bit planes or
// over expanded panels, tokens of a tile, what zero points cost, and how many tokens share a panel.
#pragma once
#include "product.h"

namespace lowbit {

// Up to here the weights stream past straight from their bit planes; beyond, expanding them once pays (measured, docs/notes/cpu.md).
constexpr int64_t kFewTokens = 16;

// The activations of a product in the form that a prepared weight asks for; where they come from and lie is still open.
// Weights of one format and width share it.
struct Form {
    Activations activations;
    bool integer, few, folded, brains;  // folded: fold.h, brains: brains.h
    int panel_blocks;     // blocks of 16 rows that share a panel
    int64_t token_block;  // tokens that share an expanded panel

    int64_t tiles() const;
    int64_t bytes() const;               // room for the activations
    // What must be known of all tokens before the first tile can be made: so many pieces of it, mostly none.
    int64_t stretches() const;
    void balance(int64_t stretch) const;
    void make_ready(int64_t tile) const;
    // Items of one product with a weight of this form: blocks of 16 rows, or token blocks x panels. Weights that are joined share a panel.
    int64_t items(const Header& header, int joined = 1) const;
    void run(const ProductJob& job, int64_t begin, int64_t end) const;
    ProductJob job(const Header& header, int joined = 1) const;
    // Of rows that are not prepared.
    int64_t items(int64_t rows) const;
    ProductJob job(const PlainRows& plain) const;
};

// Whether a product rounds its activations to int8.
bool rounds_to_int8(const Header& header, int compute);
Form plan_form(const Header& header, int64_t tokens, int compute);
// Whether so many tokens meet weights as bf16 on both sides; `brains`: weights that are bf16 already.
bool rounds_to_brains(bool brains, int64_t tokens, int compute);
// Of rows that are not prepared, where that is so.
Form plan_brains(int64_t rows, int64_t cols, int64_t tokens);
// Whether the activations made for one serve the other.
bool same_form(const Form& a, const Form& b);

}  // namespace lowbit
