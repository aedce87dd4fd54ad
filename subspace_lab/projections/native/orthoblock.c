/* Blocks of H S Pi H B (the definition is in subspace_lab/projections/native/__init__.py): lift, project, and H alone.
 *
 * Work is cut in units of max(n, 64) rows. A unit regenerates its signs and its permutation; nothing is stored. */
#include "transform.h"

TRANSFORM(plain_to_self, PLAIN, KEEP)
TRANSFORM(plain_to_signed, PLAIN, SIGN)
TRANSFORM(turned_to_self, TURNED, KEEP)
TRANSFORM(gather_to_self, GATHER, KEEP)
TRANSFORM(gather_to_rows, GATHER, ROWS)
TRANSFORM(back_to_signed, GATHER_BACK, SIGN)
TRANSFORM(back_to_sum, GATHER_BACK, SUM)

typedef struct {
    int k;            /* log2 n */
    int64_t n, unit;  /* unit = max(n, 64) */
    stream B, S, Pi;
    float scale;
} plan;

INLINE plan make_plan(int k, const uint64_t keys[3], float scale) {
    const int64_t n = (int64_t)1 << k;
    return (plan){k, n, n < 64 ? 64 : n, open_stream(keys[0]), open_stream(keys[1]), open_stream(keys[2]), scale};
}

static bijection permutation(const plan *p, int64_t block, int inverse) {
    bijection f = {.mask = (uint32_t)(p->n - 1), .shift = (p->k + 1) / 2};
    for (int r = 0; r < 3; r++) {
        const uint32_t odd = word_at(p->Pi, 8 * (uint64_t)block + 2 * r) | 1;
        const uint32_t plus = word_at(p->Pi, 8 * (uint64_t)block + 2 * r + 1);
        uint32_t times = odd;
        for (int i = 0; i < 4; i++) times *= 2 - odd * times; /* Newton: right bits 3, 6, 12, 24, 48 */
        f.times[inverse ? 2 - r : r] = inverse ? times : odd;
        f.plus[inverse ? 2 - r : r] = inverse ? -plus * times : plus;
    }
    return f;
}

typedef struct {
    float *u, *v;
    uint32_t *signs_B, *signs_S;
} scratch;

static int allocate(scratch *s, const plan *p) {
    const size_t numbers = (size_t)p->unit * sizeof(float), signs = (size_t)p->unit / 8;
    char *all = zeroed(2 * numbers + 128 + 2 * signs + sizeof(vu));
    if (!all) return 0;
    /* Two cache lines between u and v: they should not compete for the same places of the cache. */
    *s = (scratch){(float *)all, (float *)(all + numbers + 128), NULL, NULL};
    s->signs_B = (uint32_t *)(s->v + p->unit);
    s->signs_S = s->signs_B + p->unit / 32;
    return 1;
}

static void fill_signs(const scratch *s, const plan *p, int64_t unit) {
    const int64_t words = p->unit / 32;
    words_at(s->signs_B, p->B, (uint64_t)(unit * words), words);
    words_at(s->signs_S, p->S, (uint64_t)(unit * words), words);
}

INLINE uint32_t bit(const uint32_t *words, int64_t t) { return (words[t >> 5] >> (t & 31)) << 31; }

static void small_H(float *v, int64_t n) {
    for (int64_t h = 1; h < n; h *= 2)
        for (int64_t s = 0; s < n; s += 2 * h)
            for (int64_t t = s; t < s + h; t++) {
                const float a = v[t], b = v[t + h];
                v[t] = a + b;
                v[t + h] = a - b;
            }
}

INLINE uint32_t apply(const bijection *f, uint32_t x) {
    for (int r = 0; r < 3 && f->mask; r++) {
        x = (x * f->times[r] + f->plus[r]) & f->mask;
        x ^= x >> f->shift;
    }
    return x;
}

/* A unit of several blocks of n < 64: x in s->u, result in s->v. */
static void small_lift(const scratch *s, const plan *p, int64_t unit, const float *x) {
    for (int64_t at = 0; at < p->unit; at += p->n) {
        float *u = s->u + at, *v = s->v + at;
        const bijection f = permutation(p, (unit * p->unit + at) / p->n, 0);
        for (int64_t t = 0; t < p->n; t++) u[t] = flip(x[t], bit(s->signs_B, at + t));
        small_H(u, p->n);
        for (int64_t t = 0; t < p->n; t++) v[t] = flip(u[apply(&f, (uint32_t)t)], bit(s->signs_S, at + t));
        small_H(v, p->n);
    }
}

