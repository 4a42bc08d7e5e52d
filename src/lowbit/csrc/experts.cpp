// Mixtures of experts inside a step. Tokens are sorted by expert, so that every expert's weights are read once for all its tokens:
//
//   [norm] router, shared experts | choose, sort | gather | gate and up of all experts | activate | down of all experts
//
// The weighted sum over a token's experts is taken by whoever joins the branch to the hidden state.
#include <cmath>
#include <cstring>

#include "step.h"

namespace lowbit {
namespace {

float logistic(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace

void Step::sparse_mlp(Member& me, int64_t layer) {
    const LayerPlan& plan = plans_.plans[static_cast<size_t>(layer)];
    const int64_t size = model_.hidden_size;
    const bool sequential = model_.residual == LOWBIT_SEQUENTIAL;
    const bool normed = model_.placement == LOWBIT_PRE || model_.placement == LOWBIT_SANDWICH;
    // The rows are read again for the experts, by everybody: one shared copy.
    Rows x = own_rows(me);
    x.stride = size;
    ready(me, x, count_, {&plan.router, &plan.shared_gate, &plan.shared_up, &plan.shared_router}, [&](int64_t token, float* to) {
        if (sequential) join(me, token);
        if (normed) norm(plan.source->vectors[LOWBIT_MLP_NORM], me.hidden + token * size, size, to);
        else memcpy(to, me.hidden + token * size, static_cast<size_t>(size) * sizeof(float));
        if (alone_ && me.index == 0) memcpy(work_.expert_x.get() + token * size, to, static_cast<size_t>(size) * sizeof(float));
    });
    Task tasks[4];
    int count = 0;
    tasks[count++] = task_of(me, plan.router, work_.router.get(), model_.expert_count);
    if (plan.shared_gate) {
        tasks[count++] = task_of(me, plan.shared_gate, work_.shared_gate.get(), model_.shared.size);
        tasks[count++] = task_of(me, plan.shared_up, work_.shared_up.get(), model_.shared.size);
        tasks[count++] = task_of(me, plan.shared_router, work_.shared_router.get(), 1);
    }
    run_tasks(me, tasks, count, {});
    mark(me, LOWBIT_PART_MLP);
    work_.team.meet(me.index, [&] { route(layer); }, [](int) {});
    mark(me, LOWBIT_PART_BARRIER);
    expert_products(me, layer);
    if (plan.shared_gate) {
        Rows rows = own_rows(me);
        rows.stride = model_.shared.size;
        ready(me, rows, count_, {&plan.shared_down}, [&](int64_t token, float* to) {
            const int64_t place = token * model_.shared.size;
            isa_.activate(model_.shared, work_.shared_gate.get() + place, work_.shared_up.get() + place, model_.shared.size, to);
        });
        Task down = task_of(me, plan.shared_down, work_.shared_out.get(), size);
        run_tasks(me, &down, 1, {});
        meet(me, LOWBIT_PART_MLP);
    }
    me.pending = {sequential ? -1 : layer, layer};
    me.branch_types[1] = LOWBIT_FP32;
    meet(me, LOWBIT_PART_MLP, true);
}

void Step::choose_experts(int64_t token) {
    const int64_t experts = model_.expert_count, chosen = model_.top_k;
    float* logits = work_.router.get() + token * experts;
    float most = logits[0], total = 0.0f, kept = 0.0f;
    for (int64_t e = 1; e < experts; ++e) most = std::max(most, logits[e]);
    for (int64_t e = 0; e < experts; ++e) total += logits[e] = std::exp(logits[e] - most);
    for (int64_t rank = 0; rank < chosen; ++rank) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; ++e) best = logits[e] > logits[best] ? e : best;
        const int64_t place = token * chosen + rank;
        work_.assigned_place[place] = static_cast<int32_t>(best);  // the expert for now; its place follows from sorting
        work_.assigned_weight[place] = logits[best] / total;
        kept += logits[best] / total;
        logits[best] = -1.0f;
    }
    if (model_.normalize_experts)
        for (int64_t rank = 0; rank < chosen; ++rank) work_.assigned_weight[token * chosen + rank] /= kept;
}

// The last thread at the barrier chooses for all tokens and sorts the choices by expert.
void Step::route(int64_t) {
    const int64_t experts = model_.expert_count, assigned = count_ * model_.top_k;
    std::vector<int64_t>& begin = work_.expert_begin;
    std::fill(begin.begin(), begin.end(), 0);
    for (int64_t token = 0; token < count_; ++token) choose_experts(token);
    for (int64_t i = 0; i < assigned; ++i) ++begin[static_cast<size_t>(work_.assigned_place[i]) + 1];
    for (int64_t e = 0; e < experts; ++e) begin[static_cast<size_t>(e) + 1] += begin[static_cast<size_t>(e)];
    std::vector<int64_t>& next = work_.expert_next;
    std::copy(begin.begin(), begin.end(), next.begin());
    for (int64_t i = 0; i < assigned; ++i) {
        const int64_t place = next[static_cast<size_t>(work_.assigned_place[i])]++;
        work_.assigned_token[place] = static_cast<int32_t>(i / model_.top_k);
        work_.assigned_place[i] = static_cast<int32_t>(place);
    }
}

void Step::expert_products(Member& me, int64_t layer) {
    const lowbit_layer& source = plans_.layers[static_cast<size_t>(layer)];
    const int64_t size = model_.hidden_size, inner = model_.expert.size;
    const float* x = alone_ ? work_.expert_x.get() : work_.x.get();
    float* gathered = work_.expert_x.get() + engine_.options.chunk * size;  // behind the copy of the input
    std::vector<ExpertTask>& work = me.room.expert_tasks;
    // One product per expert that got tokens, over its rows; every thread lists them alike.
    const auto list = [&](const lowbit_matrix& matrix, float* rows, int64_t width, float* y) {
        work.clear();
        int64_t used = 0;
        for (int64_t e = 0; e < model_.expert_count; ++e) {
            const int64_t begin = work_.expert_begin[static_cast<size_t>(e)], end = work_.expert_begin[static_cast<size_t>(e) + 1];
            if (begin == end) continue;
            work.emplace_back();
            ExpertTask& expert = work.back();
            expert.task.view = view_of(matrix, e);
            expert.first = begin;
            expert.input.start(rows + begin * width, LOWBIT_FP32, width, end - begin);
            expert.task.form = expert.input.form_for(expert.task.view, engine_.options.compute, work_.expert_packed.get(), &used);
            expert.task.input = &expert.input;
            expert.task.y = y + begin * matrix.rows;
            expert.task.y_stride = matrix.rows;
        }
    };
    const auto multiply = [&] {
        int64_t total = 0;
        for (ExpertTask& expert : work) {
            expert.task.plan(1);
            total += expert.task.items;
        }
        work_.team.share(total, 1, [&](int64_t item, int64_t) {
            size_t i = 0;
            for (; item >= work[i].task.items; ++i) item -= work[i].task.items;
            work[i].task.run(item);
        });
        meet(me, LOWBIT_PART_MLP);
    };
    list(source.matrices[LOWBIT_EXPERTS_GATE_UP], gathered, size, work_.expert_gate.get());
    work_.team.share(static_cast<int64_t>(work.size()), 1, [&](int64_t index, int64_t) {
        const auto& [input, task, first] = work[static_cast<size_t>(index)];
        for (int64_t i = 0; i < input.tokens; ++i)
            memcpy(gathered + (first + i) * size, x + work_.assigned_token[first + i] * size, static_cast<size_t>(size) * sizeof(float));
        input.make_all_ready();
    });
    meet(me, LOWBIT_PART_NORM);
    multiply();
    float* mid = gathered;  // its rows have been read
    list(source.matrices[LOWBIT_EXPERTS_DOWN], mid, inner, work_.expert_out.get());
    work_.team.share(static_cast<int64_t>(work.size()), 1, [&](int64_t index, int64_t) {
        const auto& [input, task, first] = work[static_cast<size_t>(index)];
        float* parted = me.room.parted.get();
        for (int64_t i = first; i < first + input.tokens; ++i) {
            const float* both = work_.expert_gate.get() + i * 2 * inner;
            if (model_.expert.gate == LOWBIT_INTERLEAVED) {
                for (int64_t k = 0; k < inner; ++k) {
                    parted[k] = both[2 * k];
                    parted[inner + k] = both[2 * k + 1];
                }
                both = parted;
            }
            isa_.activate(model_.expert, both, both + inner, inner, mid + i * inner);
        }
        input.make_all_ready();
    });
    meet(me, LOWBIT_PART_NORM);
    multiply();
}

void Step::sum_experts(int64_t token, float* to) const {
    const int64_t size = model_.hidden_size;
    memset(to, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t i = token * model_.top_k; i < (token + 1) * model_.top_k; ++i)
        isa_.add_scaled(to, work_.expert_out.get() + work_.assigned_place[i] * size, work_.assigned_weight[i], size);
    if (model_.shared.size > 0) isa_.add_scaled(to, work_.shared_out.get() + token * size, logistic(work_.shared_router[token]), size);
}

}  // namespace lowbit
