#include "tokenizer.h"

#include <algorithm>
#include <queue>

#include "refusal.h"

namespace lowbit {
namespace {

// Byte-level vocabularies write every byte as a printable character: itself where it is one, else one from 256 on.
std::vector<int> letters_of_bytes() {
    std::vector<int> bytes(512, -1);
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        bytes[static_cast<size_t>(printable ? byte : next++)] = byte;
    }
    return bytes;
}

// The bytes behind a text of such letters; the text itself when it holds others.
std::string bytes_behind(const std::string& text) {
    static const std::vector<int> bytes = letters_of_bytes();
    std::string out;
    for (const Character& c : characters_of(text)) {
        if (c.code >= bytes.size() || bytes[c.code] < 0) return text;
        out.push_back(static_cast<char>(bytes[c.code]));
    }
    return out;
}

uint64_t pair_key(int32_t left, int32_t right) { return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right); }

std::vector<int32_t> token_list(const Json& list) {
    std::vector<int32_t> tokens;
    for (const Json& token : list.list()) tokens.push_back(static_cast<int32_t>(token.integer()));
    return tokens;
}

}  // namespace

Tokenizer::Tokenizer(const Json& text, const Json& file)
    : splitter_(std::make_unique<Splitter>(text.at("split"))), before_(token_list(text.at("before"))), after_(token_list(text.at("after"))) {
    const Json& model = file.at("model");
    const Json& whole = model.find("ignore_merges");
    whole_words_ = !whole.is_null() && whole.truth();
    add_vocabulary(model);
    add_merges(model);
    add_added(file.at("added_tokens"));
}

void Tokenizer::add_vocabulary(const Json& model) {
    constexpr int64_t kMost = 1 << 24;
    const auto& vocabulary = model.at("vocab").object();
    int64_t most = -1;
    for (const auto& [text, number] : vocabulary) most = std::max(most, number.integer());
    if (most < 0 || most > kMost) throw Refusal(LOWBIT_BAD_ARGUMENT, "tokenizer.json has no sensible vocabulary");
    bytes_.resize(static_cast<size_t>(most) + 1);
    special_.resize(bytes_.size());
    for (const auto& [text, number] : vocabulary) {
        if (number.integer() < 0) throw Refusal(LOWBIT_BAD_ARGUMENT, "tokenizer.json has no sensible vocabulary");
        std::string& bytes = bytes_[static_cast<size_t>(number.integer())];
        bytes = bytes_behind(text);
        tokens_.emplace(bytes, static_cast<int32_t>(number.integer()));
    }
}

// A merge is "left right", or in newer files [left, right].
void Tokenizer::add_merges(const Json& model) {
    int32_t rank = 0;
    for (const Json& merge : model.at("merges").list()) {
        std::string left, right;
        if (merge.kind() == Json::Kind::list) {
            left = merge.list().at(0).text();
            right = merge.list().at(1).text();
        } else {
            const size_t space = merge.text().find(' ');
            left = merge.text().substr(0, space);
            right = space == std::string::npos ? std::string() : merge.text().substr(space + 1);
        }
        left = bytes_behind(left);
        right = bytes_behind(right);
        const auto first = tokens_.find(left), second = tokens_.find(right), both = tokens_.find(left + right);
        if (first == tokens_.end() || second == tokens_.end() || both == tokens_.end())
            throw Refusal(LOWBIT_BAD_ARGUMENT, "tokenizer.json merges tokens that it does not have; the file is damaged, get it again");
        merges_.emplace(pair_key(first->second, second->second), Merge{rank++, both->second});
    }
}

void Tokenizer::add_added(const Json& added) {
    constexpr int64_t kMost = 1 << 24;
    for (const Json& entry : added.list()) {
        const int64_t token = entry.at("id").integer();
        if (token < 0 || token > kMost) throw Refusal(LOWBIT_BAD_ARGUMENT, "tokenizer.json has no sensible vocabulary");
        if (static_cast<size_t>(token) >= bytes_.size()) {
            bytes_.resize(static_cast<size_t>(token) + 1);
            special_.resize(bytes_.size());
        }
        bytes_[static_cast<size_t>(token)] = entry.at("content").text();
        special_[static_cast<size_t>(token)] = entry.at("special").truth();
        added_.push_back({entry.at("content").text(), static_cast<int32_t>(token)});
    }
    std::stable_sort(added_.begin(), added_.end(), [](const Added& a, const Added& b) { return a.text.size() > b.text.size(); });
}

