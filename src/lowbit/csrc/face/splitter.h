// Cutting a text into the words that byte pairs are merged in, as the regular expressions of GPT-2, Llama 3 and Qwen do.
//
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   Llama 3  the same endings in any case|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   Qwen     as Llama 3 with \p{N} for \p{N}{1,3}
//
// Which characters are letters and numbers stands in the folder, written by the Unicode of the Python that saved it.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace lowbit {

// Characters as sorted ranges [first, last].
class CharacterSet {
public:
    CharacterSet() = default;
    explicit CharacterSet(const Json& ranges);
    bool has(uint32_t character) const;

private:
    std::vector<std::pair<uint32_t, uint32_t>> ranges_;
};

struct Character {
    uint32_t code;
    size_t begin;  // in the text; an ending character with the text's length closes the list
};
// The characters of a text in UTF-8. Bytes that are none throw Refusal.
std::vector<Character> characters_of(std::string_view text);

class Splitter {
public:
    explicit Splitter(const Json& from);
    // The words of a text, in order and without gaps.
    std::vector<std::string_view> split(std::string_view text) const;

private:
    enum class Style { gpt2, llama3 };
    using Characters = std::vector<Character>;
    size_t word_end(const Characters& all, size_t begin) const;
    size_t contraction_end(const Characters& all, size_t begin) const;
    size_t gpt2_end(const Characters& all, size_t begin) const;
    size_t llama3_end(const Characters& all, size_t begin) const;
    size_t space_end(const Characters& all, size_t begin) const;
    bool letter(const Characters& all, size_t i) const { return all[i].code != kEnd && letters_.has(all[i].code); }
    bool number(const Characters& all, size_t i) const { return all[i].code != kEnd && numbers_.has(all[i].code); }
    bool other(const Characters& all, size_t i) const;

    static constexpr uint32_t kEnd = 0xffffffffu;
    CharacterSet letters_, numbers_, not_composed_;
    Style style_;
    size_t most_digits_;   // of a word of digits; 0: any number
    bool digits_apart_;    // every digit is cut off before the expression looks
};

}  // namespace lowbit
