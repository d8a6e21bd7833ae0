// The kernels that engine/ops/native.py declares to Python, for those that call one another. Their meaning is
// engine/ops/interface.py and engine/quant/blocked.py; dtype is 0 for float, 1 for bfloat16.

#pragma once

#include <cstdint>

struct Weight;

extern "C" {
void nemo_linear(int dtype, int wide, const Weight* w, const void* x, const float* row_scales, void* out, int64_t rows,
                 int threads);
void nemo_add_rms_norm(int dtype, const void* x, float* residual, const void* weight, void* out, int64_t rows,
                       int64_t width, float eps, int threads);
void nemo_silu_mul(int dtype, const void* gate_up, void* out, int64_t rows, int64_t width, int threads);
void nemo_rope_and_write(int dtype, void* qkv, const float* table, void* keys, void* values, float* key_scales,
                         float* value_scales, const int64_t* positions, const int64_t* slots, int64_t tokens,
                         int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int threads);
void nemo_attention(int dtype, const void* query, void* keys, void* values, float* key_scales, float* value_scales,
                    void* out, const int32_t* query_starts, const int32_t* context_lens, const int32_t* tables,
                    int64_t query_stride, int64_t table_stride, int64_t sequences, int64_t heads, int64_t kv_heads,
                    int64_t dim, int64_t page_size, int64_t window, int threads);
}
