/* Operations on single bytes: their embedding with hashed n-grams, the next byte's entropy, whether it starts a patch, and
   the maximum of a patch's states. */

#ifndef FASTBLT_BYTES_H
#define FASTBLT_BYTES_H

#include "vector.h"

/* `HashTables` (kernels/hash_embed.py). powers (functions, longest). */
typedef struct {
    const void *const *tables;
    const int64_t *sizes, *powers;
    int64_t num_sizes, num_tables, longest, rows, dim, bf16;
} Hashes;

/* The byte at ids[0], `position` of its text: its own row, then a row of every table, rounded after each as in torch. */
static ONE_COPY void hash_embed(
    const Hashes *h, const int64_t *ids, int64_t position, const void *embedding, float *sum, float *add, void *x,
    int64_t row, int bf16
) {
    size_t number = bf16 ? 2 : 4;
    int64_t width = h->longest, window[width];
    for (int64_t back = 0; back < width; back++) window[width - 1 - back] = back <= position ? ids[-back] : 0;
    widen(sum, (const char *)embedding + ids[0] * h->dim * number, h->dim, bf16);
    for (int64_t t = 0; t < h->num_tables; t++) {
        int64_t size = h->sizes[t % h->num_sizes];
        const int64_t *powers = h->powers + t / h->num_sizes * width, *group = window + width - size;
        uint64_t wrapped = 0;
        for (int64_t i = 0; i < size; i++) wrapped += (uint64_t)group[i] * (uint64_t)powers[i];
        int64_t found = (int64_t)wrapped % h->rows;
        found += found < 0 ? h->rows : 0;
        widen(add, (const char *)h->tables[t] + found * h->dim * (h->bf16 ? 2 : 4), h->dim, (int)h->bf16);
        for (int64_t d = 0; d < h->dim; d++) sum[d] = rounded(sum[d] + rounded(add[d], bf16), bf16);
    }
    narrow((char *)x + row * h->dim * number, sum, h->dim, bf16);
}

/* Entropy of softmax(x), in nats. Overwrites x. */
static ONE_COPY float entropy(float *x, int64_t n) {
    float most = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; i++) total += exponential(x[i] -= most);
    float log_total = logf(total);
    for (int64_t i = 0; i < n; i++) sum += exponential(x[i] - log_total) * (x[i] - log_total);
    return -sum;
}

enum { BY_LEVEL, BY_LEVEL_AND_RISE, BY_RISE, EVERY_BYTE };

/* `Rule` (kernels/boundary.py). judge: one of the above. */
typedef struct {
    int64_t longest, judge;
    float threshold, rise;
} Rule;

static ONE_COPY int starts_patch(float now, float before, int64_t byte, int64_t length, const Rule *rule) {
    if (rule->judge == EVERY_BYTE || byte == 1 || (rule->longest && length >= rule->longest)) return 1;
    if (rule->judge == BY_RISE) return byte == 2 || now - before > rule->threshold;
    if (rule->judge == BY_LEVEL_AND_RISE)
        return byte == 2 || (byte > 3 && now - before > rule->rise && now > rule->threshold);
    return now > rule->threshold;
}

/* Writes the entropy after a text's byte `at`, and the patch of the next byte. Returns whether it starts there. */
static inline int decide(const Rule *rule, float now, int64_t at, float *entropies, int32_t *patch, int32_t *patch_start) {
    int64_t next = at + 1;
    int opens = starts_patch(now, at ? entropies[at - 1] : 0.0f, next, next - patch_start[at], rule);
    entropies[at] = now;
    patch[next] = patch[at] + opens;
    patch_start[next] = opens ? (int32_t)next : patch_start[at];
    return opens;
}

/* `highest` becomes the larger of itself and a state, number by number; NaN if either is. */
static inline void keep_highest(float *highest, const float *state, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) highest[d] = state[d] > highest[d] || state[d] != state[d] ? state[d] : highest[d];
}

#endif
