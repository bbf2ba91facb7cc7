// What the CPU kernels share: int4 weights, conversions of 16-bit floats, aligned memory, threads.
//
// Layout of words, scale and zero: ../int4_linear/layout.py. A tile is 128 columns of a row, 16 words of 8 planes; a
// plane is 16 columns. A *step* is two planes, 32 columns: it never lies in two groups, and fills one 512-bit register
// with 16-bit values.
//
// Compiled with -march=native: what the CPU lacks is left out by the preprocessor, so there is no dispatch at run time.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this CPU lacks AVX2, FMA or F16C"
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define HAS_PAIRS 1  // products of two bfloat16 in one instruction, and permutations of 16-bit lanes and of bits
#endif
#if defined(HAS_PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define HAS_MATRIX 1  // 16 x 16 outputs of 32 bfloat16 columns in one instruction
#endif

constexpr int TILE = 128;   // columns
constexpr int WIDTH = 16;   // words of a tile row, columns of a plane
constexpr int STEP = 32;    // columns
constexpr int STEPS = TILE / STEP;
constexpr int LEFT_BYTES = 32 * 64;  // of a step of 32 rows in the panels of matrix.h

enum Half : int { BF16 = 0, F16 = 1 };

struct Int4 {
    const int32_t* words;   // [tiles, rows, 16]
    const uint16_t* scale;  // [columns / group, rows]
    const uint8_t* zero;    // the same, or null: 8 everywhere
    int64_t rows, columns;  // columns: a multiple of 32
    int group;              // 32, 64 or 128 columns
    Half half;              // type of scale, x, bias and y

    int64_t tiles() const { return (columns + TILE - 1) / TILE; }
    // Group of a column. Columns beyond the last, whose x is zero, take the last group: it can be read.
    int64_t group_at(int64_t column) const { return (column < columns ? column : columns - 1) / group; }
};

// ((word & (15 << s)) | (150 - s) << 23), read as float32, is 2^(23 - s) + code: bit s of its mantissa counts for 1.
// Subtracting 2^(23 - s) + zero is exact. Planes 5 to 7 lie inside the mantissa after one shift by 12.
constexpr int plane_shift(int plane) { return plane < 5 ? 4 * plane : 4 * plane - 12; }

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(uint16_t bits, Half half) {
    return half == BF16 ? from_bits(uint32_t(bits) << 16) : _cvtsh_ss(bits);
}

// Round to nearest, ties to even.
inline uint16_t to_half(float value, Half half) {
    if (half == F16) return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// 64-byte aligned memory that the calling thread keeps for its next call, unless it is large: asking the system for it
// each time takes longer than a small product. One per SLOT and call; `data` is null if there is none.
constexpr int64_t KEPT_BYTES = 8 << 20;

struct Kept {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Kept() { std::free(data); }
};

template <class T, int SLOT>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count) : bytes((count * int64_t(sizeof(T)) + 127) / 64 * 64) {
        Kept& kept = mine();
        if (kept.bytes < bytes) {
            std::free(kept.data);
            kept.data = std::aligned_alloc(64, bytes);
            kept.bytes = kept.data ? bytes : 0;
        }
        data = static_cast<T*>(kept.data);
    }
    ~Buffer() {
        if (bytes <= KEPT_BYTES) return;
        std::free(mine().data);
        mine().data = nullptr;
        mine().bytes = 0;
    }
    Buffer(const Buffer&) = delete;

  private:
    int64_t bytes;
    static Kept& mine() {
        static thread_local Kept kept;
        return kept;
    }
};

struct Range {
    int64_t first, last;
};

// Part `index` of `of` equal parts of 0 .. count, whole multiples of `unit`.
inline Range share(int64_t count, int64_t unit, int index, int of) {
    const int64_t units = (count + unit - 1) / unit;
    const auto at = [&](int64_t i) { return units * i / of * unit < count ? units * i / of * unit : count; };
    return {at(index), at(index + 1)};
}

// What compilers make of OpenMP's `parallel`. Not compiled with OpenMP, and linked with none: it is the one that torch
// has loaded, whose threads these are. A second one would bring threads of its own.
extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

// run(thread, threads) on that many threads, or on fewer.
template <class Run>
void parallel(int threads, const Run& run) {
    if (threads <= 1) return run(0, 1);
    const auto one = [](void* data) { (*static_cast<const Run*>(data))(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(one, const_cast<Run*>(&run), unsigned(threads), 0);
}
