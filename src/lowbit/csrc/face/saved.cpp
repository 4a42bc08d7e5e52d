#include "saved.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "refusal.h"

namespace lowbit {
namespace {

constexpr const char* kFile = "lowbit_engine.json";
constexpr int64_t kVersion = 1;

// In the order of the enumerations of engine_api.h.
const char* const kLayerMatrices[] = {"q",      "k",      "v",    "qkv",    "o",
                                      "gate",   "up",     "gate_up", "down", "router",
                                      "experts_gate_up", "experts_down", "shared_gate", "shared_up", "shared_down",
                                      "shared_router"};
const char* const kLayerVectors[] = {"attention_norm", "q_norm", "k_norm", "sinks", "attention_post_norm", "mlp_norm", "mlp_post_norm"};
const char* const kOuterMatrices[] = {"embedding", "positions", "embedding_in", "head_in", "head"};
const char* const kOuterVectors[] = {"embedding_norm", "final_norm"};
static_assert(std::size(kLayerMatrices) == LOWBIT_LAYER_MATRICES && std::size(kLayerVectors) == LOWBIT_LAYER_VECTORS, "one name for each role");
static_assert(std::size(kOuterMatrices) == LOWBIT_OUTER_MATRICES && std::size(kOuterVectors) == LOWBIT_OUTER_VECTORS, "one name for each role");

template <size_t kCount>
int place_of(const char* const (&names)[kCount], const std::string& name) {
    for (size_t i = 0; i < kCount; ++i)
        if (name == names[i]) return static_cast<int>(i);
    return -1;
}

struct IntegerField {
    const char* name;
    int32_t lowbit_model::*field;
};
const IntegerField kIntegers[] = {
    {"hidden_size", &lowbit_model::hidden_size},         {"vocab_size", &lowbit_model::vocab_size},
    {"layer_count", &lowbit_model::layer_count},         {"rope_count", &lowbit_model::rope_count},
    {"embedding_width", &lowbit_model::embedding_width}, {"position_offset", &lowbit_model::position_offset},
    {"position_rows", &lowbit_model::position_rows},     {"embedding_norm", &lowbit_model::embedding_norm},
    {"final_norm", &lowbit_model::final_norm},           {"norm_kind", &lowbit_model::norm_kind},
    {"placement", &lowbit_model::placement},             {"residual", &lowbit_model::residual},
    {"heads", &lowbit_model::heads},                     {"kv_heads", &lowbit_model::kv_heads},
    {"head_dim", &lowbit_model::head_dim},               {"qk_norm", &lowbit_model::qk_norm},
    {"qkv_grouped", &lowbit_model::qkv_grouped},         {"expert_count", &lowbit_model::expert_count},
    {"top_k", &lowbit_model::top_k},                     {"normalize_experts", &lowbit_model::normalize_experts},
};

struct NumberField {
    const char* name;
    float lowbit_model::*field;
};
const NumberField kNumbers[] = {
    {"norm_eps", &lowbit_model::norm_eps},
    {"embedding_multiplier", &lowbit_model::embedding_multiplier},
    {"residual_multiplier", &lowbit_model::residual_multiplier},
    {"attention_scale", &lowbit_model::attention_scale},
    {"attention_soft_cap", &lowbit_model::attention_soft_cap},
    {"clip", &lowbit_model::clip},
    {"head_multiplier", &lowbit_model::head_multiplier},
    {"head_soft_cap", &lowbit_model::head_soft_cap},
};

int32_t integer(const Json& from, const char* name) {
    const int64_t value = from.at(name).integer();
    if (value < INT32_MIN || value > INT32_MAX) throw Refusal(LOWBIT_BAD_ARGUMENT, std::string("the folder's description has no sensible ") + name);
    return static_cast<int32_t>(value);
}

float real(const Json& from, const char* name) { return static_cast<float>(from.at(name).number()); }

lowbit_mlp mlp_of(const Json& from) {
    lowbit_mlp mlp{};
    mlp.size = integer(from, "size");
    mlp.activation = integer(from, "activation");
    mlp.gate = integer(from, "gate");
    mlp.limit = real(from, "limit");
    mlp.sigmoid_scale = real(from, "sigmoid_scale");
    return mlp;
}

std::vector<std::string> names_of(const Json& list) {
    std::vector<std::string> names;
    for (const Json& name : list.list()) names.push_back(name.text());
    return names;
}

Json read_description(const std::string& folder) {
    const std::string path = folder + "/" + kFile;
    std::string text;
    try {
        text = read_file(path);
    } catch (const Refusal&) {
        throw Refusal(LOWBIT_BAD_ARGUMENT, folder + " has no " + kFile +
                                               ", which tells the C++ face what the model is; write it with `python -m lowbit.runtime.engine_file " + folder + "`");
    }
    Json description = Json::parse(text, path);
    if (description.at("version").integer() != kVersion)
        throw Refusal(LOWBIT_BAD_ARGUMENT, path + " was written for another version of lowbit; write it anew");
    return description;
}

}  // namespace

SavedModel::SavedModel(const std::string& folder) : description_(read_description(folder)), files_(folder, names_of(description_.at("files"))) {
    describe_sizes();
    describe_ropes();
    describe_layers();
    load_weights();
    files_.check();
}

void SavedModel::describe_sizes() {
    const Json& from = description_.at("model");
    model_.struct_bytes = static_cast<int32_t>(sizeof model_);
    for (const IntegerField& field : kIntegers) model_.*field.field = integer(from, field.name);
    for (const NumberField& field : kNumbers) model_.*field.field = real(from, field.name);
    model_.mlp = mlp_of(description_.at("mlp"));
    model_.expert = mlp_of(description_.at("expert"));
    model_.shared = mlp_of(description_.at("shared"));
    const Json& alibi = description_.at("alibi");
    if (!alibi.is_null()) model_.alibi = numbers(alibi, model_.heads);
}

const float* SavedModel::numbers(const Json& list, int64_t least) {
    const int64_t count = static_cast<int64_t>(list.list().size());
    if (count < least) throw Refusal(LOWBIT_BAD_ARGUMENT, "a list of the folder's description is too short; write it anew");
    float* to = reinterpret_cast<float*>(memory_.take(count * 4));
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(list.list()[static_cast<size_t>(i)].number());
    return to;
}

void SavedModel::describe_ropes() {
    for (const Json& from : description_.at("ropes").list()) {
        lowbit_rope rope{};
        rope.rotary_dim = integer(from, "rotary_dim");
        rope.frequencies = numbers(from.at("frequencies"), rope.rotary_dim / 2);
        rope.long_frequencies = numbers(from.at("long_frequencies"), rope.rotary_dim / 2);
        rope.pairing = integer(from, "pairing");
        rope.change = integer(from, "change");
        rope.trained_positions = integer(from, "trained_positions");
        rope.attention_factor = real(from, "attention_factor");
        rope.factor = real(from, "factor");
        rope.theta = from.at("theta").number();
        ropes_.push_back(rope);
    }
    if (static_cast<int64_t>(ropes_.size()) != model_.rope_count) throw Refusal(LOWBIT_BAD_ARGUMENT, "the folder's description lacks rotary positions; write it anew");
    model_.ropes = ropes_.data();
}

void SavedModel::describe_layers() {
    for (const Json& from : description_.at("layers").list()) {
        lowbit_layer layer{};
        layer.rope = integer(from, "rope");
        layer.window = integer(from, "window");
        layer.sparse = integer(from, "sparse");
        layers_.push_back(layer);
    }
    if (static_cast<int64_t>(layers_.size()) != model_.layer_count) throw Refusal(LOWBIT_BAD_ARGUMENT, "the folder's description lacks layers; write it anew");
    model_.layers = layers_.data();
}

void SavedModel::load_weights() {
    for (const Json& weight : description_.at("weights").list()) {
        const std::string& role = weight.at("role").text();
        const Json& number = weight.at("layer");
        const bool outer = number.is_null();
        const int64_t layer = outer ? 0 : number.integer();
        if (layer < 0 || (!outer && layer >= model_.layer_count)) throw Refusal(LOWBIT_BAD_ARGUMENT, "the folder's description names a layer that does not exist");
        const int matrix = outer ? place_of(kOuterMatrices, role) : place_of(kLayerMatrices, role);
        const int vector = outer ? place_of(kOuterVectors, role) : place_of(kLayerVectors, role);
        if (matrix < 0 && vector < 0) throw Refusal(LOWBIT_UNSUPPORTED, "the folder's description names a weight '" + role + "' that the engine does not know");
        lowbit_matrix* matrices = outer ? model_.matrices : layers_[static_cast<size_t>(layer)].matrices;
        lowbit_vector* vectors = outer ? model_.vectors : layers_[static_cast<size_t>(layer)].vectors;
        if (matrix >= 0) matrices[matrix] = load_matrix(weight);
        else vectors[vector] = load_vector(weight, role != "sinks");
    }
    if (model_.matrices[LOWBIT_HEAD].kind == LOWBIT_ABSENT && description_.at("tied").truth()) model_.matrices[LOWBIT_HEAD] = model_.matrices[LOWBIT_EMBEDDING];
}

}  // namespace lowbit
