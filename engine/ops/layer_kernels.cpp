// All layers of a decoder in one call: the loop of engine/model/decoder.py, by the kernels that it calls itself.
//
// So its results are the same to the bit. What it saves is the way from Python to each kernel and back, eight times a
// layer, and that the threads part and meet for each of them: here they stay one team (team.h).

#include <memory>

#include "kernels.h"
#include "team.h"

namespace {

struct Layer {  // `_Layer` of engine/model/fused.py, field by field
    const void* attention_norm;
    const Weight *qkv, *attention_output;
    const void* mlp_norm;
    const Weight *gate_up, *down;
    void *keys, *values;
    float *key_scales, *value_scales;
};

struct Step {  // `_Step` of engine/model/fused.py
    const float* rope_table;
    const int64_t *positions, *slots;
    const int32_t *query_starts, *context_lens, *tables;
    int64_t table_stride, sequences, tokens, hidden, heads, kv_heads, dim, intermediate, page_size, window;
    float eps;
};

}  // namespace

extern "C" {

// x [tokens, hidden] of dtype goes through all layers in place; residual is float.
void nemo_layers(int dtype, const Layer* layers, int64_t count, const Step* step, void* x, float* residual, int threads) {
    const Step& s = *step;
    const int64_t size = dtype == 0 ? 4 : 2, inner = s.heads * s.dim, fused = inner + 2 * s.kv_heads * s.dim;
    const auto memory = [&](int64_t width) {
        return std::make_unique_for_overwrite<char[]>(s.tokens * width * size);
    };
    const auto normed = memory(s.hidden), qkv = memory(fused), mixed = memory(inner);
    const auto gate_up = memory(2 * s.intermediate), activated = memory(s.intermediate);
    with_team(threads, [&] {
        for (const Layer* layer = layers; layer < layers + count; layer++) {
            const Layer& l = *layer;
            nemo_add_rms_norm(dtype, x, residual, l.attention_norm, normed.get(), s.tokens, s.hidden, s.eps, threads);
            nemo_linear(dtype, 0, l.qkv, normed.get(), nullptr, qkv.get(), s.tokens, threads);
            nemo_rope_and_write(dtype, qkv.get(), s.rope_table, l.keys, l.values, l.key_scales, l.value_scales,
                                s.positions, s.slots, s.tokens, s.heads, s.kv_heads, s.dim, s.page_size, threads);
            nemo_attention(dtype, qkv.get(), l.keys, l.values, l.key_scales, l.value_scales, mixed.get(),
                           s.query_starts, s.context_lens, s.tables, fused, s.table_stride, s.sequences, s.heads,
                           s.kv_heads, s.dim, s.page_size, s.window, threads);
            nemo_linear(dtype, 0, l.attention_output, mixed.get(), nullptr, x, s.tokens, threads);

            nemo_add_rms_norm(dtype, x, residual, l.mlp_norm, normed.get(), s.tokens, s.hidden, s.eps, threads);
            nemo_linear(dtype, 0, l.gate_up, normed.get(), nullptr, gate_up.get(), s.tokens, threads);
            nemo_silu_mul(dtype, gate_up.get(), activated.get(), s.tokens, s.intermediate, threads);
            nemo_linear(dtype, 0, l.down, activated.get(), nullptr, x, s.tokens, threads);
        }
    });
}
}
