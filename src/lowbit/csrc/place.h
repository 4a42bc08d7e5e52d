// Threads that work together keep to processors of their own.
//
// A thread that sleeps is woken by one that works, and where the kernel takes the two for one conversation it puts the sleeper on its
// waker's processor and leaves another idle. Members of a step wake each other at every barrier: they then take turns on one processor,
// each asleep while the other works, and nothing looks overloaded to the kernel, which needs 20 to 100 ms to part them. A small model
// reads a prompt of 512 tokens in 75. So who wakes up on a processor on which another member was last seen keeps off the others'
// processors until the work is done, and then takes its own set back: what a user has set by taskset or a container's cpuset holds
// before and after. Where that set leaves no processor free, nothing is done.
#pragma once
#include <sched.h>

#include <atomic>

namespace lowbit {

class Place {
public:
    // Where the thread works, for the others to see; asked for by itself, often, since the kernel may move it.
    void note() { processor_.store(sched_getcpu(), std::memory_order_relaxed); }

    // Of a thread that just woke up: keep off the processors of the others if one of them was last seen here. `of(i)` is member i's place.
    template <class Of>
    static void settle(int own, int members, const Of& of) {
        Place& place = of(own);
        place.note();
        const int here = place.seen();
        bool shared = false;
        for (int i = 0; i < members; ++i) shared |= i != own && of(i).seen() == here;
        if (!shared || here < 0) return;
        place.restore();
        if (sched_getaffinity(0, sizeof place.set_, &place.set_)) return;
        cpu_set_t free = place.set_;
        for (int i = 0; i < members; ++i)
            if (const int taken = of(i).seen(); taken >= 0 && taken < CPU_SETSIZE) CPU_CLR(taken, &free);
        place.moved_ = CPU_COUNT(&free) > 0 && sched_setaffinity(0, sizeof free, &free) == 0;
        place.note();
    }

    // Of the thread itself, behind its work.
    void restore() {
        if (moved_) sched_setaffinity(0, sizeof set_, &set_);
        moved_ = false;
    }

private:
    int seen() const { return processor_.load(std::memory_order_relaxed); }

    std::atomic<int> processor_{-1};
    cpu_set_t set_;  // what the thread had, where it keeps off some of it
    bool moved_ = false;
};

}  // namespace lowbit
