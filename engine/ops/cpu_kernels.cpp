// CPU kernels of engine/ops: what lies between the matrix products of a decoder, one call each.
//
// A step of a 30-layer model costs some 360 small torch operators; their dispatch, not their arithmetic, is what a
// CPU step waits for. Each function here replaces several of them. Storage is float or bfloat16 (dtype 0 or 1), of keys
// and values also e4m3 with scales; arithmetic is float. The meaning of every function is engine/ops/interface.py; the
// specification is reference.py.

#include "vec.h"

namespace {

// residual += x; out = residual / rms(residual) * weight.
template <typename T>
void add_rms_norm(const T* x, float* residual, const T* weight, T* out, int64_t rows, int64_t width, float eps,
                  int threads) {
    parallel_for(rows, width, threads, [&](int64_t row) {
        const T* from = x + row * width;
        float* sum = residual + row * width;
        T* to = out + row * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) {
            sum[i] += load(from[i]);
            squares += sum[i] * sum[i];
        }
        const float inverse = 1.0f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) store(to[i], sum[i] * inverse * load(weight[i]));
    });
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
    parallel_for(rows, 8 * width, threads, [&](int64_t row) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        T* to = out + row * width;
        for (int64_t i = 0; i < width; i += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, width - i));
            Vec g = {}, u = {};
            widen(gate + i, (float*)&g, n);
            widen(up + i, (float*)&u, n);
            const Vec y = g / (1.0f + exp_vec(-g)) * u;
            for (int j = 0; j < n; j++) store(to[i + j], y[j]);
        }
    });
}

// Keys and values of one layer. Codes are E4m3, a vector's numbers are its codes times its scale; floats have no scales.
template <typename C>
struct Pages {
    C *keys, *values;
    float *key_scales, *value_scales;
};
template <typename C>
constexpr bool kCoded = sizeof(C) == 1;

// Rotate (first, second) halves of a head by the angles in cos, sin.
template <typename T, typename To>
inline void rotate(const T* from, const float* cos, const float* sin, To* to, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = load(from[i]), b = load(from[i + half]);
        store(to[i], a * cos[i] - b * sin[i]);
        store(to[i + half], b * cos[i] + a * sin[i]);
    }
}

// Codes of x and the scale that brings its largest number to 448; NaN where x is not all finite.
inline void quantise(const float* x, E4m3* codes, float& scale, int64_t dim) {
    float most = 0.0f, zero = 0.0f;  // infinity and NaN times 0 are NaN
#pragma omp simd reduction(max : most) reduction(+ : zero)
    for (int64_t i = 0; i < dim; i++) {
        most = std::max(most, std::fabs(x[i]));
        zero += x[i] * 0.0f;
    }
    const float step = std::max(most / 448.0f, 0x1p-126f);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) store(codes[i], x[i] / step);
    scale = step + zero;
}

template <typename T, typename C>
void rope_and_write(T* qkv, const float* table, const Pages<C>& cache, const int64_t* positions, const int64_t* slots,
                    int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int threads) {
    const int64_t width = (heads + 2 * kv_heads) * dim;
    parallel_for(tokens, width, threads, [&](int64_t t) {
        const float* cos = table + positions[t] * dim;
        const float* sin = cos + dim / 2;
        T* query = qkv + t * width;
        const T* key = query + heads * dim;
        const T* value = key + kv_heads * dim;
        for (int64_t h = 0; h < heads; h++) rotate(query + h * dim, cos, sin, query + h * dim, dim / 2);
        std::vector<float> wide(kCoded<C> ? dim : 0);
        for (int64_t h = 0; h < kv_heads; h++, key += dim, value += dim) {
            const int64_t at = (slots[t] / page_size * kv_heads + h) * page_size + slots[t] % page_size;
            if constexpr (kCoded<C>) {
                rotate(key, cos, sin, wide.data(), dim / 2);
                quantise(wide.data(), cache.keys + at * dim, cache.key_scales[at], dim);
                widen(value, wide.data(), dim);
                quantise(wide.data(), cache.values + at * dim, cache.value_scales[at], dim);
            } else {
                rotate(key, cos, sin, cache.keys + at * dim, dim / 2);
                std::memcpy(cache.values + at * dim, value, dim * sizeof(T));
            }
        }
    });
}

