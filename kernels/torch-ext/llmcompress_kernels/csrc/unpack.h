// Many tokens without matrix instructions of our own: the weight as 16-bit floats, panel by panel, for torch's product.
#pragma once

#include "int4.h"

// 16 or 8 floats -> as many 16-bit ones.
template <Half HALF>
inline void store_half(Floats::F value, uint16_t* out) {
#if defined(__AVX512F__)
    if (HALF == F16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#else
    if (HALF == F16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    typedef uint16_t H __attribute__((vector_size(2 * Floats::LANES)));
    const Floats::U bits = (Floats::U)value;
    const H rounded = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, H);
    std::memcpy(out, &rounded, sizeof rounded);
}

// Steps of a tile of a row, 32 columns each: `steps` of them, of one group.
template <Half HALF>
inline void unpack_steps(const int32_t* words, int step, int steps, float scale, int zero, uint16_t* out) {
    const float* offset = OFFSETS.of[zero];
    for (int plane = 2 * step; plane < 2 * (step + steps); ++plane) {
        const int shift = plane_shift(plane), before = plane < 5 ? 0 : 12;
        for (int lane = 0; lane < WIDTH; lane += Floats::LANES) {
            const Floats::U word = (Floats::U) * reinterpret_cast<const Floats::I*>(words + lane) >> before;
            const Floats::I bits = ((Floats::I)word & (0xF << shift)) | ((150 - shift) << 23);
            store_half<HALF>(((Floats::F)bits - offset[plane]) * scale, out + (plane - 2 * step) * WIDTH + lane);
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
    for (int64_t step = 0; step < w.steps(); step += steps) {
        const int64_t tile = step / STEPS, at = w.group_of(step) * w.rows;
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

inline void unpack(const Int4& w, int64_t first, int64_t count, uint16_t* out, int threads) {
    parallel(threads, [&](int thread, int of) {
        const Range range = share(count, 1, thread, of);
        uint16_t* to = out + range.first * w.columns;
        if (w.half == BF16)
            unpack_rows<BF16>(w, first + range.first, range.last - range.first, to);
        else
            unpack_rows<F16>(w, first + range.first, range.last - range.first, to);
    });
}

#ifdef HAS_PAIRS

// Left factors for matrix.h: each product code - zero by scale is rounded to bfloat16.
template <int STEPS_PER_GROUP>
struct Int4Left {
    using Weight = Int4;
    static constexpr int STEPS = TILE / STEP;

    static inline void unpack(const Int4& w, int64_t tile, int64_t row, uint8_t* to) {
        const __m512i word = _mm512_loadu_si512(w.words + (tile * w.rows + row) * WIDTH);
#pragma GCC unroll 4
        for (int g = 0; g < STEPS / STEPS_PER_GROUP; ++g) {
            const int64_t at = w.group_of(tile * STEPS + g * STEPS_PER_GROUP) * w.rows + row;
            const float scale = from_bits(uint32_t(w.scale[at]) << 16);
            const __m512i values = scaled_values<BF16>(scale, w.zero ? float(w.zero[at]) : 8.0f);
#pragma GCC unroll 4
            for (int step = g * STEPS_PER_GROUP; step < (g + 1) * STEPS_PER_GROUP; ++step) {
                const __m512i index = _mm512_multishift_epi64_epi8(step_bits(step), word);
                _mm512_store_si512(to + step * LEFT_BYTES, _mm512_permutexvar_epi16(index, values));
            }
        }
    }

    static inline __m512i taken(const uint16_t* x, int64_t step, int64_t) { return pairs(x + step * STEP); }
};

#endif
