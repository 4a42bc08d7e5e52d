// Items that are read from memory, shared out so that what a processor fetches beyond the end of one is what the same thread reads next.
//
// Every thread owns a stretch of the items and takes them from its front; who has none left takes from the back of others'. Owners take a
// quarter of what is left at once: a processor ends all reads that are under way before it counts, once for every 16 KB otherwise. Claimed in
// turn instead, each item's end is fetched twice (docs/notes/cpu_engine.md: 24 and 30 GB/s with parts of 87 KB on two threads).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lowbit {

class Stretch {
public:
    struct Taken { int64_t begin, end; };

    void reset() { taken_.store(0, std::memory_order_relaxed); }
    // The next items of `count` from the front, `most` of them or what is left.
    Taken take_front(int64_t count, int64_t most) {
        const uint64_t taken = taken_.fetch_add(static_cast<uint64_t>(most), std::memory_order_relaxed);
        return {front(taken), std::min(front(taken) + most, count - back(taken))};
    }
    // The next item from the back, counted from the front; -1 where there is none.
    int64_t take_back(int64_t count) {
        const uint64_t taken = taken_.fetch_add(kFromBack, std::memory_order_relaxed);
        return front(taken) + back(taken) < count ? count - 1 - back(taken) : -1;
    }

private:
    // How many were taken from the front and, in units of kFromBack, from the back.
    static constexpr uint64_t kFromBack = uint64_t{1} << 32;
    static int64_t front(uint64_t taken) { return static_cast<int64_t>(taken % kFromBack); }
    static int64_t back(uint64_t taken) { return static_cast<int64_t>(taken / kFromBack); }
    std::atomic<uint64_t> taken_{0};
};

constexpr int64_t kOwnersShare = 4;

// Where a member of `size` begins when it owns a stretch of the items.
inline int64_t first_of_stretch(int member, int size, int64_t items) { return items * member / size; }

// body(item, next) for items of this member's stretch, then of others'; next: the item behind it in the own stretch, -1 where there is
// none. `stretch_of` gives a member's Stretch.
template <class StretchOf, class Body>
void take_stretches(int member, int size, int64_t items, const StretchOf& stretch_of, const Body& body) {
    for (int step = 0; step < size; ++step) {
        const int owner = (member + step) % size;
        const int64_t begin = first_of_stretch(owner, size, items), count = first_of_stretch(owner + 1, size, items) - begin;
        Stretch& stretch = stretch_of(owner);
        if (step == 0) {
            for (int64_t left = count; left > 0;) {
                const Stretch::Taken taken = stretch.take_front(count, std::max<int64_t>(left / kOwnersShare, 1));
                for (int64_t item = taken.begin; item < taken.end; ++item) body(begin + item, item + 1 < count ? begin + item + 1 : -1);
                left = taken.begin < taken.end ? count - taken.end : 0;
            }
        } else {
            for (int64_t item = stretch.take_back(count); item >= 0; item = stretch.take_back(count)) body(begin + item, -1);
        }
    }
}

}  // namespace lowbit
