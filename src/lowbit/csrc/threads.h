// The pool of threads that runs every parallel loop of the core.
//
// A job is a range of items and a function over a part of it; kernels never start threads themselves. Workers claim parts from an
// atomic counter, so that a core slowed by other programs takes fewer of them. Between jobs a worker spins for a short while (the
// next product of a token follows within microseconds) and then sleeps. After a fork the child makes itself a new pool. Parts of weights
// that come from memory are not claimed in turn: each thread owns a stretch of them (stretches.h).
#pragma once
#include <cstdint>

namespace lowbit {

constexpr int kMostThreads = 512;

int thread_count();
void set_thread_count(int threads);  // 0: as many as machine_limits.h says

// Work on items [begin, end); `thread` is in [0, threads).
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end, int thread);

enum class Sharing { kInTurn, kStretches };

// Run `function` over [0, items) in parts of at most `grain` items. Returns when all are done. Who has counted on a number of threads
// names it here: another Python thread may change thread_count() at any moment.
void run_parallel(int64_t items, int64_t grain, RangeFunction function, void* context, int threads, Sharing sharing);

// The same for any callable (begin, end, thread); it lives on the caller's stack.
template <class Body>
void parallel_for(int64_t items, int64_t grain, const Body& body, int threads = thread_count(), Sharing sharing = Sharing::kInTurn) {
    run_parallel(
        items, grain,
        [](void* context, int64_t begin, int64_t end, int thread) { (*static_cast<const Body*>(context))(begin, end, thread); },
        const_cast<Body*>(&body), threads, sharing);
}

}  // namespace lowbit
