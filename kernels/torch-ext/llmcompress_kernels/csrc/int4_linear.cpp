// The CPU kernels of `int4_linear`, which ../int4_linear/cpu.py calls.

#include "interface.h"
#include "unpack.h"

struct Int4Format {
    using Weight = Int4;
    static Int4 weight(
        const void* a, const void* b, const void* c, int64_t rows, int64_t columns, int group, Half half
    ) {
        const auto* words = static_cast<const int32_t*>(a);
        return {words, static_cast<const uint16_t*>(b), static_cast<const uint8_t*>(c), rows, columns, group, half};
    }

    static bool by_rows(const Product<Int4>& product, int threads) {
        switch (product.weight.group) {
            case 32: return product_by_rows<Int4Rows<1>>(product, threads);
            case 64: return product_by_rows<Int4Rows<2>>(product, threads);
            default: return product_by_rows<Int4Rows<4>>(product, threads);
        }
    }

#ifdef HAS_MATRIX
    static bool by_matrix(const Product<Int4>& product, int threads) {
        switch (product.weight.group) {
            case 32: return product_by_matrix<Int4Left<1>>(product, threads);
            case 64: return product_by_matrix<Int4Left<2>>(product, threads);
            default: return product_by_matrix<Int4Left<4>>(product, threads);
        }
    }
#endif

    static void unpack(const Int4& weight, int64_t first, int64_t count, uint16_t* out) {
        if (weight.half == BF16)
            unpack_rows<BF16>(weight, first, count, out);
        else
            unpack_rows<F16>(weight, first, count, out);
    }
};

EXPORT_FORMAT(Int4Format)
