// Attention on a CPU: the algorithm of the Triton kernels (online softmax, intervals of visible keys, probabilities
// computed again in the backward pass), a vector lane for each query. A block is up to NQ queries, held transposed:
// scores are S^T (keys, queries), so that maxima and sums go from key to key, an interval is two comparisons of
// lanes, and each product multiplies a number of one row by a vector of queries.
//
// q, k, v are float32 with strides (b, h, s) in numbers, their last dimension dense. spans (B, 2 * intervals, S) as
// IntervalMask.intervals gives them.
#include "vector.h"
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define NV 2  // vectors of queries in a block
#define NQ (NV * VL)
#define ROWS 4   // of keys or numbers that share a vector's load; 4 x 2 sums fit AVX2's 16 registers
#define DEPTH 64  // numbers of a head that are added up in one chain: a longer one would round more
#define CHUNK 64  // keys at a time, half as many of a wide head: rows and probabilities stay in the first cache

typedef struct {
  long batch, heads, groups, queries, keys, dim, intervals;
  float scale;
  const int32_t *spans;
} Shape;

typedef struct {
  const float *data;
  long b, h, s;
} Strided;

typedef struct {
  int32_t row, start, count;
} Block;

typedef struct {  // what a block's queries see of one interval
  vi first[NV], last[NV];
  long low, high, full_low, full_high;  // keys low .. high - 1 by some, full_low .. full_high - 1 by all
} Seen;

INLINE const float *row_of(Strided x, long b, long h, long s) { return x.data + b * x.b + h * x.h + s * x.s; }

INLINE int32_t span(const Shape *z, long b, long kind, long i) {
  return z->spans[(b * 2 * z->intervals + kind) * z->queries + i];
}

// Blocks of queries that see something, in order; none goes over the beginning of a document, where no key is shared
// with the query before. Returns how many. blocks: room for B * S.
static long blocks_of(const Shape *z, Block *blocks) {
  long n = 0;
  for (long b = 0; b < z->batch; b++) {
    Block *open = NULL;
    for (long i = 0; i < z->queries; i++) {
      int seen = 0, shares = 0;
      for (long c = 0; c < z->intervals; c++) {
        int32_t first = span(z, b, 2 * c, i), last = span(z, b, 2 * c + 1, i);
        seen |= first <= last;
        shares |= i && first <= last && first <= span(z, b, 2 * c + 1, i - 1);
      }
      if (!seen) {
        open = NULL;
      } else if (open && open->count < NQ && shares) {
        open->count++;
      } else {
        open = &blocks[n++];
        *open = (Block){b, i, 1};
      }
    }
  }
  return n;
}

INLINE Seen seen_by(const Shape *z, Block block, long c) {
  Seen s = {.low = z->keys, .high = 0, .full_low = 0, .full_high = z->keys};
  int32_t ends[2][NQ] __attribute__((aligned(64)));
  for (long i = 0; i < NQ; i++) {  // lanes without a query repeat the last one
    long at = block.start + (i < block.count ? i : block.count - 1);
    long first = span(z, block.row, 2 * c, at), last = span(z, block.row, 2 * c + 1, at);
    ends[0][i] = first, ends[1][i] = last;
    if (first < s.low) s.low = first;
    if (last + 1 > s.high) s.high = last + 1;
    if (first > s.full_low) s.full_low = first;
    if (last + 1 < s.full_high) s.full_high = last + 1;
  }
  memcpy(s.first, ends[0], sizeof s.first), memcpy(s.last, ends[1], sizeof s.last);
  return s;
}

// 4 x 4 numbers of rows `from_stride` apart -> rows `to_stride` apart, transposed
INLINE void transpose_tile(const float *from, long from_stride, float *to, long to_stride) {
#ifdef __SSE__
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride), c = _mm_loadu_ps(from + 2 * from_stride),
         d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c), _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (long i = 0; i < 4; i++)
    for (long d = 0; d < 4; d++) to[d * to_stride + i] = from[i * from_stride + d];
#endif
}

