// Small number types as bit patterns. Everything here is static, so that each instruction set's file compiles its own copy.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_fp16(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 5.192296858534828e33f));
#endif
}

inline uint16_t to_fp16(float value) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(value, 0));
#else
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // Subnormal in fp16: adding 0.5 leaves the rounded mantissa in the low bits.
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
#endif
}

// Eight-bit floats with a 4-bit exponent and no infinity (0x7f is NaN).
inline float from_e4m3(uint8_t code) {
    if ((code & 0x7fu) == 0x7fu) return float_of(0x7fc00000u);
    const uint16_t half = static_cast<uint16_t>(((code & 0x80u) << 8) | ((code & 0x7fu) << 7));
    return from_fp16(half) * 256.0f;
}

// For finite values; beyond 448 saturates.
inline uint8_t to_e4m3(float value) {
    const uint32_t sign = (bits_of(value) >> 24) & 0x80u;
    float magnitude = float_of(bits_of(value) & 0x7fffffffu);
    if (magnitude >= 464.0f) return static_cast<uint8_t>(sign | 0x7eu);
    if (magnitude < 0.015625f) {  // Subnormal: multiples of 2^-9.
        return static_cast<uint8_t>(sign | (bits_of(magnitude + 16384.0f) & 0x7fffffu));
    }
    const uint32_t bits = bits_of(magnitude);
    const uint32_t rounded = (bits + 0x7ffffu + ((bits >> 20) & 1)) >> 20;
    const uint32_t code = rounded - (120u << 3);
    return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

inline float from_e8m0(uint8_t code) {
    if (code == 0) return float_of(0x00400000u);
    return code == 0xff ? float_of(0x7fc00000u) : float_of(static_cast<uint32_t>(code) << 23);
}

inline float load_number(const void* data, int dtype, int64_t index) {
    if (dtype == 0) return static_cast<const float*>(data)[index];
    const uint16_t half = static_cast<const uint16_t*>(data)[index];
    return dtype == 1 ? from_bf16(half) : from_fp16(half);
}

inline void store_number(void* data, int dtype, int64_t index, float value) {
    if (dtype == 0) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<uint16_t*>(data)[index] = dtype == 1 ? to_bf16(value) : to_fp16(value);
    }
}

// Scale types, as in lowbit_scale; `unit` is the global factor of E4M3 scales and 1 otherwise.
inline float load_scale(const void* data, int type, int64_t index, float unit) {
    if (type <= 2) return load_number(data, type, index);
    const uint8_t code = static_cast<const uint8_t*>(data)[index];
    return type == 3 ? from_e8m0(code) : from_e4m3(code) * unit;
}

}  // namespace
}  // namespace lowbit
