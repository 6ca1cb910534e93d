/* Folding rotations into weights: the module boft_export.native._fold.
 *
 * kernel.h has the loops, here are the order they run in and what Python sees. Arguments are trusted: native/__init__.py
 * checks them.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __FLT_EVAL_METHOD__ != 0
#error "weights are little-endian, and results are rounded once"
#endif

enum { BF16, F16, F32, F64 };
enum { SOURCE, CHANGE, ROUNDING, CHANGED, DAMAGED, UNSOUND, SUMS };
#define CHUNK 8 /* outputs of a block whose rows of the matrix lie side by side */
#define MAX_LANES 16
#define PANEL 128 /* features folded at once, where they are not coupled to more */
#define EXPONENT 0x7FF0000000000000
#define SIGN INT64_MIN
static const int64_t SIZES[] = {2, 2, 4, 8};

typedef struct {
    int dtype;
    double weight;
    const double *scale; /* of each lane */
} Finish;

typedef struct {
    int lanes;
    void (*widen)(int, const char *, int64_t, int64_t, double *);
    void (*rotate)(const double *, const int32_t *, int64_t, int64_t, int64_t, const double *, double *);
    void (*finish)(const Finish *, const double *, const double *, int64_t, char *, int64_t, double *);
    void (*transpose)(int, const char *, int64_t, int64_t, int64_t, char *, int64_t);
} Kernel;

