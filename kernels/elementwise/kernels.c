// Norms, rotary positions and the gate on a CPU: each tensor is read once and written once. Rows are float32 or, where
// its `wide` is 0, bfloat16; arithmetic is float32. Threads take whole rows; gradients of weights are added up by slabs
// of rows whose number follows from the shape, and then in order: the sum does not depend on who computed it.
#include "vector.h"

#define STEP 1024  // numbers of a row at a time, where none needs the others

INLINE float dot(const float *a, const float *b, long n) {
  vf sums[2] = {};
  long i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL)
    for (int c = 0; c < 2; c++) sums[c] += load(a + i + c * VL) * load(b + i + c * VL);
  float sum = total(sums[0] + sums[1]);
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static float *room(long floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) & ~63L); }

static void add_slabs(const float *slabs, long n, long dim, float *out) {
  memset(out, 0, dim * sizeof(float));
  for (long s = 0; s < n; s++)
    for (long i = 0; i < dim; i++) out[i] += slabs[s * dim + i];
}

// x, residual or NULL (rows, dim) -> sum = x + residual, normed = sum * rstd * weight, rstd (rows). Without a residual
// there is no sum to write.
EXPORT int rms_norm_forward(const void *x, const void *residual, const float *weight, void *sum, void *normed,
                            float *rstd, long rows, long dim, float eps, long x_wide, long residual_wide, long sum_wide,
                            long normed_wide, long threads) {
  int failed = 0;
#pragma omp parallel num_threads(threads) if (rows * dim > 16384)
  {
    float *scratch = room(4 * dim);
    if (!scratch) failed = 1;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
      if (!scratch) continue;
      const float *row = read_row(x, x_wide, r * dim, dim, scratch);
      if (residual) {
        const float *other = read_row(residual, residual_wide, r * dim, dim, scratch + dim);
        float *to = out_row(sum, sum_wide, r * dim, scratch + 2 * dim);
        for (long i = 0; i < dim; i++) to[i] = row[i] + other[i];
        write_row(sum, sum_wide, r * dim, dim, to);
        row = read_row(sum, sum_wide, r * dim, dim, scratch + 2 * dim);  // as it was rounded
      }
      float *out = out_row(normed, normed_wide, r * dim, scratch + 3 * dim);
      float factor = 1.0f / sqrtf(dot(row, row, dim) / dim + eps);
      for (long i = 0; i < dim; i++) out[i] = row[i] * factor * weight[i];
      write_row(normed, normed_wide, r * dim, dim, out);
      if (rstd) rstd[r] = factor;
    }
    free(scratch);
  }
  return failed;
}

// grad of normed and, or NULL, of the sum (rows, dim) -> d_sum (rows, dim), d_weight (dim)
EXPORT int rms_norm_backward(const void *grad, const void *grad_sum, const void *x, const float *weight,
                             const float *rstd, void *d_x, float *d_weight, long rows, long dim, long slabs,
                             long grad_wide, long x_wide, long threads) {
  float *sums = room(slabs * dim);
  if (!sums) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (rows * dim > 16384)
  {
    float *scratch = room(4 * dim);
    if (!scratch) failed = 1;
#pragma omp for schedule(static)
    for (long s = 0; s < slabs; s++) {
      float *d_w = sums + s * dim;
      memset(d_w, 0, dim * sizeof(float));
      for (long r = rows * s / slabs; r < rows * (s + 1) / slabs && scratch; r++) {
        const float *g = read_row(grad, grad_wide, r * dim, dim, scratch);
        const float *row = read_row(x, x_wide, r * dim, dim, scratch + dim);
        float *out = out_row(d_x, x_wide, r * dim, scratch + 2 * dim), *scaled = scratch + 3 * dim;
        for (long i = 0; i < dim; i++) scaled[i] = g[i] * weight[i];
        float factor = rstd[r], mean = dot(scaled, row, dim) * factor * factor / dim;
        for (long i = 0; i < dim; i++) {
          d_w[i] += g[i] * (row[i] * factor);
          scaled[i] = factor * (scaled[i] - row[i] * mean);
        }
        if (grad_sum) {
          const float *more = read_row(grad_sum, x_wide, r * dim, dim, scratch);
          for (long i = 0; i < dim; i++) scaled[i] += more[i];
        }
        memcpy(out, scaled, dim * sizeof(float));
        write_row(d_x, x_wide, r * dim, dim, out);
      }
    }
    free(scratch);
  }
  if (!failed) add_slabs(sums, slabs, dim, d_weight);
  free(sums);
  return failed;
}

// x (tokens, heads, dim), a token `stride` numbers from the next -> out, dense: each head normed, then turned by its
// token's angles; cos and sin (tokens, dim / 2); rstd (tokens, heads)
EXPORT int qk_norm_rope_forward(const void *x, long stride, const float *weight, const float *cosine,
                                const float *sine, void *out, float *rstd, long tokens, long heads, long dim,
                                float eps, long wide, long threads) {
  int failed = 0;
  long half = dim / 2;
#pragma omp parallel num_threads(threads) if (tokens * heads * dim > 16384)
  {
    float *scratch = room(3 * dim);
    if (!scratch) failed = 1;
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++)
      for (long h = 0; h < heads && scratch; h++) {
        const float *row = read_row(x, wide, t * stride + h * dim, dim, scratch);
        const float *c = cosine + t * half, *s = sine + t * half;
        float *to = out_row(out, wide, (t * heads + h) * dim, scratch + dim), *normed = scratch + 2 * dim;
        float factor = 1.0f / sqrtf(dot(row, row, dim) / dim + eps);
        for (long i = 0; i < dim; i++) normed[i] = row[i] * factor * weight[i];
        for (long i = 0; i < half; i++) {
          float a = normed[i], b = normed[half + i];
          to[i] = a * c[i] - b * s[i];
          to[half + i] = b * c[i] + a * s[i];
        }
        write_row(out, wide, (t * heads + h) * dim, dim, to);
        if (rstd) rstd[t * heads + h] = factor;
      }
    free(scratch);
  }
  return failed;
}

