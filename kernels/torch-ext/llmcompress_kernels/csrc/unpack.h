// Many tokens without matrix instructions of our own: the weight as 16-bit floats, panel by panel, for torch's product.
#pragma once

#include "int4.h"

// Steps of a tile of a row, 32 columns each: `steps` of them, of one group.
template <Half HALF>
inline void unpack_steps(const int32_t* words, int step, int steps, float scale, int zero, uint16_t* out) {
    for (int plane = 2 * step; plane < 2 * (step + steps); ++plane) {
        const int shift = plane_shift(plane), before = plane < 5 ? 0 : 12;
        const float offset = float(zero + (1 << (23 - shift)));
        for (int lane = 0; lane < WIDTH; lane += LANES) {
            const Unsigned word = *reinterpret_cast<const Unsigned*>(words + lane) >> before;
            const Ints bits = ((Ints)word & (0xF << shift)) | ((150 - shift) << 23);
            store_halves(((Floats)bits - offset) * scale, HALF, out + (plane - 2 * step) * WIDTH + lane);
        }
    }
}

#ifdef HAS_PAIRS

// (code - zero) * scale rounded to 16 bits, by code, twice: the permutation takes five bits of an index.
template <Half HALF>
inline __m512i scaled_values(float scale, float zero) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 exact = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    if (HALF == F16) return _mm512_broadcast_i64x4(_mm512_cvtps_ph(exact, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(exact));
}

// The same by look-up: byte `step` of every word goes to a lane of each half, and loses its lower nibble in the second.
template <Half HALF>
inline void unpack_steps(__m512i word, int step, int steps, __m512i values, uint16_t* out) {
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i words =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60));
    for (int i = 0; i < steps; ++i) {
        const __m512i byte = _mm512_add_epi16(words, _mm512_set1_epi16(int16_t(step + i)));
        const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(byte, word), shifts);
        _mm512_storeu_si512(out + i * STEP, _mm512_permutexvar_epi16(index, values));
    }
}

#endif

// Rows first .. first + count of the weight, [count, columns]. Each product code - zero by scale is rounded once.
template <Half HALF>
void unpack_rows(const Int4& w, int64_t first, int64_t count, uint16_t* out) {
    const int steps = w.group / STEP;
    for (int64_t step = 0; step < w.columns / STEP; step += steps) {
        const int64_t tile = step / STEPS, at = step / steps * w.rows;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t n = first + r;
            const float scale = to_float(w.scale[at + n], HALF);
            const int zero = w.zero ? w.zero[at + n] : 8;
            const int32_t* words = w.words + (tile * w.rows + n) * WIDTH;
            uint16_t* to = out + r * w.columns + step * STEP;
#ifdef HAS_PAIRS
            const __m512i values = scaled_values<HALF>(scale, float(zero));
            unpack_steps<HALF>(_mm512_loadu_si512(words), int(step % STEPS), steps, values, to);
#else
            unpack_steps<HALF>(words, int(step % STEPS), steps, scale, zero, to);
#endif
        }
    }
}

#ifdef HAS_PAIRS

// Left factors for matrix.h: each product code - zero by scale is rounded to bfloat16.
//
// A tile of more than 64 columns is four steps of columns 16 i and 64 + 16 i on, i = 0 .. 3: after a shift by 4 i, the
// codes of both are the lowest bits of the halves of every word, and index a table. Where the halves are of two groups,
// bit 4 of an index chooses between the two tables in one register. A last tile of 32 or 64 columns is one or two steps
// as they lie, or else they would be half empty.
template <int STEPS_PER_GROUP>
struct Int4Left {
    using Weight = Int4;
    static constexpr int STEPS = TILE / STEP;

    static int64_t steps(const Int4& w) {
        const int64_t left = w.columns % TILE;
        return w.columns / TILE * STEPS + (left > TILE / 2 ? STEPS : left / STEP);
    }

    static inline void unpack(const Int4& w, int64_t tile, int64_t row, uint8_t* to) {
        const __m512i word = _mm512_loadu_si512(w.words + (tile * w.rows + row) * WIDTH);
        if (w.columns - tile * TILE <= TILE / 2) return unpack_last(w, tile, row, word, to);
        constexpr int TABLES = STEPS_PER_GROUP == 1 ? 2 : 1;
#pragma GCC unroll 2
        for (int t = 0; t < TABLES; ++t) {
            const __m512 low = scaled(w, tile * TILE + t * STEP, row);
            const __m512 high = STEPS_PER_GROUP == 4 ? low : scaled(w, tile * TILE + TILE / 2 + t * STEP, row);
            const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
#pragma GCC unroll 4
            for (int i = t * STEPS / TABLES; i < (t + 1) * STEPS / TABLES; ++i) {
                __m512i index = _mm512_srli_epi16(word, 4 * i);
                if (STEPS_PER_GROUP < 4)
                    index = _mm512_ternarylogic_epi32(  // (index & 0x000F000F) | 0x00100000
                        index, _mm512_set1_epi32(0x000F000F), _mm512_set1_epi32(0x00100000), 0xEA
                    );
                _mm512_store_si512(to + i * LEFT_BYTES, _mm512_permutexvar_epi16(index, values));
            }
        }
    }

    static inline __m512 scaled(const Int4& w, int64_t column, int64_t row) {
        constexpr int64_t GROUP = STEPS_PER_GROUP * STEP;  // a constant: divisions are slow
        const int64_t at = (column < w.columns ? column : w.columns - 1) / GROUP * w.rows + row;
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 zero = _mm512_set1_ps(w.zero ? float(w.zero[at]) : 8.0f);
        return _mm512_mul_ps(_mm512_sub_ps(codes, zero), _mm512_set1_ps(from_bits(uint32_t(w.scale[at]) << 16)));
    }

    static inline void unpack_last(const Int4& w, int64_t tile, int64_t row, __m512i word, uint8_t* to) {
        for (int step = 0; tile * TILE + step * STEP < w.columns; ++step) {
            const __m512 exact = scaled(w, tile * TILE + step * STEP, row);
            const __m512i index = (__m512i)(code_pairs((Ints)word, step));
            _mm512_store_si512(to + step * LEFT_BYTES, _mm512_permutexvar_epi16(index, twice(exact)));
        }
    }

    static inline __m512i twice(__m512 values) { return (__m512i)_mm512_cvtne2ps_pbh(values, values); }

    static inline __m512i taken(const uint16_t* x, int64_t step, int64_t columns) {
        const int64_t first = step / STEPS * TILE, left = columns - first, i = step % STEPS;
        if (left <= TILE / 2) return pairs(x + first + i * STEP, x + first + i * STEP + WIDTH);
        const bool exists = TILE / 2 + i * WIDTH < left;
        return pairs(x + first + i * WIDTH, exists ? x + first + TILE / 2 + i * WIDTH : nullptr);
    }

    // Columns low .. low + 15 and high .. high + 15, or zeros, side by side.
    static inline __m512i pairs(const uint16_t* low, const uint16_t* high) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
        if (!high) return _mm512_cvtepu16_epi32(a);
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i other = _mm512_slli_epi32(_mm512_or_si512(lane, _mm512_set1_epi32(16)), 16);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        return _mm512_permutexvar_epi16(_mm512_or_si512(lane, other), both);
    }
};

#endif