/* Round once, to nearest with ties to even, write the result and return it. */
static double round_to(int dtype, double x, char *out) {
    double rounded = x;
    if (dtype == F64) {
        memcpy(out, &x, 8);
    } else if (dtype == F32) {
        float single = (float)x;
        memcpy(out, &single, 4);
        rounded = single;
    } else {
        int digits = dtype == BF16 ? 7 : 10, lowest = dtype == BF16 ? -126 : -14, highest = dtype == BF16 ? 127 : 15;
        uint16_t bits = isnan(x) ? (dtype == BF16 ? 0x7FC0 : 0x7E00) : signbit(x) ? 0x8000 : 0;
        if (isfinite(x) && x != 0) {
            int exponent = ilogb(x) < lowest ? lowest : ilogb(x);
            double units = rint(scalbn(fabs(x), digits - exponent)); /* up to 2^(digits + 1) */
            uint16_t infinite = (highest - lowest + 2) << digits;
            int64_t whole = exponent > highest ? infinite : (int64_t)(exponent - lowest) * (1 << digits) + (int64_t)units;
            rounded = whole >= infinite ? INFINITY : scalbn(units, exponent - digits);
            rounded = copysign(rounded, x);
            bits |= (uint16_t)whole;
        } else if (isinf(x))
            bits |= (uint16_t)((highest - lowest + 2) << digits);
        memcpy(out, &bits, 2);
    }
    return rounded;
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif
#define LOW_8(a, b) PICK(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_8(a, b) PICK(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW_4(a, b) PICK(a, b, 0, 4, 1, 5)
#define HIGH_4(a, b) PICK(a, b, 2, 6, 3, 7)
#define LOW_2(a, b) PICK(a, b, 0, 2)
#define HIGH_2(a, b) PICK(a, b, 1, 3)

#define STRING(X) #X
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define TARGET(SET) _Pragma(STRING(clang attribute push(__attribute__((target(SET))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define UNROLL _Pragma("GCC unroll 8") /* else sums go by way of the stack */
#define TARGET(SET) _Pragma("GCC push_options") _Pragma(STRING(GCC target(SET)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

/* Any processor: without FMA a product is rounded before it is added. */
#define W 2
#define OUT 4
#define N(NAME) NAME##_plain
#define FMA(a, b, c) ((a) * (b) + (c))
#define FMA1(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) ((F64_plain){(a)[0] > (b)[0] ? (a)[0] : (b)[0], (a)[1] > (b)[1] ? (a)[1] : (b)[1]})
#define COUNT(n, a, b) ((n) - ((a) != (b)))
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

TARGET("avx2,fma,f16c")
#define W 4
#define OUT 4
#define N(NAME) NAME##_avx2
#define FMA(a, b, c) ((F64_avx2)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define FMA1(a, b, c) __builtin_fma(a, b, c)
#define MAX(a, b) ((F64_avx2)_mm256_max_pd((__m256d)(a), (__m256d)(b)))
#define COUNT(n, a, b) ((n) - ((a) != (b)))
#define TO_U32(h) ((U32_avx2)_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)(h))))
#define TO_F64(x) ((F64_avx2)_mm256_cvtps_pd((__m128)(x)))
#define HALF_TO_FLOAT(h) ((F32_avx2)_mm_cvtph_ps(_mm_cvtsi64_si128((long long)(h))))
#define FLOAT_TO_HALF(x) ((U16_avx2)_mm_cvtsi128_si64(_mm_cvtps_ph((__m128)(x), 0)))
#include "kernel.h"
END_TARGET

TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define W 8
#define OUT 8
#define N(NAME) NAME##_avx512
#define FMA(a, b, c) ((F64_avx512)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define FMA1(a, b, c) __builtin_fma(a, b, c)
#define MAX(a, b) ((F64_avx512)_mm512_max_pd((__m512d)(a), (__m512d)(b)))
#define COUNT(n, a, b)                                                                                                 \
    ((I64_avx512)_mm512_mask_add_epi64((__m512i)(n), _mm512_cmp_pd_mask((__m512d)(a), (__m512d)(b), _CMP_NEQ_UQ),      \
                                       (__m512i)(n), _mm512_set1_epi64(1)))
#define TO_U32(h) ((U32_avx512)_mm256_cvtepu16_epi32((__m128i)(h)))
#define TO_F64(x) ((F64_avx512)_mm512_cvtps_pd((__m256)(x)))
#define HALF_TO_FLOAT(h) ((F32_avx512)_mm256_cvtph_ps((__m128i)(h)))
#define FLOAT_TO_HALF(x) ((U16_avx512)_mm256_cvtps_ph((__m256)(x), 0))
#include "kernel.h"
END_TARGET

#elif defined(__aarch64__)
#include <arm_neon.h>
#define W 2
#define OUT 8
#define N(NAME) NAME##_neon
#define FMA(a, b, c) ((F64_neon)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define FMA1(a, b, c) __builtin_fma(a, b, c)
#define MAX(a, b) ((F64_neon)vmaxq_f64((float64x2_t)(a), (float64x2_t)(b)))
#define COUNT(n, a, b) ((n) - ((a) != (b)))
#include "kernel.h"
#endif

/* What this machine has, best first. */
static const Kernel *find_kernel(int i, const char **name) {
    struct {
        const char *name;
        const Kernel *kernel;
        int runs;
    } all[] = {
#if defined(__x86_64__)
        {"avx512", &kernel_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
        {"avx2", &kernel_avx2,
         /* What has AVX2 has F16C, too, which not all compilers can ask for. */
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#elif defined(__aarch64__)
        {"neon", &kernel_neon, 1},
#endif
        {"plain", &kernel_plain, 1},
    };
    for (size_t k = 0; k < sizeof all / sizeof *all; k++)
        if (all[k].runs && i-- == 0) {
            *name = all[k].name;
            return all[k].kernel;
        }
    return NULL;
}

typedef struct {
    const Kernel *kernel;
    int64_t features, groups, stages;
    const int64_t *borders; /* of the groups of features that are coupled, groups + 1 */
    const int64_t *firsts;  /* of each stage and group: its first block; groups + 1 a stage */
    const int64_t *sizes;   /* of each stage's blocks */
    const int32_t *index;   /* of each stage and block: its features */
    const double *matrices; /* of each stage and block: chunks of outputs, each [input][output] */
    const char *source;
    char *out;
    int64_t rows, columns, first, tile_rows;
    int source_dtype, dtype;
    double weight;
    const double *scale; /* of each row, or each column; or NULL */
    double *tiles;
    /* Scratch */
    double *x, *y[2];
    char *raw_in, *raw_out;
} Job;

/* Whole groups that are folded at once, so that what they need stays in cache. */
typedef struct {
    int64_t group, end; /* the groups */
    int64_t start, w;   /* their features */
} Panel;

/* Move on to the next panel, which ends before feature limit; false where there is none. */
static int next_panel(const Job *job, int64_t limit, Panel *panel) {
    const int64_t *borders = job->borders;
    panel->group = panel->end++;
    panel->start = borders[panel->group];
    if (panel->start >= limit)
        return 0;
    while (borders[panel->end] < limit && borders[panel->end + 1] - panel->start <= PANEL)
        panel->end++;
    panel->w = borders[panel->end] - panel->start;
    return 1;
}

/* Rotate what is in job->x through all stages and return where the result is. */
static const double *rotate_panel(const Job *job, const Panel *panel) {
    const double *from = job->x, *m = job->matrices;
    const int32_t *index = job->index;
    for (int64_t s = 0; s < job->stages; s++) {
        int64_t k = job->sizes[s];
        const int64_t *firsts = job->firsts + s * (job->groups + 1), block = firsts[panel->group];
        double *to = job->y[s % 2];
        job->kernel->rotate(m + block * k * k, index + block * k, panel->start, k, firsts[panel->end] - block, from, to);
        from = to;
        m += job->features * k;
        index += job->features;
    }
    return from;
}

static void add_to_tile(const Job *job, int64_t tile, int64_t elements, const double *sums, int lane) {
    static const int PLACES[SUMS] = {2, 3, 4, 1, 5, 6};
    double *to = job->tiles + 7 * tile;
    to[0] += elements;
    for (int s = 0; s < SUMS; s++)
        to[PLACES[s]] += sums[s * job->kernel->lanes + lane];
}

static void fill_scale(const Job *job, int64_t start, int live, double *scale) {
    for (int lane = 0; lane < job->kernel->lanes; lane++)
        scale[lane] = job->scale != NULL && lane < live ? job->scale[start + lane] : 1;
}

/* Have rows brought to the second level of cache while other work is done. */
static void fetch(const char *at, int64_t stride, int64_t rows, int64_t bytes) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < bytes; b += 64)
            __builtin_prefetch(at + r * stride + b, 0, 2);
}

static void run_rows(const Job *job) {
    const Kernel *kernel = job->kernel;
    const int lanes = kernel->lanes;
    const int64_t n = job->features, in = SIZES[job->source_dtype], size = SIZES[job->dtype];
    for (int64_t row = 0; row < job->rows; row += lanes) {
        int live = job->rows - row < lanes ? (int)(job->rows - row) : lanes;
        double sums[SUMS * MAX_LANES] = {0}, scale[MAX_LANES];
        Finish how = {job->dtype, job->weight, scale};
        fill_scale(job, row, live, scale);
        for (Panel panel = {0}; next_panel(job, n, &panel);) {
            const int64_t start = panel.start, w = panel.w;
            if (live < lanes)
                memset(job->raw_in, 0, w * lanes * in);
            fetch(job->source + (row * n + start + w) * in, n * in, live, w * in);
            fetch(job->out + (row * n + start + w) * size, n * size, live, w * size);
            kernel->transpose(in, job->source + (row * n + start) * in, n * in, live, w, job->raw_in, lanes * in);
            kernel->widen(job->source_dtype, job->raw_in, lanes * in, w, job->x);
            kernel->finish(&how, job->x, rotate_panel(job, &panel), w, job->raw_out, lanes * size, sums);
            kernel->transpose(size, job->raw_out, lanes * size, w, live, job->out + (row * n + start) * size, n * size);
        }
        for (int lane = 0; lane < live; lane++)
            add_to_tile(job, (row + lane) / job->tile_rows, n, sums, lane);
    }
}

static void copy_rows(const char *in, int64_t in_stride, int64_t rows, int64_t bytes, char *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * out_stride, in + r * in_stride, bytes);
}

/* The sums of one tile are in columns' sums, which are SUMS * lanes for each lanes columns. */
static void run_columns(const Job *job, double *columns_sums) {
    const Kernel *kernel = job->kernel;
    const int lanes = kernel->lanes;
    const int64_t c = job->columns, in = SIZES[job->source_dtype], size = SIZES[job->dtype];
    const int64_t chunks = (c + lanes - 1) / lanes;
    Panel panel = {0};
    while (job->borders[panel.end] < job->first)
        panel.end++;
    while (next_panel(job, job->first + job->rows, &panel)) {
        const int64_t start = panel.start - job->first, w = panel.w;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t column = chunk * lanes;
            int live = c - column < lanes ? (int)(c - column) : lanes;
            double scale[MAX_LANES];
            Finish how = {job->dtype, job->weight, scale};
            fill_scale(job, column, live, scale);
            const char *source = job->source + (start * c + column) * in;
            char *out = job->out + (start * c + column) * size, *to = out;
            int64_t in_stride = c * in, stride = c * size;
            if (live < lanes) {
                memset(job->raw_in, 0, w * lanes * in);
                copy_rows(source, in_stride, w, live * in, job->raw_in, lanes * in);
                source = job->raw_in, to = job->raw_out, in_stride = lanes * in, stride = lanes * size;
            }
            kernel->widen(job->source_dtype, source, in_stride, w, job->x);
            const double *y = rotate_panel(job, &panel);
            double *sums = columns_sums + chunk * SUMS * lanes;
            for (int64_t f = 0, next; f < w; f = next) {
                int64_t end = ((start + f) / job->tile_rows + 1) * job->tile_rows - start;
                next = end < w ? end : w;
                kernel->finish(&how, job->x + f * lanes, y + f * lanes, next - f, to + f * stride, stride, sums);
                if (end > w && start + w < job->rows)
                    continue; /* the tile goes on in the next panel */
                int64_t tile = (start + f) / job->tile_rows, rows = start + next - tile * job->tile_rows;
                for (int lane = 0; lane < live; lane++)
                    add_to_tile(job, tile, rows, sums, lane);
                memset(sums, 0, SUMS * lanes * sizeof *sums);
            }
            if (live < lanes)
                copy_rows(to, stride, w, live * size, out, c * size);
        }
    }
}

/* Run a job; false where there is no memory for it. */
static int run(Job *job, int by_columns) {
    int64_t widest = PANEL, lanes = job->kernel->lanes;
    for (int64_t g = 0; g < job->groups; g++)
        if (job->borders[g + 1] - job->borders[g] > widest)
            widest = job->borders[g + 1] - job->borders[g];
    int64_t panel = widest * lanes * 8, sums = by_columns ? (job->columns + lanes) * SUMS * 8 : 0;
    char *scratch = NULL;
    if (posix_memalign((void **)&scratch, 64, 5 * panel + sums))
        return 0;
    job->x = (double *)scratch;
    job->y[0] = (double *)(scratch + panel);
    job->y[1] = (double *)(scratch + 2 * panel);
    job->raw_in = scratch + 3 * panel;
    job->raw_out = scratch + 4 * panel;
    /* Other libraries may have set the thread to flush subnormal numbers to zero. */
#if defined(__x86_64__)
    unsigned control = _mm_getcsr();
    _mm_setcsr(0x1F80);
#elif defined(__aarch64__)
    uint64_t control, usual = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(usual));
#endif
    if (by_columns) {
        memset(scratch + 5 * panel, 0, sums);
        run_columns(job, (double *)(scratch + 5 * panel));
    } else
        run_rows(job);
#if defined(__x86_64__)
    _mm_setcsr(control);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(control));
#endif
    free(scratch);
    return 1;
}

static PyObject *py_fold(PyObject *module, PyObject *args) {
    (void)module;
    int kernel, by_columns, source_dtype, dtype, done = 0;
    Py_ssize_t columns, first, tile_rows;
    double weight;
    Py_buffer borders, firsts, sizes, index, matrices, source, out, scale, tiles;
    if (!PyArg_ParseTuple(args, "ipy*y*y*y*y*y*iw*iz*w*dnnn", &kernel, &by_columns, &borders, &firsts, &sizes, &index,
                          &matrices, &source, &source_dtype, &out, &dtype, &scale, &tiles, &weight, &columns, &first,
                          &tile_rows))
        return NULL;
    const char *name;
    Job job = {.kernel = find_kernel(kernel, &name),
               .groups = borders.len / 8 - 1,
               .stages = sizes.len / 8,
               .borders = borders.buf,
               .firsts = firsts.buf,
               .sizes = sizes.buf,
               .index = index.buf,
               .matrices = matrices.buf,
               .source = source.buf,
               .out = out.buf,
               .columns = columns,
               .first = first,
               .tile_rows = tile_rows,
               .source_dtype = source_dtype,
               .dtype = dtype,
               .weight = weight,
               .scale = scale.buf,
               .tiles = tiles.buf};
    job.features = job.borders[job.groups];
    job.rows = source.len / SIZES[source_dtype] / columns;
    if (job.kernel != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        done = run(&job, by_columns);
        Py_END_ALLOW_THREADS;
    }
    Py_buffer *all[] = {&borders, &firsts, &sizes, &index, &matrices, &source, &out, &scale, &tiles};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        PyBuffer_Release(all[i]);
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_kernels(PyObject *module, PyObject *args) {
    (void)module, (void)args;
    PyObject *names = PyList_New(0);
    const char *name;
    for (int i = 0; names != NULL && find_kernel(i, &name) != NULL; i++) {
        PyObject *text = PyUnicode_FromString(name);
        if (text == NULL || PyList_Append(names, text) < 0)
            Py_CLEAR(names);
        Py_XDECREF(text);
    }
    return names;
}

static PyMethodDef METHODS[] = {
    {"fold", py_fold, METH_VARARGS, "Fold a prepared program into rows or columns."},
    {"kernels", py_kernels, METH_NOARGS, "Return the names of the kernels that run here, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, .m_name = "_fold", .m_size = 0, .m_methods = METHODS};

PyMODINIT_FUNC PyInit__fold(void) { return PyModule_Create(&MODULE); }
