#include "step.h"

#include <cmath>
#include <cstring>

#include "prepared_row.h"

namespace lowbit {

Step::Step(Engine& engine, const int32_t* tokens, const std::vector<Sequence>& sequences, const std::vector<int64_t>& wanted, int64_t count,
           float* logits)
    : engine_(engine),
      plans_(engine.plans),
      model_(engine.plans.model),
      isa_(engine_isa()),
      work_(engine.work),
      tokens_(tokens),
      sequences_(sequences),
      wanted_(wanted),
      count_(count),
      logits_(logits),
      alone_(count <= kAloneTokens) {
    positions_.resize(static_cast<size_t>(count));
    slots_.resize(static_cast<size_t>(count));
    for (const Sequence& sequence : sequences)
        for (int64_t i = 0; i < sequence.count; ++i) {
            positions_[static_cast<size_t>(sequence.first + i)] = sequence.start + i;
            slots_[static_cast<size_t>(sequence.first + i)] = sequence.slot;
        }
    for (const lowbit_rope& rope : plans_.ropes) turn_stride_ = std::max<int64_t>(turn_stride_, rope.rotary_dim);
    plan_attention();
}

void Step::plan_attention() {
    decoding_ = true;
    int64_t longest = 1;
    for (const Sequence& sequence : sequences_) {
        decoding_ = decoding_ && sequence.count == 1;
        longest = std::max(longest, sequence.start + sequence.count);
    }
    if (decoding_) {
        const int64_t wanted = divide_up(work_.threads * kItemsPerThread, count_ * model_.kv_heads);
        splits_ = std::max<int64_t>(std::min(wanted, longest / kSplitKeys), 1);
        return;
    }
    const int64_t size = std::max<int64_t>(kTileRows / plans_.group, 1);
    for (const Sequence& sequence : sequences_)
        for (int64_t i = 0; i < sequence.count; i += size)
            tiles_.push_back({sequence.first + i, std::min(size, sequence.count - i), sequence.start + i, sequence.slot});
    // Not where numbers are checked, of every token in every layer.
    narrows_ = !alone_ && !engine_.checking && 2 * static_cast<int64_t>(wanted_.size()) <= count_;
    if (narrows_)
        for (int64_t token : wanted_) last_tiles_.push_back({token, 1, positions_[static_cast<size_t>(token)], slots_[static_cast<size_t>(token)]});
}

void Step::work(int index) {
    Room& room = work_.rooms[static_cast<size_t>(index)];
    Member me{index, room, alone_ ? room.hidden.get() : work_.hidden.get(), {}, {}, std::chrono::steady_clock::now()};
    embed(me);
    for (int64_t layer = 0; layer < model_.layer_count; ++layer) {
        me.layer = layer;
        heads(me, layer);
        if (narrows_at(layer) && wanted_.empty()) return;
        attention(me, layer);
        if (stopped_) return;
        if (plans_.layers[static_cast<size_t>(layer)].sparse) sparse_mlp(me, layer);
        else dense_mlp(me, layer);
        if (stopped_) return;
    }
    me.layer = -1;
    head(me);
}

// --- barriers and time ---

void Step::mark(Member& me, lowbit_profile_part part) {
    if (!engine_.profiling || me.index != 0) return;
    const auto now = std::chrono::steady_clock::now();
    engine_.profile[part] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - me.last).count();
    me.last = now;
}

void Step::meet(Member& me, lowbit_profile_part part, bool may_stop) {
    mark(me, part);
    if (engine_.profiling && me.index == 0) ++engine_.profile[LOWBIT_PART_BARRIERS];
    work_.team.meet(me.index, [&] {
        if (engine_.checking) inspect(me, part, may_stop);
        if (part == LOWBIT_PART_ATTENTION && narrows_at(me.layer)) narrow();
        if (may_stop && engine_.cancelled.load(std::memory_order_relaxed)) stopped_ = true;
    }, [&](int waited) {
        if (!me.coming || waited >= kIdleFetches) return;
        const uint8_t* ahead = me.coming + kAhead + 2 * waited * kVector;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kVector);
    });
    mark(me, LOWBIT_PART_BARRIER);
}

// --- the way in ---

void Step::embed(Member& me) {
    work_.team.share(count_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) read_embedding(me, token);
    });
    for (const Sequence& sequence : sequences_)
        for (int64_t i = 0; i < sequence.count; ++i)
            if ((sequence.first + i) % work_.team.size() == me.index) turn_angles(sequence.first + i, sequence);
    meet(me, LOWBIT_PART_EMBED);
    const int64_t hidden = model_.hidden_size;
    if (plans_.embedding_in) {
        ready(me, {work_.narrow.get(), model_.embedding_width}, count_, {&plans_.embedding_in}, [](int64_t, float*) {});
        Task task = task_of(me, plans_.embedding_in, work_.hidden.get(), hidden);
        run_tasks(me, &task, 1, {});
        meet(me, LOWBIT_PART_EMBED);
        work_.team.share(count_, 1, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) finish_embedding(me, token);
        });
        meet(me, LOWBIT_PART_EMBED);
    }
    if (alone_) memcpy(me.hidden, work_.hidden.get(), static_cast<size_t>(count_ * hidden) * sizeof(float));
}

