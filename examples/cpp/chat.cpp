// Talk with a model that save_low_bit wrote, from C++ alone: no Python runs.
//
//   g++ -std=c++17 -O2 chat.cpp -I LOWBIT/include -L LOWBIT -llowbit -Wl,-rpath,LOWBIT -o chat
//   ./chat FOLDER                                              a conversation, until an empty line or Ctrl-D
//   ./chat FOLDER --prompt "Name three fruits." --greedy       one answer
//
// LOWBIT is where the Python package lies: python -c "import lowbit; print(lowbit.__path__[0])". Ctrl-C ends an answer, not the program.
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <optional>
#include <string>

#include "lowbit.hpp"

namespace {

struct Arguments {
    std::string folder;
    std::optional<std::string> prompt, system;
    int64_t most = 512, context = 0;
    bool greedy = false;
};

constexpr const char* kUsage =
    "usage: chat FOLDER [--prompt TEXT] [--system TEXT] [--max-new-tokens N] [--context N] [--threads N] [--greedy]\n";

Arguments read_arguments(int count, char** words) {
    Arguments read;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const auto value = [&]() -> const char* {
            if (i + 1 == count) throw std::invalid_argument(word + " needs a value");
            return words[++i];
        };
        if (word == "--prompt") read.prompt = value();
        else if (word == "--system") read.system = value();
        else if (word == "--max-new-tokens") read.most = std::atoll(value());
        else if (word == "--context") read.context = std::atoll(value());
        else if (word == "--threads") lowbit_set_threads(std::atoi(value()));
        else if (word == "--greedy") read.greedy = true;
        else if (read.folder.empty() && word[0] != '-') read.folder = word;
        else throw std::invalid_argument("what is " + word + "?");
    }
    if (read.folder.empty()) throw std::invalid_argument("which folder?");
    return read;
}

// The model that Ctrl-C speaks to.
std::atomic<lowbit_engine*> at_work{nullptr};

void on_interrupt(int) {
    if (lowbit_engine* engine = at_work.load()) lowbit_engine_cancel(engine);
    else std::_Exit(130);
}

// One answer, written as it comes; returns its text.
std::string answer(lowbit::Folder& model, const std::vector<lowbit::Message>& messages, const Arguments& with) {
    const lowbit_selection selection = with.greedy ? lowbit::Folder::greedy() : model.selection();
    std::string text;
    at_work = model.engine();
    try {
        model.answer(
            model.conversation(messages), with.most,
            [&](std::string_view piece) {
                text += piece;
                std::cout << piece << std::flush;
                return true;
            },
            &selection);
    } catch (const lowbit::Error& error) {
        at_work = nullptr;
        if (error.code != LOWBIT_CANCELLED) throw;
        std::cout << " [interrupted]";
    }
    at_work = nullptr;
    model.resume();  // Ctrl-C behind the last token ends nothing, and shall not end the next answer
    std::cout << std::endl;
    return text;
}

void converse(lowbit::Folder& model, std::vector<lowbit::Message> messages, const Arguments& with) {
    for (std::string line; std::cout << "> " << std::flush && std::getline(std::cin, line) && !line.empty();) {
        messages.push_back({"user", line});
        messages.push_back({"assistant", answer(model, messages, with)});
    }
}

}  // namespace

int main(int count, char** words) {
    try {
        const Arguments with = read_arguments(count, words);
        lowbit::Folder model(with.folder, with.context);
        std::vector<lowbit::Message> messages;
        if (with.system) messages.push_back({"system", *with.system});
        std::signal(SIGINT, on_interrupt);
        if (with.prompt) {
            messages.push_back({"user", *with.prompt});
            answer(model, messages, with);
        } else {
            converse(model, messages, with);
        }
        return 0;
    } catch (const std::invalid_argument& error) {
        std::cerr << "chat: " << error.what() << '\n' << kUsage;
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "chat: " << error.what() << '\n';
        return 1;
    }
}
