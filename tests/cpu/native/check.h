// What the native checks of the core share: expectations, random numbers that are the same on every machine, canonical weights.
//
// The checks know the core through its C headers alone and compare it with definitions written out here in plain loops. Every buffer is
// exactly as long as the header says and lies on the heap, so that a sanitizer sees the first byte read or written beyond one. They run
// natively, under sanitizers, and under an emulator for processors that are not at hand.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine_api.h"
#include "lowbit.h"

namespace check {

extern int failures;

// Counts what does not hold and says where; the program goes on, so that one run shows everything.
void expect(bool holds, const char* what, const char* file, int line);
// A call must return this code and leave a sentence of more than a few letters.
void expect_refused(int status, int code, const char* what, const char* file, int line);
#define EXPECT(condition) check::expect((condition), #condition, __FILE__, __LINE__)
#define EXPECT_REFUSED(call, code) check::expect_refused((call), (code), #call, __FILE__, __LINE__)

// splitmix64; `uniform` is in [-1, 1), the sum of four of them is near enough to a bell for weights.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next();
    int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
    float uniform() { return static_cast<float>(static_cast<double>(next() >> 11) * 0x1.0p-52 - 1.0); }
    float bell() { return (uniform() + uniform() + uniform() + uniform()) * 0.8f; }
    std::vector<float> bells(int64_t count);

private:
    uint64_t state_;
};

struct NamedFormat {
    std::string name;
    lowbit_format format;
};
// Integers of every width, symmetric, asymmetric and with fine zeros, awkward group sizes, every type of scale, and tables of levels.
const std::vector<NamedFormat>& formats();
const lowbit_format& format_named(const std::string& name);

// Memory on a 64-byte boundary that ends exactly where it says.
class Aligned {
public:
    explicit Aligned(int64_t bytes);
    uint8_t* data() const { return data_.get(); }
    int64_t size() const { return bytes_; }

private:
    struct Free {
        void operator()(uint8_t* data) const { free(data); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    int64_t bytes_;
};

// A weight in the canonical form.
struct Weight {
    lowbit_format format{};
    int64_t rows = 0, cols = 0;
    std::vector<int32_t> codes;
    std::vector<uint8_t> scales, zeros;
    float unit = 1.0f;

    Weight(const lowbit_format& format, int64_t rows, int64_t cols);
    bool has_zeros() const { return format.kind == LOWBIT_INT && format.symmetric != LOWBIT_SYMMETRIC; }
    int64_t groups() const;
    const uint8_t* zeros_or_null() const { return has_zeros() ? zeros.data() : nullptr; }
    uint32_t code(int64_t row, int64_t col) const;
    // By definition: w = scale * (code - zero) or scale * levels[code].
    std::vector<double> values() const;
};

Weight quantized(const lowbit_format& format, int64_t rows, int64_t cols, uint64_t seed, float size = 1.0f, bool search = false);
std::unique_ptr<Aligned> prepared(const Weight& weight);

// Norm of the difference over the norm of what is expected.
double distance(const float* y, const std::vector<double>& expected);

// Sizes that are wrong nearly everywhere.
constexpr int64_t kHostileSizes[] = {INT64_MIN, INT32_MIN, -2, -1, 0, 1, 3, 17, INT32_MAX, int64_t{1} << 40, INT64_MAX};

// Names of the instruction sets that this processor runs, of those the core may know.
std::vector<const char*> instruction_sets();

// The groups of checks, one per file.
void check_weights();
void check_tight();
void check_products();
void check_selection();
void check_engine();
void check_experts();
void check_slots();
void check_refusals();
void check_hostile();
void check_memory();
void check_face();
void check_threads();

}  // namespace check
