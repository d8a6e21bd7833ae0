// y = x Wᵀ + b for the weight formats of engine/quant: bfloat16, and codes of 4 to 8 bits with scales.
//
// Their layout is described in weight.h.
//
// Decoding tokens is mostly the reading of weights: a block is read from memory once and serves all rows. Tiles of it are
// widened to bfloat16 (or float) in the first-level cache without their scales, where every code is exact, and the sum of
// each group is scaled in float. So no weight is ever rounded, and a row's result does not depend on its neighbours.

#include "weight.h"

namespace {

constexpr int kTileInputs = 128;  // 16 KiB of bfloat16: half of the smallest first-level cache
constexpr int kTileRows = 32;     // rows per widening of a tile, which costs about as much as one of them
constexpr int kMostSegments = kTileInputs / 16;
constexpr float kOffset = 128.0f;  // of 4- to 6-bit codes as bfloat16, see widen_code

inline float half_to_float(uint16_t h) {  // IEEE 754 binary16, subnormals included
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    const float magnitude = __builtin_bit_cast(float, rest) * __builtin_bit_cast(float, uint32_t(0x77800000));  // 2^112
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | sign);
}

// The planes of one block of 64 outputs.
struct Planes {
    const void *codes, *high;
};

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

// The inputs start .. start + n of a block, [k][64].
template <Codes KIND>
const float* widen_tile(const Planes& from, int64_t start, int n, float* tile) {
    for (int k = 0; k < n; k++)
        for (int o = 0; o < kBlock; o++)
            tile[k * kBlock + o] = code_at<KIND>(from, (start + k) / 2, 2 * o + (k & 1));
    return tile;
}

// sums[r][64] = x[r][0..n) · tile
template <int ROWS>
inline void sum_products(const float* x, int64_t stride, const float* tile, int n, Vec (*sums)[kBlockVecs]) {
    Vec sum[ROWS][kBlockVecs] = {};
    for (int k = 0; k < n; k++, tile += kBlock)
        for (int v = 0; v < kBlockVecs; v++) {
            const Vec weight = *(const Vec*)(tile + v * kLanes);
            for (int r = 0; r < ROWS; r++) sum[r][v] += x[r * stride + k] * weight;
        }
    std::memcpy(sums, sum, sizeof sum);
}

#ifdef __AVX512BF16__
inline __m512bh pair_of(const Bf16* x) {  // the same two numbers in every lane
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

constexpr int kAndOr = 0xea;  // ternary logic: (a & b) | c

// A 4- to 6-bit code c becomes 128 + c in bfloat16 by an OR: 0x4300 is 128, and the last bit of its mantissa is 1.
template <int STEP, int I>
inline __m512i widen_code(__m512i four, __m512i high) {
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_srli_epi16(four, 4 * I), _mm512_set1_epi16(15),
                                                  _mm512_set1_epi16(0x4300), kAndOr);
    if (STEP == 0) return low;
    constexpr int kShift = 4 - STEP * I;  // from where the bits are to bit 4
    const __m512i moved = kShift >= 0 ? _mm512_slli_epi16(high, kShift >= 0 ? kShift : 0)
                                      : _mm512_srli_epi16(high, kShift >= 0 ? 0 : -kShift);
    return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(STEP == 1 ? 0x10 : 0x30), low, kAndOr);
}

