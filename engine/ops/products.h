// Small matrix products, as attention has them: few rows, and a right side that lies anywhere.

#pragma once

#include "vec.h"

namespace {

template <typename X>
constexpr int kPair = sizeof(X) == 2 ? 2 : 1;  // inputs that are multiplied together: what fills 32 bits

// out[r][0..16*NV) = sum_k a[r][k] * b(k)[0..16*NV) for ROWS rows, the sums held in registers: left to itself, GCC keeps
// them in memory, at four times the time. b(k) is where the row of every kPair-th k begins, so many inputs of each output;
// ask(k, column, columns) is called before it, for what memory can do in the meantime.

inline Vec multiply_pair(const float* a, Vec b, Vec sum) { return multiply_add(splat(*a), b, sum); }
#ifdef __AVX512BF16__
inline Vec multiply_pair(const Bf16* a, Vec b, Vec sum) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#endif

template <int ROWS, int NV, typename X, typename B, typename Ask>
__attribute__((noinline)) void multiply_block(const X* a, int64_t lda, const B& b, const Ask& ask, int64_t column,
                                              float* out, int64_t ldo, int depth) {
    Vec sum[ROWS][NV] = {};
    for (int k = 0; k < depth; k += kPair<X>) {
        ask(k, column, NV * kLanes);
        const auto* from = b(k) + column;
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            const Vec row = load_vec(from + v * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum[r][v] = multiply_pair(a + r * lda + k, row, sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) *(Vec*)(out + r * ldo + column + v * kLanes) = sum[r][v];
}
template <int ROWS, typename X, typename B, typename Ask>
inline void multiply_rows(const X* a, int64_t lda, const B& b, const Ask& ask, float* out, int64_t ldo, int depth,
                          int64_t columns) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes) multiply_block<ROWS, 4>(a, lda, b, ask, c, out, ldo, depth);
    for (; c < columns; c += kLanes) multiply_block<ROWS, 1>(a, lda, b, ask, c, out, ldo, depth);
}
template <typename X, typename B, typename Ask>
void multiply(const X* a, int64_t lda, const B& b, const Ask& ask, float* out, int64_t ldo, int rows, int depth,
              int64_t columns) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<4>(a + r * lda, lda, b, ask, out + r * ldo, ldo, depth, columns);
    if (rows - r == 3) multiply_rows<3>(a + r * lda, lda, b, ask, out + r * ldo, ldo, depth, columns);
    if (rows - r == 2) multiply_rows<2>(a + r * lda, lda, b, ask, out + r * ldo, ldo, depth, columns);
    if (rows - r == 1) multiply_rows<1>(a + r * lda, lda, b, ask, out + r * ldo, ldo, depth, columns);
}
constexpr auto kAskNothing = [](int, int64_t, int64_t) {};

}  // namespace
