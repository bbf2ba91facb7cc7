// Vectors as wide as the CPU's, and what is done with them that has no operator in C++.
#pragma once

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#define HAS_512 1
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// LANES 16-bit floats -> as many floats.
inline Floats floats_of(const uint16_t* from, Half half) {
#ifdef HAS_512
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (half == F16) return (Floats)_mm512_cvtph_ps(bits);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (half == F16) return (Floats)_mm256_cvtph_ps(bits);
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#endif
}

// And back, to nearest, ties to even.
inline void store_halves(Floats value, Half half, uint16_t* to) {
    if (half == F16) {
#ifdef HAS_512
        const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#else
        const __m128i bits = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#endif
        std::memcpy(to, &bits, sizeof bits);
        return;
    }
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    const Unsigned bits = (Unsigned)value, nan = Unsigned{} + 0x7FC0;
    const Unsigned rounded = value == value ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : nan;
    const Halves narrow = __builtin_convertvector(rounded, Halves);
    std::memcpy(to, &narrow, sizeof narrow);
}

// LANES small integers -> as many of 32 bits.
inline Ints ints_of(const uint16_t* from) {
#ifdef HAS_512
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

inline Ints ints_of(const uint8_t* from) {
#ifdef HAS_512
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
}

// The 16-bit floats in the lower halves of the lanes. `pairs` may have others in the upper ones.
inline Floats low_floats(Ints pairs, Half half) {
    if (half == BF16) return (Floats)(pairs << 16);
#ifdef HAS_512
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)pairs));
#else
    const __m256i narrow = _mm256_packus_epi32((__m256i)(pairs & 0xFFFF), _mm256_setzero_si256());
    return (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08)));
#endif
}

// 0, 1, 2 ..
inline Ints lane_numbers() {
    Ints found;
    for (int i = 0; i < LANES; ++i) found[i] = i;
    return found;
}

// Four values, again and again.
inline Ints repeated(int32_t a, int32_t b, int32_t c, int32_t d) {
#ifdef HAS_512
    return (Ints)_mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
#else
    return (Ints)_mm256_broadcastsi128_si256(_mm_setr_epi32(a, b, c, d));
#endif
}

// sum + a.low * b.low + a.high * b.high of the signed 16-bit halves of each lane.
inline Ints multiply_pairs(Ints sum, Ints a, Ints b) {
#if defined(HAS_512) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(HAS_512)
    return (Ints)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}

#if defined(HAS_512) && defined(__AVX512VNNI__)
#define HAS_BYTES 1

// sum + a . b of the four bytes of each lane, those of a without and those of b with a sign.
inline Ints multiply_bytes(Ints sum, Ints a, Ints b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#endif

#ifdef HAS_512

inline void transpose(__m512 (&r)[16]) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    // now r[4 i + k] has, in its 128 bits l, column 4 l + k of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        const __m512 even_low = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xDD);
        const __m512 even_high = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xDD);
        t[k] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        t[8 + k] = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
        t[4 + k] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        t[12 + k] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 16 words of each of LANES rows -> out[j]: word j of all of them.
inline void turn(const int32_t* words, Ints* out) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(words + i * WIDTH);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) out[i] = (Ints)r[i];
}

#else

inline void turn(const int32_t* words, Ints* out) {
    for (int part = 0; part < WIDTH; part += 8) {
        __m256 r[8], t[8];
        for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(words + i * WIDTH + part));
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; ++j) {
                r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
                r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
            }
        for (int k = 0; k < 4; ++k) {
            out[part + k] = (Ints)_mm256_permute2f128_ps(r[k], r[4 + k], 0x20);
            out[part + 4 + k] = (Ints)_mm256_permute2f128_ps(r[k], r[4 + k], 0x31);
        }
    }
}

#endif
