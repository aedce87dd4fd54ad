/* The counter-based generator of subspace_lab/linalg/random.py, and short vectors.
 *
 * All of it is plain C with the vector extensions of GCC and Clang: a machine without the wide instructions gets the
 * same numbers from narrower ones. Little-endian only, as the bytes of words are read in place. */
#ifndef SUBSPACE_LAB_WORDS_H
#define SUBSPACE_LAB_WORDS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels read bytes of little-endian words"
#endif

#define INLINE static inline __attribute__((always_inline))

/* Loops over blocks are shared among threads where the compiler knows OpenMP; results do not depend on how many. */
#ifdef _OPENMP
#define PRAGMA(text) _Pragma(#text)
#else
#define PRAGMA(text)
#endif

typedef float vf __attribute__((vector_size(32), may_alias));
typedef float vf_any __attribute__((vector_size(32), may_alias, aligned(4))); /* at any address */
typedef uint32_t vu __attribute__((vector_size(32), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), may_alias));
typedef uint8_t vb8 __attribute__((vector_size(8), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t vi __attribute__((vector_size(32)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 17;
    x *= 0xED5AD4BBu;
    x ^= x >> 11;
    x *= 0xAC4C1B51u;
    x ^= x >> 15;
    x *= 0x31848BABu;
    return x ^ (x >> 14);
}

typedef struct {
    uint32_t k0, k1;
} stream;

INLINE stream open_stream(uint64_t key) {
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    return (stream){mix(mix(low ^ 0x243F6A88u) ^ high), mix(mix(low ^ 0x85A308D3u) ^ high)};
}

INLINE uint32_t word_at(stream s, uint64_t i) {
    return mix(mix((uint32_t)i + s.k0) ^ s.k1 ^ mix((uint32_t)(i >> 32)));
}

/* `count` words from `first` on; the range must not cross a multiple of 2^32. */
INLINE void words_at(uint32_t *restrict to, stream s, uint64_t first, int64_t count) {
    const uint32_t low = (uint32_t)first + s.k0, rest = s.k1 ^ mix((uint32_t)(first >> 32));
    for (int64_t i = 0; i < count; i++) to[i] = mix(mix(low + (uint32_t)i) ^ rest);
}

/* 0 or the sign bit of a float, for entry i of a Rademacher stream. */
INLINE uint32_t sign_at(stream s, uint64_t i) { return (word_at(s, i >> 5) >> (i & 31)) << 31; }

INLINE float flip(float x, uint32_t sign) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits ^= sign;
    memcpy(&x, &bits, 4);
    return x;
}

/* Zeroed memory on a cache line of its own, or NULL; freed with free(). */
INLINE void *zeroed(size_t bytes) {
    void *memory = NULL;
    bytes = (bytes + 63) & ~(size_t)63;
    if (posix_memalign(&memory, 64, bytes)) return NULL;
    return memset(memory, 0, bytes);
}

#endif
