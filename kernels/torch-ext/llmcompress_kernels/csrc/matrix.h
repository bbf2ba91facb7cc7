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
// Threads share the rows, and wait for each other when x is packed. With many tokens for each they share the tokens:
// each unpacks all of the weight, which costs as much as 24 tokens, and x stays in the cache of who has packed it.
//
// While a thread multiplies a panel, it unpacks the next one and stores the last sums: few instructions keep the matrix
// unit busy, and between them the vector units are free. That work is cut into parts of a few dozen instructions,
// one after each product, since a CPU looks only a few products ahead.
//
// A panel and the x that passes it do not fit into the first cache together, so x is loaded past it.
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
constexpr int64_t OWN_TOKENS = 128;  // for each thread, from which on threads share the tokens and not the rows
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
#pragma GCC unroll 16
        for (int m = 0; m < SIDE; ++m) {
            const uint16_t* x = p.x + (token + m) * p.stride;
            r[m] = m < left ? _mm512_castsi512_ps(Left::taken(x, step, p.weight.columns)) : _mm512_setzero_ps();
        }
        transpose(r);
#pragma GCC unroll 16
        for (int j = 0; j < SIDE; ++j) _mm512_store_ps(out + step * TILE_WORDS + j * SIDE, r[j]);
    }
}

// Left factors, 32 rows into [steps][2][16 rows][64 bytes], a tile of columns of a row at a time, evenly spread.
template <class Left>
class Unpacker {
  public:
    explicit Unpacker(const typename Left::Weight& weight) : w(weight) {}

    // Tiles first_tile .. last_tile of 32 rows from first_row on, all done after `calls` calls of some().
    void start(int64_t first_row, int64_t first_tile, int64_t last_tile, uint8_t* panel, int64_t calls) {
        row = first_row, tile = first_tile, out = panel, total = (last_tile - first_tile) * ROWS;
        done = due = 0, spread = calls;
    }
    void some() {
        for (due += total; due >= spread && done < total; due -= spread, ++done) one(done / ROWS, int(done % ROWS));
    }
    void rest() {
        for (; done < total; ++done) one(done / ROWS, int(done % ROWS));
    }

  private:
    const typename Left::Weight& w;
    int64_t row = 0, tile = 0, total = 0, done = 0, due = 0, spread = 1;
    uint8_t* out = nullptr;

    inline void one(int64_t t, int r) {
        const int64_t n = row + r < w.rows ? row + r : w.rows - 1;  // outputs of rows beyond are not stored
        Left::unpack(w, tile + t, n, out + t * Left::STEPS * LEFT_BYTES + r * 64);
    }
};

// Sums of 32 rows by 32 tokens, [2][32 rows][16 tokens] -> y, with bias; eight tokens at a time, in six parts.
template <class W>
class Storer {
  public:
    explicit Storer(const Product<W>& product) : p(product) {}

    void start(const float* from, int64_t first_row, int64_t first_token) {
        if (first_row != row) take_bias(first_row);
        sums = from, row = first_row, token = first_token, part = 0;
        last = p.tokens < first_token + TOKENS ? p.tokens : first_token + TOKENS;
    }
    // One part; false if there is none left.
    bool some() {
        if (token >= last) return false;
        if (part < 4)
            mix(part);
        else
            store(part - 4);
        if (++part == 6) part = 0, token += 8, sums += token % SIDE ? 8 : ROWS * SIDE - 8;
        return true;
    }
    void rest() {
        while (some()) continue;
    }

  private:
    const Product<W>& p;
    alignas(64) float bias[ROWS];
    __m512i mixed[8];  // [two halves of the tokens][rows 2 i, 2 i + 1 of 8 each]: pairs of 4 tokens in each 128 bits
    const float* sums = nullptr;
    int64_t row = -1, token = 0, last = 0;
    int part = 0;
    __mmask32 exist = 0;

