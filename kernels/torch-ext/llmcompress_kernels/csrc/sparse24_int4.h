// 2:4 weights of 4-bit codes. Layout: ../sparse24_int4_linear/layout.py. The 16 words of a block of 128 columns that
// rows g and g + 8 of a strip share are one register; lane 4 t + s of it has, for halves q of 32 columns, the two
// stored codes of columns 32 s + 16 q + 4 t .. + 3. x is put into that order, so that no weight has to move: 64 columns
// of one q are 16 fours in the order of lanes.
#pragma once

#include "sparse24.h"

struct Sparse24Int4 {
    const int32_t* words;     // [blocks, strips, 32, 4]
    const int32_t* metadata;  // [ceil(blocks / 2), strips, 32, 4]
    const uint16_t* scale;    // [columns / group, rows]
    int64_t rows, columns;
    int group;
    Half half;

    static constexpr int STRIP = 16;
    int64_t tiles() const { return (columns + TILE - 1) / TILE; }
    int64_t strips() const { return (rows + STRIP - 1) / STRIP; }
    // The 16 words that row g of a strip has in common with row g + 8.
    const int32_t* words_of(int64_t block, int64_t strip, int g) const {
        return words + ((block * strips() + strip) * 32 + 4 * g) * 4;
    }
    const int32_t* metadata_of(int64_t block, int64_t strip, int g) const {
        return metadata + ((block / 2 * strips() + strip) * 32 + 4 * g) * 4;
    }
    // Scale of the columns from 32 s on of a block; that of the last columns beyond them, where x is zero.
    float scale_of(int64_t block, int s, int64_t row) const {
        const int64_t column = block * TILE + s * STEP;
        return to_float(scale[(column < columns ? column : columns - 1) / group * rows + row], half);
    }
};

// A nibble in two's complement is code - 8.
inline float signed_nibble(int nibble) { return float(nibble < 8 ? nibble : nibble - 16); }

// Columns of a row, [columns], each product code - 8 by scale rounded once; any CPU.
inline void spread_row(const Sparse24Int4& w, int64_t row, uint16_t* out) {
    std::memset(out, 0, w.columns * sizeof *out);
    const int64_t strip = row / 16;
    const int g = int(row % 8), h = int(row % 16 / 8);
    for (int64_t four = 0; four < w.columns / 4; ++four) {
        const int64_t block = four / 32;
        const int s = int(four / 8 % 4), q = int(four / 4 % 2), t = int(four % 4);
        const uint32_t word = uint32_t(w.words_of(block, strip, g)[4 * t + s]) >> (4 * h + 8 * q);
        const int lane = 2 * (s % 2) + q, at = 4 * lane + int(2 * (block % 2)) + s / 2;
        const uint32_t nibble = uint32_t(w.metadata_of(block, strip, g)[at]) >> (4 * t + 16 * h);
        const float scale = w.scale_of(block, s, row);
        out[4 * four + (nibble & 3)] = to_half(signed_nibble(word & 15) * scale, w.half);
        out[4 * four + (nibble >> 2 & 3)] = to_half(signed_nibble(word >> 16 & 15) * scale, w.half);
    }
}

// Few tokens on any CPU; x in float32, the columns of a block as [2 halves q][4][16 lanes].
struct Sparse24Int4Fours : ColumnLanes {
    using Weight = Sparse24Int4;
    using Packed = float;
    static constexpr int PER_TILE = TILE;

    static void pack(const Sparse24Int4& w, const uint16_t* x, float* out) {
        for (int64_t k = 0; k < w.columns; ++k) {
            const int64_t s = k % TILE / 32, q = k / 16 % 2, t = k / 4 % 4;
            out[k / TILE * TILE + q * 4 * WIDTH + k % 4 * WIDTH + 4 * t + s] = to_float(x[k], w.half);
        }
    }

    template <int TOKENS>
    static void add(const Sparse24Int4& w, const float* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        for (int64_t block = 0; block < w.tiles(); ++block)
            for (int64_t r = 0; r < count; ++r)
                for (int lane = 0; lane < WIDTH; lane += LANES)
                    add_lanes<TOKENS>(
                        w, block, first + r, lane, x + block * TILE + lane, stride, sums + r * TOKENS * WIDTH + lane
                    );
    }

