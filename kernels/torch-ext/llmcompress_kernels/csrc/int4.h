// Int4 weights for few tokens, and for many on CPUs without matrix instructions: products of 16-bit integers.
//
// x is turned into integers of 16 bits with a power of two per token and 128 columns, the largest that lets none
// overflow. Two products of such pairs are one instruction everywhere: vpdpwssd (VNNI), or vpmaddwd and an addition
// (AVX2, AVX-512). That is 32 products at 512 bits, as many as vdpbf16ps has, which takes twice the time on the CPU
// that this was measured on, and many lack. Codes need no conversion, and the sum of a group of columns is exact.
//
// What is lost: a value of bfloat16 or float16 is exact down to 1/128 or 1/16 of the largest of its 128 columns; a
// smaller one is off by at most 2^-15 of the largest, which y's own rounding exceeds unless the largest is some hundred
// times the others and its weight is zero. 8-bit x (vpdpbusd) would double the speed, but is off by 2^-8 of the largest: in
// groups of 32 columns that is about 0.5% of y, three times the error of a linear in bfloat16, and twice is our limit.
//
// Rows are the lanes of a register: words of LANES rows are transposed when they are read.
#pragma once

#include "product.h"

#include <type_traits>

// What a tile of a token is multiplied with, 32 bits at a time. As pairs: columns k and k + 16 of a step, k = 0 .. 15.
// As bytes: [2 halves of the tile][2][8][upper bytes, lower bytes], see Int4Bytes.
struct Int4Tokens {
    int32_t words[TILE / 2];
    int32_t sums[STEPS];  // of a group
    float scale;          // x = pairs * scale
    int32_t unused[11];   // up to a multiple of 64 bytes
};

// Largest magnitude of a tile as bits of a float: those of values that are not negative are in their order.
inline uint32_t largest(const float* x) {
    uint32_t most = 0;
    for (int k = 0; k < TILE; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    return most;
}

// Half of each lane: codes of columns k and k + 16 of a step, of words k.
inline Ints code_pairs(Ints words, int step) {
#if defined(HAS_512) && defined(__AVX512VBMI__)
    // byte `step` of a word holds both codes; bits from any position on come to the lower byte of a half
    const int64_t word = (8 * step) | (8 * step + 4) << 16;
    const __m512i from = _mm512_set1_epi64(word | (word + 32 + (32 << 16)) << 32);
    return (Ints)_mm512_multishift_epi64_epi8(from, (__m512i)words) & 0x000F000F;
#else
    const Unsigned byte = (Unsigned)words >> (8 * step);
    return (Ints)((byte & 0xF) | ((byte & 0xF0) << 12));
#endif
}

// Words, scales and zeros of a tile of LANES rows, of which those beyond the last of the block are not there.
struct Int4Strip {
    const int32_t* words;
    const uint16_t* scale[STEPS];
    const uint8_t* zero[STEPS];

    Int4Strip(const Int4& w, int64_t tile, int groups, int64_t first, int64_t count) {
        words = w.words + (tile * w.rows + first) * WIDTH;
        if (count < LANES) words = copied(words, count * WIDTH, kept_words);
        for (int g = 0; g < groups; ++g) {
            const int64_t at = w.group_at(tile * TILE + g * (TILE / groups)) * w.rows + first;
            scale[g] = count < LANES ? copied(w.scale + at, count, kept_scale[g]) : w.scale + at;
            zero[g] = w.zero ? w.zero + at : nullptr;
            if (w.zero && count < LANES) zero[g] = copied(w.zero + at, count, kept_zero[g]);
        }
    }
    Int4Strip(const Int4Strip&) = delete;

  private:
    int32_t kept_words[LANES * WIDTH];
    uint16_t kept_scale[STEPS][LANES];
    uint8_t kept_zero[STEPS][LANES];

    template <class T, size_t N>
    static const T* copied(const T* from, int64_t count, T (&to)[N]) {
        std::memset(to, 0, sizeof to);
        std::memcpy(to, from, count * sizeof(T));
        return to;
    }
};

// Sums of a token that do not wait for each other.
constexpr int chains(int tokens) { return tokens < 4 ? 4 / tokens : 1; }

template <int CHAINS>
inline Ints total(const Ints (&chain)[CHAINS]) {
    Ints sum = chain[0];
#pragma GCC unroll 4
    for (int i = 1; i < CHAINS; ++i) sum += chain[i];
    return sum;
}

// Products of pairs, of every group size and CPU.
struct Int4Pairs {
    static void pack(const int16_t* x, int32_t* to) {
        for (int step = 0; step < STEPS; ++step)
            for (int k = 0; k < WIDTH; ++k) {
                const int16_t *low = x + step * STEP + k, *high = low + WIDTH;
                to[step * WIDTH + k] = int32_t(uint32_t(uint16_t(*low)) | uint32_t(uint16_t(*high)) << 16);
            }
    }
    static inline void arrange(Ints*) {}

    // sum [TOKENS]: codes of a group times the integers of a tile.
    template <int TOKENS>
    static inline void multiply(
        const Ints* words, int group, int groups, const Int4Tokens* x, int64_t stride, Ints* sum
    ) {
        constexpr int CHAINS = chains(TOKENS);
        Ints chain[TOKENS][CHAINS] = {};
#pragma GCC unroll 4
        for (int step = group * STEPS / groups; step < (group + 1) * STEPS / groups; ++step)
            for (int first = 0; first < WIDTH; first += CHAINS)
#pragma GCC unroll 4
                for (int i = 0; i < CHAINS; ++i) {
                    const int k = first + i;
                    const Ints codes = code_pairs(words[k], step);
#pragma GCC unroll 8
                    for (int m = 0; m < TOKENS; ++m) {
                        const Ints taken = Ints{} + x[m * stride].words[step * WIDTH + k];
                        chain[m][i] = multiply_pairs(chain[m][i], codes, taken);
                    }
                }
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m) sum[m] = total<CHAINS>(chain[m]);
    }
};

