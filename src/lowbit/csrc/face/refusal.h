// A refusal on its way to the border of the library, where it becomes a code and a sentence (caught() in error.h).
#pragma once
#include <stdexcept>
#include <string>

#include "../lowbit.h"

namespace lowbit {

class Refusal : public std::runtime_error {
public:
    Refusal(int code, const std::string& sentence) : std::runtime_error(sentence), code_(code) {}
    int code() const { return code_; }

private:
    int code_;
};

}  // namespace lowbit
