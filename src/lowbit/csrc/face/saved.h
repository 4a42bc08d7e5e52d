// A saved folder as the engine takes it: the model's description with every weight in memory once.
//
// What the model is stands in lowbit_engine.json, which Python writes beside the weights (runtime/engine_file.py): the numbers of
// lowbit_model by name, and for every weight the tensors that it is made of. So nothing here knows of families or spellings.
// Packed weights are laid out by lowbit_prepare and their pages of the file given back; plain ones are read through the map.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../engine_api.h"
#include "arena.h"
#include "json.h"
#include "tensors.h"

namespace lowbit {

class SavedModel {
public:
    explicit SavedModel(const std::string& folder);
    SavedModel(const SavedModel&) = delete;
    SavedModel& operator=(const SavedModel&) = delete;
    const lowbit_model& model() const { return model_; }
    const Json& description() const { return description_; }

private:
    void describe_sizes();
    void describe_ropes();
    void describe_layers();
    void load_weights();
    const float* numbers(const Json& list, int64_t least);

    // weights.cpp
    // The canonical buffers of one matrix, put together from its pieces.
    struct Canonical {
        std::vector<uint8_t> codes, scales, zeros;
        std::vector<float> factors, offset;  // of the scales
    };
    // Which of the experts that lie in one tensor is meant.
    struct Span {
        int64_t index, count, cols;
    };
    bool append_piece(const Json& piece, const lowbit_format& format, const Span& span, Canonical* whole) const;
    bool append_factors(const Json& piece, const lowbit_format& format, const Span& span, Canonical* whole) const;
    lowbit_matrix load_matrix(const Json& weight);
    lowbit_matrix load_packed(const Json& weight, const lowbit_format& format, lowbit_matrix matrix);
    lowbit_matrix load_plain(const Json& weight, lowbit_matrix matrix);
    lowbit_vector load_vector(const Json& weight, bool norm);
    const float* load_numbers(const Json& pieces, int64_t count, float offset);
    const Tensor& tensor(const Json& place) const;
    lowbit_format format_of(const Json& packed);

    Json description_;
    TensorFiles files_;
    lowbit_model model_{};
    std::vector<lowbit_layer> layers_;
    std::vector<lowbit_rope> ropes_;
    Arena memory_;
};

}  // namespace lowbit
