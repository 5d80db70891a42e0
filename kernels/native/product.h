/* Matrix products for few rows: weights are streamed once, in panels of a few outputs each, laid out so that a panel lies
   in memory as it is read. Every output is summed over the inner dimension in ascending order, one fused multiplication
   and addition after the other, whatever the number of rows: a row has the same bits in any batch. */

#ifndef FASTBLT_PRODUCT_H
#define FASTBLT_PRODUCT_H

#include <sys/mman.h>

#include "pool.h"
#include "vector.h"

#define PANEL (2 * LANES)
/* Bytes of a panel at a time, if several groups of rows use it, and from the weights in use to those that are prefetched
   if only one does. Both were measured. */
#define PIECE (1024 * LANES)
#define AHEAD 4096
#if defined(__AVX512F__)
#define MOST_ROWS 12
#else
#define MOST_ROWS 6
#endif
/* At most FEW_ROWS take TOGETHER panels at once. */
#define FEW_ROWS 2
#define TOGETHER 4

/* panels: (ceil(out / PANEL), in, PANEL), zeros after the last output. Weights of `itemsize` bytes: 4 are float, 2
   bfloat16, 1 float8 (e4m3, no NaN). Of the latter two an output of the panel's first half lies next to its counterpart
   of the second: a word is two bfloat16 weights, each widened by one instruction. scale: (out,) or null. */
typedef struct {
    const void *panels;
    const float *scale;
    int64_t out, in, itemsize;
} Matrix;

/* Matrices (outs[i], in) of one type, one on top of the other, and the resulting panels. */
typedef struct {
    const void *const *parts;
    const int64_t *outs;
    void *panels;
    int64_t num_parts, out, in, itemsize;
} Packing;

/* Where output `c` of a panel lies among the weights of one input. */
static inline int place(int c, int64_t itemsize) { return itemsize == 4 ? c : 2 * (c % LANES) + c / LANES; }

/* Takes the inner dimension in pieces, so that the output stays in the nearest cache. */
#define PACK(NAME, TYPE)                                                                              \
    static void NAME(const void *const *rows, void *panel, int64_t in) {                             \
        for (int64_t k = 0; k < in; k += 32) {                                                        \
            int64_t count = in - k < 32 ? in - k : 32;                                                \
            for (int c = 0; c < PANEL; c++) {                                                         \
                TYPE *to = (TYPE *)panel + k * PANEL + place(c, sizeof(TYPE));                        \
                if (rows[c])                                                                          \
                    for (int64_t i = 0; i < count; i++) to[i * PANEL] = ((const TYPE *)rows[c])[k + i]; \
                else                                                                                  \
                    for (int64_t i = 0; i < count; i++) to[i * PANEL] = 0;                            \
            }                                                                                         \
        }                                                                                             \
    }
PACK(pack_4, uint32_t)
PACK(pack_2, uint16_t)
PACK(pack_1, uint8_t)

/* Before panels are written: with large pages a core reads them about a tenth faster. Without them they work as well. */
static void take_large_pages(void *panels, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)panels + page - 1) / page * page, end = ((uintptr_t)panels + bytes) / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)panels, (void)bytes;
#endif
}

static void pack_panels(void *of, int64_t begin, int64_t end) {
    const Packing *p = of;
    for (int64_t panel = begin; panel < end; panel++) {
        const void *rows[PANEL] = {0};
        int64_t part = 0, before = 0;
        for (int64_t c = 0, o = panel * PANEL; c < PANEL && o < p->out; c++, o++) {
            while (o >= before + p->outs[part]) before += p->outs[part++];
            rows[c] = (const char *)p->parts[part] + (o - before) * p->in * p->itemsize;
        }
        void *to = (char *)p->panels + panel * p->in * PANEL * p->itemsize;
        (p->itemsize == 4 ? pack_4 : p->itemsize == 2 ? pack_2 : pack_1)(rows, to, p->in);
    }
}

static inline void pair_f32(const float *from, Vector *low, Vector *high) {
    *low = load(from);
    *high = load(from + LANES);
}

static inline void pair_bf16(const uint16_t *from, Vector *low, Vector *high) {
    Bits both;
    memcpy(&both, from, sizeof both);
    *low = (Vector)(both << 16);
    *high = (Vector)(both & 0xffff0000u);
}

/* Exact: the bits of a code below its sign, as those of a float, are its value times 2^-120, subnormal or not. */
static inline void pair_fp8(const uint8_t *from, Vector *low, Vector *high) {
    Bits both = (Bits)(load_signed(from) << 4 & (int16_t)0x87f0);
    *low = (Vector)(both << 16) * 0x1p120f;
    *high = (Vector)(both & 0xffff0000u) * 0x1p120f;
}

