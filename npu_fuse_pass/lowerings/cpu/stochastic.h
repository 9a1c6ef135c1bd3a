// Stochastic rounding; tensors/stochastic.py says what it computes.

// 16 random bits for each of n elements from number `first` on; `bits` has room for 2 * 128 more.
static inline const uint16_t* random_bits(
    uint16_t* bits, int64_t first, int64_t n, double seed, double parameter, double step) {
  const int64_t begin = first / 128, end = (first + n + 127) / 128;
  const uint64_t count = uint64_t(step);
  for (int64_t row = begin; row < end; ++row, bits += 128) {
    #pragma GCC ivdep
    for (int l = 0; l < 16; ++l) {
      const uint64_t block = uint64_t(row) * 16 + l;
      uint32_t a = uint32_t(block), b = uint32_t(block >> 32), c = uint32_t(count), d = uint32_t(count >> 32);
      uint32_t k = uint32_t(seed), m = uint32_t(parameter);
      #pragma GCC unroll 10  // else the loop around it is not vectorised
      for (int r = 0; r < 10; ++r, k += 0x9E3779B9u, m += 0xBB67AE85u) {
        const uint64_t p = 0xD2511F53ull * a, q = 0xCD9E8D57ull * c;
        a = uint32_t(q >> 32) ^ b ^ k, b = uint32_t(q), c = uint32_t(p >> 32) ^ d ^ m, d = uint32_t(p);
      }
      bits[l] = uint16_t(a), bits[16 + l] = uint16_t(a >> 16);
      bits[32 + l] = uint16_t(b), bits[48 + l] = uint16_t(b >> 16);
      bits[64 + l] = uint16_t(c), bits[80 + l] = uint16_t(c >> 16);
      bits[96 + l] = uint16_t(d), bits[112 + l] = uint16_t(d >> 16);
    }
  }
  return bits - 128 * (end - begin) + first % 128;
}
static inline float stochastic_bfloat(float x, uint16_t noise) {
  const int32_t magnitude = bits_of(x) & 0x7fffffff;
  const float chosen = from_bits((magnitude + noise) & 0xffff0000);
  return magnitude <= 0x7f7f0000 ? math::copysign(chosen, x) : round_bfloat(x);
}
static inline float stochastic_half(float x, uint16_t noise) {
  const int32_t magnitude = bits_of(x) & 0x7fffffff;
  const float normal = from_bits((magnitude + (noise >> 3)) & 0xffffe000);
  const float units = from_bits(magnitude) * 16777216.0f, low = math::floor(units);
  const float carry = noise + math::nearbyint((units - low) * 65536) < 65536 ? 0.0f : 1.0f;
  const float small = (low + carry) * 5.9604644775390625e-8f;
  const float chosen = magnitude < 0x38800000 ? small : normal;
  return magnitude <= 0x477fe000 ? math::copysign(chosen, x) : round_half(x);
}
