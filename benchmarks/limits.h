// The machine's limits, to be read beside every measurement: how fast memory is read, and how many int8 operations a second the
// registers do. On a shared host both move by tens of percent within minutes, so a figure without them says little.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace limits {

using Clock = std::chrono::steady_clock;
constexpr int64_t kStreamBytes = int64_t{256} << 20;
constexpr int64_t kReadAhead = 2048;  // bytes; the best of 512 to 8192 on both kinds of machine
inline volatile int sink;

inline double seconds_of(const std::function<void()>& work) {
    const auto begin = Clock::now();
    work();
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

inline void on_threads(int threads, const std::function<void(int)>& work) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
    work(0);
    for (auto& other : others) other.join();
}

// What `bandwidth` reads: more than the caches hold, every page touched, in huge pages where there are any, which are read 6 to 12%
// faster under a hypervisor.
inline const uint8_t* make_stream() {
    constexpr size_t kHugePage = size_t{2} << 20;
    auto* stream = static_cast<uint8_t*>(aligned_alloc(kHugePage, kStreamBytes + kHugePage));
    if (stream == nullptr) abort();
    madvise(stream, kStreamBytes + kHugePage, MADV_HUGEPAGE);
    memset(stream, 1, kStreamBytes + 4096);
    return stream;
}

#ifdef __AVX512F__
inline int sum_of(const uint8_t* from, int64_t bytes) {
    __m512i sums[4] = {};
    // One line asked for before each that is read, and kept there: a burst of questions holds up the loads behind it, and read 28 GB/s where
    // this reads 32.
    const auto read = [&](const uint8_t* line, __m512i& sum) {
        asm volatile("prefetcht0 %1" : "+v"(sum) : "m"(line[kReadAhead]));
        sum = _mm512_add_epi32(sum, _mm512_loadu_si512(line));
    };
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        read(from + i, sums[0]);
        read(from + i + 64, sums[1]);
        read(from + i + 128, sums[2]);
        read(from + i + 192, sums[3]);
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
}
#else
inline int sum_of(const uint8_t* from, int64_t bytes) {
    const auto* words = reinterpret_cast<const uint64_t*>(from);
    uint64_t sums[16] = {};
    for (int64_t i = 0; i + 16 <= bytes / 8; i += 16)
        for (int k = 0; k < 16; ++k) sums[k] += words[i + k];
    for (int k = 1; k < 16; ++k) sums[0] += sums[k];
    return static_cast<int>(sums[0]);
}
#endif

// GB/s of all threads together.
inline double bandwidth(const uint8_t* stream, int threads) {
    const int64_t part = kStreamBytes / threads;
    return kStreamBytes / 1e9 / seconds_of([&] { on_threads(threads, [&](int index) { sink = sum_of(stream + index * part, part); }); });
}

// int8 GOP/s of the vector registers; 0 where there is no VNNI in 512 bits.
inline double vector_peak([[maybe_unused]] int threads) {
#ifdef __AVX512VNNI__
    constexpr int64_t kRepeats = 3000000;
    constexpr int kSums = 16;
    const double seconds = seconds_of([&] {
        on_threads(threads, [&](int) {
            __m512i sums[kSums];
            for (int k = 0; k < kSums; ++k) sums[k] = _mm512_set1_epi32(k);  // equal sums would be merged by the compiler
            __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
            for (int64_t i = 0; i < kRepeats; ++i) {
                asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
                for (int k = 0; k < kSums; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
            }
            __m512i all = sums[0];
            for (int k = 1; k < kSums; ++k) all = _mm512_add_epi32(all, sums[k]);
            sink = _mm512_reduce_add_epi32(all);
        });
    });
    return kRepeats * kSums * 128.0 * threads / seconds / 1e9;
#else
    return 0;
#endif
}

// int8 GOP/s of the tiles, operands held in them; 0 where there are none or the kernel does not lend them.
inline double tile_peak([[maybe_unused]] int threads) {
#ifdef __AMX_INT8__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
    // Static: gcc 12 believes that loading a configuration reads 8 of its 64 bytes, and drops stores to one on the stack.
    alignas(64) static uint8_t configuration[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        reinterpret_cast<uint16_t*>(configuration + 16)[tile] = 64;
        configuration[48 + tile] = 16;
    }
    alignas(64) static uint8_t ones[1024];
    memset(ones, 1, sizeof ones);
    constexpr int64_t kRepeats = 1000000;
    const double seconds = seconds_of([&] {
        on_threads(threads, [&](int) {
            _tile_loadconfig(configuration);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            _tile_loadd(4, ones, 64);
            _tile_loadd(5, ones, 64);
            _tile_loadd(6, ones, 64);
            _tile_loadd(7, ones, 64);
            for (int64_t i = 0; i < kRepeats; ++i) {
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            _tile_release();
        });
    });
    return kRepeats * 4 * 2.0 * 16 * 16 * 64 * threads / seconds / 1e9;
#else
    return 0;
#endif
}

}  // namespace limits
