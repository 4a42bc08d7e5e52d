#include "splitter.h"

#include <algorithm>

#include "refusal.h"

namespace lowbit {
namespace {

bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_break(uint32_t c) { return c == '\n' || c == '\r'; }

}  // namespace

CharacterSet::CharacterSet(const Json& ranges) {
    for (const Json& range : ranges.list())
        ranges_.emplace_back(static_cast<uint32_t>(range.list().at(0).integer()), static_cast<uint32_t>(range.list().at(1).integer()));
}

bool CharacterSet::has(uint32_t character) const {
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), character, [](uint32_t c, const auto& range) { return c < range.first; });
    return after != ranges_.begin() && character <= std::prev(after)->second;
}

std::vector<Character> characters_of(std::string_view text) {
    std::vector<Character> all;
    for (size_t i = 0; i < text.size();) {
        const unsigned char lead = static_cast<unsigned char>(text[i]);
        const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
        bool valid = length > 0 && i + length <= text.size();
        uint32_t c = length == 1 ? lead : lead & (0x7fu >> length);
        for (size_t k = 1; valid && k < length; ++k) {
            const unsigned char next = static_cast<unsigned char>(text[i + k]);
            valid = (next & 0xc0) == 0x80;
            c = c << 6 | (next & 0x3fu);
        }
        if (!valid) throw Refusal(LOWBIT_BAD_ARGUMENT, "the text is no valid UTF-8 at byte " + std::to_string(i));
        all.push_back({c, i});
        i += length;
    }
    return all;
}

Splitter::Splitter(const Json& from)
    : letters_(from.at("letters")),
      numbers_(from.at("numbers")),
      not_composed_(from.at("not_composed")),
      style_(from.at("style").text() == "gpt2" ? Style::gpt2 : Style::llama3),
      most_digits_(static_cast<size_t>(from.at("most_digits").integer())),
      digits_apart_(from.at("digits_apart").truth()) {}

std::vector<std::string_view> Splitter::split(std::string_view text) const {
    Characters all = characters_of(text);
    for (const Character& c : all)
        if (not_composed_.has(c.code))
            throw Refusal(LOWBIT_UNSUPPORTED, "this model's tokenizer composes characters first (NFC), which the C++ face does not: give it composed text");
    all.push_back({kEnd, text.size()});
    std::vector<std::string_view> words;
    const auto add = [&](const Characters& part) {
        for (size_t begin = 0; begin + 1 < part.size();) {
            const size_t end = word_end(part, begin);
            words.push_back(text.substr(part[begin].begin, part[end].begin - part[begin].begin));
            begin = end;
        }
    };
    if (!digits_apart_) {
        add(all);
        return words;
    }
    // Between digits every stretch is looked at by itself, as if the text ended there.
    for (size_t begin = 0; begin + 1 < all.size();) {
        size_t end = begin;
        while (end + 1 < all.size() && !number(all, end)) ++end;
        Characters part(all.begin() + static_cast<std::ptrdiff_t>(begin), all.begin() + static_cast<std::ptrdiff_t>(end));
        part.push_back({kEnd, all[end].begin});
        add(part);
        if (end + 1 < all.size()) words.push_back(text.substr(all[end].begin, all[end + 1].begin - all[end].begin));
        begin = end + 1;
    }
    return words;
}

bool Splitter::other(const Characters& all, size_t i) const { return all[i].code != kEnd && !is_space(all[i].code) && !letter(all, i) && !number(all, i); }

size_t Splitter::word_end(const Characters& all, size_t begin) const {
    if (const size_t end = contraction_end(all, begin)) return end;
    return style_ == Style::gpt2 ? gpt2_end(all, begin) : llama3_end(all, begin);
}

// 's and its like; 0 when there is none.
size_t Splitter::contraction_end(const Characters& all, size_t begin) const {
    if (all[begin].code != '\'') return 0;
    const auto lower = [&](size_t i) -> uint32_t {
        const uint32_t c = all[i].code;
        if (style_ == Style::gpt2) return c;
        if (c == 0x17f) return 's';  // the long s equals s where case is ignored
        return c >= 'A' && c <= 'Z' ? c + 32 : c;
    };
    const uint32_t first = lower(begin + 1);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return begin + 2;
    if (first == kEnd) return 0;
    const uint32_t second = lower(begin + 2);
    const bool pair = (first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l');
    return pair ? begin + 3 : 0;
}

size_t Splitter::gpt2_end(const Characters& all, size_t begin) const {
    const size_t start = all[begin].code == ' ' ? begin + 1 : begin;
    size_t end = start;
    if (letter(all, start)) {
        while (letter(all, end)) ++end;
    } else if (number(all, start)) {
        while (number(all, end)) ++end;
    } else if (other(all, start)) {
        while (other(all, end)) ++end;
    } else {
        return space_end(all, begin);
    }
    return end;
}

size_t Splitter::llama3_end(const Characters& all, size_t begin) const {
    size_t end = begin;
    const bool may_lead = !is_break(all[begin].code) && !letter(all, begin) && !number(all, begin);
    if (letter(all, begin) || (may_lead && letter(all, begin + 1))) {
        for (end = begin + 1; letter(all, end);) ++end;
        return end;
    }
    if (number(all, begin)) {
        while (number(all, end) && end - begin < most_digits_) ++end;
        return end;
    }
    const size_t start = all[begin].code == ' ' ? begin + 1 : begin;
    if (other(all, start)) {
        for (end = start; other(all, end);) ++end;
        while (is_break(all[end].code)) ++end;
        return end;
    }
    // Spaces up to the last line break among them.
    size_t after_break = 0;
    for (end = begin; is_space(all[end].code); ++end)
        if (is_break(all[end].code)) after_break = end + 1;
    return after_break ? after_break : space_end(all, begin);
}

// All spaces but the last, which belongs to the word behind it; a single one is a word.
size_t Splitter::space_end(const Characters& all, size_t begin) const {
    size_t end = begin;
    while (all[end].code != kEnd && is_space(all[end].code)) ++end;
    if (all[end].code == kEnd || end - begin == 1) return std::max(end, begin + 1);
    return end - 1;
}

}  // namespace lowbit
