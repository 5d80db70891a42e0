/* A whole step: rows of many sequences through all stages and the choice of bytes, and further passes over what was
   chosen, without the host between. What it computes is what engine/step composes of single operations; the structs are
   described in kernels/native/step.py. */

#ifndef FASTBLT_STEP_H
#define FASTBLT_STEP_H

#include <stddef.h>
#include <time.h>

enum { PATCHER_CACHE, ENCODER_CACHE, OPEN_CACHE, GLOBAL_CACHE, LATENT_CACHE, DECODER_CACHE, NUM_CACHES };
enum { PATCHER, ENCODER, GLOBAL, DECODER, NUM_STAGES };
/* What a sequence asks for. */
enum { PREFILL, NEXT, DRAFT, UNMASK, VERIFY };

typedef struct {
    const Stack *patcher, *encoder, *global, *decoder;
    const Hashes *hashes;
    const void *embedding;
    const Slots *closing;
    const CrossKv *latent_kv;
    Matrix open_slots, projection, latent_slots;
    const Cache *caches[NUM_CACHES];
    void *open_states;
    Tiling tilings[NUM_CACHES];
    int64_t num_closing, num_latent_kv, slots, reads_states, isolates, isolates_global, eos, mask, most_read;
    int64_t specials[3];
    Rule rule;
} Model;

typedef struct {
    const int64_t *pages;
    int64_t first;
} Table;

/* Of one stage, over all passes: calls that had counted rows; rows; counted rows; cache rows read. In parts of a pass:
   counted_share, of its rows; looked_counted, of its cache rows. */
typedef struct {
    int64_t calls, rows, counted, looked;
    double counted_share, looked_counted;
} Served;

typedef struct {
    int64_t *ids;
    float *entropies;
    int32_t *patch, *patch_start;
    Table tables[NUM_CACHES];
    int64_t ask, start, end, decided, floor, patch_floor, decode_from, logits_from, drawn_from, counted_from;
    int64_t cells_start, cells_floor, num_cells, num_block, closes, exact, drafts, passes, draws, rounds, until, kind, width;
    const double *params, *cell_params, *changes, *bias, *counts, *ends;
    const int64_t *stops;
    int64_t committed, first_end;
    uint64_t seed, sample_index;
    int64_t num_prompt, rule;
    double bound;
    int64_t *settled, *log;
    float *logits;
    int64_t num_passes, accepted, given, ended, bad, logits_at, num_logits, num_rounds;
    Served served[NUM_STAGES];
} Share;

typedef struct {
    int64_t calls[NUM_STAGES], rows[NUM_STAGES];
    double seconds[NUM_STAGES], round;
} Totals;

/* Memory between calls; grows to the need of the largest. */
typedef struct {
    void *at;
    size_t size;
} Buffer;

static void *room(Buffer *b, int64_t count, size_t each) {
    size_t size = (size_t)(count < 1 ? 1 : count) * each;
    if (size > b->size) {
        free(b->at);
        b->at = malloc(2 * size);
        if (!b->at) abort();
        b->size = 2 * size;
    }
    return b->at;
}

#define ROOM(TYPE, COUNT)                            \
    ({                                               \
        static Buffer buffer;                        \
        (TYPE *)room(&buffer, (COUNT), sizeof(TYPE)); \
    })

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Spans over one cache, and the pages that they refer to. */
typedef struct {
    Span *spans;
    int64_t *pages;
    int64_t num_spans, num_pages, num_rows;
} Spans;

/* Adds rows of the cache, all in one document. */
static void add_span(Spans *s, int64_t pages_at, const Table *t, int64_t start, int64_t count, int64_t floor, int64_t mutual, int64_t last) {
    s->spans[s->num_spans++] = (Span){pages_at, t->first, start, count, floor, mutual, last};
    s->num_rows += count;
}

static int64_t pages_up_to(const Table *t, int64_t end, const Tiling *tiling) {
    return end ? (end - 1) / tiling->page_size - t->first + 1 : 0;
}

/* Copies the table's pages for rows before `end`; returns where they begin. */
static int64_t add_pages(Spans *s, const Table *t, int64_t end, const Tiling *tiling) {
    int64_t at = s->num_pages, count = pages_up_to(t, end, tiling);
    memcpy(s->pages + at, t->pages, count * sizeof *t->pages);
    s->num_pages += count;
    return at;
}

