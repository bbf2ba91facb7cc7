// Few tokens: weights are made in registers, once for up to four tokens, and never stored.
//
// Sums of a group are kept in 16 lanes, multiplied by the group's scale, and added to 16 lanes per row and token, all
// in float32; the lanes are added up at the end. A thread takes a block of rows and goes along it tile by tile, since
// the words of neighbouring rows of a tile lie together: it reads runs of kilobytes.
#pragma once

#include "common.h"

constexpr int SUMS = 256;  // rows times tokens of a block: their lanes take 16 KiB, a third of the first cache
constexpr int TOKENS_AT_ONCE = 4;

// What a block of rows needs of one tile, by group of the tile and row of the block.
struct Grids {
    alignas(64) float scale[STEPS][SUMS];
    uint8_t zero[STEPS][SUMS];

    void read(const Weight& w, int64_t tile, int steps_per_group, int64_t first, int64_t count) {
        for (int g = 0; g < STEPS / steps_per_group; ++g) {
            const int64_t at = w.group_of(tile * STEPS + g * steps_per_group) * w.rows + first;
            if (w.half == BF16)
                for (int64_t r = 0; r < count; ++r) scale[g][r] = from_bits(uint32_t(w.scale[at + r]) << 16);
            else
                for (int64_t r = 0; r < count; ++r) scale[g][r] = _cvtsh_ss(w.scale[at + r]);
            if (w.zero)
                std::memcpy(zero[g], w.zero + at, count);
            else
                std::memset(zero[g], 8, count);
        }
    }
};

// Any CPU with AVX2, and float16 on all: x in float32, one multiply-add per weight and token.
struct Floats {
#if defined(__AVX512F__)
    static constexpr int LANES = 16;
#else
    static constexpr int LANES = 8;
#endif
    typedef float F __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    typedef uint32_t U __attribute__((vector_size(4 * LANES)));
    using Packed = float;
    static constexpr int PER_TILE = TILE;

    static void pack(const uint16_t* x, int64_t columns, Half half, float* out) {
        for (int64_t k = 0; k < columns; ++k) out[k] = to_float(x[k], half);
    }

    // One tile of one row, times TOKENS tokens that lie `stride` apart: sums [TOKENS][16] += its products.
    template <int TOKENS, int STEPS_PER_GROUP>
    static inline void tile(
        const int32_t* words, const float* x, int64_t stride, const float* scale, const uint8_t* zero, float* sums
    ) {
#pragma GCC unroll 2
        for (int lane = 0; lane < WIDTH; lane += LANES) {
            const I low = *reinterpret_cast<const I*>(words + lane);
            const I high = (I)((U)low >> 12);
#pragma GCC unroll 4
            for (int g = 0; g < STEPS / STEPS_PER_GROUP; ++g) {
                const float* offset = OFFSETS.of[zero[g * SUMS]];
                F part[TOKENS] = {};
#pragma GCC unroll 8
                for (int plane = 2 * g * STEPS_PER_GROUP; plane < 2 * (g + 1) * STEPS_PER_GROUP; ++plane) {
                    const int shift = plane_shift(plane);
                    const I bits = ((plane < 5 ? low : high) & (0xF << shift)) | ((150 - shift) << 23);
                    const F value = (F)bits - offset[plane];
#pragma GCC unroll 4
                    for (int m = 0; m < TOKENS; ++m)
                        part[m] += value * *reinterpret_cast<const F*>(x + m * stride + plane * WIDTH + lane);
                }
#pragma GCC unroll 4
                for (int m = 0; m < TOKENS; ++m)
                    *reinterpret_cast<F*>(sums + m * WIDTH + lane) += part[m] * scale[g * SUMS];
            }
        }
    }
};

#ifdef HAS_PAIRS

// bfloat16 of code - zero, by zero and code, twice: the permutation takes five bits of an index, and codes have four.
struct Values {
    alignas(64) uint16_t of[16][32];
    Values() {
        for (int zero = 0; zero < 16; ++zero)
            for (int code = 0; code < 32; ++code) of[zero][code] = to_half(float(code % 16 - zero), BF16);
    }
};
inline const Values VALUES;

// Bits that become the indices of step p: byte p of a word holds planes 2p and 2p + 1. They go to the lower and upper
// half of the word's lane.
inline __m512i step_bits(int step) {
    const int64_t word = (8 * step) | (8 * step + 4) << 16;
    return _mm512_set1_epi64(word | (word + 32 + (32 << 16)) << 32);
}

// Columns k and k + 16 of a step, side by side in 32 bits: [32] -> 16 pairs.
inline __m512i pairs(const uint16_t* x) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + WIDTH)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// bfloat16 on CPUs that multiply pairs of them: 32 weights by one permutation of bits and one table look-up.
struct Pairs {
    using Packed = uint32_t;
    static constexpr int PER_TILE = TILE / 2;

    static void pack(const uint16_t* x, int64_t columns, Half, uint32_t* out) {
        for (int64_t step = 0; step < columns / STEP; ++step)
            _mm512_store_si512(out + step * WIDTH, pairs(x + step * STEP));
    }

