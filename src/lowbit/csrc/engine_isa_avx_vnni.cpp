#include <immintrin.h>

#include "attention_lanes.h"
#include "cache_lanes.h"
#include "choice_lanes.h"
#include "engine_lanes.h"
#include "tight_lanes.h"

namespace lowbit {
const EngineIsa kEngineAvxVnni = {normalize, activate, add_scaled, turn_pairs, scale_values, cap_values, widen_numbers, turn_head,
                                  largest_index, weigh_logits, tally_from, moment_from, fold_keys, gather_from,
                                  dense_product, tight_product, split_row, read_tight, kTightPays, attend, store_keys, store_values};
}  // namespace lowbit