void Step::read_embedding(Member& me, int64_t token) {
    float* to = plans_.embedding_in ? work_.narrow.get() + token * model_.embedding_width : work_.hidden.get() + token * model_.hidden_size;
    read_row(plans_.embedding, tokens_[token], to);
    for (int64_t i = 0; i < model_.embedding_width; ++i) to[i] *= model_.embedding_multiplier;
    if (!plans_.embedding_in) finish_embedding(me, token);
}

void Step::finish_embedding(Member& me, int64_t token) {
    const int64_t size = model_.hidden_size;
    float* hidden = work_.hidden.get() + token * size;
    const View table = view_of(model_.matrices[LOWBIT_POSITIONS]);
    if (table) {
        read_row(table, positions_[static_cast<size_t>(token)] + model_.position_offset, me.room.branch.get());
        isa_.add_scaled(hidden, me.room.branch.get(), 1.0f, size);
    }
    if (model_.embedding_norm) norm(model_.vectors[LOWBIT_EMBEDDING_NORM], hidden, size, hidden);
}

// Cosines and sines of one token for every kind of rotary positions that the model has.
void Step::turn_angles(int64_t token, const Sequence& sequence) {
    const double position = static_cast<double>(positions_[static_cast<size_t>(token)]);
    const int64_t length = std::max(sequence.start + sequence.count, engine_.expected[static_cast<size_t>(sequence.slot)]);
    for (size_t r = 0; r < plans_.ropes.size(); ++r) {
        const lowbit_rope& rope = plans_.ropes[r];
        const int half = rope.rotary_dim / 2;
        float* to = work_.turns.get() + (static_cast<int64_t>(r) * engine_.options.chunk + token) * turn_stride_;
        const bool past = rope.change != LOWBIT_ROPE_FIXED && length > rope.trained_positions;
        const float* table = past && rope.change == LOWBIT_ROPE_LONG ? rope.long_frequencies : rope.frequencies;
        const double trained = rope.trained_positions, factor = static_cast<double>(rope.factor);
        const double stretch = factor * static_cast<double>(length) / trained - (factor - 1.0);
        const double theta = rope.theta * std::pow(stretch, rope.rotary_dim / (rope.rotary_dim - 2.0));
        for (int i = 0; i < half; ++i) {
            double frequency = static_cast<double>(table[i]);
            if (past && rope.change == LOWBIT_ROPE_DYNAMIC) frequency = static_cast<double>(static_cast<float>(std::pow(theta, -2.0 * i / rope.rotary_dim)));
            const double angle = position * frequency, scale = static_cast<double>(rope.attention_factor);
            to[i] = static_cast<float>(std::cos(angle) * scale);
            to[half + i] = static_cast<float>(std::sin(angle) * scale);
        }
    }
}

// --- the hidden state ---

void Step::norm(const lowbit_vector& vector, const float* x, int64_t count, float* y) const {
    isa_.normalize({model_.norm_kind, model_.norm_eps, vector}, x, count, y);
}

void Step::join(Member& me, int64_t token) {
    if (me.pending.attention >= 0) add_branch(me, me.pending.attention, 0, token);
    if (me.pending.mlp >= 0) add_branch(me, me.pending.mlp, 1, token);
}

void Step::add_branch(Member& me, int64_t layer, int branch, int64_t token) {
    const int64_t size = model_.hidden_size;
    const lowbit_layer& source = plans_.layers[static_cast<size_t>(layer)];
    const float* y = work_.branches[branch].get() + token * size;
    float* hidden = me.hidden + token * size;
    float* own = me.room.branch.get();
    if (me.branch_types[branch] != LOWBIT_FP32) {
        isa_.widen(work_.branches[branch].get(), me.branch_types[branch], token * size, size, own);
        y = own;
    }
    if (branch == 1 && source.sparse) {
        sum_experts(token, own);
        y = own;
    }
    if (model_.placement == LOWBIT_POST || model_.placement == LOWBIT_SANDWICH) {
        norm(source.vectors[branch == 0 ? LOWBIT_ATTENTION_POST_NORM : LOWBIT_MLP_POST_NORM], y, size, own);
        y = own;
    }
    isa_.add_scaled(hidden, y, model_.residual_multiplier, size);
    if (model_.placement == LOWBIT_AFTER_SUM)
        norm(source.vectors[branch == 0 ? LOWBIT_ATTENTION_NORM : LOWBIT_MLP_NORM], hidden, size, hidden);
}

