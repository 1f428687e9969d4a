// Matrices of numbers of 2 or 4 bytes, in bytes of any alignment.

// Elements of the squares that are turned one after the other: their lines are written whole.
#define MATRIX_SQUARE 32

// Writes a square of a matrix, height by width, by columns.
#define MATRIX_TURN(type, height, width)                                                           \
    for (size_t r = 0; r < (height); r++) {                                                        \
        memcpy(line, from + r * n_columns * sizeof(type), (width) * sizeof(type));                 \
        for (size_t c = 0; c < (width); c++)                                                       \
            square[c][r] = line[c];                                                                \
    }                                                                                              \
    for (size_t c = 0; c < (width); c++)                                                           \
        memcpy(to + c * n_rows * sizeof(type), square[c], (height) * sizeof(type))

// Defines what writes a matrix by columns, in squares of side elements: whole does one that is not
// cut off by an edge, from its first element to where that goes.
#define MATRIX_TRANSPOSE(name, type, side, whole)                                                  \
    static void name(const uint8_t *source, uint8_t *out, size_t n_rows, size_t n_columns)         \
    {                                                                                              \
        type square[side][side], line[side];                                                       \
        for (size_t row = 0; row < n_rows; row += side)                                            \
            for (size_t column = 0; column < n_columns; column += side) {                          \
                const uint8_t *from = source + (row * n_columns + column) * sizeof(type);          \
                uint8_t *to = out + (column * n_rows + row) * sizeof(type);                        \
                const size_t below = n_rows - row, right = n_columns - column;                     \
                if (below >= side && right >= side) {                                              \
                    whole;                                                                         \
                } else {                                                                           \
                    const size_t height = below < side ? below : side;                             \
                    const size_t width = right < side ? right : side;                              \
                    MATRIX_TURN(type, height, width);                                              \
                }                                                                                  \
            }                                                                                      \
    }

MATRIX_TRANSPOSE(matrix_transpose_4, uint32_t, MATRIX_SQUARE,
                 MATRIX_TURN(uint32_t, MATRIX_SQUARE, MATRIX_SQUARE))

#if defined(__SSE2__)
#include <emmintrin.h>

// Elements of 2 bytes in a register, and of the squares that are made of these.
#define MATRIX_LANES 8
#define MATRIX_WIDE 64

// Writes 8 rows of 8 elements by columns. The strides are in bytes.
static inline void matrix_turn_lanes(const uint8_t *from, size_t stride, uint8_t *to, size_t to_stride)
{
    __m128i r[8], a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = _mm_loadu_si128((const __m128i *)(from + i * stride));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm_unpacklo_epi16(r[i], r[i + 1]);
        a[i + 1] = _mm_unpackhi_epi16(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm_unpacklo_epi32(a[i], a[i + 2]);
        b[i + 1] = _mm_unpackhi_epi32(a[i], a[i + 2]);
        b[i + 2] = _mm_unpacklo_epi32(a[i + 1], a[i + 3]);
        b[i + 3] = _mm_unpackhi_epi32(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(to + 2 * i * to_stride), _mm_unpacklo_epi64(b[i], b[i + 4]));
        _mm_storeu_si128((__m128i *)(to + (2 * i + 1) * to_stride), _mm_unpackhi_epi64(b[i], b[i + 4]));
    }
}

// Writes a whole square by columns. The strides are in bytes.
static void matrix_turn_square(const uint8_t *from, size_t stride, uint8_t *to, size_t to_stride)
{
    uint16_t square[MATRIX_WIDE][MATRIX_WIDE];
    // The processor does not see by itself which lines are written next: there are many.
    for (size_t c = 0; c < MATRIX_WIDE; c++) {
        __builtin_prefetch(to + c * to_stride, 1, 2);
        __builtin_prefetch(to + c * to_stride + sizeof square[0] / 2, 1, 2);
    }
    for (size_t r = 0; r < MATRIX_WIDE; r += MATRIX_LANES)
        for (size_t c = 0; c < MATRIX_WIDE; c += MATRIX_LANES)
            matrix_turn_lanes(from + r * stride + 2 * c, stride, (uint8_t *)&square[c][r], sizeof square[0]);
    for (size_t c = 0; c < MATRIX_WIDE; c++)
        memcpy(to + c * to_stride, square[c], sizeof square[0]);
}

// Whole squares are turned with registers; what is left at the edges, element by element.
MATRIX_TRANSPOSE(matrix_transpose_2, uint16_t, MATRIX_WIDE,
                 matrix_turn_square(from, n_columns * 2, to, n_rows * 2))
#else
MATRIX_TRANSPOSE(matrix_transpose_2, uint16_t, MATRIX_SQUARE,
                 MATRIX_TURN(uint16_t, MATRIX_SQUARE, MATRIX_SQUARE))
#endif

// Writes a matrix, which is given by rows, by columns. Its elements have 2 or 4 bytes.
PAGES_API void matrix_transpose(const uint8_t *source, uint8_t *out, size_t n_rows, size_t n_columns, int element)
{
    if (element == 2)
        matrix_transpose_2(source, out, n_rows, n_columns);
    else
        matrix_transpose_4(source, out, n_rows, n_columns);
}

// Copies width bytes of each line of a matrix into those of another one.
PAGES_API void matrix_copy_lines(const uint8_t *source, size_t source_stride, uint8_t *out, size_t out_stride, size_t n_line, size_t width)
{
    for (size_t line = 0; line < n_line; line++)
        memcpy(out + line * out_stride, source + line * source_stride, width);
}
