// The threads of one step: they enter together, share out items by atomic counters, and meet at barriers.
//
// One step is one job of the pool; inside it a barrier costs a few hundred nanoseconds, where a job of its own for each of the five
// stages of a layer would cost microseconds. The last thread to arrive may do a piece of serial work before it lets the others go.
#pragma once
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "stretches.h"
#include "place.h"
#include "threads.h"

namespace lowbit {

class Team {
public:
    // Run body(member) once on each of `size` threads; members are numbered from 0, and member 0 is not always the caller.
    template <class Body>
    static void run(Team& team, int size, const Body& body) {
        team.start(size);
        if (size == 1) return body(0);
        parallel_for(size, 1, [&](int64_t begin, int64_t end, int) {
            if (end - begin > 1) team.size_ = 1;  // the pool runs everything on one thread
            const AtHome home{team.own_[static_cast<size_t>(begin)].place};
            body(static_cast<int>(begin));
        }, size);
    }

    // How many threads really meet inside a job of the pool: fewer than asked for where the system gave no more, or inside another job.
    static int measure(int wanted) {
        std::atomic<int> met{0}, done{0};
        parallel_for(wanted, 1, [&](int64_t begin, int64_t end, int) {
            if (end - begin > 1) return;
            met.fetch_add(1);
            const auto start = std::chrono::steady_clock::now();
            while (met.load() < wanted && !done.load() && std::chrono::steady_clock::now() - start < std::chrono::seconds(1)) sched_yield();
            if (met.load() < wanted) done.store(1);
        }, wanted);
        return met.load() == wanted ? wanted : 1;
    }

    int size() const { return size_; }
    bool alone() const { return size_ == 1; }

    // The next `grain` items of this stage, or begin >= items when there are none left.
    int64_t claim(int64_t grain) { return next_.fetch_add(grain, std::memory_order_relaxed); }

    template <class Body>
    void share(int64_t items, int64_t grain, const Body& body) {
        for (int64_t begin = claim(grain); begin < items; begin = claim(grain)) body(begin, std::min(begin + grain, items));
    }

    // Where a member begins when it owns a stretch of the items.
    int64_t first_of(int member, int64_t items) const { return first_of_stretch(member, size_, items); }

    // The same for items that are read from memory (stretches.h): body(item, next).
    template <class Body>
    void share_stretches(int member, int64_t items, const Body& body) {
        const uint32_t stage = generation_.load(std::memory_order_relaxed) % 2;
        take_stretches(member, size_, items, [&](int owner) -> Stretch& { return own_[static_cast<size_t>(owner)].of_stage[stage]; }, body);
    }

    // Wait for everybody; the counters of items start again at 0. `idle` is told how often it was called while waiting.
    template <class Serial, class Idle>
    void meet(int member, const Serial& serial, const Idle& idle) {
        const uint32_t generation = generation_.load(std::memory_order_relaxed);
        Own& own = own_[static_cast<size_t>(member)];
        own.of_stage[(generation + 1) % 2].reset();
        own.place.note();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            serial();
            next_.store(0, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1);
            if (sleepers_.load() > 0) wake_all();
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            idle(spins);
            if (spins > kPatience) sleep_while(generation, member);
        }
    }

private:
    // However a member's work ends.
    struct AtHome {
        Place& place;
        ~AtHome() { place.restore(); }
    };

    struct alignas(64) Own {
        Stretch of_stage[2];  // one for this stage and one for the next, which is set back before anybody can enter it
        Place place;
    };

    void start(int size) {
        size_ = size;
        arrived_.store(0);
        next_.store(0);
        if (static_cast<size_t>(size) > own_.size()) own_ = std::vector<Own>(static_cast<size_t>(size));
        for (Own& own : own_)
            for (Stretch& stretch : own.of_stage) stretch.reset();
    }

    // About 17 microseconds, beyond any stage's imbalance on a quiet machine. On a busy one the missing thread has lost its core,
    // and a sleeper keeps its own share of time for later where a spinner would waste it.
    static constexpr int kPatience = 600;

    void sleep_while(uint32_t generation, int member) {
        sleepers_.fetch_add(1);
#if defined(__linux__)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&generation_), FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
#else
        if (generation_.load() == generation) sched_yield();
#endif
        sleepers_.fetch_sub(1);
        Place::settle(member, size_, [&](int other) -> Place& { return own_[static_cast<size_t>(other)].place; });
    }
    void wake_all() {
#if defined(__linux__)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&generation_), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
    }

    int size_ = 1;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::vector<Own> own_;
};

}  // namespace lowbit
