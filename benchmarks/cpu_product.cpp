// How near are the core's products to the machine's limits?
//
// Prints, interleaved round by round so that a slow minute of a shared host hits all of them alike: the DRAM read bandwidth, the
// integer peak of the registers, decoding (1 row over more weights than the caches hold) and prefill (512 rows over one weight),
// each beside the limit measured in the same round. x86-64 with AVX-512 VNNI only.
//
//   g++ -O3 -std=c++17 -mavx512f -mavx512vnni -I src/lowbit/csrc benchmarks/cpu_product.cpp LIBRARY -o cpu_product -pthread
//   cpu_product [bits] [group] [asymmetric 0|1] [rounds] [tokens of prefill] [threads]
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "lowbit.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kRows = 5632, kCols = 2048;
constexpr int64_t kStreamBytes = int64_t{256} << 20;
constexpr int kLanesOfSums = 16;

double seconds_of(const std::function<void()>& work) {
    const auto begin = Clock::now();
    work();
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

void on_all_threads(const std::function<void(int, int)>& work) {
    const int threads = lowbit_threads();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, i, threads);
    work(0, threads);
    for (auto& other : others) other.join();
}

volatile int sink;

double bandwidth(const uint8_t* stream) {
    return kStreamBytes / 1e9 / seconds_of([&] {
        on_all_threads([&](int index, int count) {
            const int64_t part = kStreamBytes / count;
            const uint8_t* from = stream + index * part;
            __m512i sums[4] = {};
            for (int64_t i = 0; i + 256 <= part; i += 256)
                for (int k = 0; k < 4; ++k) {
                    _mm_prefetch(reinterpret_cast<const char*>(from + i + 2048 + k * 64), _MM_HINT_T0);
                    sums[k] = _mm512_add_epi32(sums[k], _mm512_loadu_si512(from + i + k * 64));
                }
            sink = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
        });
    });
}

double integer_peak() {
    constexpr int64_t kRepeats = 3000000;
    const double seconds = seconds_of([&] {
        on_all_threads([&](int, int) {
            __m512i sums[kLanesOfSums];
            for (int k = 0; k < kLanesOfSums; ++k) sums[k] = _mm512_set1_epi32(k);  // equal sums would be merged by the compiler
            __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
            for (int64_t i = 0; i < kRepeats; ++i) {
                asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
                for (int k = 0; k < kLanesOfSums; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
            }
            __m512i all = sums[0];
            for (int k = 1; k < kLanesOfSums; ++k) all = _mm512_add_epi32(all, sums[k]);
            sink = _mm512_reduce_add_epi32(all);
        });
    });
    return kRepeats * kLanesOfSums * 128.0 * lowbit_threads() / seconds / 1e9;
}

void check(int status) {
    if (status != LOWBIT_OK) {
        fprintf(stderr, "%s\n", lowbit_last_error());
        exit(1);
    }
}

struct Weight {
    uint8_t* data;
    int64_t bytes;
};

Weight make_weight(const lowbit_format& format, double* repack_seconds) {
    const int64_t words = (kCols * format.bits + 31) / 32, groups = format.group_size > 0 ? (kCols + format.group_size - 1) / format.group_size : 1;
    std::vector<int32_t> codes(static_cast<size_t>(kRows * words));
    for (auto& word : codes) word = rand();
    std::vector<uint16_t> scales(static_cast<size_t>(kRows * groups), 0x2000);
    std::vector<uint8_t> zeros(static_cast<size_t>(kRows * groups), 3);
    Weight weight{nullptr, lowbit_prepared_bytes(&format, kRows, kCols)};
    if (weight.bytes < 0) check(LOWBIT_UNSUPPORTED);
    weight.data = static_cast<uint8_t*>(aligned_alloc(4096, static_cast<size_t>((weight.bytes + 4095) / 4096 * 4096)));
    memset(weight.data, 1, static_cast<size_t>(weight.bytes));
    *repack_seconds = seconds_of([&] {
        check(lowbit_prepare(&format, kRows, kCols, codes.data(), scales.data(), zeros.data(), nullptr, weight.data, weight.bytes));
    });
    return weight;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
    const auto option = [&](int index, int otherwise) { return count > index ? atoi(arguments[index]) : otherwise; };
    lowbit_format format{};
    format.bits = option(1, 4);
    format.group_size = option(2, 64);
    format.symmetric = !option(3, 0);
    format.scale_type = LOWBIT_SCALE_FP16;
    const int rounds = option(4, 7), tokens = option(5, 512);
    check(lowbit_set_threads(option(6, 0)));
    uint8_t* stream = static_cast<uint8_t*>(aligned_alloc(4096, kStreamBytes + 4096));
    memset(stream, 1, kStreamBytes + 4096);
    std::vector<Weight> weights;
    std::vector<double> repacks;
    for (int i = 0; i < 24; ++i) {
        double seconds;
        weights.push_back(make_weight(format, &seconds));
        repacks.push_back(static_cast<double>(weights.back().bytes) / 1e9 / seconds);
    }
    printf("isa %s, %d threads, int%d group %d %s, [%lld, %lld]; repack %.1f GB/s (packed bytes read)\n", lowbit_isa(), lowbit_threads(),
           format.bits, format.group_size, format.symmetric ? "sym" : "asym", static_cast<long long>(kRows), static_cast<long long>(kCols), median(repacks));
    const int64_t most = std::max(tokens, 16);
    std::vector<float> x(static_cast<size_t>(most * kCols)), y(static_cast<size_t>(most * kRows));
    for (auto& value : x) value = static_cast<float>(rand()) / RAND_MAX - 0.5f;
    const auto product = [&](const Weight& weight, int rows) {
        check(lowbit_run(weight.data, weight.bytes, x.data(), LOWBIT_FP32, rows, kCols, nullptr, y.data(), LOWBIT_FP32, kRows, LOWBIT_COMPUTE_INT8));
    };
    const int few[] = {1, 2, 4, 8, 16};
    std::vector<double> shares[5], prefill_shares;
    for (int round = 0; round < rounds; ++round) {
        const double gb = bandwidth(stream), peak = integer_peak();
        printf("round %d: DRAM %.1f GB/s, registers %.0f GOP/s |", round, gb, peak);
        for (int i = 0; i < 5; ++i) {
            const double seconds = seconds_of([&] {
                for (const Weight& weight : weights) product(weight, few[i]);
            });
            const double rate = static_cast<double>(weights[0].bytes * static_cast<int64_t>(weights.size())) / 1e9 / seconds;
            shares[i].push_back(rate / gb);
            printf(" %d rows %.1f GB/s", few[i], rate);
        }
        double best = 1e9;
        for (int i = 0; i < 3; ++i) best = std::min(best, seconds_of([&] { product(weights[0], tokens); }));
        const double rate = 2.0 * tokens * kRows * kCols / best / 1e9;
        prefill_shares.push_back(rate / peak);
        printf(" | %d rows %.0f GOP/s\n", tokens, rate);
    }
    printf("median share of the bandwidth:");
    for (int i = 0; i < 5; ++i) printf("  %d rows %.0f%%", few[i], 100 * median(shares[i]));
    printf("; median share of the integer peak: %.0f%%\n", 100 * median(prefill_shares));
    return 0;
}
