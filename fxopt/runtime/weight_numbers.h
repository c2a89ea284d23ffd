// What codes of weights stand for, and how a product ends, for the kinds of products beside this file.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"
#include "wide_numbers.h"

#ifdef FXOPT_HAS_WIDE_NUMBERS

namespace {

// Scales and offsets of one row, in float32.
struct RowNumbers {
  std::vector<float> scales, offsets;
  explicit RowNumbers(int64_t groups) : scales(groups), offsets(groups, 0.0f) {}
  void read(const Product& p, int64_t row) {
    to_float(p.scales, row * p.groups, Number(p.scale_number), p.groups, scales.data());
    if (p.offsets != nullptr) {
      to_float(p.offsets, row * p.groups, Number(p.offset_number), p.groups, offsets.data());
    }
  }
};

// What 32 codes stand for. `table`: of 4 bits, scaled. Of 8 bits `left` codes are read, 4 bits are stored in
// whole blocks.
template <int32_t kCode>
inline void widen(const uint8_t* codes, __m512 table, __m512 scale, __m512 offset, __m512* parts,
                  int64_t left = 32) {
  if (kCode == kNibble) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    parts[0] = _mm512_permutexvar_ps(wide, table);
    parts[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
    return;
  }
  parts[0] = _mm512_fmadd_ps(eight_bits(codes, kCode, first(left)), scale, offset);
  parts[1] = _mm512_fmadd_ps(eight_bits(codes + 16, kCode, left > 16 ? first(left - 16) : 0), scale, offset);
}

// Adds the bias and stores up to 16 features of a token.
inline void finish(const Product& p, int64_t token, int64_t row, __mmask16 live, __m512 sums) {
  if (p.bias != nullptr) sums = _mm512_add_ps(sums, load(p.bias, row, Number(p.bias_number), live));
  store(p.out, token * p.out_stride + row, Number(p.x_number), live, sums);
}

}  // namespace

#endif
