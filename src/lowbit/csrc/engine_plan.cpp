// A model's description, checked and turned into what a step needs; and the buffers of a step.
#include "engine.h"
#include "error.h"

namespace lowbit {
namespace {

struct Wanted {
    const char* name;
    const lowbit_matrix* matrix;
    int64_t rows, cols, count;
};

int check_tight_matrix(const Wanted& wanted, int64_t layer) {
    const lowbit_matrix& matrix = *wanted.matrix;
    for (int64_t i = 0; i < matrix.count; ++i) {
        const TightHeader* header = check_tight(static_cast<const uint8_t*>(matrix.data) + i * matrix.bytes, matrix.bytes);
        if (!header) return LOWBIT_BAD_ARGUMENT;
        if (header->rows != wanted.rows || header->cols != wanted.cols)
            return fail(LOWBIT_BAD_ARGUMENT, "the tight %s weight of layer %lld is [%lld, %lld], the model's sizes ask for [%lld, %lld]", wanted.name,
                        static_cast<long long>(layer), static_cast<long long>(header->rows), static_cast<long long>(header->cols),
                        static_cast<long long>(wanted.rows), static_cast<long long>(wanted.cols));
    }
    return LOWBIT_OK;
}

int check_matrix(const Wanted& wanted, int64_t layer) {
    const lowbit_matrix& matrix = *wanted.matrix;
    const long long at = static_cast<long long>(layer);
    if (matrix.kind == LOWBIT_ABSENT) return fail(LOWBIT_BAD_ARGUMENT, "layer %lld has no %s weight (-1: outside the layers)", at, wanted.name);
    if (matrix.rows != wanted.rows || matrix.cols != wanted.cols || matrix.count != wanted.count)
        return fail(LOWBIT_BAD_ARGUMENT, "the %s weight of layer %lld is [%lld, %lld, %lld], the model's sizes ask for [%lld, %lld, %lld]", wanted.name,
                    at, static_cast<long long>(matrix.count), static_cast<long long>(matrix.rows), static_cast<long long>(matrix.cols),
                    static_cast<long long>(wanted.count), static_cast<long long>(wanted.rows), static_cast<long long>(wanted.cols));
    if (!matrix.data) return fail(LOWBIT_BAD_ARGUMENT, "the %s weight of layer %lld has no data", wanted.name, at);
    if (matrix.bytes < 0 || matrix.bytes > kMostElements)
        return fail(LOWBIT_BAD_ARGUMENT, "the %s weight of layer %lld has %lld bytes", wanted.name, at, static_cast<long long>(matrix.bytes));
    if (matrix.kind == LOWBIT_PLAIN) return check_dtype(matrix.dtype);
    if (matrix.kind == LOWBIT_TIGHT) return check_tight_matrix(wanted, layer);
    if (matrix.kind != LOWBIT_PREPARED) return fail(LOWBIT_BAD_ARGUMENT, "a weight of kind %d is unknown", matrix.kind);
    for (int64_t i = 0; i < matrix.count; ++i) {
        const Header* header = check_prepared(static_cast<const uint8_t*>(matrix.data) + i * matrix.bytes, matrix.bytes);
        if (!header) return LOWBIT_BAD_ARGUMENT;
        if (header->rows != wanted.rows || header->cols != wanted.cols)
            return fail(LOWBIT_BAD_ARGUMENT, "the prepared %s weight of layer %lld is [%lld, %lld], the model's sizes ask for [%lld, %lld]", wanted.name, at,
                        static_cast<long long>(header->rows), static_cast<long long>(header->cols), static_cast<long long>(wanted.rows),
                        static_cast<long long>(wanted.cols));
    }
    return LOWBIT_OK;
}

int check_all(const std::vector<Wanted>& all, int64_t layer) {
    for (const Wanted& wanted : all)
        if (int status = check_matrix(wanted, layer)) return status;
    return LOWBIT_OK;
}

std::vector<Wanted> wanted_of_layer(const lowbit_model& model, const lowbit_layer& layer) {
    const lowbit_matrix* m = layer.matrices;
    const int64_t hidden = model.hidden_size, q = int64_t{model.heads} * model.head_dim, kv = int64_t{model.kv_heads} * model.head_dim;
    std::vector<Wanted> all = {{"o", &m[LOWBIT_O], hidden, q, 1}};
    if (m[LOWBIT_QKV].kind != LOWBIT_ABSENT) {
        all.push_back({"qkv", &m[LOWBIT_QKV], q + 2 * kv, hidden, 1});
    } else {
        all.push_back({"q", &m[LOWBIT_Q], q, hidden, 1});
        all.push_back({"k", &m[LOWBIT_K], kv, hidden, 1});
        all.push_back({"v", &m[LOWBIT_V], kv, hidden, 1});
    }
    if (layer.sparse) {
        const int64_t experts = model.expert_count, size = model.expert.size, shared = model.shared.size;
        all.push_back({"router", &m[LOWBIT_ROUTER], experts, hidden, 1});
        all.push_back({"experts_gate_up", &m[LOWBIT_EXPERTS_GATE_UP], 2 * size, hidden, experts});
        all.push_back({"experts_down", &m[LOWBIT_EXPERTS_DOWN], hidden, size, experts});
        if (shared > 0) {
            all.push_back({"shared_gate", &m[LOWBIT_SHARED_GATE], shared, hidden, 1});
            all.push_back({"shared_up", &m[LOWBIT_SHARED_UP], shared, hidden, 1});
            all.push_back({"shared_down", &m[LOWBIT_SHARED_DOWN], hidden, shared, 1});
            all.push_back({"shared_router", &m[LOWBIT_SHARED_ROUTER], 1, hidden, 1});
        }
        return all;
    }
    const int64_t size = model.mlp.size;
    all.push_back({"down", &m[LOWBIT_DOWN], hidden, size, 1});
    if (model.mlp.gate == LOWBIT_CONCATENATED) {
        all.push_back({"gate_up", &m[LOWBIT_GATE_UP], 2 * size, hidden, 1});
    } else {
        all.push_back({"up", &m[LOWBIT_UP], size, hidden, 1});
        if (model.mlp.gate == LOWBIT_SEPARATE) all.push_back({"gate", &m[LOWBIT_GATE], size, hidden, 1});
    }
    return all;
}

// A step asks which weights there are, so those that nobody checked must not be.
void forget_others(const std::vector<Wanted>& wanted, lowbit_layer* layer) {
    lowbit_matrix kept[LOWBIT_LAYER_MATRICES] = {};
    for (const Wanted& each : wanted) kept[each.matrix - layer->matrices] = *each.matrix;
    std::copy(std::begin(kept), std::end(kept), layer->matrices);
}

// Numbers that stand for a choice, each with the last one that the engine knows.
int check_choices(const lowbit_model& model) {
    const struct {
        const char* name;
        int32_t value, last;
    } choices[] = {{"norm", model.norm_kind, LOWBIT_LAYER_NORM},         {"placement of norms", model.placement, LOWBIT_AFTER_SUM},
                   {"residual", model.residual, LOWBIT_PARALLEL_SHARED}, {"norm of queries and keys", model.qk_norm, LOWBIT_WIDTH_NORM},
                   {"activation", model.mlp.activation, LOWBIT_RELU},    {"gate", model.mlp.gate, LOWBIT_INTERLEAVED},
                   {"activation", model.expert.activation, LOWBIT_RELU}, {"gate", model.expert.gate, LOWBIT_INTERLEAVED},
                   {"activation", model.shared.activation, LOWBIT_RELU}, {"gate", model.shared.gate, LOWBIT_INTERLEAVED}};
    for (const auto& choice : choices)
        if (choice.value < 0 || choice.value > choice.last)
            return fail(LOWBIT_UNSUPPORTED, "%d is no kind of %s that the engine knows", choice.value, choice.name);
    return LOWBIT_OK;
}

}  // namespace

int check_sizes(const lowbit_model& model) {
    // Far beyond any model, and small enough that no product of a few of them overflows.
    constexpr int32_t kMostSize = 1 << 24, kMostLayers = 1 << 14, kMostHeads = 1 << 14;
    if (model.struct_bytes != static_cast<int32_t>(sizeof(lowbit_model)))
        return fail(LOWBIT_BAD_ARGUMENT, "the model's description has %d bytes, this library's has %zu; build both from one version", model.struct_bytes,
                    sizeof(lowbit_model));
    for (int32_t size : {model.hidden_size, model.vocab_size, model.embedding_width, model.mlp.size, model.expert.size, model.shared.size, model.position_rows})
        if (size < 0 || size > kMostSize) return fail(LOWBIT_BAD_ARGUMENT, "a size of %d makes no sense for a model", size);
    if (model.layer_count > kMostLayers || model.heads > kMostHeads || model.head_dim > kMostHeads || model.expert_count < 0 || model.expert_count > kMostLayers ||
        model.rope_count < 0 || model.rope_count > kMostLayers || model.position_offset < -1 || model.position_offset > kMostSize)
        return fail(LOWBIT_BAD_ARGUMENT, "a model of %d layers, %d heads of %d channels, %d experts and %d kinds of positions makes no sense", model.layer_count,
                    model.heads, model.head_dim, model.expert_count, model.rope_count);
    if (int status = check_choices(model)) return status;
    const bool positive = model.hidden_size > 0 && model.vocab_size > 0 && model.layer_count > 0 && model.heads > 0 && model.kv_heads > 0 &&
                          model.head_dim > 0 && model.embedding_width > 0;
    if (!positive || model.heads % model.kv_heads)
        return fail(LOWBIT_BAD_ARGUMENT, "a model of %d layers, width %d, %d and %d heads of %d channels and %d tokens makes no sense", model.layer_count,
                    model.hidden_size, model.heads, model.kv_heads, model.head_dim, model.vocab_size);
    if (!model.layers || (model.rope_count > 0 && !model.ropes)) return fail(LOWBIT_BAD_ARGUMENT, "the layers or rotary positions were not given");
    if (model.mlp.gate == LOWBIT_INTERLEAVED) return fail(LOWBIT_UNSUPPORTED, "interleaved gates are known for experts only");
    if (model.expert_count > 0 && (model.top_k <= 0 || model.top_k > model.expert_count))
        return fail(LOWBIT_BAD_ARGUMENT, "cannot choose %d of %d experts", model.top_k, model.expert_count);
    for (int32_t i = 0; i < model.rope_count; ++i) {
        const lowbit_rope& rope = model.ropes[i];
        if (rope.pairing < 0 || rope.pairing > LOWBIT_NEIGHBOURS || rope.change < 0 || rope.change > LOWBIT_ROPE_DYNAMIC || rope.rotary_dim <= 0 || rope.rotary_dim % 2 || rope.rotary_dim > model.head_dim || !rope.frequencies ||
            (rope.change == LOWBIT_ROPE_LONG && !rope.long_frequencies))
            return fail(LOWBIT_BAD_ARGUMENT, "rotary positions %d turn %d of %d channels", i, rope.rotary_dim, model.head_dim);
    }
    return LOWBIT_OK;
}

namespace {

int check_outer(const lowbit_model& model) {
    const lowbit_matrix* m = model.matrices;
    const int64_t width = model.embedding_width, hidden = model.hidden_size, vocab = model.vocab_size;
    std::vector<Wanted> all = {{"embedding", &m[LOWBIT_EMBEDDING], vocab, width, 1}, {"head", &m[LOWBIT_HEAD], vocab, width, 1}};
    if (width != hidden) {
        all.push_back({"embedding_in", &m[LOWBIT_EMBEDDING_IN], hidden, width, 1});
        all.push_back({"head_in", &m[LOWBIT_HEAD_IN], width, hidden, 1});
    }
    if (model.position_offset >= 0) all.push_back({"positions", &m[LOWBIT_POSITIONS], model.position_rows, hidden, 1});
    return check_all(all, -1);
}

void place_heads(Plans* plans) {
    const lowbit_model& model = plans->model;
    const int64_t size = model.head_dim;
    plans->group = model.heads / model.kv_heads;
    plans->q_size = model.heads * size;
    plans->kv_size = model.kv_heads * size;
    plans->qkv_size = plans->q_size + 2 * plans->kv_size;
    for (int64_t h = 0; h < model.heads; ++h) {
        const int64_t group = plans->group, base = h / group * (group + 2) + h % group;
        plans->q_places.push_back((model.qkv_grouped ? base : h) * size);
    }
    for (int64_t h = 0; h < model.kv_heads; ++h) {
        const int64_t base = h * (plans->group + 2) + plans->group;
        plans->k_places.push_back(model.qkv_grouped ? base * size : plans->q_size + h * size);
        plans->v_places.push_back(model.qkv_grouped ? (base + 1) * size : plans->q_size + plans->kv_size + h * size);
    }
}

LayerPlan plan_layer(const lowbit_layer& layer) {
    const lowbit_matrix* m = layer.matrices;
    LayerPlan plan{};
    plan.q = view_of(m[LOWBIT_Q]);
    plan.k = view_of(m[LOWBIT_K]);
    plan.v = view_of(m[LOWBIT_V]);
    plan.qkv = view_of(m[LOWBIT_QKV]);
    plan.o = view_of(m[LOWBIT_O]);
    plan.gate = view_of(m[LOWBIT_GATE]);
    plan.up = view_of(m[LOWBIT_UP]);
    plan.gate_up = view_of(m[LOWBIT_GATE_UP]);
    plan.down = view_of(m[LOWBIT_DOWN]);
    plan.router = view_of(m[LOWBIT_ROUTER]);
    plan.shared_gate = view_of(m[LOWBIT_SHARED_GATE]);
    plan.shared_up = view_of(m[LOWBIT_SHARED_UP]);
    plan.shared_down = view_of(m[LOWBIT_SHARED_DOWN]);
    plan.shared_router = view_of(m[LOWBIT_SHARED_ROUTER]);
    plan.source = &layer;
    return plan;
}

}  // namespace

int make_plans(const lowbit_model& model, Plans* plans) {
    if (model.struct_bytes != static_cast<int32_t>(sizeof(lowbit_model)))
        return fail(LOWBIT_BAD_ARGUMENT, "the model's description has %d bytes, this library's has %zu; build both from one version", model.struct_bytes,
                    sizeof(lowbit_model));
    if (int status = check_sizes(model)) return status;
    if (int status = check_outer(model)) return status;
    plans->model = model;
    plans->layers.assign(model.layers, model.layers + model.layer_count);
    plans->ropes.assign(model.ropes, model.ropes + model.rope_count);
    for (int64_t i = 0; i < model.layer_count; ++i) {
        lowbit_layer& layer = plans->layers[static_cast<size_t>(i)];
        if (layer.rope >= model.rope_count || (layer.sparse && model.expert_count == 0) || layer.window < 0)
            return fail(LOWBIT_BAD_ARGUMENT, "layer %lld names positions, experts or a window that the model has not", static_cast<long long>(i));
        if (layer.sparse ? model.expert.size == 0 : model.mlp.size == 0)
            return fail(LOWBIT_BAD_ARGUMENT, "the %s of layer %lld have no width", layer.sparse ? "experts" : "gate and up projections", static_cast<long long>(i));
        const std::vector<Wanted> wanted = wanted_of_layer(model, layer);
        if (int status = check_all(wanted, i)) return status;
        forget_others(wanted, &layer);
        plans->plans.push_back(plan_layer(layer));
    }
    plans->embedding = view_of(model.matrices[LOWBIT_EMBEDDING]);
    if (model.embedding_width != model.hidden_size) {
        plans->embedding_in = view_of(model.matrices[LOWBIT_EMBEDDING_IN]);
        plans->head_in = view_of(model.matrices[LOWBIT_HEAD_IN]);
    }
    plans->head = view_of(model.matrices[LOWBIT_HEAD]);
    place_heads(plans);
    return LOWBIT_OK;
}

// Keys and values in int8 cost a KL of 0.0015 (benchmarks/results/cache_kl.md): nothing beside activations that are rounded to int8 in
// every product, and the only loss of a model whose products round nothing.
lowbit_engine_options with_cache_type(const lowbit_model& model, lowbit_engine_options options) {
    if (options.cache_type != LOWBIT_CACHE_AUTO) return options;
    options.cache_type = LOWBIT_CACHE_INT8;
    for (int32_t i = 0; i < model.layer_count; ++i)
        for (int role : {LOWBIT_Q, LOWBIT_K, LOWBIT_V, LOWBIT_QKV}) {
            const lowbit_matrix& matrix = model.layers[i].matrices[role];
            if (matrix.kind == LOWBIT_ABSENT) continue;
            const Header* header = matrix.kind == LOWBIT_PREPARED ? check_prepared(matrix.data, matrix.bytes) : nullptr;
            if (!header || !rounds_to_int8(*header, options.compute)) options.cache_type = LOWBIT_CACHE_FP16;
        }
    return options;
}

namespace {

// Bytes of the activations of any product, for so many tokens.
int64_t packed_bytes(const Plans& plans, int64_t tokens, int compute) {
    int64_t most = 0;
    const auto group = [&](std::initializer_list<const View*> views) {
        int64_t sum = 0;
        for (const View* view : views) sum += room_for(*view, tokens, compute);
        most = std::max(most, sum);
    };
    for (const LayerPlan& plan : plans.plans) {
        group({&plan.q, &plan.k, &plan.v, &plan.qkv});
        group({&plan.o});
        group({&plan.gate, &plan.up, &plan.gate_up});
        group({&plan.down});
        group({&plan.router, &plan.shared_gate, &plan.shared_up, &plan.shared_router});
        group({&plan.shared_down});
    }
    group({&plans.embedding_in});
    group({&plans.head_in});
    group({&plans.head});
    return most;
}

// The experts' activations: in the worst case every assignment is a tile of its own.
int64_t expert_packed_bytes(const Plans& plans, const lowbit_engine_options& options) {
    const lowbit_model& model = plans.model;
    if (!plans.sparse()) return 0;
    const int64_t assigned = int64_t{options.chunk} * model.top_k, tiles = std::min<int64_t>(assigned, model.expert_count);
    int64_t most = 0;
    for (const lowbit_layer& layer : plans.layers)
        for (int role : {LOWBIT_EXPERTS_GATE_UP, LOWBIT_EXPERTS_DOWN}) {
            if (!layer.sparse) continue;
            const View view = view_of(layer.matrices[role]);
            most = std::max(most, room_for(view, assigned, options.compute) + tiles * room_for(view, kFewTokens + 1, options.compute));
        }
    return most;
}

bool make_room(const Plans& plans, const lowbit_engine_options& options, int64_t widest, Room* room) {
    const lowbit_model& model = plans.model;
    const int64_t padded = divide_up(model.head_dim, kBlockRows) * kBlockRows;
    const int64_t rows = std::max<int64_t>(64, model.heads);
    if (plans.sparse()) room->expert_tasks.reserve(static_cast<size_t>(std::min<int64_t>(model.expert_count, int64_t{options.chunk} * model.top_k)));
    return room->parted.make(plans.sparse() ? 2 * model.expert.size : 0) && room->hidden.make(kAloneTokens * model.hidden_size) && room->x.make(kAloneTokens * widest) &&
           room->near.make(kNearTokens * model.hidden_size) &&
           room->packed.make(packed_bytes(plans, kAloneTokens, options.compute)) && room->row.make(plans.qkv_size) &&
           room->branch.make(std::max<int64_t>(model.hidden_size, padded)) && room->queries.make(rows * model.head_dim) &&
           room->scores.make(rows * kKeyTile) && room->out.make(rows * padded) && room->most.make(rows) && room->total.make(rows) &&
           room->bytes.make(attend_room(rows, padded)) && room->positions.make(rows) && room->slopes.make(rows);
}

bool make_expert_buffers(const Plans& plans, const lowbit_engine_options& options, Workspace* work) {
    const lowbit_model& model = plans.model;
    if (!plans.sparse()) return true;
    const int64_t chunk = options.chunk, assigned = chunk * model.top_k, inner = model.expert.size, shared = model.shared.size;
    const int64_t width = std::max<int64_t>(model.hidden_size, inner);
    work->expert_begin.resize(static_cast<size_t>(model.expert_count) + 1);
    work->expert_next.resize(static_cast<size_t>(model.expert_count) + 1);
    return work->router.make(chunk * model.expert_count) && work->expert_x.make(chunk * model.hidden_size + assigned * width) &&
           work->expert_gate.make(assigned * 2 * inner) && work->expert_out.make(assigned * model.hidden_size) &&
           work->shared_gate.make(chunk * shared) && work->shared_up.make(chunk * shared) && work->shared_router.make(chunk) &&
           work->shared_out.make(chunk * model.hidden_size) && work->assigned_token.make(assigned) && work->assigned_place.make(assigned) &&
           work->assigned_weight.make(assigned) && work->expert_packed.make(expert_packed_bytes(plans, options));
}

}  // namespace

int make_workspace(const Plans& plans, const lowbit_engine_options& options, int threads, Workspace* work) {
    const lowbit_model& model = plans.model;
    const int64_t chunk = options.chunk, hidden = model.hidden_size, padded = divide_up(model.head_dim, kBlockRows) * kBlockRows;
    const int64_t inner = std::max(model.mlp.size, model.shared.size), gate = model.mlp.gate == LOWBIT_CONCATENATED ? 2 * inner : inner;
    const int64_t widest = std::max({hidden, plans.q_size, inner});
    int64_t rotary = 1;
    for (const lowbit_rope& rope : plans.ropes) rotary = std::max<int64_t>(rotary, rope.rotary_dim);
    // No more rows than items: splits times key heads times tokens stay below this.
    const int64_t pairs = std::min<int64_t>(chunk, options.slots) * model.kv_heads, split_rows = (pairs + 8 * threads) * 2 * plans.group;
    bool made = work->hidden.make(chunk * hidden) && work->x.make(chunk * widest) && work->narrow.make(chunk * model.embedding_width) &&
                work->qkv.make(chunk * plans.qkv_size) && work->attention.make(chunk * plans.q_size) && work->gate.make(chunk * gate) &&
                work->up.make(chunk * inner) && work->branches[0].make(chunk * hidden) && work->branches[1].make(chunk * hidden) &&
                work->turns.make(std::max<int64_t>(model.rope_count, 1) * chunk * rotary) && work->split_out.make(split_rows * padded) &&
                work->split_most.make(split_rows) && work->split_total.make(split_rows) &&
                work->packed.make(packed_bytes(plans, chunk, options.compute)) && make_expert_buffers(plans, options, work);
    work->rooms = std::vector<Room>(static_cast<size_t>(threads));
    for (Room& room : work->rooms) made = made && make_room(plans, options, widest, &room);
    work->threads = threads;
    return made ? LOWBIT_OK : fail(LOWBIT_NO_MEMORY, "not enough memory for the buffers of a step of %lld tokens; ask for smaller chunks",
                                   static_cast<long long>(chunk));
}

}  // namespace lowbit