    template <int TOKENS>
    static inline void add_lanes(
        const Sparse24Int4& w, int64_t block, int64_t row, int lane, const float* x, int64_t stride, float* sums
    ) {
        const int g = int(row % 8), h = int(row % 16 / 8);
        const Ints words = *reinterpret_cast<const Ints*>(w.words_of(block, row / 16, g) + lane);
        const int32_t* metadata = w.metadata_of(block, row / 16, g) + 2 * (block % 2);
        const Ints t = (lane + lane_numbers()) >> 2;
        Floats part[TOKENS] = {};
        for (int q = 0; q < 2; ++q) {
            const int32_t* at = metadata + 4 * q;
            const Unsigned positions = (Unsigned)repeated(at[0], at[8], at[1], at[9]);
            const Ints nibbles = (Ints)(positions >> (Unsigned)(4 * t + 16 * h));
            const Fours fours(codes(words, 4 * h + 8 * q), codes(words, 16 + 4 * h + 8 * q), nibbles);
            for (int m = 0; m < TOKENS; ++m) part[m] += fours.times(x + m * stride + q * 4 * WIDTH);
        }
        const float by_s[4] = {
            w.scale_of(block, 0, row), w.scale_of(block, 1, row), w.scale_of(block, 2, row), w.scale_of(block, 3, row)
        };
        int32_t bits[4];
        std::memcpy(bits, by_s, sizeof bits);
        const Floats scale = (Floats)repeated(bits[0], bits[1], bits[2], bits[3]);
        for (int m = 0; m < TOKENS; ++m) *reinterpret_cast<Floats*>(sums + m * WIDTH) += part[m] * scale;
    }

    // Nibbles in two's complement from bit `from` on.
    static inline Floats codes(Ints words, int from) {
        return __builtin_convertvector((words << (28 - from)) >> 28, Floats);
    }
};

#ifdef HAS_EXPAND

// bfloat16 of code - 8 by nibble, twice: the permutation takes five bits of an index.
struct Codes {
    alignas(64) uint16_t of[32];
    Codes() {
        for (int i = 0; i < 32; ++i) of[i] = to_half(signed_nibble(i % 16), BF16);
    }
};
inline const Codes CODES;

// Lane 4 t + s -> 2 (s % 2) + q, word 2 (block % 2) + s / 2 of it: where its positions are.
inline __m512i positions_at(int64_t block, int q) {
    const int p = int(2 * (block % 2));
    const __m128i four = _mm_setr_epi32(4 * q + p, 4 * (2 + q) + p, 4 * q + p + 1, 4 * (2 + q) + p + 1);
    return _mm512_broadcast_i32x4(four);
}

// Positions of half q of row g + 8 h as nibbles in bytes, in the order of lanes.
inline __m128i positions(__m512i metadata, int64_t block, int h, int q) {
    const __m512i shifts = _mm512_add_epi32(
        _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12), _mm512_set1_epi32(16 * h)
    );
    const __m512i moved = _mm512_srlv_epi32(_mm512_permutexvar_epi32(positions_at(block, q), metadata), shifts);
    return _mm512_cvtepi32_epi8(_mm512_and_si512(moved, _mm512_set1_epi32(15)));
}

// The stored codes of half q of row g + 8 h as indices: in the lowest bits of both halves of each lane.
inline __m512i code_bits(__m512i words, int h, int q) {
    return _mm512_srl_epi32(words, _mm_cvtsi32_si128(4 * h + 8 * q));
}

struct Sparse24Int4Rows : ColumnLanes {
    using Weight = Sparse24Int4;
    using Packed = uint16_t;
    static constexpr int PER_TILE = TILE;

    static void pack(const Sparse24Int4& w, const uint16_t* x, uint16_t* out) {
        for (int64_t four = 0; four < w.columns / 4; ++four) {
            const int64_t s = four / 8 % 4, q = four / 4 % 2, t = four % 4;
            std::memcpy(out + four / 32 * TILE + 64 * q + 4 * (4 * t + s), x + 4 * four, 8);
        }
    }

    // Scales in the lanes of sums, of which two have the columns of a four.
    static inline __m512 scales(const Sparse24Int4& w, int64_t block, int64_t row) {
        if (w.group == TILE) return _mm512_set1_ps(w.scale_of(block, 0, row));
        const __m128 by_s = _mm_setr_ps(
            w.scale_of(block, 0, row), w.scale_of(block, 1, row), w.scale_of(block, 2, row), w.scale_of(block, 3, row)
        );
        const __m512i s = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
        return _mm512_permutexvar_ps(s, _mm512_castps128_ps512(by_s));
    }

