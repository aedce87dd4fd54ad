/* The unnormalised Walsh-Hadamard transform of one block, with work fused into its first and its last pass.
 *
 * Additions are those of the textbook butterflies, stride 1, 2, 4, ..., n/2, each rounded once, so the bits are those
 * of the torch form. Strides 1 to 32 are done on tiles of 64 numbers in registers (an 8 x 8 transposition brings the
 * first three to whole vectors); then follow passes of two or three strides. Sub-blocks are finished one after
 * another, so that they stay in the nearest cache. */
#ifndef SUBSPACE_LAB_TRANSFORM_H
#define SUBSPACE_LAB_TRANSFORM_H

#include "words.h"

#define CHUNK 4096 /* numbers: half of a 32 KB first-level cache */

INLINE void butterfly(vf *a, vf *b) {
    const vf sum = *a + *b, difference = *a - *b;
    *a = sum;
    *b = difference;
}

INLINE void butterflies8(vf r[8]) {
    for (int h = 1; h < 8; h <<= 1)
        for (int i = 0; i < 8; i++)
            if (!(i & h)) butterfly(&r[i], &r[i + h]);
}

INLINE void transpose8(vf r[8]) {
    vf s[8], t[8];
    for (int i = 0; i < 8; i += 2) {
        s[i] = PICK(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = PICK(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        t[i] = PICK(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        t[i + 1] = PICK(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        t[i + 2] = PICK(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        t[i + 3] = PICK(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = PICK(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = PICK(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* A keyed bijection of k-bit numbers: three rounds of an odd multiplication, an addition and a shift that is its own
 * inverse. The inverse map is of the same form with the two steps of a round exchanged. */
typedef struct {
    uint32_t times[3], plus[3], mask;
    int shift;
} bijection;

/* What the first pass reads: numbers as they stand; "turned" ones, tile by tile number 8 i + j at 8 j + i; or the
 * numbers that a bijection of up to 16 bits, or its inverse, points to. */
enum { PLAIN, TURNED, GATHER, GATHER_BACK };
/* What the last pass makes of the result x: x; x with signs flipped; the same, added to the first `size` numbers of a
 * sum; base + scale x. */
enum { KEEP, SIGN, SUM, ROWS };

typedef struct {
    const float *from;      /* what the first pass reads */
    const uint8_t *before;  /* TURNED, GATHER: a sign bit for each number read */
    const bijection *order; /* GATHER, GATHER_BACK */
    const uint8_t *after;   /* SIGN: a sign bit for each number of the result */
    const float *base;      /* ROWS; NULL is no base */
    float *to;              /* KEEP, SIGN: the block itself; SUM: the sum; ROWS: the rows */
    float scale;
    int64_t size; /* numbers that count: TURNED: the others need not be read, being zeros; SUM: nor written */
} ends;

/* The places of a tile's numbers, turned, as T with 32 / sizeof(T) of them in a vector V. */
#define PLACES(NAME, T, V, ...)                                                        \
    INLINE void NAME(T to[64], const bijection *order, int64_t tile, int back) {       \
        const V turned = {__VA_ARGS__};                                                \
        for (int j = 0; j < 8; j += 4 / (int)sizeof(T)) {                              \
            V t = turned + (T)(64 * tile + j);                                         \
            for (int r = 0; r < 3; r++) {                                              \
                if (back) t ^= t >> order->shift;                                      \
                t = (t * (T)order->times[r] + (T)order->plus[r]) & (T)order->mask;     \
                if (!back) t ^= t >> order->shift;                                     \
            }                                                                          \
            *(V *)(to + 8 * j) = t;                                                    \
        }                                                                              \
    }
PLACES(places16, uint16_t, vh, 0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57)
PLACES(places32, uint32_t, vu, 0, 8, 16, 24, 32, 40, 48, 56)

INLINE void first_strides(float *v, vf r[8], int64_t tile, const ends *e, int source) {
    if (source == TURNED || source == GATHER) {
        vu y; /* lane l: the byte of row l of the tile, at the top */
        memcpy(&y, e->before + 8 * tile, sizeof y);
        y = PICK(y, y, 0, 0, 0, 0, 1, 1, 1, 1) << (vu){24, 16, 8, 0, 24, 16, 8, 0};
        for (int j = 0; j < 8; j++) r[j] = (vf)((vu)r[j] ^ ((y << (7 - j)) & 0x80000000u));
    }
    if (source == PLAIN) transpose8(r);
    butterflies8(r);
    transpose8(r);
    butterflies8(r);
    for (int j = 0; j < 8; j++) *(vf_any *)(v + 64 * tile + 8 * j) = r[j];
}

/* The places of the next tile are worked out while this one's numbers are on their way from the cache. They go by way of
 * memory: without the barrier the compiler takes them out of the vector one by one, which is slower. */
#define GATHERED(PLACE, T)                                                                        \
    do {                                                                                          \
        T places[2][64] __attribute__((aligned(32)));                                             \
        PLACE(places[first & 1], &order, first, source == GATHER_BACK);                           \
        for (int64_t tile = first; tile < last; tile++) {                                         \
            PLACE(places[(tile + 1) & 1], &order, tile + 1, source == GATHER_BACK);               \
            __asm__ volatile("" : "+m"(places));                                                  \
            if (target == ROWS) ahead(tile, &own);                                                \
            vf r[8];                                                                              \
            for (int j = 0; j < 8; j++) {                                                         \
                const T *at = places[tile & 1] + 8 * j;                                           \
                r[j] = (vf){f[at[0]], f[at[1]], f[at[2]], f[at[3]], f[at[4]], f[at[5]], f[at[6]], f[at[7]]}; \
            }                                                                                     \
            first_strides(v, r, tile, &own, source);                                              \
        }                                                                                         \
    } while (0)

/* The last pass goes over base and rows in several streams, more than the hardware foresees. */
INLINE void ahead(int64_t tile, const ends *e) {
    for (int j = 0; j < 64; j += 16) {
        if (e->base) __builtin_prefetch(e->base + 64 * tile + j, 0, 2);
        __builtin_prefetch(e->to + 64 * tile + j, 1, 2);
    }
}

INLINE void first_pass(float *v, int64_t first, int64_t last, const ends *e, int source, int target) {
    const ends own = *e; /* copies: stores to v could change what e points at, for all the compiler knows */
    const float *f = own.from;
    if (source == GATHER || source == GATHER_BACK) {
        const bijection order = *own.order;
        if (order.mask <= 0xFFFF)
            GATHERED(places16, uint16_t);
        else
            GATHERED(places32, uint32_t);
        return;
    }
    if (source == TURNED && 64 * last > own.size) {
        const int64_t end = (own.size + 63) / 64;
        memset(v + 64 * end, 0, (size_t)(last - end) * 64 * sizeof(float));
        last = end;
    }
    for (int64_t tile = first; tile < last; tile++) {
        vf r[8];
        for (int j = 0; j < 8; j++) r[j] = *(const vf_any *)(f + 64 * tile + 8 * j);
        if (target == SIGN) /* a gradient comes from memory, and hardware does not look beyond a page */
            for (int j = 0; j < 64; j += 16) __builtin_prefetch(f + 64 * tile + 512 + j, 0, 3);
        first_strides(v, r, tile, &own, source);
    }
}

/* Sign bits of eight floats for each byte of signs. */
static vu flips[256];

__attribute__((constructor)) static void fill_flips(void) {
    for (uint32_t byte = 0; byte < 256; byte++)
        flips[byte] = (((vu){0} + byte) << (vu){31, 30, 29, 28, 27, 26, 25, 24}) & 0x80000000u;
}

INLINE void emit(int64_t t, vf x, const ends *e, int target) {
    if (target == SUM && t >= e->size) return;
    if (target == SIGN || target == SUM) {
        x = (vf)((vu)x ^ flips[e->after[t >> 3]]);
    }
    if (target == ROWS) {
        x *= e->scale;
        if (e->base) x += *(const vf_any *)(e->base + t);
    }
    if (target == SUM) x += *(const vf_any *)(e->to + t);
    *(vf_any *)(e->to + t) = x;
}

/* Strides h, 2h, ... of `radix` streams over n numbers of v. */
INLINE void pass(const float *v, int64_t n, int64_t h, int radix, const ends *given, int target) {
    const ends own = *given, *e = &own;
    for (int64_t s = 0; s < n; s += radix * h)
        for (int64_t t = s; t < s + h; t += 8) {
            vf r[8];
            for (int i = 0; i < radix; i++) r[i] = *(const vf_any *)(v + t + i * h);
            for (int g = 1; g < radix; g <<= 1)
                for (int i = 0; i < radix; i++)
                    if (!(i & g)) butterfly(&r[i], &r[i + g]);
            for (int i = 0; i < radix; i++) emit(t + i * h, r[i], e, target);
        }
}

/* log2 of the radix of the last pass over 2^k numbers; passes are of 8 streams, of 4 where that makes no more of them. */
INLINE int last_log(int k) {
    const int left = k - 6;
    return left <= 1 ? left : left % 3 == 0 ? 3 : 2;
}

INLINE void last_pass(const float *v, int k, const ends *e, int target) {
    const int64_t n = (int64_t)1 << k;
    switch (last_log(k)) {
    case 0:
        for (int64_t t = 0; t < n; t += 8) emit(t, *(const vf_any *)(v + t), e, target);
        break;
    case 1: pass(v, n, n / 2, 2, e, target); break;
    case 2: pass(v, n, n / 4, 4, e, target); break;
    default: pass(v, n, n / 8, 8, e, target);
    }
}

/* Strides 64 to 2^(k-1) of each run of 2^k numbers among n. */
static void passes(float *v, int64_t n, int k) {
    const ends e = {.to = v};
    const int log = last_log(k);
    if (log == 0) return;
    passes(v, n, k - log);
    const int64_t h = (int64_t)1 << (k - log);
    if (log == 1) pass(v, n, h, 2, &e, KEEP);
    if (log == 2) pass(v, n, h, 4, &e, KEEP);
    if (log == 3) pass(v, n, h, 8, &e, KEEP);
}

/* All strides of v[start : start + 2^k], in sub-blocks that fit the nearest cache. */
#define TRANSFORM(NAME, SOURCE, TARGET)                                                     \
    static void NAME##_part(float *v, int64_t start, int k, const ends *e) {                \
        const int64_t n = (int64_t)1 << k, h = n >> last_log(k);                            \
        if (SOURCE == TURNED && start >= e->size) {                                         \
            memset(v + start, 0, (size_t)n * sizeof(float));                                \
        } else if (n <= CHUNK) {                                                                   \
            first_pass(v, start / 64, (start + n) / 64, e, SOURCE, TARGET);                         \
            passes(v + start, n, k);                                                        \
        } else {                                                                            \
            const ends within = {.to = v + start};                                          \
            for (int64_t s = start; s < start + n; s += h) NAME##_part(v, s, k - last_log(k), e); \
            last_pass(v + start, k, &within, KEEP);                                         \
        }                                                                                   \
    }                                                                                       \
    /* The transform of 2^k >= 64 numbers by way of v. */                                   \
    static void NAME(float *v, int k, const ends *e) {                                      \
        const int64_t n = (int64_t)1 << k, h = n >> last_log(k);                            \
        for (int64_t s = 0; s < n; s += h) NAME##_part(v, s, k - last_log(k), e);           \
        last_pass(v, k, e, TARGET);                                                         \
    }

#endif
