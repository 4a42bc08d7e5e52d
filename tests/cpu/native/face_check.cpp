// The face of saved folders: a tiny one written here by hand, read, answered, and damaged byte by byte.
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>

#include "folder_api.h"
#include "refuse_each.h"
#include "tiny_llama.h"

namespace check {
namespace {

const char* const kRoles[] = {"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"};

// Everything in JSON is written by hand: the face's reader is what is being checked.
class Writer {
public:
    explicit Writer(const TinyLlama& llama) : llama_(llama) {}

    void write(const std::string& folder) {
        describe();
        std::string header = "{";
        for (const std::string& entry : entries_) header += (header.size() > 1 ? "," : "") + entry;
        header += "}";
        // On a boundary tensors are read where they lie; elsewhere they are copied.
        if (!with_packed) header.resize((header.size() + 7) / 8 * 8, ' ');
        const uint64_t length = header.size();
        std::string file(reinterpret_cast<const char*>(&length), sizeof length);
        save(folder + "/model.safetensors", file + header + bytes_);
        save(folder + "/lowbit_engine.json", description_);
        save(folder + "/tokenizer.json", tokenizer());
    }

    static void save(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

private:
    static std::string number(double value) {
        char text[64];
        snprintf(text, sizeof text, "%.9g", value);
        return text;
    }

    std::string tensor(const void* data, int64_t bytes, const char* type, std::initializer_list<int64_t> shape) {
        const std::string name = "t" + std::to_string(entries_.size()), begin = std::to_string(bytes_.size());
        bytes_.append(static_cast<const char*>(data), static_cast<size_t>(bytes));
        std::string sides;
        for (int64_t side : shape) sides += (sides.empty() ? "" : ",") + std::to_string(side);
        entries_.push_back("\"" + name + "\":{\"dtype\":\"" + type + "\",\"shape\":[" + sides + "],\"data_offsets\":[" + begin + "," +
                           std::to_string(bytes_.size()) + "]}");
        return "[0,\"" + name + "\"]";
    }

    void weight(const char* role, int layer, const std::string& shape, const std::string& piece) {
        weights_ += std::string(weights_.empty() ? "" : ",") + "{\"role\":\"" + role + "\",\"layer\":" + (layer < 0 ? "null" : std::to_string(layer)) +
                    ",\"shape\":[" + shape + "],\"transposed\":false,\"apart\":false,\"bias\":null,\"pieces\":[[" + piece + "]]}";
    }

    void plain(const char* role, int layer, const lowbit_matrix& m) {
        if (m.kind != LOWBIT_PLAIN) return;
        const std::string place = tensor(m.data, m.rows * m.cols * 4, "F32", {m.rows, m.cols});
        weight(role, layer, std::to_string(m.rows) + "," + std::to_string(m.cols), "{\"tensor\":" + place + "}");
    }

    void vector(const char* role, int layer, const float* data) {
        const int64_t size = TinyLlama::kHidden;
        weight(role, layer, std::to_string(size), "{\"tensor\":" + tensor(data, size * 4, "F32", {size}) + "}");
    }

    // The second layer's down projection once more, asymmetric in 4 bit.
    void packed() {
        const int64_t rows = TinyLlama::kHidden, cols = TinyLlama::kMlp;
        const Weight w = quantized(format_named("int4_asym_g64"), rows, cols, 9, 0.1f);
        const std::string codes = tensor(w.codes.data(), rows * cols / 2, "I32", {rows, cols / 8});
        const std::string scales = tensor(w.scales.data(), rows * 4, "F16", {rows, 2}), zeros = tensor(w.zeros.data(), rows * 2, "U8", {rows, 2});
        weight("down", 1, "40,72", "{\"format\":0,\"zeros_packed\":false,\"codes\":" + codes + ",\"scales\":" + scales + ",\"zeros\":" + zeros + "}");
    }

    std::string sizes() const {
        const lowbit_model& m = llama_.model;
        std::string out;
        const auto add = [&](const char* name, double value) { out += std::string(out.empty() ? "" : ",") + "\"" + name + "\":" + number(value); };
        for (const char* zero : {"position_rows", "embedding_norm", "norm_kind", "placement", "residual", "qk_norm", "qkv_grouped", "expert_count", "top_k",
                                 "normalize_experts", "attention_soft_cap", "clip", "head_soft_cap"})
            add(zero, 0);
        for (const char* one : {"final_norm", "rope_count", "embedding_multiplier", "residual_multiplier", "head_multiplier"}) add(one, 1);
        add("hidden_size", m.hidden_size);
        add("embedding_width", m.hidden_size);
        add("vocab_size", m.vocab_size);
        add("layer_count", m.layer_count);
        add("position_offset", -1);
        add("heads", m.heads);
        add("kv_heads", m.kv_heads);
        add("head_dim", m.head_dim);
        add("norm_eps", static_cast<double>(m.norm_eps));
        add("attention_scale", static_cast<double>(m.attention_scale));
        return out;
    }

    void describe() {
        const std::string rest = ",\"limit\":0,\"sigmoid_scale\":1}", nothing = "{\"size\":0,\"activation\":0,\"gate\":0" + rest;
        const std::string mlp = "{\"size\":72,\"activation\":0,\"gate\":1" + rest;
        for (int i = 0; i < TinyLlama::kLayers; ++i) {
            const lowbit_layer& layer = llama_.layers[static_cast<size_t>(i)];
            for (int role = LOWBIT_Q; role <= LOWBIT_DOWN; ++role) plain(kRoles[role], i, layer.matrices[role]);
            vector("attention_norm", i, layer.vectors[LOWBIT_ATTENTION_NORM].weight);
            vector("mlp_norm", i, layer.vectors[LOWBIT_MLP_NORM].weight);
        }
        plain("embedding", -1, llama_.model.matrices[LOWBIT_EMBEDDING]);
        vector("final_norm", -1, llama_.model.vectors[LOWBIT_FINAL_NORM].weight);
        if (with_packed) packed();
        std::string frequencies;
        for (int i = 0; i < TinyLlama::kHeadDim / 2; ++i)
            frequencies += std::string(i ? "," : "") + number(static_cast<double>(llama_.model.ropes[0].frequencies[i]));
        description_ = "{\"version\":1,\"files\":[\"model.safetensors\"],\"model\":{" + sizes() + "},\"mlp\":" + mlp + ",\"expert\":" + nothing +
                       ",\"shared\":" + nothing + ",\"alibi\":null,\"ropes\":[{\"rotary_dim\":12,\"frequencies\":[" + frequencies + "],\"long_frequencies\":[" +
                       frequencies + "],\"pairing\":0,\"change\":0,\"trained_positions\":64,\"attention_factor\":1,\"factor\":1,\"theta\":10000}]," +
                       "\"layers\":[{\"rope\":0,\"window\":0,\"sparse\":0},{\"rope\":0,\"window\":9,\"sparse\":0}],\"tied\":true,\"norm_offset\":0," +
                       "\"context\":64,\"ends\":[7],\"selection\":{\"temperature\":0,\"top_k\":0,\"top_p\":1,\"min_p\":0,\"typical_p\":1," +
                       "\"repetition_penalty\":1},\"formats\":[{\"bits\":4,\"kind\":0,\"symmetric\":0,\"group_size\":64,\"scale_type\":2," +
                       "\"level_count\":0,\"scale_block\":0,\"block_type\":0,\"levels\":[]}],\"text\":{\"split\":{\"style\":\"gpt2\",\"most_digits\":0," +
                       "\"digits_apart\":false,\"letters\":[[65,90],[97,122]],\"numbers\":[[48,57]],\"not_composed\":[]},\"before\":[],\"after\":[]," +
                       "\"chat\":{\"start\":\"u:\",\"reply\":\"a:\",\"next\":\"u:\",\"answer\":\"\\u0061:\",\"system\":null,\"after_system\":null," +
                       "\"around\":false,\"trim\":false}},\"weights\":[" + weights_ + "]}";
    }

    // Letters, a few marks, and two merges.
    static std::string tokenizer() {
        std::string vocabulary;
        int next = 0;
        for (char c = '!'; c <= '~'; ++c)
            if (c != '"' && c != '\\') vocabulary += "\"" + std::string(1, c) + "\":" + std::to_string(next++) + ",";
        vocabulary += "\"\\u0120\":" + std::to_string(next) + ",\"ab\":" + std::to_string(next + 1) + ",\"abc\":" + std::to_string(next + 2);
        return "{\"model\":{\"vocab\":{" + vocabulary + "},\"merges\":[\"a b\",[\"ab\",\"c\"]]},\"added_tokens\":[{\"id\":" + std::to_string(next + 3) +
               ",\"content\":\"<end>\",\"special\":true}]}";
    }

public:
    bool with_packed = false;

private:
    const TinyLlama& llama_;
    std::vector<std::string> entries_;
    std::string bytes_, weights_, description_;
};

std::string new_folder() {
    char name[] = "/tmp/lowbit-face-XXXXXX";
    EXPECT(mkdtemp(name) != nullptr);
    return name;
}

void remove_folder(const std::string& folder) {
    for (const char* file : {"/model.safetensors", "/lowbit_engine.json", "/tokenizer.json"}) unlink((folder + file).c_str());
    rmdir(folder.c_str());
}

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int ignore_piece(void*, int32_t, const char*, int64_t) { return 0; }

// Everything that a folder does, whatever comes out.
void use(lowbit_folder* folder) {
    int32_t tokens[16] = {};
    char text[64];
    lowbit_folder_encode(folder, "abc ab, 12 <end>'s", 18, 1, tokens, 16);
    lowbit_folder_decode(folder, tokens, 16, 1, text, 64);
    const lowbit_message message = {"user", "abc"};
    lowbit_folder_conversation(folder, &message, 1, tokens, 16);
    lowbit_selection selection;
    lowbit_folder_selection(folder, &selection);
    const int32_t prompt[] = {1, 2, 3};
    lowbit_folder_answer(folder, prompt, 3, 2, nullptr, 1, ignore_piece, nullptr, nullptr);
}

// Each argument of each function wrong in turn, on a folder that is fine.
void refuse_asking(const std::string& path) {
    const auto open = +[](const char* name, const lowbit_engine_options* with) {
        lowbit_folder* folder = lowbit_folder_open(name, with);
        lowbit_folder_close(folder);
        return folder;
    };
    check::refuse_each("lowbit_folder_open", open, free_at(1), path.c_str(), nullptr);
    for (int64_t value : kHostileSizes) {
        lowbit_engine_options wrong[4] = {};
        wrong[0].context = value;
        wrong[1].slots = static_cast<int32_t>(value);
        wrong[2].chunk = static_cast<int32_t>(value);
        wrong[3].cache_type = static_cast<int32_t>(value);
        for (const lowbit_engine_options& with : wrong) {
            forget_sentence();
            lowbit_folder* folder = lowbit_folder_open(path.c_str(), &with);
            EXPECT(folder || left_sentence());
            if (folder) use(folder);
            lowbit_folder_close(folder);
        }
    }
    lowbit_folder* folder = lowbit_folder_open(path.c_str(), nullptr);
    const int32_t prompt[] = {1, 2, 3};
    const lowbit_message messages[] = {{"user", "abc"}, {nullptr, "abc"}, {"user", nullptr}, {"", ""}, {"assistant", "abc"}};
    int32_t tokens[8];
    char text[8];
    lowbit_selection selection{};
    int64_t made = 0;
    REFUSE_EACH(lowbit_folder_context, 0, folder);
    REFUSE_EACH(lowbit_folder_vocabulary, 0, folder);
    REFUSE_EACH(lowbit_folder_selection, 0, folder, &selection);
    REFUSE_EACH(lowbit_folder_encode, free_at(3, 5), folder, "abc", 3, 1, tokens, 8);
    REFUSE_EACH(lowbit_folder_decode, free_at(3, 5), folder, prompt, 3, 1, text, 8);
    REFUSE_EACH(lowbit_folder_conversation, free_at(4), folder, messages, 1, tokens, 8);
    REFUSE_EACH(lowbit_folder_answer, free_at(3, 4, 7, 8), folder, prompt, 3, 2, &selection, 1, ignore_piece, nullptr, &made);
    for (int64_t most : {INT64_MIN, int64_t{-1}, int64_t{0}})
        EXPECT_REFUSED(lowbit_folder_answer(folder, prompt, 3, most, &selection, 1, nullptr, nullptr, nullptr), LOWBIT_BAD_ARGUMENT);
    for (const lowbit_message& message : messages)
        if (&message != messages) EXPECT(lowbit_folder_conversation(folder, &message, 1, tokens, 8) == -1);
    for (int32_t bad : {INT_MIN, -1, TinyLlama::kVocab, 1000, INT_MAX}) {
        lowbit_folder_decode(folder, &bad, 1, 1, text, 8);
        EXPECT_REFUSED(lowbit_folder_answer(folder, &bad, 1, 2, &selection, 1, nullptr, nullptr, nullptr), LOWBIT_BAD_ARGUMENT);
    }
    EXPECT(lowbit_folder_engine(nullptr) == nullptr);
    lowbit_folder_close(folder);
    lowbit_folder_close(nullptr);
}

void check_plain_folder(const std::string& path, const TinyLlama& llama) {
    lowbit_engine_options exact = options(64, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, 32);
    lowbit_folder* folder = lowbit_folder_open(path.c_str(), &exact);
    EXPECT(folder != nullptr);
    if (!folder) return;
    const std::vector<int32_t> tokens = some_tokens(20, 1), slots(20, 0);
    const std::vector<uint8_t> wanted(20, 1);
    std::vector<float> logits(static_cast<size_t>(20 * TinyLlama::kVocab));
    EXPECT(lowbit_engine_step(lowbit_folder_engine(folder), tokens.data(), slots.data(), wanted.data(), 20, logits.data()) == LOWBIT_OK);
    EXPECT(distance(logits.data(), llama.logits(tokens)) < 1e-5);
    int32_t encoded[8];
    EXPECT(lowbit_folder_encode(folder, "abc<end>ab", 10, 1, encoded, 8) == 3 && encoded[0] == 94 && encoded[1] == 95 && encoded[2] == 93);
    EXPECT(lowbit_folder_decode(folder, encoded, 3, 0, nullptr, 0) == 5);
    EXPECT(lowbit_folder_encode(folder, "\xff", 1, 1, encoded, 8) == -1);
    EXPECT(lowbit_folder_encode(folder, nullptr, 1, 1, encoded, 8) == -1 && lowbit_folder_encode(folder, "a", -1, 1, encoded, 8) == -1);
    EXPECT_REFUSED(lowbit_folder_answer(folder, encoded, 0, 2, nullptr, 1, nullptr, nullptr, nullptr), LOWBIT_BAD_ARGUMENT);
    EXPECT_REFUSED(lowbit_folder_answer(nullptr, encoded, 1, 2, nullptr, 1, nullptr, nullptr, nullptr), LOWBIT_BAD_ARGUMENT);
    use(folder);
    lowbit_folder_close(folder);
    EXPECT(lowbit_folder_open(nullptr, nullptr) == nullptr && lowbit_folder_open("/nowhere", nullptr) == nullptr);
}

// The weights' file cut in half between two steps, as an interrupted copy would: the engine refuses what it makes of the rest.
void check_cut_off(const std::string& path) {
    lowbit_folder* folder = lowbit_folder_open(path.c_str(), nullptr);
    EXPECT(folder != nullptr);
    if (!folder) return;
    const std::string weights = path + "/model.safetensors", whole = contents(weights);
    const int32_t prompt[] = {1, 2, 3};
    EXPECT(lowbit_folder_answer(folder, prompt, 3, 2, nullptr, 1, ignore_piece, nullptr, nullptr) == LOWBIT_OK);
    EXPECT(truncate(weights.c_str(), static_cast<off_t>(whole.size() / 2)) == 0);
    for (int i = 0; i < 2; ++i) {
        EXPECT_REFUSED(lowbit_folder_answer(folder, prompt, 3, 2, nullptr, 1, ignore_piece, nullptr, nullptr), LOWBIT_BAD_WEIGHT);
        EXPECT(strstr(lowbit_last_error(), weights.c_str()) && strstr(lowbit_last_error(), "truncated"));
    }
    lowbit_folder_close(folder);
    Writer::save(weights, whole);
    folder = lowbit_folder_open(path.c_str(), nullptr);
    EXPECT(folder && lowbit_folder_answer(folder, prompt, 3, 2, nullptr, 1, ignore_piece, nullptr, nullptr) == LOWBIT_OK);
    lowbit_folder_close(folder);
}

// Bytes changed, left out and doubled: a sentence, or a folder that works.
void damage(const std::string& folder, const char* name, int rounds) {
    const std::string path = folder + name, whole = contents(path);
    Random random(6);
    for (int i = 0; i < rounds; ++i) {
        std::string broken = whole;
        const size_t place = static_cast<size_t>(random.below(static_cast<int64_t>(std::min<size_t>(whole.size(), 4000))));
        switch (random.below(4)) {
            case 0: broken[place] = static_cast<char>(random.below(256)); break;
            case 1: broken[place] = "0123456789-{}[],\""[random.below(17)]; break;
            case 2: broken.erase(place, static_cast<size_t>(random.below(20))); break;
            default: broken.insert(place, broken.substr(place, static_cast<size_t>(random.below(20))));
        }
        Writer::save(path, broken);
        lowbit_folder* opened = lowbit_folder_open(folder.c_str(), nullptr);
        if (!opened) EXPECT(strlen(lowbit_last_error()) > 10);
        if (opened) use(opened);
        lowbit_folder_close(opened);
    }
    Writer::save(path, whole);
}

}  // namespace

void check_face() {
    const TinyLlama llama(nullptr);
    const std::string folder = new_folder();
    Writer(llama).write(folder);
    check_plain_folder(folder, llama);
    refuse_asking(folder);
    check_cut_off(folder);
    Writer with_packed(llama);
    with_packed.with_packed = true;
    with_packed.write(folder);
    damage(folder, "/lowbit_engine.json", 600);
    damage(folder, "/model.safetensors", 300);
    damage(folder, "/tokenizer.json", 300);
    remove_folder(folder);
}

}  // namespace check
