/* The CPU's operations, whole layers at a time. kernels/native/__init__.py calls them and describes the arguments; what
   they compute is written in torch in the files of kernels/.

   bf16: whether the model's dtype is bfloat16 rather than float. Inside, numbers are floats, rounded where the torch twins
   round. */

#include "attention.h"
#include "bytes.h"
#include "planning.h"
#include "product.h"

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
    int64_t dim, heads, kv_heads, head_dim, slots;
    float eps;
    int32_t bf16;
} Cross;

int64_t fastblt_panel(void) { return PANEL; }

static void begin(int threads, size_t floats) {
    pthread_mutex_lock(&one_at_a_time);
    set_threads(threads);
    reserve(floats);
}

static void finish(void) { pthread_mutex_unlock(&one_at_a_time); }

/* x (rows, in) to y (rows, out), with what `kernels.linear` does before and behind it. */
void fastblt_linear(
    const Matrix *weight, const void *x, const float *norm, float eps, int gated, const void *residual, int twice, void *y,
    int64_t rows, int bf16, int threads
) {
    int64_t in = weight->in, out = weight->out, left = gated ? out / 2 : out;
    begin(threads, rows * (3 * in + out + 2 * left) + 64 * 6);
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
    finish();
}

/* q (queries, heads, head_dim) to out of the same shape. */
void fastblt_attention(
    const void *q, void *out, const Plan *plan, const Cache *cache, int64_t heads, int bf16, int threads
) {
    int64_t numbers = plan->queries * heads * cache->head_dim;
    begin(threads, 2 * numbers + 64 * 2);
    float *scaled = take(numbers), *seen = take(numbers), scale = 1.0f / sqrtf((float)cache->head_dim);
    widen(scaled, q, numbers, bf16);
    for (int64_t i = 0; i < numbers; i++) scaled[i] = rounded(scaled[i] * scale, bf16);
    attend(scaled, seen, plan, cache, heads, bf16);
    narrow(out, seen, numbers, bf16);
    finish();
}

/* Splits qkv (rows, heads + 2 kv_heads, head_dim), turns and scales queries into q, turns keys, stores keys and values. */
static void store_qkv(const Layer *l, const Plan *plan, const Cache *cache, const float *qkv, float *q) {
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

/* A transformer layer: x (rows, dim) to y of the same shape; keys and values go to the cache first. */
void fastblt_layer(const Layer *l, const Plan *plan, const Cache *cache, const void *x, void *y, int threads) {
    int64_t rows = plan->rows, dim = l->dim, width = l->heads * l->head_dim, ffn = l->ffn_dim;
    int64_t all = width + 2 * l->kv_heads * l->head_dim;
    int64_t widest = dim > width ? dim : width;
    if (ffn > widest) widest = ffn;
    begin(threads, rows * (3 * dim + all + 2 * width + 3 * ffn + widest) + 64 * 9);
    float *in = take(rows * dim), *normed = take(rows * dim), *middle = take(rows * dim), *qkv = take(rows * all);
    float *q = take(rows * width), *seen = take(rows * width), *gate_up = take(rows * 2 * ffn), *gates = take(rows * ffn);
    float *turned = take(rows * widest);
    widen(in, x, rows * dim, l->bf16);
    normalise(in, l->attention_norm, l->eps, normed, rows, dim, l->bf16);
    product(&l->qkv, normed, turned, 0, 0, qkv, rows, l->bf16);
    store_qkv(l, plan, cache, qkv, q);
    attend(q, seen, plan, cache, l->heads, l->bf16);
    product(&l->o, seen, turned, in, 0, middle, rows, l->bf16);
    normalise(middle, l->ffn_norm, l->eps, normed, rows, dim, l->bf16);
    product(&l->gate_up, normed, turned, 0, 0, gate_up, rows, l->bf16);
    gate(gate_up, gates, rows, ffn, l->bf16);
    product(&l->down, gates, turned, middle, 0, in, rows, l->bf16);
    narrow(y, in, rows * dim, l->bf16);
    finish();
}

/* The decoder's cross-attention with its residuals: x (rows, dim) to y of the same shape. */
void fastblt_cross(
    const Cross *c, const int64_t *page, const int64_t *offset, const Cache *cache, int64_t page_size, const void *x,
    void *y, int64_t rows, int threads
) {
    int64_t dim = c->dim, width = c->heads * c->head_dim;
    int64_t widest = dim > width ? dim : width;
    begin(threads, rows * (3 * dim + 2 * width + widest) + 64 * 6);
    float *in = take(rows * dim), *normed = take(rows * dim), *out = take(rows * dim);
    float *q = take(rows * width), *seen = take(rows * width), *turned = take(rows * widest);
    widen(in, x, rows * dim, c->bf16);
    normalise(in, c->norm, c->eps, normed, rows, dim, c->bf16);
    product(&c->q, normed, turned, 0, 0, q, rows, c->bf16);
    attend_slots(q, seen, page, offset, cache, page_size, c->slots, rows, c->heads, c->bf16);
    product(&c->o, seen, turned, in, 1, out, rows, c->bf16);
    narrow(y, out, rows * dim, c->bf16);
    finish();
}

/* Stores kv (rows, 2 kv_heads, head_dim), keys first, as they are. */
void fastblt_store_kv(
    const void *kv, const int64_t *page, const int64_t *offset, const Cache *cache, int64_t page_size, int64_t rows,
    int bf16
) {
    size_t row = cache->head_dim * (bf16 ? 2 : 4);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t head = 0; head < 2 * cache->kv_heads; head++, kv = (const char *)kv + row) {
            int64_t kv_head = head % cache->kv_heads;
            char *into = head < cache->kv_heads ? cache->keys : cache->values;
            memcpy(into + ((page[r] * cache->kv_heads + kv_head) * page_size + offset[r]) * row, kv, row);
        }
}

