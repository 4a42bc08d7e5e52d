// Attention of a step: heads normed and rotated, keys and values stored, queries over the cache, partial results merged.
//
// When every sequence has one token, an item is (token, key head, split of its keys): it rotates its own queries, the last split stores
// the newest key and value, and the consumer merges the splits, so that there is one barrier. With more tokens keys and values are stored
// first, because a query needs keys that another thread would be storing; an item, which rotates its own queries, is then (tile of
// tokens, key head).
#include <cmath>
#include <cstring>

#include "step.h"

namespace lowbit {

// The row of all query or key heads of a token where a norm spans them; NULL where heads are read one by one.
const float* Step::source_of_heads(Member& me, int64_t layer, int64_t token, bool keys) {
    if (model_.qk_norm != LOWBIT_WIDTH_NORM) return nullptr;
    const std::vector<int64_t>& places = keys ? plans_.k_places : plans_.q_places;
    const int64_t size = model_.head_dim;
    const float* qkv = work_.qkv.get() + token * plans_.qkv_size;
    float* row = me.room.row.get();
    for (size_t h = 0; h < places.size(); ++h)
        for (int64_t i = 0; i < size; ++i) {
            const float value = qkv[places[h] + i];
            row[static_cast<int64_t>(h) * size + i] = model_.clip > 0.0f ? std::clamp(value, -model_.clip, model_.clip) : value;
        }
    norm(plans_.layers[static_cast<size_t>(layer)].vectors[keys ? LOWBIT_K_NORM : LOWBIT_Q_NORM], row, static_cast<int64_t>(places.size()) * size, row);
    return row;
}

namespace {
inline void turn_pair(float& a, float& b, float cosine, float sine) {
    const float first = a;
    a = first * cosine - b * sine;
    b = b * cosine + first * sine;
}
}  // namespace

// A head of a token where the products left it, and the angles that its pairs turn by.
HeadJob Step::head_of(const Member& me, int64_t layer, int64_t token, int64_t place) const {
    HeadJob job{work_.qkv.get(), me.qkv_type, token * plans_.qkv_size + place, model_.head_dim, nullptr, nullptr, 0, 1.0f};
    const int32_t index = layer < 0 ? -1 : plans_.layers[static_cast<size_t>(layer)].rope;
    if (index < 0) return job;
    job.half = plans_.ropes[static_cast<size_t>(index)].rotary_dim / 2;
    job.cosines = work_.turns.get() + (index * engine_.options.chunk + token) * turn_stride_;
    job.sines = job.cosines + job.half;
    return job;
}

bool Step::turns_neighbours(int64_t layer) const {
    const int32_t index = plans_.layers[static_cast<size_t>(layer)].rope;
    return index >= 0 && plans_.ropes[static_cast<size_t>(index)].pairing == LOWBIT_NEIGHBOURS;
}

namespace {
void clip_head(float* head, int64_t count, float clip) {
    if (clip > 0.0f)
        for (int64_t i = 0; i < count; ++i) head[i] = std::clamp(head[i], -clip, clip);
}

// The norm of one head among several with a weight each.
lowbit_vector at_head(const lowbit_vector& vector, int64_t place) {
    return {vector.weight ? vector.weight + place : nullptr, vector.bias ? vector.bias + place : nullptr};
}
}  // namespace

// One head of a token as the products left it, clipped.
void Step::read_head(const Member& me, int64_t token, int64_t place, float* to) const {
    isa_.turn_head(head_of(me, -1, token, place), to);
    clip_head(to, model_.head_dim, model_.clip);
}

// A query or key normed, turned and scaled. `whole`: the row of all of them, where a norm spans them.
void Step::take_head(const Member& me, int64_t layer, int64_t token, int64_t head, bool key, const float* whole, float* to) const {
    const int64_t size = model_.head_dim, place = (key ? plans_.k_places : plans_.q_places)[static_cast<size_t>(head)];
    const lowbit_vector& vector = plans_.layers[static_cast<size_t>(layer)].vectors[key ? LOWBIT_K_NORM : LOWBIT_Q_NORM];
    HeadJob job = head_of(me, layer, token, place);
    job.factor = key ? 1.0f : model_.attention_scale;
    const bool neighbours = turns_neighbours(layer);
    if (model_.qk_norm == LOWBIT_NO_QK_NORM && model_.clip <= 0.0f && !neighbours) return isa_.turn_head(job, to);
    if (whole) memcpy(to, whole + head * size, static_cast<size_t>(size) * sizeof(float));
    else read_head(me, token, place, to);
    if (model_.qk_norm == LOWBIT_HEAD_NORM) norm(vector, to, size, to);
    if (model_.qk_norm == LOWBIT_HEADS_NORM) norm(at_head(vector, head * size), to, size, to);
    if (neighbours)
        for (int64_t i = 0; i < job.half; ++i) turn_pair(to[2 * i], to[2 * i + 1], job.cosines[i], job.sines[i]);
    else isa_.turn(to, to + job.half, job.cosines, job.sines, job.half);
    if (!key) isa_.scale(to, job.factor, size, to);
}

// One behind another in `to`, or where they lie if that is NULL, as fp32 then.
void Step::turn_queries(Member& me, int64_t layer, int64_t token, int64_t head_begin, int64_t head_end, float* to) {
    const float* whole = source_of_heads(me, layer, token, false);
    for (int64_t h = head_begin; h < head_end; ++h) {
        float* out = to ? to + (h - head_begin) * model_.head_dim : work_.qkv.get() + token * plans_.qkv_size + plans_.q_places[static_cast<size_t>(h)];
        take_head(me, layer, token, h, false, whole, out);
    }
}

void Step::ask_for_head(const Member& me, int64_t token, int64_t place) const {
    const int64_t width = dtype_bytes(me.qkv_type);
    const uint8_t* from = reinterpret_cast<const uint8_t*>(work_.qkv.get()) + (token * plans_.qkv_size + place) * width;
    for (int64_t i = 0; i < model_.head_dim * width; i += kVector) __builtin_prefetch(from + i);
}

// Those of a tile, while the one before it is attended. The products wrote them past the caches, in rows too far apart to be followed.
void Step::ask_for_queries(const Member& me, const Tile& tile, int64_t head) const {
    for (int64_t t = 0; t < tile.count; ++t)
        for (int64_t h = head * plans_.group; h < (head + 1) * plans_.group; ++h) ask_for_head(me, tile.first + t, plans_.q_places[static_cast<size_t>(h)]);
}

// Keys and values of a head, of tokens that share a block of the cache.
void Step::store_heads(Member& me, int64_t layer, int64_t token, int64_t count, int64_t head, const float* whole) {
    const int64_t size = model_.head_dim, v_place = plans_.v_places[static_cast<size_t>(head)];
    const HeadCache cache = engine_.cache.head(layer, slots_[static_cast<size_t>(token)], head);
    float* rows = me.room.queries.get();
    StoreJob job{engine_.cache.type(), model_.head_dim, engine_.cache.padded(), rows, positions_[static_cast<size_t>(token)], count, cache.keys, cache.key_scales};
    for (int64_t i = 0; i < count; ++i) take_head(me, layer, token + i, head, true, whole, rows + i * size);
    isa_.store_keys(job);
    for (int64_t i = 0; i < count; ++i) read_head(me, token + i, v_place, rows + i * size);
    job.to = cache.values;
    job.scales = cache.value_scales;
    isa_.store_values(job);
}

// An item is sixteen tokens of a prompt and one of their key heads; all heads where a norm spans them.
//
// What the next item reads is asked for meanwhile: the products wrote it past the caches, or another thread did into its own, and rows are too
// far apart for the processor to follow. With several threads the next item is most likely that many further.
void Step::prepare_heads(Member& me, int64_t layer, int64_t item) {
    if (turns_whole_rows()) {
        for (int64_t token = item * kKeyBlock; token < std::min((item + 1) * kKeyBlock, count_); ++token) {
            const float* whole = source_of_heads(me, layer, token, true);
            for (int64_t h = 0; h < model_.kv_heads; ++h) store_heads(me, layer, token, 1, h, whole);
            turn_queries(me, layer, token, 0, model_.heads, nullptr);
        }
        return;
    }
    const int64_t next = item + work_.team.size(), first = next / model_.kv_heads * kKeyBlock;
    const auto ahead = static_cast<size_t>(next % model_.kv_heads);
    for (int64_t token = first; token < std::min<int64_t>(first + kKeyBlock, count_); ++token)
        for (int64_t place : {plans_.k_places[ahead], plans_.v_places[ahead]}) ask_for_head(me, token, place);
    const int64_t end = std::min<int64_t>((item / model_.kv_heads + 1) * kKeyBlock, count_);
    for (int64_t token = item / model_.kv_heads * kKeyBlock, count = 0; token < end; token += count) {
        const auto at = static_cast<size_t>(token);
        const int64_t most = std::min(end - token, kKeyBlock - positions_[at] % kKeyBlock);
        for (count = 1; count < most && slots_[at + static_cast<size_t>(count)] == slots_[at]; ++count) {}
        store_heads(me, layer, token, count, item % model_.kv_heads, nullptr);
    }
}

namespace {
AttendJob start_job(const lowbit_model& model, const Cache& cache, const HeadCache& head, int64_t window) {
    AttendJob job{};
    job.head_dim = model.head_dim;
    job.padded = cache.padded();
    job.cache_type = cache.type();
    job.keys = head.keys;
    job.values = head.values;
    job.key_scales = head.key_scales;
    job.value_scales = head.value_scales;
    job.window = window;
    job.soft_cap = model.attention_soft_cap;
    return job;
}
}  // namespace

void Step::attend_one(Member& me, int64_t layer, int64_t item) {
    const int64_t split = item % splits_, pair = item / splits_, head = pair % model_.kv_heads, token = pair / model_.kv_heads;
    const int64_t position = positions_[static_cast<size_t>(token)], window = plans_.layers[static_cast<size_t>(layer)].window;
    const int64_t begin = window ? std::max<int64_t>(position - window + 1, 0) : 0, length = position + 1 - begin;
    const auto border = [&](int64_t s) {
        if (s == splits_) return position + 1;
        return std::max(begin, (begin + length * s / splits_) / kKeyBlock * kKeyBlock);
    };
    if (split == splits_ - 1) store_heads(me, layer, token, 1, head, source_of_heads(me, layer, token, true));
    AttendJob job = start_job(model_, engine_.cache, engine_.cache.head(layer, slots_[static_cast<size_t>(token)], head), window);
    const int64_t group = plans_.group, first_row = item * group;
    turn_queries(me, layer, token, head * group, (head + 1) * group, me.room.queries.get());
    for (int64_t r = 0; r < group; ++r) me.room.positions[r] = position;
    job.queries = me.room.queries.get();
    job.rows = group;
    job.positions = me.room.positions.get();
    job.slopes = model_.alibi ? model_.alibi + head * group : nullptr;
    job.key_begin = border(split);
    job.key_end = border(split + 1);
    job.scores = me.room.scores.get();
    job.room = me.room.bytes.get();
    job.out = splits_ > 1 ? work_.split_out.get() + first_row * job.padded : me.room.out.get();
    job.most = splits_ > 1 ? work_.split_most.get() + first_row : me.room.most.get();
    job.total = splits_ > 1 ? work_.split_total.get() + first_row : me.room.total.get();
    isa_.attend(job);
    if (splits_ > 1) return;
    for (int64_t r = 0; r < group; ++r)
        finish_head(layer, head * group + r, job.out + r * job.padded, job.most[r], job.total[r],
                    work_.attention.get() + token * plans_.q_size + (head * group + r) * model_.head_dim);
}

// The queries of one token that share a key head, turned: only where a norm spans all heads of a token were they turned before.
void Step::gather_queries(Member& me, int64_t layer, int64_t token, int64_t head, float* to) {
    const int64_t group = plans_.group, size = model_.head_dim;
    if (!turns_whole_rows()) return turn_queries(me, layer, token, head * group, (head + 1) * group, to);
    const float* qkv = work_.qkv.get() + token * plans_.qkv_size;
    for (int64_t h = 0; h < group; ++h)
        memcpy(to + h * size, qkv + plans_.q_places[static_cast<size_t>(head * group + h)], static_cast<size_t>(size) * sizeof(float));
}

void Step::attend_tile(Member& me, int64_t layer, const Tile& tile, int64_t head) {
    const int64_t group = plans_.group, size = model_.head_dim;
    const int64_t window = plans_.layers[static_cast<size_t>(layer)].window;
    AttendJob job = start_job(model_, engine_.cache, engine_.cache.head(layer, tile.slot, head), window);
    job.rows = tile.count * group;
    for (int64_t t = 0; t < tile.count; ++t) gather_queries(me, layer, tile.first + t, head, me.room.queries.get() + t * group * size);
    for (int64_t r = 0; r < job.rows; ++r) {
        me.room.positions[r] = tile.position + r / group;
        if (model_.alibi) me.room.slopes[r] = model_.alibi[head * group + r % group];
    }
    job.queries = me.room.queries.get();
    job.positions = me.room.positions.get();
    job.slopes = model_.alibi ? me.room.slopes.get() : nullptr;
    job.key_begin = window ? std::max<int64_t>(tile.position - window + 1, 0) : 0;
    job.key_end = tile.position + tile.count;
    job.scores = me.room.scores.get();
    job.room = me.room.bytes.get();
    job.out = me.room.out.get();
    job.most = me.room.most.get();
    job.total = me.room.total.get();
    isa_.attend(job);
    for (int64_t r = 0; r < job.rows; ++r) {
        const int64_t token = tile.first + r / group, query = head * group + r % group;
        finish_head(layer, query, job.out + r * job.padded, job.most[r], job.total[r], work_.attention.get() + token * plans_.q_size + query * size);
    }
}

void Step::finish_head(int64_t layer, int64_t head, const float* out, float most, float total, float* to) const {
    const float* sinks = plans_.layers[static_cast<size_t>(layer)].vectors[LOWBIT_SINKS].weight;
    if (sinks) total += std::exp(sinks[head] - most);
    const float share = 1.0f / total;
    isa_.scale(out, share, model_.head_dim, to);
}

void Step::merge_splits(const Member& me, int64_t layer, int64_t token, float* to) const {
    const int64_t group = plans_.group, padded = engine_.cache.padded(), size = model_.head_dim;
    float* sum = me.room.branch.get();
    for (int64_t h = 0; h < model_.heads; ++h) {
        const int64_t first = (token * model_.kv_heads + h / group) * splits_ * group + h % group;
        float most = work_.split_most[first], total = 0.0f;
        for (int64_t s = 1; s < splits_; ++s) most = std::max(most, work_.split_most[first + s * group]);
        std::fill(sum, sum + padded, 0.0f);
        for (int64_t s = 0; s < splits_; ++s) {
            const int64_t row = first + s * group;
            const float weight = std::exp(work_.split_most[row] - most);
            total += weight * work_.split_total[row];
            isa_.add_scaled(sum, work_.split_out.get() + row * padded, weight, size);
        }
        finish_head(layer, h, sum, most, total, to + h * size);
    }
}

}  // namespace lowbit
