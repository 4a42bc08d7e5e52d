/* Choosing the next token from its logits. Included by lowbit.h.
 *
 * The steps and their order are those of transformers' generate, so that the same settings give the same distribution: biases,
 * penalties on tokens that occurred, forbidden tokens, temperature, then the filters top-k, top-p, min-p, typical-p; then one draw.
 * Tokens of equal logits stay or go together.
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lowbit_selection {
    float temperature;          /* 0: the largest logit, nothing drawn */
    int32_t top_k;              /* 0: off */
    float top_p;                /* 1: off */
    float min_p;                /* 0: off */
    float typical_p;            /* 1: off */
    float repetition_penalty;   /* 1: off; divides positive logits of tokens that occurred, multiplies negative ones */
    float presence_penalty;     /* 0: off; taken from every token that occurred */
    float frequency_penalty;    /* 0: off; taken once for each occurrence */
    int32_t bias_count;         /* tokens whose logit is moved; -infinity forbids one */
    const int32_t* bias_tokens;
    const float* bias_values;
    int32_t word_count;         /* sequences of tokens that may not occur: the last one is forbidden where those before it stand */
    const int32_t* word_ends;   /* [word_count] where each ends in word_tokens; the first begins at 0 */
    const int32_t* word_tokens;
    int32_t banned_count;       /* tokens that may not come now, such as those that would end an answer too soon */
    const int32_t* banned_tokens;
} lowbit_selection;

/* Choose a token. logits [vocab] are left as they were. history: the tokens so far, which penalties and words look at. generator: 64
 * bits of state, moved on by a draw. log_probability (or NULL): of the chosen token, under the logits as they came. */
LOWBIT_API int lowbit_select(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                             int64_t history_length, uint64_t* generator, int32_t* token, float* log_probability);
/* The distribution that lowbit_select draws from, written to probabilities [vocab]. */
LOWBIT_API int lowbit_probabilities(const float* logits, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                                    int64_t history_length, float* probabilities);
/* The steps before the temperature, on scores [vocab] in place: what a beam search asks for. */
LOWBIT_API int lowbit_adjust(float* scores, int64_t vocab, const lowbit_selection* selection, const int32_t* history,
                             int64_t history_length);

#ifdef __cplusplus
}
#endif