/* float8 weights of a piece of a panel as bfloat16. */
static void to_pairs(uint16_t *to, const uint8_t *from, int64_t count) {
    for (int64_t k = 0; k < count; k++, from += PANEL, to += PANEL) {
        Vector low, high;
        pair_fp8(from, &low, &high);
        Bits both = (Bits)low >> 16 | (Bits)high;
        memcpy(to, &both, sizeof both);
    }
}

/* The use of a product: y = x W^T; y = residual + y; twice: y = residual + y once more. Rounded after each. */
typedef struct {
    const Matrix *weight;
    const float *x, *residual;
    float *y;
    int64_t rows;
    int twice, bf16;
} Product;

#define MICRO(ROWS, KIND, TYPE)                                                                            \
    static void micro_##KIND##_##ROWS(const float *x, int64_t count, const TYPE *w, const char *ahead, int64_t step, float *tile) { \
        Vector low[ROWS], high[ROWS];                                                                      \
        for (int r = 0; r < ROWS; r++) {                                                                   \
            low[r] = load(tile + r * PANEL);                                                               \
            high[r] = load(tile + r * PANEL + LANES);                                                      \
        }                                                                                                  \
        for (int64_t k = 0; k < count; k++) {                                                              \
            Vector a, b;                                                                                   \
            pair_##KIND(w + k * PANEL, &a, &b);                                                            \
            __builtin_prefetch(ahead + k * step);                                                          \
            for (int r = 0; r < ROWS; r++) {                                                               \
                float factor = x[k * ROWS + r];                                                            \
                low[r] += factor * a;                                                                      \
                high[r] += factor * b;                                                                     \
            }                                                                                              \
        }                                                                                                  \
        for (int r = 0; r < ROWS; r++) {                                                                   \
            store(tile + r * PANEL, low[r]);                                                               \
            store(tile + r * PANEL + LANES, high[r]);                                                      \
        }                                                                                                  \
    }

#define EVERY(WHAT) WHAT(1) WHAT(2) WHAT(3) WHAT(4) WHAT(5) WHAT(6)
#if MOST_ROWS > 6
#define EACH(WHAT) EVERY(WHAT) WHAT(7) WHAT(8) WHAT(9) WHAT(10) WHAT(11) WHAT(12)
#else
#define EACH(WHAT) EVERY(WHAT)
#endif

#define MICROS(ROWS) MICRO(ROWS, f32, float) MICRO(ROWS, bf16, uint16_t) MICRO(ROWS, fp8, uint8_t)
EACH(MICROS)

/* Adds `count` products to every output of `rows` rows' tiles. With each it prefetches, from `ahead` on in steps of `step`
   bytes. */
static inline void micro(
    int rows, const float *x, int64_t count, const void *weights, int itemsize, const char *ahead, int64_t step, float *tile
) {
#define CASE(ROWS)                                                                 \
    case ROWS:                                                                     \
        if (itemsize == 4) micro_f32_##ROWS(x, count, weights, ahead, step, tile);       \
        else if (itemsize == 2) micro_bf16_##ROWS(x, count, weights, ahead, step, tile); \
        else micro_fp8_##ROWS(x, count, weights, ahead, step, tile);               \
        break;
    switch (rows) { EACH(CASE) }
}

/* TOGETHER panels by few rows. With one panel the processor would wait: additions to a sum for each other, and for memory,
   since it fetches several streams ahead faster than one. Prefetching is its own here. tiles (TOGETHER, ROWS, PANEL). */
#define FEW(ROWS, KIND, TYPE)                                                                              \
    static void few_##KIND##_##ROWS(const float *x, int64_t in, const TYPE *w, float *tiles) {                \
        Vector low[TOGETHER * ROWS], high[TOGETHER * ROWS];                                                \
        for (int i = 0; i < TOGETHER * ROWS; i++) low[i] = high[i] = (Vector){0};                          \
        for (int64_t k = 0; k < in; k++)                                                                   \
            for (int t = 0; t < TOGETHER; t++) {                                                           \
                const TYPE *from = w + (t * in + k) * PANEL;                                               \
                Vector a, b;                                                                               \
                pair_##KIND(from, &a, &b);                                                                 \
                for (int r = 0; r < ROWS; r++) {                                                           \
                    low[t * ROWS + r] += x[k * ROWS + r] * a;                                              \
                    high[t * ROWS + r] += x[k * ROWS + r] * b;                                             \
                }                                                                                          \
            }                                                                                              \
        for (int i = 0; i < TOGETHER * ROWS; i++) {                                                        \
            store(tiles + i * PANEL, low[i]);                                                              \
            store(tiles + i * PANEL + LANES, high[i]);                                                     \
        }                                                                                                  \
    }
