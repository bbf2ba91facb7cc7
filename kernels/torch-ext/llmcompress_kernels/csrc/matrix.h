// Many tokens with matrix instructions (AMX): Yᵀ = W Xᵀ in tiles of 16 rows by 16 tokens.
//
// The left factor of an instruction is 16 rows of 32 columns, a *step*, in bfloat16: one register of a row. The right
// factor is x with the same columns side by side in pairs, transposed, once per call. Sums are in float32.
//
// Blocks are chosen for the caches. A *panel*, 32 rows by up to 640 columns of the weight, is unpacked into the first
// one and multiplied by all tokens of a block, of whose x the same columns stay in the second one while the panels of
// 256 rows pass. Their sums wait there for the next columns. A weight is so unpacked once per 256 tokens; one of at
// most 640 columns, whose sums need not wait, once per 800 or more.
//
// While a thread multiplies a panel, it unpacks the next one: few instructions keep the matrix unit busy, and between
// them the vector units are free.
//
// A format is a struct Left:
//
//     Weight, STEPS                  with rows, columns and tiles(); steps of a tile
//     steps(weight)                  that there are: the last tile may have fewer
//     unpack(weight, tile, row, to)  the steps of a tile of a row, LEFT_BYTES apart
//     taken(x, step, columns)        the 16 pairs of x that belong to a step
#pragma once

#include "product.h"

#ifdef HAS_MATRIX

#include <sys/syscall.h>
#include <unistd.h>

constexpr int SIDE = 16;             // rows or tokens of a tile register
constexpr int ROWS = 2 * SIDE;       // of a panel
constexpr int TOKENS = 2 * SIDE;     // that are multiplied at once
constexpr int PANEL_STEPS = 20;      // at most: 40 KiB, most of a first cache
constexpr int64_t MANY_ROWS = 256;   // whose sums wait in the second cache
constexpr int64_t MANY_TOKENS = 256;
constexpr int64_t X_BYTES = 1 << 20;  // of a block of tokens, if no sums wait: half of a second cache
constexpr int64_t MATRIX_EACH = 1 << 22;  // weights times tokens; unpacking them counts as 24 tokens
constexpr int64_t TILE_WORDS = 256;  // of 32 bits: a tile register

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

// x of 16 tokens, [steps][pairs 16][tokens 16] of 32 bits; tokens that do not exist are zero.
template <class Left>
void pack_tokens(const Product<typename Left::Weight>& p, int64_t token, uint32_t* out) {
    const int64_t left = p.tokens - token;
    for (int64_t step = 0; step < Left::steps(p.weight); ++step) {
        __m512 r[16];
        for (int m = 0; m < SIDE; ++m) {
            const uint16_t* x = p.x + (token + m) * p.stride;
            r[m] = m < left ? _mm512_castsi512_ps(Left::taken(x, step, p.weight.columns)) : _mm512_setzero_ps();
        }
        transpose(r);
        for (int j = 0; j < SIDE; ++j) _mm512_store_ps(out + step * TILE_WORDS + j * SIDE, r[j]);
    }
}

// Left factors, 32 rows into [steps][2][16 rows][64 bytes], a tile of columns of a row at a time.
template <class Left>
class Unpacker {
  public:
    explicit Unpacker(const typename Left::Weight& weight) : w(weight) {}

    // Tiles first_tile .. last_tile of 32 rows from first_row on.
    void start(int64_t first_row, int64_t first_tile, int64_t last_tile, uint8_t* panel) {
        row = first_row, tile = first_tile, out = panel, done = 0, total = (last_tile - first_tile) * ROWS;
    }
    void some(int count) {
        for (int i = 0; i < count && done < total; ++i, ++done) one(done / ROWS, int(done % ROWS));
    }
    void rest() {
        for (; done < total; ++done) one(done / ROWS, int(done % ROWS));
    }

  private:
    const typename Left::Weight& w;
    int64_t row = 0, tile = 0, done = 0, total = 0;
    uint8_t* out = nullptr;

    inline void one(int64_t t, int r) {
        const int64_t n = row + r < w.rows ? row + r : w.rows - 1;  // outputs of rows beyond are not stored
        Left::unpack(w, tile + t, n, out + t * Left::STEPS * LEFT_BYTES + r * 64);
    }
};

