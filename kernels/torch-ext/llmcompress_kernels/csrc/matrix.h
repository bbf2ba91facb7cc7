// Many tokens with matrix instructions (AMX): Yᵀ = W Xᵀ in tiles of 16 rows by 16 tokens.
//
// The left factor of an instruction is 16 rows of 32 columns, a *step*, in bfloat16: one register of a row. The right
// factor is x with the same columns side by side in pairs, transposed, once per call. Sums stay in the tile registers,
// in float32, over all columns.
//
// While a thread multiplies 32 rows, it unpacks the 32 that follow into its other panel: few instructions keep the
// matrix unit busy, and between them the vector units are free. Tokens are taken in blocks whose x fits the second
// cache.
//
// A format is a struct Left:
//
//     Weight, STEPS                  with rows, columns, tiles() and steps(); steps of a tile
//     unpack(weight, tile, row, to)  the steps of a tile of a row, LEFT_BYTES apart
//     taken(x, step, columns)        the 16 pairs of x that belong to a step
#pragma once

#include "product.h"

#ifdef HAS_MATRIX

#include <sys/syscall.h>
#include <unistd.h>

constexpr int SIDE = 16;                   // rows or tokens of a tile register
constexpr int ROWS = 2 * SIDE;             // a thread's rows at once
constexpr int64_t TILE_WORDS = 256;        // of 32 bits: a tile register
constexpr int64_t X_BYTES = 1 << 20;       // of x in a block of tokens

// Intrinsics of tile registers do not tell the compiler what memory they read and write.
inline void memory_is_used() { __asm__ volatile("" ::: "memory"); }

// Whether the system lets this process use tile registers; Linux wants to be asked, and asking again is harmless.
inline bool matrix_is_allowed() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = SIDE;
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

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

// x of 16 tokens, [steps][pairs 16][tokens 16] of 32 bits; tokens that do not exist are zero.
template <class Left>
void pack_tokens(const Product<typename Left::Weight>& p, int64_t token, uint32_t* out) {
    const int64_t left = p.tokens - token;
    for (int64_t step = 0; step < p.weight.steps(); ++step) {
        __m512 r[16];
        for (int m = 0; m < SIDE; ++m) {
            const uint16_t* x = p.x + (token + m) * p.stride;
            r[m] = m < left ? _mm512_castsi512_ps(Left::taken(x, step, p.weight.columns)) : _mm512_setzero_ps();
        }
        transpose(r);
        for (int j = 0; j < SIDE; ++j) _mm512_store_ps(out + step * TILE_WORDS + j * SIDE, r[j]);
    }
}

// Rows as left factors: 32 rows into [steps][2][16 rows][64 bytes], a tile of columns of a row at a time.
template <class Left>
class Unpacker {
  public:
    explicit Unpacker(const typename Left::Weight& weight) : w(weight) {}

    void start(int64_t first_row, uint8_t* panel) {
        first = first_row, out = panel, done = 0, total = first_row < w.rows ? w.tiles() * ROWS : 0;
    }
    void some(int count) {
        for (int i = 0; i < count && done < total; ++i, ++done) one(done / ROWS, int(done % ROWS));
    }
    void rest() {
        for (; done < total; ++done) one(done / ROWS, int(done % ROWS));
    }

  private:
    const typename Left::Weight& w;
    int64_t first = 0, done = 0, total = 0;
    uint8_t* out = nullptr;

    inline void one(int64_t tile, int row) {
        const int64_t n = first + row < w.rows ? first + row : w.rows - 1;  // outputs of rows beyond are not stored
        Left::unpack(w, tile, n, out + tile * Left::STEPS * LEFT_BYTES + row * 64);
    }
};

// 32 rows times 16 * TILES tokens. x: packed tokens, 16 after 16 `apart` words. sums [2][TILES][16 rows][16 tokens].
// After each step, `unpacker` does some of its work.
template <int TILES, class Unpack>
void multiply(
    const uint8_t* panel, const uint32_t* x, int64_t apart, int64_t steps, float* sums, Unpack& unpacker, int some
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, panel + step * LEFT_BYTES, 64);
        _tile_loadd(6, x + step * TILE_WORDS, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, panel + step * LEFT_BYTES + SIDE * 64, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (TILES == 2) {
            _tile_loadd(7, x + apart + step * TILE_WORDS, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        unpacker.some(some);
    }
    memory_is_used();
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILES * TILE_WORDS, 64);
    if (TILES == 2) {
        _tile_stored(2, sums + TILE_WORDS, 64);
        _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    }
    memory_is_used();
}