#ifdef HAS_BYTES

// Products of four bytes, for groups of 64 columns and more. Nibbles become bytes by one mask each, where pairs take two
// instructions; a product by 16-bit x is one by its upper and one by its lower bytes, as many as by two pairs.
//
// For the four bytes of a lane to be of one group, the lower halves of words k and k + 8 are put side by side, and so
// are the upper ones: columns 0 .. 63 of the tile, and 64 .. 127.
struct Int4Bytes {
    // Columns of byte b of word k of a half of the tile; `odd`: of the upper nibbles.
    static int column(int half, int odd, int k, int b) {
        return half * TILE / 2 + (b % 2 * 2 + odd) * WIDTH + k + b / 2 * WIDTH / 2;
    }
    static void pack(const int16_t* x, int32_t* to) {
        for (int half = 0; half < 2; ++half)
            for (int odd = 0; odd < 2; ++odd)
                for (int k = 0; k < WIDTH / 2; ++k, to += 2) {
                    uint32_t upper = 0, lower = 0;
                    for (int b = 0; b < 4; ++b) {
                        const int value = x[column(half, odd, k, b)], low = int8_t(value & 0xFF);
                        upper |= uint32_t(uint8_t((value - low) >> 8)) << 8 * b;
                        lower |= uint32_t(uint8_t(low)) << 8 * b;
                    }
                    to[0] = int32_t(upper), to[1] = int32_t(lower);
                }
    }

    static inline void arrange(Ints* words) {
#pragma GCC unroll 8
        for (int k = 0; k < WIDTH / 2; ++k) {
            const __m512i one = (__m512i)words[k], two = (__m512i)words[k + WIDTH / 2];
            words[k] = (Ints)_mm512_mask_blend_epi16(0xAAAAAAAA, one, _mm512_slli_epi32(two, 16));
            words[k + WIDTH / 2] = (Ints)_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(one, 16), two);
        }
    }

    template <int TOKENS>
    static inline void multiply(
        const Ints* words, int group, int groups, const Int4Tokens* x, int64_t stride, Ints* sum
    ) {
        constexpr int CHAINS = chains(TOKENS);
        Ints upper[TOKENS][CHAINS] = {}, lower[TOKENS][CHAINS] = {};
#pragma GCC unroll 16
        for (int i = group * WIDTH / groups; i < (group + 1) * WIDTH / groups; ++i)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const Ints codes = (words[i] >> (4 * odd)) & 0x0F0F0F0F;
                const int at = ((i / (WIDTH / 2) * 2 + odd) * (WIDTH / 2) + i % (WIDTH / 2)) * 2;
#pragma GCC unroll 8
                for (int m = 0; m < TOKENS; ++m) {
                    const int32_t* taken = x[m * stride].words + at;
                    upper[m][i % CHAINS] = multiply_bytes(upper[m][i % CHAINS], codes, Ints{} + taken[0]);
                    lower[m][i % CHAINS] = multiply_bytes(lower[m][i % CHAINS], codes, Ints{} + taken[1]);
                }
            }
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m) sum[m] = (total<CHAINS>(upper[m]) << 8) + total<CHAINS>(lower[m]);
    }
};

