/* Attention over paged keys and values: kernels/attention.py and kernels/cross_attention.py say what it means. Every row
   goes through its pages alone, in ascending order with a running maximum. */

#ifndef FASTBLT_ATTENTION_H
#define FASTBLT_ATTENTION_H

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

/* Memory to prefetch meanwhile: `bytes` from `from` on. */
static inline void bring(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(from + i);
}

typedef float Four __attribute__((vector_size(16)));

/* The lanes of a vector as four sums, as `sum_of` adds them. */
static inline Four quarters(Vector v) {
    Four part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int n = LANES / 8; n; n /= 2)
        for (int k = 0; k < n; k++) part[k] += part[k + n];
    return part[0];
}

/* The two functions below for keys and values of one type; with bfloat16 they are widened as they are loaded.

   four_dots: q with four keys at once, each in the order of `dot`.
   add_weighted: adds weighted values, even and odd ones apart, so that additions need not wait for each other.
   ahead: keys needed next, with their bytes per value. */
#define ATTENDING(KIND, TYPE, LOAD, NUMBER)                                                                            \
    static inline void four_dots_##KIND(const float *q, const TYPE *keys, int64_t width, float *scores) {              \
        Vector a = {0}, b = {0}, c = {0}, d = {0};                                                                     \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= width; i += LANES) {                                                                       \
            Vector x = load(q + i);                                                                                    \
            a += x * LOAD(keys + i);                                                                                   \
            b += x * LOAD(keys + width + i);                                                                           \
            c += x * LOAD(keys + 2 * width + i);                                                                       \
            d += x * LOAD(keys + 3 * width + i);                                                                       \
        }                                                                                                              \
        Four e = quarters(a), f = quarters(b), g = quarters(c), h = quarters(d);                                       \
        scores[0] = (e[0] + e[2]) + (e[1] + e[3]);                                                                     \
        scores[1] = (f[0] + f[2]) + (f[1] + f[3]);                                                                     \
        scores[2] = (g[0] + g[2]) + (g[1] + g[3]);                                                                     \
        scores[3] = (h[0] + h[2]) + (h[1] + h[3]);                                                                     \
        for (; i < width; i++)                                                                                         \
            for (int j = 0; j < 4; j++) scores[j] += q[i] * NUMBER(keys[j * width + i]);                               \
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
        float *out, const float *weights, const TYPE *values, int64_t count, int64_t width, const char *ahead          \
    ) {                                                                                                                \
        int64_t d = 0;                                                                                                 \
        for (; d + 4 * LANES <= width; d += 4 * LANES) {                                                               \
            Vector even[4], odd[4] = {{0}, {0}, {0}, {0}};                                                             \
            for (int i = 0; i < 4; i++) even[i] = load(out + d + i * LANES);                                           \
            int64_t j = 0;                                                                                             \
            for (; j + 2 <= count; j += 2) {                                                                           \
                bring(ahead + (j * width + d) * sizeof(TYPE), 2 * 4 * LANES * sizeof(TYPE));                           \
                for (int i = 0; i < 4; i++) {                                                                          \
                    even[i] += weights[j] * LOAD(values + j * width + d + i * LANES);                                  \
                    odd[i] += weights[j + 1] * LOAD(values + (j + 1) * width + d + i * LANES);                         \
                }                                                                                                      \
            }                                                                                                          \
            for (int i = 0; i < 4 && j < count; i++) even[i] += weights[j] * LOAD(values + j * width + d + i * LANES); \
            for (int i = 0; i < 4; i++) store(out + d + i * LANES, even[i] + odd[i]);                                  \
        }                                                                                                              \
        for (; d + LANES <= width; d += LANES) {                                                                       \
            Vector sum = load(out + d);                                                                                \
            for (int64_t j = 0; j < count; j++) sum += weights[j] * LOAD(values + j * width + d);                      \
            store(out + d, sum);                                                                                       \
        }                                                                                                              \
        for (; d < width; d++)                                                                                         \
            for (int64_t j = 0; j < count; j++) out[d] += weights[j] * NUMBER(values[j * width + d]);                  \
    }

#define SAME(x) (x)
ATTENDING(f32, float, load, SAME)
ATTENDING(bf16, uint16_t, load_bf16, from_bf16)