static void small_project(const scratch *s, const plan *p, int64_t unit, const float *g, float *result) {
    for (int64_t at = 0; at < p->unit; at += p->n) {
        float *u = s->u + at, *w = result + at;
        const bijection f = permutation(p, (unit * p->unit + at) / p->n, 0);
        for (int64_t t = 0; t < p->n; t++) u[t] = g[at + t];
        small_H(u, p->n);
        for (int64_t t = 0; t < p->n; t++) w[apply(&f, (uint32_t)t)] = flip(u[t], bit(s->signs_S, at + t));
        small_H(w, p->n);
        for (int64_t t = 0; t < p->n; t++) w[t] = flip(w[t], bit(s->signs_B, at + t));
    }
}

/* base and to point at the unit's first row; only the unit's rows low ... high - 1 are wanted. */
static void lift_unit(const scratch *s, const plan *p, int64_t unit, const float *x, int64_t filled, const float *base,
                      float *to, int64_t low, int64_t high) {
    fill_signs(s, p, unit);
    if (p->n < 64) {
        small_lift(s, p, unit, x);
    } else {
        const bijection f = permutation(p, unit, 0);
        const ends first = {.from = x, .before = (uint8_t *)s->signs_B, .to = s->u, .size = filled};
        turned_to_self(s->u, p->k, &first);
        ends second = {.from = s->u, .before = (uint8_t *)s->signs_S, .order = &f, .base = base, .scale = p->scale};
        if (low == 0 && high == p->n) {
            second.to = to;
            gather_to_rows(base == to ? s->v : to, p->k, &second);
            return;
        }
        second.to = s->v;
        gather_to_self(s->v, p->k, &second);
    }
    for (int64_t t = low; t < high; t++) {
        const float y = p->scale * s->v[t];
        to[t] = base ? base[t] + y : y;
    }
}

/* to[start:stop] = base + scale P z for rows start ... stop - 1, `to` and `base` being those rows alone. Returns 0, or 1
 * if memory ran out. */
int lift_f32(const float *z, int64_t d, const float *base, float *to, int64_t start, int64_t stop, int k,
             const uint64_t keys[3], float scale, int threads) {
    const plan p = make_plan(k, keys, scale);
    const int64_t first = start / p.unit, last = (stop + p.unit - 1) / p.unit;
    float *x = zeroed((size_t)p.n * sizeof(float));
    int failed = !x;
    if (failed) return 1;
    for (int64_t t = 0; t < d; t++) x[p.n < 64 ? t : (t & ~63) | (t & 7) << 3 | (t >> 3 & 7)] = z[t];
    /* Zeros beyond d may be skipped unless they meet another zero: -0 + 0 is not -0. */
    int64_t filled = d;
    for (int64_t t = 0; t < d; t++)
        if (z[t] == 0) filled = p.n;
    PRAGMA(omp parallel num_threads(threads) if(threads > 1)) {
        scratch s = {0};
        const int enough = allocate(&s, &p);
        PRAGMA(omp for schedule(static))
        for (int64_t unit = first; unit < last; unit++) {
            const int64_t row = unit * p.unit, low = row < start ? start - row : 0;
            const int64_t high = row + p.unit > stop ? stop - row : p.unit;
            if (enough) lift_unit(&s, &p, unit, x, filled, base ? base + (row - start) : NULL, to + (row - start), low, high);
        }
        if (!enough) {
            PRAGMA(omp atomic write)
            failed = 1;
        }
        free(s.u);
    }
    free(x);
    return failed;
}

/* sum[from:until] += the blocks in `results`, one after another. */
static void add_blocks(float *sum, const float *results, int64_t numbers, int64_t n, int64_t from, int64_t until) {
    for (const float *w = results; w < results + numbers; w += n)
        for (int64_t t = from; t < until; t++) sum[t] += w[t];
}

/* What every unit of a call to project_f32 needs. */
typedef struct {
    plan p;
    const float *g;
    int64_t d, start, stop;
} gradient;