// ---- attention ------------------------------------------------------------------------------------------------
// One task is up to kRows rows (consecutive queries of a sequence x the query heads that share a kv head) against
// all keys they may see, in tiles of kTile keys read from their pages, with the online softmax of arXiv 1805.02867.
//
// Every sum has one order, whatever the task: tiles begin at multiples of kTile, and what a row does not see adds exact
// zeros to it. So the bits of a token do not depend on its batch or chunk. FP8 needs that: where a rounded code falls on
// the other side, the last bit of a float becomes the fourth bit of a key.

constexpr int kTile = 64;  // keys at a time
constexpr int kRows = 64;  // query rows of a task

template <typename T, typename C>
struct Attention {
    const T* query;
    Pages<C> cache;
    T* out;
    const int32_t *query_starts, *context_lens, *tables;
    int64_t query_stride, table_stride, heads, kv_heads, dim, page_size, window;  // window 0: none
};
struct Task {
    int32_t sequence, first, count, kv_head;
};
struct Scratch {
    int64_t dim;  // padded to whole vectors
    std::vector<float> query, acc, tile, scores, peak, total;
    Scratch(int64_t padded, int64_t rows)
        : dim(padded), query(rows * dim), acc(rows * dim), tile(kTile * dim), scores(rows * kTile), peak(rows),
          total(rows) {}
};

// out[r][0..16*NV) += sum_k a[r][k] * b[k][0..16*NV) for ROWS rows, the sums held in registers. They start at zero: what
// 131,072 keys have summed up would swallow the last bits of each one, but not of a tile.
template <int ROWS, int NV>
inline void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int depth) {
    Vec sum[ROWS][NV] = {};
    for (int k = 0; k < depth; k++) {
        Vec row[NV];
        for (int v = 0; v < NV; v++) row[v] = *(const Vec*)(b + k * ldb + v * kLanes);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) sum[r][v] += a[r * lda + k] * row[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) *(Vec*)(out + r * ldo + v * kLanes) += sum[r][v];
}
template <int ROWS>
inline void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int depth,
                          int64_t columns) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes) multiply_block<ROWS, 4>(a, lda, b + c, ldb, out + c, ldo, depth);
    for (; c < columns; c += kLanes) multiply_block<ROWS, 1>(a, lda, b + c, ldb, out + c, ldo, depth);
}
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo, int rows, int depth,
              int64_t columns) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<4>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, depth, columns);
    if (rows - r == 3) multiply_rows<3>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, depth, columns);
    if (rows - r == 2) multiply_rows<2>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, depth, columns);
    if (rows - r == 1) multiply_rows<1>(a + r * lda, lda, b, ldb, out + r * ldo, ldo, depth, columns);
}

