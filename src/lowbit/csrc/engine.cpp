// The C functions of the engine: what a caller gives is checked here, once.
#include <new>

#include "engine_call.h"
#include "threads.h"

namespace lowbit {
namespace {

constexpr int32_t kMostSlots = 4096;
constexpr int32_t kMostChunk = 1 << 14;
constexpr int64_t kMostContext = int64_t{1} << 24;

int check_options(const lowbit_engine_options& options) {
    if (options.context < 1 || options.context > kMostContext || options.slots < 1 || options.slots > kMostSlots || options.chunk < 1 ||
        options.chunk > kMostChunk)
        return fail(LOWBIT_BAD_ARGUMENT, "a context of %lld tokens, %d slots and chunks of %d tokens make no sense", static_cast<long long>(options.context),
                    options.slots, options.chunk);
    if (options.cache_type < LOWBIT_CACHE_FP32 || options.cache_type > LOWBIT_CACHE_AUTO)
        return fail(LOWBIT_BAD_ARGUMENT, "no cache is of type %d", options.cache_type);
    return check_compute(options.compute);
}

// Counted in floating point, which does not overflow.
int check_cache(const lowbit_model& model, const lowbit_engine_options& options) {
    constexpr double kMostNumbers = 0x1p56;
    const double numbers = static_cast<double>(model.layer_count) * model.kv_heads * model.head_dim * static_cast<double>(options.context) * options.slots;
    if (numbers > kMostNumbers) return fail(LOWBIT_NO_MEMORY, "a cache of %.3g numbers fits no machine; ask for a smaller context or fewer slots", numbers);
    return LOWBIT_OK;
}

struct Request {
    const int32_t* tokens;
    const int32_t* slots;
    const uint8_t* wanted;
    int64_t count;
};

int check_token(const Engine& engine, int32_t token) {
    const int32_t vocab = engine.plans.model.vocab_size;
    if (token < 0 || token >= vocab) return fail(LOWBIT_BAD_ARGUMENT, "token %d is outside the vocabulary of %d tokens", token, vocab);
    return LOWBIT_OK;
}

int check_end(const Engine& engine, int32_t slot, int64_t end) {
    const lowbit_model& model = engine.plans.model;
    const long long at = static_cast<long long>(end);
    if (end > engine.options.context)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens do not fit slot %d, whose context is %lld; make the engine with a larger one", at, slot,
                    static_cast<long long>(engine.options.context));
    if (model.position_offset >= 0 && end + model.position_offset > model.position_rows)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens are more than the model's %d learned positions", at, model.position_rows - model.position_offset);
    return LOWBIT_OK;
}

int read_request(const Engine& engine, const Request& request, std::vector<Sequence>* sequences, std::vector<int64_t>* wanted) {
    std::vector<bool> seen(static_cast<size_t>(engine.options.slots));
    for (int64_t i = 0; i < request.count; ++i) {
        const int32_t slot = request.slots[i];
        if (int status = check_slot(engine, slot)) return status;
        if (int status = check_token(engine, request.tokens[i])) return status;
        if (!sequences->empty() && sequences->back().slot == slot) {
            ++sequences->back().count;
        } else {
            if (seen[static_cast<size_t>(slot)]) return fail(LOWBIT_BAD_ARGUMENT, "the tokens of slot %d do not follow one another", slot);
            seen[static_cast<size_t>(slot)] = true;
            sequences->push_back({slot, i, 1, engine.lengths[static_cast<size_t>(slot)]});
        }
        if (request.wanted && request.wanted[i]) wanted->push_back(i);
    }
    for (const Sequence& sequence : *sequences)
        if (int status = check_end(engine, sequence.slot, sequence.start + sequence.count)) return status;
    return LOWBIT_OK;
}

int step_checked(Engine& engine, const Request& request, float* logits) {
    std::vector<Sequence> sequences;
    std::vector<int64_t> wanted;
    if (int status = read_request(engine, request, &sequences, &wanted)) return status;
    if (!wanted.empty() && !logits) return fail(LOWBIT_BAD_ARGUMENT, "logits are wanted and there is no buffer for them");
    const int threads = thread_count();
    if (threads != engine.asked_threads) {
        engine.asked_threads = 0;  // until the workspace is whole
        if (int status = make_workspace(engine.plans, engine.options, Team::measure(threads), &engine.work)) return status;
        engine.asked_threads = threads;
    }
    for (const Sequence& sequence : sequences) engine.cache.make_room(sequence.slot, sequence.start, sequence.count);
    engine.fault = {};
    if (int status = run_step(engine, request.tokens, sequences, wanted, request.count, logits)) {
        if (status == LOWBIT_CANCELLED) engine.cancelled.store(false);  // answered; until then it waits for a step
        return status == LOWBIT_CANCELLED ? fail(status, "the step was cancelled") : status;
    }
    if (int status = check_maps(engine.plans)) return status;
    // 49,152 logits take 5 microseconds, a thousandth of the token that made them.
    if (engine.fault.found || !all_finite(logits, static_cast<int64_t>(wanted.size()) * engine.plans.model.vocab_size)) return refuse_logits(engine);
    for (const Sequence& sequence : sequences) engine.lengths[static_cast<size_t>(sequence.slot)] += sequence.count;
    return LOWBIT_OK;
}

int make_engine(const lowbit_model& model, const lowbit_engine_options& options, Engine* engine) {
    if (int status = check_options(options)) return status;
    if (int status = make_plans(model, &engine->plans)) return status;
    if (int status = check_cache(model, options)) return status;
    engine->options = with_cache_type(model, options);
    if (int status = engine->cache.make(model, engine->options)) return status;
    engine->lengths = std::vector<std::atomic<int64_t>>(static_cast<size_t>(options.slots));
    engine->expected.resize(static_cast<size_t>(options.slots));
    engine->asked_threads = thread_count();
    return make_workspace(engine->plans, engine->options, Team::measure(engine->asked_threads), &engine->work);
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" lowbit_engine* lowbit_engine_create(const lowbit_model* model, const lowbit_engine_options* options) {
    if (!model || !options) {
        fail(LOWBIT_BAD_ARGUMENT, "no description of a model was given");
        return nullptr;
    }
    try {
        auto made = std::make_unique<lowbit_engine>();
        return make_engine(*model, *options, &made->engine) == LOWBIT_OK ? made.release() : nullptr;
    } catch (...) {
        caught();
        return nullptr;
    }
}

extern "C" void lowbit_engine_destroy(lowbit_engine* engine) { delete engine; }

extern "C" int64_t lowbit_engine_bytes(const lowbit_model* model, const lowbit_engine_options* options) try {
    if (!model || !options) return fail(LOWBIT_BAD_ARGUMENT, "no description of a model was given"), -1;
    if (check_options(*options) != LOWBIT_OK || check_sizes(*model) != LOWBIT_OK || check_cache(*model, *options) != LOWBIT_OK) return -1;
    return cache_bytes(*model, with_cache_type(*model, *options));
} catch (...) {
    return caught(), -1;
}

extern "C" int lowbit_engine_cache_type(const lowbit_engine* handle) { return handle ? handle->engine.options.cache_type : -1; }

extern "C" int lowbit_engine_step(lowbit_engine* handle, const int32_t* tokens, const int32_t* slots, const uint8_t* wanted, int64_t count,
                                  float* logits) {
    if (!handle || !tokens || !slots) return fail(LOWBIT_BAD_ARGUMENT, "a step needs an engine, tokens and their slots");
    Engine& engine = handle->engine;
    if (count < 1) return fail(LOWBIT_BAD_ARGUMENT, "the prompt is empty; give at least one token");
    if (count > engine.options.chunk) return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens in one step; this engine takes %d", static_cast<long long>(count), engine.options.chunk);
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    try {
        return step_checked(engine, {tokens, slots, wanted, count}, logits);
    } catch (...) {
        return caught();
    }
}

namespace {

// Where the tokens of a call end, and how many it made.
struct Continuation {
    int32_t slot;
    int64_t count;
    const int32_t* stops;
    int64_t stop_count;
    int64_t* made_count;