// sums [4 tiles] += 32 rows times 16 * TILES tokens, or = if they are the first columns. x: packed tokens, 16 after 16
// `apart` words. After each step, `unpacker` does some of its work.
template <int TILES, class Unpack>
void multiply(
    const uint8_t* panel, const uint32_t* x, int64_t apart, int64_t steps, bool first, float* sums, Unpack& unpacker,
    int some
) {
    memory_is_used();
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE_WORDS, 64);
        _tile_loadd(2, sums + 2 * TILE_WORDS, 64);
        _tile_loadd(3, sums + 3 * TILE_WORDS, 64);
    }
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
    _tile_stored(1, sums + TILE_WORDS, 64);
    _tile_stored(2, sums + 2 * TILE_WORDS, 64);
    _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    memory_is_used();
}

// Rows 2 i and 2 i + 1 of 16 tokens, side by side in bfloat16.
inline __m512 row_pairs(const float* sums, const float* bias, int i) {
    const __m512 even = _mm512_add_ps(_mm512_load_ps(sums + 2 * i * SIDE), _mm512_set1_ps(bias[2 * i]));
    const __m512 odd = _mm512_add_ps(_mm512_load_ps(sums + (2 * i + 1) * SIDE), _mm512_set1_ps(bias[2 * i + 1]));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return (__m512)_mm512_permutexvar_epi16(at, both);
}

// Sums of 16 rows by 16 tokens, [16 rows][16 tokens] -> y, with bias, as far as there are such rows and tokens.
template <class W>
void store_tile(const Product<W>& p, const float* sums, int64_t first, int64_t token) {
    const int64_t rows = p.weight.rows - first, tokens = p.tokens - token;
    if (rows <= 0) return;
    const __mmask16 mask = rows < SIDE ? (1u << rows) - 1 : 0xFFFF;
    alignas(64) float bias[SIDE];
    *reinterpret_cast<Floats*>(bias) = p.bias_of(first, rows);
    __m512d quads[8];  // [two halves of the rows][4]: in its 128 bits l, token 4 l + k
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
        __m512 r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i] = row_pairs(sums, bias, 4 * h + i);
        const __m512d a = (__m512d)_mm512_unpacklo_ps(r[0], r[1]), b = (__m512d)_mm512_unpacklo_ps(r[2], r[3]);
        const __m512d c = (__m512d)_mm512_unpackhi_ps(r[0], r[1]), d = (__m512d)_mm512_unpackhi_ps(r[2], r[3]);
        quads[4 * h] = _mm512_unpacklo_pd(a, b), quads[4 * h + 1] = _mm512_unpackhi_pd(a, b);
        quads[4 * h + 2] = _mm512_unpacklo_pd(c, d), quads[4 * h + 3] = _mm512_unpackhi_pd(c, d);
    }
    const auto store = [&](int m, __m256i half) {
        if (m < tokens) _mm256_mask_storeu_epi16(p.y + (token + m) * p.weight.rows + first, mask, half);
    };
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i one = (__m512i)_mm512_permutex2var_pd(quads[k], low, quads[4 + k]);
        const __m512i two = (__m512i)_mm512_permutex2var_pd(quads[k], high, quads[4 + k]);
        store(k, _mm512_castsi512_si256(one));
        store(4 + k, _mm512_extracti64x4_epi64(one, 1));
        store(8 + k, _mm512_castsi512_si256(two));
        store(12 + k, _mm512_extracti64x4_epi64(two, 1));
    }
}

// How the columns of a weight are cut into panels, as equal as whole tiles allow.
template <class Left>
struct Cut {
    int64_t tiles, steps;  // of the weight
    int64_t panel_tiles, panels;

    explicit Cut(const typename Left::Weight& w) : tiles(w.tiles()), steps(Left::steps(w)) {
        const int64_t most = PANEL_STEPS / Left::STEPS, least = (tiles + most - 1) / most;
        panel_tiles = (tiles + least - 1) / least;
        panels = (tiles + panel_tiles - 1) / panel_tiles;
    }
    int64_t first_tile(int64_t panel) const { return panel * panel_tiles; }
    int64_t last_tile(int64_t panel) const {
        const int64_t end = (panel + 1) * panel_tiles;
        return end < tiles ? end : tiles;
    }
    int64_t first_step(int64_t panel) const { return first_tile(panel) * Left::STEPS; }
    int64_t steps_of(int64_t panel) const {
        const int64_t end = last_tile(panel) * Left::STEPS;
        return (end < steps ? end : steps) - first_step(panel);
    }
    int64_t bytes() const { return panel_tiles * Left::STEPS * LEFT_BYTES; }
    // Of a block. Where one panel has all columns, no sums wait, and all of the second cache is for x.
    int64_t tokens() const { return panels > 1 ? MANY_TOKENS : X_BYTES / (steps * STEP * 2) / TOKENS * TOKENS; }
    int64_t rows(const typename Left::Weight& w) const { return panels > 1 ? MANY_ROWS : w.rows; }
};

