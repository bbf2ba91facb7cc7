// The C interface of a library, the same for every format; ../compiled.py calls it. Nothing here needs torch's headers,
// so that it compiles in seconds. Pointers and sizes have been checked by the caller.
//
// A library is a file that includes this one and then says EXPORT_FORMAT(Format). A Format has
//
//     Weight, weight(a, b, c, rows, columns, group, half)   from its three tensors, in the order of `tensors_of`
//     by_rows(product, threads)                             few tokens; false without memory
//     by_matrix(product, threads)                           many tokens of bfloat16, under HAS_MATRIX
//     unpack(weight, first, count, out)                     rows first .. first + count, [count, columns]
#pragma once

#include "matrix.h"

// Whether many tokens may be multiplied by matrix instructions: the CPU has them, and the system lets us use them.
inline bool matrix_can_be_used() {
#ifdef HAS_MATRIX
    return matrix_is_allowed();
#else
    return false;
#endif
}

template <class Format>
bool multiply_by(int many, const Product<typename Format::Weight>& product, int threads) {
#ifdef HAS_MATRIX
    if (many) return Format::by_matrix(product, threads);
#endif
    return !many && Format::by_rows(product, threads);
}

template <class Format>
void unpack_by(const typename Format::Weight& weight, int64_t first, int64_t count, uint16_t* out, int threads) {
    parallel(threads, [&](int thread, int of) {
        const Range range = share(count, 1, thread, of);
        Format::unpack(weight, first + range.first, range.last - range.first, out + range.first * weight.columns);
    });
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// half: 0 bfloat16, 1 float16. `multiply`: y = x Wᵀ + bias for few tokens (many: 0) or by matrix instructions
// (many: 1); returns 0, or 1 without memory.
#define EXPORT_FORMAT(Format)                                                                                        \
    EXPORT int has_matrix() { return matrix_can_be_used(); }                                                         \
    EXPORT int multiply(                                                                                             \
        int many, int half, const void* a, const void* b, const void* c, int64_t rows, int64_t columns,              \
        int64_t group, int threads, const uint16_t* x, int64_t stride, const uint16_t* bias, uint16_t* y,            \
        int64_t tokens                                                                                               \
    ) {                                                                                                              \
        const auto weight = Format::weight(a, b, c, rows, columns, int(group), Half(half));                          \
        return !multiply_by<Format>(many, {weight, x, stride, bias, y, tokens}, threads);                            \
    }                                                                                                                \
    EXPORT void unpack(                                                                                              \
        int half, const void* a, const void* b, const void* c, int64_t rows, int64_t columns, int64_t group,         \
        int threads, uint16_t* out, int64_t first, int64_t count                                                     \
    ) {                                                                                                              \
        unpack_by<Format>(                                                                                           \
            Format::weight(a, b, c, rows, columns, int(group), Half(half)), first, count, out, threads               \
        );                                                                                                           \
    }