// Eight inputs (4 pairs) of 64 outputs.
template <Codes KIND>
inline void widen_octet(const Planes& from, int64_t pair, Bf16* tile) {
    constexpr int kStep = KIND == kU5 ? 1 : KIND == kU6 ? 2 : 0;
    for (int v = 0; v < kBlockVecs; v++, tile += 2 * kLanes) {
        const int64_t lane = v * 2 * kLanes;
        const __m512i four = _mm512_loadu_si512((const uint16_t*)from.codes + pair / 4 * 2 * kBlock + lane);
        __m512i high = {};
        if (KIND == kU5) {
            high = _mm512_loadu_si512((const uint16_t*)from.high + pair / 16 * 2 * kBlock + lane);
            high = _mm512_srl_epi16(high, _mm_cvtsi32_si128(int(pair % 16)));
        }
        if (KIND == kU6) {
            high = _mm512_loadu_si512((const uint16_t*)from.high + pair / 8 * 2 * kBlock + lane);
            high = _mm512_srl_epi16(high, _mm_cvtsi32_si128(int(pair % 8 * 2)));
        }
        _mm512_storeu_si512(tile + 0 * 2 * kBlock, widen_code<kStep, 0>(four, high));
        _mm512_storeu_si512(tile + 1 * 2 * kBlock, widen_code<kStep, 1>(four, high));
        _mm512_storeu_si512(tile + 2 * 2 * kBlock, widen_code<kStep, 2>(four, high));
        _mm512_storeu_si512(tile + 3 * 2 * kBlock, widen_code<kStep, 3>(four, high));
    }
}

inline __m512i widen_int8(const int8_t* from) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    const __m512 top = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(top, low);
}

// Exponent and fraction move to their places and the bias is added; the eight subnormals come from a table.
inline __m512i widen_e4m3(const uint8_t* from) {
    alignas(64) static constexpr uint16_t kSubnormals[2 * kLanes] = {0,      0x3b00, 0x3b80, 0x3bc0,
                                                                     0x3c00, 0x3c20, 0x3c40, 0x3c60};
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 subnormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
    value = _mm512_mask_permutexvar_epi16(value, subnormal, magnitude, _mm512_load_si512(kSubnormals));
    return _mm512_ternarylogic_epi32(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(int16_t(0x8000)), value, kAndOr);
}

// The inputs start .. start + n of a block, [k / 2][64][2].
template <Codes KIND>
const Bf16* widen_tile(const Planes& from, int64_t start, int n, Bf16* tile) {
    if (KIND == kBF16) return (const Bf16*)from.codes + start * kBlock;
    if (KIND == kI8 || KIND == kE4M3) {
        const uint8_t* bytes = (const uint8_t*)from.codes + start * kBlock;
        for (int i = 0; i < n * kBlock; i += 2 * kLanes)
            _mm512_storeu_si512(tile + i, KIND == kI8 ? widen_int8((const int8_t*)bytes + i) : widen_e4m3(bytes + i));
    } else {
        for (int k = 0; k < n; k += 8) widen_octet<KIND>(from, (start + k) / 2, tile + k * kBlock);
    }
    return tile;
}

template <int ROWS>
inline void sum_products(const Bf16* x, int64_t stride, const Bf16* tile, int n, Vec (*sums)[kBlockVecs]) {
    __m512 sum[ROWS][kBlockVecs] = {};
    for (int k = 0; k < n; k += 2, tile += 2 * kBlock)
        for (int r = 0; r < ROWS; r++) {
            const __m512bh pair = pair_of(x + r * stride + k);
            for (int v = 0; v < kBlockVecs; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, (__m512bh)_mm512_loadu_si512(tile + v * 2 * kLanes));
        }
    std::memcpy(sums, sum, sizeof sum);
}
#endif

// What turns the sums of codes of one block into outputs: tile by tile.
struct Scaling {
    float scale[kMostSegments][kBlock], min[kMostSegments][kBlock];
};

inline Vec load_scale(const void* from, bool half, int64_t at) {
    if (!half) return *(const Vec*)((const float*)from + at);
#ifdef __AVX512F__
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)from + at)));
#else
    Vec scale;
    for (int i = 0; i < kLanes; i++) scale[i] = half_to_float(((const uint16_t*)from)[at + i]);
    return scale;
#endif
}