    bool ends(int32_t token) const { return std::find(stops, stops + stop_count, token) != stops + stop_count; }
};

// One token after another: a step, then `choose(logits, made, &token)`, which also writes the token down.
template <class Choose>
int continue_slot(lowbit_engine* handle, const Continuation& job, int32_t token, const Choose& choose) {
    Engine& engine = handle->engine;
    *job.made_count = 0;
    const int32_t vocab = engine.plans.model.vocab_size;
    if (job.stop_count > vocab)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens to stop at, of a vocabulary of %d", static_cast<long long>(job.stop_count), vocab);
    if (job.count < 0 || job.count > engine.options.context)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens do not fit a context of %lld", static_cast<long long>(job.count), static_cast<long long>(engine.options.context));
    if (int status = check_slot(engine, job.slot)) return status;
    if (int status = check_end(engine, job.slot, engine.lengths[static_cast<size_t>(job.slot)] + job.count)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    const uint8_t wanted = 1;
    try {
        engine.logits.resize(static_cast<size_t>(vocab));
        while (*job.made_count < job.count) {
            if (int status = step_checked(engine, {&token, &job.slot, &wanted, 1}, engine.logits.data())) return status;
            if (int status = choose(engine.logits.data(), *job.made_count, &token)) return status;
            ++*job.made_count;
            if (job.ends(token)) break;
        }
        return LOWBIT_OK;
    } catch (...) {
        return caught();
    }
}

}  // namespace

extern "C" int lowbit_engine_greedy(lowbit_engine* handle, int32_t slot, int32_t token, int64_t count, const int32_t* stops, int64_t stop_count,
                                    int32_t* made, int64_t* made_count) {
    if (!handle || !made || !made_count || stop_count < 0 || (stop_count > 0 && !stops)) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    const int32_t vocab = handle->engine.plans.model.vocab_size;
    return continue_slot(handle, {slot, count, stops, stop_count, made_count}, token, [&](const float* logits, int64_t index, int32_t* chosen) {
        made[index] = *chosen = static_cast<int32_t>(engine_isa().largest(logits, vocab));
        return LOWBIT_OK;
    });
}

extern "C" int lowbit_engine_choose(lowbit_engine* handle, int32_t slot, int32_t* tokens, int64_t length, int64_t count,
                                    const lowbit_selection* selection, int64_t least, const int32_t* stops, int64_t stop_count,
                                    uint64_t* generator, int64_t* made_count) {
    if (!handle || !tokens || !selection || !made_count || stop_count < 0 || (stop_count > 0 && !stops)) return fail(LOWBIT_BAD_ARGUMENT, "a buffer was not given");
    if (length < 1 || length > kMostElements) return fail(LOWBIT_BAD_ARGUMENT, "there is no token to go on from in a sequence of %lld", static_cast<long long>(length));
    lowbit_selection settings = *selection;
    settings.banned_tokens = stops;
    const int32_t vocab = handle->engine.plans.model.vocab_size;
    return continue_slot(handle, {slot, count, stops, stop_count, made_count}, tokens[length - 1], [&](const float* logits, int64_t index, int32_t* chosen) {
        settings.banned_count = index < least ? static_cast<int32_t>(stop_count) : 0;
        const int64_t so_far = length + index;
        if (int status = lowbit_select(logits, vocab, &settings, tokens, so_far, generator, chosen, nullptr)) return status;
        tokens[so_far] = *chosen;
        return static_cast<int>(LOWBIT_OK);
    });
}

extern "C" int lowbit_engine_expect(lowbit_engine* handle, int32_t slot, int64_t length) {
    if (!handle) return fail(LOWBIT_BAD_ARGUMENT, "no engine was given");
    Engine& engine = handle->engine;
    if (int status = check_slot(engine, slot)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    if (length < 0) return fail(LOWBIT_BAD_ARGUMENT, "slot %d cannot become %lld tokens long", slot, static_cast<long long>(length));
    if (int status = check_end(engine, slot, length)) return status;
    engine.expected[static_cast<size_t>(slot)] = length;
    return LOWBIT_OK;
}

extern "C" void lowbit_engine_cancel(lowbit_engine* handle) {
    if (handle) handle->engine.cancelled.store(true);
}

extern "C" void lowbit_engine_resume(lowbit_engine* handle) {
    if (handle) handle->engine.cancelled.store(false);
}

extern "C" void lowbit_engine_set_check(lowbit_engine* handle, int on) {
    if (handle) handle->engine.checking = on != 0;
}

extern "C" void lowbit_engine_set_profile(lowbit_engine* handle, int on) {
    if (handle) handle->engine.profiling = on != 0;
}

extern "C" void lowbit_engine_profile(lowbit_engine* handle, int64_t* nanoseconds) {
    if (!handle || !nanoseconds) return;
    for (int i = 0; i < LOWBIT_PROFILE_PARTS; ++i) {
        nanoseconds[i] = handle->engine.profile[i];
        handle->engine.profile[i] = 0;
    }
}
