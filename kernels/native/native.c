/* The CPU's operations, in whole layers. kernels/native/__init__.py calls them and describes the arguments; what
   they compute is written in torch in the files of kernels/.

   bf16: whether the model's dtype is bfloat16 rather than float. Inside, numbers are floats, rounded where the torch twins
   round. */

/* For clock_gettime and madvise, which C11 alone hides. */
#define _DEFAULT_SOURCE

#include "attention.h"
#include "bytes.h"
#include "choosing.h"
#include "planning.h"
#include "product.h"
#include "stack.h"

/* Which sources this was compiled from: structs must be those that the other side lays out. */
const char *fastblt_sources(void) { return FASTBLT_SOURCES; }

int64_t fastblt_panel(void) { return PANEL; }

static void begin(int threads) {
    pthread_mutex_lock(&one_at_a_time);
    set_threads(threads);
}

static void finish(void) { pthread_mutex_unlock(&one_at_a_time); }

/* Lays matrices (outs[i], in) out as the panels of one. */
void fastblt_pack(
    const void *const *parts, const int64_t *outs, int64_t num_parts, int64_t in, int64_t itemsize, void *panels, int threads
) {
    int64_t out = 0;
    for (int64_t part = 0; part < num_parts; part++) out += outs[part];
    int64_t count = (out + PANEL - 1) / PANEL;
    begin(threads);
    Packing packing = {parts, outs, panels, num_parts, out, in, itemsize};
    take_large_pages(panels, count * PANEL * in * itemsize);
    share(pack_panels, &packing, count, out * in);
    finish();
}

/* x (rows, in) to y (rows, out), with the operations of `kernels.linear` before and after it. */
static ONE_COPY void run_linear(
    const Matrix *weight, const void *x, const float *norm, float eps, int gated, const void *residual, int twice, void *y,
    int64_t rows, int bf16
) {
    int64_t in = weight->in, out = weight->out, left = gated ? out / 2 : out;
    reserve(rows * (3 * in + out + 2 * left) + 64 * 6);
    float *wide = take(rows * in), *normed = take(rows * in), *full = take(rows * out);
    float *gates = take(rows * left), *before = take(rows * left), *transposed = take(rows * in);
    widen(wide, x, rows * in, bf16);
    if (norm) {
        normalise(wide, norm, eps, normed, rows, in, bf16);
        wide = normed;
    }
    if (residual) widen(before, residual, rows * left, bf16);
    product(weight, wide, transposed, residual && !gated ? before : 0, twice, full, rows, bf16);
    if (gated) {
        gate(full, gates, rows, left, bf16);
        if (residual)
            for (int again = 0; again <= twice; again++)
                for (int64_t i = 0; i < rows * left; i++) gates[i] = rounded(before[i] + gates[i], bf16);
        full = gates;
    }
    narrow(y, full, rows * left, bf16);
}

void fastblt_linear(
    const Matrix *weight, const void *x, const float *norm, float eps, int gated, const void *residual, int twice, void *y,
    int64_t rows, int bf16, int threads
) {
    begin(threads);
    run_linear(weight, x, norm, eps, gated, residual, twice, y, rows, bf16);
    finish();
}

/* Multiplies in the nearest cache, in `parts` parts that the threads share. Returns the number of multiply-adds. */
int64_t fastblt_multiply(int64_t parts, int threads) {
    int64_t each = (int64_t)IDEAL_TIMES * IDEAL_STEPS * MOST_ROWS * PANEL;
    begin(threads);
    share(multiply_in_cache, 0, parts, parts * each);
    finish();
    return parts * each;
}

/* q (queries, heads, head_dim) to out of the same shape. */
static ONE_COPY void run_attention(const void *q, void *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16) {
    int64_t numbers = plan->queries * heads * cache->head_dim;
    reserve(2 * numbers + 64 * 2);
    float *scaled = take(numbers), *seen = take(numbers), scale = 1.0f / sqrtf((float)cache->head_dim);
    widen(scaled, q, numbers, bf16);
    for (int64_t i = 0; i < numbers; i++) scaled[i] = rounded(scaled[i] * scale, bf16);
    attend(scaled, seen, plan, cache, heads, bf16);
    narrow(out, seen, numbers, bf16);
}

void fastblt_attention(
    const void *q, void *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16, int threads
) {
    begin(threads);
    run_attention(q, out, plan, cache, heads, bf16);
    finish();
}

void fastblt_stack(
    const Stack *s, const Plan *plan, const Cache *caches, const Cache *cross, void *states, const int64_t *page,
    const int64_t *offset, const void *x, const int64_t *logit_rows, int64_t left, void *y, int threads
) {
    begin(threads);
    run_stack(s, plan, caches, cross, states, page, offset, x, logit_rows, left, y);
    finish();
}

void fastblt_cross_kv(
    const CrossKv *cross_kv, int64_t count, const int64_t *page, const int64_t *offset, const Cache *caches, const void *x,
    int64_t rows, int threads
) {
    begin(threads);
    run_cross_kv(cross_kv, count, page, offset, caches, x, rows);
    finish();
}

#include "step.h"

/* The bytes at ids[at[r]], positions[r] of their texts, to x (rows, dim). */
void fastblt_hash_embed(
    const Hashes *hashes, const int64_t *ids, const int64_t *at, const int64_t *positions, const void *embedding, void *x,
    int64_t rows, int bf16
) {
    float sum[hashes->dim], add[hashes->dim];
    for (int64_t r = 0; r < rows; r++) hash_embed(hashes, ids + at[r], positions[r], embedding, sum, add, x, r, bf16);
}

