#include "json.h"

#include <charconv>

#include "refusal.h"

namespace lowbit {

void append_character(uint32_t c, std::string* to) {
    if (c < 0x80) {
        to->push_back(static_cast<char>(c));
        return;
    }
    const int following = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    const uint32_t lead[] = {0, 0xc0, 0xe0, 0xf0};
    to->push_back(static_cast<char>(lead[following] | c >> (6 * following)));
    for (int i = following - 1; i >= 0; --i) to->push_back(static_cast<char>(0x80 | (c >> (6 * i) & 0x3f)));
}

class JsonReader {
public:
    JsonReader(std::string_view text, const std::string& name) : text_(text), name_(name) {}

    Json read_whole() {
        Json value = read(0);
        skip_space();
        if (at_ != text_.size()) refuse("something follows the end");
        return value;
    }

private:
    static constexpr int kDeepest = 64;

    [[noreturn]] void refuse(const char* what) const {
        throw Refusal(LOWBIT_BAD_ARGUMENT, name_ + " is no valid JSON: " + what + " at byte " + std::to_string(at_) + "; the file is damaged, get it again");
    }

    void skip_space() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) ++at_;
    }

    char next() {
        if (at_ >= text_.size()) refuse("it ends too early");
        return text_[at_++];
    }

    bool take(char wanted) {
        skip_space();
        if (at_ >= text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) refuse("a mark is missing");
    }

    Json read(int depth) {
        if (depth > kDeepest) refuse("it is nested too deeply");
        skip_space();
        if (at_ >= text_.size()) refuse("it ends too early");
        Json value;
        switch (text_[at_]) {
            case '{': read_object(&value, depth); break;
            case '[': read_list(&value, depth); break;
            case '"':
                value.kind_ = Json::Kind::text;
                value.text_ = read_text();
                break;
            default: read_word(&value);
        }
        return value;
    }

    void read_object(Json* value, int depth) {
        value->kind_ = Json::Kind::object;
        expect('{');
        if (take('}')) return;
        do {
            skip_space();
            std::string key = read_text();
            expect(':');
            value->object_.insert_or_assign(std::move(key), read(depth + 1));
        } while (take(','));
        expect('}');
    }

    void read_list(Json* value, int depth) {
        value->kind_ = Json::Kind::list;
        expect('[');
        if (take(']')) return;
        do value->list_.push_back(read(depth + 1));
        while (take(','));
        expect(']');
    }

    void read_word(Json* value) {
        for (const std::string_view word : {"null", "true", "false"}) {
            if (text_.substr(at_, word.size()) != word) continue;
            at_ += word.size();
            if (word == "null") return;
            value->kind_ = Json::Kind::truth;
            value->number_ = word == "true";
            return;
        }
        const auto end = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value->number_);
        if (end.ec != std::errc()) refuse("a value is expected");
        at_ = static_cast<size_t>(end.ptr - text_.data());
        value->kind_ = Json::Kind::number;
    }

    uint32_t read_hex() {
        uint32_t unit = 0;
        for (int i = 0; i < 4; ++i) {
            const char c = next();
            const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
            if (digit < 0) refuse("a character's number is damaged");
            unit = unit * 16 + static_cast<uint32_t>(digit);
        }
        return unit;
    }

    // \uXXXX; characters beyond 16 bits are written as two of them.
    void read_numbered(std::string* to) {
        uint32_t c = read_hex();
        if (c >= 0xd800 && c < 0xdc00 && text_.substr(at_, 2) == "\\u") {
            at_ += 2;
            const uint32_t low = read_hex();
            if (low < 0xdc00 || low > 0xdfff) refuse("half a character is missing");
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        }
        append_character(c, to);
    }

    std::string read_text() {
        if (next() != '"') refuse("a text is expected");
        std::string out;
        for (char c = next(); c != '"'; c = next()) {
            if (c != '\\') {
                out.push_back(c);
                continue;
            }
            c = next();
            switch (c) {
                case 'n': out.push_back('\n'); break;
                case 't': out.push_back('\t'); break;
                case 'r': out.push_back('\r'); break;
                case 'b': out.push_back('\b'); break;
                case 'f': out.push_back('\f'); break;
                case 'u': read_numbered(&out); break;
                default: out.push_back(c);
            }
        }
        return out;
    }

    std::string_view text_;
    const std::string& name_;
    size_t at_ = 0;
};

Json Json::parse(std::string_view text, const std::string& name) { return JsonReader(text, name).read_whole(); }

namespace {
[[noreturn]] void refuse_kind(const char* wanted) { throw Refusal(LOWBIT_BAD_ARGUMENT, std::string("the folder's description holds no ") + wanted + " where one belongs; write it anew"); }
}  // namespace

bool Json::truth() const {
    if (kind_ != Kind::truth) refuse_kind("yes or no");
    return number_ != 0.0;
}

double Json::number() const {
    if (kind_ != Kind::number) refuse_kind("number");
    return number_;
}

int64_t Json::integer() const {
    const double value = number();
    constexpr double kExact = 9007199254740992.0;  // 2^53
    if (value < -kExact || value > kExact || value != static_cast<double>(static_cast<int64_t>(value))) refuse_kind("whole number");
    return static_cast<int64_t>(value);
}

const std::string& Json::text() const {
    if (kind_ != Kind::text) refuse_kind("text");
    return text_;
}

const std::vector<Json>& Json::list() const {
    if (kind_ != Kind::list) refuse_kind("list");
    return list_;
}

const std::map<std::string, Json, std::less<>>& Json::object() const {
    if (kind_ != Kind::object) refuse_kind("object");
    return object_;
}

const Json& Json::find(std::string_view key) const {
    static const Json nothing;
    const auto found = object().find(key);
    return found == object_.end() ? nothing : found->second;
}

const Json& Json::at(std::string_view key) const {
    const auto found = object().find(key);
    if (found == object_.end()) throw Refusal(LOWBIT_BAD_ARGUMENT, "the folder's description lacks '" + std::string(key) + "'; write it anew");
    return found->second;
}

}  // namespace lowbit
