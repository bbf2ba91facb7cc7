// The CPU kernels of `sparse24_int4_linear`, which ../sparse24_int4_linear/cpu.py calls.

#include "interface.h"
#include "sparse24_int4.h"

struct Sparse24Int4Format {
    using Weight = Sparse24Int4;
    static Sparse24Int4 weight(
        const void* a, const void* b, const void* c, int64_t rows, int64_t columns, int group, Half half
    ) {
        const auto *words = static_cast<const int32_t*>(a), *metadata = static_cast<const int32_t*>(b);
        return {words, metadata, static_cast<const uint16_t*>(c), rows, columns, group, half};
    }

    static bool by_rows(const Product<Sparse24Int4>& product, int threads) {
#ifdef HAS_EXPAND
        if (product.weight.half == BF16) return product_by_rows<Sparse24Int4Rows>(product, threads);
#endif
        return product_by_rows<Sparse24Int4Fours>(product, threads);
    }

#ifdef HAS_MATRIX
    static bool by_matrix(const Product<Sparse24Int4>& product, int threads) {
        return product_by_matrix<Sparse24Int4Left>(product, threads);
    }
#endif

    static void unpack(const Sparse24Int4& weight, int64_t first, int64_t count, uint16_t* out) {
        for (int64_t r = 0; r < count; ++r) spread_row(weight, first + r, out + r * weight.columns);
    }
};

EXPORT_FORMAT(Sparse24Int4Format)
