// 2:4 weights. Layout: ../sparse24_linear/layout.py. A tile is 256 columns, 16 words of positions; a plane of it is
// 64 columns, 32 stored weights: nibble i of word j is first | second << 2 of the j-th four of plane i.
//
// Two positions become a mask of four bits by a look-up, the 16 of a plane one mask of 64 bits, and one instruction
// puts the stored weights where it has ones. CPUs without it, and float16, take the weights of a column of LANES fours
// at a time: of two stored ones, that whose position it is, or zero.
#pragma once

#include "product.h"

#if defined(HAS_PAIRS) && defined(__AVX512VBMI2__)
#define HAS_EXPAND 1
#endif

struct Sparse24 {
    const uint16_t* values;  // [planes, rows, 32]
    const uint16_t* index;   // [tiles, rows, 16]
    int64_t rows, columns;   // columns: a multiple of 8
    Half half;

    static constexpr int COLUMNS = 256, PLANE = 64;
    int64_t tiles() const { return (columns + COLUMNS - 1) / COLUMNS; }
    int64_t planes() const { return (columns + PLANE - 1) / PLANE; }
    // Planes that a tile has: fewer than 4 in the last one.
    int planes_of(int64_t tile) const { return planes() - 4 * tile < 4 ? int(planes() - 4 * tile) : 4; }
};

// Columns of a row, [columns]; any CPU.
inline void spread_row(const Sparse24& w, int64_t row, uint16_t* out) {
    std::memset(out, 0, w.columns * sizeof *out);
    for (int64_t four = 0; four < w.columns / 4; ++four) {
        const int64_t plane = four / WIDTH, j = four % WIDTH;
        const int nibble = w.index[(plane / 4 * w.rows + row) * WIDTH + j] >> (4 * (plane % 4)) & 15;
        const uint16_t* kept = w.values + (plane * w.rows + row) * 2 * WIDTH + 2 * j;
        out[4 * four + (nibble & 3)] = kept[0];
        out[4 * four + (nibble >> 2)] = kept[1];
    }
}

// Columns 0 .. 3 of LANES fours, of their first and second stored weights and both positions, a nibble.
struct Fours {
    Floats of[4];
    Fours(Floats first, Floats second, Ints nibbles) {
        const Ints one = nibbles & 3, two = (nibbles >> 2) & 3;
        of[0] = where(one == 0, first);
        of[1] = where(one == 1, first) + where(two == 1, second);
        of[2] = where(one == 2, first) + where(two == 2, second);
        of[3] = where(two == 3, second);
    }
    static Floats where(Ints mask, Floats value) { return (Floats)(mask & (Ints)value); }
    // Times the same columns of x, WIDTH apart.
    Floats times(const float* x) const {
        Floats sum{};
        for (int c = 0; c < 4; ++c) sum += of[c] * *reinterpret_cast<const Floats*>(x + c * WIDTH);
        return sum;
    }
};

// Few tokens on any CPU; x in float32, the columns of a plane as [4][16 fours].
struct Sparse24Fours : ColumnLanes {
    using Weight = Sparse24;
    using Packed = float;
    static constexpr int PER_TILE = Sparse24::COLUMNS;

    static void pack(const Sparse24& w, const uint16_t* x, float* out) {
        for (int64_t k = 0; k < w.columns; ++k)
            out[k / 64 * 64 + k % 4 * WIDTH + k % 64 / 4] = to_float(x[k], w.half);
    }

    template <int TOKENS>
    static void add(const Sparse24& w, const float* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        for (int64_t tile = 0; tile < w.tiles(); ++tile)
            for (int64_t r = 0; r < count; ++r)
                for (int lane = 0; lane < WIDTH; lane += LANES) {
                    const Ints words = ints_of(w.index + (tile * w.rows + first + r) * WIDTH + lane);
                    float* to = sums + r * TOKENS * WIDTH + lane;
                    for (int plane = 0; plane < w.planes_of(tile); ++plane) {
                        const uint16_t* kept = w.values + ((4 * tile + plane) * w.rows + first + r) * 2 * WIDTH;
                        const Ints pairs = *reinterpret_cast<const Ints*>(kept + 2 * lane);
                        const Ints seconds = (Ints)((Unsigned)pairs >> 16);
                        const Fours fours(low_floats(pairs, w.half), low_floats(seconds, w.half), words >> (4 * plane));
                        const float* from = x + tile * PER_TILE + plane * Sparse24::PLANE + lane;
                        for (int m = 0; m < TOKENS; ++m)
                            *reinterpret_cast<Floats*>(to + m * WIDTH) += fours.times(from + m * stride);
                    }
                }
    }
};

