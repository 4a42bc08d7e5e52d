// The native checks of the core. Without arguments all of them, else those named; 0 when everything holds.
//
//   core_check [weights] [tight] [products] [selection] [engine] [experts] [slots] [refusals] [hostile] [memory] [face] [threads]
#include <chrono>
#include <cstring>

#include "check.h"

namespace {

struct Group {
    const char* name;
    void (*run)();
    bool every_instruction_set;
};

const Group kGroups[] = {
    {"weights", check::check_weights, true},     {"tight", check::check_tight, true},       {"products", check::check_products, true},
    {"selection", check::check_selection, false},
    {"engine", check::check_engine, true},       {"experts", check::check_experts, true},   {"slots", check::check_slots, false},
    {"refusals", check::check_refusals, false},  {"hostile", check::check_hostile, false},  {"memory", check::check_memory, false},
    {"face", check::check_face, false},          {"threads", check::check_threads, false},
};

void run(const Group& group, const char* set) {
    const auto start = std::chrono::steady_clock::now();
    lowbit_set_isa(set);
    group.run();
    lowbit_set_isa(nullptr);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%-9s %-12s %.1f s\n", group.name, set ? set : "", seconds);
    fflush(stdout);
}

bool asked_for(const Group& group, int count, char** names) {
    for (int i = 1; i < count; ++i)
        if (!strcmp(names[i], group.name)) return true;
    return count == 1;
}

}  // namespace

int main(int count, char** names) {
    int groups = 0;
    for (const Group& group : kGroups) {
        if (!asked_for(group, count, names)) continue;
        ++groups;
        if (!group.every_instruction_set) run(group, nullptr);
        for (const char* set : check::instruction_sets())
            if (group.every_instruction_set) run(group, set);
    }
    if (!groups) {
        fprintf(stderr, "there is no such group of checks; say core_check without arguments to run all\n");
        return 2;
    }
    printf(check::failures ? "%d expectations do not hold\n" : "everything holds\n", check::failures);
    return check::failures ? 1 : 0;
}