// Sums of 16 rows by 16 tokens, [16 rows][16 tokens] -> y, with bias, as far as there are such rows and tokens.
template <class W>
void store_tile(const Product<W>& p, const float* sums, int64_t first, int64_t token) {
    const int64_t rows = p.weight.rows - first, tokens = p.tokens - token;
    if (rows <= 0) return;
    const __mmask16 mask = rows < SIDE ? (1u << rows) - 1 : 0xFFFF;
    __m512 r[16];
    for (int i = 0; i < SIDE; ++i) r[i] = _mm512_load_ps(sums + i * SIDE);
    transpose(r);
    __m512 bias = _mm512_setzero_ps();
    if (p.bias) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.bias + first));
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    for (int m = 0; m < SIDE && m < tokens; ++m) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(r[m], bias));
        _mm256_mask_storeu_epi16(p.y + (token + m) * p.weight.rows + first, mask, half);
    }
}

// Tokens token .. token + count of the rows of a range; x: packed tokens from `token` on.
template <class Left>
void matrix_range(
    const Product<typename Left::Weight>& p, const uint32_t* x, int64_t token, int64_t count, Range rows,
    uint8_t* panels
) {
    const int64_t steps = p.weight.steps(), apart = steps * TILE_WORDS;
    const int64_t panel_bytes = p.weight.tiles() * Left::STEPS * LEFT_BYTES;
    const int64_t passes = (count + 2 * SIDE - 1) / (2 * SIDE);
    const int some = int((p.weight.tiles() * ROWS + passes * steps - 1) / (passes * steps));
    alignas(64) float sums[4 * TILE_WORDS];
    Unpacker<Left> unpacker(p.weight);
    unpacker.start(rows.first, panels);
    unpacker.rest();
    for (int64_t first = rows.first, turn = 0; first < rows.last; first += ROWS, ++turn) {
        const uint8_t* panel = panels + turn % 2 * panel_bytes;
        memory_is_used();
        unpacker.start(first + ROWS < rows.last ? first + ROWS : p.weight.rows, panels + (turn + 1) % 2 * panel_bytes);
        for (int64_t m = 0; m < count; m += 2 * SIDE) {
            const uint32_t* from = x + m / SIDE * apart;
            if (count - m > SIDE)
                multiply<2>(panel, from, apart, steps, sums, unpacker, some);
            else
                multiply<1>(panel, from, apart, steps, sums, unpacker, some);
            const int tiles = count - m > SIDE ? 2 : 1;
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < tiles; ++j)
                    store_tile(p, sums + (i * tiles + j) * TILE_WORDS, first + i * SIDE, token + m + j * SIDE);
        }
        unpacker.rest();
    }
}

// y = x Wᵀ + bias of bfloat16. False if there is no memory for panels and x.
template <class Left>
bool product_by_matrix(const Product<typename Left::Weight>& p, int threads) {
    const auto& w = p.weight;
    const int64_t apart = w.steps() * TILE_WORDS, panel_bytes = w.tiles() * Left::STEPS * LEFT_BYTES;
    const int64_t tiles = (p.tokens + SIDE - 1) / SIDE, fitting = X_BYTES / (apart * 4) / 2 * 2;
    const int64_t at_once = fitting < 2 ? 2 : fitting;
    Buffer<uint32_t> x(tiles * apart);
    Buffer<uint8_t> panels(2 * panel_bytes * threads);
    if (!x.data || !panels.data) return false;
    parallel(threads, [&](int thread, int of) {
        const Range packed = share(tiles, 1, thread, of);
        for (int64_t i = packed.first; i < packed.last; ++i) pack_tokens<Left>(p, i * SIDE, x.data + i * apart);
    });
    parallel(threads, [&](int thread, int of) {
        configure_tiles();
        const Range rows = share(w.rows, ROWS, thread, of);
        uint8_t* own = panels.data + 2 * panel_bytes * thread;
        for (int64_t tile = 0; tile < tiles && rows.first < rows.last; tile += at_once) {
            const int64_t left = p.tokens - tile * SIDE, token = tile * SIDE;
            const int64_t count = left < at_once * SIDE ? left : at_once * SIDE;
            const uint32_t* from = x.data + tile * apart;
            matrix_range<Left>(p, from, token, count, rows, own);
        }
        _tile_release();
    });
    return true;
}

#endif