static Plan planned(Buffer *into, const Spans *writes, const Spans *queries, const Tiling *tiling) {
    int64_t tiles, pages, most, rows = writes ? writes->num_rows : 0, count = queries->num_rows;
    count_tiles(queries->spans, queries->num_spans, tiling, &tiles, &pages, &most);
    int64_t *at = room(into, 3 * rows + 2 * count + TILE_NUMBERS * tiles + pages, sizeof *at), *first = at + 3 * rows;
    if (rows) fill_writes(at, rows, writes->spans, writes->num_spans, writes->pages, tiling);
    fill_queries(first, count, tiles, queries->spans, queries->num_spans, queries->pages, tiling);
    int64_t *tiles_at = first + 2 * count;
    return (Plan){rows, count, tiles, tiling->page_size, at, at + rows, at + 2 * rows, first, first + count, tiles_at, tiles_at + TILE_NUMBERS * tiles};
}

static int64_t page_of(const Table *t, int64_t row, int64_t size) { return t->pages[row / size - t->first]; }

static int starts_after(const Share *s, int64_t row) { return s->patch[row + 1] != s->patch[row]; }

/* Counts `count` rows of a sequence in a pass of `all` rows. */
static void serve(Share *s, int stage, int64_t all, int64_t count, int64_t counted, int64_t looked) {
    Served *of = s->served + stage;
    counted = counted < 0 ? 0 : counted > count ? count : counted;
    of->calls += counted > 0, of->rows += count, of->counted += counted, of->looked += looked;
    of->counted_share += (double)counted / all;
    of->looked_counted += (double)looked * counted / count;
}

/* The same for its rows from `start` on in a cache of bytes, in a document that begins at `floor`. */
static void serve_bytes(Share *s, int stage, const Tiling *t, int64_t all, int64_t start, int64_t count, int64_t floor) {
    int64_t from = t->window ? larger(start - t->window + 1, floor) : floor;
    serve(s, stage, all, count, start + count - s->counted_from, start + count - from);
}

static void count_pass(Totals *totals, int stage, int64_t rows, double began) {
    totals->calls[stage]++, totals->rows[stage] += rows, totals->seconds[stage] += seconds_now() - began;
}

/* Adds rows start..end-1 of the text, cut where documents begin. Returns where that of the last row begins. */
static int64_t add_text(const Model *m, Spans *spans, const Share *s, int cache, int64_t start, int64_t end, int64_t floor) {
    const Table *t = s->tables + cache;
    int64_t at = add_pages(spans, t, end, m->tilings + cache), begin = start;
    for (int64_t row = start; row < end && m->isolates; row++)
        if (s->ids[row] == m->eos && row + 1 < end) {
            add_span(spans, at, t, begin, row + 1 - begin, floor, 0, row);
            begin = floor = row + 1;
        }
    add_span(spans, at, t, begin, end - begin, floor, 0, end - 1);
    return floor;
}

/* Where the document of a row of the text begins. */
static int64_t floor_at(const Model *m, const Share *s, int64_t row) {
    int64_t floor = s->floor;
    for (int64_t r = s->start; r < row && m->isolates; r++)
        if (s->ids[r] == m->eos) floor = r + 1;
    return floor;
}

/* Where the document of a cell begins, after the cells before it. */
static int64_t floor_after(const Model *m, const Share *s, int64_t cell) {
    int starts = m->isolates && cell > s->cells_start && s->ids[cell - 1] == m->eos;
    return starts ? cell : s->cells_floor;
}

static int64_t num_text(const Share *s) { return s->end - s->start; }

static int is_encoded(const Model *m, const Share *s) { return num_text(s) || (m->reads_states && s->num_cells); }

/* Room for the spans of all sequences in a cache: a span a row at most, and all pages. */
static void clear(Spans *s, Buffer *spans, Buffer *pages, const Model *m, Share *const *shares, int64_t n, int cache) {
    int64_t rows = 0, most = 0;
    for (int64_t i = 0; i < n; i++) {
        const Share *share = shares[i];
        int64_t end = larger(share->cells_start + share->num_cells, share->end);
        rows += num_text(share) + share->num_cells + 2;
        most += 2 * (pages_up_to(share->tables + cache, end, m->tilings + cache) + 1);
    }
    *s = (Spans){room(spans, rows, sizeof(Span)), room(pages, most, sizeof(int64_t)), 0, 0, 0};
}

