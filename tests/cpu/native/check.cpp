#include "check.h"

#include <cmath>
#include <cstring>

namespace check {

int failures = 0;

void expect(bool holds, const char* what, const char* file, int line) {
    if (holds) return;
    ++failures;
    fprintf(stderr, "%s:%d: does not hold on %s: %s\n", file, line, lowbit_isa(), what);
}

void expect_refused(int status, int code, const char* what, const char* file, int line) {
    constexpr size_t kShortSentence = 10;
    if (status == code && strlen(lowbit_last_error()) >= kShortSentence) return;
    ++failures;
    fprintf(stderr, "%s:%d: returned %d where %d was due, saying '%s': %s\n", file, line, status, code, lowbit_last_error(), what);
}

uint64_t Random::next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

std::vector<float> Random::bells(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = bell();
    return numbers;
}

namespace {

lowbit_format integers(int bits, lowbit_symmetry symmetric, int group, int scale) {
    lowbit_format format{};
    format.bits = bits;
    format.kind = LOWBIT_INT;
    format.symmetric = symmetric;
    format.group_size = group;
    format.scale_type = scale;
    return format;
}

lowbit_format levels(int bits, int group, int scale, const float* table) {
    lowbit_format format = integers(bits, LOWBIT_SYMMETRIC, group, scale);
    format.kind = LOWBIT_LEVELS;
    format.level_count = 1 << bits;
    format.levels = table;
    return format;
}

const float kNf4[16] = {-1.0f,       -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                        0.0795803f,  0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f};
const float kNf3[8] = {-1.0f, -0.5350227f, -0.24693143f, 0.0f, 0.18333748f, 0.381954f, 0.6229857f, 1.0f};
const float kFp4[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Six bits of which two are mantissa, and eight of which three are; the last code of each half of the eight-bit ones is no number.
const float* small_floats(int bits) {
    static float six[64], eight[256];
    for (int code = 0; code < 64; ++code) {
        const int exponent = code % 32 / 4, mantissa = code % 4;
        const float size = exponent ? std::ldexp(4.0f + static_cast<float>(mantissa), exponent - 5) : static_cast<float>(mantissa) * 0.125f;
        six[code] = code < 32 ? size : -size;
    }
    for (int code = 0; code < 256; ++code) {
        const int exponent = code % 128 / 8, mantissa = code % 8;
        const float size = exponent ? std::ldexp(8.0f + static_cast<float>(mantissa), exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
        eight[code] = code % 128 == 127 ? NAN : code < 128 ? size : -size;
    }
    return bits == 6 ? six : eight;
}

}  // namespace

const std::vector<NamedFormat>& formats() {
    static const std::vector<NamedFormat> all = {
        {"int2_g64", integers(2, LOWBIT_SYMMETRIC, 64, LOWBIT_SCALE_FP16)},
        {"int3_asym_g32_fp32", integers(3, LOWBIT_ASYMMETRIC, 32, LOWBIT_SCALE_FP32)},
        {"int4_g64", integers(4, LOWBIT_SYMMETRIC, 64, LOWBIT_SCALE_FP16)},
        {"int4_asym_g64", integers(4, LOWBIT_ASYMMETRIC, 64, LOWBIT_SCALE_FP16)},
        {"int4_fine_g64", integers(4, LOWBIT_FINE_ZEROS, 64, LOWBIT_SCALE_FP16)},
        {"int3_fine_g20_bf16", integers(3, LOWBIT_FINE_ZEROS, 20, LOWBIT_SCALE_BF16)},
        {"int2_fine_g16", integers(2, LOWBIT_FINE_ZEROS, 16, LOWBIT_SCALE_FP16)},
        {"int5_fine_channel_fp32", integers(5, LOWBIT_FINE_ZEROS, -1, LOWBIT_SCALE_FP32)},
        {"int4_g32_bf16", integers(4, LOWBIT_SYMMETRIC, 32, LOWBIT_SCALE_BF16)},
        {"int4_g24", integers(4, LOWBIT_SYMMETRIC, 24, LOWBIT_SCALE_FP16)},
        {"int4_g16", integers(4, LOWBIT_SYMMETRIC, 16, LOWBIT_SCALE_FP16)},
        {"int4_channel", integers(4, LOWBIT_SYMMETRIC, -1, LOWBIT_SCALE_FP16)},
        {"int5_g128_fp32", integers(5, LOWBIT_SYMMETRIC, 128, LOWBIT_SCALE_FP32)},
        {"int6_asym_channel", integers(6, LOWBIT_ASYMMETRIC, -1, LOWBIT_SCALE_FP16)},
        {"int7_g20", integers(7, LOWBIT_SYMMETRIC, 20, LOWBIT_SCALE_FP16)},
        {"int8_g64", integers(8, LOWBIT_SYMMETRIC, 64, LOWBIT_SCALE_FP16)},
        {"int8_asym_g32", integers(8, LOWBIT_ASYMMETRIC, 32, LOWBIT_SCALE_FP16)},
        {"nf4_g64", levels(4, 64, LOWBIT_SCALE_FP16, kNf4)},
        {"nf3_g64", levels(3, 64, LOWBIT_SCALE_FP16, kNf3)},
        {"fp6_g64", levels(6, 64, LOWBIT_SCALE_FP16, small_floats(6))},
        {"fp8_g64", levels(8, 64, LOWBIT_SCALE_FP16, small_floats(8))},
        {"mxfp4", levels(4, 32, LOWBIT_SCALE_E8M0, kFp4)},
        {"nvfp4", levels(4, 16, LOWBIT_SCALE_E4M3, kFp4)},
    };
    return all;
}

const lowbit_format& format_named(const std::string& name) {
    for (const NamedFormat& named : formats())
        if (named.name == name) return named.format;
    fprintf(stderr, "no format %s\n", name.c_str());
    abort();
}

Aligned::Aligned(int64_t bytes) : bytes_(bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, static_cast<size_t>(bytes))) abort();
    data_.reset(static_cast<uint8_t*>(data));
}

namespace {

int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

int bytes_of_scale(int type) { return type == LOWBIT_SCALE_FP32 ? 4 : type <= LOWBIT_SCALE_FP16 ? 2 : 1; }

double small_float(uint32_t bits, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const double mantissa = static_cast<double>(bits & ((1u << mantissa_bits) - 1)) / (1 << mantissa_bits);
    const double size = exponent ? std::ldexp(1.0 + mantissa, exponent - bias) : std::ldexp(mantissa, 1 - bias);
    return bits >> (exponent_bits + mantissa_bits) & 1 ? -size : size;
}

double scale_at(const Weight& weight, int64_t index) {
    const uint8_t* at = weight.scales.data() + index * bytes_of_scale(weight.format.scale_type);
    float whole = 0.0f;
    uint16_t half = 0;
    switch (weight.format.scale_type) {
        case LOWBIT_SCALE_FP32: memcpy(&whole, at, sizeof whole); return static_cast<double>(whole);
        case LOWBIT_SCALE_BF16: memcpy(&half, at, sizeof half); return small_float(half, 8, 7);
        case LOWBIT_SCALE_FP16: memcpy(&half, at, sizeof half); return small_float(half, 5, 10);
        case LOWBIT_SCALE_E8M0: return std::ldexp(1.0, *at - 127);
        default: return small_float(*at, 4, 3) * static_cast<double>(weight.unit);
    }
}

}  // namespace

Weight::Weight(const lowbit_format& given, int64_t row_count, int64_t col_count) : format(given), rows(row_count), cols(col_count) {
    codes.assign(static_cast<size_t>(rows * divide_up(cols * format.bits, 32)), -1);
    scales.assign(static_cast<size_t>(rows * groups() * bytes_of_scale(format.scale_type)), 0);
    if (has_zeros()) zeros.assign(static_cast<size_t>(rows * groups()), 0);
}

int64_t Weight::groups() const { return format.group_size > 0 ? divide_up(cols, format.group_size) : 1; }

uint32_t Weight::code(int64_t row, int64_t col) const {
    const int64_t words = divide_up(cols * format.bits, 32);
    uint32_t code = 0;
    for (int bit = 0; bit < format.bits; ++bit) {
        const int64_t place = col * format.bits + bit;
        const uint32_t word = static_cast<uint32_t>(codes[static_cast<size_t>(row * words + place / 32)]);
        code |= (word >> (place % 32) & 1u) << bit;
    }
    return code;
}

std::vector<double> Weight::values() const {
    std::vector<double> all(static_cast<size_t>(rows * cols));
    const int64_t group = format.group_size > 0 ? format.group_size : cols;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = 0; col < cols; ++col) {
            const int64_t place = row * groups() + col / group;
            const double part = format.symmetric == LOWBIT_FINE_ZEROS ? (1 << format.bits) / 256.0 : 1.0;
            const double zero = has_zeros() ? zeros[static_cast<size_t>(place)] * part : 1 << (format.bits - 1);
            const uint32_t c = code(row, col);
            const double level = format.kind == LOWBIT_LEVELS ? static_cast<double>(format.levels[c]) : static_cast<double>(c) - zero;
            all[static_cast<size_t>(row * cols + col)] = scale_at(*this, place) * level;
        }
    return all;
}