/* One tile and one K/V head. `scores`: room for one row's scores with a page. */
#define ATTEND_TILE(KIND, TYPE)                                                                                        \
    static void attend_tile_##KIND(const Attention *a, const int64_t *tile, int64_t kv_head, float *scores) {          \
        const Plan *plan = a->plan;                                                                                    \
        int64_t begin = tile[0], count = tile[1], first_page = tile[3], num_pages = tile[4];                           \
        const int64_t *pages = plan->pages + tile[2];                                                                  \
        int64_t width = a->cache->head_dim, size = plan->page_size, shared = a->heads / a->cache->kv_heads;            \
        int64_t streams = count * shared, each = size * width;                                                         \
        float highest[streams], total[streams];                                                                        \
        for (int64_t s = 0; s < streams; s++) highest[s] = -INFINITY, total[s] = 0.0f;                                 \
        for (int64_t p = 0; p < num_pages; p++) {                                                                      \
            int64_t base = (first_page + p) * size, next_page = pages[p + 1 < num_pages ? p + 1 : p];                  \
            int64_t at = (pages[p] * a->cache->kv_heads + kv_head) * each;                                             \
            const TYPE *k = (const TYPE *)a->cache->keys + at, *v = (const TYPE *)a->cache->values + at;               \
            const TYPE *ahead = (const TYPE *)a->cache->keys + (next_page * a->cache->kv_heads + kv_head) * each;      \
            for (int64_t s = 0; s < streams; s++) {                                                                    \
                int64_t row = begin + s / shared, head = kv_head * shared + s % shared;                                \
                int64_t low = plan->first[row] - base, high = plan->last[row] - base;                                  \
                low = low < 0 ? 0 : low, high = high >= size ? size - 1 : high;                                        \
                if (low > high) continue;                                                                              \
                const float *q = a->q + (row * a->heads + head) * width;                                               \
                float *out = a->out + (row * a->heads + head) * width;                                                 \
                float most = highest[s];                                                                               \
                int64_t next = low;                                                                                    \
                for (; next + 4 <= high + 1; next += 4) {                                                              \
                    bring((const char *)(v + next * width), 4 * width * sizeof(TYPE));                                 \
                    four_dots_##KIND(q, k + next * width, width, scores + next);                                       \
                }                                                                                                      \
                for (; next <= high; next++) scores[next] = one_dot_##KIND(q, k + next * width, width);                \
                most = most_of(scores + low, high + 1 - low, most);                                                    \
                float keep = highest[s] == -INFINITY ? 0.0f : exponential(highest[s] - most);                          \
                total[s] = total[s] * keep + exponentials(scores + low, high + 1 - low, most);                         \
                highest[s] = most;                                                                                     \
                for (int64_t d = 0; d < width; d++) out[d] *= keep;                                                    \
                const char *wanted = (const char *)(ahead + (next_page == pages[p] ? low : 0) * width);                \
                add_weighted_##KIND(out, scores + low, v + low * width, high + 1 - low, width, wanted);                \
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
    float *scores = scratch(a->plan->page_size);
    for (int64_t i = begin; i < end; i++) {
        const int64_t *tile = a->plan->tiles + i / a->cache->kv_heads * 5;
        if (a->bf16) attend_tile_bf16(a, tile, i % a->cache->kv_heads, scores);
        else attend_tile_f32(a, tile, i % a->cache->kv_heads, scores);
    }
}

/* q (queries, heads, head_dim), scaled, to out of the same shape. Outputs of rows in no tile are zeros. */
static ONE_COPY void attend(const float *q, float *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16) {
    int64_t work = 0;
    for (int64_t t = 0; t < plan->num_tiles; t++) work += plan->tiles[t * 5 + 1] * plan->tiles[t * 5 + 4];
    memset(out, 0, plan->queries * heads * cache->head_dim * sizeof *out);
    Attention a = {q, out, plan, cache, heads, bf16};
    share(attend_tiles, &a, plan->num_tiles * cache->kv_heads, work * plan->page_size * heads * cache->head_dim * 2);
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
                add_weighted_f32(seen, weights, values, slots, width, (const char *)values);
                for (int64_t d = 0; d < width; d++) seen[d] = rounded(seen[d], bf16);
            }
        }
}

#endif
