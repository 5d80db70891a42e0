/* Operations on single bytes: their embedding with hashed n-grams, the next byte's entropy, and whether it starts a
   patch. */

#ifndef FASTBLT_BYTES_H
#define FASTBLT_BYTES_H

#include "vector.h"

/* `HashTables` (kernels/hash_embed.py). powers (functions, longest). */
typedef struct {
    const void *const *tables;
    const int64_t *sizes, *powers;
    int64_t num_sizes, num_tables, longest, rows, dim, bf16;
} Hashes;

/* One byte: its own row, then a row of every table, rounded after each as in torch. */
static ONE_COPY void hash_embed(
    const Hashes *h, const int64_t *window, int64_t width, const void *embedding, float *sum, float *add, void *x,
    int64_t row, int bf16
) {
    size_t number = bf16 ? 2 : 4;
    widen(sum, (const char *)embedding + window[width - 1] * h->dim * number, h->dim, bf16);
    for (int64_t t = 0; t < h->num_tables; t++) {
        int64_t size = h->sizes[t % h->num_sizes];
        const int64_t *powers = h->powers + t / h->num_sizes * h->longest, *ids = window + width - size;
        uint64_t wrapped = 0;
        for (int64_t i = 0; i < size; i++) wrapped += (uint64_t)ids[i] * (uint64_t)powers[i];
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

/* `Rule` (kernels/boundary.py), but for the longest patch. */
enum { BY_LEVEL, BY_LEVEL_AND_RISE, BY_RISE, EVERY_BYTE };

static ONE_COPY int starts_patch(float now, float before, int64_t byte, int judge, float threshold, float rise) {
    if (judge == EVERY_BYTE || byte == 1) return 1;
    if (judge == BY_RISE) return byte == 2 || now - before > threshold;
    if (judge == BY_LEVEL_AND_RISE) return byte == 2 || (byte > 3 && now - before > rise && now > threshold);
    return now > threshold;
}

#endif
