// A saved folder at work: its weights in an engine, its tokenizer, and answers one token at a time.
#include "../folder_api.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "../error.h"
#include "../format.h"
#include "refusal.h"
#include "saved.h"
#include "tokenizer.h"

namespace lowbit {
namespace {

constexpr int64_t kLongestDefaultContext = 8192;  // longer ones have to be asked for: the cache of a 7B model takes 1 GB for it
constexpr int32_t kChunk = 512;

void check(int status) {
    if (status != LOWBIT_OK) throw Refusal(status, lowbit_last_error());
}

struct EngineCloser {
    void operator()(lowbit_engine* engine) const { lowbit_engine_destroy(engine); }
};

}  // namespace
}  // namespace lowbit

using namespace lowbit;

struct lowbit_folder {
    lowbit_folder(const std::string& path, const lowbit_engine_options* options);

    SavedModel saved;
    std::optional<Tokenizer> tokenizer;
    std::unique_ptr<lowbit_engine, EngineCloser> engine;
    lowbit_engine_options options{};
    std::vector<int32_t> ends, held;  // tokens that end an answer; those that the slot holds
    int64_t fixed_until = 0;          // beyond, frequencies depend on the length and keys made for a shorter text are stale
    bool two_tables = false;          // they do so in one step, and all keys past it are alike
    int64_t turned = 0;               // the length of the text that the keys in the slot are turned for
    std::atomic<bool> busy{false};

    const Tokenizer& text() const;
    std::string render(const lowbit_message* messages, int64_t count) const;
    bool turns_anew(int64_t length) const { return two_tables && (turned > fixed_until) != (length > fixed_until); }
    std::vector<float> read(const int32_t* prompt, int64_t count);
    void step(const int32_t* tokens, int64_t count, bool last, float* logits);
};

lowbit_folder::lowbit_folder(const std::string& path, const lowbit_engine_options* asked) : saved(path) {
    const Json& description = saved.description();
    const Json& own = description.at("text");
    if (own.find("refusal").is_null()) tokenizer.emplace(own, Json::parse(read_file(path + "/tokenizer.json"), path + "/tokenizer.json"));
    for (const Json& token : description.at("ends").list()) ends.push_back(static_cast<int32_t>(token.integer()));
    if (asked) options = *asked;
    else options.cache_type = LOWBIT_CACHE_AUTO;
    const int64_t longest = description.at("context").integer();
    if (options.context == 0) options.context = std::min(longest, kLongestDefaultContext);
    if (options.context < 1 || options.context > longest)
        throw Refusal(LOWBIT_BAD_ARGUMENT, "a context of " + std::to_string(options.context) + " tokens was asked for; this model was made for 1 to " + std::to_string(longest));
    if (options.slots == 0) options.slots = 1;
    if (options.chunk == 0) options.chunk = static_cast<int32_t>(std::min<int64_t>(kChunk, options.context));
    fixed_until = options.context;
    for (int32_t i = 0; i < saved.model().rope_count; ++i) {
        const lowbit_rope& rope = saved.model().ropes[i];
        if (rope.change == LOWBIT_ROPE_FIXED) continue;
        fixed_until = std::min<int64_t>(fixed_until, rope.trained_positions);
        two_tables = rope.change == LOWBIT_ROPE_LONG;
    }
    engine.reset(lowbit_engine_create(&saved.model(), &options));
    if (!engine) throw Refusal(LOWBIT_BAD_ARGUMENT, lowbit_last_error());
}

const Tokenizer& lowbit_folder::text() const {
    if (!tokenizer) throw Refusal(LOWBIT_UNSUPPORTED, saved.description().at("text").at("refusal").text());
    return *tokenizer;
}

// [system] (user assistant)* user, with the text that the model's template writes before, between and behind the messages.
std::string lowbit_folder::render(const lowbit_message* messages, int64_t count) const {
    const Json& chat = saved.description().at("text").at("chat");
    const Json& refusal = chat.find("refusal");
    if (!refusal.is_null()) throw Refusal(LOWBIT_UNSUPPORTED, refusal.text());
    const bool trim = chat.at("trim").truth();
    std::string out, before = chat.at("start").text();
    const char* expected = "user";
    for (int64_t i = 0; i < count; ++i) {
        if (!messages[i].role || !messages[i].content) throw Refusal(LOWBIT_BAD_ARGUMENT, "a message needs a role and a content");
        std::string_view content = messages[i].content;
        const std::string_view role = messages[i].role;
        constexpr const char* kSpaces = " \t\n\r\f\v";
        while (trim && !content.empty() && strchr(kSpaces, content.front())) content.remove_prefix(1);
        while (trim && !content.empty() && strchr(kSpaces, content.back())) content.remove_suffix(1);
        if (i == 0 && role == "system") {
            if (chat.at("system").is_null()) throw Refusal(LOWBIT_UNSUPPORTED, "this model's chat template takes no system message");
            out = chat.at("system").text();
            before = chat.at("after_system").text();
        } else {
            if (role != expected) throw Refusal(LOWBIT_BAD_ARGUMENT, "messages of user and assistant come in turn, after at most one of the system");
            out += before;
            const bool user = role == "user";
            before = chat.at(user ? "reply" : "next").text();
            expected = user ? "assistant" : "user";
        }
        out += content;
    }
    if (count < 1 || strcmp(expected, "assistant")) throw Refusal(LOWBIT_BAD_ARGUMENT, "a conversation ends with a message of the user, which is to be answered");
    return out + chat.at("answer").text();
}

