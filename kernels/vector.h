// What the C kernels share: vectors as wide as this CPU's, by GCC's and Clang's vector extensions; exp; bfloat16.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define VL 16
#else
#define VL 8
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vf fill(float x) { return x - (vf){}; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// e^x to 1 unit in the last place or so: x = n ln 2 + r, then a polynomial of r (Cephes' expf). Below -87 it is 0.
INLINE vf vexp(vf x) {
  const vf high = fill(88.0f), magic = fill(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  vf y = choose(x > high, high, x);
  vf n = y * 1.44269504f + magic;
  vi exponent = ((vi)n - (vi)magic + 127) << 23;
  n -= magic;
  vf r = y - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r + 1.0f) * (vf)exponent;
  return choose(x < -87.0f, (vf){}, p);
}

INLINE float total(vf x) {
  float sum = 0;
  for (int i = 0; i < VL; i++) sum += x[i];
  return sum;
}

// Rows of float32 or bfloat16 are read as float32. `scratch` holds a row of n.
INLINE const float *read_row(const void *base, long wide, long at, long n, float *scratch) {
  if (wide) return (const float *)base + at;
  const uint16_t *from = (const uint16_t *)base + at;
  for (long i = 0; i < n; i++) ((uint32_t *)scratch)[i] = (uint32_t)from[i] << 16;
  return scratch;
}

// Where a row is to be written: in place, or in `scratch`, which `write_row` then rounds to bfloat16.
INLINE float *out_row(void *base, long wide, long at, float *scratch) { return wide ? (float *)base + at : scratch; }

INLINE void write_row(void *base, long wide, long at, long n, const float *row) {
  if (wide) return;
  uint16_t *to = (uint16_t *)base + at;
  for (long i = 0; i < n; i++) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits = ((const uint32_t *)row)[i];
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 64) : (uint16_t)rounded;
  }
}