/* Entropies, and where patches start. */
static void run_patcher(const Model *m, Share *const *shares, int64_t n, Totals *totals) {
    static Buffer spans_room, pages_room, plan_room;
    double began = seconds_now();
    int64_t rows = 0, vocabulary = m->patcher->head.out, bf16 = m->patcher->bf16;
    Spans spans;
    clear(&spans, &spans_room, &pages_room, m, shares, n, PATCHER_CACHE);
    for (int64_t i = 0; i < n; i++) rows += num_text(shares[i]);
    if (!rows) return;
    int64_t *ids = ROOM(int64_t, rows), *each = ids;
    float *logits = ROOM(float, rows * vocabulary), *x = ROOM(float, vocabulary);
    for (int64_t i = 0; i < n; i++) {
        Share *s = shares[i];
        if (!num_text(s)) continue;
        memcpy(each, s->ids + s->start, num_text(s) * sizeof *ids);
        each += num_text(s);
        add_text(m, &spans, s, PATCHER_CACHE, s->start, s->end, s->floor);
        serve_bytes(s, PATCHER, m->tilings + PATCHER_CACHE, rows, s->start, num_text(s), s->floor);
    }
    Plan plan = planned(&plan_room, &spans, &spans, m->tilings + PATCHER_CACHE);
    run_stack(m->patcher, &plan, m->caches[PATCHER_CACHE], 0, 0, 0, 0, ids, 0, rows, logits);
    const char *found = (const char *)logits;
    for (int64_t i = 0; i < n; i++) {
        Share *s = shares[i];
        for (int64_t row = s->start; row < s->end; row++, found += vocabulary * (bf16 ? 2 : 4)) {
            if (row < s->decided) continue;
            widen(x, found, vocabulary, bf16);
            decide(&m->rule, entropy(x, vocabulary), row, s->entropies, s->patch, s->patch_start);
        }
    }
    count_pass(totals, PATCHER, rows, began);
}

/* Byte states, which are returned, those that a patch pools, and their keys and values. */
static void *run_encoder(const Model *m, Share *const *shares, int64_t n, Totals *totals) {
    static Buffer spans_room, pages_room, plan_room;
    double began = seconds_now();
    int64_t rows = 0, dim = m->hashes->dim, bf16 = m->encoder->bf16;
    int64_t size = m->tilings[OPEN_CACHE].page_size;
    Spans spans;
    clear(&spans, &spans_room, &pages_room, m, shares, n, ENCODER_CACHE);
    for (int64_t i = 0; i < n; i++)
        if (is_encoded(m, shares[i])) rows += num_text(shares[i]) ? num_text(shares[i]) : 1;
    if (!rows) return 0;
    float *x = ROOM(float, rows * dim), *states = ROOM(float, rows * dim), *sum = ROOM(float, 2 * dim);
    int64_t *page = ROOM(int64_t, rows), *offset = ROOM(int64_t, rows), row = 0;
    for (int64_t i = 0; i < n; i++) {
        Share *s = shares[i];
        if (!is_encoded(m, s)) continue;
        int64_t start = num_text(s) ? s->start : s->cells_start, count = num_text(s) ? num_text(s) : 1;
        int64_t floor = num_text(s) ? s->floor : s->cells_floor;
        add_text(m, &spans, s, ENCODER_CACHE, start, start + count, floor);
        serve_bytes(s, ENCODER, m->tilings + ENCODER_CACHE, rows, start, count, floor);
        for (int64_t at = start; at < start + count; at++, row++) {
            hash_embed(m->hashes, s->ids + at, at, m->embedding, sum, sum + dim, x, row, bf16);
            page[row] = page_of(s->tables + OPEN_CACHE, at, size), offset[row] = at % size;
        }
    }
    Plan plan = planned(&plan_room, &spans, &spans, m->tilings + ENCODER_CACHE);
    run_stack(m->encoder, &plan, m->caches[ENCODER_CACHE], m->caches[OPEN_CACHE], m->open_states, page, offset, x, 0, rows, states);
    count_pass(totals, ENCODER, rows, began);
    return states;
}

/* A closed patch: its bytes begin..after-1, and the first patch that it sees. */
typedef struct {
    Share *of;
    int64_t patch, begin, after, floor;
} Patch;

static int64_t closed_patches(const Model *m, Share *s, Patch *found) {
    int64_t count = 0, floor = s->patch_floor;
    if (!num_text(s)) return 0;
    for (int64_t row = s->start; row < s->end; row++) {
        if (!starts_after(s, row)) continue;
        int64_t begin = s->patch_start[row], patch = s->patch[row];
        found[count++] = (Patch){s, patch, begin, row + 1, floor};
        for (int64_t byte = begin; byte <= row && m->isolates_global; byte++)
            if (s->ids[byte] == m->eos) floor = patch + 1;
    }
    /* What a verification has run may not stand. */
    if (s->ask != VERIFY) s->patch_floor = floor;
    if (s->closes && s->patch_start[s->end] < s->end)
        found[count++] = (Patch){s, s->patch[s->end], s->patch_start[s->end], s->end, floor};
    return count;
}