#endif

// Form: how the integers of x lie, and how codes are multiplied with them.
template <int STEPS_PER_GROUP, class Form>
struct Int4Lanes : RowLanes {
    using Weight = Int4;
    using Packed = Int4Tokens;
    static constexpr int PER_TILE = 1, GROUPS = STEPS / STEPS_PER_GROUP;
    static constexpr int AT_ONCE = LANES / 2;  // sums of more would not fit the registers

    static void pack(const Int4& w, const uint16_t* x, Int4Tokens* out) {
        for (int64_t tile = 0; tile < w.tiles(); ++tile) {
            alignas(64) float values[TILE] = {};
            const int64_t left = w.columns - tile * TILE, columns = left < TILE ? left : TILE;
            for (int64_t k = 0; k < columns; k += LANES)
                *reinterpret_cast<Floats*>(values + k) = floats_of(x + tile * TILE + k, w.half);
            pack_tile(values, out[tile]);
        }
    }

    static void pack_tile(const float* x, Int4Tokens& out) {
        const uint32_t most = largest(x) >> 23;
        const uint32_t exponent = most < 15 ? 15 : most;  // so that scale is no subnormal number
        const float factor = from_bits((267 - exponent) << 23);  // the largest becomes 2^13 .. 2^14
        const bool finite = exponent < 255;
        out.scale = finite ? from_bits((exponent - 13) << 23) : from_bits(0x7FC00000);
        int16_t integers[TILE];
        for (int k = 0; k < TILE; ++k) {
            const float moved = x[k] * factor + 12582912.0f;  // 1.5 * 2^23 more: its lowest bits are those of an integer
            uint32_t bits;
            std::memcpy(&bits, &moved, sizeof bits);
            integers[k] = finite ? int16_t(bits & 0xFFFF) : 0;
        }
        Form::pack(integers, out.words);
        for (int g = 0; g < GROUPS; ++g) {
            int32_t sum = 0;
            for (int k = g * TILE / GROUPS; k < (g + 1) * TILE / GROUPS; ++k) sum += integers[k];
            out.sums[g] = sum;
        }
    }

    template <int TOKENS>
    static void add(const Int4& w, const Int4Tokens* x, int64_t stride, int64_t first, int64_t count, float* sums) {
        for (int64_t tile = 0; tile < w.tiles(); ++tile)
            for (int64_t r = 0; r < count; r += LANES) {
                const Int4Strip strip(w, tile, GROUPS, first + r, count - r < LANES ? count - r : LANES);
                if (tile + 1 < w.tiles())
                    for (int i = 0; i < LANES; ++i) _mm_prefetch(strip_of_next(w, tile, first + r + i), _MM_HINT_T0);
                add_strip<TOKENS>(strip, w.half, x + tile, stride, sums + r * TOKENS);
            }
    }

    static const int32_t* strip_of_next(const Int4& w, int64_t tile, int64_t row) {
        return w.words + ((tile + 1) * w.rows + row) * WIDTH;
    }

    // sums [TOKENS][LANES] += a tile of LANES rows times TOKENS tokens `stride` apart.
    template <int TOKENS>
    static inline void add_strip(
        const Int4Strip& strip, Half half, const Int4Tokens* x, int64_t stride, float* sums
    ) {
        alignas(64) Ints words[WIDTH];
        turn(strip.words, words);
        Form::arrange(words);
        Floats part[TOKENS] = {};
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) {
            const Ints zero = strip.zero[g] ? ints_of(strip.zero[g]) : Ints{} + 8;
            Ints sum[TOKENS];
            Form::template multiply<TOKENS>(words, g, GROUPS, x, stride, sum);
            const Floats scale = floats_of(strip.scale[g], half);
#pragma GCC unroll 8
            for (int m = 0; m < TOKENS; ++m) {
                const Ints exact = sum[m] - zero * x[m * stride].sums[g];
                part[m] += __builtin_convertvector(exact, Floats) * scale;
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m) *reinterpret_cast<Floats*>(sums + m * LANES) += part[m] * x[m * stride].scale;
    }
};

#ifdef HAS_BYTES
template <int STEPS_PER_GROUP>
using Int4Rows = Int4Lanes<STEPS_PER_GROUP, std::conditional_t<STEPS_PER_GROUP == 1, Int4Pairs, Int4Bytes>>;
#else
template <int STEPS_PER_GROUP>
using Int4Rows = Int4Lanes<STEPS_PER_GROUP, Int4Pairs>;
#endif
