// How near are the core's products to the machine's limits?
//
// Prints, interleaved round by round so that a slow minute of a shared host hits all of them alike, each beside the limits read in the
// same round. `decode`: 1 to 16 rows over more weights than the caches hold, against the bandwidth. `prefill`: many rows over one
// weight of the shapes of a 1.1 B and a 135 M Llama, against the peak of the unit that multiplies: the tiles where the core uses
// them, else the vector registers. `repack`: every kind of format into the form that products read and back, in bytes of that form.
//
//   g++ -O3 -std=c++17 -march=native -I src/lowbit/csrc benchmarks/cpu_product.cpp LIBRARY -o cpu_product -pthread
//   cpu_product decode [rounds] [threads] [bits] [group] [asymmetric 0|1]
//   cpu_product prefill [rounds] [threads] [instruction set]
//   cpu_product repack [rounds] [threads] [instruction set]
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

lowbit_format blocks(int type, int bits) {
    lowbit_format format{};
    format.kind = LOWBIT_BLOCKS;
    format.block_type = type;
    format.bits = bits;
    return format;
}

// Random enough; rand() would take ten times as long as what is measured.
uint32_t next_random() {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
}

// A weight as files have it: random codes, scales of ordinary size.
struct Canonical {
    lowbit_format format;
    int64_t rows, cols;
    std::vector<int32_t> codes;
    std::vector<uint16_t> scales;
    std::vector<uint8_t> zeros;
    std::vector<float> steps;
    float offset = 0.0f;

    Canonical(const lowbit_format& given, int64_t row_count, int64_t col_count) : format(given), rows(row_count), cols(col_count) {
        // No block has more than 6.6 bits for a weight.
        const int64_t bits = format.kind == LOWBIT_BLOCKS ? 7 : format.bits, words = (cols * bits + 31) / 32;
        const int64_t groups = format.group_size > 0 ? (cols + format.group_size - 1) / format.group_size : 1;
        codes.resize(static_cast<size_t>(rows * words));
        for (auto& word : codes) word = static_cast<int32_t>(next_random());
        scales.resize(static_cast<size_t>(rows * groups));
        for (auto& scale : scales) scale = static_cast<uint16_t>(0x2000 + next_random() % 1024);
        zeros.assign(static_cast<size_t>(rows * groups), 3);
        steps.assign(static_cast<size_t>(rows * groups), 0.01f);
    }

    void prepare(Weight& weight) { check(lowbit_prepare(&format, rows, cols, codes.data(), scales.data(), zeros.data(), steps.data(), weight.data, weight.bytes, &offset)); }
    void restore(const Weight& weight) { check(lowbit_restore(weight.data, weight.bytes, codes.data(), scales.data(), zeros.data(), steps.data(), &offset)); }
};

Weight make_room(const lowbit_format& format, int64_t rows, int64_t cols) {
    Weight weight{nullptr, lowbit_prepared_bytes(&format, rows, cols), rows, cols};
    if (weight.bytes < 0) check(LOWBIT_UNSUPPORTED);
    weight.data = static_cast<uint8_t*>(aligned_alloc(4096, static_cast<size_t>((weight.bytes + 4095) / 4096 * 4096)));
    memset(weight.data, 1, static_cast<size_t>(weight.bytes));
    return weight;
}

Weight make_weight(const lowbit_format& format, int64_t rows, int64_t cols, double* repack_seconds) {
    Canonical canonical(format, rows, cols);
    Weight weight = make_room(format, rows, cols);
    *repack_seconds = seconds_of([&] { canonical.prepare(weight); });
    return weight;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

std::vector<float> random_numbers(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (auto& number : numbers) number = static_cast<float>(next_random()) * 0x1p-32f - 0.5f;
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

// Both ways in turn, one format after the other, so that a slow minute hits all of them.
void repack(int rounds) {
    constexpr int64_t kRows = 5632, kCols = 2048;
    lowbit_format doubled = integers(4, 64, true), table = integers(4, 64, true);
    doubled.scale_block = 256;
    std::vector<float> levels(16);
    for (int i = 0; i < 16; ++i) levels[static_cast<size_t>(i)] = static_cast<float>(i - 8) / 8;
    table.kind = LOWBIT_LEVELS;
    table.level_count = 16;
    table.levels = levels.data();
    struct Case {
        const char* name;
        lowbit_format format;
        std::vector<double> prepared, restored;
    } cases[] = {{"int2_g64", integers(2, 64, true), {}, {}},        {"int3_g64", integers(3, 64, true), {}, {}},
                 {"int4_g64", integers(4, 64, true), {}, {}},        {"int4_asym_g32", integers(4, 32, false), {}, {}},
                 {"int4_g24", integers(4, 24, true), {}, {}},        {"int5_g64", integers(5, 64, true), {}, {}},
                 {"int6_g64", integers(6, 64, true), {}, {}},        {"int8_g64", integers(8, 64, true), {}, {}},
                 {"int4_g64_dq", doubled, {}, {}},                   {"table of 16, g64", table, {}, {}},
                 {"q2_k", blocks(LOWBIT_Q2_K, 2), {}, {}},           {"q3_k", blocks(LOWBIT_Q3_K, 3), {}, {}},
                 {"q4_k", blocks(LOWBIT_Q4_K, 4), {}, {}},           {"q5_k", blocks(LOWBIT_Q5_K, 5), {}, {}},
                 {"q6_k", blocks(LOWBIT_Q6_K, 6), {}, {}},           {"q4_1", blocks(LOWBIT_Q4_1, 4), {}, {}},
                 {"q5_1", blocks(LOWBIT_Q5_1, 5), {}, {}}};
    for (int round = 0; round < rounds; ++round)
        for (Case& one : cases) {
            Canonical canonical(one.format, kRows, kCols);
            Weight weight = make_room(one.format, kRows, kCols);
            const double size = static_cast<double>(weight.bytes) / 1e9;
            one.prepared.push_back(size / seconds_of([&] { canonical.prepare(weight); }));
            one.restored.push_back(size / seconds_of([&] { canonical.restore(weight); }));
            free(weight.data);
        }
    for (Case& one : cases) {
        printf("%-16s prepare %.1f GB/s", one.name, median(one.prepared));
        printf(" (%.1f-%.1f)", *std::min_element(one.prepared.begin(), one.prepared.end()), *std::max_element(one.prepared.begin(), one.prepared.end()));
        printf("   restore %.1f GB/s", median(one.restored));
        printf(" (%.1f-%.1f)\n", *std::min_element(one.restored.begin(), one.restored.end()), *std::max_element(one.restored.begin(), one.restored.end()));
    }
}

}  // namespace

int main(int count, char** arguments) {
    const auto number = [&](int index, int otherwise) { return count > index ? atoi(arguments[index]) : otherwise; };
    const char* what = count > 1 ? arguments[1] : "";
    const bool decodes = !strcmp(what, "decode"), repacks = !strcmp(what, "repack");
    if (!decodes && !repacks && strcmp(what, "prefill")) {
        fprintf(stderr, "cpu_product decode [rounds] [threads] [bits] [group] [asymmetric 0|1]\ncpu_product prefill|repack [rounds] [threads] [instruction set]\n");
        return 2;
    }
    check(lowbit_set_threads(number(3, 0)));
    if (!decodes && count > 4) check(lowbit_set_isa(arguments[4]));
    printf("%s, %d threads\n", lowbit_isa(), lowbit_threads());
    const int rounds = number(2, 5);
    if (decodes) decode(rounds, integers(number(4, 4), number(5, 64), !number(6, 0)));
    else if (repacks) repack(rounds);
    else prefill(rounds);
    return 0;
}