/* B H Pi' S H of the unit's rows: written to `result`, or (one of the two is NULL) its first d numbers added to `sum`. */
static void project_unit(const scratch *s, const gradient *a, int64_t unit, float *result, float *sum) {
    const plan *p = &a->p;
    const int64_t row = unit * p->unit, low = row < a->start ? a->start - row : 0;
    const int64_t high = row + p->unit > a->stop ? a->stop - row : p->unit;
    const float *g = a->g + (row - a->start);
    fill_signs(s, p, unit);
    if (low != 0 || high != p->unit) { /* rows that are not there count as zeros */
        memset(s->v, 0, (size_t)p->unit * sizeof(float));
        memcpy(s->v + low, g + low, (size_t)(high - low) * sizeof(float));
        g = s->v;
    }
    if (p->n < 64) {
        small_project(s, p, unit, g, sum ? s->v : result);
        if (sum) add_blocks(sum, s->v, p->unit, p->n, 0, a->d);
        return;
    }
    const bijection f = permutation(p, unit, 1);
    const ends first = {.from = g, .after = (uint8_t *)s->signs_S, .to = s->u};
    plain_to_signed(s->u, p->k, &first);
    const ends second = {
        .from = s->u, .order = &f, .after = (uint8_t *)s->signs_B, .to = sum ? sum : result, .size = a->d};
    if (sum)
        back_to_sum(s->v, p->k, &second);
    else
        back_to_signed(result, p->k, &second);
}

/* Several threads: batches of units at once, then their results one after another, each thread some of the columns. */
static int project_batches(const gradient *a, int64_t first, int64_t last, float *sum, int threads) {
    const int64_t unit = a->p.unit, most = threads * (unit < 65536 ? 65536 / unit : 1);
    const int64_t batch = most < last - first ? most : last - first;
    float *results = zeroed((size_t)(batch * unit) * sizeof(float));
    int failed = !results;
    PRAGMA(omp parallel num_threads(threads)) {
        scratch s = {0};
        const int enough = results && allocate(&s, &a->p);
        for (int64_t from = first; from < last; from += batch) {
            const int64_t until = from + batch < last ? from + batch : last;
            PRAGMA(omp for schedule(static))
            for (int64_t i = from; i < until; i++)
                if (enough) project_unit(&s, a, i, results + (i - from) * unit, NULL);
            PRAGMA(omp for schedule(static))
            for (int64_t t = 0; t < a->d; t += 1024)
                if (enough) add_blocks(sum, results, (until - from) * unit, a->p.n, t, t + 1024 < a->d ? t + 1024 : a->d);
        }
        if (!enough) {
            PRAGMA(omp atomic write)
            failed = 1;
        }
        free(s.u);
    }
    free(results);
    return failed;
}

/* z = scale P[rows]' g. Blocks are added in ascending order whatever the number of threads. */
int project_f32(const float *g, float *z, int64_t d, int64_t start, int64_t stop, int k, const uint64_t keys[3],
                float scale, int threads) {
    const gradient a = {make_plan(k, keys, scale), g, d, start, stop};
    const int64_t unit = a.p.unit, first = start / unit, last = (stop + unit - 1) / unit;
    scratch s = {0};
    float *sum = zeroed((size_t)unit * sizeof(float));
    int failed = !sum;
    if (threads > 1) {
        failed = failed || project_batches(&a, first, last, sum, threads);
    } else { /* apart: OpenMP's barriers cost, even for one */
        failed = failed || !allocate(&s, &a.p);
        for (int64_t i = first; i < last && !failed; i++) project_unit(&s, &a, i, NULL, sum);
    }
    for (int64_t t = 0; t < d && !failed; t++) z[t] = scale * sum[t];
    free(s.u);
    free(sum);
    return failed;
}

/* Each of `rows` runs of 2^k numbers is replaced by its transform. */
int transform_f32(float *x, int64_t rows, int k, int threads) {
    const int64_t n = (int64_t)1 << k;
    PRAGMA(omp parallel for schedule(static) num_threads(threads) if(threads > 1))
    for (int64_t row = 0; row < rows; row++) {
        float *v = x + row * n;
        const ends e = {.from = v, .to = v};
        if (k < 6)
            small_H(v, n);
        else
            plain_to_self(v, k, &e);
    }
    return 0;
}
