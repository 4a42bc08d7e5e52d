// One row of a matrix as fp32: the embedding of a token.
#pragma once
#include "engine_product.h"

namespace lowbit {

void read_row(const View& view, int64_t row, float* to);

}  // namespace lowbit