/* logits (rows, vocabulary) to nats (rows,) float. */
void fastblt_entropy(const void *logits, float *nats, int64_t rows, int64_t vocabulary, int bf16) {
    float x[vocabulary];
    for (int64_t r = 0; r < rows; r++) {
        widen(x, (const char *)logits + r * vocabulary * (bf16 ? 2 : 4), vocabulary, bf16);
        nats[r] = entropy(x, vocabulary);
    }
}

/* States of patches, in pages (.., page_size, dim), to their maxima (patches, dim). table (.., most), first: the pages of
   each sequence; sequence, begin, after (patches,). */
void fastblt_patch_max(
    const void *cache, const int64_t *table, const int64_t *first, int64_t most, const int64_t *sequence,
    const int64_t *begin, const int64_t *after, void *out, int64_t patches, int64_t page_size, int64_t dim, int bf16
) {
    size_t size = dim * (bf16 ? 2 : 4);
    float highest[dim], state[dim];
    for (int64_t p = 0; p < patches; p++) {
        const int64_t *pages = table + sequence[p] * most - first[sequence[p]];
        for (int64_t d = 0; d < dim; d++) highest[d] = after[p] > begin[p] ? -INFINITY : 0.0f;
        for (int64_t b = begin[p]; b < after[p]; b++) {
            int64_t at = pages[b / page_size] * page_size + b % page_size;
            widen(state, (const char *)cache + at * size, dim, bf16);
            keep_highest(highest, state, dim);
        }
        narrow((char *)out + p * size, highest, dim, bf16);
    }
}

/* An attention plan: found becomes its tiles, its pages and the most pages of a tile; out its numbers, if there is room
   for them. Returns their count. tiles, pages: as in `Lengths`. */
int64_t fastblt_plan(
    const Span *writes, int64_t num_writes, const int64_t *written, const Span *spans, int64_t num_spans,
    const int64_t *seen, const Tiling *tiling, int64_t rows, int64_t queries, int64_t tiles, int64_t pages, int64_t *found,
    int64_t *out, int64_t room
) {
    int64_t num_queries = 0;
    count_tiles(spans, num_spans, tiling, found, found + 1, found + 2);
    for (int64_t i = 0; i < num_spans; i++) num_queries += spans[i].count;
    found[0] += (queries - num_queries + tiling->large - 1) / tiling->large;
    if (tiles) found[0] = tiles;
    if (pages) {
        int64_t power = 1;
        while (power < found[1] || power < pages) power *= 2;
        found[1] = power;
    }
    int64_t numbers = 3 * rows + 2 * queries + TILE_NUMBERS * found[0] + found[1];
    if (numbers > room) return numbers;
    memset(out, 0, numbers * sizeof *out);
    int64_t *first = fill_writes(out, rows, writes, num_writes, written, tiling);
    fill_queries(first, queries, found[0], spans, num_spans, seen, tiling);
    return numbers;
}

/* Where patches start: entropies (rows,), spans (num_spans, 4) to the text and to found (2, rows). longest .. rise: `Rule`. */
void fastblt_boundaries(
    const float *entropies, float *known, int32_t *patches, int32_t *starts, const int64_t *spans, int64_t num_spans,
    int64_t longest, int judge, float threshold, float rise, float *found, int64_t rows
) {
    Rule rule = {longest, judge, threshold, rise};
    memset(found, 0, 2 * rows * sizeof *found);
    for (int64_t s = 0; s < num_spans; s++, spans += 4) {
        int64_t row = spans[0], end = row + spans[1], byte = spans[3], text = spans[2] - byte;
        for (; row < end; row++, byte++) {
            found[row] = entropies[row];
            found[rows + row] = decide(&rule, entropies[row], byte, known + text, patches + text, starts + text);
        }
    }
}

void fastblt_argmax(const float *logits, int64_t *ids, float *highest, int64_t rows, int64_t vocabulary) {
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * vocabulary;
        ids[r] = argmax(x, vocabulary);
        highest[r] = x[ids[r]];
    }
}

/* logits: doubles if `is_double`. params (rows, 4). */
void fastblt_sample(
    const void *logits, int is_double, const double *params, const double *uniforms, int64_t *ids, int64_t rows,
    int64_t vocabulary
) {
    double x[vocabulary];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < vocabulary; i++) {
            int64_t at = r * vocabulary + i;
            x[i] = is_double ? ((const double *)logits)[at] : (double)((const float *)logits)[at];
        }
        ids[r] = sample(x, vocabulary, params + 4 * r, uniforms[r]);
    }
}

/* drafts, drawn (count, width). */
void fastblt_accepted(
    const int64_t *drafts, const int64_t *drawn, const int64_t *lengths, int64_t *right, int64_t count, int64_t width
) {
    for (int64_t s = 0; s < count; s++, drafts += width, drawn += width)
        for (right[s] = 0; right[s] < lengths[s] && drafts[right[s]] == drawn[right[s]];) right[s]++;
}

void fastblt_confidence_and_entropy(const float *logits, float *confidence, float *entropy, int64_t rows, int64_t vocabulary) {
    for (int64_t r = 0; r < rows; r++) confidence_and_entropy(logits + r * vocabulary, vocabulary, confidence + r, entropy + r);
}

/* Blocks of `size` cells. */
void fastblt_unmask(
    const uint8_t *masked, const float *confidence, const float *entropy, const int64_t *rules, const double *bounds,
    uint8_t *settled, int64_t count, int64_t size
) {
    for (int64_t s = 0; s < count; s++) {
        int64_t at = s * size;
        unmask(masked + at, confidence + at, entropy + at, rules[s], bounds[s], settled + at, size);
    }
}
