// Where the first NaN or infinity of a step comes from. The logits are looked at in every step; the stages before them on request,
// by the thread that arrives last at a barrier, while the others wait for it.
#include <cstring>

#include "error.h"
#include "map_guard.h"
#include "step.h"

namespace lowbit {

namespace {
bool all_finite_brains(const uint16_t* x, int64_t count) {
    constexpr uint16_t kExponent = 0x7f80;
    uint16_t wrong = 0;
    for (int64_t i = 0; i < count; ++i) wrong |= static_cast<uint16_t>((x[i] & kExponent) == kExponent);
    return wrong == 0;
}
}  // namespace

bool all_finite(const float* x, int64_t count) {
    constexpr uint32_t kExponent = 0x7f800000;
    uint32_t wrong = 0;  // one flag for all, so that the loop has no exits and becomes vectors
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        wrong |= static_cast<uint32_t>((bits & kExponent) == kExponent);
    }
    return wrong == 0;
}

void Step::expect_numbers(const Member& me, const char* stage, const float* data, int64_t rows, int64_t width, int type) {
    const uint16_t* brains = reinterpret_cast<const uint16_t*>(data);
    for (int64_t row = 0; row < rows && !engine_.fault.found; ++row) {
        const bool numbers = type == LOWBIT_BF16 ? all_finite_brains(brains + row * width, width) : all_finite(data + row * width, width);
        if (!numbers) engine_.fault = {true, stage, me.layer, row * count_ / rows};
    }
}

void Step::inspect(const Member& me, lowbit_profile_part part, bool end_of_layer) {
    if (engine_.fault.found) return;
    if (me.layer >= 0) return inspect_layer(me, part, end_of_layer);
    if (part != LOWBIT_PART_EMBED) return;
    const bool narrow = static_cast<bool>(plans_.embedding_in);
    expect_numbers(me, "the embedding", narrow ? work_.narrow.get() : work_.hidden.get(), count_, narrow ? model_.embedding_width : model_.hidden_size);
}

void Step::inspect_layer(const Member& me, lowbit_profile_part part, bool end_of_layer) {
    const bool sparse = plans_.layers[static_cast<size_t>(me.layer)].sparse;
    const int64_t size = model_.hidden_size, inner = model_.mlp.size;
    switch (part) {
        case LOWBIT_PART_QKV: return expect_numbers(me, "the query, key and value projections", work_.qkv.get(), count_, plans_.qkv_size, me.qkv_type);
        case LOWBIT_PART_ATTENTION:
            if (decoding_ && splits_ > 1)
                return expect_numbers(me, "attention", work_.split_total.get(), count_, model_.kv_heads * splits_ * plans_.group);
            return expect_numbers(me, "attention", work_.attention.get(), count_, plans_.q_size);
        case LOWBIT_PART_OUTPUT: return expect_numbers(me, "the output projection of attention", work_.branches[0].get(), count_, size, me.branch_types[0]);
        case LOWBIT_PART_MLP:
            if (sparse && end_of_layer) {
                expect_numbers(me, "the router", work_.router.get(), count_, model_.expert_count);
                return expect_numbers(me, "the experts", work_.expert_out.get(), count_ * model_.top_k, size);
            }
            if (sparse) return;
            if (end_of_layer) return expect_numbers(me, "the down projection of the MLP", work_.branches[1].get(), count_, size, me.branch_types[1]);
            return expect_numbers(me, "the gate and up projections of the MLP", work_.gate.get(), count_, plans_.plans[static_cast<size_t>(me.layer)].gate_up ? 2 * inner : inner,
                                  me.gate_type);
        default: return;
    }
}

int check_maps(const Plans& plans) {
    if (!some_map_damaged.load(std::memory_order_relaxed)) return LOWBIT_OK;
    for (const lowbit_matrix& matrix : plans.model.matrices)
        if (int status = check_mapped(matrix.data)) return status;
    for (const lowbit_layer& layer : plans.layers) {
        for (const lowbit_matrix& matrix : layer.matrices)
            if (int status = check_mapped(matrix.data)) return status;
        for (const lowbit_vector& vector : layer.vectors)
            if (int status = check_mapped(vector.weight)) return status;
    }
    return LOWBIT_OK;
}

int refuse_logits(const Engine& engine) {
    const Fault& fault = engine.fault;
    if (!engine.checking)
        return fail(LOWBIT_NOT_FINITE, "the logits are not numbers (NaN or infinite): a weight is damaged or an activation overflowed; --check (check=True) names the layer");
    const long long layer = static_cast<long long>(fault.layer), token = static_cast<long long>(fault.token);
    if (!fault.found) return fail(LOWBIT_NOT_FINITE, "the first NaN or infinity appears in the final norm or the head, after the last layer");
    if (fault.layer < 0) return fail(LOWBIT_NOT_FINITE, "the first NaN or infinity appears in %s, at token %lld of the step", fault.stage, token);
    return fail(LOWBIT_NOT_FINITE, "the first NaN or infinity appears in layer %lld, in %s, at token %lld of the step", layer, fault.stage, token);
}

}  // namespace lowbit