/* Closed patches to latents. */
static void run_global(const Model *m, Share *const *shares, int64_t n, Totals *totals) {
    static Buffer spans_room, pages_room, plan_room, query_spans, query_pages, query_plan;
    double began = seconds_now();
    int64_t slots = m->slots, most = 0, count = 0, bf16 = m->global->bf16, itemsize = bf16 ? 2 : 4;
    int64_t dim = m->hashes->dim, size = m->tilings[OPEN_CACHE].page_size, latents_size = m->tilings[LATENT_CACHE].page_size;
    for (int64_t i = 0; i < n; i++) most += num_text(shares[i]) + 1;
    Patch *patches = ROOM(Patch, most);
    for (int64_t i = 0; i < n; i++) count += closed_patches(m, shares[i], patches + count);
    if (!count) return;
    Spans spans, queries;
    clear(&spans, &spans_room, &pages_room, m, shares, n, GLOBAL_CACHE);
    clear(&queries, &query_spans, &query_pages, m, shares, n, OPEN_CACHE);
    float *pooled = ROOM(float, count * dim), *state = ROOM(float, 2 * dim), *highest = state + dim;
    int64_t *page = ROOM(int64_t, count * slots), *offset = ROOM(int64_t, count * slots);
    for (int64_t p = 0; p < count;) {
        Share *s = patches[p].of;
        const Table *open = s->tables + OPEN_CACHE, *table = s->tables + GLOBAL_CACHE;
        int64_t first = p, counted = 0, end = p;
        while (end < count && patches[end].of == s) end++;
        int64_t at = add_pages(&spans, table, patches[end - 1].patch + 1, m->tilings + GLOBAL_CACHE);
        int64_t open_at = add_pages(&queries, open, patches[end - 1].after, m->tilings + OPEN_CACHE);
        for (int64_t begin = p; p < end; p++) {
            Patch *own = patches + p;
            if (p + 1 == end || own[1].floor != own->floor) {
                add_span(&spans, at, table, patches[begin].patch, p + 1 - begin, own->floor, 0, own->patch);
                begin = p + 1;
            }
            add_span(&queries, open_at, open, own->begin, slots, own->begin, slots, own->after - 1);
            for (int64_t d = 0; d < dim; d++) highest[d] = -INFINITY;
            for (int64_t byte = own->begin; byte < own->after; byte++) {
                int64_t place = page_of(open, byte, size) * size + byte % size;
                widen(state, (const char *)m->open_states + place * dim * itemsize, dim, bf16);
                keep_highest(highest, state, dim);
            }
            narrow((char *)pooled + p * dim * itemsize, highest, dim, bf16);
            for (int64_t slot = 0; slot < slots; slot++) {
                page[p * slots + slot] = page_of(s->tables + LATENT_CACHE, own->patch, latents_size);
                offset[p * slots + slot] = own->patch % latents_size * slots + slot;
            }
            counted += own->after > s->counted_from;
        }
        serve(s, GLOBAL, count, end - first, counted, patches[end - 1].patch + 1 - patches[first].floor);
    }
    Plan pooling = planned(&query_plan, 0, &queries, m->tilings + OPEN_CACHE);
    Plan plan = planned(&plan_room, &spans, &spans, m->tilings + GLOBAL_CACHE);
    float *x = ROOM(float, count * m->open_slots.out), *y = ROOM(float, count * m->open_slots.out);
    run_linear(&m->open_slots, pooled, 0, 0, 0, 0, 0, x, count, bf16);
    for (int64_t i = 0; i < m->num_closing; i++) {
        const Slots *c = m->closing + i;
        float *q = ROOM(float, count * slots * c->q.out), *seen = ROOM(float, count * slots * c->q.out);
        run_linear(&c->q, x, c->norm, c->eps, 0, 0, 0, q, count * slots, bf16);
        run_attention(q, seen, &pooling, m->caches[OPEN_CACHE] + i, c->heads, bf16);
        run_linear(&c->o, seen, 0, 0, 0, x, 1, y, count * slots, bf16);
        float *before = x;
        x = y, y = before;
    }
    if (m->projection.panels) {
        float *wide = ROOM(float, count * m->projection.out);
        run_linear(&m->projection, x, 0, 0, 0, 0, 0, wide, count, bf16);
        x = wide;
    }
    float *latents = ROOM(float, count * m->global->dim), *parts = ROOM(float, count * m->latent_slots.out);
    run_stack(m->global, &plan, m->caches[GLOBAL_CACHE], 0, 0, 0, 0, x, 0, count, latents);
    run_linear(&m->latent_slots, latents, 0, 0, 0, 0, 0, parts, count, bf16);
    run_cross_kv(m->latent_kv, m->num_latent_kv, page, offset, m->caches[LATENT_CACHE], parts, count * slots);
    count_pass(totals, GLOBAL, count, began);
}

/* Rows that drafted exactly are not run again: up to the first that closes a patch, which read a latent that was not
   there. */
static void skip_exact(Share *s) {
    int64_t first = s->start;
    while (first < s->end && !starts_after(s, first)) first++;
    s->decode_from = first < s->start + s->exact ? first : s->start + s->exact;
    s->logits_from = larger(s->logits_from, s->decode_from);
    s->drawn_from = larger(s->drawn_from, s->decode_from);
}

