/* Products with a matrix of signs that is never stored: entry (i, j) is bit j % 32 of word (i 2^27 + j / 32) of a stream.
 *
 * The 32 columns of a word are taken in three groups of up to 11. For lift, the 2^11 signed sums of a group's z stand
 * in a table and a row looks its own up; for project, a row adds its g to the one of 2^11 bins that its bits name, and
 * the columns are signed sums of the bins. That is three memory accesses for 32 multiplications. */
#include "words.h"

#define BINS 2048
#define LIFT_ROWS 16384    /* worth a table, and their sums still in the second-level cache */
#define PROJECT_ROWS 65536 /* the partial sums that are added up: fixed, so that threads change nothing */

typedef struct {
    float low[BINS], middle[BINS], high[BINS / 2];
} groups;

INLINE float *group(groups *g, int i) { return i == 0 ? g->low : i == 1 ? g->middle : g->high; }

/* Column w of words for rows 32 block ... 32 block + 31. */
INLINE void words_of_rows(uint32_t to[32], const uint32_t start[32], stream s, int64_t block) {
    const uint32_t rest = s.k1 ^ mix((uint32_t)block);
    for (int r = 0; r < 32; r++) to[r] = mix(start[r] ^ rest);
}

INLINE void starts_of_words(uint32_t start[32], stream s, int64_t w) {
    for (uint32_t r = 0; r < 32; r++) start[r] = mix((r << 27) + (uint32_t)w + s.k0);
}

/* table[v] = sum over j of (-1)^(bit j of v) z[j]. */
static void fill_table(float *table, const float *z, int64_t count, int bits) {
    table[0] = 0;
    for (int64_t j = 0; j < count; j++) table[0] += z[j];
    for (int j = 0; j < bits; j++) {
        const float twice = j < count ? 2 * z[j] : 0;
        for (int64_t v = 0; v < 1 << j; v++) table[v + (1 << j)] = table[v] - twice;
    }
}

/* z[j] = sum over v of (-1)^(bit j of v) bins[v]; the bins are used up. */
static void empty_bins(float *bins, float *z, int64_t count, int bits) {
    for (int j = bits - 1; j >= 0; j--) {
        float sums[8] = {0}, total = 0;
        const int64_t half = (int64_t)1 << j;
        for (int64_t v = 0; v < half; v++) sums[v & 7] += bins[v] - bins[v + half];
        for (int64_t v = 0; v < half; v++) bins[v] += bins[v + half];
        for (int i = 0; i < 8; i++) total += sums[i];
        if (j < count) z[j] = total;
    }
}

static const int BITS[3] = {11, 11, 10};

static void lift_rows(const float *z, int64_t d, const float *base, float *to, int64_t first, int64_t last, stream s,
                      float scale, groups *tables) {
    memset(to, 0, (size_t)(last - first) * sizeof(float));
    for (int64_t w = 0; 32 * w < d; w++) {
        uint32_t start[32], words[32];
        starts_of_words(start, s, w);
        for (int i = 0, bit = 0; i < 3; bit += BITS[i++]) {
            const int64_t left = d - 32 * w - bit;
            fill_table(group(tables, i), z + 32 * w + bit, left < 0 ? 0 : left < BITS[i] ? left : BITS[i], BITS[i]);
        }
        for (int64_t block = first / 32; 32 * block < last; block++) {
            const int64_t low = 32 * block < first ? first : 32 * block;
            const int64_t high = 32 * block + 32 > last ? last : 32 * block + 32;
            words_of_rows(words, start, s, block);
            for (int64_t i = low; i < high; i++) {
                const uint32_t bits = words[i & 31];
                to[i - first] += tables->low[bits & 2047] + (tables->middle[bits >> 11 & 2047] + tables->high[bits >> 22]);
            }
        }
    }
    if (base)
        for (int64_t i = 0; i < last - first; i++) to[i] = base[i] + scale * to[i];
    else
        for (int64_t i = 0; i < last - first; i++) to[i] *= scale;
}

static void project_rows(const float *g, float *z, int64_t d, int64_t first, int64_t last, stream s, groups *bins) {
    for (int64_t w = 0; 32 * w < d; w++) {
        uint32_t start[32], words[32];
        starts_of_words(start, s, w);
        memset(bins, 0, sizeof *bins);
        for (int64_t block = first / 32; 32 * block < last; block++) {
            const int64_t low = 32 * block < first ? first : 32 * block;
            const int64_t high = 32 * block + 32 > last ? last : 32 * block + 32;
            words_of_rows(words, start, s, block);
            for (int64_t i = low; i < high; i++) {
                const uint32_t bits = words[i & 31];
                bins->low[bits & 2047] += g[i - first];
                bins->middle[bits >> 11 & 2047] += g[i - first];
                bins->high[bits >> 22] += g[i - first];
            }
        }
        for (int i = 0, bit = 0; i < 3; bit += BITS[i++]) {
            const int64_t left = d - 32 * w - bit;
            if (left > 0) empty_bins(group(bins, i), z + 32 * w + bit, left < BITS[i] ? left : BITS[i], BITS[i]);
        }
    }
}

/* to[start:stop] = base + scale P z for rows start ... stop - 1; not in place. Returns 0, or 1 if memory ran out. */
int sign_lift_f32(const float *z, int64_t d, const float *base, float *to, int64_t start, int64_t stop, uint64_t key,
                  float scale, int threads) {
    const stream s = open_stream(key);
    int failed = 0;
    (void)threads; /* unused without OpenMP */
    PRAGMA(omp parallel num_threads(threads) if(threads > 1)) {
        groups *tables = zeroed(sizeof(groups));
        PRAGMA(omp for schedule(static))
        for (int64_t row = start; row < stop; row += LIFT_ROWS) {
            const int64_t end = row + LIFT_ROWS < stop ? row + LIFT_ROWS : stop;
            if (tables) lift_rows(z, d, base ? base + (row - start) : NULL, to + (row - start), row, end, s, scale, tables);
        }
        if (!tables) {
            PRAGMA(omp atomic write)
            failed = 1;
        }
        free(tables);
    }
    return failed;
}

/* z = scale P[rows]' g. Partial sums are those of fixed pieces of the rows, added in ascending order. */
int sign_project_f32(const float *g, float *z, int64_t d, int64_t start, int64_t stop, uint64_t key, float scale,
                     int threads) {
    const stream s = open_stream(key);
    const int64_t pieces = (stop - start + PROJECT_ROWS - 1) / PROJECT_ROWS;
    float *partial = zeroed((size_t)(threads * d) * sizeof(float));
    int failed = !partial;
    if (failed) return 1;
    memset(z, 0, (size_t)d * sizeof(float));
    for (int64_t from = 0; from < pieces; from += threads) {
        const int64_t until = from + threads < pieces ? from + threads : pieces;
        PRAGMA(omp parallel for schedule(static) num_threads(threads) if(threads > 1))
        for (int64_t piece = from; piece < until; piece++) {
            const int64_t row = start + piece * PROJECT_ROWS;
            const int64_t end = row + PROJECT_ROWS < stop ? row + PROJECT_ROWS : stop;
            groups *bins = zeroed(sizeof(groups));
            if (bins) project_rows(g + (row - start), partial + (piece - from) * d, d, row, end, s, bins);
            if (!bins) {
                PRAGMA(omp atomic write)
                failed = 1;
            }
            free(bins);
        }
        for (int64_t piece = 0; piece < until - from; piece++)
            for (int64_t j = 0; j < d; j++) z[j] += partial[piece * d + j];
    }
    for (int64_t j = 0; j < d; j++) z[j] *= scale;
    free(partial);
    return failed;
}