FEW(1, f32, float)
FEW(1, bf16, uint16_t)
FEW(2, f32, float)
FEW(2, bf16, uint16_t)
FEW(1, fp8, uint8_t)
FEW(2, fp8, uint8_t)

/* tiles (TOGETHER, rows, PANEL) of the panels from `panel` on. */
static void few_tiles(const Product *p, int64_t panel, float *tiles) {
    const Matrix *m = p->weight;
    int64_t at = panel * m->in * PANEL;
    if (m->itemsize == 4) (p->rows == 1 ? few_f32_1 : few_f32_2)(p->x, m->in, (const float *)m->panels + at, tiles);
    else if (m->itemsize == 2) (p->rows == 1 ? few_bf16_1 : few_bf16_2)(p->x, m->in, (const uint16_t *)m->panels + at, tiles);
    else (p->rows == 1 ? few_fp8_1 : few_fp8_2)(p->x, m->in, (const uint8_t *)m->panels + at, tiles);
}

/* The arithmetic of an ideal product: the largest group of rows by bfloat16 weights, all in the nearest cache. */
#define IDEAL_STEPS 128
#define IDEAL_TIMES 64
static void multiply_in_cache(void *unused, int64_t begin, int64_t end) {
    (void)unused;
    float x[IDEAL_STEPS * MOST_ROWS] = {0}, tile[MOST_ROWS * PANEL] = {0};
    uint16_t weights[IDEAL_STEPS * PANEL] = {0};
    for (int64_t i = begin * IDEAL_TIMES; i < end * IDEAL_TIMES; i++) {
        micro(MOST_ROWS, x, IDEAL_STEPS, weights, 2, (const char *)weights, 2 * PANEL, tile);
        /* For all that the compiler knows, the numbers are others every time, and the sums are used. */
        __asm__ volatile("" : : "r"(x), "r"(weights), "r"(tile) : "memory");
    }
}

/* All rows by one panel: tiles (rows, PANEL). A panel that is read several times is taken in pieces that stay in the
   nearest cache, float8 made bfloat16 once. */
static void panel_tiles(const Product *p, int64_t panel, float *tiles) {
    const Matrix *m = p->weight;
    int64_t turns = (p->rows + MOST_ROWS - 1) / MOST_ROWS, size = PANEL * m->itemsize;
    int itemsize = (int)m->itemsize, pairs = itemsize == 1 && turns > 1;
    if (pairs) itemsize = 2;
    int64_t piece = turns > 1 ? PIECE / PANEL / itemsize : m->in;
    uint16_t wide[PIECE / 2];
    memset(tiles, 0, p->rows * PANEL * sizeof *tiles);
    for (int64_t k = 0; k < m->in; k += piece) {
        int64_t count = m->in - k < piece ? m->in - k : piece;
        const void *weights = (const char *)m->panels + (panel * m->in + k) * size;
        /* Read once, a panel is prefetched shortly before. Otherwise the turns fetch equal parts of the next piece. */
        const char *ahead = (const char *)weights + (turns > 1 ? count * size : AHEAD);
        if (pairs) {
            to_pairs(wide, weights, count);
            weights = wide;
        }
        for (int64_t turn = 0; turn < turns; turn++) {
            /* Groups of about equally many rows. */
            int64_t row = p->rows * turn / turns, rows = p->rows * (turn + 1) / turns - row;
            const float *x = p->x + row * m->in + k * rows;
            const char *part = ahead + count * size * turn / turns;
            micro((int)rows, x, count, weights, itemsize, part, size / turns, tiles + row * PANEL);
        }
    }
}

/* What follows the product of one panel: `columns` of tiles (rows, PANEL), overwritten, to y from `first` on. */
static inline void finish_columns(const Product *p, int64_t first, int64_t columns, float *tiles) {
    const Matrix *m = p->weight;
    for (int64_t r = 0; r < p->rows; r++) {
        float *y = p->y + r * m->out + first, *t = tiles + r * PANEL;
        if (m->scale)
            for (int64_t c = 0; c < columns; c++) t[c] = rounded(t[c], p->bf16) * m->scale[first + c];
        if (p->bf16)
            for (int64_t c = 0; c < columns; c++) t[c] = rounded(t[c], 1);
        if (p->residual) {
            const float *residual = p->residual + r * m->out + first;
            for (int again = 0; again <= p->twice; again++)
                for (int64_t c = 0; c < columns; c++) t[c] = rounded(residual[c] + t[c], p->bf16);
        }
        memcpy(y, t, columns * sizeof *y);
    }
}

/* Whole panels have a copy of the code of their own, with a size that the compiler knows. */
static ONE_COPY void finish_panel(const Product *p, int64_t panel, float *tiles) {
    int64_t first = panel * PANEL, left = p->weight->out - first;
    if (left >= PANEL) finish_columns(p, first, PANEL, tiles);
    else finish_columns(p, first, left, tiles);
}