/* The wanted logits (rows, vocabulary), each sequence's from its `logits_at` on. */
static float *run_decoder(const Model *m, Share *const *shares, int64_t n, const void *states, Totals *totals) {
    static Buffer spans_room, pages_room, plan_room;
    double began = seconds_now();
    int64_t rows = 0, wanted = 0, encoded = 0, row = 0, bf16 = m->decoder->bf16, itemsize = bf16 ? 2 : 4;
    int64_t size = m->tilings[LATENT_CACHE].page_size, dim = m->decoder->dim, vocabulary = m->decoder->head.out;
    Spans spans;
    clear(&spans, &spans_room, &pages_room, m, shares, n, DECODER_CACHE);
    for (int64_t i = 0; i < n; i++) {
        Share *s = shares[i];
        if (s->exact) skip_exact(s);
        s->logits_at = wanted, s->num_logits = s->end - s->logits_from + s->num_cells;
        rows += s->end - s->decode_from + s->num_cells;
        wanted += s->num_logits;
    }
    if (!rows) return 0;
    int64_t *ids = ROOM(int64_t, rows), *page = ROOM(int64_t, rows), *offset = ROOM(int64_t, rows);
    int64_t *logit_rows = ROOM(int64_t, wanted), *want = logit_rows;
    char *x = ROOM(char, rows * dim * itemsize);
    float *logits = ROOM(float, wanted * vocabulary), *found = ROOM(float, wanted * vocabulary);
    for (int64_t i = 0; i < n; i++) {
        Share *s = shares[i];
        const Table *latent = s->tables + LATENT_CACHE, *t = s->tables + DECODER_CACHE;
        int64_t text = s->end - s->decode_from, count = text + s->num_cells;
        encoded += num_text(s) ? num_text(s) : is_encoded(m, s);
        if (!count) continue;
        for (int64_t from = row + s->logits_from - s->decode_from; from < row + count; from++) *want++ = from;
        if (m->reads_states)
            memcpy(x + row * dim * itemsize, (const char *)states + (encoded - count) * dim * itemsize, count * dim * itemsize);
        int64_t floor = text ? floor_at(m, s, s->decode_from) : s->cells_floor;
        if (text) add_text(m, &spans, s, DECODER_CACHE, s->decode_from, s->end, floor);
        if (s->num_cells) {
            int64_t block = s->cells_start + s->num_cells - s->num_block, end = block + s->num_block;
            int64_t at = add_pages(&spans, t, end, m->tilings + DECODER_CACHE);
            if (block > s->cells_start) add_span(&spans, at, t, s->cells_start, block - s->cells_start, s->cells_floor, 0, block - 1);
            if (s->num_block) add_span(&spans, at, t, block, s->num_block, floor_after(m, s, block), s->num_block, end - 1);
        }
        serve_bytes(s, DECODER, m->tilings + DECODER_CACHE, rows, text ? s->decode_from : s->cells_start, count, floor);
        for (int64_t k = 0; k < count; k++, row++) {
            int64_t at = k < text ? s->decode_from + k : s->cells_start + k - text;
            int64_t patch = k < text ? s->patch[at + 1] - 1 : s->patch[s->end] - 1 + (s->closes && s->patch_start[s->end] < s->end);
            ids[row] = s->ids[at];
            page[row] = page_of(latent, patch, size), offset[row] = patch % size * m->slots;
        }
    }
    Plan plan = planned(&plan_room, &spans, &spans, m->tilings + DECODER_CACHE);
    const void *in = m->reads_states ? (const void *)x : ids;
    run_stack(m->decoder, &plan, m->caches[DECODER_CACHE], m->caches[LATENT_CACHE], 0, page, offset, in, logit_rows, wanted, found);
    widen(logits, found, wanted * vocabulary, bf16);
    count_pass(totals, DECODER, rows, began);
    return logits;
}

/* The random number of a place of the text: Philox 4x64-10, as `draw` of engine/step/sampling.py. */
static double uniform_at(const Share *s, int64_t place) {
    uint64_t key = s->seed, other_key = s->sample_index, a = (uint64_t)(place - s->num_prompt) + 1, b = 0, c = 0, d = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)a * 0xD2E7470EE14C6C93u, second = (unsigned __int128)c * 0xCA5A826395121157u;
        a = (uint64_t)(second >> 64) ^ b ^ key, b = (uint64_t)second, c = (uint64_t)(first >> 64) ^ d ^ other_key, d = (uint64_t)first;
        key += 0x9E3779B97F4A7C15u, other_key += 0xBB67AE8584CAA73Bu;
    }
    return (double)(a >> 11) * 0x1p-53;
}

enum { PRESENCE = 4, FREQUENCY, REPETITION };

/* Penalises ids that were generated before a place, those of a draft too, but not a block's. Each rounding is that of
   engine/step/sampling.py: no product may be fused with a sum. */
