/* The hot loops, compiled once for each instruction set.
 *
 * Scratch is laid out [feature][lane], LANES numbers to a feature: a lane is a row of the weight where rows are rotated
 * and a column where columns are, so that one product serves both and each lane is summed up on its own, feature after
 * feature. That makes results and sums the same for any cut, and for every instruction set that has FMA.
 *
 * Who includes this defines W (numbers in a vector), OUT (outputs of a block computed at once), N(name), FMA and MAX of
 * vectors, COUNT of where two of them differ, FMA1 of numbers, and where there are instructions for them TO_U32, TO_F64,
 * HALF_TO_FLOAT and FLOAT_TO_HALF.
 */
#define VECTORS 2
#define LANES (VECTORS * W)

typedef double N(F64) __attribute__((vector_size(8 * W)));
typedef int64_t N(I64) __attribute__((vector_size(8 * W)));
typedef float N(F32) __attribute__((vector_size(4 * W)));
typedef uint32_t N(U32) __attribute__((vector_size(4 * W)));
typedef uint16_t N(U16) __attribute__((vector_size(2 * W)));

#ifndef TO_U32
#define TO_U32(HALF) __builtin_convertvector(HALF, N(U32))
#define TO_F64(FLOAT) __builtin_convertvector(FLOAT, N(F64))
#endif

