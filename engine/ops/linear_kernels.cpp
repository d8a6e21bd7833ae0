// y = x Wᵀ + b for the weight formats of engine/quant: bfloat16, and codes of 4 to 8 bits with scales.
//
// Their layout is described in weight.h.
//
// Decoding tokens is mostly the reading of weights: a block of 64 outputs is read from memory once and serves all rows, in
// tiles of 128 inputs. For a few rows its codes become bfloat16 in registers, on their way to the multiplication; for more
// rows a tile is widened in the first-level cache, once. Either way codes are exact and the sum of each group of inputs is
// scaled in float, so no weight is ever rounded.
//
//     rows, up to 6 at a time ─┐
//     tile: 128 inputs × 64 ───┴─► sums of a group, in registers ──· scale − min──► totals [rows][64] ──► y
//
// A total adds up the same numbers in the same order however many rows there are: the bits of a row depend on it alone.

#include "kernels.h"
#include "widen.h"

namespace {

constexpr int kTileInputs = 128;  // 16 KiB of bfloat16: a third of a first-level cache
constexpr int kChunkRows = 128;   // that share the widening of a tile, their inputs in the second-level cache
constexpr int kMostSegments = kTileInputs / 16;
constexpr int64_t kAhead = 4096;   // bytes between what is read and what is asked for
constexpr float kOffset = 128.0f;  // of 4- to 6-bit codes as bfloat16, see Packed

// Rows whose sums fill the registers: 24 of 32 vectors; and fewer where the compiler may have only 16.
template <typename X>
constexpr int kMostRows = sizeof(X) == 2 ? 6 : 4;

// Up to this many rows codes are widened for each row block anew; at 4 to 6 bits the registers hold no more.
template <typename X>
constexpr int direct_rows(Codes kind) {
    return sizeof(X) == 4 ? 0 : kind == kBF16 ? kChunkRows : kind <= kU6 ? 4 : kMostRows<X>;
}

inline float half_to_float(uint16_t h) {  // IEEE 754 binary16, subnormals included
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    const float magnitude = __builtin_bit_cast(float, rest) * __builtin_bit_cast(float, uint32_t(0x77800000));  // 2^112
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | sign);
}

// What the memory shall bring meanwhile: `lines` cache lines for each pair of inputs that is multiplied.
struct Ahead {
    const char* at;
    int lines;
};
inline void fetch(const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// sum[r] += x[r][0 .. 2 pairs) · the pairs of a tile of floats from the pair `first` on
template <Codes, int ROWS>
inline void add_products(const float* x, int64_t stride, const Planes& tile, int64_t first, int pairs, Ahead&,
                         Vec (&sum)[ROWS][kBlockVecs]) {
    const float* weights = (const float*)tile.codes + first * 2 * kBlock;
    for (int k = 0; k < 2 * pairs; k++, weights += kBlock)
        for (int v = 0; v < kBlockVecs; v++) {
            const Vec weight = *(const Vec*)(weights + v * kLanes);
            for (int r = 0; r < ROWS; r++) sum[r][v] = multiply_add(splat(x[r * stride + k]), weight, sum[r][v]);
        }
}

#ifdef __AVX512BF16__
// The same with codes of any kind, widened on their way; kBF16 is also what a tile is widened to.
template <Codes KIND, int ROWS>
inline void add_products(const Bf16* x, int64_t stride, const Planes& from, int64_t first, int pairs, Ahead& ahead,
                         Vec (&sum)[ROWS][kBlockVecs]) {
    constexpr int kPairs = Packed<KIND>::kPairs;
    Ahead next = ahead;  // in registers
    for (int p = 0; p < pairs; p += kPairs) {
        const Packed<KIND> packed(from, first + p);
        unrolled<kPairs>([&]<int I>() {
            for (int i = 0; i < next.lines; i++, next.at += 64) __builtin_prefetch(next.at);
            __m512bh weights[kBlockVecs];
            for (int v = 0; v < kBlockVecs; v++) weights[v] = (__m512bh)packed.template widen<I>(v);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t two;  // the same two inputs for every output
                std::memcpy(&two, x + r * stride + 2 * (p + I), sizeof two);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int v = 0; v < kBlockVecs; v++)
                    sum[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sum[r][v], inputs, weights[v]);
            }
        });
    }
    ahead = next;
}
#endif

// What turns the sums of codes of one tile into outputs.
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

// Those of `segments` groups of a block; the same number of groups is asked for from memory for the next tile.
void read_scales(const Weight& w, int64_t block, int64_t start, int segments, Scaling& to) {
    const int64_t groups = (w.width + w.group - 1) / w.group, first = (block * groups + start / w.group) * kBlock;
    const int64_t n = segments * kBlock, bytes = w.half_scales ? 2 : 4;
    for (int64_t i = 0; i < n; i += kLanes) *(Vec*)(to.scale[0] + i) = load_scale(w.scales, w.half_scales, first + i);
    fetch((const char*)w.scales + (first + n) * bytes, n * bytes);
    if (w.mins == nullptr) return;
    for (int64_t i = 0; i < n; i += kLanes) *(Vec*)(to.min[0] + i) = load_scale(w.mins, w.half_scales, first + i);
    fetch((const char*)w.mins + (first + n) * bytes, n * bytes);
}