void lowbit_folder::step(const int32_t* tokens, int64_t count, bool last, float* logits) {
    const std::vector<int32_t> slots(static_cast<size_t>(count), 0);
    std::vector<uint8_t> wanted(static_cast<size_t>(count), 0);
    wanted.back() = last;
    check(lowbit_engine_step(engine.get(), tokens, slots.data(), wanted.data(), count, logits));
    held.insert(held.end(), tokens, tokens + count);
}

// The logits after a prompt, of which only what the slot does not hold is read.
std::vector<float> lowbit_folder::read(const int32_t* prompt, int64_t count) {
    const int64_t present = std::min<int64_t>(static_cast<int64_t>(held.size()), lowbit_engine_length(engine.get(), 0));
    int64_t same = std::mismatch(held.begin(), held.begin() + std::min(present, count - 1), prompt).second - prompt;
    const bool goes_on = same == present && same == count - 1;
    if (two_tables ? turns_anew(count) : !goes_on && std::max(present, count) > fixed_until) same = 0;
    if (lowbit_engine_truncate(engine.get(), 0, same) != LOWBIT_OK) {
        same = 0;
        check(lowbit_engine_truncate(engine.get(), 0, same));
    }
    held.resize(static_cast<size_t>(same));
    turned = count;
    std::vector<float> logits(static_cast<size_t>(saved.model().vocab_size));
    check(lowbit_engine_expect(engine.get(), 0, count));
    for (int64_t i = same; i < count; i += options.chunk) {
        const int64_t part = std::min<int64_t>(options.chunk, count - i);
        step(prompt + i, part, i + part == count, logits.data());
    }
    return logits;
}

namespace {

// Takes the folder for one caller.
class Turn {
public:
    explicit Turn(lowbit_folder& folder) : folder_(folder) {
        if (folder.busy.exchange(true)) throw Refusal(LOWBIT_BAD_ARGUMENT, "this folder is answering another thread; open it once for each");
    }
    ~Turn() { folder_.busy.store(false); }

private:
    lowbit_folder& folder_;
};

template <class Number>
int64_t hand_over(const Number* from, size_t count, Number* to, int64_t room) {
    if (room > 0) memcpy(to, from, std::min(count, static_cast<size_t>(room)) * sizeof(Number));
    return static_cast<int64_t>(count);
}

void check_buffers(const void* handle, const void* from, int64_t count, const void* to, int64_t room) {
    if (!handle || count < 0 || count > kMostElements || room < 0 || (count > 0 && !from) || (room > 0 && !to))
        throw Refusal(LOWBIT_BAD_ARGUMENT, "a folder, what it is to read and room for the result are needed, and no negative numbers");
}

struct Listener {
    lowbit_piece piece;
    void* context;
    std::string pending;  // bytes that are no whole character yet

    bool tell(int32_t token, std::string_view bytes, bool last) {
        pending.append(bytes);
        size_t used = 0;
        const std::string text = valid_text(pending, !last, &used);
        pending.erase(0, used);
        return piece && piece(context, token, text.data(), static_cast<int64_t>(text.size()));
    }
};

void answer(lowbit_folder& folder, std::vector<int32_t> tokens, int64_t most, const lowbit_selection& selection, uint64_t seed, Listener listener, int64_t* made) {
    std::vector<float> logits = folder.read(tokens.data(), static_cast<int64_t>(tokens.size()));
    const int64_t vocabulary = folder.saved.model().vocab_size, room = std::min(most, folder.options.context - static_cast<int64_t>(tokens.size()));
    for (int64_t i = 1; i <= room; ++i) {
        int32_t token = 0;
        check(lowbit_select(logits.data(), vocabulary, &selection, tokens.data(), static_cast<int64_t>(tokens.size()), &seed, &token, nullptr));
        tokens.push_back(token);
        if (made) *made = i;
        const bool last = i == room || std::find(folder.ends.begin(), folder.ends.end(), token) != folder.ends.end();
        const std::string_view bytes = folder.tokenizer ? folder.tokenizer->bytes(token, false) : std::string_view();
        if (listener.tell(token, bytes, last) || last) return;
        const int64_t length = static_cast<int64_t>(tokens.size());
        if (folder.turns_anew(length)) logits = folder.read(tokens.data(), length);
        else folder.step(&token, 1, true, logits.data());
    }
}

}  // namespace

