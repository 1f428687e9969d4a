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

#define MATRIX_TRANSPOSE(name, type)                                                               \
    static void name(const uint8_t *source, uint8_t *out, size_t n_rows, size_t n_columns)         \
    {                                                                                              \
        type square[MATRIX_SQUARE][MATRIX_SQUARE], line[MATRIX_SQUARE];                            \
        for (size_t row = 0; row < n_rows; row += MATRIX_SQUARE)                                   \
            for (size_t column = 0; column < n_columns; column += MATRIX_SQUARE) {                 \
                const uint8_t *from = source + (row * n_columns + column) * sizeof(type);          \
                uint8_t *to = out + (column * n_rows + row) * sizeof(type);                        \
                const size_t below = n_rows - row, right = n_columns - column;                     \
                if (below >= MATRIX_SQUARE && right >= MATRIX_SQUARE) {                            \
                    MATRIX_TURN(type, MATRIX_SQUARE, MATRIX_SQUARE);                               \
                } else {                                                                           \
                    const size_t height = below < MATRIX_SQUARE ? below : MATRIX_SQUARE;           \
                    const size_t width = right < MATRIX_SQUARE ? right : MATRIX_SQUARE;            \
                    MATRIX_TURN(type, height, width);                                              \
                }                                                                                  \
            }                                                                                      \
    }

MATRIX_TRANSPOSE(matrix_transpose_2, uint16_t)
MATRIX_TRANSPOSE(matrix_transpose_4, uint32_t)

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
