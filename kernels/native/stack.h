/* Stacks of transformer layers: kernels/stack.py says what they compute. */

#ifndef FASTBLT_STACK_H
#define FASTBLT_STACK_H

#include "attention.h"
#include "product.h"

/* Most bytes of a layer's weights that each thread may read for itself, and the fewest rows a thread that are worth it. */
#define MOST_OWN_BYTES (4 << 20)
#define LEAST_OWN_ROWS 3

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

/* Rows of a table (any, dim). */
static void widen_rows(float *to, const void *table, const int64_t *which, int64_t rows, int64_t dim, int bf16) {
    for (int64_t r = 0; r < rows; r++, to += dim)
        widen(to, (const char *)table + which[r] * dim * (bf16 ? 2 : 4), dim, bf16);
}

/* Splits qkv (rows from `begin` on, heads + 2 kv_heads, head_dim): rotates and scales queries into q, rotates keys, stores
   K and V. */
static ONE_COPY void store_qkv(
    const Layer *l, const Plan *plan, const Cache *cache, const float *qkv, float *q, int64_t begin, int64_t end
) {
    int64_t width = l->head_dim, half = width / 2, size = plan->page_size;
    float scale = 1.0f / sqrtf((float)width), rotated[width];
    for (int64_t r = begin; r < end; r++) {
        const float *cosine = l->rope + plan->positions[r] * width, *sine = cosine + half;
        for (int64_t head = 0; head < l->heads + 2 * l->kv_heads; head++, qkv += width) {
            int is_value = head >= l->heads + l->kv_heads;
            for (int64_t i = 0; i < half; i++) {
                float even = qkv[2 * i], odd = qkv[2 * i + 1];
                rotated[2 * i] = is_value ? even : rounded(even * cosine[i] - odd * sine[i], l->bf16);
                rotated[2 * i + 1] = is_value ? odd : rounded(even * sine[i] + odd * cosine[i], l->bf16);
            }
            if (head < l->heads) {
                for (int64_t i = 0; i < width; i++)
                    q[(r * l->heads + head) * width + i] = rounded(rotated[i] * scale, l->bf16);
                continue;
            }
            int64_t kv_head = head - l->heads - (is_value ? l->kv_heads : 0);
            int64_t at = ((plan->page[r] * l->kv_heads + kv_head) * size + plan->offset[r]) * width;
            narrow((char *)(is_value ? cache->values : cache->keys) + at * (l->bf16 ? 2 : 4), rotated, width, l->bf16);
        }
    }
}

/* A pass through a stack. x (rows, dim); q, seen (rows, heads, head_dim). The other rooms hold what a row needs from one
   attention to the next: normed, middle (rows, dim), wide, gates, transposed (rows, their widths). */
typedef struct {
    const Stack *stack;
    const Plan *plan;
    const Cache *caches, *cross;
    void *states;
    const int64_t *page, *offset;
    float *x, *q, *seen, *normed, *middle, *wide, *gates, *transposed;
    int64_t wide_width, gates_width, transposed_width, next;
} Pass;

/* Some rows of a pass, from `begin` on: what points to numbers points to those of the first. */
typedef struct {
    int64_t begin, rows;
    const int64_t *page, *offset;
    float *x, *normed, *middle, *wide, *gates, *transposed;
} Rows;

/* task(of, begin, end) for operations on every row by itself, with weights of so many numbers and bytes. Each thread takes
   groups of rows, so that a row's numbers stay with it, if there are rows enough and its cache holds the weights; else the
   threads share each product inside the task. */
static void share_rows(Task task, void *of, int64_t rows, int64_t weights, int64_t bytes) {
    int64_t most = num_threads * MOST_ROWS, times = (rows + most - 1) / most;
    if (bytes > MOST_OWN_BYTES || rows < num_threads * LEAST_OWN_ROWS) task(of, 0, rows);
    else share_parts(task, of, rows, num_threads * (times < PARTS_PER_THREAD ? times : PARTS_PER_THREAD), rows * weights);
}

/* The beginning of a layer, up to its attention: keys and values go to the cache. */
static void begin_layer(const Layer *l, const Pass *p, const Rows *r) {
    normalise(r->x, l->attention_norm, l->eps, r->normed, r->rows, l->dim, l->bf16);
    product(&l->qkv, r->normed, r->transposed, 0, 0, r->wide, r->rows, l->bf16);
    store_qkv(l, p->plan, p->caches + p->next, r->wide, p->q, r->begin, r->begin + r->rows);
}

