// Attention over pages. The meaning is engine/ops/interface.py; the specification is reference.py.
//
// A task is up to kRows rows (consecutive queries of a sequence x the query heads that share a kv head) against the keys
// that they may see, in tiles of kTile keys read from their pages:
//
//   scores = q Kᵀ of a tile ── peak, exp ──► weights ── weights V ──► a part: peak, sum of weights, weighted sum of values
//   parts, from the first tile to the last ── fold (arXiv 1805.02867) ──► a row's result
//
// Every sum has one order, whatever the task: tiles begin at multiples of kTile, each makes a part of its own, and what a
// row does not see adds exact zeros to it. So the bits of a token do not depend on its batch or chunk, nor on whether the
// tiles of a long context were shared out to several threads. FP8 needs that: where a rounded code falls on the other
// side, the last bit of a float becomes the fourth bit of a key.

#include "kernels.h"
#include "pages.h"
#include "products.h"

namespace {

constexpr int kTile = 128;                    // keys of a part
constexpr int kKeys = 64;                     // of them transposed at a time: they stay in the first level of cache
constexpr int kRows = 64;                     // query rows of a task
constexpr int kFewRows = 4;                   // for so few, values are read where they lie and not widened first
constexpr int64_t kMostPartFloats = 1 << 23;  // 32 MiB: parts of tasks whose tiles are shared out

// What q Kᵀ is computed in: bfloat16 where it has a dot product, which is exact but for the order of its sum.
#ifdef __AVX512BF16__
template <typename T>
using Factor = T;
#else
template <typename T>
using Factor = float;
#endif

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

// Where the keys and values of one tile lie in the cache, in vectors; up to the next multiple of 16 the last again, and
// then somewhere in it.
struct Places {
    int64_t at[kTile] = {};
    int n = 0;
};

// What one tile, or all up to one, make of some rows.
struct Part {
    float *values, *peak, *total;  // [rows, padded dim], [rows], [rows]

    Part(float* memory, int64_t rows, int64_t dim)
        : values(memory), peak(memory + rows * dim), total(memory + rows * (dim + 1)) {}
    static int64_t floats(int64_t rows, int64_t dim) { return (rows * (dim + 2) + kLanes - 1) / kLanes * kLanes; }
};

// Numbers that begin with a cache line: a vector across two of them takes twice as long to read.
template <typename X>
class Memory {
  public:
    explicit Memory(int64_t n = 0) { at_least(n); }
    void at_least(int64_t n) {
        const size_t lines = (n * sizeof(X) + 63) / 64;
        if (lines_.size() < lines) lines_.resize(lines);
    }
    X* data() { return (X*)lines_.data(); }

  private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines_;
};

// Memory of one thread, kept from call to call.
template <typename X>
struct Scratch {
    int64_t dim = 0;  // padded to whole vectors
    Memory<X> query, keys, key;
    Memory<float> values, scores, part, folded;

