// The canonical bit stream of one row: code i at bit i * bits, least significant bit first, in 32-bit words.
//
// Eight codes are `bits` whole bytes, so they are cut out of one 64-bit word (of a little-endian processor): one after another through
// a word that is filled and emptied took three times as long.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

constexpr int kTogetherCodes = 8;

inline int64_t stream_bytes(int64_t count, int bits) { return (count * bits + 31) / 32 * 4; }

// As many bytes of a word as there are: mostly all of them, in one instruction.
inline void copy_word(void* to, const void* from, int64_t bytes) {
    if (bytes >= 8) memcpy(to, from, 8);
    else memcpy(to, from, static_cast<size_t>(bytes));
}

template <int kBits>
inline void read_eights(const uint8_t* from, uint8_t* codes, int64_t count) {
    constexpr uint64_t kMask = (1u << kBits) - 1;
    int64_t left = stream_bytes(count, kBits);
    for (; count >= kTogetherCodes; count -= kTogetherCodes, codes += kTogetherCodes, from += kBits, left -= kBits) {
        uint64_t eight = 0;
        copy_word(&eight, from, left);
        for (int k = 0; k < kTogetherCodes; ++k) codes[k] = static_cast<uint8_t>(eight >> (k * kBits) & kMask);
    }
    uint64_t rest = 0;
    copy_word(&rest, from, left);
    for (int k = 0; k < count; ++k) codes[k] = static_cast<uint8_t>(rest >> (k * kBits) & kMask);
}

template <int kBits>
inline void write_eights(uint8_t* to, const uint8_t* codes, int64_t count) {
    int64_t left = stream_bytes(count, kBits);
    for (; count >= kTogetherCodes; count -= kTogetherCodes, codes += kTogetherCodes, to += kBits, left -= kBits) {
        uint64_t eight = 0;
#if defined(__AVX512F__)  // whose processors cut bits out of a word in one step
        memcpy(&eight, codes, sizeof eight);
        eight = _pext_u64(eight, ~uint64_t{0} / 255 * ((1u << kBits) - 1));
#else
        for (int k = 0; k < kTogetherCodes; ++k) eight |= static_cast<uint64_t>(codes[k]) << (k * kBits);
#endif
        copy_word(to, &eight, left);
    }
    uint64_t rest = 0;
    for (int k = 0; k < count; ++k) rest |= static_cast<uint64_t>(codes[k]) << (k * kBits);
    memset(to, 0, static_cast<size_t>(left));
    copy_word(to, &rest, left);
}

inline void read_codes(const uint32_t* words, uint8_t* codes, int64_t count, int bits) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(words);
    switch (bits) {
        case 1: return read_eights<1>(from, codes, count);
        case 2: return read_eights<2>(from, codes, count);
        case 3: return read_eights<3>(from, codes, count);
        case 4: return read_eights<4>(from, codes, count);
        case 5: return read_eights<5>(from, codes, count);
        case 6: return read_eights<6>(from, codes, count);
        case 7: return read_eights<7>(from, codes, count);
        default: return read_eights<8>(from, codes, count);
    }
}

// The unused top of the last word becomes zero.
inline void write_codes(uint32_t* words, const uint8_t* codes, int64_t count, int bits) {
    uint8_t* to = reinterpret_cast<uint8_t*>(words);
    switch (bits) {
        case 1: return write_eights<1>(to, codes, count);
        case 2: return write_eights<2>(to, codes, count);
        case 3: return write_eights<3>(to, codes, count);
        case 4: return write_eights<4>(to, codes, count);
        case 5: return write_eights<5>(to, codes, count);
        case 6: return write_eights<6>(to, codes, count);
        case 7: return write_eights<7>(to, codes, count);
        default: return write_eights<8>(to, codes, count);
    }
}

}  // namespace
}  // namespace lowbit