// One tile as some rows meet it.
template <typename X>
struct Step {
    const X* x;  // [rows][stride], from the tile's first input on
    int64_t stride;
    Planes from;
    int64_t pair;      // of `from`, with which the tile begins
    int n, segment;    // inputs, and how many of them share a scale
    const float* sums;  // minus those of x over each group, [rows][groups]
    int64_t groups;
    float zero;  // the code of weight 0
};

// totals[r][64] += the tile's part of ROWS rows. The sums of codes start where those of zeros would lead to 0.
template <Codes KIND, int ROWS, bool SCALED, bool MINS, typename X>
void add_tile(const Step<X>& step, const Scaling& by, Ahead& ahead, float* totals) {
    const X* x = step.x;
    const int64_t stride = step.stride, groups = step.groups;  // here, since totals might be anything to the compiler
    const int n = step.n, segment = step.segment;
    const float zero = step.zero;
    const float* sums = step.sums;
    const Planes from = step.from;
    for (int k = 0, s = 0; k < n; k += segment, s++, sums++) {
        Vec sum[ROWS][kBlockVecs];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Vec first = SCALED && zero != 0.0f ? splat(sums[r * groups] * zero) : Vec{};
#pragma GCC unroll 4
            for (int v = 0; v < kBlockVecs; v++) sum[r][v] = first;
        }
        add_products<KIND>(x + k, stride, from, step.pair + k / 2, std::min(segment, n - k) / 2, ahead, sum);
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVecs; v++) {
            const Vec scale = *(const Vec*)(by.scale[s] + v * kLanes), min = *(const Vec*)(by.min[s] + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                Vec& total = *(Vec*)(totals + r * kBlock + v * kLanes);
                Vec rest = total;
                if (MINS) rest = multiply_add(splat(sums[r * groups]), min, rest);
                total = SCALED ? multiply_add(sum[r][v], scale, rest) : sum[r][v] + rest;
            }
        }
    }
}

// Minus the sums of x over its groups.
template <typename X>
void sum_groups(const X* x, int64_t width, int64_t group, float* sums) {
    for (int64_t k = 0; k < width; k += group) {
        const int64_t n = std::min(group, width - k);
        Vec lanes = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) lanes += load_vec(x + k + i);
        if (i < n) {
            Vec rest = {};
            widen(x + k + i, (float*)&rest, n - i);
            lanes += rest;
        }
        *sums++ = -sum_lanes(lanes);
    }
}

template <typename Body>
inline void with_rows(int rows, const Body& body) {
    switch (rows) {
        case 1: return body.template operator()<1>();
        case 2: return body.template operator()<2>();
        case 3: return body.template operator()<3>();
        case 4: return body.template operator()<4>();
        case 5: return body.template operator()<5>();
        case 6: return body.template operator()<6>();
    }
}

// What one thread writes and reads again for a block: all of it stays in its first- and second-level caches.
template <typename X>
struct Scratch {
    alignas(64) X tile[kTileInputs * kBlock];
    float totals[kChunkRows][kBlock];
    Scaling scaling;
};

// totals[count][64] of one block. x and sums begin with the first of `count` rows.
template <Codes KIND, typename X>
void multiply_block(const Weight& w, int64_t block, const X* x, const float* sums, int count, Scratch<X>& scratch) {
    constexpr bool kScaled = KIND != kBF16, kMins = KIND == kU4 || KIND == kU5;
    const int segment = int(std::min<int64_t>(w.group, kTileInputs));
    const int64_t groups = (w.width + segment - 1) / segment;
    const float zero = w.zero + (sizeof(X) == 2 && KIND <= kU6 ? kOffset : 0.0f);
    const int passes = (count + kMostRows<X> - 1) / kMostRows<X>;
    const bool direct = count <= direct_rows<X>(KIND);
    const Planes planes = {(const char*)w.codes + block * w.width / 2 * code_bytes(KIND),
                           (const char*)w.high + block * w.width / 2 * high_bytes(KIND)};
    std::fill_n(scratch.totals[0], count * kBlock, 0.0f);
    for (int64_t start = 0; start < w.width; start += kTileInputs) {
        const int n = int(std::min<int64_t>(kTileInputs, w.width - start));
        if (kScaled) read_scales(w, block, start, (n + segment - 1) / segment, scratch.scaling);
        if (high_bytes(KIND)) fetch(planes.high + (start + n) / 2 * high_bytes(KIND), kTileInputs / 2 * high_bytes(KIND));
        if (!direct) widen_tile<KIND>(planes, start / 2, n / 2, scratch.tile);
        // A single pass that does no more than multiply is best left to what the CPU itself expects to be read.
        constexpr int kLines = int(code_bytes(KIND) / 64);
        const int64_t distance = passes == 1 ? kAhead : kTileInputs / 2 * code_bytes(KIND);
        Ahead ahead = {planes.codes + start / 2 * code_bytes(KIND) + distance,
                       KIND == kBF16 && passes == 1 ? 0 : (kLines + passes - 1) / passes};
        const char* end = ahead.at + n / 2 * code_bytes(KIND);
        for (int pass = 0, row = 0; pass < passes; pass++) {
            const int next = count * (pass + 1) / passes;
            if (ahead.at >= end) ahead.lines = 0;
            Step<X> step = {x + row * w.width + start, w.width, planes, start / 2, n, segment,
                            sums + row * groups + start / segment, groups, zero};
            float* totals = scratch.totals[row];
            with_rows(next - row, [&]<int ROWS>() {
                if constexpr (ROWS <= direct_rows<X>(KIND))
                    if (direct) return add_tile<KIND, ROWS, kScaled, kMins>(step, scratch.scaling, ahead, totals);
                if constexpr (ROWS <= kMostRows<X> && direct_rows<X>(KIND) < kChunkRows) {
                    step.from = {(const char*)scratch.tile, nullptr};
                    step.pair = 0;
                    add_tile<kBF16, ROWS, kScaled, kMins>(step, scratch.scaling, ahead, totals);
                }
            });
            row = next;
        }
    }
}

