// One argument after the other replaced by what no honest caller gives, while the others stay good: each call must be refused with a
// sentence of its own. Sizes of the wrong kind are the extremes alone, for how long a buffer is only its caller knows.
#pragma once
#include <climits>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "check.h"

namespace check {

// Arguments that may be anything, by their place.
constexpr unsigned free_at() { return 0; }
template <class... Places>
constexpr unsigned free_at(int place, Places... more) {
    return 1u << place | free_at(more...);
}

inline void forget_sentence() { lowbit_set_isa("no sentence of its own"); }
inline bool left_sentence() { return strlen(lowbit_last_error()) >= 10 && !strstr(lowbit_last_error(), "no sentence of its own"); }

template <class Result>
bool is_refusal(Result result) {
    if constexpr (std::is_pointer_v<Result>) return result == nullptr;
    else if constexpr (std::is_same_v<Result, int64_t>) return result == -1;
    else return result != LOWBIT_OK;
}

template <class Argument>
std::vector<Argument> hostile_values() {
    if constexpr (std::is_function_v<std::remove_pointer_t<Argument>> || std::is_floating_point_v<Argument> || std::is_unsigned_v<Argument>) return {};
    else if constexpr (std::is_pointer_v<Argument>) return {nullptr};
    else return {std::numeric_limits<Argument>::min(), static_cast<Argument>(-1), std::numeric_limits<Argument>::max()};
}

template <size_t kPlace, class Result, class... Arguments>
void refuse_at(const char* name, Result (*function)(Arguments...), const std::tuple<Arguments...>& good) {
    for (auto value : hostile_values<std::tuple_element_t<kPlace, std::tuple<Arguments...>>>()) {
        std::tuple<Arguments...> given = good;
        std::get<kPlace>(given) = value;
        forget_sentence();
        const Result result = std::apply(function, given);
        if (is_refusal(result) && left_sentence()) continue;
        ++failures;
        long long number = 0;
        if constexpr (!std::is_pointer_v<decltype(value)>) number = static_cast<long long>(value);
        fprintf(stderr, "%s takes %lld as argument %zu, or refuses it without a sentence\n", name, number, kPlace);
    }
}

template <class Result, class... Arguments, size_t... kPlaces>
void refuse_each_of(const char* name, Result (*function)(Arguments...), unsigned free, const std::tuple<Arguments...>& good, std::index_sequence<kPlaces...>) {
    expect(!is_refusal(std::apply(function, good)), name, __FILE__, __LINE__);
    ((free >> kPlaces & 1u ? void() : refuse_at<kPlaces>(name, function, good)), ...);
    expect(!is_refusal(std::apply(function, good)), name, __FILE__, __LINE__);
}

template <class Result, class... Arguments>
void refuse_each(const char* name, Result (*function)(Arguments...), unsigned free, std::common_type_t<Arguments>... good) {
    refuse_each_of(name, function, free, std::tuple<Arguments...>(good...), std::index_sequence_for<Arguments...>());
}
#define REFUSE_EACH(function, free, ...) check::refuse_each(#function, function, (free), __VA_ARGS__)

}  // namespace check
