// Weights: packing, quantising, the prepared form and back, rows of an embedding; and products against plain loops.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"

namespace check {
namespace {

struct Shape {
    int64_t rows, cols;
};
const Shape kShapes[] = {{1, 1}, {37, 203}, {16, 576}, {48, 131}};
const int64_t kTokens[] = {1, 2, 8, 16, 17, 33, 256};
constexpr int64_t kRoundedTokens = 33;  // a tile of 32 and a part of one
// The sum of a few hundred products in fp32; activations rounded to 8 bits; one side rounded to bf16.
constexpr double kFloatTolerance = 2e-6, kByteTolerance = 0.02, kBrainTolerance = 1.0 / 256;

void check_streams() {
    Random random(1);
    for (int bits = 1; bits <= 8; ++bits)
        for (int64_t cols : {1, 7, 31, 32, 33, 203}) {
            const int64_t rows = 5, words = (cols * bits + 31) / 32;
            std::vector<uint8_t> values(static_cast<size_t>(rows * cols)), back(values.size());
            for (uint8_t& value : values) value = static_cast<uint8_t>(random.below(1 << bits));
            std::vector<int32_t> codes(static_cast<size_t>(rows * words));
            EXPECT(lowbit_pack(bits, rows, cols, values.data(), codes.data()) == LOWBIT_OK);
            EXPECT(lowbit_unpack(bits, rows, cols, codes.data(), back.data()) == LOWBIT_OK);
            EXPECT(back == values);
        }
}

void check_dequantize(const Weight& weight, const std::vector<double>& values) {
    const int64_t stride = weight.cols + 3;
    std::vector<float> wide(static_cast<size_t>((weight.rows - 1) * stride + weight.cols), 9.0f), dense;
    EXPECT(lowbit_dequantize(&weight.format, weight.rows, weight.cols, weight.codes.data(), weight.scales.data(), weight.zeros_or_null(), &weight.unit,
                             wide.data(), LOWBIT_FP32, stride) == LOWBIT_OK);
    for (int64_t row = 0; row < weight.rows; ++row)
        for (int64_t col = 0; col < weight.cols; ++col) dense.push_back(wide[static_cast<size_t>(row * stride + col)]);
    EXPECT(distance(dense.data(), values) < 2e-7);
    double sums[2] = {};
    EXPECT(lowbit_distance(&weight.format, weight.rows, weight.cols, weight.codes.data(), weight.scales.data(), weight.zeros_or_null(), &weight.unit,
                           dense.data(), LOWBIT_FP32, weight.cols, sums) == LOWBIT_OK);
    EXPECT(sums[0] == 0.0 && sums[1] > 0.0);
}

void check_restore(const Weight& weight, const Aligned& buffer) {
    Weight back(weight.format, weight.rows, weight.cols);
    EXPECT(lowbit_restore(buffer.data(), buffer.size(), back.codes.data(), back.scales.data(), back.has_zeros() ? back.zeros.data() : nullptr,
                          &back.unit) == LOWBIT_OK);
    EXPECT(back.codes == weight.codes && back.scales == weight.scales && back.zeros == weight.zeros && back.unit == weight.unit);
}

void check_rows(const Weight& weight, const Aligned& buffer, const std::vector<double>& values) {
    const std::vector<int64_t> rows = {weight.rows - 1, 0, weight.rows / 2};
    std::vector<float> read(rows.size() * static_cast<size_t>(weight.cols));
    EXPECT(lowbit_read_rows(buffer.data(), buffer.size(), rows.data(), static_cast<int64_t>(rows.size()), read.data()) == LOWBIT_OK);
    std::vector<double> expected;
    for (int64_t row : rows) expected.insert(expected.end(), values.begin() + row * weight.cols, values.begin() + (row + 1) * weight.cols);
    EXPECT(distance(read.data(), expected) < 2e-7);
}

std::vector<double> product(const std::vector<float>& x, const std::vector<double>& values, const std::vector<float>& bias, int64_t tokens, Shape shape) {
    std::vector<double> y(static_cast<size_t>(tokens * shape.rows));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t row = 0; row < shape.rows; ++row) {
            double sum = static_cast<double>(bias[static_cast<size_t>(row)]);
            for (int64_t col = 0; col < shape.cols; ++col)
                sum += static_cast<double>(x[static_cast<size_t>(t * shape.cols + col)]) * values[static_cast<size_t>(row * shape.cols + col)];
            y[static_cast<size_t>(t * shape.rows + row)] = sum;
        }
    return y;
}

// `dtype`: of a dense weight, or -1.
void check_runs(const Aligned& buffer, const std::vector<double>& values, Shape shape, int dtype) {
    const std::vector<float> bias = Random(2).bells(shape.rows);
    for (int64_t tokens : kTokens) {
        const std::vector<float> x = Random(static_cast<uint64_t>(tokens)).bells(tokens * shape.cols);
        const std::vector<double> exact = product(x, values, bias, tokens, shape);
        std::vector<float> y(exact.size());
        EXPECT(lowbit_run(buffer.data(), buffer.size(), x.data(), LOWBIT_FP32, tokens, shape.cols, bias.data(), y.data(), LOWBIT_FP32, shape.rows,
                          LOWBIT_COMPUTE_FP32) == LOWBIT_OK);
        EXPECT(distance(y.data(), exact) < kFloatTolerance);
        std::fill(y.begin(), y.end(), 0.0f);
        EXPECT(lowbit_run(buffer.data(), buffer.size(), x.data(), LOWBIT_FP32, tokens, shape.cols, bias.data(), y.data(), LOWBIT_FP32, shape.rows,
                          LOWBIT_COMPUTE_INT8) == LOWBIT_OK);
        const int rounded = dtype == LOWBIT_BF16 ? lowbit_bf16_tokens() : 0;
        EXPECT(distance(y.data(), exact) < (dtype < 0 ? kByteTolerance : rounded && tokens >= rounded ? kBrainTolerance : kFloatTolerance));
        if (tokens != kRoundedTokens) continue;
        EXPECT(lowbit_run(buffer.data(), buffer.size(), x.data(), LOWBIT_FP32, tokens, shape.cols, bias.data(), y.data(), LOWBIT_FP32, shape.rows,
                          LOWBIT_COMPUTE_BF16) == LOWBIT_OK);
        EXPECT(distance(y.data(), exact) < 2 * kBrainTolerance);
    }
}

// Dense weights: fp32, and the upper half of its bits as bf16.
void check_dense(Shape shape, int dtype) {
    lowbit_format format{};
    format.kind = LOWBIT_DENSE;
    format.symmetric = 1;
    format.group_size = -1;
    format.scale_type = dtype;
    std::vector<float> numbers = Random(3).bells(shape.rows * shape.cols);
    std::vector<uint16_t> halves;
    for (float& number : numbers) {
        uint32_t bits = 0;
        memcpy(&bits, &number, sizeof bits);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
        bits &= dtype == LOWBIT_BF16 ? 0xffff0000u : 0xffffffffu;
        memcpy(&number, &bits, sizeof bits);
    }
    const void* given = dtype == LOWBIT_BF16 ? static_cast<const void*>(halves.data()) : numbers.data();
    Aligned buffer(lowbit_prepared_bytes(&format, shape.rows, shape.cols));
    EXPECT(lowbit_prepare(&format, shape.rows, shape.cols, given, nullptr, nullptr, nullptr, buffer.data(), buffer.size()) == LOWBIT_OK);
    std::vector<uint8_t> back(numbers.size() * (dtype == LOWBIT_BF16 ? 2 : 4));
    EXPECT(lowbit_restore(buffer.data(), buffer.size(), back.data(), nullptr, nullptr, nullptr) == LOWBIT_OK);
    EXPECT(!memcmp(back.data(), given, back.size()));
    check_runs(buffer, std::vector<double>(numbers.begin(), numbers.end()), shape, dtype);
}

// Inputs and outputs with a stride of their own, in halves; nothing beside the rows may be written.
void check_strides() {
    const Weight weight = quantized(format_named("int4_g32_bf16"), 37, 203, 4);
    const auto buffer = prepared(weight);
    const std::vector<uint16_t> ones(static_cast<size_t>(18 * 300 + 203), 0x3f80);  // 1.0 in bf16
    std::vector<uint16_t> y(static_cast<size_t>(18 * 50 + 37), 0x1234);
    EXPECT(lowbit_run(buffer->data(), buffer->size(), ones.data(), LOWBIT_BF16, 19, 300, nullptr, y.data(), LOWBIT_BF16, 50, LOWBIT_COMPUTE_FP32) ==
           LOWBIT_OK);
    for (int64_t t = 0; t < 18; ++t)
        for (int64_t i = 37; i < 50; ++i) EXPECT(y[static_cast<size_t>(t * 50 + i)] == 0x1234);
    EXPECT(std::equal(y.begin(), y.begin() + 37, y.begin() + 18 * 50));
}

}  // namespace

void check_weights() {
    check_streams();
    for (const NamedFormat& named : formats())
        for (const Shape& shape : kShapes) {
            const Weight weight = quantized(named.format, shape.rows, shape.cols, 5, 1.0f, shape.rows == 16);
            const std::vector<double> values = weight.values();
            const auto buffer = prepared(weight);
            check_dequantize(weight, values);
            check_restore(weight, *buffer);
            check_rows(weight, *buffer, values);
        }
}

void check_products() {
    for (const NamedFormat& named : formats())
        for (const Shape& shape : kShapes) {
            if (shape.cols == 1) continue;
            const Weight weight = quantized(named.format, shape.rows, shape.cols, 6);
            check_runs(*prepared(weight), weight.values(), shape, -1);
        }
    for (const Shape& shape : kShapes)
        for (int dtype : {LOWBIT_FP32, LOWBIT_BF16}) check_dense(shape, dtype);
    check_strides();
}

}  // namespace check
