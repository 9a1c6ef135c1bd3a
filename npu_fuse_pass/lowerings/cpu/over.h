// Small tensors: an element for each [k0, k1] of tensors seen as [R0, K0, R1, K1].

static const int64_t WIDTH = 1024;  // elements that are computed before they are reduced; what k1 ranges over is less

// The small tensor's elements for n elements from `start` on.
template <class T> static inline void expand(
    T* __restrict__ out, const T* __restrict__ x, int64_t start, int64_t n, int64_t K0, int64_t R1, int64_t K1) {
  if (n <= 0) return;
  if (K1 == 1) {
    int64_t left = R1 - start % R1, k = start / R1 % K0;
    for (int64_t i = 0; i < n; left = R1, k = k + 1 < K0 ? k + 1 : 0) {
      const int64_t run = left < n - i ? left : n - i;
      const T value = x[k];
      for (int64_t j = 0; j < run; ++j) out[i + j] = value;
      i += run;
    }
    return;
  }
  int64_t at = start % K1, r = start / K1 % R1, k = start / K1 / R1 % K0;
  for (int64_t i = 0; i < n; at = 0) {
    const int64_t run = K1 - at < n - i ? K1 - at : n - i;
    const T* __restrict__ line = x + k * K1 + at;
    for (int64_t j = 0; j < run; ++j) out[i + j] = line[j];
    i += run;
    if (++r == R1) { r = 0; k = k + 1 < K0 ? k + 1 : 0; }
  }
}

// Reductions: x is the running value, y what its roundings lost.
template <bool EXACT> struct SumOver {
  static double first() { return 0; }
  static inline void take(double& x, double& y, double v) { if (EXACT) add_exact(x, y, v); else x += v; }
};
struct AmaxOver {
  static double first() { return -INFINITY; }
  static inline void take(double& x, double&, double v) { x = maximum(x, v); }
};
struct AminOver {
  static double first() { return INFINITY; }
  static inline void take(double& x, double&, double v) { x = minimum(x, v); }
};

// Adjacent values, in an order that depends on their number alone.
template <class Op> static inline void take_all(double& x, double& y, const double* __restrict__ v, int64_t n) {
  int64_t i = 0;
  if (n >= 32) {
    double a[8], b[8];
    for (int l = 0; l < 8; ++l) { a[l] = Op::first(); b[l] = 0; }
    for (; i + 8 <= n; i += 8) for (int l = 0; l < 8; ++l) Op::take(a[l], b[l], v[i + l]);
    for (int l = 0; l < 8; ++l) { Op::take(x, y, a[l]); y += b[l]; }
  }
  for (; i < n; ++i) Op::take(x, y, v[i]);
}

// One task: `values` computes elements into an array, `put` gets what they are reduced to. Every result is one task's.
template <class Op, class Values, class Put> static inline void reduce_over(
    int64_t R0, int64_t K0, int64_t R1, int64_t K1, const int64_t* task, const Values& values, const Put& put) {
  double v[WIDTH], x[WIDTH], y[WIDTH];
  const int64_t first = task[1], last = task[2], begin = task[3], width = task[4] - task[3];
  const auto give = [&](int64_t i, int64_t j) { put(i, math::isfinite(x[j]) ? x[j] + y[j] : x[j]); };
  if (K1 == 1) {
    const int64_t rows = R1 <= 0 ? WIDTH : R1 < WIDTH ? WIDTH / R1 : 1;
    for (int64_t k = first; k < last; k += rows) {
      const int64_t n = rows < last - k ? rows : last - k;
      for (int64_t j = 0; j < n; ++j) { x[j] = Op::first(); y[j] = 0; }
      for (int64_t r0 = 0; r0 < R0; ++r0) {
        const int64_t start = (r0 * K0 + k) * R1;
        if (R1 <= WIDTH) {
          values(start, n * R1, v);
          for (int64_t j = 0; j < n; ++j) take_all<Op>(x[j], y[j], v + j * R1, R1);
        } else {
          for (int64_t r = 0; r < R1; r += WIDTH) {
            const int64_t some = WIDTH < R1 - r ? WIDTH : R1 - r;
            values(start + r, some, v);
            take_all<Op>(x[0], y[0], v, some);
          }
        }
      }
      for (int64_t j = 0; j < n; ++j) give(k + j, j);
    }
    return;
  }
  const int64_t lines = width == K1 ? WIDTH / K1 : 1;
  for (int64_t k = first; k < last; ++k) {
    for (int64_t j = 0; j < width; ++j) { x[j] = Op::first(); y[j] = 0; }
    for (int64_t r0 = 0; r0 < R0; ++r0)
      for (int64_t r = 0; r < R1; r += lines) {
        const int64_t n = lines < R1 - r ? lines : R1 - r;
        values(((r0 * K0 + k) * R1 + r) * K1 + begin, n * width, v);
        for (int64_t l = 0; l < n; ++l)
          for (int64_t j = 0; j < width; ++j) Op::take(x[j], y[j], v[l * width + j]);
      }
    for (int64_t j = 0; j < width; ++j) give(k * K1 + begin + j, j);
  }
}
