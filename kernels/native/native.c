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

/* Which sources this was compiled from: structs must be those that the other side lays out. */
const char *fastblt_sources(void) { return FASTBLT_SOURCES; }

/* The weights of kernels/stack.py. */
typedef struct {
    const float *attention_norm, *ffn_norm, *rope;
    Matrix qkv, o, gate_up, down;
    int64_t dim, heads, kv_heads, head_dim, ffn_dim;
    float eps;
    int32_t bf16;
} Layer;

typedef struct {
    const float *norm;
    Matrix q, o;
    int64_t dim, heads, head_dim, slots;
    float eps;
    int32_t bf16;
} Slots;

typedef struct {
    const float *norm;
    Matrix kv;
    float eps;
    int32_t bf16;
} CrossKv;

typedef struct {
    const Layer *layers;
    const Slots *slots;
    const CrossKv *cross_kv;
    const void *embedding;
    const float *norm;
    Matrix head;
    int64_t num_layers, num_slots, num_cross_kv, dim;
    float eps;
    int32_t bf16;
} Stack;

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
    float *gates = take(rows * left), *before = take(rows * left), *turned = take(rows * in);
    widen(wide, x, rows * in, bf16);
    if (norm) {
        normalise(wide, norm, eps, normed, rows, in, bf16);
        wide = normed;
    }
    if (residual) widen(before, residual, rows * left, bf16);
    product(weight, wide, turned, residual && !gated ? before : 0, twice, full, rows, bf16);
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

/* Rows of a table (any, dim). */
static void widen_rows(float *to, const void *table, const int64_t *which, int64_t rows, int64_t dim, int bf16) {
    for (int64_t r = 0; r < rows; r++, to += dim)
        widen(to, (const char *)table + which[r] * dim * (bf16 ? 2 : 4), dim, bf16);
}

/* Splits qkv (rows, heads + 2 kv_heads, head_dim): rotates and scales queries into q, rotates keys, stores K and V. */
static ONE_COPY void store_qkv(const Layer *l, const Plan *plan, const Cache *cache, const float *qkv, float *q) {
    int64_t width = l->head_dim, half = width / 2, size = plan->page_size;
    float scale = 1.0f / sqrtf((float)width), turned[width];
    for (int64_t r = 0; r < plan->rows; r++) {
        const float *cosine = l->rope + plan->positions[r] * width, *sine = cosine + half;
        for (int64_t head = 0; head < l->heads + 2 * l->kv_heads; head++, qkv += width) {
            int is_value = head >= l->heads + l->kv_heads;
            for (int64_t i = 0; i < half; i++) {
                float even = qkv[2 * i], odd = qkv[2 * i + 1];
                turned[2 * i] = is_value ? even : rounded(even * cosine[i] - odd * sine[i], l->bf16);
                turned[2 * i + 1] = is_value ? odd : rounded(even * sine[i] + odd * cosine[i], l->bf16);
            }
            if (head < l->heads) {
                for (int64_t i = 0; i < width; i++)
                    q[(r * l->heads + head) * width + i] = rounded(turned[i] * scale, l->bf16);
                continue;
            }
            int64_t kv_head = head - l->heads - (is_value ? l->kv_heads : 0);
            int64_t at = ((plan->page[r] * l->kv_heads + kv_head) * size + plan->offset[r]) * width;
            narrow((char *)(is_value ? cache->values : cache->keys) + at * (l->bf16 ? 2 : 4), turned, width, l->bf16);
        }
    }
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Floats that a layer over `rows` rows takes from `take`. */
static size_t layer_floats(const Layer *l, int64_t rows) {
    int64_t width = l->heads * l->head_dim, all = width + 2 * l->kv_heads * l->head_dim;
    int64_t widest = larger(larger(l->dim, width), l->ffn_dim);
    return rows * (2 * l->dim + all + 2 * width + 3 * l->ffn_dim + widest) + 64 * 8;
}

/* A transformer layer: overwrites x (rows, dim) with its output; keys and values go to the cache first. */
static ONE_COPY void layer(const Layer *l, const Plan *plan, const Cache *cache, float *x) {
    int64_t rows = plan->rows, dim = l->dim, width = l->heads * l->head_dim, ffn = l->ffn_dim;
    size_t mark = arena_used;
    float *normed = take(rows * dim), *middle = take(rows * dim), *qkv = take(rows * l->qkv.out);
    float *q = take(rows * width), *seen = take(rows * width), *gate_up = take(rows * 2 * ffn), *gates = take(rows * ffn);
    float *turned = take(rows * larger(larger(dim, width), ffn));
    normalise(x, l->attention_norm, l->eps, normed, rows, dim, l->bf16);
    product(&l->qkv, normed, turned, 0, 0, qkv, rows, l->bf16);
    store_qkv(l, plan, cache, qkv, q);
    attend(q, seen, plan, cache, l->heads, l->bf16);
    product(&l->o, seen, turned, x, 0, middle, rows, l->bf16);
    normalise(middle, l->ffn_norm, l->eps, normed, rows, dim, l->bf16);
    product(&l->gate_up, normed, turned, 0, 0, gate_up, rows, l->bf16);
    gate(gate_up, gates, rows, ffn, l->bf16);
    product(&l->down, gates, turned, middle, 0, x, rows, l->bf16);
    arena_used = mark;
}

static size_t slots_floats(const Slots *s, int64_t rows) {
    int64_t width = s->heads * s->head_dim;
    return rows * (2 * s->dim + 2 * width + larger(s->dim, width)) + 64 * 5;
}

/* Cross-attention over the slots of one latent, with its residuals. */
static ONE_COPY void read_slots(
    const Slots *s, const int64_t *page, const int64_t *offset, const Cache *cache, float *x, int64_t rows
) {
    int64_t dim = s->dim, width = s->heads * s->head_dim;
    size_t mark = arena_used;
    float *normed = take(rows * dim), *before = take(rows * dim), *q = take(rows * width), *seen = take(rows * width);
    float *turned = take(rows * larger(dim, width));
    memcpy(before, x, rows * dim * sizeof *x);
    normalise(x, s->norm, s->eps, normed, rows, dim, s->bf16);
    product(&s->q, normed, turned, 0, 0, q, rows, s->bf16);
    attend_slots(q, seen, page, offset, cache, s->slots, rows, s->heads, s->bf16);
    product(&s->o, seen, turned, before, 1, x, rows, s->bf16);
    arena_used = mark;
}

static size_t cross_kv_floats(const CrossKv *k, int64_t rows) { return rows * (2 * k->kv.in + k->kv.out) + 64 * 3; }

/* Stores rows as keys and values. */
static ONE_COPY void store_cross_kv(
    const CrossKv *k, const int64_t *page, const int64_t *offset, const Cache *cache, const float *x, int64_t rows
) {
    int64_t dim = k->kv.in, width = cache->head_dim;
    size_t mark = arena_used;
    float *normed = take(rows * dim), *turned = take(rows * dim), *kv = take(rows * k->kv.out);
    normalise(x, k->norm, k->eps, normed, rows, dim, k->bf16);
    product(&k->kv, normed, turned, 0, 0, kv, rows, k->bf16);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t head = 0; head < 2 * cache->kv_heads; head++, kv += width) {
            char *into = head < cache->kv_heads ? cache->keys : cache->values;
            int64_t at = ((page[r] * cache->kv_heads + head % cache->kv_heads) * cache->page_size + offset[r]) * width;
            narrow(into + at * (k->bf16 ? 2 : 4), kv, width, k->bf16);
        }
    arena_used = mark;
}

