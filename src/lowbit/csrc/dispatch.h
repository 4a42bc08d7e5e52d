// The functions that exist once per instruction set, and the choice among them by CPUID.
#pragma once
#include "product.h"
#include "quantize.h"

namespace lowbit {

struct Isa {
    const char* name;
    void (*quantize_rows)(const QuantizeJob& job, int64_t begin, int64_t end);
    void (*dequantize_rows)(const DequantizeJob& job, int64_t begin, int64_t end);
};

const Isa& isa();  // the one in use

extern const Isa kPortable;
#if defined(LOWBIT_X86)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

}  // namespace lowbit
