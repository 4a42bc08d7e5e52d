// Weights of a saved folder: pieces joined, packed ones laid out for the products, vectors widened to fp32.
//
// A weight is pieces[index][part]: parts lie one above the other, and there is one index for each expert that is stored by itself.
// A piece is a plain tensor, or the codes, scales and zero points of a packed one.
#include <cstring>

#include "../format.h"
#include "../gguf_block.h"
#include "../number.h"
#include "refusal.h"
#include "saved.h"

namespace lowbit {
namespace {

struct Sizes {
    int64_t count, rows, cols;
};

Sizes sizes_of(const Json& weight) {
    const std::vector<Json>& shape = weight.at("shape").list();
    if (shape.size() < 2 || shape.size() > 3) throw Refusal(LOWBIT_BAD_ARGUMENT, "a weight of the folder's description is no matrix");
    const bool experts = shape.size() == 3;
    const Sizes sizes = {experts ? shape[0].integer() : 1, shape[experts].integer(), shape[experts + 1].integer()};
    if (sizes.count < 1 || sizes.rows < 1 || sizes.cols < 1 || sizes.rows > kMostElements / sizes.cols || sizes.count > kMostElements / (sizes.rows * sizes.cols))
        throw Refusal(LOWBIT_BAD_ARGUMENT, "a weight of the folder's description has no sensible shape");
    return sizes;
}

[[noreturn]] void refuse_sizes(const Json& weight) {
    throw Refusal(LOWBIT_BAD_ARGUMENT, "the tensors of the " + weight.at("role").text() + " weight have not the sizes that lowbit_engine.json says: the two do not belong together");
}

void check(int status) {
    if (status != LOWBIT_OK) throw Refusal(status, lowbit_last_error());
}

int64_t row_bytes(const lowbit_format& format, int64_t cols) {
    if (const BlockLayout* blocks = blocks_of(format)) return divide_up(cols, blocks->weights) * blocks->bytes;
    return code_words(format, cols) * 4;
}

void append(const Tensor& tensor, int64_t begin, int64_t bytes, std::vector<uint8_t>* to) { to->insert(to->end(), tensor.data + begin, tensor.data + begin + bytes); }

// compressed-tensors packs zero points along the rows of the weight: column g is a stream of `rows` codes.
void append_packed_zeros(const Tensor& tensor, int bits, int64_t rows, int64_t groups, std::vector<uint8_t>* to) {
    const size_t first = to->size();
    to->resize(first + static_cast<size_t>(rows * groups));
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t row = 0; row < rows; ++row) {
            uint32_t code = 0;
            for (int bit = 0; bit < bits; ++bit) {
                const int64_t place = row * bits + bit;
                uint32_t word = 0;
                memcpy(&word, tensor.data + (place / 32 * groups + g) * 4, sizeof word);
                code |= (word >> (place % 32) & 1u) << bit;
            }
            (*to)[first + static_cast<size_t>(row * groups + g)] = static_cast<uint8_t>(code);
        }
}

}  // namespace

const Tensor& SavedModel::tensor(const Json& place) const { return files_.at(place.list().at(0).integer(), place.list().at(1).text()); }

lowbit_format SavedModel::format_of(const Json& packed) {
    const Json& from = description_.at("formats").list().at(static_cast<size_t>(packed.at("format").integer()));
    lowbit_format format{};
    format.bits = static_cast<int32_t>(from.at("bits").integer());
    format.kind = static_cast<int32_t>(from.at("kind").integer());
    format.symmetric = static_cast<int32_t>(from.at("symmetric").integer());
    format.group_size = static_cast<int32_t>(from.at("group_size").integer());
    format.scale_type = static_cast<int32_t>(from.at("scale_type").integer());
    format.level_count = static_cast<int32_t>(from.at("level_count").integer());
    format.scale_block = static_cast<int32_t>(from.at("scale_block").integer());
    format.block_type = static_cast<int32_t>(from.at("block_type").integer());
    if (format.kind == LOWBIT_LEVELS) {
        const std::vector<Json>& levels = from.at("levels").list();
        if (static_cast<int64_t>(levels.size()) != format.level_count) throw Refusal(LOWBIT_BAD_ARGUMENT, "a table of levels is not whole; write lowbit_engine.json anew");
        float* to = reinterpret_cast<float*>(memory_.take(static_cast<int64_t>(levels.size()) * 4));
        for (size_t i = 0; i < levels.size(); ++i) to[i] = levels[i].is_null() ? __builtin_nanf("") : static_cast<float>(levels[i].number());
        format.levels = to;
    }
    return format;
}

