// The softmax of a chunk's logits, its loss and its gradient, a row at a time: a row stays in the cache from its
// maximum to its gradient, so the logits are read from memory once and written once.
#include "vector.h"

#define STEP 1024  // numbers whose sum is made before it is added: one chain over a vocabulary would round more

// logits (rows, n), float32 or (wide = 0) bfloat16 -> lse (rows), nll (rows); with `gradient` the logits become
// d loss / d logits = weight * ((1 + 2 z lse) * p - onehot)
EXPORT int softmax_rows(void *logits, const int64_t *targets, const float *weights, float *lse, float *nll, long rows,
                        long n, long wide, float z_loss, long gradient, long threads) {
  int failed = 0;
#pragma omp parallel num_threads(threads) if (rows * n > 16384)
  {
    float *scratch = aligned_alloc(64, (n * sizeof(float) + 63) & ~63L);
    if (!scratch) failed = 1;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
      if (!scratch) continue;
      const float *row = read_row(logits, wide, r * n, n, scratch);
      float *out = gradient ? out_row(logits, wide, r * n, scratch) : scratch;
      float top = row[0], sum = 0, at_target = row[targets[r]];
      vf tops = fill(top);
      long i = 0;
      for (; i + VL <= n; i += VL) tops = choose(load(row + i) > tops, load(row + i), tops);
      for (int k = 0; k < VL; k++) top = tops[k] > top ? tops[k] : top;
      for (; i < n; i++) top = row[i] > top ? row[i] : top;
      for (long from = 0; from < n; from += STEP) {
        long to = n - from < STEP ? n : from + STEP;
        vf sums = {};
        for (i = from; i + VL <= to; i += VL) {
          vf e = vexp(load(row + i) - top);
          store(out + i, e);
          sums += e;
        }
        float part = total(sums);
        for (; i < to; i++) part += out[i] = vexp(fill(row[i] - top))[0];
        sum += part;
      }
      lse[r] = top + logf(sum);
      nll[r] = lse[r] - at_target;
      if (gradient) {
        float factor = weights[r] * (1.0f + 2.0f * z_loss * lse[r]) / sum;
        for (i = 0; i < n; i++) out[i] *= factor;
        out[targets[r]] -= weights[r];
        write_row(logits, wide, r * n, n, out);
      }
    }
    free(scratch);
  }
  return failed;
}