    template <int TOKENS, int STEPS_PER_GROUP>
    static inline void tile(
        const int32_t* words, const uint32_t* x, int64_t stride, const float* scale, const uint8_t* zero, float* sums
    ) {
        const __m512i word = _mm512_loadu_si512(words);
#pragma GCC unroll 4
        for (int g = 0; g < STEPS / STEPS_PER_GROUP; ++g) {
            const __m512i table = _mm512_load_si512(VALUES.of[zero[g * SUMS]]);
            __m512 part[TOKENS];
#pragma GCC unroll 4
            for (int m = 0; m < TOKENS; ++m) part[m] = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int step = g * STEPS_PER_GROUP; step < (g + 1) * STEPS_PER_GROUP; ++step) {
                const __m512i index = _mm512_multishift_epi64_epi8(step_bits(step), word);
                const __m512i value = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 4
                for (int m = 0; m < TOKENS; ++m) {
                    const __m512i taken = _mm512_load_si512(x + m * stride + step * WIDTH);
                    part[m] = _mm512_dpbf16_ps(part[m], (__m512bh)value, (__m512bh)taken);
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < TOKENS; ++m) {
                float* sum = sums + m * WIDTH;
                _mm512_store_ps(sum, _mm512_fmadd_ps(part[m], _mm512_set1_ps(scale[g * SUMS]), _mm512_load_ps(sum)));
            }
        }
    }
};

#endif

inline float lanes_sum(const float* lanes) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(_mm512_load_ps(lanes));
#else
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
#endif
}

struct Product {
    Weight weight;
    const uint16_t* x;  // [tokens, columns], rows `stride` apart
    int64_t stride;
    const uint16_t* bias;  // [rows] or null
    uint16_t* y;           // [tokens, rows]
    int64_t tokens;
};

// y of rows first .. first + count and tokens token .. token + valid; TOKENS >= valid of them are in x.
template <class Math, int TOKENS, int STEPS_PER_GROUP>
void block(const Product& p, const typename Math::Packed* x, int64_t first, int64_t count, int64_t token, int valid) {
    const Weight& w = p.weight;
    alignas(64) float sums[SUMS * WIDTH];
    Grids grids;
    const int64_t stride = w.tiles() * Math::PER_TILE;
    std::memset(sums, 0, sizeof(float) * count * TOKENS * WIDTH);
    for (int64_t tile = 0; tile < w.tiles(); ++tile) {
        grids.read(w, tile, STEPS_PER_GROUP, first, count);
        const int32_t* words = w.words + (tile * w.rows + first) * WIDTH;
        for (int64_t r = 0; r < count; ++r)
            Math::template tile<TOKENS, STEPS_PER_GROUP>(
                words + r * WIDTH, x + tile * Math::PER_TILE, stride, &grids.scale[0][r], &grids.zero[0][r],
                sums + r * TOKENS * WIDTH
            );
    }
    for (int m = 0; m < valid; ++m)
        for (int64_t r = 0; r < count; ++r) {
            const float bias = p.bias ? to_float(p.bias[first + r], w.half) : 0.0f;
            const float sum = lanes_sum(sums + (r * TOKENS + m) * WIDTH);
            p.y[(token + m) * w.rows + first + r] = to_half(sum + bias, w.half);
        }
}

template <class Math, int TOKENS>
void block_of_group(
    const Product& p, const typename Math::Packed* x, int64_t first, int64_t count, int64_t token, int valid
) {
    switch (p.weight.group) {
        case 32: return block<Math, TOKENS, 1>(p, x, first, count, token, valid);
        case 64: return block<Math, TOKENS, 2>(p, x, first, count, token, valid);
        default: return block<Math, TOKENS, 4>(p, x, first, count, token, valid);
    }
}

// All tokens of the rows of a range. Three tokens are computed as four, the last of them zero.
template <class Math>
void rows_of_range(const Product& p, const typename Math::Packed* x, Range range) {
    const int at_once = p.tokens < TOKENS_AT_ONCE ? int(p.tokens) : TOKENS_AT_ONCE;
    const int64_t rows = SUMS / (at_once == 3 ? 4 : at_once), stride = p.weight.tiles() * Math::PER_TILE;
    for (int64_t first = range.first; first < range.last; first += rows) {
        const int64_t count = range.last - first < rows ? range.last - first : rows;
        for (int64_t token = 0; token < p.tokens; token += TOKENS_AT_ONCE) {
            const int valid = p.tokens - token < TOKENS_AT_ONCE ? int(p.tokens - token) : TOKENS_AT_ONCE;
            const typename Math::Packed* from = x + token * stride;
            if (valid == 1) block_of_group<Math, 1>(p, from, first, count, token, valid);
            if (valid == 2) block_of_group<Math, 2>(p, from, first, count, token, valid);
            if (valid >= 3) block_of_group<Math, 4>(p, from, first, count, token, valid);
        }
    }
}

// y = x Wᵀ + bias. False if there is no memory for x in the order of the kernel.
template <class Math>
bool product_by_rows(const Product& p, int threads) {
    const int64_t stride = p.weight.tiles() * Math::PER_TILE;
    const int64_t count = (p.tokens + TOKENS_AT_ONCE - 1) * stride;
    Buffer<typename Math::Packed> x(count);
    if (!x.data) return false;
    std::memset(x.data, 0, count * sizeof(typename Math::Packed));
    for (int64_t m = 0; m < p.tokens; ++m)
        Math::pack(p.x + m * p.stride, p.weight.columns, p.weight.half, x.data + m * stride);
    parallel(threads, [&](int thread, int of) {
        rows_of_range<Math>(p, x.data, share(p.weight.rows, WIDTH, thread, of));
    });
    return true;
}
