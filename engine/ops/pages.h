// Keys and values in pages, as engine/ops/interface.py draws them, for the kernels that write and read them.

#pragma once

#include "vec.h"

namespace {

// Keys and values of one layer. Codes are E4m3, a vector's numbers are its codes times its scale; floats have no scales.
template <typename C>
struct Pages {
    C *keys, *values;
    float *key_scales, *value_scales;
};
template <typename C>
constexpr bool kCoded = sizeof(C) == 1;

// Run body for a compute dtype and what keys and values are stored as.
template <typename Body>
void with_types(int dtype, bool coded, const Body& body) {
    if (dtype == 0)
        coded ? body.template operator()<float, E4m3>() : body.template operator()<float, float>();
    else
        coded ? body.template operator()<Bf16, E4m3>() : body.template operator()<Bf16, Bf16>();
}

}  // namespace
