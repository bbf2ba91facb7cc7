// The CPU kernels of `sparse24_linear`, which ../sparse24_linear/cpu.py calls.

#include "interface.h"
#include "sparse24.h"

struct Sparse24Format {
    using Weight = Sparse24;
    static Sparse24 weight(const void* a, const void* b, const void*, int64_t rows, int64_t columns, int, Half half) {
        return {static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), rows, columns, half};
    }

    static bool by_rows(const Product<Sparse24>& product, int threads) {
#ifdef HAS_EXPAND
        if (product.weight.half == BF16) return product_by_rows<Sparse24Rows>(product, threads);
#endif
        return product_by_rows<Sparse24Fours>(product, threads);
    }

#ifdef HAS_MATRIX
    static bool by_matrix(const Product<Sparse24>& product, int threads) {
        return product_by_matrix<Sparse24Left>(product, threads);
    }
#endif

    static void unpack(const Sparse24& weight, int64_t first, int64_t count, uint16_t* out) {
        for (int64_t r = 0; r < count; ++r) spread_row(weight, first + r, out + r * weight.columns);
    }
};

EXPORT_FORMAT(Sparse24Format)
