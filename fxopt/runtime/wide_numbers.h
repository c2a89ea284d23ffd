// Numbers and 8-bit codes as vectors of float32, for the C++ files beside this one.

#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FXOPT_HAS_WIDE_NUMBERS 1
#include <immintrin.h>

namespace {

enum Number : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Code : int32_t { kNibble = 0, kInt8 = 1, kFloat8 = 2 };

inline __m512 widened(const uint16_t* bits, Number number, __mmask16 live) {
  const __m256i loaded = _mm256_maskz_loadu_epi16(live, bits);
  if (number == kFloat16) {
    return _mm512_cvtph_ps(loaded);
  }
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
}

inline __m512 load(const void* numbers, int64_t place, Number number, __mmask16 live) {
  if (number == kFloat32) {
    return _mm512_maskz_loadu_ps(live, static_cast<const float*>(numbers) + place);
  }
  return widened(static_cast<const uint16_t*>(numbers) + place, number, live);
}

inline void store(void* numbers, int64_t place, Number number, __mmask16 live, __m512 values) {
  if (number == kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(numbers) + place, live, values);
    return;
  }
  __m256i bits;
  if (number == kFloat16) {
    bits = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {  // to the nearest, ties to even; NaN stays NaN
    const __m512i wide = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(numbers) + place, live, bits);
}

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline float one(const void* numbers, int64_t place, Number number) {
  return _mm512_cvtss_f32(load(numbers, place, number, 1));
}

void to_float(const void* numbers, int64_t place, Number number, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 live = first(count - i);
    _mm512_mask_storeu_ps(out + i, live, load(numbers, place + i, number, live));
  }
}

// 16 numbers from a place in a row of 8-bit codes, not scaled.
inline __m512 eight_bits(const uint8_t* codes, int32_t code, __mmask16 live) {
  const __m128i loaded = _mm_maskz_loadu_epi8(live, codes);
  if (code == kInt8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(loaded));
  }
  // e4m3: the exponent and mantissa as those of a float32 with another bias, which a product corrects.
  const __m512i wide = _mm512_cvtepu8_epi32(loaded);
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
  const __m512i rest = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_slli_epi32(rest, 20));
  const __m512 scaled = _mm512_mul_ps(magnitude, _mm512_castsi512_ps(_mm512_set1_epi32((120 + 127) << 23)));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(rest, _mm512_set1_epi32(0x7f));
  const __m512i bits = _mm512_or_si512(_mm512_castps_si512(scaled), sign);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Of each of four vectors the sum of its entries.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

}  // namespace

#endif
