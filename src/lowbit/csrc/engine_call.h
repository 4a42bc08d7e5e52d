// What the C functions of the engine share: the handle, the mark that it is at work, and the checks of slots.
#pragma once
#include "engine.h"
#include "error.h"

struct lowbit_engine {
    lowbit::Engine engine;
};

namespace lowbit {

// Marks the engine as working, so that a second thread gets a sentence and not a corrupted cache.
class Busy {
public:
    explicit Busy(Engine& engine) : engine_(engine), mine_(!engine.busy.exchange(true)) {}
    ~Busy() {
        if (mine_) engine_.busy.store(false);
    }
    bool mine() const { return mine_; }

private:
    Engine& engine_;
    const bool mine_;
};

inline int refuse_busy() { return fail(LOWBIT_BAD_ARGUMENT, "this engine is at work in another thread; give each thread an engine, or a slot of one batch"); }

inline int check_slot(const Engine& engine, int32_t slot) {
    if (slot < 0 || slot >= engine.options.slots) return fail(LOWBIT_BAD_ARGUMENT, "slot %d does not exist; the engine was made with %d", slot, engine.options.slots);
    return LOWBIT_OK;
}

}  // namespace lowbit
