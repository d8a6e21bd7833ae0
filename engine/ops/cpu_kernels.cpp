// CPU kernels of engine/ops: what lies between the matrix products of a decoder, one call each.
//
// A step of a 30-layer model costs some 360 small torch operators; their dispatch, not their arithmetic, is what a
// CPU step waits for. Each function here replaces several of them. Storage is float or bfloat16 (dtype 0 or 1), of keys
// and values also e4m3 with scales; arithmetic is float. The meaning of every function is engine/ops/interface.py; the
// specification is reference.py.

#include "kernels.h"
#include "pages.h"

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
            const Vec g = read_vec(gate + i, n), u = read_vec(up + i, n);
            write_vec(g / (1.0f + exp_vec(-g)) * u, to + i, n);
        }
    });
}

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
}