// (rows, columns) -> (columns, rows)
INLINE void transpose(const float *from, long from_stride, long rows, long columns, float *to, long to_stride) {
  for (long i = 0; i < rows; i += 4)
    for (long j = 0; j < columns; j += 4)
      if (i + 4 <= rows && j + 4 <= columns)
        transpose_tile(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
      else
        for (long k = i; k < rows && k < i + 4; k++)
          for (long m = j; m < columns && m < j + 4; m++) to[m * to_stride + k] = from[k * from_stride + m];
}

// (count, D) rows -> to (D, NQ), times scale; lanes without a query are 0
INLINE void to_lanes(const float *from, long stride, long count, long dim, float scale, vf *to) {
  if (count < NQ) memset(to, 0, dim * NV * sizeof(vf));
  transpose(from, stride, count, dim, (float *)to, NQ);
  if (scale != 1.0f)
    for (long d = 0; d < dim * NV; d++) to[d] *= scale;
}

// (D, NQ) times a number for each lane -> (count, D) rows
INLINE void from_lanes(vf *from, const vf *scale, long count, long dim, float *to, long stride) {
  for (long d = 0; d < dim; d++)
    for (long c = 0; c < NV; c++) from[d * NV + c] *= scale[c];
  transpose((float *)from, NQ, dim, count, to, stride);
}

// out (n, NQ) = rows (n, D) @ lanes (D, NQ)
INLINE void rows_by_lanes(const float *rows, long stride, const vf *lanes, long dim, vf *out, const long n) {
  for (long from = 0; from < dim; from += DEPTH) {
    vf sum[ROWS][NV] = {};
    for (long d = from; d < dim && d < from + DEPTH; d++)
      for (long r = 0; r < n; r++)
        for (long c = 0; c < NV; c++) sum[r][c] += lanes[d * NV + c] * rows[r * stride + d];
    for (long r = 0; r < n; r++)
      for (long c = 0; c < NV; c++) out[r * NV + c] = from ? out[r * NV + c] + sum[r][c] : sum[r][c];
  }
}

INLINE void products(const float *rows, long stride, long n, const vf *lanes, long dim, vf *out) {
  long j = 0;
  for (; j + ROWS <= n; j += ROWS) rows_by_lanes(rows + j * stride, stride, lanes, dim, out + j * NV, ROWS);
  if (n & 2) rows_by_lanes(rows + j * stride, stride, lanes, dim, out + j * NV, 2), j += 2;
  if (n & 1) rows_by_lanes(rows + j * stride, stride, lanes, dim, out + j * NV, 1);
}

// out (D, NQ) += rows (n, D)^T @ weights (n, NQ); D a multiple of ROWS
INLINE void add_to_lanes(const float *rows, long stride, long n, const vf *weights, long dim, vf *out) {
  for (long d = 0; d < dim; d += ROWS) {
    vf sum[ROWS][NV] = {};
    for (long j = 0; j < n; j++)
      for (long r = 0; r < ROWS; r++)
        for (long c = 0; c < NV; c++) sum[r][c] += weights[j * NV + c] * rows[j * stride + d + r];
    for (long r = 0; r < ROWS; r++)
      for (long c = 0; c < NV; c++) out[(d + r) * NV + c] += sum[r][c];
  }
}

// out (n, W) += weights (n, NQ) @ rows (NQ, W): W = width vectors of the D numbers of a row
INLINE void add_tile(const float *weights, const float *rows, long dim, float *out, long stride, const long n,
                     const long width) {
  vf sum[ROWS][2] = {};
  for (long i = 0; i < NQ; i++)
    for (long c = 0; c < width; c++) {
      vf row = load(rows + i * dim + c * VL);
      for (long r = 0; r < n; r++) sum[r][c] += row * weights[r * NQ + i];
    }
  for (long r = 0; r < n; r++)
    for (long c = 0; c < width; c++) store(out + r * stride + c * VL, load(out + r * stride + c * VL) + sum[r][c]);
}

INLINE void add_rows(const float *weights, long n, const float *rows, long dim, float *out, long stride,
                     const long width) {
  long j = 0;
  for (; j + ROWS <= n; j += ROWS) add_tile(weights + j * NQ, rows, dim, out + j * stride, stride, ROWS, width);
  if (n & 2) add_tile(weights + j * NQ, rows, dim, out + j * stride, stride, 2, width), j += 2;
  if (n & 1) add_tile(weights + j * NQ, rows, dim, out + j * stride, stride, 1, width);
}

INLINE void add_to_rows(const float *weights, long n, const float *rows, long dim, float *out, long stride) {
  long d = 0;
  for (; d + 2 * VL <= dim; d += 2 * VL) add_rows(weights, n, rows + d, dim, out + d, stride, 2);
  if (d < dim) add_rows(weights, n, rows + d, dim, out + d, stride, 1);
}

// value where a lane's query does not see its key
INLINE void hide(const Seen *seen, long key, long n, vf *x, vf value) {
  if (key >= seen->full_low && key + n <= seen->full_high) return;
  for (long j = 0; j < n; j++)
    for (long c = 0; c < NV; c++) {
      vi visible = (seen->first[c] <= (int32_t)(key + j)) & (seen->last[c] >= (int32_t)(key + j));
      x[j * NV + c] = choose(visible, x[j * NV + c], value);
    }
}

static void forward_block(const Shape *z, Block block, long h, Strided q, Strided k, Strided v, float *out,
                          float *stats, vf *scratch) {
  long dim = z->dim, b = block.row, kv = h / z->groups, chunk = dim > 64 ? CHUNK / 2 : CHUNK;
  vf *qt = scratch, *ot = qt + dim * NV, *s = ot + dim * NV;
  vf top[NV], sum[NV] = {};
  to_lanes(row_of(q, b, h, block.start), q.s, block.count, dim, z->scale, qt);
  memset(ot, 0, dim * NV * sizeof(vf));
  for (long c = 0; c < NV; c++) top[c] = fill(-1e30f);  // finite: an infinity is never subtracted from itself
  for (long part = 0; part < z->intervals; part++) {
    Seen seen = seen_by(z, block, part);
    for (long key = seen.low; key < seen.high; key += chunk) {
      long n = seen.high - key < chunk ? seen.high - key : chunk;
      products(row_of(k, b, kv, key), k.s, n, qt, dim, s);
      hide(&seen, key, n, s, fill(-INFINITY));
      vf fade[NV];
      for (long c = 0; c < NV; c++) {
        vf most = top[c];
        for (long j = 0; j < n; j++) most = choose(s[j * NV + c] > most, s[j * NV + c], most);
        fade[c] = vexp(top[c] - most);
        top[c] = most, sum[c] *= fade[c];
      }
      for (long j = 0; j < n; j++)
        for (long c = 0; c < NV; c++) {
          s[j * NV + c] = vexp(s[j * NV + c] - top[c]);
          sum[c] += s[j * NV + c];
        }
      for (long d = 0; d < dim; d++)
        for (long c = 0; c < NV; c++) ot[d * NV + c] *= fade[c];
      add_to_lanes(row_of(v, b, kv, key), v.s, n, s, dim, ot);
    }
  }
  for (long c = 0; c < NV; c++) sum[c] = 1.0f / sum[c];
  from_lanes(ot, sum, block.count, dim, out + ((b * z->queries + block.start) * z->heads + h) * dim, z->heads * dim);
  for (long i = 0; i < block.count; i++) {
    float *kept = stats + 2 * ((b * z->heads + h) * z->queries + block.start + i);
    kept[0] = ((float *)top)[i], kept[1] = ((float *)sum)[i];
  }
}

// One block of queries of one head: its dq, and what it adds to dk and dv of its key head, whose rows are Hkv * D
// numbers apart.
static void backward_block(const Shape *z, Block block, long h, Strided q, Strided k, Strided v, const float *out,
                           const float *stats, Strided grad, float *dq, float *dk, float *dv, vf *scratch) {
  long stride = z->heads / z->groups * z->dim, at = ((block.row * z->queries + block.start) * z->heads + h) * z->dim;
  long dim = z->dim, b = block.row, kv = h / z->groups, chunk = dim > 64 ? CHUNK / 2 : CHUNK;
  vf *qt = scratch, *gt = qt + dim * NV, *dqt = gt + dim * NV, *p = dqt + dim * NV, *ds = p + CHUNK * NV;
  float *q_rows = (float *)(ds + CHUNK * NV), *g_rows = q_rows + NQ * dim;
  vf top[NV] = {}, share[NV] = {}, delta[NV] = {};
  const float *q_in = row_of(q, b, h, block.start), *g_in = row_of(grad, b, h, block.start);
  to_lanes(q_in, q.s, block.count, dim, z->scale, qt);
  to_lanes(g_in, grad.s, block.count, dim, 1.0f, gt);
  // delta = rowsum(grad * out), added up as the products below add up grad and a row of v: where a query sees one key,
  // out is that row and the difference is 0
  to_lanes(out + at, z->heads * dim, block.count, dim, 1.0f, dqt);
  for (long from = 0; from < dim; from += DEPTH) {
    vf sum[NV] = {};
    for (long d = from; d < dim && d < from + DEPTH; d++)
      for (long c = 0; c < NV; c++) sum[c] += gt[d * NV + c] * dqt[d * NV + c];
    for (long c = 0; c < NV; c++) delta[c] += sum[c];
  }
  memset(dqt, 0, dim * NV * sizeof(vf));
  memset(q_rows, 0, 2 * NQ * dim * sizeof(float));
  for (long i = 0; i < block.count; i++) {
    for (long d = 0; d < dim; d += VL) {
      store(q_rows + i * dim + d, load(q_in + i * q.s + d) * z->scale);
      store(g_rows + i * dim + d, load(g_in + i * grad.s + d));
    }
    const float *kept = stats + 2 * ((b * z->heads + h) * z->queries + block.start + i);
    ((float *)top)[i] = kept[0], ((float *)share)[i] = kept[1];
  }
  for (long part = 0; part < z->intervals; part++) {
    Seen seen = seen_by(z, block, part);
    for (long key = seen.low; key < seen.high; key += chunk) {
      long n = seen.high - key < chunk ? seen.high - key : chunk;
      const float *k_rows = row_of(k, b, kv, key);
      products(k_rows, k.s, n, qt, dim, p);
      for (long j = 0; j < n; j++)
        for (long c = 0; c < NV; c++) p[j * NV + c] = vexp(p[j * NV + c] - top[c]) * share[c];
      hide(&seen, key, n, p, fill(0.0f));
      products(row_of(v, b, kv, key), v.s, n, gt, dim, ds);
      for (long j = 0; j < n; j++)
        for (long c = 0; c < NV; c++) ds[j * NV + c] = p[j * NV + c] * (ds[j * NV + c] - delta[c]);
      add_to_rows((float *)p, n, g_rows, dim, dv + key * stride, stride);
      add_to_rows((float *)ds, n, q_rows, dim, dk + key * stride, stride);
      add_to_lanes(k_rows, k.s, n, ds, dim, dqt);
    }
  }
  vf scale[NV];
  for (long c = 0; c < NV; c++) scale[c] = fill(z->scale);
  from_lanes(dqt, scale, block.count, dim, dq + at, z->heads * dim);
}

static void *room(size_t bytes) { return aligned_alloc(64, (bytes + 63) & ~(size_t)63); }

// out (B, S, H, D), 0 on entry: where queries see nothing it stays so. stats (B, H, S, 2): the largest score and what
// exp(score - largest) is multiplied by; the log of their sum would round a whole row's probabilities together.
// Returns 0, or 1 where memory ran out.
EXPORT int attention_forward(const float *q, long qb, long qh, long qs, const float *k, long kb, long kh, long ks,
                             const float *v, long vb, long vh, long vs, const int32_t *spans, float *out, float *stats,
                             long batch, long heads, long groups, long queries, long keys, long dim, long intervals,
                             float scale, long threads) {
  Shape z = {batch, heads, groups, queries, keys, dim, intervals, scale, spans};
  Block *blocks = room(batch * queries * sizeof(Block));
  if (!blocks) return 1;
  long n = blocks_of(&z, blocks);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    vf *scratch = room((2 * dim + CHUNK) * NV * sizeof(vf));
    if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 8)
    for (long task = 0; task < n * heads; task++)
      if (scratch)
        forward_block(&z, blocks[task / heads], task % heads, (Strided){q, qb, qh, qs}, (Strided){k, kb, kh, ks},
                      (Strided){v, vb, vh, vs}, out, stats, scratch);
    free(scratch);
  }
  free(blocks);
  return failed;
}

