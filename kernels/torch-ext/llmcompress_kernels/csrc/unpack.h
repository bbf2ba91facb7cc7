// Many tokens without matrix instructions of our own: the weight as 16-bit floats, panel by panel, for torch's product.
#pragma once

#include "rows.h"

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

// Rows first .. first + count of the weight, [count, columns]. Each product code - zero by scale is rounded once.
template <Half HALF>
void unpack_rows(const Weight& w, int64_t first, int64_t count, uint16_t* out) {
    for (int64_t step = 0; step < w.steps(); ++step) {
        const int64_t tile = step / STEPS, at = w.group_of(step) * w.rows;
        const int plane = int(step % STEPS) * 2;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t n = first + r;
            const float scale = to_float(w.scale[at + n], HALF);
            const float* offset = OFFSETS.of[w.zero ? w.zero[at + n] : 8];
            const int32_t* words = w.words + (tile * w.rows + n) * WIDTH;
            for (int p = plane; p < plane + 2; ++p) {
                const int shift = plane_shift(p), before = p < 5 ? 0 : 12;
                for (int lane = 0; lane < WIDTH; lane += Floats::LANES) {
                    const Floats::I word = *reinterpret_cast<const Floats::I*>(words + lane);
                    const Floats::I bits = (((Floats::I)((Floats::U)word >> before)) & (0xF << shift)) | ((150 - shift) << 23);
                    const Floats::F value = ((Floats::F)bits - offset[p]) * scale;
                    store_half<HALF>(value, out + r * w.columns + tile * TILE + p * WIDTH + lane);
                }
            }
        }
    }
}

inline void unpack(const Weight& w, int64_t first, int64_t count, uint16_t* out, int threads) {
    parallel(threads, [&](int thread, int of) {
        const Range range = share(count, 1, thread, of);
        uint16_t* to = out + range.first * w.columns;
        if (w.half == BF16)
            unpack_rows<BF16>(w, first + range.first, range.last - range.first, to);
        else
            unpack_rows<F16>(w, first + range.first, range.last - range.first, to);
    });
}
