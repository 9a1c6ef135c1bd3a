// What every generated kernel starts with: functions, its arguments, half precision, and torch's rules for NaN.
#include <stdint.h>
#include <string.h>

// glibc's forms of these for whole vectors (libmvec, at most 4 units in the last place off): g++ calls them in loops where
// functions are declared so, which is several times as fast. What is float64 is computed one by one.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GLIBC_PREREQ(2, 22)
extern "C" {
#define VECTOR(name) __attribute__((simd("notinbranch"))) float name##f(float);
VECTOR(exp) VECTOR(log) VECTOR(sin) VECTOR(cos)
__attribute__((simd("notinbranch"))) float powf(float, float);
#if __GLIBC_PREREQ(2, 35)
VECTOR(exp2) VECTOR(expm1) VECTOR(log2) VECTOR(log10) VECTOR(log1p) VECTOR(tan) VECTOR(asin) VECTOR(acos) VECTOR(atan)
VECTOR(sinh) VECTOR(cosh) VECTOR(tanh) VECTOR(asinh) VECTOR(acosh) VECTOR(atanh) VECTOR(erf) VECTOR(erfc)
__attribute__((simd("notinbranch"))) float atan2f(float, float);
__attribute__((simd("notinbranch"))) float hypotf(float, float);
#endif
#undef VECTOR
}
#endif
#endif