    void take_bias(int64_t first) {
        const int64_t rows = p.weight.rows - first;
        *reinterpret_cast<Floats*>(bias) = p.bias_of(first, rows);
        *reinterpret_cast<Floats*>(bias + SIDE) = rows > SIDE ? p.bias_of(first + SIDE, rows - SIDE) : Floats{};
        exist = rows < ROWS ? (__mmask32(1) << rows) - 1 : ~__mmask32(0);
    }

    // Rows r and r + 8 of eight tokens.
    inline __m512 two_rows(int r) const {
        const __m256 low = _mm256_add_ps(_mm256_load_ps(sums + r * SIDE), _mm256_set1_ps(bias[r]));
        const __m256 high = _mm256_add_ps(_mm256_load_ps(sums + (r + 8) * SIDE), _mm256_set1_ps(bias[r + 8]));
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
    inline __m512i four_rows(int r) const { return (__m512i)_mm512_cvtne2ps_pbh(two_rows(SIDE + r), two_rows(r)); }

    inline void mix(int i) {
        const __m512i a = four_rows(2 * i), b = four_rows(2 * i + 1);
        mixed[i] = _mm512_unpacklo_epi16(a, b), mixed[4 + i] = _mm512_unpackhi_epi16(a, b);
    }
    inline void store(int half) {
        const __m512i* m = mixed + 4 * half;
        const __m512i a = _mm512_unpacklo_epi32(m[0], m[1]), b = _mm512_unpacklo_epi32(m[2], m[3]);
        const __m512i c = _mm512_unpackhi_epi32(m[0], m[1]), d = _mm512_unpackhi_epi32(m[2], m[3]);
        store(4 * half, _mm512_unpacklo_epi64(a, b)), store(4 * half + 1, _mm512_unpackhi_epi64(a, b));
        store(4 * half + 2, _mm512_unpacklo_epi64(c, d)), store(4 * half + 3, _mm512_unpackhi_epi64(c, d));
    }
    inline void store(int64_t m, __m512i halves) const {
        if (token + m < last) _mm512_mask_storeu_epi16(p.y + (token + m) * p.weight.rows + row, exist, halves);
    }
};

// What is done while the matrix unit is busy.
template <class Left>
struct Beside {
    static constexpr int UNPACKS = 2;  // in a step

