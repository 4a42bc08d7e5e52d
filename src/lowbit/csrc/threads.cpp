#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"
#include "machine_limits.h"
#include "place.h"
#include "stretches.h"

namespace lowbit {
namespace {

// About 60 microseconds: longer than the gaps between the products of one token, shorter than anybody would notice in `top`.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    int64_t items = 0;
    int64_t grain = 1;
    RangeFunction function = nullptr;
    void* context = nullptr;
    Sharing sharing = Sharing::kInTurn;
};

struct alignas(64) Own {
    Stretch stretch;
    Place place;
};

thread_local bool inside_job = false;

class Pool {
public:
    explicit Pool(int threads) : process_(getpid()) {
        workers_.reserve(static_cast<size_t>(threads));
        own_ = std::vector<Own>(static_cast<size_t>(threads));
        for (int i = 1; i < threads; ++i) {
            try {
                workers_.emplace_back([this, i] { work(i); });
            } catch (const std::system_error&) {
                break;  // The machine gives no more threads; the ones that exist take all parts.
            } catch (const std::bad_alloc&) {
                break;
            }
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            stopping_.store(true);
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    pid_t process() const { return process_; }

    void run(const Job& job) {
        std::lock_guard<std::mutex> one_job(run_mutex_);
        job_ = job;
        next_.store(0, std::memory_order_relaxed);
        for (Own& own : own_) own.stretch.reset();
        own_[0].place.note();
        running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        generation_.fetch_add(1);
        if (sleepers_.load() > 0) {
            // Taking the lock orders this wake-up after a worker that has counted itself but not yet gone to sleep.
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        claim(0);
        for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
            relax();
            if (spins > kSpins) std::this_thread::yield();
        }
        // What a part threw may not leave a thread, and not the caller's before the others are done with its stack.
        if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
    }

private:
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void claim(int thread) {
        inside_job = true;
        if (job_.sharing == Sharing::kStretches) {
            const int64_t parts = (job_.items + job_.grain - 1) / job_.grain;
            take_stretches(thread, size(), parts, [&](int owner) -> Stretch& { return own_[static_cast<size_t>(owner)].stretch; },
                           [&](int64_t part, int64_t) { run_part(part * job_.grain, thread); });
        } else {
            for (;;) {
                const int64_t begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
                if (begin >= job_.items) break;
                run_part(begin, thread);
            }
        }
        inside_job = false;
    }

    void run_part(int64_t begin, int thread) {
        try {
            job_.function(job_.context, begin, std::min(begin + job_.grain, job_.items), thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(thrown_mutex_);
            if (!thrown_) thrown_ = std::current_exception();
        }
    }

    void work(int thread) {
        uint64_t seen = 0;
        for (;;) {
            seen = await_generation(seen, thread);
            if (stopping_.load()) return;
            claim(thread);
            own_[static_cast<size_t>(thread)].place.restore();
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    uint64_t await_generation(uint64_t seen, int thread) {
        for (int spins = 0; spins < kSpins; ++spins) {
            const uint64_t now = generation_.load(std::memory_order_acquire);
            if (now != seen) return now;
            relax();
        }
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleepers_.fetch_sub(1);
        lock.unlock();
        Place::settle(thread, size(), [&](int member) -> Place& { return own_[static_cast<size_t>(member)].place; });
        return generation_.load();
    }

    const pid_t process_;
    std::vector<std::thread> workers_;
    std::vector<Own> own_;  // of who called and of each worker
    std::mutex run_mutex_, sleep_mutex_, thrown_mutex_;
    std::exception_ptr thrown_;
    std::condition_variable wake_;
    Job job_;
    alignas(64) std::atomic<uint64_t> generation_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> running_{0};
};

std::atomic<int> wanted_threads{0};
// One pool per thread count, made when first used, because another Python thread may still be inside the previous one.
std::atomic<Pool*> pools[kMostThreads + 1];

// The pool of this process. A pool inherited through fork has no threads and possibly locked mutexes: it is left where it is (a few
// hundred bytes) and a new one takes its place.
Pool* pool_of(int threads) {
    for (;;) {
        Pool* pool = pools[threads].load();
        if (pool && pool->process() == getpid()) return pool;
        Pool* fresh = new Pool(threads);
        if (pools[threads].compare_exchange_strong(pool, fresh)) return fresh;
        delete fresh;
    }
}

}  // namespace

int thread_count() {
    int threads = wanted_threads.load();
    if (threads == 0) {
        threads = default_threads();
        wanted_threads.store(threads);
    }
    return threads;
}

void set_thread_count(int threads) { wanted_threads.store(threads > 0 ? std::min(threads, kMostThreads) : default_threads()); }

void run_parallel(int64_t items, int64_t grain, RangeFunction function, void* context, int threads, Sharing sharing) {
    if (items <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    if (inside_job || items <= grain || threads == 1) {
        function(context, 0, items, 0);
        return;
    }
    pool_of(threads)->run({items, grain, function, context, sharing});
}

}  // namespace lowbit

extern "C" int lowbit_set_threads(int threads) try {
    if (threads < 0) return lowbit::fail(LOWBIT_BAD_ARGUMENT, "%d threads asked for; give 1 or more, or 0 for the default", threads);
    lowbit::set_thread_count(threads);
    return LOWBIT_OK;
} catch (...) {
    return lowbit::caught();
}

extern "C" int lowbit_threads(void) try {
    return lowbit::thread_count();
} catch (...) {
    lowbit::caught();  // no memory to read what a container allows: one thread works
    return 1;
}
