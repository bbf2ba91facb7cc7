// Few tokens, whatever the format of the weight: weights are made in registers, once for up to four or eight tokens,
// and never stored.
//
// Sums are kept in float32. A thread takes a block of rows and goes along it tile by tile, since neighbouring rows of a
// tile lie together: it reads runs of kilobytes.
//
// A format and the way to multiply with it is a struct Math, either ColumnLanes or RowLanes:
//
//     Weight               with rows, columns, half, tiles()
//     Packed, PER_TILE     what x is turned into, once per call, and how many of these a tile of columns has
//     AT_ONCE              tokens at most
//     pack(weight, x, out) a token; `out` is zero before
//     add<TOKENS>(weight, x, stride, first, count, sums)
//                          sums += rows first .. first + count times TOKENS tokens `stride` apart
#pragma once

#include "lanes.h"

constexpr int SUMS = 4096;  // floats of a block: 16 KiB, a third of the first cache

// How many threads are worth starting, which takes some microseconds: one for every `each` weights times passes.
inline int useful(int threads, int64_t weights, int64_t passes, int64_t each) {
    const int64_t most = weights * passes / each;
    return most < 1 ? 1 : most < threads ? int(most) : threads;
}
constexpr int64_t PACK_EACH = 1 << 16;  // columns times tokens of x
constexpr int64_t ROWS_EACH = 1 << 19;  // weights times tokens; unpacking them counts as two tokens

template <class W>
struct Product {
    W weight;
    const uint16_t* x;  // [tokens, columns], rows `stride` apart
    int64_t stride;
    const uint16_t* bias;  // [rows] or null
    uint16_t* y;           // [tokens, rows]
    int64_t tokens;

    // Of `count` rows, LANES at most; zeros without one.
    Floats bias_of(int64_t row, int64_t count) const {
        uint16_t halves[LANES] = {};
        if (!bias) return Floats{};
        std::memcpy(halves, bias + row, (count < LANES ? count : LANES) * sizeof *halves);
        return floats_of(halves, weight.half);
    }
    // Sums of `count` rows, LANES at most, of a token, in an array of LANES -> y.
    void finish(const float* sums, int64_t row, int64_t count, int64_t token) const {
        uint16_t halves[LANES];
        store_halves(*reinterpret_cast<const Floats*>(sums) + bias_of(row, count), weight.half, halves);
        std::memcpy(y + token * weight.rows + row, halves, count * sizeof *halves);
    }
};

// Sums lie as [rows][TOKENS][16 lanes of columns], and are added up.
struct ColumnLanes {
    static constexpr int AT_ONCE = 4;
    static constexpr int64_t rows(int tokens) { return SUMS / WIDTH / tokens; }
    static constexpr int EACH = WIDTH;  // floats of a row and token
    static void take(const float* sums, int tokens, int64_t row, int token, int count, float* to) {
        for (int r = 0; r < count; ++r) to[r] = added(sums + ((row + r) * tokens + token) * WIDTH);
    }
    static float added(const float* lanes) {
#if defined(__AVX512F__)
        return _mm512_reduce_add_ps(_mm512_load_ps(lanes));
#else
        float half[8];
        for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
        return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
#endif
    }
};

// Sums lie as [rows / LANES][TOKENS][LANES rows].
struct RowLanes {
    static constexpr int64_t rows(int) { return 256; }
    static constexpr int EACH = 1;
    static void take(const float* sums, int tokens, int64_t row, int token, int, float* to) {
        std::memcpy(to, sums + row * tokens + token * LANES, LANES * sizeof *to);
    }
};

// y of rows first .. first + count and tokens token .. token + valid; TOKENS >= valid of them are in x.
template <class Math, int TOKENS>
void block(
    const Product<typename Math::Weight>& p, const typename Math::Packed* x, int64_t first, int64_t count,
    int64_t token, int valid
) {
    const auto& w = p.weight;
    alignas(64) float sums[SUMS];
    std::memset(sums, 0, sizeof(float) * ((count + LANES - 1) / LANES * LANES) * TOKENS * Math::EACH);
    Math::template add<TOKENS>(w, x, w.tiles() * Math::PER_TILE, first, count, sums);
    for (int m = 0; m < valid; ++m)
        for (int64_t r = 0; r < count; r += LANES) {
            const int some = count - r < LANES ? int(count - r) : LANES;
            alignas(64) float row[LANES] = {};
            Math::take(sums, TOKENS, r, m, some, row);
            p.finish(row, first + r, some, token + m);
        }
}

// All tokens of the rows of a range. Three tokens are computed as four, the last of them zero; and so on.
template <class Math>
void rows_of_range(const Product<typename Math::Weight>& p, const typename Math::Packed* x, Range range) {
    const int64_t stride = p.weight.tiles() * Math::PER_TILE;
    const int64_t rows = Math::rows(p.tokens < Math::AT_ONCE ? p.tokens < 3 ? int(p.tokens) : 4 : Math::AT_ONCE);
    for (int64_t first = range.first; first < range.last; first += rows) {
        const int64_t count = range.last - first < rows ? range.last - first : rows;
        for (int64_t token = 0; token < p.tokens; token += Math::AT_ONCE) {
            const int64_t left = p.tokens - token;
            const int valid = left < Math::AT_ONCE ? int(left) : Math::AT_ONCE;
            const typename Math::Packed* from = x + token * stride;
            if (valid == 1) block<Math, 1>(p, from, first, count, token, valid);
            if (valid == 2) block<Math, 2>(p, from, first, count, token, valid);
            if (valid == 3 || valid == 4) block<Math, 4>(p, from, first, count, token, valid);
            if constexpr (Math::AT_ONCE > 4)
                if (valid > 4) block<Math, 8>(p, from, first, count, token, valid);
        }
    }
}

// y = x Wᵀ + bias. False if there is no memory for x in the order of the kernel.
template <class Math>
bool product_by_rows(const Product<typename Math::Weight>& p, int threads) {
    using Packed = typename Math::Packed;
    const int64_t stride = p.weight.tiles() * Math::PER_TILE;
    const int64_t count = (p.tokens + Math::AT_ONCE - 1) / Math::AT_ONCE * Math::AT_ONCE;
    Buffer<Packed, 0> x(count * stride);
    if (!x.data) return false;
    std::memset(static_cast<void*>(x.data), 0, count * stride * sizeof(Packed));
    const auto pack = [&](int thread, int of) {
        const Range range = share(p.tokens, 1, thread, of);
        for (int64_t m = range.first; m < range.last; ++m)
            Math::pack(p.weight, p.x + m * p.stride, x.data + m * stride);
    };
    parallel(useful(threads, p.weight.columns, p.tokens, PACK_EACH), pack);
    parallel(useful(threads, p.weight.rows * p.weight.columns, p.tokens + 2, ROWS_EACH), [&](int thread, int of) {
        rows_of_range<Math>(p, x.data, share(p.weight.rows, WIDTH, thread, of));
    });
    return true;
}