lowbit_matrix SavedModel::load_matrix(const Json& weight) {
    const Sizes sizes = sizes_of(weight);
    lowbit_matrix matrix{};
    matrix.rows = sizes.rows;
    matrix.cols = sizes.cols;
    matrix.count = sizes.count;
    const Json& bias = weight.at("bias");
    if (!bias.is_null()) matrix.bias = load_numbers(bias, sizes.count * sizes.rows, 0.0f);
    const Json& first = weight.at("pieces").list().at(0).list().at(0);
    return first.find("codes").is_null() ? load_plain(weight, matrix) : load_packed(weight, format_of(first), matrix);
}

// Add one piece of a matrix: expert `index` of the `count` that lie in each tensor. False when sizes disagree.
bool SavedModel::append_piece(const Json& piece, const lowbit_format& format, const Span& span, Canonical* whole) const {
    const Tensor& codes = tensor(piece.at("codes"));
    const int64_t groups = group_count(format, span.cols), row_codes = row_bytes(format, span.cols);
    const int64_t rows = codes.bytes / row_codes / span.count;
    if (codes.bytes != span.count * rows * row_codes) return false;
    append(codes, span.index * rows * row_codes, rows * row_codes, &whole->codes);
    if (span.index + 1 == span.count) codes.release();
    if (format.kind == LOWBIT_BLOCKS) return true;
    const Tensor& scales = tensor(piece.at("scales"));
    // One scale for a whole tensor stands in one line.
    const int64_t row_scales = groups * (format.scale_block > 0 ? 1 : scale_bytes(format.scale_type)), lines = format.group_size == 0 ? 1 : rows;
    if (scales.bytes != span.count * lines * row_scales || (lines != rows && !whole->scales.empty())) return false;
    append(scales, span.index * lines * row_scales, lines * row_scales, &whole->scales);
    if (stores_zeros(format)) {
        const Tensor& zeros = tensor(piece.at("zeros"));
        const bool packed = piece.at("zeros_packed").truth();
        if (packed ? span.count != 1 || zeros.bytes != divide_up(rows * format.bits, 32) * groups * 4 : zeros.bytes != span.count * lines * groups) return false;
        if (packed) append_packed_zeros(zeros, format.bits, rows, groups, &whole->zeros);
        else append(zeros, span.index * lines * groups, lines * groups, &whole->zeros);
    }
    return append_factors(piece, format, span, whole);
}

// What scales are multiplied with: one factor for each matrix, or one for so many scales of the whole tensor and an offset.
bool SavedModel::append_factors(const Json& piece, const lowbit_format& format, const Span& span, Canonical* whole) const {
    const Json &unit = piece.find("unit"), &offset = piece.find("offset");
    const bool stepped = format.scale_block > 0, wanted = stepped || format.scale_type == LOWBIT_SCALE_E4M3;
    if (!wanted) return true;
    if (unit.is_null() || !whole->factors.empty() || (stepped && (offset.is_null() || span.count > 1))) return false;
    const Tensor& factors = tensor(unit);
    const int64_t count = stepped ? divide_up(static_cast<int64_t>(whole->scales.size()), format.scale_block) : 1;
    if (factors.bytes != span.count * count * 4) return false;
    whole->factors.resize(static_cast<size_t>(count));
    memcpy(whole->factors.data(), factors.data + span.index * 4, static_cast<size_t>(count) * 4);
    whole->offset.resize(1);
    if (stepped && tensor(offset).bytes != 4) return false;
    if (stepped) memcpy(whole->offset.data(), tensor(offset).data, 4);
    return true;
}

lowbit_matrix SavedModel::load_packed(const Json& weight, const lowbit_format& format, lowbit_matrix matrix) {
    if (check_format(&format, {matrix.rows, matrix.cols})) throw Refusal(LOWBIT_BAD_ARGUMENT, lowbit_last_error());
    const std::vector<Json>& pieces = weight.at("pieces").list();
    const bool apart = weight.at("apart").truth();
    if (static_cast<int64_t>(pieces.size()) != (apart ? matrix.count : 1)) refuse_sizes(weight);
    matrix.kind = LOWBIT_PREPARED;
    matrix.bytes = lowbit_prepared_bytes(&format, matrix.rows, matrix.cols);
    uint8_t* room = memory_.take(matrix.bytes * matrix.count);
    matrix.data = room;
    for (int64_t e = 0; e < matrix.count; ++e) {
        Canonical whole;
        for (const Json& piece : pieces[static_cast<size_t>(apart ? e : 0)].list()) {
            const Span span = {apart ? 0 : e, apart ? 1 : matrix.count, matrix.cols};
            if (!append_piece(piece, format, span, &whole)) refuse_sizes(weight);
        }
        if (static_cast<int64_t>(whole.codes.size()) != matrix.rows * row_bytes(format, matrix.cols)) refuse_sizes(weight);
        check(lowbit_prepare(&format, matrix.rows, matrix.cols, whole.codes.data(), whole.scales.data(), whole.zeros.data(), whole.factors.data(),
                             room + e * matrix.bytes, matrix.bytes, whole.offset.data()));
    }
    return matrix;
}

