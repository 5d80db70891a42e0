/* From spans of rows to the index arrays of attention: kernels/planning.py says what they mean. */

#ifndef FASTBLT_PLANNING_H
#define FASTBLT_PLANNING_H

#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t pages_at, first_page, start, count, floor, mutual, last;
} Span;

typedef struct {
    int64_t small, large, page_size, window;
} Tiling;

/* Numbers of a tile in a plan, as in kernels/attention.py. */
enum { BEGIN, COUNT, PAGES_AT, FIRST_PAGE, NUM_PAGES, TILE_NUMBERS };

/* A tile's first row in its span, its number of rows, and the pages of the sequence that it reads. */
typedef struct {
    int64_t begin, count, lowest, highest;
} Tile;

static inline int64_t first_seen(const Span *s, int64_t row, const Tiling *t) {
    int64_t first = t->window ? s->start + row - t->window + 1 : s->floor;
    return first > s->floor ? first : s->floor;
}

static inline int64_t last_seen(const Span *s, int64_t row) {
    return row < s->count - s->mutual ? s->start + row : s->last;
}

/* The tile that begins at a span's row. */
static inline Tile tile_at(const Span *s, int64_t row, const Tiling *t) {
    int64_t size = s->count <= t->small ? t->small : t->large;
    int64_t count = s->count - row < size ? s->count - row : size;
    Tile tile = {row, count, first_seen(s, row, t) / t->page_size, last_seen(s, row + count - 1) / t->page_size};
    return tile;
}

/* Counts tiles, the pages that they read, and the most pages of a tile. */
static void count_tiles(const Span *queries, int64_t n, const Tiling *t, int64_t *tiles, int64_t *pages, int64_t *most) {
    *tiles = *pages = 0, *most = 1;
    for (const Span *s = queries; s < queries + n; s++)
        for (int64_t row = 0; row < s->count;) {
            Tile tile = tile_at(s, row, t);
            int64_t count = tile.highest + 1 - tile.lowest;
            ++*tiles;
            *pages += count;
            if (count > *most) *most = count;
            row += tile.count;
        }
}

static int64_t *fill_writes(int64_t *out, int64_t rows, const Span *writes, int64_t n, const int64_t *pages, const Tiling *t) {
    int64_t *positions = out, *page = out + rows, *offset = page + rows;
    for (const Span *s = writes; s < writes + n; s++)
        for (int64_t row = s->start; row < s->start + s->count; row++) {
            *positions++ = row;
            *page++ = pages[s->pages_at + row / t->page_size - s->first_page];
            *offset++ = row % t->page_size;
        }
    return out + 3 * rows;
}

static void fill_queries(
    int64_t *first, int64_t queries, int64_t num_tiles, const Span *spans, int64_t n, const int64_t *pages, const Tiling *t
) {
    int64_t *last = first + queries, *tiles = last + queries, *read = tiles + TILE_NUMBERS * num_tiles, query = 0, used = 0;
    for (const Span *s = spans; s < spans + n; s++) {
        for (int64_t row = 0; row < s->count;) {
            Tile tile = tile_at(s, row, t);
            int64_t count = tile.highest + 1 - tile.lowest;
            int64_t numbers[TILE_NUMBERS] = {query + row, tile.count, used, tile.lowest, count};
            memcpy(tiles, numbers, sizeof numbers);
            memcpy(read + used, pages + s->pages_at + tile.lowest - s->first_page, count * sizeof *pages);
            tiles += TILE_NUMBERS;
            used += count;
            row += tile.count;
        }
        for (int64_t row = 0; row < s->count; row++) {
            first[query + row] = first_seen(s, row, t);
            last[query + row] = last_seen(s, row);
        }
        query += s->count;
    }
    for (; query < queries; query += t->large, tiles += TILE_NUMBERS) {
        tiles[BEGIN] = query;
        tiles[COUNT] = queries - query < t->large ? queries - query : t->large;
    }
}

#endif
