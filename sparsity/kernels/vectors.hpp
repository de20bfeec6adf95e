// Vectors of floats, one image in each lane, by the compiler's own vector types: AVX-512, AVX2, NEON or SSE.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace kernels {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24, WIDEST = 4;  // sums that stay in registers; the most vectors of a tile
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12, WIDEST = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, SUMS = 24, WIDEST = 4;
#else
constexpr int LANES = 4, SUMS = 12, WIDEST = 2;
#endif
constexpr int GROUP = 16;  // images are taken in groups of so many, whatever the machine's vectors are

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

constexpr int up_to(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

inline Vec load(const float* from) {
  Vec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec all(float value) { return Vec{} + value; }

// The sum of halves, of their halves, and so on: in registers, which GCC leaves where single lanes are asked for.
template <int HALF = LANES / 2, int... I>
inline Vec folded(Vec value, std::integer_sequence<int, I...>) {
  return value + __builtin_shufflevector(value, value, (I ^ HALF)...);
}

template <int HALF = LANES / 2>
inline float sum(Vec value) {
  const Vec found = folded<HALF>(value, std::make_integer_sequence<int, LANES>());
  if constexpr (HALF > 1)
    return sum<HALF / 2>(found);
  else
    return found[0];
}

// The same of two vectors, side by side.
template <int HALF, int... I>
inline Vec folded(Vec one, Vec other, std::integer_sequence<int, I...>) {
  constexpr auto place = [](int lane) {
    return lane / (2 * HALF) * 2 * HALF + lane % HALF + (lane & HALF ? LANES : 0);
  };
  return __builtin_shufflevector(one, other, place(I)...) + __builtin_shufflevector(one, other, (place(I) + HALF)...);
}

// The sums of LANES vectors, each by the same additions as `sum` has, for a third of its shuffles.
template <int HALF = LANES / 2>
inline Vec sums(Vec* rows) {
  for (int row = 0; row < HALF; row++)
    rows[row] = folded<HALF>(rows[row], rows[row + HALF], std::make_integer_sequence<int, LANES>());
  if constexpr (HALF > 1)
    return sums<HALF / 2>(rows);
  else
    return rows[0];
}

// The lanes that are not 0, NaN among them, as bits.
inline uint32_t other_than_zero(Vec value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < LANES; lane++) found |= uint32_t(value[lane] != 0) << lane;
  return found;
#endif
}

// LANES bytes as floats. By the compiler's own conversions GCC takes each lane for itself.
inline Vec of_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Bytes own;
  std::memcpy(&own, from, sizeof own);
  return __builtin_convertvector(__builtin_convertvector(own, Ints), Vec);
#endif
}

// e^x, to about one unit in the last place; 0 below -87, inf above 88, NaN of NaN. Cephes' polynomial.
inline Vec exp(Vec x) {
  const Vec low = all(-87.33f), high = all(88.72f);
  const Vec held = x > high ? high : x < low ? low : x;
  const Vec bias = all(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const Vec power = (held * 1.44269504f + bias) - bias;
  const Vec rest = held - power * 0.693359375f + power * 2.12194440e-4f;
  Vec series = all(1.9875691500e-4f);
  for (float each : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    series = series * rest + each;
  series = series * rest * rest + rest + 1.f;
  const Vec known = power == power ? power : Vec{};
  // two factors, as 2^128 is none
  const Ints half = __builtin_convertvector(known, Ints) >> 1, other = __builtin_convertvector(known, Ints) - half;
  const Ints one = (half + 127) << 23, two = (other + 127) << 23;
  const Vec found = series * (Vec)one * (Vec)two;
  return x > high ? all(INFINITY) : x < low ? Vec{} : found;
}

// N vectors of N lanes are turned: lane j of row i becomes lane i of row j.
template <class V, int N, int STRIDE, int... I>
inline void swap_lanes(V* rows, std::integer_sequence<int, I...>) {
  for (int row = 0; row < N; row++) {
    if (row & STRIDE) continue;
    const V one = rows[row], other = rows[row + STRIDE];
    rows[row] = __builtin_shufflevector(one, other, (I & STRIDE ? N + I - STRIDE : I)...);
    rows[row + STRIDE] = __builtin_shufflevector(one, other, (I & STRIDE ? N + I : I + STRIDE)...);
  }
}

template <class V, int N, int STRIDE = N / 2>
inline void turn(V* rows) {
  swap_lanes<V, N, STRIDE>(rows, std::make_integer_sequence<int, N>());
  if constexpr (STRIDE > 1) turn<V, N, STRIDE / 2>(rows);
}

// An array that vectors can be read from, of zeros at first.
template <class T>
class Array {
 public:
  void resize(int64_t size) {
    if (size <= this->size) return;
    const int64_t bytes = (size * int64_t(sizeof(T)) + 127) / 64 * 64;  // a vector more, as tails are read whole
    data.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    std::memset(static_cast<void*>(data.get()), 0, bytes);
    this->size = size;
  }
  T* get() { return data.get(); }
  const T* get() const { return data.get(); }
  T& operator[](int64_t index) { return data.get()[index]; }
  const T& operator[](int64_t index) const { return data.get()[index]; }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T, Free> data;
  int64_t size = 0;
};

// Denormals are zeros while it lives, as in the rest of training.
class Flushed {
 public:
#if defined(__SSE__)
  Flushed() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~Flushed() { _mm_setcsr(before); }

 private:
  unsigned before;
#elif defined(__aarch64__)
  Flushed() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | (1ull << 24)));
  }
  ~Flushed() { asm volatile("msr fpcr, %0" ::"r"(before)); }

 private:
  uint64_t before;
#endif
};

}  // namespace kernels