// grad dense (tokens, heads, dim) -> d_x dense, d_weight (dim)
EXPORT int qk_norm_rope_backward(const void *grad, const void *x, long stride, const float *weight,
                                 const float *cosine, const float *sine, const float *rstd, void *d_x,
                                 float *d_weight, long tokens, long heads, long dim, long slabs, long wide,
                                 long threads) {
  long half = dim / 2;
  float *sums = room(slabs * dim);
  if (!sums) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (tokens * heads * dim > 16384)
  {
    float *scratch = room(4 * dim);
    if (!scratch) failed = 1;
#pragma omp for schedule(static)
    for (long slab = 0; slab < slabs; slab++) {
      float *d_w = sums + slab * dim;
      memset(d_w, 0, dim * sizeof(float));
      for (long t = tokens * slab / slabs; t < tokens * (slab + 1) / slabs; t++)
        for (long h = 0; h < heads && scratch; h++) {
          const float *g = read_row(grad, wide, (t * heads + h) * dim, dim, scratch);
          const float *row = read_row(x, wide, t * stride + h * dim, dim, scratch + dim);
          const float *c = cosine + t * half, *s = sine + t * half;
          float *back = scratch + 2 * dim, *to = out_row(d_x, wide, (t * heads + h) * dim, scratch + 3 * dim);
          for (long i = 0; i < half; i++) {
            float a = g[i], b = g[half + i];
            back[i] = a * c[i] + b * s[i];
            back[half + i] = b * c[i] - a * s[i];
          }
          float factor = rstd[t * heads + h];
          for (long i = 0; i < dim; i++) {
            d_w[i] += back[i] * (row[i] * factor);
            back[i] *= weight[i];
          }
          float mean = dot(back, row, dim) * factor * factor / dim;
          for (long i = 0; i < dim; i++) to[i] = factor * (back[i] - row[i] * mean);
          write_row(d_x, wide, (t * heads + h) * dim, dim, to);
        }
    }
    free(scratch);
  }
  if (!failed) add_slabs(sums, slabs, dim, d_weight);
  free(sums);
  return failed;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

INLINE void gate_step(const float *gate, const float *up, float *out, long n) {
  long i = 0;
  for (; i + VL <= n; i += VL) store(out + i, load(gate + i) * sigmoid(load(gate + i)) * load(up + i));
  for (; i < n; i++) out[i] = gate[i] * sigmoid(fill(gate[i]))[0] * up[i];
}

INLINE void gate_step_back(const float *grad, const float *gate, const float *up, float *d_gate, float *d_up, long n) {
  for (long i = 0; i < n; i += VL) {
    float tail[3][VL];  // the last numbers are fewer than a vector
    const float *from[3] = {grad + i, gate + i, up + i};
    long m = n - i < VL ? n - i : VL;
    for (int k = 0; k < 3 && m < VL; k++) {
      memset(tail[k], 0, sizeof tail[k]);
      from[k] = memcpy(tail[k], from[k], m * 4);
    }
    vf g = load(from[0]), x = load(from[1]), s = sigmoid(x), to_gate = g * load(from[2]) * s * (1.0f + x * (1.0f - s));
    vf to_up = g * x * s;
    if (m == VL) store(d_gate + i, to_gate), store(d_up + i, to_up);
    else memcpy(d_gate + i, &to_gate, m * 4), memcpy(d_up + i, &to_up, m * 4);
  }
}

// n numbers each: silu(gate) * up
EXPORT int swiglu_forward(const void *gate, const void *up, void *out, long n, long wide, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
  for (long i = 0; i < n; i += STEP) {
    float scratch[3][STEP];
    long m = n - i < STEP ? n - i : STEP;
    float *to = out_row(out, wide, i, scratch[2]);
    gate_step(read_row(gate, wide, i, m, scratch[0]), read_row(up, wide, i, m, scratch[1]), to, m);
    write_row(out, wide, i, m, to);
  }
  return 0;
}

EXPORT int swiglu_backward(const void *grad, const void *gate, const void *up, void *d_gate, void *d_up, long n,
                           long wide, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 16384)
  for (long i = 0; i < n; i += STEP) {
    float scratch[5][STEP];
    long m = n - i < STEP ? n - i : STEP;
    float *d_g = out_row(d_gate, wide, i, scratch[3]), *d_u = out_row(d_up, wide, i, scratch[4]);
    gate_step_back(read_row(grad, wide, i, m, scratch[0]), read_row(gate, wide, i, m, scratch[1]),
                   read_row(up, wide, i, m, scratch[2]), d_g, d_u, m);
    write_row(d_gate, wide, i, m, d_g), write_row(d_up, wide, i, m, d_u);
  }
  return 0;
}