/* `stack` of kernels/stack.py. x: (rows, dim), or ids (rows,) where there is an embedding. logit_rows (left,), or null: the
   rows to output. cross, states, page, offset: `CrossCache`. */
static ONE_COPY void run_stack(
    const Stack *s, const Plan *plan, const Cache *caches, const Cache *cross, void *states, const int64_t *page,
    const int64_t *offset, const void *x, const int64_t *logit_rows, int64_t left, void *y
) {
    int64_t rows = plan->rows, dim = s->dim, bf16 = s->bf16;
    size_t most = left * (3 * dim + s->head.out) + 64 * 4;
    for (int64_t i = 0; i < s->num_layers; i++) most = larger(most, layer_floats(s->layers + i, rows));
    for (int64_t i = 0; i < s->num_slots; i++) most = larger(most, slots_floats(s->slots + i, rows));
    for (int64_t i = 0; i < s->num_cross_kv; i++) most = larger(most, cross_kv_floats(s->cross_kv + i, rows));
    reserve(rows * dim + 64 + most);
    float *now = take(rows * dim);
    if (s->embedding) widen_rows(now, s->embedding, x, rows, dim, bf16);
    else widen(now, x, rows * dim, bf16);
    for (int64_t i = 0; i < s->num_layers; i++) {
        if (i < s->num_slots) read_slots(s->slots + i, page, offset, cross + i, now, rows);
        layer(s->layers + i, plan, caches + i, now);
        int64_t kv = i + s->num_cross_kv - s->num_layers, size = bf16 ? 2 : 4;
        if (kv >= 0) store_cross_kv(s->cross_kv + kv, page, offset, cross + kv, now, rows);
        for (int64_t r = 0; r < rows && kv == 0 && states; r++)
            narrow((char *)states + (page[r] * cross->page_size + offset[r]) * dim * size, now + r * dim, dim, bf16);
    }
    if (logit_rows) {
        float *some = take(left * dim);
        for (int64_t r = 0; r < left; r++) memcpy(some + r * dim, now + logit_rows[r] * dim, dim * sizeof *some);
        now = some;
    }
    if (s->norm) {
        float *normed = take(left * dim), *turned = take(left * dim), *logits = take(left * s->head.out);
        normalise(now, s->norm, s->eps, normed, left, dim, bf16);
        product(&s->head, normed, turned, 0, 0, logits, left, bf16);
        narrow(y, logits, left * s->head.out, bf16);
    } else narrow(y, now, left * dim, bf16);
}

void fastblt_stack(
    const Stack *s, const Plan *plan, const Cache *caches, const Cache *cross, void *states, const int64_t *page,
    const int64_t *offset, const void *x, const int64_t *logit_rows, int64_t left, void *y, int threads
) {
    begin(threads);
    run_stack(s, plan, caches, cross, states, page, offset, x, logit_rows, left, y);
    finish();
}

/* x (rows, dim) as keys and values of `count` caches. */
static ONE_COPY void run_cross_kv(
    const CrossKv *cross_kv, int64_t count, const int64_t *page, const int64_t *offset, const Cache *caches, const void *x,
    int64_t rows
) {
    int64_t numbers = rows * cross_kv->kv.in;
    size_t most = 0;
    for (int64_t i = 0; i < count; i++) most = larger(most, cross_kv_floats(cross_kv + i, rows));
    reserve(numbers + 64 + most);
    float *wide = take(numbers);
    widen(wide, x, numbers, cross_kv->bf16);
    for (int64_t i = 0; i < count; i++) store_cross_kv(cross_kv + i, page, offset, caches + i, wide, rows);
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