static int64_t num_panels(const Matrix *m) { return (m->out + PANEL - 1) / PANEL; }

/* Groups of TOGETHER panels. */
static void product_groups(void *of, int64_t begin, int64_t end) {
    const Product *p = of;
    int64_t panels = num_panels(p->weight);
    float *tiles = scratch(TOGETHER * p->rows * PANEL);
    for (int64_t panel = begin * TOGETHER; panel < end * TOGETHER && panel < panels; panel += TOGETHER) {
        int64_t count = panels - panel < TOGETHER ? panels - panel : TOGETHER;
        if (count == TOGETHER) few_tiles(p, panel, tiles);
        for (int64_t i = 0; i < count; i++) {
            float *tile = tiles + i * p->rows * PANEL;
            if (count < TOGETHER) panel_tiles(p, panel + i, tile);
            finish_panel(p, panel + i, tile);
        }
    }
}

static void product_panels(void *of, int64_t begin, int64_t end) {
    const Product *p = of;
    float *tiles = scratch(p->rows * PANEL);
    for (int64_t panel = begin; panel < end; panel++) {
        panel_tiles(p, panel, tiles);
        finish_panel(p, panel, tiles);
    }
}

/* x (rows, in) to (in, rows): read separately, rows would evict each other from the nearest cache. Blocks of
   four by four; the last overlaps the one before if the rows are no multiple of four. */
static void transpose(const float *x, float *to, int64_t rows, int64_t in) {
    int64_t k = 0;
    for (; rows >= 4 && k + 4 <= in; k += 4)
        for (int64_t r = 0; r < rows; r += 4) {
            int64_t first = r + 4 > rows ? rows - 4 : r;
            Four v[4];
            for (int i = 0; i < 4; i++) memcpy(v + i, x + (first + i) * in + k, sizeof *v);
            Four a = SHUFFLED(FourInts, v[0], v[1], 0, 4, 1, 5), b = SHUFFLED(FourInts, v[0], v[1], 2, 6, 3, 7);
            Four c = SHUFFLED(FourInts, v[2], v[3], 0, 4, 1, 5), d = SHUFFLED(FourInts, v[2], v[3], 2, 6, 3, 7);
            v[0] = SHUFFLED(FourInts, a, c, 0, 1, 4, 5), v[1] = SHUFFLED(FourInts, a, c, 2, 3, 6, 7);
            v[2] = SHUFFLED(FourInts, b, d, 0, 1, 4, 5), v[3] = SHUFFLED(FourInts, b, d, 2, 3, 6, 7);
            for (int i = 0; i < 4; i++) memcpy(to + (k + i) * rows + first, v + i, sizeof *v);
        }
    for (; k < in; k++)
        for (int64_t r = 0; r < rows; r++) to[k * rows + r] = x[r * in + k];
}

/* x (rows, in) to y (rows, out). `transposed` has room for rows * in numbers. */
static void product(
    const Matrix *weight, const float *x, float *transposed, const float *residual, int twice, float *y, int64_t rows, int bf16
) {
    /* Below, one or two rows are the fewest. */
    if (!rows) return;
    int64_t turns = (rows + MOST_ROWS - 1) / MOST_ROWS, in = weight->in;
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t row = rows * turn / turns;
        transpose(x + row * in, transposed + row * in, rows * (turn + 1) / turns - row, in);
    }
    Product p = {weight, transposed, residual, y, rows, twice, bf16};
    /* Reading the weights takes as long as multiplying four rows. */
    int64_t panels = num_panels(weight), work = larger(rows, 4) * weight->out * in;
    if (rows <= FEW_ROWS) share(product_groups, &p, (panels + TOGETHER - 1) / TOGETHER, work);
    else share(product_panels, &p, panels, work);
}

/* RMS normalisation of rows of `width` numbers. */
static ONE_COPY void normalise(const float *x, const float *weight, float eps, float *y, int64_t rows, int64_t width, int bf16) {
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        float inverse = 1.0f / sqrtf(dot(x, x, width) / width + eps);
        for (int64_t i = 0; i < width; i++) y[i] = rounded(x[i] * inverse * weight[i], bf16);
    }
}

/* silu(gate) * up: gate_up (rows, 2 width) to y (rows, width). */
static ONE_COPY void gate(const float *gate_up, float *y, int64_t rows, int64_t width, int bf16) {
    for (int64_t r = 0; r < rows; r++, gate_up += 2 * width, y += width)
        for (int64_t i = 0; i < width; i++) {
            float g = gate_up[i];
            y[i] = rounded(rounded(g / (1.0f + exponential(-g)), bf16) * gate_up[width + i], bf16);
        }
}

#endif