/* What follows its attention: overwrites x with its output. */
static void end_layer(const Layer *l, const Pass *p, const Rows *r) {
    const float *seen = p->seen + r->begin * l->heads * l->head_dim;
    product(&l->o, seen, r->transposed, r->x, 0, r->middle, r->rows, l->bf16);
    normalise(r->middle, l->ffn_norm, l->eps, r->normed, r->rows, l->dim, l->bf16);
    product(&l->gate_up, r->normed, r->transposed, 0, 0, r->wide, r->rows, l->bf16);
    gate(r->wide, r->gates, r->rows, l->ffn_dim, l->bf16);
    product(&l->down, r->gates, r->transposed, r->middle, 0, r->x, r->rows, l->bf16);
}

/* Cross-attention over the slots of one latent, with its residuals. */
static void read_slots(const Slots *s, const Cache *cache, const Rows *r) {
    memcpy(r->middle, r->x, r->rows * s->dim * sizeof *r->x);
    normalise(r->x, s->norm, s->eps, r->normed, r->rows, s->dim, s->bf16);
    product(&s->q, r->normed, r->transposed, 0, 0, r->wide, r->rows, s->bf16);
    attend_slots(r->wide, r->gates, r->page, r->offset, cache, s->slots, r->rows, s->heads, s->bf16);
    product(&s->o, r->gates, r->transposed, r->middle, 1, r->x, r->rows, s->bf16);
}

/* Stores rows as keys and values. */
static void store_cross_kv(const CrossKv *k, const Cache *cache, const Rows *r) {
    int64_t width = cache->head_dim;
    const float *kv = r->wide;
    normalise(r->x, k->norm, k->eps, r->normed, r->rows, k->kv.in, k->bf16);
    product(&k->kv, r->normed, r->transposed, 0, 0, r->wide, r->rows, k->bf16);
    for (int64_t row = 0; row < r->rows; row++)
        for (int64_t head = 0; head < 2 * cache->kv_heads; head++, kv += width) {
            char *into = head < cache->kv_heads ? cache->keys : cache->values;
            int64_t first = r->page[row] * cache->kv_heads + head % cache->kv_heads;
            int64_t at = (first * cache->page_size + r->offset[row]) * width;
            narrow(into + at * (k->bf16 ? 2 : 4), kv, width, k->bf16);
        }
}

static Rows rows_of(const Pass *p, int64_t begin, int64_t end, int64_t dim) {
    return (Rows){
        begin, end - begin, p->page ? p->page + begin : 0, p->offset ? p->offset + begin : 0, p->x + begin * dim,
        p->normed + begin * dim, p->middle ? p->middle + begin * dim : 0, p->wide + begin * p->wide_width,
        p->gates ? p->gates + begin * p->gates_width : 0, p->transposed + begin * p->transposed_width,
    };
}

/* From the attention of the layer before `next` to its own. */
static void to_attention(void *of, int64_t begin, int64_t end) {
    const Pass *p = of;
    const Stack *s = p->stack;
    int64_t last = p->next - 1, kv = last + s->num_cross_kv - s->num_layers, size = s->bf16 ? 2 : 4;
    Rows r = rows_of(p, begin, end, s->dim);
    if (last >= 0) end_layer(s->layers + last, p, &r);
    if (last >= 0 && kv >= 0) store_cross_kv(s->cross_kv + kv, p->cross + kv, &r);
    for (int64_t row = 0; row < r.rows && last >= 0 && kv == 0 && p->states; row++) {
        int64_t at = r.page[row] * p->cross->page_size + r.offset[row];
        narrow((char *)p->states + at * s->dim * size, r.x + row * s->dim, s->dim, s->bf16);
    }
    if (p->next < s->num_slots) read_slots(s->slots + p->next, p->cross + p->next, &r);
    if (p->next < s->num_layers) begin_layer(s->layers + p->next, p, &r);
}

/* The wanted rows of x to logits, in `wide`. */
static void to_logits(void *of, int64_t begin, int64_t end) {
    const Pass *p = of;
    const Stack *s = p->stack;
    Rows r = rows_of(p, begin, end, s->dim);
    normalise(r.x, s->norm, s->eps, r.normed, r.rows, s->dim, s->bf16);
    product(&s->head, r.normed, r.transposed, 0, 0, r.wide, r.rows, s->bf16);
}

static int64_t numbers_of(const Matrix *m) { return m->out * m->in; }

static int64_t layer_numbers(const Layer *l) {
    return numbers_of(&l->qkv) + numbers_of(&l->o) + numbers_of(&l->gate_up) + numbers_of(&l->down);
}

