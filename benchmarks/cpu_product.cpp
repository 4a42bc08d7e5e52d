// How near are the core's products to the machine's limits?
//
// Prints, interleaved round by round so that a slow minute of a shared host hits all of them alike, each beside the limits read in the
// same round. `decode`: 1 to 16 rows over more weights than the caches hold, against the bandwidth. `prefill`: many rows over one
// weight of the shapes of a 1.1 B and a 135 M Llama, against the peak of the unit that multiplies: the tiles where the core uses
// them, else the vector registers.
//
//   g++ -O3 -std=c++17 -march=native -I src/lowbit/csrc benchmarks/cpu_product.cpp LIBRARY -o cpu_product -pthread
//   cpu_product decode [rounds] [threads] [bits] [group] [asymmetric 0|1]
//   cpu_product prefill [rounds] [threads] [instruction set]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "limits.h"
#include "lowbit.h"

namespace {

using limits::seconds_of;

void check(int status) {
    if (status != LOWBIT_OK) {
        fprintf(stderr, "%s\n", lowbit_last_error());
        exit(1);
    }
}

struct Weight {
    uint8_t* data;
    int64_t bytes, rows, cols;
};

lowbit_format integers(int bits, int group, bool symmetric) {
    lowbit_format format{};
    format.bits = bits;
    format.group_size = group;
    format.symmetric = symmetric;
    format.scale_type = LOWBIT_SCALE_FP16;
    return format;
}

Weight make_weight(const lowbit_format& format, int64_t rows, int64_t cols, double* repack_seconds) {
    const int64_t words = (cols * format.bits + 31) / 32, groups = format.group_size > 0 ? (cols + format.group_size - 1) / format.group_size : 1;
    std::vector<int32_t> codes(static_cast<size_t>(rows * words));
    for (auto& word : codes) word = rand();
    std::vector<uint16_t> scales(static_cast<size_t>(rows * groups));
    for (auto& scale : scales) scale = static_cast<uint16_t>(0x2000 + rand() % 1024);
    std::vector<uint8_t> zeros(static_cast<size_t>(rows * groups), 3);
    Weight weight{nullptr, lowbit_prepared_bytes(&format, rows, cols), rows, cols};
    if (weight.bytes < 0) check(LOWBIT_UNSUPPORTED);
    weight.data = static_cast<uint8_t*>(aligned_alloc(4096, static_cast<size_t>((weight.bytes + 4095) / 4096 * 4096)));
    memset(weight.data, 1, static_cast<size_t>(weight.bytes));
    *repack_seconds = seconds_of(
        [&] { check(lowbit_prepare(&format, rows, cols, codes.data(), scales.data(), zeros.data(), nullptr, weight.data, weight.bytes)); });
    return weight;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

std::vector<float> random_numbers(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (auto& number : numbers) number = static_cast<float>(rand()) / RAND_MAX - 0.5f;
    return numbers;
}

void product(const Weight& weight, const std::vector<float>& x, std::vector<float>& y, int64_t tokens) {
    check(lowbit_run(weight.data, weight.bytes, x.data(), LOWBIT_FP32, tokens, weight.cols, nullptr, y.data(), LOWBIT_FP32, weight.rows,
                     LOWBIT_COMPUTE_INT8));
}

void decode(int rounds, const lowbit_format& format) {
    constexpr int64_t kRows = 5632, kCols = 2048, kCopies = 24;
    const uint8_t* stream = limits::make_stream();
    std::vector<Weight> weights;
    std::vector<double> repacks;
    for (int64_t i = 0; i < kCopies; ++i) {
        double seconds;
        weights.push_back(make_weight(format, kRows, kCols, &seconds));
        repacks.push_back(static_cast<double>(weights.back().bytes) / 1e9 / seconds);
    }
    printf("int%d group %d %s, [%lld, %lld]; repack %.1f GB/s (packed bytes read)\n", format.bits, format.group_size, format.symmetric ? "sym" : "asym",
           static_cast<long long>(kRows), static_cast<long long>(kCols), median(repacks));
    const int tokens[] = {1, 2, 4, 8, 16};
    const std::vector<float> x = random_numbers(16 * kCols);
    std::vector<float> y(16 * kRows);
    std::vector<double> shares[5];
    for (int round = 0; round < rounds; ++round) {
        const double gb = limits::bandwidth(stream, lowbit_threads());
        printf("round %d: DRAM %.1f GB/s |", round, gb);
        for (int i = 0; i < 5; ++i) {
            const double seconds = seconds_of([&] {
                for (const Weight& weight : weights) product(weight, x, y, tokens[i]);
            });
            const double rate = static_cast<double>(weights[0].bytes * kCopies) / 1e9 / seconds;
            shares[i].push_back(rate / gb);
            printf(" %d rows %.1f GB/s", tokens[i], rate);
        }
        printf("\n");
    }
    printf("median share of the bandwidth:");
    for (int i = 0; i < 5; ++i) printf("  %d rows %.0f%%", tokens[i], 100 * median(shares[i]));
    printf("\n");
}

struct Case {
    const char* format;
    int64_t tokens;
    Weight weight;
    std::vector<double> rates, peaks, shares;
};

// Includes rounding the activations. The peak is read before each case: on a shared host it halves and doubles within a second.
void prefill(int rounds) {
    constexpr int64_t kShapes[][2] = {{2048, 2048}, {5632, 2048}, {2048, 5632}, {576, 576}, {1536, 576}, {576, 1536}};
    constexpr int64_t kMost = 4096;
    const struct {
        const char* name;
        lowbit_format format;
    } formats[] = {{"int4_g64", integers(4, 64, true)}, {"int4_g128", integers(4, 128, true)}, {"int4_g32", integers(4, 32, true)},
                   {"int4_asym_g64", integers(4, 64, false)}, {"int8_g64", integers(8, 64, true)}};
    std::vector<Case> cases;
    for (const auto& row : formats)
        for (const auto& shape : kShapes) {
            double seconds;
            const Weight weight = make_weight(row.format, shape[0], shape[1], &seconds);
            for (int64_t tokens : {int64_t{512}, kMost}) cases.push_back({row.name, tokens, weight, {}, {}, {}});
        }
    const std::vector<float> x = random_numbers(kMost * 5632);
    std::vector<float> y(static_cast<size_t>(kMost * 5632));
    const bool tiles = !strcmp(lowbit_isa(), "amx");
    for (int round = 0; round < rounds; ++round)
        for (Case& one : cases) {
            one.peaks.push_back(tiles ? limits::tile_peak(lowbit_threads()) : limits::vector_peak(lowbit_threads()));
            double best = 1e9;
            for (int i = 0; i < 3; ++i) best = std::min(best, seconds_of([&] { product(one.weight, x, y, one.tokens); }));
            one.rates.push_back(2.0 * static_cast<double>(one.tokens * one.weight.rows * one.weight.cols) / best / 1e9);
            one.shares.push_back(one.rates.back() / one.peaks.back());
        }
    for (const Case& one : cases) {
        printf("%-14s [%4lld, %4lld] %4lld tokens %3.0f%% of the %s, GOP/s of peak:", one.format, static_cast<long long>(one.weight.rows),
               static_cast<long long>(one.weight.cols), static_cast<long long>(one.tokens), 100 * median(one.shares), tiles ? "tiles" : "vectors");
        for (size_t i = 0; i < one.rates.size(); ++i) printf(" %.0f/%.0f", one.rates[i], one.peaks[i]);
        printf("\n");
    }
}

}  // namespace

int main(int count, char** arguments) {
    const auto number = [&](int index, int otherwise) { return count > index ? atoi(arguments[index]) : otherwise; };
    const bool decodes = count > 1 && !strcmp(arguments[1], "decode");
    if (!decodes && (count < 2 || strcmp(arguments[1], "prefill"))) {
        fprintf(stderr, "cpu_product decode [rounds] [threads] [bits] [group] [asymmetric 0|1]\ncpu_product prefill [rounds] [threads] [instruction set]\n");
        return 2;
    }
    check(lowbit_set_threads(number(3, 0)));
    if (!decodes && count > 4) check(lowbit_set_isa(arguments[4]));
    printf("%s, %d threads\n", lowbit_isa(), lowbit_threads());
    const int rounds = number(2, 5);
    if (decodes) decode(rounds, integers(number(4, 4), number(5, 64), !number(6, 0)));
    else prefill(rounds);
    return 0;
}
