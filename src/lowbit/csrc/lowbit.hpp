// The C++ face of the core: saved folders that answer, owned by objects, with errors as exceptions.
//
//     lowbit::Folder model("small");
//     model.answer(model.conversation({{"user", "Hello"}}), 200, [](std::string_view piece) { std::cout << piece << std::flush; return true; });
//
// A thin layer over folder_api.h, all of it in this file; link with liblowbit.so of the same version. The products and the engine
// underneath are C functions, documented in lowbit.h and engine_api.h.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "folder_api.h"

namespace lowbit {

// What the core refuses, with its sentence; `code` is a lowbit_status.
class Error : public std::runtime_error {
public:
    explicit Error(int code) : std::runtime_error(lowbit_last_error()), code(code) {}
    const int code;
};

struct Message {
    std::string role, content;
};

// A model saved by save_low_bit. Movable; one answer at a time.
class Folder {
public:
    explicit Folder(const std::string& path, int64_t context = 0, lowbit_cache_type cache = LOWBIT_CACHE_AUTO) {
        lowbit_engine_options options{};
        options.context = context;
        options.cache_type = cache;
        handle_.reset(lowbit_folder_open(path.c_str(), &options));
        if (!handle_) throw Error(LOWBIT_BAD_ARGUMENT);
    }

    int64_t context() const { return lowbit_folder_context(handle_.get()); }
    lowbit_engine* engine() const { return lowbit_folder_engine(handle_.get()); }
    lowbit_folder* get() const { return handle_.get(); }

    lowbit_selection selection() const {
        lowbit_selection own{};
        if (int status = lowbit_folder_selection(handle_.get(), &own)) throw Error(status);
        return own;
    }
    // The largest logit each time, nothing drawn.
    static lowbit_selection greedy() {
        lowbit_selection plain{};
        plain.top_p = plain.typical_p = plain.repetition_penalty = 1.0f;
        return plain;
    }

    std::vector<int32_t> encode(std::string_view text, bool around = true) const {
        return filled<std::vector<int32_t>>([&](int32_t* to, int64_t room) {
            return lowbit_folder_encode(handle_.get(), text.data(), static_cast<int64_t>(text.size()), around, to, room);
        });
    }
    std::string decode(const std::vector<int32_t>& tokens, bool special = false) const {
        return filled<std::string>([&](char* to, int64_t room) {
            return lowbit_folder_decode(handle_.get(), tokens.data(), static_cast<int64_t>(tokens.size()), special, to, room);
        });
    }
    std::vector<int32_t> conversation(const std::vector<Message>& messages) const {
        std::vector<lowbit_message> faces;
        for (const Message& message : messages) faces.push_back({message.role.c_str(), message.content.c_str()});
        return filled<std::vector<int32_t>>([&](int32_t* to, int64_t room) {
            return lowbit_folder_conversation(handle_.get(), faces.data(), static_cast<int64_t>(faces.size()), to, room);
        });
    }

    // The answer to a prompt; `piece` gets its text as it comes and says whether to go on. An exception of `piece` comes out here.
    template <class Piece>
    std::string answer(const std::vector<int32_t>& prompt, int64_t most, const Piece& piece, const lowbit_selection* selection = nullptr, uint64_t seed = 0) {
        struct Context {
            const Piece& piece;
            std::string text;
            std::exception_ptr error;
        } context{piece, {}, nullptr};
        const auto hand_on = [](void* to, int32_t, const char* text, int64_t bytes) -> int {
            Context& into = *static_cast<Context*>(to);
            try {
                into.text.append(text, static_cast<size_t>(bytes));
                return into.piece(std::string_view(text, static_cast<size_t>(bytes))) ? 0 : 1;
            } catch (...) {
                into.error = std::current_exception();
                return 1;
            }
        };
        const int status = lowbit_folder_answer(handle_.get(), prompt.data(), static_cast<int64_t>(prompt.size()), most, selection, seed, hand_on, &context, nullptr);
        if (context.error) std::rethrow_exception(context.error);
        if (status) throw Error(status);
        return context.text;
    }
    // Ends the answer under way within a layer; may be called from any thread or signal handler. The answer then throws Error.
    void cancel() const { lowbit_engine_cancel(engine()); }
    void resume() const { lowbit_engine_resume(engine()); }

private:
    template <class Container, class Fill>
    static Container filled(const Fill& fill) {
        const int64_t count = fill(nullptr, 0);
        if (count < 0) throw Error(LOWBIT_BAD_ARGUMENT);
        Container all(static_cast<size_t>(count), 0);
        if (fill(all.data(), count) < 0) throw Error(LOWBIT_BAD_ARGUMENT);
        return all;
    }
    struct Close {
        void operator()(lowbit_folder* folder) const { lowbit_folder_close(folder); }
    };
    std::unique_ptr<lowbit_folder, Close> handle_;
};

}  // namespace lowbit
