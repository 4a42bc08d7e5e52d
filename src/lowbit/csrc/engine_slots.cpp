// The C functions that move whole sequences: cut, copied from slot to slot, and in and out as bytes.
#include "engine_call.h"

using namespace lowbit;

namespace {

// Whether a slot can stand at `length` tokens: it has as many, and its windows still reach.
int check_cut(const Engine& engine, int32_t slot, int64_t length, const char* verb) {
    const int64_t present = engine.lengths[static_cast<size_t>(slot)], shortest = engine.cache.shortest(slot);
    if (length < 0 || length > present)
        return fail(LOWBIT_BAD_ARGUMENT, "slot %d holds %lld tokens and cannot be %s to %lld", slot, static_cast<long long>(present), verb, static_cast<long long>(length));
    if (length > 0 && length < shortest)
        return fail(LOWBIT_BAD_ARGUMENT, "slot %d keeps the sliding windows of its last tokens and cannot be %s to %lld, only to none or %lld", slot, verb,
                    static_cast<long long>(length), static_cast<long long>(shortest));
    return LOWBIT_OK;
}

}  // namespace

extern "C" int64_t lowbit_engine_length(const lowbit_engine* handle, int32_t slot) {
    if (!handle) return fail(LOWBIT_BAD_ARGUMENT, "no engine was given"), -1;
    if (check_slot(handle->engine, slot)) return -1;
    return handle->engine.lengths[static_cast<size_t>(slot)];
}

extern "C" int64_t lowbit_engine_shortest(const lowbit_engine* handle, int32_t slot) {
    if (!handle) return fail(LOWBIT_BAD_ARGUMENT, "no engine was given"), -1;
    if (check_slot(handle->engine, slot)) return -1;
    return handle->engine.cache.shortest(slot);
}

extern "C" int lowbit_engine_truncate(lowbit_engine* handle, int32_t slot, int64_t length) {
    if (!handle) return fail(LOWBIT_BAD_ARGUMENT, "no engine was given");
    Engine& engine = handle->engine;
    if (int status = check_slot(engine, slot)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    if (int status = check_cut(engine, slot, length, "cut")) return status;
    engine.lengths[static_cast<size_t>(slot)] = length;
    engine.expected[static_cast<size_t>(slot)] = 0;
    if (length == 0) engine.cache.clear(slot);
    return LOWBIT_OK;
}

extern "C" int lowbit_engine_copy(lowbit_engine* handle, int32_t from, int32_t to, int64_t common, int64_t length) {
    if (!handle) return fail(LOWBIT_BAD_ARGUMENT, "no engine was given");
    Engine& engine = handle->engine;
    if (int status = check_slot(engine, from)) return status;
    if (int status = check_slot(engine, to)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    if (int status = check_cut(engine, from, length, "copied")) return status;
    std::atomic<int64_t>& present = engine.lengths[static_cast<size_t>(to)];
    if (common < 0 || common > std::min(present.load(), length))
        return fail(LOWBIT_BAD_ARGUMENT, "slot %d holds %lld tokens and cannot share %lld with a copy of %lld", to, static_cast<long long>(present),
                    static_cast<long long>(common), static_cast<long long>(length));
    if (from == to) return present = length, LOWBIT_OK;
    engine.expected[static_cast<size_t>(to)] = 0;
    if (common == 0) engine.cache.clear(to);
    try {
        engine.cache.copy(from, to, common, length);
    } catch (...) {
        return caught();
    }
    present = length;
    return LOWBIT_OK;
}

extern "C" int lowbit_engine_save(lowbit_engine* handle, int32_t slot, int64_t length, void* bytes, int64_t* size) {
    if (!handle || !size) return fail(LOWBIT_BAD_ARGUMENT, "saving needs an engine and a place for the size");
    Engine& engine = handle->engine;
    if (int status = check_slot(engine, slot)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    if (int status = check_cut(engine, slot, length, "saved")) return status;
    const int64_t needed = engine.cache.saved_bytes(slot, length);
    if (bytes && *size != needed)
        return fail(LOWBIT_BAD_ARGUMENT, "%lld tokens of slot %d take %lld bytes, not %lld", static_cast<long long>(length), slot, static_cast<long long>(needed),
                    static_cast<long long>(*size));
    *size = needed;
    if (bytes) engine.cache.save(slot, length, static_cast<uint8_t*>(bytes));
    return LOWBIT_OK;
}

extern "C" int lowbit_engine_restore(lowbit_engine* handle, int32_t slot, int64_t length, const void* bytes, int64_t size) {
    if (!handle || !bytes) return fail(LOWBIT_BAD_ARGUMENT, "restoring needs an engine and the bytes that were saved");
    Engine& engine = handle->engine;
    if (int status = check_slot(engine, slot)) return status;
    const Busy busy(engine);
    if (!busy.mine()) return refuse_busy();
    if (length < 1 || length > engine.options.context)
        return fail(LOWBIT_BAD_ARGUMENT, "a saved cache of %lld tokens does not fit a context of %lld; make the engine with a larger one",
                    static_cast<long long>(length), static_cast<long long>(engine.options.context));
    std::atomic<int64_t>& present = engine.lengths[static_cast<size_t>(slot)];
    present = 0;
    engine.expected[static_cast<size_t>(slot)] = 0;
    if (int status = engine.cache.restore(slot, length, static_cast<const uint8_t*>(bytes), size)) {
        engine.cache.clear(slot);
        return status;
    }
    present = length;
    return LOWBIT_OK;
}