static inline N(F64) N(load)(const double *at) {
    N(F64) v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline N(F64) N(splat)(double x) { return x - (N(F64)){0}; }

static inline N(F32) N(half_to_float)(N(U16) half) {
#ifdef HALF_TO_FLOAT
    return HALF_TO_FLOAT(half);
#else
    N(U32) bits = TO_U32(half), magnitude = (bits & 0x7FFF) << 13;
    N(U32) infinite = (N(U32))(magnitude >= 0x0F800000) & 0x7F800000;
    return (N(F32))((N(U32))((N(F32))magnitude * 0x1p112f) | infinite | (bits & 0x8000) << 16);
#endif
}

/* Exact for what a half can hold; 65536 becomes infinity. */
static inline N(U16) N(float_to_half)(N(F32) x) {
#ifdef FLOAT_TO_HALF
    return FLOAT_TO_HALF(x);
#else
    N(U32) bits = (N(U32))x, magnitude = (N(U32))((N(F32))(bits & 0x7FFFFFFF) * 0x1p-112f) >> 13;
    return __builtin_convertvector(magnitude | (bits >> 16 & 0x8000), N(U16));
#endif
}

/* Read w features of LANES numbers each. */
static void N(widen)(int dtype, const char *raw, int64_t stride, int64_t w, double *x) {
#define EACH(EXPRESSION)                                                                                               \
    for (int64_t f = 0; f < w; f++)                                                                                    \
        for (int v = 0; v < VECTORS; v++) {                                                                            \
            const char *at = raw + f * stride + v * W * SIZES[dtype];                                                  \
            N(F64) wide = EXPRESSION;                                                                                  \
            memcpy(x + f * LANES + v * W, &wide, sizeof wide);                                                         \
        }                                                                                                              \
    break
    N(U16) narrow;
    N(F32) single;
    switch (dtype) {
    case BF16:
        EACH((memcpy(&narrow, at, sizeof narrow),
              TO_F64((N(F32))(TO_U32(narrow) << 16))));
    case F16:
        EACH((memcpy(&narrow, at, sizeof narrow), TO_F64(N(half_to_float)(narrow))));
    case F32:
        EACH((memcpy(&single, at, sizeof single), TO_F64(single)));
    case F64:
        EACH(N(load)((const double *)at));
    }
#undef EACH
}

/* Outputs i to i + count of a block of k; m holds their rows of the matrix side by side, width apart. */
static inline __attribute__((always_inline)) void N(outputs)(const int count, const double *m, int64_t width,
                                                             const int32_t *index, int64_t start, int64_t k,
                                                             int64_t i, const double *restrict x, double *restrict y) {
    N(F64) sum[OUT][VECTORS];
    for (int o = 0; o < count; o++)
        for (int v = 0; v < VECTORS; v++)
            sum[o][v] = (N(F64)){0};
    for (int64_t j = 0; j < k; j++, m += width) {
        N(F64) input[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            input[v] = N(load)(x + (index[j] - start) * LANES + v * W);
        for (int o = 0; o < count; o++)
            for (int v = 0; v < VECTORS; v++)
                sum[o][v] = FMA(N(splat)(m[o]), input[v], sum[o][v]);
    }
    UNROLL for (int o = 0; o < count; o++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            memcpy(y + (index[i + o] - start) * LANES + v * W, &sum[o][v], sizeof sum[o][v]);
}

/* Apply some blocks of a stage to a panel that begins at feature start. */
static void N(rotate)(const double *m, const int32_t *index, int64_t start, int64_t k, int64_t blocks, const double *x,
                      double *y) {
    for (int64_t b = 0; b < blocks; b++, index += k)
        for (int64_t i = 0; i < k; i += CHUNK) {
            int64_t width = k - i < CHUNK ? k - i : CHUNK;
            for (int64_t o = 0; o < width; o += OUT)
                switch (width - o) {
#define CASE(COUNT)                                                                                                    \
    case COUNT:                                                                                                        \
        N(outputs)(COUNT, m + o, width, index, start, k, i + o, x, y);                                                        \
        break;
                    CASE(1) CASE(2) CASE(3)
#if OUT > 4
                    CASE(4) CASE(5) CASE(6) CASE(7)
#endif
#undef CASE
                default:
                    N(outputs)(OUT, m + o, width, index, start, k, i + o, x, y);
                }
            m += width * k;
        }
}

static inline double N(blend)(double x, double y, const Finish *how, int lane) {
    y *= how->scale[lane];
    return how->weight == 1 ? y : (1 - how->weight) * x + how->weight * y;
}

/* What finish does, one number at a time: for what is not finite, or does not stay so. */
static void N(finish_carefully)(const Finish *how, const double *x, const double *y, int64_t w, char *raw,
                                int64_t stride, double *sums) {
    for (int64_t f = 0; f < w; f++)
        for (int lane = 0; lane < LANES; lane++, x++, y++) {
            double exact = N(blend)(*x, *y, how, lane), sum[3] = {*x, exact - *x, 0};
            double rounded = round_to(how->dtype, exact, raw + f * stride + lane * SIZES[how->dtype]);
            if (!isfinite(*x)) {
                sums[UNSOUND * LANES + lane]++;
                continue;
            }
            sum[ROUNDING] = rounded - exact;
            for (int s = 0; s < 3; s++)
                sums[s * LANES + lane] = FMA1(sum[s], sum[s], sums[s * LANES + lane]);
            sums[CHANGED * LANES + lane] += rounded != *x;
            sums[DAMAGED * LANES + lane] += !isfinite(rounded);
        }
}

/* Scale, blend, round and write w features, and add to each lane's sums; false where a number is not finite. */
static inline __attribute__((always_inline)) int N(finish_as)(const int dtype, const int blended, const Finish *how,
                                                              const double *x, const double *y, int64_t w, char *raw,
                                                              int64_t stride, double *sums) {
    const N(F64) lowest = N(splat)(dtype == BF16 ? 0x1p-126 : 0x1p-14);
    const N(F64) spread = N(splat)(dtype == BF16 ? 0x1.8p45 : 0x1.8p42);
    /* Added to a float's bits, it sets the highest from infinity, or from where a half becomes infinite, on. */
    const uint32_t room = dtype == BF16 ? 0x00800000 : 0x80000000 - 0x47800000;
    const N(F64) part = N(splat)(how->weight), rest = N(splat)(1 - how->weight);
    N(F64) sum[3][VECTORS], scale[VECTORS];
    N(I64) changed[VECTORS];
    N(U32) over = {0};
    for (int v = 0; v < VECTORS; v++) {
        for (int s = 0; s < 3; s++)
            sum[s][v] = N(load)(sums + s * LANES + v * W);
        scale[v] = N(load)(how->scale + v * W);
        changed[v] = (N(I64)){0};
    }
    for (int64_t f = 0; f < w; f++, x += LANES, y += LANES)
        for (int v = 0; v < VECTORS; v++) {
            char *at = raw + f * stride + v * W * SIZES[dtype];
            N(F64) before = N(load)(x + v * W), exact = N(load)(y + v * W) * scale[v], rounded = exact;
            if (blended)
                rounded = exact = rest * before + part * exact;
            if (dtype == BF16 || dtype == F16) {
                /* 1.5 * 2^52 units in the last place of the output: adding it rounds, once, subnormals too. */
                N(F64) units = MAX((N(F64))((N(I64))exact & EXPONENT), lowest) * spread;
                rounded = (exact + units) - units;
                rounded = (N(F64))((N(I64))rounded | ((N(I64))exact & SIGN));
                N(F32) single = __builtin_convertvector(rounded, N(F32));
                N(U32) bits = (N(U32))single;
                N(U16) narrow = dtype == F16 ? N(float_to_half)(single) : __builtin_convertvector(bits >> 16, N(U16));
                memcpy(at, &narrow, sizeof narrow);
                over |= (bits & 0x7FFFFFFF) + room;
            } else if (dtype == F32) {
                N(F32) single = __builtin_convertvector(exact, N(F32));
                memcpy(at, &single, sizeof single);
                rounded = TO_F64(single);
            } else
                memcpy(at, &exact, sizeof exact);
            N(F64) change = exact - before, rounding = rounded - exact;
            sum[SOURCE][v] = FMA(before, before, sum[SOURCE][v]);
            sum[CHANGE][v] = FMA(change, change, sum[CHANGE][v]);
            sum[ROUNDING][v] = FMA(rounding, rounding, sum[ROUNDING][v]);
            changed[v] = COUNT(changed[v], rounded, before);
        }
    N(I64) bad = {0};
    for (int v = 0; v < VECTORS; v++) /* infinity less itself is not a number, which is not 0 */
        bad |= sum[ROUNDING][v] - sum[ROUNDING][v] != 0;
    for (int lane = 0; lane < W; lane++)
        if (bad[lane] | over[lane] >> 31)
            return 0;
    memcpy(sums, sum, sizeof sum);
    for (int lane = 0; lane < LANES; lane++)
        sums[CHANGED * LANES + lane] += changed[lane / W][lane % W];
    return 1;
}

static void N(finish)(const Finish *how, const double *x, const double *y, int64_t w, char *raw, int64_t stride,
                      double *sums) {
    int done = 0;
    switch (how->dtype) {
#define CASE(DTYPE)                                                                                                    \
    case DTYPE:                                                                                                        \
        done = how->weight == 1 ? N(finish_as)(DTYPE, 0, how, x, y, w, raw, stride, sums)                              \
                                : N(finish_as)(DTYPE, 1, how, x, y, w, raw, stride, sums);                             \
        break;
        CASE(BF16) CASE(F16) CASE(F32) CASE(F64)
#undef CASE
    }
    if (!done)
        N(finish_carefully)(how, x, y, w, raw, stride, sums);
}

/* Transpose one side x side square of numbers, strides in bytes. */
#define SQUARE(TYPE, SIDE, LEVELS)                                                                                     \
    {                                                                                                                  \
        typedef TYPE V __attribute__((vector_size(16)));                                                               \
        V a[SIDE], b[SIDE];                                                                                            \
        UNROLL for (int i = 0; i < SIDE; i++)                                                                          \
            memcpy(a + i, in + i * in_stride, 16);                                                                     \
        UNROLL for (int level = 0; level < LEVELS; level++) {                                                          \
            UNROLL for (int i = 0; i < SIDE / 2; i++) {                                                                \
                b[2 * i] = LOW_##SIDE(a[i], a[i + SIDE / 2]);                                                          \
                b[2 * i + 1] = HIGH_##SIDE(a[i], a[i + SIDE / 2]);                                                     \
            }                                                                                                          \
            UNROLL for (int i = 0; i < SIDE; i++)                                                                      \
                a[i] = b[i];                                                                                           \
        }                                                                                                              \
        UNROLL for (int i = 0; i < SIDE; i++)                                                                          \
            memcpy(out + i * out_stride, a + i, 16);                                                                   \
    }                                                                                                                  \
    break

static inline __attribute__((always_inline)) void N(transpose_square)(const int size, const char *in, int64_t in_stride,
                                                                      char *out, int64_t out_stride) {
    switch (size) {
    case 2:
        SQUARE(uint16_t, 8, 3);
    case 4:
        SQUARE(uint32_t, 4, 2);
    case 8:
        SQUARE(uint64_t, 2, 1);
    }
}
#undef SQUARE

/* Transpose: out[c][r] = in[r][c]. All of few rows, or of few columns, are done before the next ones: those lie apart in
 * memory by a power of 2, and more of them than a cache has ways would put each other out. */
static inline __attribute__((always_inline)) void N(transpose_of)(const int size, const char *in, int64_t in_stride,
                                                                  int64_t rows, int64_t columns, char *out,
                                                                  int64_t out_stride) {
    const int side = 16 / size;
    const int64_t whole_rows = rows - rows % side, whole_columns = columns - columns % side;
    if (rows < columns)
        for (int64_t r = 0; r < whole_rows; r += side)
            for (int64_t c = 0; c < whole_columns; c += side)
                N(transpose_square)(size, in + r * in_stride + c * size, in_stride, out + c * out_stride + r * size,
                                    out_stride);
    else
        for (int64_t c = 0; c < whole_columns; c += side)
            for (int64_t r = 0; r < whole_rows; r += side)
                N(transpose_square)(size, in + r * in_stride + c * size, in_stride, out + c * out_stride + r * size,
                                    out_stride);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++)
            memcpy(out + c * out_stride + r * size, in + r * in_stride + c * size, size);
}

static void N(transpose)(int size, const char *in, int64_t in_stride, int64_t rows, int64_t columns, char *out,
                         int64_t out_stride) {
    if (size == 2)
        N(transpose_of)(2, in, in_stride, rows, columns, out, out_stride);
    else if (size == 4)
        N(transpose_of)(4, in, in_stride, rows, columns, out, out_stride);
    else
        N(transpose_of)(8, in, in_stride, rows, columns, out, out_stride);
}

static const Kernel N(kernel) = {LANES, N(widen), N(rotate), N(finish), N(transpose)};

#undef VECTORS
#undef LANES
#undef W
#undef OUT
#undef N
#undef FMA
#undef FMA1
#undef MAX
#undef COUNT
#undef TO_U32
#undef TO_F64
#undef HALF_TO_FLOAT
#undef FLOAT_TO_HALF