/* `stack` of kernels/stack.py. x: (rows, dim), or ids (rows,) where there is an embedding. logit_rows (left,), or null: the
   rows to output. cross, states, page, offset: `CrossCache`. */
static ONE_COPY void run_stack(
    const Stack *s, const Plan *plan, const Cache *caches, const Cache *cross, void *states, const int64_t *page,
    const int64_t *offset, const void *x, const int64_t *logit_rows, int64_t left, void *y
) {
    int64_t rows = plan->rows, dim = s->dim, bf16 = s->bf16;
    int64_t width = 0, wide = 0, gates = 0, transposed = dim, weights = 0, itemsize = 0;
    for (const Layer *l = s->layers; l < s->layers + s->num_layers; l++) {
        width = larger(width, l->heads * l->head_dim), wide = larger(wide, larger(l->qkv.out, l->gate_up.out));
        gates = larger(gates, l->ffn_dim), itemsize = l->qkv.itemsize;
        weights = larger(weights, layer_numbers(l));
    }
    for (const Slots *c = s->slots; c < s->slots + s->num_slots; c++)
        wide = larger(wide, c->q.out), gates = larger(gates, c->q.out);
    for (const CrossKv *k = s->cross_kv; k < s->cross_kv + s->num_cross_kv; k++) wide = larger(wide, k->kv.out);
    transposed = larger(transposed, larger(width, gates));
    reserve(rows * (3 * dim + 2 * width + wide + gates + transposed) + left * (3 * dim + s->head.out) + 64 * 12);
    Pass p = {s, plan, caches, cross, states, page, offset, 0, 0, 0, 0, 0, 0, 0, 0, wide, gates, transposed, 0};
    p.x = take(rows * dim), p.normed = take(rows * dim), p.middle = take(rows * dim);
    p.q = take(rows * width), p.seen = take(rows * width);
    p.wide = take(rows * wide), p.gates = take(rows * gates), p.transposed = take(rows * transposed);
    if (s->embedding) widen_rows(p.x, s->embedding, x, rows, dim, bf16);
    else widen(p.x, x, rows * dim, bf16);
    for (;; p.next++) {
        share_rows(to_attention, &p, rows, weights, weights * itemsize);
        if (p.next == s->num_layers) break;
        attend(p.q, p.seen, plan, caches + p.next, s->layers[p.next].heads, bf16);
    }
    if (logit_rows) {
        float *some = take(left * dim);
        for (int64_t r = 0; r < left; r++) memcpy(some + r * dim, p.x + logit_rows[r] * dim, dim * sizeof *some);
        p.x = some;
    }
    if (s->norm) {
        p.normed = take(left * dim), p.transposed = take(left * dim), p.wide = take(left * s->head.out);
        p.transposed_width = dim, p.wide_width = s->head.out;
        share_rows(to_logits, &p, left, numbers_of(&s->head), numbers_of(&s->head) * s->head.itemsize);
        narrow(y, p.wide, left * s->head.out, bf16);
    } else narrow(y, p.x, left * dim, bf16);
}

typedef struct {
    Pass pass;
    const CrossKv *cross_kv;
    int64_t count;
} Latents;

static void to_cross_kv(void *of, int64_t begin, int64_t end) {
    const Latents *l = of;
    Rows r = rows_of(&l->pass, begin, end, l->cross_kv->kv.in);
    for (int64_t i = 0; i < l->count; i++) store_cross_kv(l->cross_kv + i, l->pass.caches + i, &r);
}

/* x (rows, dim) as keys and values of `count` caches. */
static ONE_COPY void run_cross_kv(
    const CrossKv *cross_kv, int64_t count, const int64_t *page, const int64_t *offset, const Cache *caches, const void *x,
    int64_t rows
) {
    int64_t dim = cross_kv->kv.in, wide = 0, numbers = 0;
    for (int64_t i = 0; i < count; i++) {
        wide = larger(wide, cross_kv[i].kv.out);
        numbers += numbers_of(&cross_kv[i].kv);
    }
    reserve(rows * (3 * dim + wide) + 64 * 4);
    Pass p = {.caches = caches, .page = page, .offset = offset, .wide_width = wide, .transposed_width = dim};
    p.x = take(rows * dim), p.normed = take(rows * dim), p.transposed = take(rows * dim), p.wide = take(rows * wide);
    widen(p.x, x, rows * dim, cross_kv->bf16);
    Latents l = {p, cross_kv, count};
    share_rows(to_cross_kv, &l, rows, numbers, numbers * cross_kv->kv.itemsize);
}

#endif