void read_scales(const Weight& w, int64_t block, int64_t start, int segments, float offset, Scaling& to) {
    const int64_t groups = (w.width + w.group - 1) / w.group;
    for (int s = 0; s < segments; s++)
        for (int o = 0; o < kBlock; o += kLanes) {
            const int64_t at = (block * groups + start / w.group + s) * kBlock + o;
            const Vec scale = load_scale(w.scales, w.half_scales, at);
            const Vec min = w.mins == nullptr ? w.zero * scale : load_scale(w.mins, w.half_scales, at);
            *(Vec*)(to.scale[s] + o) = scale;
            *(Vec*)(to.min[s] + o) = min + offset * scale;
        }
}

// totals[r][64] += the tile's part of ROWS rows.
template <int ROWS, bool SCALED, typename X>
inline void add_tile(const X* x, int64_t stride, const X* tile, int n, int segment, const Scaling& by, bool has_mins,
                     const float* group_sums, int64_t groups, float* totals) {
    for (int k = 0, s = 0; k < n; k += segment, s++) {
        Vec sums[ROWS][kBlockVecs];
        sum_products<ROWS>(x + k, stride, tile + k * kBlock, std::min(segment, n - k), sums);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < kBlockVecs; v++) {
                Vec& total = *(Vec*)(totals + r * kBlock + v * kLanes);
                if (!SCALED) {
                    total += sums[r][v];
                    continue;
                }
                total = multiply_add(sums[r][v], *(const Vec*)(by.scale[s] + v * kLanes), total);
                if (has_mins) {
                    const Vec sum = Vec{} - group_sums[r * groups + s];
                    total = multiply_add(sum, *(const Vec*)(by.min[s] + v * kLanes), total);
                }
            }
    }
}

template <Codes KIND, typename X, typename Out>
void linear(const Weight& w, const X* x, const float* row_scales, Out* out, int64_t rows, int threads) {
    constexpr bool kShifted = sizeof(X) == 2 && KIND <= kU6, kScaled = KIND != kBF16;
    const float offset = kShifted ? kOffset : 0.0f;
    const bool has_mins = kScaled && (w.mins != nullptr || w.zero != 0.0f || kShifted);
    const int segment = int(std::min<int64_t>(w.group, kTileInputs));
    const int64_t groups = (w.width + segment - 1) / segment, blocks = (w.outputs + kBlock - 1) / kBlock;
    std::vector<float> sums(has_mins ? rows * groups : 0);  // of x over each group
    if (has_mins)
        parallel_for(rows, w.width, threads, [&](int64_t r) {
            for (int64_t g = 0; g < groups; g++) {
                float sum = 0.0f;
                for (int64_t k = g * segment; k < std::min(w.width, (g + 1) * segment); k++)
                    sum += load(x[r * w.width + k]);
                sums[r * groups + g] = sum;
            }
        });
    // Bytes of a block's codes and high bits per input.
    constexpr int64_t kBytes = KIND <= kU6 ? kBlock / 2 : KIND == kBF16 ? 2 * kBlock : kBlock;
    constexpr int64_t kHighBytes = KIND == kU5 ? kBlock / 8 : KIND == kU6 ? kBlock / 4 : 0;
    parallel_for(blocks, kBlock / 8 * w.width * rows, threads, [&](int64_t block) {
        alignas(64) X buffer[kTileInputs * kBlock];
        alignas(64) float totals[kTileRows * kBlock];
        Scaling scaling;
        const Planes planes = {(const char*)w.codes + block * w.width * kBytes,
                               (const char*)w.high + block * w.width * kHighBytes};
        const int64_t first = block * kBlock, valid = std::min<int64_t>(kBlock, w.outputs - first);
        for (int64_t row = 0; row < rows; row += kTileRows) {
            const int count = int(std::min<int64_t>(kTileRows, rows - row));
            std::fill_n(totals, count * kBlock, 0.0f);
            for (int64_t start = 0; start < w.width; start += kTileInputs) {
                const int n = int(std::min<int64_t>(kTileInputs, w.width - start));
                const X* tile = widen_tile<KIND>(planes, start, n, buffer);
                if (kScaled) read_scales(w, block, start, (n + segment - 1) / segment, offset, scaling);
                int r = 0;
                const auto add = [&]<int ROWS>() {
                    const int64_t at = row + r;
                    add_tile<ROWS, kScaled>(x + at * w.width + start, w.width, tile, n, segment, scaling, has_mins,
                                   sums.data() + at * groups + start / segment, groups, totals + r * kBlock);
                    r += ROWS;
                };
                while (r + 4 <= count) add.template operator()<4>();
                while (r < count) add.template operator()<1>();
            }
            for (int r = 0; r < count; r++)
                for (int64_t o = 0; o < valid; o++) {
                    float y = totals[r * kBlock + o];
                    if (row_scales != nullptr) y *= row_scales[row + r];
                    if (w.bias != nullptr) y += w.bias[first + o];
                    store(out[(row + r) * w.outputs + first + o], y);
                }
        }
    });
}