extern "C" lowbit_folder* lowbit_folder_open(const char* path, const lowbit_engine_options* options) try {
    if (!path) throw Refusal(LOWBIT_BAD_ARGUMENT, "no folder was named");
    return new lowbit_folder(path, options);
} catch (...) {
    caught();
    return nullptr;
}

extern "C" void lowbit_folder_close(lowbit_folder* folder) { delete folder; }
extern "C" lowbit_engine* lowbit_folder_engine(lowbit_folder* folder) { return folder ? folder->engine.get() : nullptr; }

static int64_t refuse_nothing() { return fail(LOWBIT_BAD_ARGUMENT, "no folder was given"), -1; }
extern "C" int64_t lowbit_folder_context(const lowbit_folder* folder) { return folder ? folder->options.context : refuse_nothing(); }
extern "C" int64_t lowbit_folder_vocabulary(const lowbit_folder* folder) { return folder ? folder->saved.model().vocab_size : refuse_nothing(); }

extern "C" int lowbit_folder_selection(const lowbit_folder* folder, lowbit_selection* selection) try {
    check_buffers(folder, selection, 1, nullptr, 0);
    const Json& own = folder->saved.description().at("selection");
    *selection = {};
    selection->temperature = static_cast<float>(own.at("temperature").number());
    selection->top_k = static_cast<int32_t>(own.at("top_k").integer());
    selection->top_p = static_cast<float>(own.at("top_p").number());
    selection->min_p = static_cast<float>(own.at("min_p").number());
    selection->typical_p = static_cast<float>(own.at("typical_p").number());
    selection->repetition_penalty = static_cast<float>(own.at("repetition_penalty").number());
    return LOWBIT_OK;
} catch (...) {
    return caught();
}

extern "C" int64_t lowbit_folder_encode(const lowbit_folder* folder, const char* text, int64_t bytes, int around, int32_t* tokens, int64_t room) try {
    check_buffers(folder, text, bytes, tokens, room);
    const std::vector<int32_t> all = folder->text().encode({text, static_cast<size_t>(bytes)}, around != 0);
    return hand_over(all.data(), all.size(), tokens, room);
} catch (...) {
    caught();
    return -1;
}

extern "C" int64_t lowbit_folder_decode(const lowbit_folder* folder, const int32_t* tokens, int64_t count, int special, char* text, int64_t room) try {
    check_buffers(folder, tokens, count, text, room);
    std::string bytes;
    for (int64_t i = 0; i < count; ++i) bytes += folder->text().bytes(tokens[i], special != 0);
    const std::string all = valid_text(bytes, false, nullptr);
    return hand_over(all.data(), all.size(), text, room);
} catch (...) {
    caught();
    return -1;
}

extern "C" int64_t lowbit_folder_conversation(const lowbit_folder* folder, const lowbit_message* messages, int64_t count, int32_t* tokens, int64_t room) try {
    check_buffers(folder, messages, count, tokens, room);
    const Tokenizer& tokenizer = folder->text();
    const std::string text = folder->render(messages, count);
    const std::vector<int32_t> all = tokenizer.encode(text, folder->saved.description().at("text").at("chat").at("around").truth());
    return hand_over(all.data(), all.size(), tokens, room);
} catch (...) {
    caught();
    return -1;
}

extern "C" int lowbit_folder_answer(lowbit_folder* folder, const int32_t* prompt, int64_t count, int64_t most, const lowbit_selection* selection, uint64_t seed,
                                    lowbit_piece piece, void* context, int64_t* made) try {
    if (made) *made = 0;
    check_buffers(folder, prompt, count, nullptr, 0);
    if (count < 1) throw Refusal(LOWBIT_BAD_ARGUMENT, "the prompt is empty; give at least one token");
    if (most < 1) throw Refusal(LOWBIT_BAD_ARGUMENT, "an answer of no tokens was asked for; use a number from 1 up");
    if (count >= folder->options.context)
        throw Refusal(LOWBIT_BAD_ARGUMENT, "the prompt has " + std::to_string(count) + " tokens and leaves no room for an answer in a context of " +
                                               std::to_string(folder->options.context) + "; open the folder with a longer one");
    const Turn turn(*folder);
    lowbit_selection own{};
    if (!selection) check(lowbit_folder_selection(folder, &own));
    answer(*folder, std::vector<int32_t>(prompt, prompt + count), most, selection ? *selection : own, seed, {piece, context, {}}, made);
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