static void penalise(const Share *s, double *x, int64_t n, const double *params, int64_t place) {
    double *counts = ROOM(double, n), repetition = params[REPETITION];
    memcpy(counts, s->counts, n * sizeof *counts);
    int64_t end = s->ask == UNMASK ? s->cells_start + s->num_cells - s->num_block : place;
    for (int64_t at = s->committed; at < end; at++) counts[s->ids[at]] = counts[s->ids[at]] < 0 ? 1 : counts[s->ids[at]] + 1;
    for (int64_t i = 0; i < n; i++) {
        volatile double repeated = x[i] + (s->bias ? s->bias[i] : 0.0), often = params[FREQUENCY] * counts[i];
        if (repetition != 1.0 && counts[i] >= 0) repeated = repeated > 0 ? repeated / repetition : repeated * repetition;
        double change = s->changes ? s->changes[i] : 0.0;
        x[i] = repeated + (counts[i] > 0 ? change - params[PRESENCE] - often : change);
    }
}

/* One id from a row of logits, as `draw_ids` of engine/step/sampling.py. */
static int64_t drawn(const Share *s, const float *logits, int64_t n, const double *params, int64_t place) {
    int may_end = !s->ends || place >= s->first_end;
    if (!s->changes && !s->counts && may_end && !(params[0] > 0.0)) return argmax(logits, n);
    double *x = ROOM(double, n);
    for (int64_t i = 0; i < n; i++) x[i] = logits[i];
    if (s->counts) penalise(s, x, n, params, place);
    else for (int64_t i = 0; i < n && s->changes; i++) x[i] += s->changes[i];
    for (int64_t i = 0; i < n && !may_end; i++) x[i] += s->ends[i];
    return sample(x, n, params, params[0] > 0.0 ? uniform_at(s, place) : 0.0);
}

/* Keeps rows of logits for the host, from its row `at` on, if it asks for them. */
static void keep_logits(const Share *s, int64_t at, const float *rows, int64_t count, int64_t n) {
    if (s->logits) memcpy(s->logits + at * n, rows, count * n * sizeof *rows);
}

static int is_distribution(const float *logits, int64_t n) { return isfinite(logits[argmax(logits, n)]); }

/* A pass over a block: `logits` of its cells. Returns whether a cell is still masked. */
static int settle(const Model *m, Share *s, float *logits) {
    int64_t size = s->num_block, n = m->decoder->head.out, first = s->cells_start + s->num_cells - size;
    int64_t *ids = s->ids + first, *chosen = ROOM(int64_t, size);
    uint8_t *masked = ROOM(uint8_t, size), *settled = ROOM(uint8_t, size);
    float *confidence = ROOM(float, size), *entropies = ROOM(float, size);
    int left = 0;
    for (int64_t c = 0; c < size; c++, logits += n) {
        for (int i = 0; i < 3; i++) logits[m->specials[i]] = -INFINITY;
        masked[c] = ids[c] == m->mask;
        s->bad |= masked[c] && !is_distribution(logits, n);
        if (s->settled[c] < 0) keep_logits(s, c, logits, 1, n);
        confidence_and_entropy(logits, n, confidence + c, entropies + c);
        chosen[c] = drawn(s, logits, n, s->cell_params, first + c);
    }
    unmask(masked, confidence, entropies, s->rule, s->bound, settled, size);
    for (int64_t c = 0; c < size; c++) {
        if (settled[c]) ids[c] = chosen[c], s->settled[c] = s->num_passes;
        left |= masked[c] && !settled[c];
    }
    return left;
}

/* How many drafts are what is drawn in their places, and what is drawn after these. */
static void verify(const Model *m, Share *s, const float *row) {
    int64_t n = m->decoder->head.out, first = s->end - s->drafts;
    s->accepted = s->drawn_from + 1 - first;
    keep_logits(s, s->accepted, row, s->end - s->drawn_from, n);
    for (;; s->accepted++, row += n) {
        int64_t place = first + s->accepted, id = drawn(s, row, n, s->params, place);
        s->bad |= !is_distribution(row, n);
        if (s->accepted < s->drafts && id == s->ids[place]) continue;
        s->given = id;
        return;
    }
}

/* Makes a sequence ready for a pass over `drafts`, which follow its last row of the text; those after an EOS are left
   out. exact: see `Verify` of engine/decoders/asks.py. */
static void verify_next(const Model *m, Share *s, int64_t drafts, int64_t exact) {
    s->start = s->end++;
    for (s->drafts = 0; s->drafts < drafts;)
        if (s->ids[s->end + s->drafts++] == m->eos) break;
    s->end += s->drafts;
    s->exact = exact < s->drafts ? exact : s->drafts;
    s->decode_from = s->logits_from = s->drawn_from = s->start;
    s->cells_start = s->num_cells = s->num_block = 0;
    s->ask = VERIFY;
}

