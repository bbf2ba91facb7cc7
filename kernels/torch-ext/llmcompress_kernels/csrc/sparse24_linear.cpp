// The C interface of the CPU kernels of `sparse24_linear`, which ../sparse24_linear/cpu.py calls; see int4_linear.cpp.

#include "matrix.h"
#include "sparse24.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether `sparse24_product` may be called, for bfloat16: bit 0 for few tokens, bit 1 for many.
EXPORT int sparse24_has() {
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
EXPORT int sparse24_product(
    int many, const uint16_t* x, int64_t stride, const uint16_t* values, const uint16_t* index, const uint16_t* bias,
    uint16_t* y, int64_t tokens, int64_t rows, int64_t columns, int threads
) {
#ifdef HAS_EXPAND
    const Product<Sparse24> product{{values, index, rows, columns, BF16}, x, stride, bias, y, tokens};
#ifdef HAS_MATRIX
    if (many) return !product_by_matrix<Sparse24Left>(product, threads);
#endif
    return !product_by_rows<Sparse24Rows>(product, threads);
#else
    return 1;
#endif
}

// out [count, columns] = rows first .. first + count of the weight, of either 16-bit type.
EXPORT void sparse24_spread(
    const uint16_t* values, const uint16_t* index, uint16_t* out, int64_t first, int64_t count, int64_t rows,
    int64_t columns, int threads
) {
    const Sparse24 weight{values, index, rows, columns, BF16};
    parallel(threads, [&](int thread, int of) {
        const Range range = share(count, 1, thread, of);
        for (int64_t r = range.first; r < range.last; ++r) spread_row(weight, first + r, out + r * columns);
    });
}