// Lane i of the result is the sum of all lanes of v[i], for i < 4.
inline Vec4 sum_four(const Vec* v) {
#define FOLD(a, b, ...) (__builtin_shufflevector(a, b, __VA_ARGS__))
    Vec pair[2];
    for (int i = 0; i < 2; i++)  // halves of 8 lanes: v[2i], v[2i + 1]
        pair[i] = FOLD(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  FOLD(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Vec four = FOLD(pair[0], pair[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               FOLD(pair[0], pair[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    four += FOLD(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    four += FOLD(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#undef FOLD
    return Vec4{four[0], four[4], four[8], four[12]};
}

// Ask for n elements that the next tile will need, so that memory works while this tile is computed.
template <typename T>
inline void fetch(const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(from + i);
}

// scores[r][0..4) = query[r] · keys[0..4) for ROWS rows: lane by lane, then over the lanes.
template <int ROWS>
inline void score_block(const float* query, const float* keys, int64_t dim, float* scores) {
    Vec sum[ROWS][4] = {};
    for (int64_t d = 0; d < dim; d += kLanes)
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 4; i++) sum[r][i] += *(const Vec*)(query + r * dim + d) * *(const Vec*)(keys + i * dim + d);
    for (int r = 0; r < ROWS; r++) *(Vec4*)(scores + r * kTile) = sum_four(sum[r]);
}

// The numbers of the vector at a place.
template <typename C>
inline void read(const C* from, const float* scales, int64_t place, float* to, int64_t dim) {
    widen(from + place * dim, to, dim, kCoded<C> ? scales[place] : 1.0f);
}

// scores[rows][n] = query · keys at the places at[0..n). Scores beyond n are undefined.
template <typename C>
void score_tile(const C* keys, const float* scales, const int64_t* at, const int64_t* next, int n, int rows, int64_t dim,
                Scratch& s) {
    for (int j = 0; j < n; j += 4) {
        for (int i = 0; i < 4; i++) {
            float* key = s.tile.data() + i * s.dim;
            fetch(keys + next[j + i] * dim, dim);
            read(keys, scales, at[std::min(j + i, n - 1)], key, dim);
            std::fill(key + dim, key + s.dim, 0.0f);  // not what another sequence left there
        }
        int r = 0;
        const auto score = [&]<int ROWS>() {
            score_block<ROWS>(s.query.data() + r * s.dim, s.tile.data(), s.dim, s.scores.data() + r * kTile + j);
            r += ROWS;
        };
        while (r + 4 <= rows) score.template operator()<4>();
        while (r < rows) score.template operator()<1>();
    }
}

// Scores of one row become weights; positions outside [low, high] weigh nothing. Rescales what the row has summed up.
void soften(Scratch& s, int row, int64_t low, int64_t high) {
    float* score = s.scores.data() + row * kTile;
    std::fill(score, score + std::clamp<int64_t>(low, 0, kTile), -INFINITY);
    std::fill(score + std::clamp<int64_t>(high + 1, 0, kTile), score + kTile, -INFINITY);
    Vec peaks = Vec{} + s.peak[row];
    for (int j = 0; j < kTile; j += kLanes) {
        const Vec x = *(Vec*)(score + j);
        peaks = x > peaks ? x : peaks;
    }
    float peak = peaks[0];
    for (int i = 1; i < kLanes; i++) peak = std::max(peak, peaks[i]);
    const float shift = peak == -INFINITY ? 0.0f : peak;  // all masked so far: exp(-inf - 0), not exp(-inf + inf)
    const float keep = s.peak[row] == -INFINITY ? 0.0f : std::exp(s.peak[row] - shift);
    Vec sums = {};
    for (int j = 0; j < kTile; j += kLanes) {
        const Vec x = *(Vec*)(score + j);
        const Vec y = x == -INFINITY ? Vec{} : exp_vec(x - shift);
        *(Vec*)(score + j) = y;
        sums += y;
    }
    float sum = 0.0f;
    for (int i = 0; i < kLanes; i++) sum += sums[i];
    s.total[row] = s.total[row] * keep + sum;
    s.peak[row] = peak;
    if (keep != 1.0f)
        for (int64_t d = 0; d < s.dim; d++) s.acc[row * s.dim + d] *= keep;
}

// Places in the cache, in vectors, of positions first .. min(first + kTile - 1, last); returns how many.
template <typename T, typename C>
int locate(const Attention<T, C>& a, const int32_t* table, int kv_head, int64_t first, int64_t last, int64_t* at) {
    const int n = int(std::clamp<int64_t>(last + 1 - first, 0, kTile));
    int64_t page = first / a.page_size, offset = first % a.page_size;
    for (int j = 0; j < n; j++) {
        at[j] = (table[page] * a.kv_heads + kv_head) * a.page_size + offset;
        if (++offset == a.page_size) offset = 0, page++;
    }
    std::fill(at + n, at + kTile, 0);
    return n;
}

template <typename T, typename C>
void attend(const Attention<T, C>& a, const Task& task, Scratch& s) {
    const int64_t group = a.heads / a.kv_heads, start = a.query_starts[task.sequence], dim = a.dim;
    const int64_t length = a.query_starts[task.sequence + 1] - start;
    const int64_t position = a.context_lens[task.sequence] - length + task.first;  // of the first query
    const int64_t last = position + task.count - 1;
    const int32_t* table = a.tables + task.sequence * a.table_stride;
    const int rows = int(task.count * group);
    const float scale = 1.0f / std::sqrt(float(dim));
    for (int r = 0; r < rows; r++) {
        const T* from = a.query + (start + task.first + r / group) * a.query_stride;
        widen(from + (task.kv_head * group + r % group) * dim, s.query.data() + r * s.dim, dim, scale);
    }
    std::fill_n(s.acc.begin(), rows * s.dim, 0.0f);
    std::fill_n(s.peak.begin(), rows, -INFINITY);
    std::fill_n(s.total.begin(), rows, 0.0f);

    int64_t tile = a.window ? std::max<int64_t>(0, position - a.window + 1) / kTile * kTile : 0, places[2][kTile];
    int n = locate(a, table, task.kv_head, tile, last, places[0]);
    for (int turn = 0; n > 0; turn ^= 1) {
        const int64_t* at = places[turn];
        const int next = locate(a, table, task.kv_head, tile + kTile, last, places[turn ^ 1]);
        score_tile(a.cache.keys, a.cache.key_scales, at, places[turn ^ 1], n, rows, dim, s);
        for (int r = 0; r < rows; r++) {
            const int64_t mine = position + r / group - tile;
            soften(s, r, a.window ? mine - a.window + 1 : 0, std::min<int64_t>(mine, n - 1));
        }
        for (int j = 0; j < n; j++) {
            fetch(a.cache.values + places[turn ^ 1][j] * dim, dim);
            read(a.cache.values, a.cache.value_scales, at[j], s.tile.data() + j * s.dim, dim);
        }
        multiply(s.scores.data(), kTile, s.tile.data(), s.dim, s.acc.data(), s.dim, rows, n, s.dim);
        tile += kTile;
        n = next;
    }
    for (int r = 0; r < rows; r++) {
        T* to = a.out + ((start + task.first + r / group) * a.heads + task.kv_head * group + r % group) * dim;
        const float inverse = 1.0f / s.total[r];
        const float* from = s.acc.data() + r * s.dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; d++) store(to[d], from[d] * inverse);
    }
}

template <typename T, typename C>
void attention(const Attention<T, C>& a, int64_t sequences, int threads) {
    const int32_t queries = int32_t(std::max<int64_t>(1, kRows / (a.heads / a.kv_heads)));
    std::vector<Task> tasks;
    for (int32_t s = 0; s < sequences; s++)
        for (int32_t length = a.query_starts[s + 1] - a.query_starts[s], first = 0; first < length; first += queries)
            for (int32_t h = 0; h < a.kv_heads; h++)
                tasks.push_back({s, first, std::min(queries, length - first), h});
    const int64_t padded = (a.dim + kLanes - 1) / kLanes * kLanes;
#pragma omp parallel num_threads(threads) if (threads > 1 && tasks.size() > 1)
    {
        Scratch scratch(padded, std::max<int64_t>(kRows, a.heads / a.kv_heads));
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) attend(a, tasks[i], scratch);
    }
}

// Run body for a compute dtype and what keys and values are stored as.
template <typename Body>
void with_types(int dtype, bool coded, const Body& body) {
    if (dtype == 0)
        coded ? body.template operator()<float, E4m3>() : body.template operator()<float, float>();
    else
        coded ? body.template operator()<Bf16, E4m3>() : body.template operator()<Bf16, Bf16>();
}

}  // namespace

extern "C" {

void nemo_add_rms_norm(int dtype, const void* x, float* residual, const void* weight, void* out, int64_t rows,
                       int64_t width, float eps, int threads) {
    if (dtype == 0)
        add_rms_norm((const float*)x, residual, (const float*)weight, (float*)out, rows, width, eps, threads);
    else
        add_rms_norm((const Bf16*)x, residual, (const Bf16*)weight, (Bf16*)out, rows, width, eps, threads);
}

void nemo_silu_mul(int dtype, const void* gate_up, void* out, int64_t rows, int64_t width, int threads) {
    if (dtype == 0)
        silu_mul((const float*)gate_up, (float*)out, rows, width, threads);
    else
        silu_mul((const Bf16*)gate_up, (Bf16*)out, rows, width, threads);
}

// Keys and values are of dtype and their scales null, or they are e4m3 codes.
void nemo_rope_and_write(int dtype, void* qkv, const float* table, void* keys, void* values, float* key_scales,
                         float* value_scales, const int64_t* positions, const int64_t* slots, int64_t tokens,
                         int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int threads) {
    with_types(dtype, key_scales != nullptr, [&]<typename T, typename C>() {
        rope_and_write((T*)qkv, table, Pages<C>{(C*)keys, (C*)values, key_scales, value_scales}, positions, slots,
                       tokens, heads, kv_heads, dim, page_size, threads);
    });
}

void nemo_attention(int dtype, const void* query, void* keys, void* values, float* key_scales, float* value_scales,
                    void* out, const int32_t* query_starts, const int32_t* context_lens, const int32_t* tables,
                    int64_t query_stride, int64_t table_stride, int64_t sequences, int64_t heads, int64_t kv_heads,
                    int64_t dim, int64_t page_size, int64_t window, int threads) {
    with_types(dtype, key_scales != nullptr, [&]<typename T, typename C>() {
        const Pages<C> cache = {(C*)keys, (C*)values, key_scales, value_scales};
        attention(Attention<T, C>{(const T*)query, cache, (T*)out, query_starts, context_lens, tables, query_stride,
                                  table_stride, heads, kv_heads, dim, page_size, window},
                  sequences, threads);
    });
}
}