/* Whether the generated text up to a place may end there, because of one of the strings that `stops` counts and has,
   each after its length. */
static int stops_at(const Share *s, int64_t place) {
    if (!s->stops) return 0;
    const int64_t *stop = s->stops + 1;
    for (int64_t left = s->stops[0]; left; stop += 1 + *stop, left--) {
        int64_t first = place + 1 - *stop;
        if (first >= s->num_prompt && !memcmp(s->ids + first, stop + 1, *stop * sizeof *stop)) return 1;
    }
    return 0;
}

/* Notes a round that has ended: its drafts, which begin at a position, how many of them stand, and the byte after these,
   unless it is -1. Returns whether another may begin. The host takes over where the text may end, and at an EOS, the
   first of which may be at the position `from`. */
static int may_repeat(const Model *m, Share *s, int64_t from, int64_t first, int64_t drafts, int64_t accepted, int64_t given) {
    int64_t width = s->width, next = first + accepted + (given >= 0);
    int64_t *note = s->log + s->num_rounds++ * (3 + 2 * width);
    note[0] = drafts, note[1] = accepted, note[2] = given;
    memcpy(note + 3, s->ids + first, drafts * sizeof *note);
    if (s->kind == UNMASK) memcpy(note + 3 + width, s->settled, width * sizeof *note);
    if (given >= 0) s->ids[next - 1] = given;
    if (s->bad || s->num_rounds == s->rounds || next >= s->until) return 0;
    for (int64_t at = from; at < next; at++)
        if (s->ids[at] == m->eos || (at >= first && stops_at(s, at))) return 0;
    return 1;
}

/* Makes a sequence ready for its next round; one of blt is a byte. The bytes of a block that is not verified run as rows
   of the text in the next one's first pass. */
static void begin_round(const Model *m, Share *s) {
    if (s->ask == NEXT) {
        s->floor = floor_at(m, s, s->end);
        s->start = s->decode_from = s->logits_from = s->drawn_from = s->end;
        s->end++;
        return;
    }
    if (s->ask == VERIFY) {
        s->ask = s->kind;
        s->start = s->end = s->decode_from = s->logits_from = s->drawn_from = s->cells_start = s->end - s->drafts + s->accepted;
        s->cells_floor = s->floor;
        s->num_cells = 1, s->passes = s->width;
    } else {
        s->floor = s->cells_floor;
        s->start = s->decode_from = s->cells_start;
        s->end = s->logits_from = s->drawn_from = s->cells_start += s->num_block;
        s->num_cells = 0;
    }
    s->num_passes = 0;
    if (s->kind == DRAFT) return;
    int64_t first = s->cells_start + s->num_cells;
    s->num_block = s->width, s->num_cells += s->width;
    for (int64_t c = 0; c < s->width; c++) s->ids[first + c] = m->mask, s->settled[c] = -1;
}

/* What a sequence does after a pass: it may take part in the next one, for which it is made ready, or in another
   round. */
typedef enum { STOPS, GOES_ON, REPEATS } Then;

/* Chooses a sequence's bytes. */
static Then choose(const Model *m, Share *s, float *logits) {
    int64_t n = m->decoder->head.out, lead = s->num_cells - s->num_block, id = -1, left = 1;
    float *row = logits + (s->logits_at + s->num_logits - (s->end - s->drawn_from) - s->num_cells) * n;
    if (s->ask == VERIFY) {
        verify(m, s, row);
        s->num_passes += !s->rounds;
        if (!s->rounds) return STOPS;
        int64_t first = s->end - s->drafts;
        return may_repeat(m, s, s->patch_start[s->start], first, s->drafts, s->accepted, s->given) ? REPEATS : STOPS;
    }
    int64_t place = s->ask == NEXT ? s->end : s->cells_start + 1;
    if (s->ask == UNMASK) left = settle(m, s, row + lead * n);
    if (s->ask != UNMASK || lead) {
        id = drawn(s, row, n, s->params, place);
        s->bad |= !is_distribution(row, n);
        s->ids[place] = id;
        keep_logits(s, s->ask == NEXT ? s->num_passes : s->ask == DRAFT ? place - s->end - 1 : 0, row, 1, n);
    }
    if (s->ask == UNMASK && lead) {
        s->settled[0] = 0;
        left = 0;
        for (int64_t c = 0; c < s->num_block; c++) left |= s->ids[place + c] == m->mask;
    }
    int ends = s->ask != UNMASK && (id == m->eos || (s->ask == NEXT && stops_at(s, place)));
    s->num_passes++;
    if (s->ask == NEXT) {
        s->num_rounds++;
        return s->num_passes < s->passes && !ends ? REPEATS : STOPS;
    }
    if (s->num_passes >= s->passes || !left || ends) {
        if (!s->rounds || (s->ask == UNMASK && left)) return STOPS;
        if (s->closes) {
            int64_t first = s->cells_start;
            return may_repeat(m, s, first, first, s->num_block, s->num_block, -1) ? REPEATS : STOPS;
        }
        int64_t drafts = s->ask == DRAFT ? place - s->end : s->num_block;
        /* Where an earlier step had the logits of exact rows, the host has their scores: it asks for the verification. */
        if (s->logits && (s->ask == DRAFT ? s->num_passes < drafts : s->settled[0] < 0)) return STOPS;
        verify_next(m, s, drafts, s->ask == DRAFT ? drafts : 1);
        return GOES_ON;
    }
    int64_t next = s->cells_start + (s->ask == DRAFT || lead);
    s->cells_floor = floor_after(m, s, next);
    s->cells_start = next;
    s->num_cells -= s->ask == UNMASK ? lead : 0;
    s->start = s->decode_from = s->logits_from = s->drawn_from = s->end;
    return GOES_ON;
}