    Storer<typename Left::Weight> storer;
    Unpacker<Left> unpacker;
    explicit Beside(const Product<typename Left::Weight>& p) : storer(p), unpacker(p.weight) {}
};

// sums [4 tiles] += 32 rows times 16 * TILES tokens, or = if they are the first columns. x: packed tokens, 16 after 16
// `apart` words.
template <int TILES, class Left>
void multiply(
    const uint8_t* panel, const uint32_t* x, int64_t apart, int64_t steps, bool first, float* sums, Beside<Left>& beside
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
        _tile_stream_loadd(6, x + step * TILE_WORDS, 64);
        _tile_dpbf16ps(0, 4, 6);
        beside.storer.some();
        _tile_loadd(5, panel + step * LEFT_BYTES + SIDE * 64, 64);
        _tile_dpbf16ps(1, 5, 6);
        beside.unpacker.some();
        if (TILES == 2) {
            _tile_stream_loadd(7, x + apart + step * TILE_WORDS, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        beside.storer.some();
        if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
        beside.unpacker.some();
    }
    memory_is_used();
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_WORDS, 64);
    _tile_stored(2, sums + 2 * TILE_WORDS, 64);
    _tile_stored(3, sums + 3 * TILE_WORDS, 64);
    memory_is_used();
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
// two panels, and sums [rows / 32][count / 32][4 tiles], or [2][4 tiles] where none wait.
template <class Left>
void matrix_block(
    const Product<typename Left::Weight>& p, const uint32_t* x, int64_t token, int64_t count, Range rows,
    uint8_t* panels, float* sums
) {
    const Cut<Left> cut(p.weight);
    const int64_t apart = cut.steps * TILE_WORDS, passes = (count + TOKENS - 1) / TOKENS;
    const int64_t blocks = (rows.last - rows.first + ROWS - 1) / ROWS, turns = cut.panels * blocks;
    Beside<Left> beside(p);
    const auto start = [&](int64_t turn, int64_t calls) {
        const int64_t panel = turn / blocks, first = rows.first + turn % blocks * ROWS;
        uint8_t* to = panels + turn % 2 * cut.bytes();
        beside.unpacker.start(first, cut.first_tile(panel), cut.last_tile(panel), to, calls);
    };
    start(0, 1);
    beside.unpacker.rest();
    for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t panel = turn / blocks, steps = cut.steps_of(panel);
        if (turn + 1 < turns) start(turn + 1, Beside<Left>::UNPACKS * passes * steps);
        for (int64_t pass = 0; pass < passes; ++pass) {
            const uint32_t* from = x + 2 * pass * apart + cut.first_step(panel) * TILE_WORDS;
            // sums that do not wait for other columns need no place of their own, but for being stored meanwhile
            const int64_t place = cut.panels == 1 ? (turn * passes + pass) % 2 : turn % blocks * passes + pass;
            float* to = sums + place * 4 * TILE_WORDS;
            const uint8_t* left = panels + turn % 2 * cut.bytes();
            if (count - pass * TOKENS > SIDE)
                multiply<2>(left, from, apart, steps, panel == 0, to, beside);
            else
                multiply<1>(left, from, apart, steps, panel == 0, to, beside);
            beside.storer.rest();
            if (panel + 1 == cut.panels)
                beside.storer.start(to, rows.first + turn % blocks * ROWS, token + pass * TOKENS);
        }
        beside.unpacker.rest();
    }
    beside.storer.rest();
}

// y = x Wᵀ + bias of bfloat16. False if there is no memory for panels, sums and x.
template <class Left>
bool product_by_matrix(const Product<typename Left::Weight>& p, int threads) {
    const Cut<Left> cut(p.weight);
    const int64_t apart = cut.steps * TILE_WORDS, tiles = (p.tokens + SIDE - 1) / SIDE;
    const int64_t many = cut.tokens() < p.tokens ? cut.tokens() : (p.tokens + TOKENS - 1) / TOKENS * TOKENS;
    const int64_t sums_each = cut.panels > 1 ? MANY_ROWS * many : 2 * 4 * TILE_WORDS;
    Buffer<uint32_t, 0> x(tiles * apart);
    Buffer<uint8_t, 1> panels(2 * cut.bytes() * threads);
    Buffer<float, 2> sums(sums_each * threads);
    if (!x.data || !panels.data || !sums.data) return false;
    const auto pack = [&](Range some) {
        for (int64_t i = some.first; i < some.last; ++i) pack_tokens<Left>(p, i * SIDE, x.data + i * apart);
    };
    const auto multiply_part = [&](int thread, Range rows, Range tokens) {
        configure_tiles();
        for (int64_t token = tokens.first; token < tokens.last; token += many)
            for (int64_t first = rows.first; first < rows.last; first += cut.rows(p.weight)) {
                const int64_t end = first + cut.rows(p.weight), left = tokens.last - token;
                matrix_block<Left>(
                    p, x.data + token / SIDE * apart, token, left < many ? left : many,
                    {first, end < rows.last ? end : rows.last}, panels.data + 2 * cut.bytes() * thread,
                    sums.data + sums_each * thread
                );
            }
        _tile_release();
    };
    const int worth = useful(threads, p.weight.rows * p.weight.columns, p.tokens + 24, MATRIX_EACH);
    if (p.tokens >= OWN_TOKENS * worth) {
        parallel(worth, [&](int thread, int of) {
            const Range own = share(p.tokens, TOKENS, thread, of);
            pack({own.first / SIDE, (own.last + SIDE - 1) / SIDE});
            multiply_part(thread, {0, p.weight.rows}, own);
        });
        return true;
    }
    parallel(useful(threads, p.weight.columns, p.tokens, PACK_EACH), [&](int thread, int of) {
        pack(share(tiles, 1, thread, of));
    });
    parallel(worth, [&](int thread, int of) {
        multiply_part(thread, share(p.weight.rows, ROWS, thread, of), {0, p.tokens});
    });
    return true;
}

#endif
