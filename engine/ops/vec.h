// What every CPU kernel is made of: vectors of 16 floats, storage in bfloat16 and e4m3, and exp.
//
// Vectors are GCC vector extensions of 16 floats, which the compiler lowers to AVX-512, AVX2, NEON or scalars.
// No -ffast-math: NaN must stay NaN, so that a broken sequence is found where it is sampled.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "team.h"

namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct Bf16 {
    uint16_t bits;
};
inline float load(float x) { return x; }
inline float load(Bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline void store(float& to, float x) { to = x; }
inline void store(Bf16& to, float x) {  // round to nearest even; NaN would round up into infinity or zero
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// FP8 with 4 bits of exponent and 3 of fraction, no infinity. The codes of NaN are read as 480: where they may be stored,
// a scale is NaN instead.
struct E4m3 {
    uint8_t bits;
};
inline float load(E4m3 x) {  // sign, exponent and fraction in their places mean 2^-120 of it, subnormals included
    const uint32_t bits = uint32_t(int32_t(int8_t(x.bits))) << 20 & 0x87f00000;
    return __builtin_bit_cast(float, bits) * 0x1p120f;
}
// The nearest number that e4m3 has (ties to even, beyond 448: 448); NaN stays NaN.
inline float round_to_e4m3(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const float normal = __builtin_bit_cast(float, (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
    const float subnormal = (x + 24576.0f) - 24576.0f;  // 1.5 * 2^23 * 2^-9: what is left is a multiple of 2^-9
    const float y = std::fabs(x) < 0.015625f ? subnormal : normal;
    return x != x ? x : std::min(448.0f, std::max(-448.0f, y));
}
inline void store(E4m3& to, float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, round_to_e4m3(x) * 0x1p-120f);
    to.bits = uint8_t((bits >> 24 & 0x80) | (bits >> 20 & 0x7f));
}

template <typename T>
inline void widen(const T* from, float* to, int64_t n, float scale = 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = load(from[i]) * scale;
}
template <typename T>
inline void narrow(const float* from, T* to, int64_t n, float scale = 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(to[i], from[i] * scale);
}

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: it makes 0 of -0
inline float sum_lanes(Vec lanes) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    float sum = 0.0f;
    for (int i = 0; i < kLanes; i++) sum += lanes[i];
    return sum;
#endif
}
inline float largest_lane(Vec lanes) {  // none is NaN
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)lanes);
#else
    float most = lanes[0];
    for (int i = 1; i < kLanes; i++) most = std::max(most, lanes[i]);
    return most;
#endif
}

inline Vec load_vec(const float* from) { return *(const Vec*)from; }
inline Vec load_vec(const Bf16* from) {
#ifdef __AVX512F__
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
    return (Vec)(__builtin_convertvector(*(const HalfVec*)from, IntVec) << 16);
#endif
}

inline Vec load_vec(const E4m3* from) {
#ifdef __AVX512F__  // as halfs, in whose places a code means 2^-8 of it
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff)));
    return (Vec)_mm512_cvtph_ps(half) * 256.0f;
#else
    Vec x;
    for (int i = 0; i < kLanes; i++) x[i] = load(from[i]);
    return x;
#endif
}

// The first n of 16 numbers; the others are 0, or are left alone.
template <typename T>
inline Vec read_vec(const T* from, int n) {
    if (n == kLanes) return load_vec(from);
    Vec x = {};
    widen(from, (float*)&x, n);
    return x;
}
template <typename T>
inline void write_vec(Vec x, T* to, int n) {
    n == kLanes ? narrow((const float*)&x, to, kLanes) : narrow((const float*)&x, to, n);
}

#ifdef __AVX512BW__
// 32 codes as halfs.
inline __m512i halfs_of(const E4m3* from) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(int16_t(0xbfff)));
}
inline void widen(const E4m3* from, float* to, int64_t n, float scale = 1.0f) {
    const float by = scale * 256.0f;
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const __m512i half = halfs_of(from + i);
        *(Vec*)(to + i) = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(half)) * by;
        *(Vec*)(to + i + kLanes) = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * by;
    }
    for (; i < n; i++) to[i] = load(from[i]) * scale;
}
#endif

// Codes as bfloat16, which has all of their numbers.
inline void widen(const E4m3* from, Bf16* to, int64_t n) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const __m512i half = halfs_of(from + i);
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half)), by = _mm512_set1_ps(256.0f);
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, by), _mm512_mul_ps(low, by)));
    }
#endif
    for (; i < n; i++) store(to[i], load(from[i]));
}

// a * b + c, rounded once if the CPU can, where the compiler must not choose: a row's bits would depend on its loop.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#ifdef __AVX512F__
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; i++) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// exp(x) to 2 ulp by 2^n * e^r, |r| <= ln2/2 (Cephes expf). Clamped to the normal range; NaN in, NaN out.
inline Vec exp_vec(Vec x) {
    const Vec zero = {};
    x = x < -87.0f ? zero - 87.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    const Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (Vec)((IntVec)p + (__builtin_convertvector(n, IntVec) << 23));
}

}  // namespace
