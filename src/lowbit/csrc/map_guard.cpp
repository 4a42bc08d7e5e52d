#include "map_guard.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>

#include "error.h"
#include "format.h"

namespace lowbit {

std::atomic<bool> some_map_damaged{false};

namespace {

constexpr int kMostMaps = 1024;
constexpr uintptr_t kFree = 0, kTaken = 1;  // of `begin`, before it is an address

struct Guard {
    std::atomic<uintptr_t> begin{kFree}, end{0};
    std::atomic<bool> damaged{false};
    std::string name;
};

Guard guards[kMostMaps];  // found by a signal handler, so without a lock
struct sigaction before;
uintptr_t page_bytes;

Guard* guard_of(uintptr_t address) {
    for (Guard& guard : guards) {
        const uintptr_t begin = guard.begin.load(std::memory_order_acquire);
        if (begin > kTaken && address >= begin && address < guard.end.load(std::memory_order_relaxed)) return &guard;
    }
    return nullptr;
}

// Zeros from this page to the end of the map, which one call does: what a file has lost it has lost to its end.
bool put_zeros(Guard& guard, uintptr_t address) {
    const int error = errno;
    const uintptr_t page = address / page_bytes * page_bytes;
    void* put = mmap(reinterpret_cast<void*>(page), guard.end.load() - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    errno = error;
    if (put == MAP_FAILED) return false;
    guard.damaged.store(true);
    some_map_damaged.store(true);
    return true;
}

// To whom it went before. The default comes by itself when the instruction is tried again, or when the signal is sent again.
void hand_on(int number, siginfo_t* info, void* context) {
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(number);
    const bool sent = info->si_code <= 0;
    if (sent && before.sa_handler == SIG_IGN) return;
    signal(number, SIG_DFL);
    if (sent) raise(number);
}

void on_bus_error(int number, siginfo_t* info, void* context) {
    // Only the kernel's own name an address.
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    Guard* guard = info->si_code > 0 ? guard_of(address) : nullptr;
    if (!guard || !put_zeros(*guard, address)) hand_on(number, info, context);
}

bool install() {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before) == 0;
}

}  // namespace

int check_mapped(const void* address) {
    if (!some_map_damaged.load(std::memory_order_relaxed)) return LOWBIT_OK;
    const Guard* guard = guard_of(reinterpret_cast<uintptr_t>(address));
    if (!guard || !guard->damaged.load()) return LOWBIT_OK;
    return fail(LOWBIT_BAD_WEIGHT, "%s was truncated while it was in use: get it again, and load the model anew", guard->name.c_str());
}

}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_guard_map(const void* address, int64_t bytes, const char* name) try {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    if (begin <= kTaken || bytes < 1 || bytes > kMostElements || !name)
        return fail(LOWBIT_BAD_ARGUMENT, "a map of %lld bytes, or one without a name, cannot be guarded", static_cast<long long>(bytes));
    static const bool installed = install();
    if (!installed) return fail(LOWBIT_UNSUPPORTED, "the system lets nobody look after a map that is cut off");
    for (Guard& guard : guards) {
        uintptr_t free = kFree;
        if (!guard.begin.compare_exchange_strong(free, kTaken)) continue;
        guard.name = name;
        guard.damaged.store(false);
        guard.end.store(begin + static_cast<uintptr_t>(bytes));
        guard.begin.store(begin, std::memory_order_release);
        return LOWBIT_OK;
    }
    return fail(LOWBIT_NO_MEMORY, "%d maps are guarded already", kMostMaps);
} catch (...) {
    return caught();
}

extern "C" int lowbit_check_map(const void* address) { return check_mapped(address); }

extern "C" int lowbit_release_map(const void* address) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (Guard& guard : guards)
        if (begin > kTaken && guard.begin.load() == begin) {
            guard.begin.store(kFree);
            return LOWBIT_OK;
        }
    return fail(LOWBIT_BAD_ARGUMENT, "no guarded map begins at this address");
}