// Tokens token .. token + count of some rows; x: packed tokens from `token` on. Memory of the thread:
// two panels, and sums [rows / 32][count / 32][4 tiles], or [4 tiles] where none wait.
template <class Left>
void matrix_block(
    const Product<typename Left::Weight>& p, const uint32_t* x, int64_t token, int64_t count, Range rows,
    uint8_t* panels, float* sums
) {
    const Cut<Left> cut(p.weight);
    const int64_t apart = cut.steps * TILE_WORDS, passes = (count + TOKENS - 1) / TOKENS;
    const int64_t blocks = (rows.last - rows.first + ROWS - 1) / ROWS, turns = cut.panels * blocks;
    Unpacker<Left> unpacker(p.weight);
    const auto start = [&](int64_t turn) {
        const int64_t panel = turn / blocks, first = rows.first + turn % blocks * ROWS;
        unpacker.start(first, cut.first_tile(panel), cut.last_tile(panel), panels + turn % 2 * cut.bytes());
    };
    start(0);
    unpacker.rest();
    for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t panel = turn / blocks, steps = cut.steps_of(panel);
        const int some = int((cut.panel_tiles * ROWS + passes * steps - 1) / (passes * steps));
        if (turn + 1 < turns) start(turn + 1);
        for (int64_t pass = 0; pass < passes; ++pass) {
            const uint32_t* from = x + 2 * pass * apart + cut.first_step(panel) * TILE_WORDS;
            // sums that do not wait for other columns need no place of their own
            float* to = cut.panels == 1 ? sums : sums + (turn % blocks * passes + pass) * 4 * TILE_WORDS;
            const uint8_t* left = panels + turn % 2 * cut.bytes();
            if (count - pass * TOKENS > SIDE)
                multiply<2>(left, from, apart, steps, panel == 0, to, unpacker, some);
            else
                multiply<1>(left, from, apart, steps, panel == 0, to, unpacker, some);
            if (panel + 1 < cut.panels) continue;
            for (int part = 0; part < 4; ++part) {
                const int64_t row = rows.first + turn % blocks * ROWS + part % 2 * SIDE;
                const int64_t m = pass * TOKENS + part / 2 * SIDE;
                if (m < count) store_tile(p, to + part * TILE_WORDS, row, token + m);
            }
        }
        unpacker.rest();
    }
}

// y = x Wᵀ + bias of bfloat16. False if there is no memory for panels, sums and x.
template <class Left>
bool product_by_matrix(const Product<typename Left::Weight>& p, int threads) {
    const Cut<Left> cut(p.weight);
    const int64_t apart = cut.steps * TILE_WORDS, tiles = (p.tokens + SIDE - 1) / SIDE;
    const int64_t many = cut.tokens() < p.tokens ? cut.tokens() : (p.tokens + TOKENS - 1) / TOKENS * TOKENS;
    const int64_t sums_each = cut.panels > 1 ? MANY_ROWS * many : 4 * TILE_WORDS;
    Buffer<uint32_t, 0> x(tiles * apart);
    Buffer<uint8_t, 1> panels(2 * cut.bytes() * threads);
    Buffer<float, 2> sums(sums_each * threads);
    if (!x.data || !panels.data || !sums.data) return false;
    parallel(useful(threads, p.weight.columns, p.tokens, PACK_EACH), [&](int thread, int of) {
        const Range packed = share(tiles, 1, thread, of);
        for (int64_t i = packed.first; i < packed.last; ++i) pack_tokens<Left>(p, i * SIDE, x.data + i * apart);
    });
    parallel(useful(threads, p.weight.rows * p.weight.columns, p.tokens + 24, MATRIX_EACH), [&](int thread, int of) {
        configure_tiles();
        const Range rows = share(p.weight.rows, ROWS, thread, of);
        for (int64_t token = 0; token < p.tokens; token += many)
            for (int64_t first = rows.first; first < rows.last; first += cut.rows(p.weight)) {
                const int64_t end = first + cut.rows(p.weight), left = p.tokens - token;
                matrix_block<Left>(
                    p, x.data + token / SIDE * apart, token, left < many ? left : many,
                    {first, end < rows.last ? end : rows.last}, panels.data + 2 * cut.bytes() * thread,
                    sums.data + sums_each * thread
                );
            }
        _tile_release();
    });
    return true;
}

#endif