/* Sizes of the structs, which kernels/native/step.py lays out by itself. */
void fastblt_step_sizes(int64_t *sizes) { sizes[0] = sizeof(Model), sizes[1] = sizeof(Share), sizes[2] = sizeof(Totals); }

/* Runs a pass of `n` sequences; moves those that take part in another to the front and returns their number. Adds those
   that may begin another round to `repeating`. */
static int64_t run_pass(const Model *m, Share **live, int64_t n, Share **repeating, int64_t *num_repeating, Totals *totals) {
    run_patcher(m, live, n, totals);
    void *states = run_encoder(m, live, n, totals);
    run_global(m, live, n, totals);
    float *logits = run_decoder(m, live, n, states, totals);
    int64_t left = 0, vocabulary = m->decoder->head.out;
    for (int64_t i = 0; i < n; i++) {
        Share *s = live[i];
        if (!s->draws && s->num_logits) keep_logits(s, 0, logits + s->logits_at * vocabulary, s->num_logits, vocabulary);
        Then then = s->draws ? choose(m, s, logits) : STOPS;
        if (then == GOES_ON) live[left++] = s;
        if (then == REPEATS) repeating[(*num_repeating)++] = s;
    }
    return left;
}

/* How many sequences, from the first on, run the further passes of a round together: as many as the processor's cache
   holds the rows of, since each pass of a draft reads the same rows again. */
static int64_t num_together(const Model *m, Share **live, int64_t n) {
    int64_t count = 0, window = m->tilings[DECODER_CACHE].window;
    if (!m->most_read) return n;
    for (int64_t read = 0; count < n; count++) {
        const Share *s = live[count];
        int64_t end = s->cells_start + s->num_cells;
        read += window && window < end ? window : end;
        if (count && read > m->most_read) break;
    }
    return count;
}

/* Runs the shares of `count` sequences, which it fills from `num_passes` on. Each round begins once all have ended the
   one before, or each would read all weights for few rows. From the third on none begins that would end so many seconds
   after the call, if the first, in which prompts may run, had taken as long as the others. */
void fastblt_step(const Model *m, Share *all, int64_t count, Totals *totals, double seconds, int threads) {
    double began = seconds_now(), first = 0;
    begin(threads);
    Share **live = ROOM(Share *, count);
    Share **repeating = ROOM(Share *, count);
    int64_t rows = 0, num_repeating = 0;
    *totals = (Totals){0};
    for (int64_t i = 0; i < count; i++) {
        Share *s = live[i] = all + i;
        memset((char *)s + offsetof(Share, num_passes), 0, sizeof *s - offsetof(Share, num_passes));
        rows += s->end - s->decode_from + s->num_cells;
    }
    stay_awake(rows * m->decoder->num_layers * layer_numbers(m->decoder->layers));
    for (int64_t now = count, rounds = 1; now; rounds++) {
        int64_t left = run_pass(m, live, now, repeating, &num_repeating, totals);
        for (int64_t first = 0, n; first < left; first += n) {
            n = num_together(m, live + first, left - first);
            for (int64_t more = n; more;) more = run_pass(m, live + first, more, repeating, &num_repeating, totals);
        }
        double passed = seconds_now() - began;
        first = rounds == 1 ? passed : first;
        totals->round = rounds == 1 ? passed : (passed - first) / (rounds - 1);
        if (rounds > 1 && totals->round * (rounds + 1) > seconds) break;
        for (now = 0; now < num_repeating; now++) begin_round(m, live[now] = repeating[now]);
        num_repeating = 0;
    }
    for (int64_t i = 0; i < count; i++) all[i].ended = all[i].end;
    may_sleep();
    finish();
}

#endif