Step::Rows Step::own_rows(Member& me) const {
    return {alone_ ? me.room.x.get() : work_.x.get(), 0};
}

Step::Rows Step::passing_rows(Member& me) const {
    return {own_rows(me).data, model_.hidden_size, LOWBIT_FP32, me.room.near.get()};
}

// --- the branches ---

// Queries, keys and values of all tokens; of a prompt also the keys and values stored.
void Step::heads(Member& me, int64_t layer) {
    const LayerPlan& plan = plans_.plans[static_cast<size_t>(layer)];
    const int64_t size = model_.hidden_size, width = plans_.qkv_size;
    const bool normed = model_.placement == LOWBIT_PRE || model_.placement == LOWBIT_SANDWICH;
    const Rows x = passing_rows(me);
    ready(me, x, count_, {&plan.q, &plan.k, &plan.v, &plan.qkv}, [&](int64_t token, float* to) {
        join(me, token);
        if (normed) norm(plan.source->vectors[LOWBIT_ATTENTION_NORM], me.hidden + token * size, size, to);
        else memcpy(to, me.hidden + token * size, static_cast<size_t>(size) * sizeof(float));
    });
    float* qkv = work_.qkv.get();
    Task tasks[3];
    int count = 0;
    if (plan.qkv) {
        tasks[count++] = task_of(me, plan.qkv, qkv, width);
    } else {
        for (const View* view : {&plan.q, &plan.k, &plan.v}) tasks[count++] = task_of(me, *view, qkv, width);
    }
    me.qkv_type = write_to(tasks, count, qkv, turns_whole_rows());
    run_tasks(me, tasks, count, {{&plan.o}});
    meet(me, LOWBIT_PART_QKV);
    if (decoding_) return;
    work_.team.share(head_items(), 1, [&](int64_t item, int64_t) { prepare_heads(me, layer, item); });
    meet(me, LOWBIT_PART_ROPE);
}

void Step::attention(Member& me, int64_t layer) {
    const LayerPlan& plan = plans_.plans[static_cast<size_t>(layer)];
    const int64_t size = model_.hidden_size;
    const std::vector<Tile>& tiles = narrows_at(layer) ? last_tiles_ : tiles_;
    const int64_t items = decoding_ ? count_ * model_.kv_heads * splits_ : static_cast<int64_t>(tiles.size()) * model_.kv_heads;
    work_.team.share(items, 1, [&](int64_t item, int64_t) {
        if (decoding_) return attend_one(me, layer, item);
        const int64_t at = items - 1 - item;  // the last tokens see the most keys: longest work first
        const int64_t next = at - work_.team.size();  // most likely
        if (next >= 0) ask_for_queries(me, tiles[static_cast<size_t>(next / model_.kv_heads)], next % model_.kv_heads);
        attend_tile(me, layer, tiles[static_cast<size_t>(at / model_.kv_heads)], at % model_.kv_heads);
    });
    meet(me, LOWBIT_PART_ATTENTION);
    const bool split = decoding_ && splits_ > 1;
    Rows rows = {work_.attention.get(), plans_.q_size};
    if (split && alone_) rows.data = me.room.x.get();
    ready(me, rows, count_, {&plan.o}, [&](int64_t token, float* to) {
        if (split) merge_splits(me, layer, token, to);
    });
    Task output = task_of(me, plan.o, work_.branches[0].get(), size);
    me.branch_types[0] = write_to(&output, 1, work_.branches[0].get(), false);
    run_tasks(me, &output, 1, plan.gate_up ? Following{{&plan.gate_up}} : plan.gate ? Following{{&plan.gate}, &plan.up} : Following{{&plan.up}});
    meet(me, LOWBIT_PART_OUTPUT, true);
    me.pending = {layer, -1};
}