// dq (B, S, H, D), written where queries see something, 0 on entry; dk and dv (parts, B, T, Hkv, D), 0 on entry. A
// part is a run of the row's blocks: each number is added up by one thread, in an order that no thread changes.
EXPORT int attention_backward(const float *q, long qb, long qh, long qs, const float *k, long kb, long kh, long ks,
                              const float *v, long vb, long vh, long vs, const int32_t *spans, const float *out,
                              const float *stats, const float *grad, long gb, long gh, long gs, float *dq, float *dk,
                              float *dv, long batch, long heads, long groups, long queries, long keys, long dim,
                              long intervals, float scale, long parts, long threads) {
  Shape z = {batch, heads, groups, queries, keys, dim, intervals, scale, spans};
  long kv_heads = heads / groups;
  Block *blocks = room(batch * queries * sizeof(Block));
  long *begins = room((batch + 1) * sizeof(long));
  if (!blocks || !begins) {
    free(blocks), free(begins);
    return 1;
  }
  long n = blocks_of(&z, blocks), at = 0;
  for (long b = 0; b <= batch; b++) {
    while (at < n && blocks[at].row < b) at++;
    begins[b] = at;
  }
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    vf *scratch = room((3 * dim + 2 * CHUNK) * NV * sizeof(vf) + 2 * NQ * dim * sizeof(float));
    if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < parts * batch * kv_heads; task++) {
      long part = task / (batch * kv_heads), b = task / kv_heads % batch, kv = task % kv_heads;
      long many = begins[b + 1] - begins[b];
      long into = ((part * batch + b) * keys * kv_heads + kv) * dim;
      long from = begins[b] + many * part / parts, to = begins[b] + many * (part + 1) / parts;
      for (long i = from; i < to && scratch; i++)
        for (long h = kv * groups; h < (kv + 1) * groups; h++)
          backward_block(&z, blocks[i], h, (Strided){q, qb, qh, qs}, (Strided){k, kb, kh, ks},
                         (Strided){v, vb, vh, vs}, out, stats, (Strided){grad, gb, gh, gs}, dq, dk + into,
                         dv + into, scratch);
    }
    free(scratch);
  }
  free(blocks), free(begins);
  return failed;
}