Weight quantized(const lowbit_format& format, int64_t rows, int64_t cols, uint64_t seed, float size, bool search) {
    Weight weight(format, rows, cols);
    std::vector<float> numbers = Random(seed).bells(rows * cols);
    for (float& number : numbers) number *= size;
    const double ratios[] = {0.8, 0.9, 1.0};
    const lowbit_search searched = {ratios, 3, 1, nullptr};
    const int status = lowbit_quantize(&format, numbers.data(), LOWBIT_FP32, rows, cols, cols, search ? &searched : nullptr, weight.codes.data(),
                                       weight.scales.data(), weight.has_zeros() ? weight.zeros.data() : nullptr, &weight.unit);
    EXPECT(status == LOWBIT_OK);
    return weight;
}

std::unique_ptr<Aligned> prepared(const Weight& weight) {
    auto buffer = std::make_unique<Aligned>(lowbit_prepared_bytes(&weight.format, weight.rows, weight.cols));
    EXPECT(lowbit_prepare(&weight.format, weight.rows, weight.cols, weight.codes.data(), weight.scales.data(), weight.zeros_or_null(), &weight.unit,
                buffer->data(), buffer->size()) == LOWBIT_OK);
    return buffer;
}

double distance(const float* y, const std::vector<double>& expected) {
    double off = 0.0, norm = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = static_cast<double>(y[i]) - expected[i];
        off += difference * difference;
        norm += expected[i] * expected[i];
    }
    return std::sqrt(off / norm);
}

std::vector<const char*> instruction_sets() {
    std::vector<const char*> found;
    for (const char* name : {"portable", "avx2", "avx_vnni", "avx512_vnni", "avx512", "avx512_bf16", "amx", "amx_emulated", "neon", "neon_i8mm"})
        if (lowbit_set_isa(name) == LOWBIT_OK) found.push_back(name);
    lowbit_set_isa(nullptr);
    return found;
}

}  // namespace check
