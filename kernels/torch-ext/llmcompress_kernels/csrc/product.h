// Few tokens, whatever the format of the weight: weights are made in registers, once for up to four tokens, and never
// stored.
//
// Sums are kept in 16 lanes per row and token, in float32, which are added up at the end. A thread takes a block of
// rows and goes along it tile by tile, since neighbouring rows of a tile lie together: it reads runs of kilobytes.
//
// A format and the way to multiply with it is a struct Math:
//
//     Weight               with rows, columns, half, tiles()
//     Packed, PER_TILE     what x is turned into, once per call, and how many of these a tile of columns has
//     pack(x, columns, half, out)
//     add<TOKENS>(weight, x, stride, first, count, sums)
//                          sums [count][TOKENS][16] += rows first .. first + count times TOKENS tokens `stride` apart
#pragma once

#include "common.h"

constexpr int SUMS = 256;  // rows times tokens of a block: their lanes take 16 KiB, a third of the first cache
constexpr int TOKENS_AT_ONCE = 4;

inline float lanes_sum(const float* lanes) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(_mm512_load_ps(lanes));
#else
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
#endif
}

template <class W>
struct Product {
    W weight;
    const uint16_t* x;  // [tokens, columns], rows `stride` apart
    int64_t stride;
    const uint16_t* bias;  // [rows] or null
    uint16_t* y;           // [tokens, rows]
    int64_t tokens;
};

// y of rows first .. first + count and tokens token .. token + valid; TOKENS >= valid of them are in x.
template <class Math, int TOKENS>
void block(
    const Product<typename Math::Weight>& p, const typename Math::Packed* x, int64_t first, int64_t count,
    int64_t token, int valid
) {
    const auto& w = p.weight;
    alignas(64) float sums[SUMS * WIDTH];
    std::memset(sums, 0, sizeof(float) * count * TOKENS * WIDTH);
    Math::template add<TOKENS>(w, x, w.tiles() * Math::PER_TILE, first, count, sums);
    for (int m = 0; m < valid; ++m)
        for (int64_t r = 0; r < count; ++r) {
            const float bias = p.bias ? to_float(p.bias[first + r], w.half) : 0.0f;
            const float sum = lanes_sum(sums + (r * TOKENS + m) * WIDTH);
            p.y[(token + m) * w.rows + first + r] = to_half(sum + bias, w.half);
        }
}

// All tokens of the rows of a range. Three tokens are computed as four, the last of them zero.
template <class Math>
void rows_of_range(const Product<typename Math::Weight>& p, const typename Math::Packed* x, Range range) {
    const int at_once = p.tokens < TOKENS_AT_ONCE ? int(p.tokens) : TOKENS_AT_ONCE;
    const int64_t rows = SUMS / (at_once == 3 ? 4 : at_once), stride = p.weight.tiles() * Math::PER_TILE;
    for (int64_t first = range.first; first < range.last; first += rows) {
        const int64_t count = range.last - first < rows ? range.last - first : rows;
        for (int64_t token = 0; token < p.tokens; token += TOKENS_AT_ONCE) {
            const int valid = p.tokens - token < TOKENS_AT_ONCE ? int(p.tokens - token) : TOKENS_AT_ONCE;
            const typename Math::Packed* from = x + token * stride;
            if (valid == 1) block<Math, 1>(p, from, first, count, token, valid);
            if (valid == 2) block<Math, 2>(p, from, first, count, token, valid);
            if (valid >= 3) block<Math, 4>(p, from, first, count, token, valid);
        }
    }
}

// y = x Wᵀ + bias. False if there is no memory for x in the order of the kernel.
template <class Math>
bool product_by_rows(const Product<typename Math::Weight>& p, int threads) {
    const int64_t stride = p.weight.tiles() * Math::PER_TILE;
    const int64_t count = (p.tokens + TOKENS_AT_ONCE - 1) * stride;
    Buffer<typename Math::Packed, 0> x(count);
    if (!x.data) return false;
    std::memset(x.data, 0, count * sizeof(typename Math::Packed));
    for (int64_t m = 0; m < p.tokens; ++m)
        Math::pack(p.x + m * p.stride, p.weight.columns, p.weight.half, x.data + m * stride);
    parallel(threads, [&](int thread, int of) {
        rows_of_range<Math>(p, x.data, share(p.weight.rows, WIDTH, thread, of));
    });
    return true;
}
