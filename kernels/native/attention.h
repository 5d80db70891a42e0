/* Attention over paged keys and values: kernels/attention.py and kernels/cross_attention.py say what it means. Every row
   goes through its pages alone, in ascending order with a running maximum. */

#ifndef FASTBLT_ATTENTION_H
#define FASTBLT_ATTENTION_H

#include "planning.h"
#include "pool.h"
#include "vector.h"

/* `AttentionPlan` (kernels/attention.py). */
typedef struct {
    int64_t rows, queries, num_tiles, page_size;
    const int64_t *positions, *page, *offset, *first, *last, *tiles, *pages;
} Plan;

/* Keys and values, (pages, kv_heads, page_size, head_dim) each; `KvCache` (kernels/stack.py) has many. */
typedef struct {
    void *keys, *values;
    int64_t kv_heads, page_size, head_dim;
} Cache;

typedef struct {
    const float *q;
    float *out;
    const Plan *plan;
    const Cache *cache;
    int64_t heads;
    int bf16;
} Attention;

#define LINE 64

/* Prefetches `bytes` from `from` on, into the second cache: the nearest is too small for what is read meanwhile too. */
static inline void bring(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

/* Every group of lanes, those of a before those of b, to one of half as many, as `sum_of` adds them. halves_4: from 8
   lanes to 4. */
#if LANES == 16
static inline Vector halves_8(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLED(Ints, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

static inline Vector halves_4(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLED(Ints, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

static inline Vector halves_2(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLED(Ints, a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

static inline Vector halves_1(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLED(Ints, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
static inline Vector halves_4(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLED(Ints, a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

static inline Vector halves_2(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLED(Ints, a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}

static inline Vector halves_1(Vector a, Vector b) {
    return SHUFFLED(Ints, a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLED(Ints, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#endif

/* Part of `add_weighted` below: NUM vectors of the output at a time. */
#define ADD_VECTORS(NUM, LOAD)                                                                                         \
    for (; d + NUM * LANES <= width; d += NUM * LANES) {                                                               \
        Vector even[NUM], odd[NUM];                                                                                    \
        for (int i = 0; i < NUM; i++) even[i] = load(out + d + i * LANES) * keep, odd[i] = (Vector){0};                \
        int64_t j = 0;                                                                                                 \
        for (; j + 2 <= count; j += 2)                                                                                 \
            for (int i = 0; i < NUM; i++) {                                                                            \
                even[i] += weights[j] * LOAD(values + j * width + d + i * LANES);                                      \
                odd[i] += weights[j + 1] * LOAD(values + (j + 1) * width + d + i * LANES);                             \
            }                                                                                                          \
        for (int i = 0; i < NUM && j < count; i++) even[i] += weights[j] * LOAD(values + j * width + d + i * LANES);   \
        for (int i = 0; i < NUM; i++) store(out + d + i * LANES, even[i] + odd[i]);                                    \
    }

/* The functions below for keys and values of one type; bfloat16 is widened as it is loaded.

   quarters: four partial sums for each of LANES / 4 keys.
   dots: q with LANES keys, each in the order of `dot`.
   add_weighted: out = out * keep + weighted values, even and odd ones apart, so that additions need not wait for each
   other. */
#define ATTENDING(KIND, TYPE, LOAD, NUMBER)                                                                            \
    static inline Vector quarters_##KIND(const float *q, const TYPE *keys, int64_t width) {                            \
        Vector sums[LANES / 4];                                                                                        \
        for (int j = 0; j < LANES / 4; j++) sums[j] = (Vector){0};                                                     \
        for (int64_t i = 0; i + LANES <= width; i += LANES)                                                            \
            for (int j = 0; j < LANES / 4; j++) sums[j] += load(q + i) * LOAD(keys + j * width + i);                   \
        return QUARTERS(sums);                                                                                         \
    }                                                                                                                  \
                                                                                                                       \
    static inline void dots_##KIND(const float *q, const TYPE *keys, int64_t width, float *scores) {                   \
        int64_t step = LANES / 4 * width;                                                                              \
        Vector a = quarters_##KIND(q, keys, width), b = quarters_##KIND(q, keys + step, width);                        \
        Vector c = quarters_##KIND(q, keys + 2 * step, width), d = quarters_##KIND(q, keys + 3 * step, width);         \
        store(scores, halves_1(halves_2(a, b), halves_2(c, d)));                                                       \
        for (int64_t i = width / LANES * LANES; i < width; i++)                                                        \
            for (int j = 0; j < LANES; j++) scores[j] += q[i] * NUMBER(keys[j * width + i]);                           \
    }                                                                                                                  \
                                                                                                                       \
    static inline float one_dot_##KIND(const float *q, const TYPE *key, int64_t width) {                               \
        Vector sum = {0};                                                                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= width; i += LANES) sum += load(q + i) * LOAD(key + i);                                     \
        float score = sum_of(sum);                                                                                     \
        for (; i < width; i++) score += q[i] * NUMBER(key[i]);                                                         \
        return score;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    static inline void add_weighted_##KIND(                                                                            \
        float *out, float keep, const float *weights, const TYPE *values, int64_t count, int64_t width                 \
    ) {                                                                                                                \
        int64_t d = 0;                                                                                                 \
        ADD_VECTORS(4, LOAD)                                                                                           \
        ADD_VECTORS(2, LOAD)                                                                                           \
        ADD_VECTORS(1, LOAD)                                                                                           \
        for (; d < width; d++) {                                                                                       \
            out[d] *= keep;                                                                                            \
            for (int64_t j = 0; j < count; j++) out[d] += weights[j] * NUMBER(values[j * width + d]);                  \
        }                                                                                                              \
    }

#if LANES == 16
#define QUARTERS(v) halves_4(halves_8(v[0], v[1]), halves_8(v[2], v[3]))
#else
#define QUARTERS(v) halves_4(v[0], v[1])
#endif
#define SAME(x) (x)
ATTENDING(f32, float, load, SAME)
ATTENDING(bf16, uint16_t, load_bf16, from_bf16)

/* What a tile sees of its page `p`: rows `low` to `high`, and where the row `low` of a K/V head lies, in numbers. */
typedef struct {
    int64_t low, high, at;
} Seen;

static inline Seen seen_of(const Attention *a, const int64_t *tile, int64_t p, int64_t kv_head) {
    if (!tile[COUNT] || !tile[NUM_PAGES]) return (Seen){0, -1, 0};
    int64_t size = a->cache->page_size, base = (tile[FIRST_PAGE] + p) * size;
    int64_t low = a->plan->first[tile[BEGIN]] - base, high = a->plan->last[tile[BEGIN] + tile[COUNT] - 1] - base;
    low = low < 0 ? 0 : low, high = high >= size ? size - 1 : high;
    int64_t page = a->plan->pages[tile[PAGES_AT] + p] * a->cache->kv_heads + kv_head;
    return (Seen){low, high, (page * size + low) * a->cache->head_dim};
}

/* One tile and one K/V head. `then`: what is read after it. `scores`: room for a page of scores and LANES more. */
#define ATTEND_TILE(KIND, TYPE)                                                                                        \
    static void attend_tile_##KIND(                                                                                    \
        const Attention *a, const int64_t *tile, int64_t kv_head, Seen then, float *scores                             \
    ) {                                                                                                                \
        const Plan *plan = a->plan;                                                                                    \
        int64_t begin = tile[BEGIN], count = tile[COUNT], first_page = tile[FIRST_PAGE], num_pages = tile[NUM_PAGES];  \
        int64_t width = a->cache->head_dim, size = plan->page_size, shared = a->heads / a->cache->kv_heads;            \
        int64_t streams = count * shared;                                                                              \
        float highest[streams], total[streams];                                                                        \
        for (int64_t s = 0; s < streams; s++) highest[s] = -INFINITY, total[s] = 0.0f;                                 \
        for (int64_t p = 0; p < num_pages; p++) {                                                                      \
            int64_t base = (first_page + p) * size;                                                                    \
            int64_t at = (plan->pages[tile[PAGES_AT] + p] * a->cache->kv_heads + kv_head) * size * width;              \
            const TYPE *k = (const TYPE *)a->cache->keys + at, *v = (const TYPE *)a->cache->values + at;               \
            Seen next = p + 1 < num_pages ? seen_of(a, tile, p + 1, kv_head) : then;                                   \
            const char *next_k = (const char *)((const TYPE *)a->cache->keys + next.at);                               \
            const char *next_v = (const char *)((const TYPE *)a->cache->values + next.at);                             \
            for (int64_t s = 0; s < streams; s++) {                                                                    \
                int64_t row = begin + s / shared, head = kv_head * shared + s % shared;                                \
                int64_t low = plan->first[row] - base, high = plan->last[row] - base;                                  \
                low = low < 0 ? 0 : low, high = high >= size ? size - 1 : high;                                        \
                if (low > high) continue;                                                                              \
                const float *q = a->q + (row * a->heads + head) * width;                                               \
                float *out = a->out + (row * a->heads + head) * width;                                                 \
                float most = highest[s];                                                                               \
                int64_t j = low / LANES * LANES;                                                                       \
                /* The first stream prefetches a share of what is next with each vector of keys. */                    \
                int64_t part = (next.high - next.low) / (high / LANES - low / LANES + 1) + 1;                          \
                int64_t bytes = s ? 0 : part * width * sizeof(TYPE);                                                   \
                for (; j + LANES <= size && j <= high; j += LANES, next_k += bytes, next_v += bytes) {                 \
                    bring(next_k, bytes);                                                                              \
                    bring(next_v, bytes);                                                                              \
                    dots_##KIND(q, k + j * width, width, scores + j);                                                  \
                }                                                                                                      \
                for (; j <= high; j++) scores[j] = one_dot_##KIND(q, k + j * width, width);                            \
                most = most_of(scores + low, high + 1 - low, most);                                                    \
                float keep = highest[s] == -INFINITY ? 0.0f : exponential(highest[s] - most);                          \
                total[s] = total[s] * keep + exponentials(scores + low, high + 1 - low, most);                         \
                highest[s] = most;                                                                                     \
                add_weighted_##KIND(out, keep, scores + low, v + low * width, high + 1 - low, width);                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t s = 0; s < streams; s++) {                                                                        \
            float *out = a->out + ((begin + s / shared) * a->heads + kv_head * shared + s % shared) * width;           \
            float divisor = total[s] > 0.0f ? total[s] : 1.0f;                                                         \
            for (int64_t d = 0; d < width; d++) out[d] = rounded(out[d] / divisor, a->bf16);                           \
        }                                                                                                              \
    }

ATTEND_TILE(f32, float)
ATTEND_TILE(bf16, uint16_t)

static void attend_tiles(void *of, int64_t begin, int64_t end) {
    const Attention *a = of;
    int64_t kv_heads = a->cache->kv_heads;
    float *scores = scratch(a->plan->page_size + LANES);
    for (int64_t i = begin; i < end; i++) {
        const int64_t *tile = a->plan->tiles + i / kv_heads * TILE_NUMBERS;
        int64_t after = i + 1 < end ? i + 1 : i;
        Seen then = seen_of(a, a->plan->tiles + after / kv_heads * TILE_NUMBERS, 0, after % kv_heads);
        if (a->bf16) attend_tile_bf16(a, tile, i % kv_heads, then, scores);
        else attend_tile_f32(a, tile, i % kv_heads, then, scores);
    }
}

/* q (queries, heads, head_dim), scaled, to out of the same shape. Outputs of rows in no tile are zeros. */
static ONE_COPY void attend(const float *q, float *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16) {
    const int64_t *tile = plan->tiles;
    /* A multiplication here takes about four times as long as in a product, as its keys come from farther away. */
    int64_t work = 0, each = 4 * 2 * plan->page_size * heads * cache->head_dim;
    for (int64_t t = 0; t < plan->num_tiles; t++, tile += TILE_NUMBERS) work += tile[COUNT] * tile[NUM_PAGES];
    memset(out, 0, plan->queries * heads * cache->head_dim * sizeof *out);
    Attention a = {q, out, plan, cache, heads, bf16};
    share(attend_tiles, &a, plan->num_tiles * cache->kv_heads, work * each);
}

/* Rows r of q read the `slots` cache rows that begin at page[r], offset[r]. */
static ONE_COPY void attend_slots(
    const float *q, float *out, const int64_t *page, const int64_t *offset, const Cache *cache, int64_t slots,
    int64_t rows, int64_t heads, int bf16
) {
    int64_t width = cache->head_dim, shared = heads / cache->kv_heads;
    float keys[slots * width], values[slots * width], weights[slots], scale = 1.0f / sqrtf((float)width);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t kv_head = 0; kv_head < cache->kv_heads; kv_head++) {
            int64_t at = ((page[r] * cache->kv_heads + kv_head) * cache->page_size + offset[r]) * width;
            int64_t size = bf16 ? 2 : 4;
            widen(keys, (const char *)cache->keys + at * size, slots * width, bf16);
            widen(values, (const char *)cache->values + at * size, slots * width, bf16);
            for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; head++) {
                const float *query = q + (r * heads + head) * width;
                float *seen = out + (r * heads + head) * width, most = -INFINITY, total = 0.0f;
                for (int64_t j = 0; j < slots; j++) {
                    weights[j] = dot(query, keys + j * width, width) * scale;
                    most = weights[j] > most ? weights[j] : most;
                }
                for (int64_t j = 0; j < slots; j++) total += weights[j] = exponential(weights[j] - most);
                for (int64_t j = 0; j < slots; j++) weights[j] /= total;
                for (int64_t d = 0; d < width; d++) seen[d] = 0.0f;
                add_weighted_f32(seen, 1.0f, weights, values, slots, width);
                for (int64_t d = 0; d < width; d++) seen[d] = rounded(seen[d], bf16);
            }
        }
}

#endif