// <cmath> has these and as much again of templates, a fifth of a small kernel's compile; g++ and clang++ know them.
namespace math {
#define ONE(name) \
  static inline float name(float x) { return __builtin_##name##f(x); } \
  static inline double name(double x) { return __builtin_##name(x); }
ONE(sqrt) ONE(exp) ONE(exp2) ONE(expm1) ONE(log) ONE(log2) ONE(log10) ONE(log1p) ONE(sin) ONE(cos) ONE(tan)
ONE(asin) ONE(acos) ONE(atan) ONE(sinh) ONE(cosh) ONE(tanh) ONE(asinh) ONE(acosh) ONE(atanh) ONE(erf) ONE(erfc)
ONE(floor) ONE(ceil) ONE(trunc) ONE(nearbyint) ONE(fabs)
#undef ONE
#define TWO(name) \
  static inline float name(float x, float y) { return __builtin_##name##f(x, y); } \
  static inline double name(double x, double y) { return __builtin_##name(x, y); }
TWO(pow) TWO(atan2) TWO(copysign) TWO(hypot) TWO(fmod)
#undef TWO
// in two choices of one condition each, as the compiler's own are called element by element
template <class T> static inline T fmax(T x, T y) { const T m = x >= y ? x : y; return y != y ? x : m; }
template <class T> static inline T fmin(T x, T y) { const T m = x <= y ? x : y; return y != y ? x : m; }
static inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
template <class T> static inline bool isinf(T x) { return __builtin_isinf(x); }
template <class T> static inline bool isfinite(T x) { return __builtin_isfinite(x); }
}
static const float INFINITY = __builtin_inff(), NAN = __builtin_nanf("");

struct Args {
  int64_t members, chunks, tasks, threads, grain, elements;
  const int64_t* numel;
  const uint8_t* active;         // per member: has a gradient at this step
  char* const* tensors;          // [tensor slot][member]
  char* const* scalars;          // [scalar slot][member]
  const uint8_t* tags;           // [scalar slot][member]: dtype of the scalar, see load
  const int32_t* chunk_member;
  const int64_t* chunk_start;
  const int64_t* first_chunk;    // [members + 1]
  double* scratch;               // [member][SCRATCH]
  double* partial;               // [chunk][PARTIAL]
  double* contributions;         // [contribution][member]
  uint8_t* done;                 // [2]: the contributing and the updating function set theirs at their end
  const int64_t* whole;          // per member: elements with those that other processes hold
  const int64_t* task;           // [tasks][5]: a member and the ranges of k0 and k1 that a thread reduces at once, see over.h
};

// Members of so many elements or fewer are left to one thread each: a core's cache holds them from pass to pass, and
// there are enough of them to keep all threads busy.
static inline int64_t fits_a_cache(const Args& a, int64_t bytes_per_element) {
  const int64_t fits = (1 << 20) / bytes_per_element, fair = a.elements / (4 * a.threads);
  return a.threads > 1 && fair < fits ? fair : fits;
}

// Half precision is held as the float that it rounds to: `round_` gives that, `cut_` stores it (cut_half rounds, too).
// In 32 bits all the way, as compilers vectorise a way through 16 bits badly, or not at all (g++ 12 and _Float16).
// Rounding to bfloat asks for no NaN; one whose lowest bits are set would carry into its sign, so those from memory are
// made `plain` (arithmetic makes no such).
template <class T> static inline T plain(T x) { return x != x ? T(NAN) : x; }
static inline uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
struct bfloat { uint16_t bits; };
static inline float widen(bfloat x) { return from_bits(uint32_t(x.bits) << 16); }
static inline float round_bfloat(float f) {
  const uint32_t u = bits_of(f);
  return from_bits((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000);  // to nearest, ties to even
}
static inline bfloat cut_bfloat(float f) { return {uint16_t(bits_of(f) >> 16)}; }
// IEEE's half: the exponent is 112 less than a float's, the mantissa 13 bits shorter. Added to a float whose exponent is
// 13 greater, whose last bit is a half's last, x is rounded as a half is; below 2^-14, where halves are multiples of
// 2^-24, that float is 0.5. So nothing here is a subnormal float, which some processors are slow at.
struct half { uint16_t bits; };
static const uint32_t HALF_NORMAL = 0x38800000, HALF_END = 0x47800000, FLOAT_INFINITY = 0x7f800000;  // 2^-14, 2^16
static inline float widen(half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, u = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t small = bits_of(from_bits(u + HALF_NORMAL) - from_bits(HALF_NORMAL));
  const uint32_t finite = u < 1u << 23 ? small : u + (112u << 23);
  return from_bits(sign | (u < 31u << 23 ? finite : u + (224u << 23)));  // else inf and NaN
}
static inline uint32_t half_rounder(uint32_t magnitude) {
  const uint32_t exponent = magnitude & FLOAT_INFINITY, least = exponent > HALF_NORMAL ? exponent : HALF_NORMAL;
  return (least < HALF_END ? least : HALF_END) + (13u << 23);
}
static inline float round_half(float f) {
  const float rounder = from_bits(half_rounder(bits_of(f)) + 0x400000), rounded = (f + rounder) - rounder;
  const float finite = rounded * from_bits((127u + 112) << 23) * from_bits((127u - 112) << 23);  // or inf
  return from_bits(bits_of(finite) | (bits_of(f) & 0x80000000));  // -0, too
}
static inline half cut_half(float f) {
  const uint32_t u = bits_of(f) & 0x7fffffff, finite = u < HALF_END ? u : HALF_END, rounder = half_rounder(finite);
  const uint32_t last_bits = bits_of(from_bits(finite) + from_bits(rounder)) - rounder;
  const uint32_t magnitude = last_bits + ((rounder - (HALF_NORMAL + (13u << 23))) >> 13);
  return {uint16_t((bits_of(f) ^ u) >> 16 | (u > FLOAT_INFINITY ? 0x7e00 : magnitude))};
}
// The same for n halves, eight at a time where the processor converts them itself, which g++'s loops make no use of.
static inline void widen_all(float* __restrict__ out, const half* x, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    short __attribute__((vector_size(16))) halves;
    memcpy(&halves, x + i, 16);
    const auto floats = __builtin_ia32_vcvtph2ps256(halves);
    memcpy(out + i, &floats, 32);
  }
#endif
  #pragma GCC ivdep
  for (; i < n; ++i) out[i] = widen(x[i]);
}
static inline void cut_all(half* out, const float* __restrict__ x, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    float __attribute__((vector_size(32))) floats;
    memcpy(&floats, x + i, 32);
    const auto halves = __builtin_ia32_vcvtps2ph256(floats, 0);  // to nearest, ties to even
    memcpy(out + i, &halves, 16);
  }
#endif
  #pragma GCC ivdep
  for (; i < n; ++i) out[i] = cut_half(x[i]);
}
static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline bool widen(bool x) { return x; }

// dtype tags: 0 float64, 1 float32, 2 float16, 3 bfloat16, 4 int64, 5 int32, 6 bool
static inline double load(const Args& a, int64_t slot, int64_t m) {
  const char* p = a.scalars[slot * a.members + m];
  switch (a.tags[slot * a.members + m]) {
    case 0: return plain(*(const double*)p);
    case 1: return plain(*(const float*)p);
    case 2: return plain(widen(*(const half*)p));
    case 3: return widen(*(const bfloat*)p);
    case 4: return double(*(const int64_t*)p);
    case 5: return *(const int32_t*)p;
    default: return *(const bool*)p;
  }
}
static inline void store(const Args& a, int64_t slot, int64_t m, double x) {
  char* p = a.scalars[slot * a.members + m];
  switch (a.tags[slot * a.members + m]) {
    case 0: *(double*)p = x; break;
    case 1: *(float*)p = float(x); break;
    case 2: *(half*)p = cut_half(float(x)); break;
    case 3: *(bfloat*)p = cut_bfloat(round_bfloat(plain(float(x)))); break;
    case 4: *(int64_t*)p = int64_t(x); break;
    case 5: *(int32_t*)p = int32_t(x); break;
    default: *(bool*)p = x != 0;
  }
}
// math::pow that remembers its last result: members that have been updated equally often have the same powers.
struct Power {
  double args[2], value;
  bool known;
  double operator()(double x, double y) {
    const double given[2] = {x, y};
    if (!known || memcmp(given, args, sizeof(args))) { memcpy(args, given, sizeof(args)); value = math::pow(x, y); }
    known = true;
    return value;
  }
};
template <class T> static inline T sign(T x) { return T((x > 0) - (x < 0)); }
// NaN wins, as in torch; two choices of one condition each, as g++ makes branches of nested ones of two
template <class T> static inline T maximum(T a, T b) { const T m = a > b ? a : b; return a != a ? a : m; }
template <class T> static inline T minimum(T a, T b) { const T m = a < b ? a : b; return a != a ? a : m; }

// sum += value, and what the rounding of that loses goes to rest (Knuth's TwoSum; needs -ffp-contract=off)
static inline void add_exact(double& sum, double& rest, double value) {
  const double t = sum + value, z = t - sum;
  rest += (sum - (t - z)) + (value - z);
  sum = t;
}

// The first of n blocks of memory that overlaps one of m disjoint intervals, sorted by their starts; -1 if none does.
extern "C" int64_t find_overlap(
    const int64_t* begin, const int64_t* bytes, int64_t n, const int64_t* starts, const int64_t* ends, int64_t m) {
  int64_t low = 0;  // the number of intervals that start before a block ends; blocks near each other have the same
  for (int64_t i = 0; i < n; ++i) {
    if (!bytes[i]) continue;
    const int64_t end = begin[i] + bytes[i];
    if ((low && starts[low - 1] >= end) || (low < m && starts[low] < end)) {
      low = 0;
      for (int64_t high = m; low < high;) {
        const int64_t middle = (low + high) / 2;
        if (starts[middle] < end) low = middle + 1; else high = middle;
      }
    }
    if (low && ends[low - 1] > begin[i]) return i;
  }
  return -1;
}
