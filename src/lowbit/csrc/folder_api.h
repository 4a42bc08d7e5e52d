/* The C face of a saved folder: text in, text out, with the folder's own tokenizer and chat template.
 *
 * lowbit_folder_open reads what save_low_bit wrote: the weights, tokenizer.json and lowbit_engine.json, which says what the model is
 * and how a conversation is written. What cannot be served without Python (a tokenizer of another kind, a template that is more than
 * text around the messages) is refused with a sentence by the function that would need it; the rest works.
 *
 * Functions that fill a buffer take the room in it and return how much there is, which may be more than was written: call with room 0
 * to learn it. They return -1 with a sentence in lowbit_last_error(). A folder answers one caller at a time; a second one gets a
 * sentence. Strings are UTF-8, their lengths in bytes.
 */
#pragma once
#include "engine_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lowbit_folder lowbit_folder;

typedef struct lowbit_message {
    const char* role;      /* "system" (first only), "user" or "assistant", the last two in turn */
    const char* content;
} lowbit_message;

/* A piece of an answer: a token and the text that became whole with it, not ended by a zero. Not 0 ends the answer. */
typedef int (*lowbit_piece)(void* context, int32_t token, const char* text, int64_t bytes);

/* options NULL: LOWBIT_CACHE_AUTO, LOWBIT_COMPUTE_INT8. Without options, or where their field is 0: context as the model was made for
 * but at most 8192 tokens, one slot, chunks of 512 tokens; the other fields as they are. NULL with a sentence when the folder is
 * damaged or not for this library. The folder's files must stay as they are while it is open: plain weights are read through the map.
 * One that is cut off meanwhile is a sentence (lowbit_guard_map); one that is written over changes the answers. */
LOWBIT_API lowbit_folder* lowbit_folder_open(const char* path, const lowbit_engine_options* options);
LOWBIT_API void lowbit_folder_close(lowbit_folder* folder);
/* Its engine, for steps of one's own; it lives as long as the folder. */
LOWBIT_API lowbit_engine* lowbit_folder_engine(lowbit_folder* folder);
/* Tokens that a prompt and its answer may have together; and the model's vocabulary. -1 for no folder. */
LOWBIT_API int64_t lowbit_folder_context(const lowbit_folder* folder);
LOWBIT_API int64_t lowbit_folder_vocabulary(const lowbit_folder* folder);
/* How the model's authors would have tokens chosen (generation_config.json). */
LOWBIT_API int lowbit_folder_selection(const lowbit_folder* folder, lowbit_selection* selection);

/* The tokens of a text; around: with those that the model expects at the beginning and the end. */
LOWBIT_API int64_t lowbit_folder_encode(const lowbit_folder* folder, const char* text, int64_t bytes, int around, int32_t* tokens, int64_t room);
/* The text of tokens, without special ones unless `special`. */
LOWBIT_API int64_t lowbit_folder_decode(const lowbit_folder* folder, const int32_t* tokens, int64_t count, int special, char* text, int64_t room);
/* A conversation as the tokens that the model was trained on, up to where it speaks. */
LOWBIT_API int64_t lowbit_folder_conversation(const lowbit_folder* folder, const lowbit_message* messages, int64_t count, int32_t* tokens, int64_t room);
/* Continue a prompt until a token ends the answer, `most` are made, the context is full or `piece` says so. The beginning that the
 * prompt shares with the last one is not read again. selection NULL: the folder's own; seed: of the draws. *made (or NULL): tokens. */
LOWBIT_API int lowbit_folder_answer(lowbit_folder* folder, const int32_t* prompt, int64_t count, int64_t most, const lowbit_selection* selection,
                                    uint64_t seed, lowbit_piece piece, void* context, int64_t* made);

#ifdef __cplusplus
}
#endif
