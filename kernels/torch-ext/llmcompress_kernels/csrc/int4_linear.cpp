// The C interface of the CPU kernels of `int4_linear`, which ../int4_linear/cpu.py calls. Nothing here needs torch's
// headers, so that it compiles in seconds. Pointers and sizes have been checked by the caller.

#include "matrix.h"
#include "unpack.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether `int4_matrix` may be called: the CPU has matrix instructions for bfloat16, and the system lets us use them.
EXPORT int int4_has_matrix() {
#ifdef HAS_MATRIX
    return matrix_is_allowed();
#else
    return 0;
#endif
}

// y = x Wᵀ + bias for few tokens. half: 0 bfloat16, 1 float16. Returns 0, or 1 without memory.
EXPORT int int4_rows(
    int half, const uint16_t* x, int64_t stride, const int32_t* words, const uint16_t* scale, const uint8_t* zero,
    const uint16_t* bias, uint16_t* y, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads
) {
    const Int4 weight{words, scale, zero, rows, columns, int(group), Half(half)};
    const Product<Int4> product{weight, x, stride, bias, y, tokens};
#ifdef HAS_PAIRS
    if (half == BF16) return !product_by_rows<Int4Rows<Pairs>>(product, threads);
#endif
    return !product_by_rows<Int4Rows<Floats>>(product, threads);
}

// The same for many tokens, bfloat16 only. Weights are rounded to it.
EXPORT int int4_matrix(
    const uint16_t* x, int64_t stride, const int32_t* words, const uint16_t* scale, const uint8_t* zero,
    const uint16_t* bias, uint16_t* y, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads
) {
#ifdef HAS_MATRIX
    const Int4 weight{words, scale, zero, rows, columns, int(group), BF16};
    const Product<Int4> product{weight, x, stride, bias, y, tokens};
    switch (group) {
        case 32: return !product_by_matrix<Int4Left<1>>(product, threads);
        case 64: return !product_by_matrix<Int4Left<2>>(product, threads);
        default: return !product_by_matrix<Int4Left<4>>(product, threads);
    }
#else
    return 1;
#endif
}

// out [count, columns] = rows first .. first + count of the weight.
EXPORT void int4_unpack(
    int half, const int32_t* words, const uint16_t* scale, const uint8_t* zero, uint16_t* out, int64_t first,
    int64_t count, int64_t rows, int64_t columns, int64_t group, int threads
) {
    unpack({words, scale, zero, rows, columns, int(group), Half(half)}, first, count, out, threads);
}