/* windows (rows, width) to x (rows, dim). */
void fastblt_hash_embed(const Hashes *hashes, const int64_t *windows, int64_t width, const void *embedding, void *x, int64_t rows, int bf16) {
    float sum[hashes->dim], add[hashes->dim];
    for (int64_t r = 0; r < rows; r++) hash_embed(hashes, windows + r * width, width, embedding, sum, add, x, r, bf16);
}

/* logits (rows, vocabulary) to nats (rows,) float. */
void fastblt_entropy(const void *logits, float *nats, int64_t rows, int64_t vocabulary, int bf16) {
    float x[vocabulary];
    for (int64_t r = 0; r < rows; r++) {
        widen(x, (const char *)logits + r * vocabulary * (bf16 ? 2 : 4), vocabulary, bf16);
        nats[r] = entropy(x, vocabulary);
    }
}

/* States of patches, (pages, page_size, dim) each page, to their maxima (patches, dim). */
void fastblt_patch_max(
    const void *cache, const int64_t *page, const int64_t *offset, const int64_t *bounds, void *out, int64_t patches,
    int64_t page_size, int64_t dim, int bf16
) {
    size_t size = dim * (bf16 ? 2 : 4);
    float most[dim], state[dim];
    for (int64_t p = 0; p < patches; p++) {
        for (int64_t d = 0; d < dim; d++) most[d] = bounds[p + 1] > bounds[p] ? -INFINITY : 0.0f;
        for (int64_t b = bounds[p]; b < bounds[p + 1]; b++) {
            widen(state, (const char *)cache + (page[b] * page_size + offset[b]) * size, dim, bf16);
            /* A state that is no number makes the maximum none. */
            for (int64_t d = 0; d < dim; d++) most[d] = state[d] > most[d] || state[d] != state[d] ? state[d] : most[d];
        }
        narrow((char *)out + p * size, most, dim, bf16);
    }
}

/* states (rows, dim) into cache (pages, page_size, dim). */
void fastblt_store_states(const void *states, const int64_t *page, const int64_t *offset, void *cache, int64_t page_size, int64_t rows, int64_t size) {
    for (int64_t r = 0; r < rows; r++)
        memcpy((char *)cache + (page[r] * page_size + offset[r]) * size, (const char *)states + r * size, size);
}

/* An attention plan: found becomes its tiles, its pages and the most segments of a tile; out its numbers, if there is room
   for them. Returns how many these are. tiles, pages: as in `Lengths`. */
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
    int64_t numbers = 3 * rows + 2 * queries + 5 * found[0] + found[1];
    if (numbers > room) return numbers;
    memset(out, 0, numbers * sizeof *out);
    int64_t *first = fill_writes(out, rows, writes, num_writes, written, tiling);
    fill_queries(first, queries, found[0], spans, num_spans, seen, tiling);
    return numbers;
}