    static Scratch& of(int64_t dim, int64_t rows) {
        thread_local Scratch scratch;
        scratch.resize((dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes), rows);
        return scratch;
    }
    void resize(int64_t padded, int64_t rows) {
        dim = padded;
        query.at_least(rows * dim), keys.at_least(kKeys * dim), key.at_least(kLanes * dim);
        values.at_least(kTile * dim), scores.at_least(rows * kTile);
        part.at_least(Part::floats(rows, dim)), folded.at_least(Part::floats(rows, dim));
    }
};

// ---- keys -------------------------------------------------------------------------------------------------------

// Ask for n elements that will be needed soon, so that memory works while something else is computed.
template <typename T>
inline void fetch(const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// Column i of `to`, which has kKeys of them, is the row from + at[i]: 16 rows of 16 words of 32 bits.
template <typename X>
inline void transpose(const X* from, const int64_t* at, uint32_t* to) {
#ifdef __AVX512F__
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + at[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_si512(to + j * kKeys, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_si512(to + (j + 8) * kKeys, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) std::memcpy(to + j * kKeys + i, (const char*)(from + at[i]) + 4 * j, 4);
#endif
}

// The numbers of a key as factors; codes without their scale.
template <typename C, typename X>
inline void read_key(const C* from, X* to, int64_t dim) {
    if constexpr (std::is_same_v<C, X>)
        std::memcpy(to, from, dim * sizeof(X));
    else
        widen(from, to, dim);
}

// Keys at `at`, a multiple of 16, into s.keys [padded dim / pair, kKeys, pair]. Asks for the values beside them.
template <typename T, typename C, typename X>
void read_keys(const Attention<T, C>& a, const int64_t* at, int64_t n, Scratch<X>& s) {
    constexpr int kWords = 64 / sizeof(X);  // numbers in a vector
    for (int64_t j = 0; j < n; j += kLanes) {
        int64_t from[kLanes];
        for (int i = 0; i < kLanes; i++) from[i] = at[j + i] * a.dim;
        uint32_t* to = (uint32_t*)s.keys.data() + j;
        if constexpr (std::is_same_v<C, X>) {
            if (a.dim % kWords == 0) {
                for (int64_t d = 0; d < a.dim; d += kWords) {
                    transpose(a.cache.keys + d, from, to + d / kPair<X> * kKeys);
                    for (int i = 0; i < kLanes; i++) fetch(a.cache.values + d + from[i], kWords);
                }
                continue;
            }
        }
        for (int i = 0; i < kLanes; i++) {
            X* key = s.key.data() + i * s.dim;
            read_key(a.cache.keys + from[i], key, a.dim);
            std::fill(key + a.dim, key + s.dim, X{});  // not what another model left there
            fetch(a.cache.values + from[i], a.dim);
            from[i] = i * s.dim;
        }
        for (int64_t d = 0; d < a.dim; d += kWords) transpose(s.key.data() + d, from, to + d / kPair<X> * kKeys);
    }
}

// ---- one tile -----------------------------------------------------------------------------------------------------

// Scores of one row times `scale` and, unless null, each key's own; positions outside [low, high] count for nothing. The
// peak of them.
inline float scaled(float* score, float scale, const float* key_scales, int low, int high, int n) {
    constexpr IntVec kCount = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vec peaks = Vec{} - INFINITY;
    for (int j = 0; j < n; j += kLanes) {
        Vec x = *(Vec*)(score + j) * scale;
        if (key_scales != nullptr) x *= *(const Vec*)(key_scales + j);
        const IntVec position = kCount + j;
        x = (position < low) | (position > high) ? Vec{} - INFINITY : x;
        *(Vec*)(score + j) = x;
        peaks = x > peaks ? x : peaks;
    }
    return largest_lane(peaks);
}

// Those scores become weights, of values times their scales unless null. The sum of them.
inline float soften(float* score, float peak, const float* value_scales, int n) {
    const float shift = peak == -INFINITY ? 0.0f : peak;  // all masked: exp(-inf - 0), not exp(-inf + inf)
    Vec sums = {};
    for (int j = 0; j < n; j += kLanes) {
        const Vec x = *(Vec*)(score + j);
        const Vec y = x == -INFINITY ? Vec{} : exp_vec(x - shift);
        *(Vec*)(score + j) = value_scales == nullptr ? y : y * *(const Vec*)(value_scales + j);
        sums += y;
    }
    return sum_lanes(sums);
}

// All that one sequence's rows need to know of where they stand.
struct Span {
    int64_t position, last;  // of the first row, of the last
    const int32_t* table;
    int rows, group;
};

// Positions tile * kTile .. to the end of the tile or of the span.
template <typename T, typename C>
void locate(const Attention<T, C>& a, const Span& span, int kv_head, int64_t tile, Places& to) {
    const int64_t first = tile * kTile;
    to.n = int(std::min<int64_t>(span.last + 1 - first, kTile));
    int64_t page = first / a.page_size, offset = first % a.page_size;
    for (int64_t j = 0; j < to.n; page++, offset = 0) {
        const int64_t begin = (span.table[page] * a.kv_heads + kv_head) * a.page_size + offset;
        const int64_t count = std::min(a.page_size - offset, to.n - j);
        for (int64_t i = 0; i < count; i++) to.at[j + i] = begin + i;
        j += count;
    }
    for (int j = to.n; j % kLanes != 0; j++) to.at[j] = to.at[j - 1];
}

// The part of a tile of keys. Asks for the keys of the `next` one on the way.
template <typename T, typename C, typename X>
void attend_tile(const Attention<T, C>& a, const Span& span, int64_t tile, const Places& places, const Places& next,
                 Scratch<X>& s, Part part) {
    const int n = places.n, columns = (n + kLanes - 1) / kLanes * kLanes;
    const int depth = int((a.dim + kPair<X> - 1) / kPair<X> * kPair<X>);
    const auto keys = [from = (const float*)s.keys.data()](int k) { return from + k / kPair<X> * kKeys; };
    for (int j = 0; j < n; j += kKeys) {
        const int some = std::min(columns - j, kKeys);
        read_keys(a, places.at + j, some, s);
        multiply(s.query.data(), s.dim, keys, kAskNothing, s.scores.data() + j, kTile, span.rows, depth, some);
    }

    alignas(64) float key_scales[kTile], value_scales[kTile];
    for (int j = 0; kCoded<C> && j < columns; j++) {
        key_scales[j] = a.cache.key_scales[places.at[j]];
        value_scales[j] = a.cache.value_scales[places.at[j]];
    }
    const float scale = 1.0f / std::sqrt(float(a.dim));
    for (int some = 0; some < span.rows; some += 4) {  // in two loops: a CPU computes rows side by side
        const int end = std::min(some + 4, span.rows);
        for (int r = some; r < end; r++) {
            const int64_t mine = span.position + r / span.group - tile * kTile;
            const int64_t least = a.window ? mine - a.window + 1 : 0;
            part.peak[r] = scaled(s.scores.data() + r * kTile, scale, kCoded<C> ? key_scales : nullptr,
                                  int(std::clamp<int64_t>(least, 0, kTile)), int(std::min<int64_t>(mine, n - 1)), columns);
        }
        for (int r = some; r < end; r++)
            part.total[r] =
                soften(s.scores.data() + r * kTile, part.peak[r], kCoded<C> ? value_scales : nullptr, columns);
    }

    const auto ask = [from = a.cache.keys, at = next.at, dim = a.dim](int k, int64_t column, int64_t count) {
        fetch(from + at[k] * dim + column, count);
    };
    for (int k = n; k < next.n; k++) ask(k, 0, a.dim);  // and the others one by one with the values
    for (int k = 0; kCoded<C> && k < next.n; k += kLanes)
        fetch(a.cache.key_scales + next.at[k], kLanes), fetch(a.cache.value_scales + next.at[k], kLanes);
    if (span.rows <= kFewRows && a.dim % kLanes == 0) {
        const auto values = [from = a.cache.values, at = places.at, dim = a.dim](int k) { return from + at[k] * dim; };
        return multiply(s.scores.data(), kTile, values, ask, part.values, s.dim, span.rows, n, a.dim);
    }
    for (int k = 0; k < n; k++) {
        ask(k, 0, a.dim);
        widen(a.cache.values + places.at[k] * a.dim, s.values.data() + k * s.dim, a.dim);
        std::fill_n(s.values.data() + k * s.dim + a.dim, s.dim - a.dim, 0.0f);
    }
    const auto values = [from = (const float*)s.values.data(), dim = s.dim](int k) { return from + k * dim; };
    multiply(s.scores.data(), kTile, values, kAskNothing, part.values, s.dim, span.rows, n, s.dim);
}

// ---- all tiles ------------------------------------------------------------------------------------------------------

// The next part of one row joins what was folded before it.
inline void fold(const Part& part, const Part& into, int r, int64_t dim) {
    const float peak = part.peak[r], before = into.peak[r];
    if (peak == -INFINITY && part.total[r] == 0.0f) return;  // it sees nothing of this tile
    const float keep = peak > before ? std::exp(before - peak) : 1.0f;
    const float gain = peak > before ? 1.0f : std::exp(peak - before);
    into.peak[r] = std::max(before, peak);
    into.total[r] = into.total[r] * keep + part.total[r] * gain;
    float* to = into.values + r * dim;
    const float* from = part.values + r * dim;
    for (int64_t d = 0; d < dim; d += kLanes) {
        const Vec kept = *(Vec*)(to + d) * keep;
        *(Vec*)(to + d) = multiply_add(*(const Vec*)(from + d), Vec{} + gain, kept);
    }
}

inline void clear(const Part& part, int64_t rows, int64_t dim) {
    std::fill_n(part.peak, rows, -INFINITY);
    std::fill_n(part.total, rows, 0.0f);
    std::fill_n(part.values, rows * dim, 0.0f);
}

template <typename T, typename C>
struct Attend {
    using X = Factor<T>;
    const Attention<T, C>& a;

    Span span_of(const Task& task) const {
        const int64_t length = a.query_starts[task.sequence + 1] - a.query_starts[task.sequence];
        const int64_t position = a.context_lens[task.sequence] - length + task.first;
        const int group = int(a.heads / a.kv_heads);
        return {position, position + task.count - 1, a.tables + task.sequence * a.table_stride, task.count * group, group};
    }

    int64_t first_tile(const Span& span) const {
        return a.window ? std::max<int64_t>(0, span.position - a.window + 1) / kTile : 0;
    }
    int64_t tiles(const Span& span) const { return span.last / kTile + 1 - first_tile(span); }

    void read_query(const Task& task, const Span& span, Scratch<X>& s) const {
        for (int r = 0; r < span.rows; r++) {
            const T* from = a.query + (a.query_starts[task.sequence] + task.first + r / span.group) * a.query_stride;
            X* to = s.query.data() + r * s.dim;
            read_key(from + (task.kv_head * span.group + r % span.group) * a.dim, to, a.dim);
            std::fill(to + a.dim, to + s.dim, X{});
        }
    }

    void write(const Task& task, const Span& span, const Part& part, int64_t dim) const {
        for (int r = 0; r < span.rows; r++) {
            const int64_t token = a.query_starts[task.sequence] + task.first + r / span.group;
            const int64_t head = task.kv_head * span.group + r % span.group;
            narrow(part.values + r * dim, a.out + (token * a.heads + head) * a.dim, a.dim, 1.0f / part.total[r]);
        }
    }

    void locate_first(const Task* task, Places& to) const {
        to.n = 0;
        if (task != nullptr) locate(a, span_of(*task), task->kv_head, first_tile(span_of(*task)), to);
    }

    // A task from the first tile to the last; `next` is what this thread is likely to do after it, or null.
    void whole(const Task& task, const Task* next) const {
        const Span span = span_of(task);
        auto& s = Scratch<X>::of(a.dim, span.rows);
        const Part part(s.part.data(), span.rows, s.dim), folded(s.folded.data(), span.rows, s.dim);
        read_query(task, span, s);
        clear(folded, span.rows, s.dim);
        const int64_t first = first_tile(span), last = span.last / kTile;
        Places places[2];
        locate(a, span, task.kv_head, first, places[0]);
        for (int64_t tile = first; tile <= last; tile++) {
            Places &here = places[(tile - first) & 1], &there = places[(tile - first + 1) & 1];
            tile < last ? locate(a, span, task.kv_head, tile + 1, there) : locate_first(next, there);
            attend_tile(a, span, tile, here, there, s, part);
            for (int r = 0; r < span.rows; r++) fold(part, folded, r, s.dim);
        }
        write(task, span, folded, s.dim);
    }

    // The same for few tasks of many tiles: the tiles are shared out, and their parts folded when all are there.
    void split(const std::vector<Task>& tasks, int64_t part_floats, int64_t all_tiles, int threads) const {
        struct Piece {
            const Task* task;
            int64_t tile;
        };
        std::vector<Piece> pieces;
        for (const Task& task : tasks)
            for (int64_t i = 0; i < tiles(span_of(task)); i++) pieces.push_back({&task, first_tile(span_of(task)) + i});
        Memory<float> memory(all_tiles * part_floats);
        parallel_for(all_tiles, INT32_MAX, threads, [&](int64_t p) {
            const Task& task = *pieces[p].task;
            const Span span = span_of(task);
            auto& s = Scratch<X>::of(a.dim, span.rows);
            read_query(task, span, s);
            Places here, there;
            locate(a, span, task.kv_head, pieces[p].tile, here);
            if (p + 1 < all_tiles) {
                const Piece& next = pieces[p + 1];
                locate(a, span_of(*next.task), next.task->kv_head, next.tile, there);
            }
            const Part part(memory.data() + p * part_floats, span.rows, s.dim);
            attend_tile(a, span, pieces[p].tile, here, there, s, part);
        });
        int64_t p = 0;
        for (const Task& task : tasks) {
            const Span span = span_of(task);
            auto& s = Scratch<X>::of(a.dim, span.rows);
            const Part folded(s.folded.data(), span.rows, s.dim);
            clear(folded, span.rows, s.dim);
            for (int64_t i = 0; i < tiles(span); i++, p++)
                for (int r = 0; r < span.rows; r++)
                    fold(Part(memory.data() + p * part_floats, span.rows, s.dim), folded, r, s.dim);
            write(task, span, folded, s.dim);
        }
    }

    void all(int64_t sequences, int threads) const {
        const int32_t queries = int32_t(std::max<int64_t>(1, kRows / (a.heads / a.kv_heads)));
        std::vector<Task> tasks;
        int64_t all_tiles = 0, rows = 0;
        for (int32_t s = 0; s < sequences; s++)
            for (int32_t length = a.query_starts[s + 1] - a.query_starts[s], first = 0; first < length; first += queries)
                for (int32_t h = 0; h < a.kv_heads; h++) {
                    tasks.push_back({s, first, std::min(queries, length - first), h});
                    const Span span = span_of(tasks.back());
                    all_tiles += tiles(span);
                    rows = std::max<int64_t>(rows, span.rows);
                }
        const int64_t part_floats = Part::floats(rows, Scratch<X>::of(a.dim, rows).dim);
        const bool few = int64_t(tasks.size()) < 4 * threads && all_tiles > int64_t(tasks.size());
        if (threads > 1 && few && all_tiles * part_floats <= kMostPartFloats)
            return split(tasks, part_floats, all_tiles, threads);
        parallel_for(int64_t(tasks.size()), INT32_MAX, threads, [&](int64_t i) {
            whole(tasks[i], i + 1 < int64_t(tasks.size()) ? &tasks[i + 1] : nullptr);
        });
    }
};

}  // namespace

extern "C" {

void nemo_attention(int dtype, const void* query, void* keys, void* values, float* key_scales, float* value_scales,
                    void* out, const int32_t* query_starts, const int32_t* context_lens, const int32_t* tables,
                    int64_t query_stride, int64_t table_stride, int64_t sequences, int64_t heads, int64_t kv_heads,
                    int64_t dim, int64_t page_size, int64_t window, int threads) {
    with_types(dtype, key_scales != nullptr, [&]<typename T, typename C>() {
        const Pages<C> cache = {(C*)keys, (C*)values, key_scales, value_scales};
        const Attention<T, C> a = {(const T*)query, cache, (T*)out, query_starts, context_lens, tables, query_stride,
                                   table_stride, heads, kv_heads, dim, page_size, window};
        Attend<T, C>{a}.all(sequences, threads);
    });
}
}
