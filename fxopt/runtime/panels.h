// Panels of weights: rows of a matrix packed such that they are lanes of vectors, for products with many tokens.

#pragma once

#include <cstdint>
#include <vector>

#include "wide_numbers.h"

#ifdef FXOPT_HAS_WIDE_NUMBERS

namespace {

// Memory that begins where a line of the cache does: a load of 64 bytes across two lines takes twice as long.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : memory_(count + 64 / sizeof(T)) {}
  T* data() {
    const auto place = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<T*>((place + 63) / 64 * 64);
  }

 private:
  std::vector<T> memory_;
};

constexpr int kLanes = 16;
constexpr int kParts = 4;                // vectors of features
constexpr int kPanel = kParts * kLanes;  // features that are packed together

// Vectors as the rows of a matrix of 32-bit numbers -> its columns.
inline void transpose(__m512i* v) {
  __m512i w[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  // v[4 i + j], lane l: column 4 l + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i left = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i right = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i left_odd = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i right_odd = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    w[j] = _mm512_shuffle_i32x4(left, right, 0x88);
    w[8 + j] = _mm512_shuffle_i32x4(left, right, 0xdd);
    w[4 + j] = _mm512_shuffle_i32x4(left_odd, right_odd, 0x88);
    w[12 + j] = _mm512_shuffle_i32x4(left_odd, right_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = w[i];
}

}  // namespace

#endif
