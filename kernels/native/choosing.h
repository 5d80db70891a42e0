/* From logits to ids, row by row: kernels/sampling.py and kernels/unmasking.py say what it means. */

#ifndef FASTBLT_CHOOSING_H
#define FASTBLT_CHOOSING_H

#include "vector.h"

/* Index of the first largest number; of the first NaN, if there is one. */
static ONE_COPY int64_t argmax(const float *x, int64_t n) {
    float most = most_of(x, n, -INFINITY);
    int bad = 0;
    int64_t i = 0;
    for (int64_t j = 0; j < n; j++) bad |= x[j] != x[j];
    while (bad ? x[i] == x[i] : x[i] != most) i++;
    return i;
}

typedef struct {
    double x;
    int64_t id;
} Ranked;

static int compare(const void *a, const void *b) {
    const Ranked *left = a, *right = b;
    if (left->x != right->x) return left->x > right->x ? -1 : 1;
    return left->id < right->id ? -1 : 1;
}

/* Probabilities are counted in units of 1 / this, as in kernels/sampling.py. */
#define MASS_SCALE 0x1p52

/* params: temperature, top_k, top_p, min_p. */
static ONE_COPY int64_t sample(const double *x, int64_t n, const double *params, double uniform) {
    double temperature = params[0], top_k = params[1], top_p = params[2], min_p = params[3], e[n], sum = 0.0;
    int64_t best = 0, mass[n], most = 0, total = 0, below = 0, drawn = 0;
    for (int64_t i = 0; i < n; i++) best = x[i] > x[best] ? i : best;
    if (!(temperature > 0.0)) return best;
    for (int64_t i = 0; i < n; i++) sum += e[i] = exp((x[i] - x[best]) / temperature);
    for (int64_t i = 0; i < n; i++) mass[i] = (int64_t)(e[i] / sum * MASS_SCALE);
    if (top_k < n || top_p < 1.0) {
        Ranked ranked[n];
        int64_t kept = 0, before = 0;
        for (int64_t i = 0; i < n; i++) ranked[i] = (Ranked){x[i], i};
        qsort(ranked, n, sizeof *ranked, compare);
        for (int64_t rank = 0; rank < n; rank++) {
            if (rank >= top_k) mass[ranked[rank].id] = 0;
            kept += mass[ranked[rank].id];
        }
        for (int64_t rank = 0; rank < n; rank++) {
            int64_t *own = mass + ranked[rank].id, here = *own;
            if (rank && before >= top_p * kept) *own = 0;
            before += here;
        }
    }
    for (int64_t i = 0; i < n; i++) most = mass[i] > most ? mass[i] : most;
    for (int64_t i = 0; i < n; i++) total += mass[i] = mass[i] >= min_p * most ? mass[i] : 0;
    int64_t target = (int64_t)(uniform * total);
    target = target < total - 1 ? target : total - 1;
    for (int64_t i = 0; i < n; i++) drawn += (below += mass[i]) <= target;
    /* Without a valid distribution any valid id will do. */
    return drawn < n ? drawn : n - 1;
}

/* Highest probability and entropy of softmax(x). Ids of probability 0 are ignored. */
static ONE_COPY void confidence_and_entropy(const float *x, int64_t n, float *confidence, float *entropy) {
    float most = most_of(x, n, -INFINITY), total = 0.0f, sum = 0.0f;
    for (int64_t i = 0; i < n; i++) total += exponential(x[i] - most);
    float log_total = logf(total);
    for (int64_t i = 0; i < n; i++)
        if (x[i] > -INFINITY) sum += exponential(x[i] - most) / total * (x[i] - most - log_total);
    *confidence = 1.0f / total;
    *entropy = -sum;
}

/* The numbers of kernels/unmasking.py. */
enum { ONE_STEP, CONFIDENCE, ENTROPY, ENTROPY_MINUS_MAX };

/* One block of n cells. */
static void unmask(
    const uint8_t *masked, const float *confidence, const float *entropy, int64_t rule, double bound, uint8_t *settled,
    int64_t n
) {
    int64_t best = -1;
    memset(settled, 0, n);
    if (rule == ONE_STEP) memcpy(settled, masked, n);
    else if (rule == CONFIDENCE) {
        int any = 0;
        for (int64_t i = 0; i < n; i++) {
            if (!masked[i]) continue;
            any |= settled[i] = confidence[i] > bound;
            if (best < 0 || confidence[i] > confidence[best]) best = i;
        }
        if (!any && best >= 0) settled[best] = 1;
    } else {
        /* The remaining ones, in ascending order. */
        for (double total = 0.0;; total += entropy[best]) {
            int64_t next = -1;
            for (int64_t i = 0; i < n; i++)
                if (masked[i] && !settled[i] && (next < 0 || entropy[i] < entropy[next])) next = i;
            if (next < 0) return;
            /* At least one. */
            if (best >= 0 && (rule == ENTROPY_MINUS_MAX ? total : total + entropy[next]) > bound) return;
            settled[best = next] = 1;
        }
    }
}

#endif
