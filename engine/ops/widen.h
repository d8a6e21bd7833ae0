// From the codes of weight.h to numbers, without their scales: every code is exact in bfloat16 and in float.

#pragma once

#include <utility>

#include "weight.h"

namespace {

// Where the codes of one block of 64 outputs lie.
struct Planes {
    const char *codes, *high;
};

// Bytes of a block per pair of inputs.
constexpr int64_t code_bytes(Codes kind) { return kind <= kU6 ? kBlock : kind == kBF16 ? 4 * kBlock : 2 * kBlock; }
constexpr int64_t high_bytes(Codes kind) { return kind == kU5 ? kBlock / 4 : kind == kU6 ? kBlock / 2 : 0; }

// One code as a number; pair = input / 2, lane = 2 * output + input % 2. Slow and obvious.
template <Codes KIND>
inline float code_at(const Planes& from, int64_t pair, int lane) {
    if (KIND == kBF16) return load(((const Bf16*)from.codes)[pair * 2 * kBlock + lane]);
    if (KIND == kI8) return float(((const int8_t*)from.codes)[pair * 2 * kBlock + lane]);
    if (KIND == kE4M3) return load(((const E4m3*)from.codes)[pair * 2 * kBlock + lane]);
    int code = ((const uint16_t*)from.codes)[pair / 4 * 2 * kBlock + lane] >> (pair % 4 * 4) & 15;
    if (KIND == kU5) code |= (((const uint16_t*)from.high)[pair / 16 * 2 * kBlock + lane] >> pair % 16 & 1) << 4;
    if (KIND == kU6) code |= (((const uint16_t*)from.high)[pair / 8 * 2 * kBlock + lane] >> pair % 8 * 2 & 3) << 4;
    return float(code);
}

// `pairs` pairs of inputs of a block from the pair `first` on, [pairs][2][64].
template <Codes KIND>
void widen_tile(const Planes& from, int64_t first, int pairs, float* tile) {
    for (int k = 0; k < 2 * pairs; k++)
        for (int o = 0; o < kBlock; o++) tile[k * kBlock + o] = code_at<KIND>(from, first + k / 2, 2 * o + k % 2);
}

#ifdef __AVX512BF16__
// body<0>() .. body<N - 1>()
template <int N, typename Body>
inline void unrolled(const Body& body) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (body.template operator()<I>(), ...); }
    (std::make_integer_sequence<int, N>());
}

constexpr int kAndOr = 0xea;  // ternary logic: (a & b) | c

// kPairs pairs of inputs of 64 outputs as they are stored. `widen<I>(v)` is the pair I of the outputs 16 v .. 16 v + 15.
template <Codes KIND>
struct Packed {  // 4 to 6 bits
    static constexpr int kPairs = 4, kStep = KIND == kU5 ? 1 : KIND == kU6 ? 2 : 0;
    __m512i four[kBlockVecs], high[kBlockVecs];

    Packed(const Planes& from, int64_t pair) {
        for (int v = 0; v < kBlockVecs; v++) {
            four[v] = _mm512_loadu_si512(from.codes + pair * kBlock + v * 64);
            if (KIND == kU5)
                high[v] = _mm512_srl_epi16(_mm512_loadu_si512(from.high + pair / 16 * 4 * kBlock + v * 64),
                                           _mm_cvtsi32_si128(int(pair % 16)));
            if (KIND == kU6)
                high[v] = _mm512_srl_epi16(_mm512_loadu_si512(from.high + pair / 8 * 4 * kBlock + v * 64),
                                           _mm_cvtsi32_si128(int(pair % 8 * 2)));
        }
    }

    // A code c becomes 128 + c by an OR: 0x4300 is 128, and the last bit of its mantissa is 1.
    template <int I>
    __m512i widen(int v) const {
        const __m512i low = _mm512_ternarylogic_epi32(_mm512_srli_epi16(four[v], 4 * I), _mm512_set1_epi16(15),
                                                      _mm512_set1_epi16(0x4300), kAndOr);
        if (kStep == 0) return low;
        constexpr int kShift = 4 - kStep * I;  // from where the bits are to bit 4
        const __m512i moved = kShift >= 0 ? _mm512_slli_epi16(high[v], kShift >= 0 ? kShift : 0)
                                          : _mm512_srli_epi16(high[v], kShift >= 0 ? 0 : -kShift);
        return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(kStep == 1 ? 0x10 : 0x30), low, kAndOr);
    }
};

template <>
struct Packed<kBF16> {
    static constexpr int kPairs = 1;
    const char* from;
    Packed(const Planes& planes, int64_t pair) : from(planes.codes + pair * 4 * kBlock) {}
    template <int>
    __m512i widen(int v) const {
        return _mm512_loadu_si512(from + v * 64);
    }
};

template <>
struct Packed<kI8> {
    static constexpr int kPairs = 1;
    const __m128i* from;
    Packed(const Planes& planes, int64_t pair) : from((const __m128i*)(planes.codes + pair * 2 * kBlock)) {}
    template <int>
    __m512i widen(int v) const {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 2 * v)));
        const __m512 top = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 2 * v + 1)));
        return (__m512i)_mm512_cvtne2ps_pbh(top, low);
    }
};

// Exponent and fraction move to their places and the bias is added; the eight subnormals come from a table.
template <>
struct Packed<kE4M3> {
    static constexpr int kPairs = 1;
    const __m256i* from;
    Packed(const Planes& planes, int64_t pair) : from((const __m256i*)(planes.codes + pair * 2 * kBlock)) {}
    template <int>
    __m512i widen(int v) const {
        alignas(64) static constexpr uint16_t kSubnormals[2 * kLanes] = {0,      0x3b00, 0x3b80, 0x3bc0,
                                                                         0x3c00, 0x3c20, 0x3c40, 0x3c60};
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from + v));
        const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
        __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
        const __mmask32 subnormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
        value = _mm512_mask_permutexvar_epi16(value, subnormal, magnitude, _mm512_load_si512(kSubnormals));
        return _mm512_ternarylogic_epi32(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(int16_t(0x8000)), value, kAndOr);
    }
};

// The same as bfloat16, [pairs][64][2].
template <Codes KIND>
void widen_tile(const Planes& from, int64_t first, int pairs, Bf16* tile) {
    constexpr int kPairs = Packed<KIND>::kPairs;
    for (int p = 0; p < pairs; p += kPairs) {
        const Packed<KIND> packed(from, first + p);
        unrolled<kPairs>([&]<int I>() {
            for (int v = 0; v < kBlockVecs; v++, tile += 2 * kLanes) _mm512_storeu_si512(tile, packed.template widen<I>(v));
        });
    }
}
#endif

}  // namespace
