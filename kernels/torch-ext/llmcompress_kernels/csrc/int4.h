// Int4 weights for few tokens. Sums of a group are kept apart until they are multiplied by the group's scale.
#pragma once

#include "product.h"

// What a block of rows needs of one tile, by group of the tile and row of the block.
struct Grids {
    alignas(64) float scale[STEPS][SUMS];
    uint8_t zero[STEPS][SUMS];

    void read(const Int4& w, int64_t tile, int steps_per_group, int64_t first, int64_t count) {
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

// Rows of an int4 weight by one of the two.
template <class Tile>
struct Int4Rows {
    using Weight = Int4;
    using Packed = typename Tile::Packed;
    static constexpr int PER_TILE = Tile::PER_TILE;

    static void pack(const uint16_t* x, int64_t columns, Half half, Packed* out) { Tile::pack(x, columns, half, out); }

    template <int TOKENS>
    static void add(const Int4& w, const Packed* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        switch (w.group) {
            case 32: return add_groups<TOKENS, 1>(w, x, stride, first, count, sums);
            case 64: return add_groups<TOKENS, 2>(w, x, stride, first, count, sums);
            default: return add_groups<TOKENS, 4>(w, x, stride, first, count, sums);
        }
    }

    template <int TOKENS, int STEPS_PER_GROUP>
    static void add_groups(const Int4& w, const Packed* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        Grids grids;
        for (int64_t tile = 0; tile < w.tiles(); ++tile) {
            grids.read(w, tile, STEPS_PER_GROUP, first, count);
            const int32_t* words = w.words + (tile * w.rows + first) * WIDTH;
            for (int64_t r = 0; r < count; ++r) {
                _mm_prefetch(words + (w.rows + r) * WIDTH, _MM_HINT_T1);  // the same row of the next tile
                Tile::template tile<TOKENS, STEPS_PER_GROUP>(
                    words + r * WIDTH, x + tile * PER_TILE, stride, &grids.scale[0][r], &grids.zero[0][r],
                    sums + r * TOKENS * WIDTH
                );
            }
        }
    }
};
