// What one core can do at best, for bench/kernels.py: multiply-adds in registers, and reading.

#include <cstdint>
#include <ctime>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

double now() {  // seconds of this thread on a core
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

typedef int64_t Longs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

constexpr int kSums = 16;  // independent ones, more than latency times issue width of any core so far

#ifdef __AVX512BF16__
constexpr double kFlops = 64;  // of one instruction: 16 lanes of two products and two sums
Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#else
constexpr double kFlops = 32;
Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

}  // namespace

extern "C" {

// Floating-point operations per second of the widest multiply-add that the kernels use, from registers to registers.
double peak_flops() {
    constexpr int64_t kTimes = 1'000'000;
    Floats sums[kSums] = {}, a = {}, b = {};
    asm volatile("" : "+v"(a), "+v"(b));
    const double began = now();
    for (int64_t i = 0; i < kTimes; i++)
#pragma GCC unroll 16
        for (int s = 0; s < kSums; s++) {
            sums[s] = multiply_add(a, b, sums[s]);
            asm volatile("" : "+v"(sums[s]));
        }
    return kFlops * kSums * kTimes / (now() - began);
}

// Bytes per second of reading `bytes` once, in order; a multiple of 256.
double read_bandwidth(const void* from, int64_t bytes) {
    const Longs* at = (const Longs*)from;
    Longs sums[4] = {};
    const double began = now();
    for (const Longs* end = at + bytes / 64; at < end; at += 4)
        for (int s = 0; s < 4; s++) sums[s] ^= at[s];
    Longs all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    asm volatile("" : "+v"(all));
    return bytes / (now() - began);
}
}