const Tokenizer::Added* Tokenizer::added_at(std::string_view text, size_t at) const {
    for (const Added& added : added_)
        if (!added.text.empty() && text.compare(at, added.text.size(), added.text) == 0) return &added;
    return nullptr;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool around) const {
    std::vector<int32_t> tokens;
    if (around) tokens = before_;
    size_t begin = 0;
    const auto add_words = [&](size_t end) {
        for (std::string_view word : splitter_->split(text.substr(begin, end - begin))) merge_word(word, &tokens);
    };
    for (size_t at = 0; at < text.size();) {
        const Added* added = added_at(text, at);
        if (!added) {
            ++at;
            continue;
        }
        add_words(at);
        tokens.push_back(added->token);
        begin = at += added->text.size();
    }
    add_words(text.size());
    if (around) tokens.insert(tokens.end(), after_.begin(), after_.end());
    return tokens;
}

// Parts of the word in a list; candidates wait in a queue by rank and place, and are looked at again when they come up.
void Tokenizer::merge_word(std::string_view word, std::vector<int32_t>* tokens) const {
    const auto known = tokens_.find(std::string(word));
    if (known != tokens_.end() && (whole_words_ || word.size() == 1)) return tokens->push_back(known->second);
    struct Part {
        int32_t token, previous, next;
    };
    struct Candidate {
        int32_t rank, place, left, right, token;
        bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : place > other.place; }
    };
    const int32_t count = static_cast<int32_t>(word.size());
    std::vector<Part> parts;
    for (int32_t i = 0; i < count; ++i) {
        const auto single = tokens_.find(std::string(1, word[static_cast<size_t>(i)]));
        if (single == tokens_.end()) throw Refusal(LOWBIT_UNSUPPORTED, "the model's vocabulary has no token for a byte of the text");
        parts.push_back({single->second, i - 1, i + 1 < count ? i + 1 : -1});
    }
    std::priority_queue<Candidate> queue;
    const auto offer = [&](int32_t place) {
        if (place < 0 || parts[static_cast<size_t>(place)].next < 0) return;
        const Part& part = parts[static_cast<size_t>(place)];
        const int32_t right = parts[static_cast<size_t>(part.next)].token;
        const auto merge = merges_.find(pair_key(part.token, right));
        if (merge != merges_.end()) queue.push({merge->second.rank, place, part.token, right, merge->second.token});
    };
    for (int32_t i = 0; i + 1 < count; ++i) offer(i);
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Part& part = parts[static_cast<size_t>(best.place)];
        if (part.token != best.left || part.next < 0 || parts[static_cast<size_t>(part.next)].token != best.right) continue;
        Part& gone = parts[static_cast<size_t>(part.next)];
        part.token = best.token;
        part.next = gone.next;
        gone.token = -1;
        if (part.next >= 0) parts[static_cast<size_t>(part.next)].previous = best.place;
        offer(part.previous);
        offer(best.place);
    }
    for (int32_t i = 0; i >= 0 && i < count; i = parts[static_cast<size_t>(i)].next) tokens->push_back(parts[static_cast<size_t>(i)].token);
}

std::string_view Tokenizer::bytes(int32_t token, bool special) const {
    if (token < 0 || token >= size() || (special_[static_cast<size_t>(token)] && !special)) return {};
    return bytes_[static_cast<size_t>(token)];
}

std::string valid_text(std::string_view bytes, bool open, size_t* used) {
    static constexpr char kReplacement[] = "\xef\xbf\xbd";
    std::string out;
    size_t i = 0;
    while (i < bytes.size()) {
        const unsigned char lead = static_cast<unsigned char>(bytes[i]);
        const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
        size_t good = length ? 1 : 0;
        for (; good && good < length && i + good < bytes.size(); ++good) {
            const unsigned char next = static_cast<unsigned char>(bytes[i + good]);
            // The second byte of some leads is bound further: nothing overlong, no surrogates, nothing beyond U+10FFFF.
            const unsigned char low = good > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
            const unsigned char high = good > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
            if (next < low || next > high) break;
        }
        if (open && length && good < length && i + good == bytes.size()) break;
        if (length && good == length) out.append(bytes.substr(i, length));
        else out.append(kReplacement);
        i += std::max<size_t>(good, 1);
    }
    if (used) *used = i;
    return out;
}

}  // namespace lowbit