template <typename X, typename Out>
void linear(const Weight& w, const X* x, const float* row_scales, Out* out, int64_t rows, int threads) {
    switch (w.kind) {
        case kU4: return linear<kU4>(w, x, row_scales, out, rows, threads);
        case kU5: return linear<kU5>(w, x, row_scales, out, rows, threads);
        case kU6: return linear<kU6>(w, x, row_scales, out, rows, threads);
        case kI8: return linear<kI8>(w, x, row_scales, out, rows, threads);
        case kE4M3: return linear<kE4M3>(w, x, row_scales, out, rows, threads);
        case kBF16: return linear<kBF16>(w, x, row_scales, out, rows, threads);
    }
}

// Where bfloat16 has no dot product of its own, x is widened and the float path serves.
template <typename Out>
void linear_bf16(const Weight& w, const Bf16* x, const float* row_scales, Out* out, int64_t rows,
                       int threads) {
#ifdef __AVX512BF16__
    linear(w, x, row_scales, out, rows, threads);
#else
    std::vector<float> wide(rows * w.width);
    widen(x, wide.data(), rows * w.width);
    linear(w, wide.data(), row_scales, out, rows, threads);
#endif
}

// ---- activations of W8A8 ----------------------------------------------------------------------------------------

// codes = x / scale rounded to e4m3, as numbers of x's type; the scale is given, or brings the row's largest to 448.
template <typename T>
void quantise_rows(const T* x, T* codes, float* scales, int64_t rows, int64_t width, float given, int threads) {
    parallel_for(rows, 4 * width, threads, [&](int64_t row) {
        const T* from = x + row * width;
        float most = 0.0f;
        for (int64_t i = 0; i < width; i++) most = std::max(most, std::fabs(load(from[i])));
        const float scale = given > 0.0f ? given : std::max(most / 448.0f, 0x1p-126f), inverse = 1.0f / scale;
        for (int64_t i = 0; i < width; i++) store(codes[row * width + i], round_to_e4m3(load(from[i]) * inverse));
        scales[row] = scale;
    });
}

}  // namespace

extern "C" {

// 1 where bfloat16 has a dot product of its own.
int nemo_multiplies_bfloat16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// x [rows, w.width] and out [rows, w.outputs] are of dtype; out is float where wide is not 0. row_scales multiply a row's
// results, or are null.
void nemo_linear(int dtype, int wide, const Weight* w, const void* x, const float* row_scales, void* out,
                       int64_t rows, int threads) {
    if (dtype == 0)
        linear(*w, (const float*)x, row_scales, (float*)out, rows, threads);
    else if (wide)
        linear_bf16(*w, (const Bf16*)x, row_scales, (float*)out, rows, threads);
    else
        linear_bf16(*w, (const Bf16*)x, row_scales, (Bf16*)out, rows, threads);
}

// scale 0: one per row. codes are of x's dtype.
void nemo_quantise_rows(int dtype, const void* x, void* codes, float* scales, int64_t rows, int64_t width, float scale,
                        int threads) {
    if (dtype == 0)
        quantise_rows((const float*)x, (float*)codes, scales, rows, width, scale, threads);
    else
        quantise_rows((const Bf16*)x, (Bf16*)codes, scales, rows, width, scale, threads);
}
}
