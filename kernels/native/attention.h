/* Attention over paged keys and values: kernels/attention.py and kernels/cross_attention.py say what it means. Every row
   goes through the pages that it sees in ascending order with a running maximum, by itself. */

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

/* Four sums at once, each in the order of `dot`. */
static inline void four_dots(const float *q, const float *keys, int64_t width, float *scores) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    typedef float Four __attribute__((vector_size(16)));
    Vector sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Vector a = load(q + i);
        for (int j = 0; j < 4; j++) sum[j] += a * load(keys + j * width + i);
    }
    Four part[4], half[2], whole;
    for (int j = 0; j < 4; j++) {
        Four parts[LANES / 4];
        memcpy(parts, &sum[j], sizeof parts);
        for (int n = LANES / 8; n; n /= 2)
            for (int k = 0; k < n; k++) parts[k] += parts[k + n];
        part[j] = parts[0];
    }
    for (int j = 0; j < 2; j++)
        half[j] = __builtin_shufflevector(part[2 * j], part[2 * j + 1], 0, 4, 1, 5) +
                  __builtin_shufflevector(part[2 * j], part[2 * j + 1], 2, 6, 3, 7);
    whole = __builtin_shufflevector(half[0], half[1], 0, 1, 4, 5) + __builtin_shufflevector(half[0], half[1], 2, 3, 6, 7);
    memcpy(scores, &whole, sizeof whole);
    for (; i < width; i++)
        for (int j = 0; j < 4; j++) scores[j] += q[i] * keys[j * width + i];
#else
    for (int j = 0; j < 4; j++) scores[j] = dot(q, keys + j * width, width);
#endif
}

/* Adds values weighted: of even and of odd places apart, so that additions need not wait for each other. */
static void add_weighted(float *out, const float *weights, const float *values, int64_t count, int64_t width) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) {
        Vector even[4], odd[4] = {{0}, {0}, {0}, {0}};
        for (int i = 0; i < 4; i++) even[i] = load(out + d + i * LANES);
        int64_t j = 0;
        for (; j + 2 <= count; j += 2)
            for (int i = 0; i < 4; i++) {
                even[i] += weights[j] * load(values + j * width + d + i * LANES);
                odd[i] += weights[j + 1] * load(values + (j + 1) * width + d + i * LANES);
            }
        for (int i = 0; i < 4 && j < count; i++) even[i] += weights[j] * load(values + j * width + d + i * LANES);
        for (int i = 0; i < 4; i++) store(out + d + i * LANES, even[i] + odd[i]);
    }
    for (; d + LANES <= width; d += LANES) {
        Vector sum = load(out + d);
        for (int64_t j = 0; j < count; j++) sum += weights[j] * load(values + j * width + d);
        store(out + d, sum);
    }
    for (; d < width; d++)
        for (int64_t j = 0; j < count; j++) out[d] += weights[j] * values[j * width + d];
}

/* One tile and one K/V head. */
static void attend_tile(
    const Attention *a, const int64_t *tile, int64_t kv_head, float *scores, float *keys, float *values
) {
    const Plan *plan = a->plan;
    int64_t begin = tile[0], count = tile[1], pages_at = tile[2], first_page = tile[3], num_pages = tile[4];
    int64_t width = a->cache->head_dim, size = plan->page_size, shared = a->heads / a->cache->kv_heads;
    int64_t streams = count * shared;
    float highest[streams], total[streams];
    for (int64_t s = 0; s < streams; s++) highest[s] = -INFINITY, total[s] = 0.0f;
    for (int64_t p = 0; p < num_pages; p++) {
        int64_t base = (first_page + p) * size;
        int64_t at = (plan->pages[pages_at + p] * a->cache->kv_heads + kv_head) * size * width;
        const float *k = (const float *)a->cache->keys + at, *v = (const float *)a->cache->values + at;
        if (a->bf16) {
            widen(keys, (const uint16_t *)a->cache->keys + at, size * width, 1);
            widen(values, (const uint16_t *)a->cache->values + at, size * width, 1);
            k = keys, v = values;
        }
        for (int64_t s = 0; s < streams; s++) {
            int64_t row = begin + s / shared, head = kv_head * shared + s % shared;
            int64_t low = plan->first[row] - base, high = plan->last[row] - base;
            low = low < 0 ? 0 : low, high = high >= size ? size - 1 : high;
            if (low > high) continue;
            const float *q = a->q + (row * a->heads + head) * width;
            float *out = a->out + (row * a->heads + head) * width;
            float most = highest[s];
            int64_t next = low;
            for (; next + 4 <= high + 1; next += 4) four_dots(q, k + next * width, width, scores + next);
            for (; next <= high; next++) scores[next] = dot(q, k + next * width, width);
            most = most_of(scores + low, high + 1 - low, most);
            float keep = highest[s] == -INFINITY ? 0.0f : exponential(highest[s] - most);
            total[s] = total[s] * keep + exponentials(scores + low, high + 1 - low, most);
            highest[s] = most;
            for (int64_t d = 0; d < width; d++) out[d] *= keep;
            add_weighted(out, scores + low, v + low * width, high + 1 - low, width);
        }
    }
    for (int64_t s = 0; s < streams; s++) {
        float *out = a->out + ((begin + s / shared) * a->heads + kv_head * shared + s % shared) * width;
        float divisor = total[s] > 0.0f ? total[s] : 1.0f;
        for (int64_t d = 0; d < width; d++) out[d] = rounded(out[d] / divisor, a->bf16);
    }
}

static void attend_tiles(void *of, int64_t begin, int64_t end) {
    const Attention *a = of;
    /* Of one page: the scores of a row, and keys and values if they must be widened. */
    int64_t size = a->plan->page_size, numbers = a->bf16 ? size * a->cache->head_dim : 0;
    float *scores = scratch(size + 2 * numbers), *keys = scores + size, *values = keys + numbers;
    for (int64_t i = begin; i < end; i++)
        attend_tile(a, a->plan->tiles + i / a->cache->kv_heads * 5, i % a->cache->kv_heads, scores, keys, values);
}

/* q (queries, heads, head_dim), scaled, to out of the same shape. Rows of no tile come out as zeros. */
static void attend(const float *q, float *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16) {
    int64_t work = 0;
    for (int64_t t = 0; t < plan->num_tiles; t++) work += plan->tiles[t * 5 + 1] * plan->tiles[t * 5 + 4];
    memset(out, 0, plan->queries * heads * cache->head_dim * sizeof *out);
    Attention a = {q, out, plan, cache, heads, bf16};
    share(attend_tiles, &a, plan->num_tiles * cache->kv_heads, work * plan->page_size * heads * cache->head_dim * 2);
}

/* Rows r of q read the `slots` cache rows that begin at page[r], offset[r]. */
static void attend_slots(
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
                add_weighted(seen, weights, values, slots, width);
                for (int64_t d = 0; d < width; d++) seen[d] = rounded(seen[d], bf16);
            }
        }
}

#endif
