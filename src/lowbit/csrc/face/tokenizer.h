// Text to tokens and back by byte pairs: the vocabulary and merges of tokenizer.json, cut as the folder's description says.
//
//   text -> added tokens cut out -> words -> bytes as letters -> the pair of lowest rank merged, again and again -> tokens
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "splitter.h"

namespace lowbit {

class Tokenizer {
public:
    // `text`: the part of lowbit_engine.json; `file`: tokenizer.json.
    Tokenizer(const Json& text, const Json& file);
    // The tokens of a text; `around` adds those that the model expects at its beginning and end.
    std::vector<int32_t> encode(std::string_view text, bool around) const;
    // The bytes of a token; none of a special one unless asked for.
    std::string_view bytes(int32_t token, bool special) const;
    int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

private:
    struct Merge {
        int32_t rank, token;
    };
    struct Added {
        std::string text;
        int32_t token;
    };
    void add_vocabulary(const Json& model);
    void add_merges(const Json& model);
    void add_added(const Json& added);
    const Added* added_at(std::string_view text, size_t at) const;
    void merge_word(std::string_view word, std::vector<int32_t>* tokens) const;

    std::unique_ptr<Splitter> splitter_;
    std::unordered_map<std::string, int32_t> tokens_;  // by bytes
    std::vector<std::string> bytes_;
    std::vector<bool> special_;
    std::unordered_map<uint64_t, Merge> merges_;  // of two tokens
    std::vector<Added> added_;                    // the longest first
    std::vector<int32_t> before_, after_;
    bool whole_words_ = false;  // a word that is a token is not merged from its bytes
};

// Replace what is no UTF-8 as Unicode recommends. With `open` the beginning of a character at the end is cut off and left for later.
std::string valid_text(std::string_view bytes, bool open, size_t* used);

}  // namespace lowbit