#ifdef HAS_EXPAND

// 32 stored weights and the positions of their 16 fours, a nibble in each byte -> 64 columns.
struct Plane {
    __m512i low, high;
    inline Plane(__m512i kept, __m128i nibbles) {
        const __m128i masks = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);  // by nibble
        const __m128i by_four = _mm_shuffle_epi8(masks, nibbles);
        const __m128i by_eight = _mm_maddubs_epi16(by_four, _mm_set1_epi16(0x1001));  // low byte + 16 * high byte
        const uint64_t mask = uint64_t(_mm_cvtsi128_si64(_mm_packus_epi16(by_eight, by_eight)));
        low = _mm512_maskz_expand_epi16(__mmask32(mask), kept);
        const __m512i rest = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(kept, 1));
        high = _mm512_maskz_expand_epi16(__mmask32(mask >> 32), rest);
    }
};

// Plane `plane` of a tile of a row; words: its positions.
inline Plane plane_of(const Sparse24& w, int64_t tile, int64_t row, int plane, __m256i words) {
    const __m256i moved = _mm256_srl_epi16(words, _mm_cvtsi32_si128(4 * plane));
    const __m128i nibbles = _mm256_cvtepi16_epi8(_mm256_and_si256(moved, _mm256_set1_epi16(15)));
    return {_mm512_loadu_si512(w.values + ((4 * tile + plane) * w.rows + row) * 2 * WIDTH), nibbles};
}

inline __m256i words_of(const Sparse24& w, int64_t tile, int64_t row) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.index + (tile * w.rows + row) * WIDTH));
}

// Few tokens of bfloat16; x as it is.
struct Sparse24Rows : ColumnLanes {
    using Weight = Sparse24;
    using Packed = uint16_t;
    static constexpr int PER_TILE = Sparse24::COLUMNS;

    static void pack(const Sparse24& w, const uint16_t* x, uint16_t* out) { std::memcpy(out, x, 2 * w.columns); }

    template <int TOKENS>
    static void add(const Sparse24& w, const uint16_t* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        for (int64_t tile = 0; tile < w.tiles(); ++tile)
            for (int64_t r = 0; r < count; ++r) {
                const __m256i words = words_of(w, tile, first + r);
                __m512 sum[TOKENS];
                for (int m = 0; m < TOKENS; ++m) sum[m] = _mm512_load_ps(sums + (r * TOKENS + m) * WIDTH);
                for (int plane = 0; plane < w.planes_of(tile); ++plane) {
                    const Plane made = plane_of(w, tile, first + r, plane, words);
                    const uint16_t* from = x + tile * PER_TILE + plane * Sparse24::PLANE;
                    for (int m = 0; m < TOKENS; ++m) {
                        const __m512i low = _mm512_load_si512(from + m * stride);
                        const __m512i high = _mm512_load_si512(from + m * stride + STEP);
                        sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)made.low, (__m512bh)low);
                        sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)made.high, (__m512bh)high);
                    }
                }
                for (int m = 0; m < TOKENS; ++m) _mm512_store_ps(sums + (r * TOKENS + m) * WIDTH, sum[m]);
            }
    }
};

// Left factors for matrix.h.
struct Sparse24Left {
    using Weight = Sparse24;
    static constexpr int STEPS = Sparse24::COLUMNS / STEP;
    static int64_t steps(const Sparse24& w) { return (w.columns + STEP - 1) / STEP; }

    static inline void unpack(const Sparse24& w, int64_t tile, int64_t row, uint8_t* to) {
        const __m256i words = words_of(w, tile, row);
        for (int plane = 0; plane < w.planes_of(tile); ++plane) {
            const Plane made = plane_of(w, tile, row, plane, words);
            _mm512_store_si512(to + 2 * plane * LEFT_BYTES, made.low);
            _mm512_store_si512(to + (2 * plane + 1) * LEFT_BYTES, made.high);
        }
    }

    static inline __m512i taken(const uint16_t* x, int64_t step, int64_t columns) {
        const int64_t left = columns - step * STEP;
        return _mm512_maskz_loadu_epi16(left < STEP ? (__mmask32(1) << left) - 1 : ~__mmask32(0), x + step * STEP);
    }
};

#endif