void Step::dense_mlp(Member& me, int64_t layer) {
    const LayerPlan& plan = plans_.plans[static_cast<size_t>(layer)];
    const lowbit_mlp& mlp = model_.mlp;
    const int64_t size = model_.hidden_size;
    const bool sequential = model_.residual == LOWBIT_SEQUENTIAL, shared = model_.residual == LOWBIT_PARALLEL_SHARED;
    const bool normed = model_.placement == LOWBIT_PRE || model_.placement == LOWBIT_SANDWICH;
    const Rows x = passing_rows(me);
    ready(me, x, count_, {&plan.gate, &plan.up, &plan.gate_up}, [&](int64_t token, float* to) {
        if (sequential) join(me, token);
        if (normed) norm(plan.source->vectors[shared ? LOWBIT_ATTENTION_NORM : LOWBIT_MLP_NORM], me.hidden + token * size, size, to);
        else memcpy(to, me.hidden + token * size, static_cast<size_t>(size) * sizeof(float));
    });
    Task tasks[2];
    int count = 1;
    bool activated = true;
    if (plan.gate_up) {
        tasks[0] = task_of(me, plan.gate_up, work_.gate.get(), 2 * mlp.size);
        activated = false;
    } else if (!plan.gate) {
        tasks[0] = task_of(me, plan.up, work_.gate.get(), mlp.size);
        tasks[0].mlp = &mlp;
    } else {
        tasks[0] = task_of(me, plan.gate, work_.gate.get(), mlp.size);
        tasks[1] = task_of(me, plan.up, work_.up.get(), mlp.size);
        activated = tasks[0].pairs_with(plan.up, tasks[1].form);
        count = activated ? 1 : 2;
        if (activated) {
            tasks[0].second = plan.up;
            tasks[0].second_form = tasks[1].form;
            tasks[0].z = work_.up.get();
            tasks[0].mlp = &mlp;
        }
    }
    const bool joined = count == 1 && tasks[0].joins();
    me.gate_type = joined ? write_to(tasks, 1, work_.gate.get(), !plan.down.header || !plan_form(*plan.down.header, count_, engine_.options.compute).folded) : LOWBIT_FP32;
    run_tasks(me, tasks, count, {{&plan.down}});
    meet(me, LOWBIT_PART_MLP);
    Rows rows = {work_.gate.get(), mlp.size, me.gate_type};
    if (!activated) rows.data = own_rows(me).data;
    ready(me, rows, count_, {&plan.down}, [&](int64_t token, float* to) {
        if (activated) return;
        const float* both = work_.gate.get() + token * (plan.gate_up ? 2 * mlp.size : mlp.size);
        isa_.activate(mlp, both, plan.gate_up ? both + mlp.size : work_.up.get() + token * mlp.size, mlp.size, to);
    });
    Task down = task_of(me, plan.down, work_.branches[1].get(), size);
    me.branch_types[1] = write_to(&down, 1, work_.branches[1].get(), false);
    run_tasks(me, &down, 1, first_of(layer + 1));
    me.pending = {sequential ? -1 : layer, layer};
    meet(me, LOWBIT_PART_MLP, true);
}

// --- the way out ---

// What nobody asked for stays behind: of the last layer the other tokens' keys and values were all that later tokens will read.
void Step::narrow() {
    int64_t row = 0;
    const auto move = [&](float* rows, int64_t width, int64_t from) {
        if (from != row) memcpy(rows + row * width, rows + from * width, static_cast<size_t>(width) * sizeof(float));
    };
    for (int64_t& token : wanted_) {
        move(work_.hidden.get(), model_.hidden_size, token);
        move(work_.attention.get(), plans_.q_size, token);
        token = row++;
    }
    count_ = row;
}

void Step::head(Member& me) {
    const int64_t count = static_cast<int64_t>(wanted_.size()), size = model_.hidden_size, vocab = model_.vocab_size;
    if (count == 0) return;
    const View& first = plans_.head_in ? plans_.head_in : plans_.head;
    const Rows x = passing_rows(me);
    ready(me, x, count, {&first}, [&](int64_t index, float* to) {
        const int64_t token = wanted_[static_cast<size_t>(index)];
        join(me, token);
        if (model_.final_norm) norm(model_.vectors[LOWBIT_FINAL_NORM], me.hidden + token * size, size, to);
        else memcpy(to, me.hidden + token * size, static_cast<size_t>(size) * sizeof(float));
    });
    if (plans_.head_in) {
        Task task = task_of(me, plans_.head_in, work_.narrow.get(), model_.embedding_width);
        run_tasks(me, &task, 1, {});
        meet(me, LOWBIT_PART_HEAD);
        ready(me, {work_.narrow.get(), model_.embedding_width}, count, {&plans_.head}, [](int64_t, float*) {});
    }
    Task task = task_of(me, plans_.head, logits_, vocab);
    task.multiplier = model_.head_multiplier;
    task.soft_cap = model_.head_soft_cap;
    run_tasks(me, &task, 1, {});
    mark(me, LOWBIT_PART_HEAD);
}

int run_step(Engine& engine, const int32_t* tokens, const std::vector<Sequence>& sequences, const std::vector<int64_t>& wanted,
             int64_t count, float* logits) {
    Step step(engine, tokens, sequences, wanted, count, logits);
    Team::run(engine.work.team, engine.work.threads, [&](int member) { step.work(member); });
    if (engine.profiling) ++engine.profile[LOWBIT_PART_STEPS];
    if (step.stopped()) return LOWBIT_CANCELLED;
    return LOWBIT_OK;
}

}  // namespace lowbit