// Where the numbers of y go: float, or rounded to bfloat16.
struct Output {
    void* to;
    bool wide;
    const float* row_scales;  // or null
};

void write_block(const Weight& w, int64_t block, const Output& out, int64_t row, int count, float* totals) {
    const int64_t first = block * kBlock, valid = std::min<int64_t>(kBlock, w.outputs - first);
    for (int r = 0; r < count; r++, totals += kBlock) {
        const float scale = out.row_scales == nullptr ? 1.0f : out.row_scales[row + r];
        for (int o = 0; o < kBlock; o++) totals[o] *= scale;
        if (w.bias != nullptr)
            for (int64_t o = 0; o < valid; o++) totals[o] += w.bias[first + o];
        const int64_t at = (row + r) * w.outputs + first;
        if (out.wide)
            std::memcpy((float*)out.to + at, totals, valid * sizeof(float));
        else
            for (int64_t o = 0; o < valid; o++) store(((Bf16*)out.to)[at + o], totals[o]);
    }
}

template <Codes KIND, typename X>
void linear(const Weight& w, const X* x, const Output& out, int64_t all_rows, int threads) {
    const int64_t segment = std::min<int64_t>(w.group, kTileInputs), groups = (w.width + segment - 1) / segment;
    const bool has_sums = KIND <= kU6 || w.zero != 0.0f;
    std::vector<float> sums(has_sums ? all_rows * groups : 0);  // minus those of x over each group
    if (has_sums)
        parallel_for(all_rows, w.width / 4, threads, [&](int64_t r) {
            sum_groups(x + r * w.width, w.width, segment, sums.data() + r * groups);
        });
    const int64_t blocks = (w.outputs + kBlock - 1) / kBlock, chunks = (all_rows + kChunkRows - 1) / kChunkRows;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = all_rows * chunk / chunks, rows = all_rows * (chunk + 1) / chunks - first;
        // Blocks that do not go round are shared by rows, so that all threads end together.
        const int64_t shares = rows >= 4 * threads ? threads : 1, odd = shares > 1 ? blocks % threads : 0;
        const int64_t whole = blocks - odd;
        parallel_for(whole + odd * shares, kBlock / 8 * w.width * rows, threads, [&](int64_t item) {
            const int64_t part = item < whole ? 0 : (item - whole) % shares, parts = item < whole ? 1 : shares;
            const int64_t block = item < whole ? item : whole + (item - whole) / shares;
            const int64_t row = first + rows * part / parts;
            const int count = int(first + rows * (part + 1) / parts - row);
            Scratch<X> scratch;
            multiply_block<KIND>(w, block, x + row * w.width, sums.data() + (has_sums ? row * groups : 0), count, scratch);
            write_block(w, block, out, row, count, scratch.totals[0]);
        });
    }
}

template <typename X>
void linear(const Weight& w, const X* x, const Output& out, int64_t rows, int threads) {
    switch (w.kind) {
        case kU4: return linear<kU4>(w, x, out, rows, threads);
        case kU5: return linear<kU5>(w, x, out, rows, threads);
        case kU6: return linear<kU6>(w, x, out, rows, threads);
        case kI8: return linear<kI8>(w, x, out, rows, threads);
        case kE4M3: return linear<kE4M3>(w, x, out, rows, threads);
        case kBF16: return linear<kBF16>(w, x, out, rows, threads);
    }
}

// Where bfloat16 has no dot product of its own, x is widened and the float path serves.
void linear_bf16(const Weight& w, const Bf16* x, const Output& out, int64_t rows, int threads) {
#ifdef __AVX512BF16__
    linear(w, x, out, rows, threads);
#else
    std::vector<float> wide(rows * w.width);
    widen(x, wide.data(), rows * w.width);
    linear(w, wide.data(), out, rows, threads);
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
    const Output y = {out, dtype == 0 || wide, row_scales};
    if (dtype == 0)
        linear(*w, (const float*)x, y, rows, threads);
    else
        linear_bf16(*w, (const Bf16*)x, y, rows, threads);
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
