// The GPU check's ring as a function of a shared library. RING names the source: its own, or one with a mistake in it.
#include RING

static const u32 *given_w;
static u32 *given_x;
static int given_phases, given_rows, given_tag;

// Whether all threads came to their end.
extern "C" int run(const u32 *w, u32 *x, int phases, int rows, int tag, unsigned seed) {
    given_w = w, given_x = x, given_phases = phases, given_rows = rows, given_tag = tag;
    const size_t shared = STAGES * TILE * 4 + WARPS * 8 * OUT * 4 + 2 * STAGES * 8;
    return launch(DIM / OUT, WARPS * 32 + 32, shared, seed, [] {
        chain(given_w, given_x, given_phases, given_rows, given_tag);
    });
}
