// Codes of weights widened 32 at once, to float32, or to bfloat16 for the instruction that multiplies pairs of
// such numbers.

#pragma once

#include <cstdint>
#include <cstring>

#include "weight_numbers.h"

#ifdef FXOPT_HAS_WIDE_NUMBERS

namespace {

#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

constexpr int64_t kWidenedBlock = 32;  // columns that are widened at once

// Tokens and weights are multiplied as pairs: no group ends within a block.
inline bool has_pairs(const Product& p) {
  return kHasPairs && p.x_number == kBFloat16 && (p.groups == 1 || p.group % kWidenedBlock == 0);
}

// A scale of a whole row can wait for its sum: codes of 8 bits are multiplied as what they are.
inline bool is_scaled_later(const Product& p) { return p.code != kNibble && p.groups == 1 && p.offsets == nullptr; }

// What widens a group: its numbers, or its scaled table of codes of 4 bits, also in bfloat16, twice.
struct GroupNumbers {
  __m512 scale, offset, scaled;
  __m512i pairs;
};

template <int32_t kCode, bool kScaledLater>
inline GroupNumbers group_numbers(const Product& p, const RowNumbers& row, int64_t group) {
  GroupNumbers numbers;
  numbers.scale = numbers.offset = numbers.scaled = _mm512_setzero_ps();
  numbers.pairs = _mm512_setzero_si512();
  if (kScaledLater) return numbers;
  numbers.scale = _mm512_set1_ps(row.scales[group]);
  numbers.offset = _mm512_set1_ps(row.offsets[group]);
  if (kCode != kNibble) return numbers;
  numbers.scaled = _mm512_fmadd_ps(_mm512_loadu_ps(p.table), numbers.scale, numbers.offset);
#ifdef __AVX512BF16__
  const __m512bh twice = _mm512_cvtne2ps_pbh(numbers.scaled, numbers.scaled);
  std::memcpy(&numbers.pairs, &twice, sizeof(twice));
#endif
  return numbers;
}

// 32 columns in float32. `left`: how many of them there are.
template <int32_t kCode, bool kScaledLater>
inline void widen_parts(const uint8_t* codes, const GroupNumbers& group, int64_t left, __m512* parts) {
  if (kScaledLater) {
    const bool whole = left >= kWidenedBlock;
    parts[0] = eight_bits(codes, kCode, whole ? 0xffff : first(left));
    parts[1] = eight_bits(codes + 16, kCode, whole ? 0xffff : left > 16 ? first(left - 16) : 0);
  } else if (left >= kWidenedBlock) {
    widen<kCode>(codes, group.scaled, group.scale, group.offset, parts);
  } else {
    widen<kCode>(codes, group.scaled, group.scale, group.offset, parts, left);
  }
}

// Codes of 4 bits: a permutation of numbers of 16 bits widens 32. It looks at five bits: the table is there twice.
inline __m512i nibble_pairs(const uint8_t* codes, __m512i table) {
  const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
  return _mm512_permutexvar_epi16(both, table);
}

// Codes of e4m3, as they are: exponents of another bias. Subnormal numbers and NaN are looked up, at the five
// lowest bits of their magnitude.
inline __m512i float8_pairs(const uint8_t* codes, int64_t left) {
  alignas(64) static const uint16_t looked_up[32] = {0,      0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,
                                                     0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                     0, 0, 0, 0, 0, 0, 0, 0x7fc0};
  const __mmask32 live = left >= kWidenedBlock ? ~0u : (1u << left) - 1;
  const __m256i loaded = _mm256_maskz_loadu_epi8(live, codes);
  const __m256i low = _mm256_set1_epi8(0x7f), magnitude = _mm256_and_si256(loaded, low);
  // NaN, of magnitude 127, and those below 8.
  const __m256i next = _mm256_and_si256(_mm256_add_epi8(magnitude, _mm256_set1_epi8(1)), low);
  const __mmask32 is_looked_up = _mm256_cmplt_epu8_mask(next, _mm256_set1_epi8(9));
  const __m512i wide = _mm512_cvtepu8_epi16(magnitude);
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16((127 - 7) << 7));
  const __m512i table = _mm512_load_si512(looked_up);
  const __m512i any = _mm512_mask_permutexvar_epi16(normal, is_looked_up, wide, table);
  return _mm512_mask_add_epi16(any, _mm256_movepi8_mask(loaded), any, _mm512_set1_epi16(INT16_MIN));
}

// 32 columns in bfloat16.
template <int32_t kCode, bool kScaledLater>
inline __m512i widen_pairs(const uint8_t* codes, const GroupNumbers& group, int64_t left) {
  if (kCode == kNibble) return nibble_pairs(codes, group.pairs);
  if (kCode == kFloat8 && kScaledLater) return float8_pairs(codes, left);
  __m512i pairs = _mm512_setzero_si512();
#ifdef __AVX512BF16__
  __m512 parts[2];
  widen_parts<kCode, kScaledLater>(codes, group, left, parts);
  const __m512bh both = _mm512_cvtne2ps_pbh(parts[1], parts[0]);
  std::memcpy(&pairs, &both, sizeof(both));
#endif
  return pairs;
}

// `_mm512_dpbf16_ps` in place, see `add_products` in quantized_linear.cpp.
inline void add_pairs(__m512& sum, __m512i left, __m512i right) {
#ifdef __AVX512BF16__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
#endif
}

}  // namespace

#endif