lowbit_matrix SavedModel::load_plain(const Json& weight, lowbit_matrix matrix) {
    const std::vector<Json>& pieces = weight.at("pieces").list();
    const Tensor& first = tensor(pieces.at(0).list().at(0).at("tensor"));
    const int64_t count = matrix.count * matrix.rows * matrix.cols, size = dtype_bytes(first.number_type());
    const bool transposed = weight.at("transposed").truth();
    matrix.kind = LOWBIT_PLAIN;
    matrix.dtype = first.number_type();
    const bool whole = pieces.size() == 1 && pieces[0].list().size() == 1;
    if (whole && !transposed && reinterpret_cast<uintptr_t>(first.data) % static_cast<uintptr_t>(size) == 0) {
        if (first.bytes != count * size) refuse_sizes(weight);
        matrix.data = first.data;
        return matrix;
    }
    uint8_t* to = memory_.take(count * size);
    int64_t used = 0;
    for (const Json& parts : pieces)
        for (const Json& part : parts.list()) {
            const Tensor& piece = tensor(part.at("tensor"));
            if (piece.number_type() != matrix.dtype || piece.bytes > count * size - used) refuse_sizes(weight);
            memcpy(to + used, piece.data, static_cast<size_t>(piece.bytes));
            used += piece.bytes;
        }
    if (used != count * size) refuse_sizes(weight);
    matrix.data = to;
    if (!transposed) return matrix;
    uint8_t* turned = memory_.take(count * size);
    for (int64_t e = 0; e < matrix.count; ++e)
        for (int64_t row = 0; row < matrix.rows; ++row)
            for (int64_t col = 0; col < matrix.cols; ++col)
                memcpy(turned + ((e * matrix.rows + row) * matrix.cols + col) * size, to + ((e * matrix.cols + col) * matrix.rows + row) * size, static_cast<size_t>(size));
    matrix.data = turned;
    return matrix;
}

lowbit_vector SavedModel::load_vector(const Json& weight, bool norm) {
    lowbit_vector vector{};
    int64_t count = 1;
    for (const Json& side : weight.at("shape").list()) count *= side.integer();
    const float offset = norm ? static_cast<float>(description_.at("norm_offset").number()) : 0.0f;
    vector.weight = load_numbers(weight.at("pieces"), count, offset);
    const Json& bias = weight.at("bias");
    if (!bias.is_null()) vector.bias = load_numbers(bias, count, 0.0f);
    return vector;
}

// Plain pieces as one fp32 vector of this length.
const float* SavedModel::load_numbers(const Json& pieces, int64_t count, float offset) {
    if (count < 1 || count > kMostElements) throw Refusal(LOWBIT_BAD_ARGUMENT, "a vector of the folder's description has no sensible length");
    float* to = reinterpret_cast<float*>(memory_.take(count * 4));
    int64_t used = 0;
    for (const Json& parts : pieces.list())
        for (const Json& part : parts.list()) {
            const Tensor& piece = tensor(part.at("tensor"));
            const int dtype = piece.number_type();
            const int64_t length = piece.bytes / dtype_bytes(dtype);
            if (length > count - used) throw Refusal(LOWBIT_BAD_ARGUMENT, "a norm or bias is longer than lowbit_engine.json says: the two do not belong together");
            std::vector<uint8_t> aligned(piece.data, piece.data + piece.bytes);
            for (int64_t i = 0; i < length; ++i) to[used + i] = load_number(aligned.data(), dtype, i) + offset;
            used += length;
        }
    if (used != count) throw Refusal(LOWBIT_BAD_ARGUMENT, "a norm or bias is shorter than lowbit_engine.json says: the two do not belong together");
    return to;
}

}  // namespace lowbit
