// From rows of codes, as files store them, to the blocks of weight.h. A model of 12 B is packed once per start: the disk
// shall be what it waits for.

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

#include "weight.h"

namespace {

constexpr int64_t kTilePairs = 32;  // a tile of 64 outputs is written while it lies in the first-level cache

// Two neighbouring inputs of each output stay together. rows [count][inputs] -> to [pairs][64]
template <typename Code, typename Pair>
void pack_pairs(const Code* rows, int64_t count, int64_t inputs, Code flip, Pair* to) {
    static_assert(sizeof(Pair) == 2 * sizeof(Code));
    constexpr int kBits = 8 * sizeof(Code);
    const int64_t whole = inputs / 2;
    for (int64_t start = 0; start < whole; start += kTilePairs)
        for (int64_t o = 0; o < count; o++)
            for (int64_t pair = start; pair < std::min(whole, start + kTilePairs); pair++) {
                const Code* from = rows + o * inputs + 2 * pair;
                to[pair * kBlock + o] = Pair(Code(from[0] ^ flip)) | Pair(Code(from[1] ^ flip)) << kBits;
            }
    if (inputs % 2)
        for (int64_t o = 0; o < count; o++) to[whole * kBlock + o] = Pair(Code(rows[(o + 1) * inputs - 1] ^ flip));
}

// COUNT bits of each code from bit FIRST on; those of the first pair lowest. rows [count][inputs] -> to [n][64][2]
template <int FIRST, int COUNT>
void pack_bits(const uint8_t* rows, int64_t count, int64_t inputs, uint16_t* to) {
    constexpr int kInputs = 2 * 16 / COUNT;  // that fill the two numbers of a lane
    constexpr int64_t kTile = 16;
    for (int64_t start = 0; start < inputs / kInputs; start += kTile)
        for (int64_t o = 0; o < count; o++)
            for (int64_t n = start; n < std::min(inputs / kInputs, start + kTile); n++) {
                const uint8_t* from = rows + o * inputs + n * kInputs;
                uint16_t even = 0, odd = 0;
                for (int i = 0; i < kInputs / 2; i++) {
                    even |= uint16_t((from[2 * i] >> FIRST & ((1 << COUNT) - 1)) << (i * COUNT));
                    odd |= uint16_t((from[2 * i + 1] >> FIRST & ((1 << COUNT) - 1)) << (i * COUNT));
                }
                to[(n * kBlock + o) * 2] = even;
                to[(n * kBlock + o) * 2 + 1] = odd;
            }
}

}  // namespace

extern "C" {

// Puts rows [count][inputs] into the blocks from output `first` on, which is a multiple of 64. Rows are bfloat16, or bytes:
// codes of 4 to 8 bits, unsigned, or e4m3. Only rows and inputs that are there are written.
void nemo_pack(const Weight* w, const void* rows, int64_t first, int64_t count, int64_t inputs, int threads) {
    parallel_for((count + kBlock - 1) / kBlock, kBlock * inputs, threads, [&](int64_t block) {
        const int64_t row = block * kBlock, n = std::min<int64_t>(kBlock, count - row);
        const int64_t at = (first + row) * w->width;  // weights before this block
        const uint8_t* from = (const uint8_t*)rows + row * inputs * (w->kind == kBF16 ? 2 : 1);
        uint8_t *codes = (uint8_t*)w->codes, *high = (uint8_t*)w->high;
        switch (w->kind) {
            case kBF16: return pack_pairs((const uint16_t*)from, n, inputs, uint16_t(0), (uint32_t*)(codes + at * 2));
            case kI8: return pack_pairs(from, n, inputs, uint8_t(0x80), (uint16_t*)(codes + at));  // code - 128
            case kE4M3: return pack_pairs(from, n, inputs, uint8_t(0), (uint16_t*)(codes + at));
            case kU5: pack_bits<4, 1>(from, n, inputs, (uint16_t*)(high + at / 8)); break;
            case kU6: pack_bits<4, 2>(from, n, inputs, (uint16_t*)(high + at / 4)); break;
        }
        pack_bits<0, 4>(from, n, inputs, (uint16_t*)(codes + at / 2));
    });
}

// Asks for huge pages, in which reading in order meets a page table 512 times less often: up to a quarter of the time of
// one row. Memory that was not written yet gets them as it is; else its pages, and what else lies in the same 2 MiB, are
// moved together now. Where the system has none to give, nothing happens.
void nemo_use_huge_pages(void* from, int64_t bytes, int written) {
#ifdef __linux__
    constexpr uintptr_t kHuge = 1 << 21;
    const uintptr_t first = (uintptr_t)from / kHuge * kHuge, end = ((uintptr_t)from + bytes + kHuge - 1) / kHuge * kHuge;
    madvise((void*)first, end - first, written ? MADV_COLLAPSE : MADV_HUGEPAGE);
#endif
}
}
