// JSON as a tree of values: what a saved folder is described in. Small and strict: a file that is damaged is refused with the place.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lowbit {

class Json {
public:
    enum class Kind { null, truth, number, text, list, object };

    // Throws Refusal with the name of what was read and the place in it.
    static Json parse(std::string_view text, const std::string& name);

    Kind kind() const { return kind_; }
    bool is_null() const { return kind_ == Kind::null; }
    // The value as what it must be; throws Refusal if it is something else.
    bool truth() const;
    double number() const;
    int64_t integer() const;
    const std::string& text() const;
    const std::vector<Json>& list() const;
    const std::map<std::string, Json, std::less<>>& object() const;
    // A member of an object; the second kind is null when it is missing.
    const Json& at(std::string_view key) const;
    const Json& find(std::string_view key) const;

private:
    friend class JsonReader;
    Kind kind_ = Kind::null;
    double number_ = 0.0;
    std::string text_;
    std::vector<Json> list_;
    std::map<std::string, Json, std::less<>> object_;
};

// The bytes of a Unicode character in UTF-8.
void append_character(uint32_t character, std::string* to);

}  // namespace lowbit
