// The layout of the weight formats of engine/quant: bfloat16, and codes of 4 to 8 bits with scales.
//
// weight[o, k] = scale[o, k / group] * code[o, k] - min[o, k / group]. A block of 64 outputs lies together, and in it the
// same two inputs of 16 outputs fill one vector: what the dot-product instruction wants, and no sum crosses lanes.
//
//   4 bits    uint16 [width / 8, 64, 2]: the nibble i of a lane is input 8n + 2i + parity
//   5, 6      the same for the low nibbles, and a plane of high bits: uint16 [width / 32, 64, 2], bit i for the pair i of
//             32 inputs; or [width / 16, 64, 2], two bits each
//   int8, e4m3    one byte per weight [width / 2, 64, 2]
//   bfloat16      [width / 2, 64, 2], no scales
//   scales, mins  [groups, 64], half or float

#pragma once

#include "vec.h"

namespace {

constexpr int kBlockVecs = 4, kBlock = kBlockVecs * kLanes;

enum Codes : int32_t { kU4 = 0, kU5 = 1, kU6 = 2, kI8 = 3, kE4M3 = 4, kBF16 = 5 };

}  // namespace

struct Weight {
    const void *codes, *high, *scales, *mins;  // mins may be null: then they are zero * scale
    const float* bias;
    int64_t width, outputs, group;  // inputs per scale, a multiple of 16, of 128 above it; or the padded width
    int32_t kind, half_scales;
    float zero;
};
