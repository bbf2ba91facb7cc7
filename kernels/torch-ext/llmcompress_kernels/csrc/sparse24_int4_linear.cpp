// The C interface of the CPU kernels of `sparse24_int4_linear`; see sparse24_linear.cpp, whose functions these mirror.

#include "matrix.h"
#include "sparse24_int4.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether `sparse24_int4_product` may be called, for bfloat16: bit 0 for few tokens, bit 1 for many.
EXPORT int sparse24_int4_has() {
#ifdef HAS_EXPAND
#ifdef HAS_MATRIX
    return 1 + 2 * matrix_is_allowed();
#else
    return 1;
#endif
#else
    return 0;
#endif
}

// y = x Wᵀ + bias for few tokens (many: 0) or by matrix instructions (many: 1). Returns 0, or 1 without memory.
EXPORT int sparse24_int4_product(
    int many, const uint16_t* x, int64_t stride, const int32_t* words, const int32_t* metadata, const uint16_t* scale,
    const uint16_t* bias, uint16_t* y, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads
) {
#ifdef HAS_EXPAND
    const Sparse24Int4 weight{words, metadata, scale, rows, columns, int(group), BF16};
    const Product<Sparse24Int4> product{weight, x, stride, bias, y, tokens};
#ifdef HAS_MATRIX
    if (many) return !product_by_matrix<Sparse24Int4Left>(product, threads);
#endif
    return !product_by_rows<Sparse24Int4Rows>(product, threads);
#else
    return 1;
#endif
}

// out [count, columns] = rows first .. first + count of the weight. half: 0 bfloat16, 1 float16.
EXPORT void sparse24_int4_spread(
    int half, const int32_t* words, const int32_t* metadata, const uint16_t* scale, uint16_t* out, int64_t first,
    int64_t count, int64_t rows, int64_t columns, int64_t group, int threads
) {
    const Sparse24Int4 weight{words, metadata, scale, rows, columns, int(group), Half(half)};
    parallel(threads, [&](int thread, int of) {
        const Range range = share(count, 1, thread, of);
        for (int64_t r = range.first; r < range.last; ++r) spread_row(weight, first + r, out + r * columns);
    });
}