    template <int TOKENS>
    static void add(
        const Sparse24Int4& w, const uint16_t* x, int64_t stride, int64_t first, int64_t count, float* sums
    ) {
        for (int64_t block = 0; block < w.tiles(); ++block)
            for (int64_t strip = first / 16; strip * 16 < first + count; ++strip)
                for (int g = 0; g < 8; ++g) {
                    const __m512i words = _mm512_loadu_si512(w.words_of(block, strip, g));
                    const __m512i metadata = _mm512_loadu_si512(w.metadata_of(block, strip, g));
                    for (int h = 0; h < 2; ++h) {
                        const int64_t row = strip * 16 + g + 8 * h;
                        if (row >= first + count) break;
                        row_of_block<TOKENS>(
                            w, words, metadata, block, row, h, x + block * TILE, stride,
                            sums + (row - first) * TOKENS * WIDTH
                        );
                    }
                }
    }

    template <int TOKENS>
    static inline void row_of_block(
        const Sparse24Int4& w, __m512i words, __m512i metadata, int64_t block, int64_t row, int h, const uint16_t* x,
        int64_t stride, float* sums
    ) {
        __m512 part[TOKENS];
        for (int m = 0; m < TOKENS; ++m) part[m] = _mm512_setzero_ps();
        for (int q = 0; q < 2; ++q) {
            const __m512i kept = _mm512_permutexvar_epi16(code_bits(words, h, q), _mm512_load_si512(CODES.of));
            const Plane made(kept, positions(metadata, block, h, q));
            for (int m = 0; m < TOKENS; ++m) {
                const uint16_t* from = x + m * stride + 64 * q;
                part[m] = _mm512_dpbf16_ps(part[m], (__m512bh)made.low, (__m512bh)_mm512_load_si512(from));
                part[m] = _mm512_dpbf16_ps(part[m], (__m512bh)made.high, (__m512bh)_mm512_load_si512(from + STEP));
            }
        }
        const __m512 scale = scales(w, block, row);
        for (int m = 0; m < TOKENS; ++m)
            _mm512_store_ps(sums + m * WIDTH, _mm512_fmadd_ps(part[m], scale, _mm512_load_ps(sums + m * WIDTH)));
    }
};

// Left factors for matrix.h: each product code - 8 by scale is rounded to bfloat16.
struct Sparse24Int4Left {
    using Weight = Sparse24Int4;
    static constexpr int STEPS = TILE / STEP;
    static int64_t steps(const Sparse24Int4& w) { return w.tiles() * STEPS; }

    static inline void unpack(const Sparse24Int4& w, int64_t block, int64_t row, uint8_t* to) {
        const int g = int(row % 8), h = int(row % 16 / 8), span = w.group / STEP;
        const __m512i words = _mm512_loadu_si512(w.words_of(block, row / 16, g));
        const __m512i metadata = _mm512_loadu_si512(w.metadata_of(block, row / 16, g));
        __m512i kept[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int s = 0; s < STEPS; s += span) {
            const __m512i values = scaled(w.scale_of(block, s, row));
            const __mmask32 lanes = 0x01010101u * (((1u << 2 * span) - 1) << 2 * s);  // of columns from 32 s on
            for (int q = 0; q < 2; ++q)
                kept[q] = _mm512_mask_permutexvar_epi16(kept[q], lanes, code_bits(words, h, q), values);
        }
        for (int q = 0; q < 2; ++q) {
            const Plane made(kept[q], positions(metadata, block, h, q));
            _mm512_store_si512(to + 2 * q * LEFT_BYTES, made.low);
            _mm512_store_si512(to + (2 * q + 1) * LEFT_BYTES, made.high);
        }
    }

    static inline __m512i scaled(float scale) {
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(scale))));
    }

    // Eight fours of a half q, in the order of lanes.
    static inline __m512i taken(const uint16_t* x, int64_t step, int64_t columns) {
        const int64_t first = step / STEPS * TILE + step % STEPS / 2 * 16 + step % 2 * 8;
        const __m512i at = _mm512_add_epi64(_mm512_setr_epi64(0, 32, 64, 96, 4, 36, 68, 100), _mm512_set1_epi64(first));
        const __mmask8 exists = _mm512_cmplt_epi64_mask(at, _mm512_set1_epi64(columns));
        return _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), exists, at, x, 2);
    }
};

#endif
