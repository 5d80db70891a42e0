/* Vectors of numbers, bfloat16, memory for intermediate results. */

#ifndef FASTBLT_VECTOR_H
#define FASTBLT_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* One copy for all callers: where a function is inlined, the compiler may fuse other multiplications and additions, and a
   row would get other bits. */
#if defined(__clang__)
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef int16_t Halves __attribute__((vector_size(4 * LANES)));

/* Lanes of a, from 0 on, and of b after them, by their numbers, a vector of INTS. Before 12, GCC has another name for it. */
#if (defined(__clang__) || __GNUC__ >= 12) && !defined(FASTBLT_AS_GCC_11)
#define SHUFFLED(INTS, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(INTS, a, b, ...) __builtin_shuffle(a, b, (INTS){__VA_ARGS__})
#endif

static inline Vector load(const float *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline Vector load_bf16(const uint16_t *from) {
    Half half;
    memcpy(&half, from, sizeof half);
    Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vector v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* 2 * LANES numbers of 8 bits with sign, as 16 bits. GCC converts vectors of this size in halves. */
static inline Halves load_signed(const void *from) {
#if defined(__AVX512BW__)
    return (Halves)_mm512_cvtepi8_epi16(_mm256_loadu_si256(from));
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtepi8_epi16(_mm_loadu_si128(from));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * LANES)));
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Halves);
#endif
}

static inline void store(float *to, Vector v) { memcpy(to, &v, sizeof v); }

static inline float sum_of(Vector v) {
    Four part[LANES / 4];
    memcpy(part, &v, sizeof v);
    for (int width = LANES / 8; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

static inline float dot(const float *a, const float *b, int64_t n) {
    Vector v = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) v += load(a + i) * load(b + i);
    float sum = sum_of(v);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* To the nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static inline float rounded(float x, int bf16) { return bf16 ? from_bf16(to_bf16(x)) : x; }

/* e^r near 0, of numbers and vectors alike. */
#define POLYNOMIAL(r)                                                                                                  \
    ((((((1.9875691500e-4f * (r) + 1.3981999507e-3f) * (r) + 8.3334519073e-3f) * (r) + 4.1665795894e-2f) * (r) +       \
       1.6666665459e-1f) * (r) + 5.0000001201e-1f) * (r) * (r) + (r) + 1.0f)

/* e^x to about one unit in the last place, for x that is not NaN (Cody and Waite's reduction, Cephes' polynomial). */
static inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    float n = x * 1.44269504f + 12582912.0f;
    n -= 12582912.0f;
    float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return POLYNOMIAL(r) * power;
}

static inline Vector chosen(Ints where, Vector yes, Vector no) { return (Vector)(((Ints)yes & where) | ((Ints)no & ~where)); }

/* The same for a vector. */
static inline Vector exponential_of(Vector x) {
    Vector zero = {0}, least = zero - 87.3f, most = zero + 88.7f;
    x = chosen(x < least, least, chosen(x > most, most, x));
    Vector n = x * 1.44269504f + 12582912.0f;
    n -= 12582912.0f;
    Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
    return POLYNOMIAL(r) * (Vector)((__builtin_convertvector(n, Ints) + 127) << 23);
}

/* The largest of x and `most`. */
static float most_of(const float *x, int64_t n, float most) {
    Vector zero = {0}, lanes = zero + most;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes = chosen(load(x + i) > lanes, load(x + i), lanes);
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    float left[LANES];
    store(left, lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) left[l] = left[l + width] > left[l] ? left[l + width] : left[l];
    return left[0] > most ? left[0] : most;
}

/* x becomes e^(x - most): returns the sum. Overwrites up to LANES numbers after x. */
static float exponentials(float *x, int64_t n, float most) {
    Vector sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector e = exponential_of(load(x + i) - most);
        store(x + i, e);
        sums += e;
    }
    float sum = sum_of(sums);
    if (i < n) store(x + i, exponential_of(load(x + i) - most));
    for (; i < n; i++) sum += x[i];
    return sum;
}

/* Numbers of a tensor in the model's dtype as float, and back. */
static void widen(float *to, const void *from, int64_t n, int bf16) {
    if (!bf16) memcpy(to, from, n * sizeof *to);
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t *)from)[i]);
}

static void narrow(void *to, const float *from, int64_t n, int bf16) {
    if (!bf16) memcpy(to, from, n * sizeof *from);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = to_bf16(from[i]);
}

/* Memory that lives until the next call; grows to the need of the largest call. */
static _Thread_local char *arena;
static _Thread_local size_t arena_size, arena_used;

static void reserve(size_t floats) {
    size_t size = floats * sizeof(float) + 4096;
    if (size > arena_size) {
        free(arena);
        arena = malloc(size);
        if (!arena) abort();
        arena_size = size;
    }
    arena_used = 0;
}

static float *take(size_t floats) {
    float *found = (float *)(arena + arena_used);
    arena_used += (floats * sizeof(float) + 63) / 64 * 64;
    return found;
}

/* One thread's memory for one part of an operation; its old content is lost. */
static float *scratch(size_t floats) {
    static _Thread_local float *room;
    static _Thread_local size_t size;
    if (floats > size) {
        free(room);
        room = malloc(floats * sizeof(float));
        if (!room) abort();
        size = floats;
    }
    return room;
}

#endif
