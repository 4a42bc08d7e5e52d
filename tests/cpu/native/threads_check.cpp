// Several threads at once: products, engines and a change of the number of threads meet in one pool; a step is cancelled from outside.
#include <atomic>
#include <thread>

#include "place.h"
#include "stretches.h"
#include "tiny_llama.h"

namespace check {
namespace {

constexpr int kRounds = 30;
// Counted by several threads and reported by the first.
std::atomic<int> wrong{0};

void use_engine(const TinyLlama& llama, uint64_t seed, const std::vector<double>& expected, int64_t count) {
    const lowbit_engine_options made = options(64, 2, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, 32);
    lowbit_engine* engine = lowbit_engine_create(&llama.model, &made);
    const std::vector<int32_t> tokens = some_tokens(count, seed), slots(tokens.size(), 0);
    const std::vector<uint8_t> wanted(tokens.size(), 1);
    std::vector<float> logits(expected.size());
    for (int round = 0; round < kRounds; ++round) {
        wrong += lowbit_engine_truncate(engine, 0, 0) != LOWBIT_OK;
        const int64_t first = round % 2 ? count : count - 3;
        int64_t done = 0;
        for (int64_t part = first; done < count; part = 1) {
            wrong += lowbit_engine_step(engine, tokens.data() + done, slots.data(), wanted.data(), part, logits.data() + done * TinyLlama::kVocab) != LOWBIT_OK;
            done += part;
        }
        wrong += !(distance(logits.data(), expected) < 1e-5);
    }
    lowbit_engine_destroy(engine);
}

void use_products(const Weight& weight, const Aligned& buffer, int64_t tokens) {
    const std::vector<float> x = Random(1).bells(tokens * weight.cols);
    std::vector<float> first(static_cast<size_t>(tokens * weight.rows)), y(first.size());
    for (int round = 0; round < 2 * kRounds; ++round) {
        const int status = lowbit_run(buffer.data(), buffer.size(), x.data(), LOWBIT_FP32, tokens, weight.cols, nullptr, round ? y.data() : first.data(),
                                      LOWBIT_FP32, weight.rows, LOWBIT_COMPUTE_INT8);
        wrong += status != LOWBIT_OK || (round && y != first);
    }
}

// Everything at once, while another thread asks for one thread, for four, for two.
void check_meeting() {
    const TinyLlama llama(&format_named("int4_g32_bf16"));
    const Weight weight = quantized(format_named("int4_g64"), 320, 203, 9);
    const auto buffer = prepared(weight);
    // Read by several threads at once, each from a stretch of its own: small weights are read by one.
    const Weight large = quantized(format_named("int4_g64"), 1000, 320, 9);
    const auto large_buffer = prepared(large);
    constexpr int64_t kTokens = 20;
    const std::vector<double> first = llama.logits(some_tokens(kTokens, 1)), second = llama.logits(some_tokens(kTokens, 2));
    std::atomic<bool> done{false};
    std::thread changer([&] {
        for (int i = 0; !done.load(); ++i) {
            lowbit_set_threads(1 + i * 3 % 4);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    std::vector<std::thread> users;
    users.emplace_back([&] { use_engine(llama, 1, first, kTokens); });
    users.emplace_back([&] { use_engine(llama, 2, second, kTokens); });
    users.emplace_back([&] { use_products(weight, *buffer, 20); });
    users.emplace_back([&] { use_products(large, *large_buffer, 3); });
    for (std::thread& user : users) user.join();
    done.store(true);
    changer.join();
    EXPECT(wrong.load() == 0);
    EXPECT(lowbit_set_threads(0) == LOWBIT_OK);
}

// A cancelled step leaves the slot as it was and the engine usable.
void check_cancelling(lowbit_engine* engine, const std::vector<int32_t>& tokens, const std::vector<int32_t>& slots) {
    std::atomic<bool> done{false};
    std::thread canceller([&] {
        while (!done.load()) {
            lowbit_engine_cancel(engine);
            std::this_thread::yield();
        }
    });
    bool cancelled = false;
    for (int round = 0; round < 1000 && !cancelled; ++round) {
        const int64_t before = lowbit_engine_length(engine, 0);
        const int status = lowbit_engine_step(engine, tokens.data(), slots.data(), nullptr, 512, nullptr);
        cancelled = status == LOWBIT_CANCELLED;
        EXPECT(lowbit_engine_length(engine, 0) == before + (cancelled ? 0 : 512) && (cancelled || status == LOWBIT_OK));
        if (before > 3000) EXPECT(lowbit_engine_truncate(engine, 0, 0) == LOWBIT_OK);
    }
    done.store(true);
    canceller.join();
    EXPECT(cancelled);
    lowbit_engine_resume(engine);
}

// A cancel that comes before its step waits for it, ends it alone, and can be taken back.
void check_early_cancel(lowbit_engine* engine, const std::vector<int32_t>& tokens, const std::vector<int32_t>& slots) {
    EXPECT(lowbit_engine_truncate(engine, 0, 0) == LOWBIT_OK);
    for (const bool taken_back : {false, true}) {
        lowbit_engine_cancel(engine);
        if (taken_back) lowbit_engine_resume(engine);
        const int64_t before = lowbit_engine_length(engine, 0);
        const int expected = taken_back ? static_cast<int>(LOWBIT_OK) : static_cast<int>(LOWBIT_CANCELLED);
        EXPECT(lowbit_engine_step(engine, tokens.data(), slots.data(), nullptr, 8, nullptr) == expected);
        EXPECT(lowbit_engine_length(engine, 0) == before + (taken_back ? 8 : 0));
        EXPECT(lowbit_engine_step(engine, tokens.data(), slots.data(), nullptr, 8, nullptr) == LOWBIT_OK);
    }
    lowbit_engine_cancel(engine);
    int32_t made[4];
    int64_t count = -1;
    EXPECT(lowbit_engine_greedy(engine, 0, 5, 4, nullptr, 0, made, &count) == LOWBIT_CANCELLED && count == 0);
    EXPECT(lowbit_engine_greedy(engine, 0, 5, 4, nullptr, 0, made, &count) == LOWBIT_OK && count == 4);
}

// Two threads at one engine: each step is whole or refused with a sentence, and the tokens add up.
void check_intruder(lowbit_engine* engine, const std::vector<int32_t>& tokens, const std::vector<int32_t>& slots) {
    std::atomic<int64_t> served{0};
    const auto use = [&](int64_t count) {
        for (int round = 0; round < kRounds; ++round) {
            const int status = lowbit_engine_step(engine, tokens.data(), slots.data(), nullptr, count, nullptr);
            served += status == LOWBIT_OK ? count : 0;
            wrong += status != LOWBIT_OK && status != LOWBIT_BAD_ARGUMENT;
            wrong += lowbit_engine_length(engine, 0) < 0;
            std::this_thread::yield();
        }
    };
    EXPECT(lowbit_engine_truncate(engine, 0, 0) == LOWBIT_OK);
    std::thread intruder([&] { use(1); });
    use(40);
    intruder.join();
    EXPECT(wrong.load() == 0 && served.load() > 0 && lowbit_engine_length(engine, 0) == served.load());
}

cpu_set_t processors() {
    cpu_set_t set;
    CPU_ZERO(&set);
    EXPECT(sched_getaffinity(0, sizeof set, &set) == 0);
    return set;
}

// One thread in the places of two: who wakes up beside another leaves its processor for as long as the work takes, where it may.
void check_places() {
    const cpu_set_t before = processors();
    int first = 0, second;
    while (!CPU_ISSET(first, &before)) ++first;
    for (second = first + 1; second < CPU_SETSIZE && !CPU_ISSET(second, &before);) ++second;
    lowbit::Place places[2];
    const auto of = [&](int member) -> lowbit::Place& { return places[member]; };
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(first, &set);
    EXPECT(sched_setaffinity(0, sizeof set, &set) == 0);
    places[0].note();
    lowbit::Place::settle(1, 2, of);  // no other processor is allowed
    const cpu_set_t alone = processors();
    EXPECT(CPU_EQUAL(&alone, &set));
    if (second < CPU_SETSIZE) {
        CPU_SET(second, &set);
        EXPECT(sched_setaffinity(0, sizeof set, &set) == 0);
        lowbit::Place::settle(1, 2, of);
        EXPECT(sched_getcpu() == second);
        places[1].restore();
        const cpu_set_t after = processors();
        EXPECT(CPU_EQUAL(&after, &set));
    }
    EXPECT(sched_setaffinity(0, sizeof before, &before) == 0);
}

// Every item is given out once, however many take at once, from both ends of a stretch.
void check_stretches() {
    for (int size : {1, 2, 3, 4})
        for (int64_t items : {0, 1, 3, 64, 5000})
            for (int round = 0; round < 10; ++round) {
                std::vector<lowbit::Stretch> stretches(static_cast<size_t>(size));
                std::vector<std::atomic<int>> given(static_cast<size_t>(items));
                std::atomic<int> misled{0};
                const auto take = [&](int member) {
                    lowbit::take_stretches(member, size, items, [&](int owner) -> lowbit::Stretch& { return stretches[static_cast<size_t>(owner)]; },
                                           [&](int64_t item, int64_t next) {
                                               ++given[static_cast<size_t>(item)];
                                               misled += next >= 0 && next != item + 1;
                                           });
                };
                std::vector<std::thread> members;
                for (int member = 1; member < size; ++member) members.emplace_back(take, member);
                take(0);
                for (std::thread& member : members) member.join();
                int once = 0;
                for (const std::atomic<int>& count : given) once += count == 1;
                EXPECT(once == items && misled == 0);
            }
}

void check_one_engine() {
    const TinyLlama llama(nullptr);
    const lowbit_engine_options made = options(4096, 1, LOWBIT_CACHE_FP32, LOWBIT_COMPUTE_FP32, 512);
    lowbit_engine* engine = lowbit_engine_create(&llama.model, &made);
    EXPECT(engine != nullptr);
    if (!engine) return;
    const std::vector<int32_t> tokens = some_tokens(512, 1), slots(512, 0);
    check_cancelling(engine, tokens, slots);
    check_early_cancel(engine, tokens, slots);
    check_intruder(engine, tokens, slots);
    lowbit_engine_destroy(engine);
}

}  // namespace

void check_threads() {
    check_places();
    check_stretches();
    check_meeting();
    check_one_engine();
}

}  // namespace check
