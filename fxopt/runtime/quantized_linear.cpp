// Products of activations with quantized weights on processors with AVX-512 and VNNI, called through
// fxopt/runtime/quantized_linear.py. The layout of weights is that of fxopt/ir/quantized_weight.py; they are
// read as they are stored, and no second copy of them is kept.
//
// Letters: M tokens, N output features, K input features, G columns of a group.

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "pair_products.h"
#include "panels.h"
#include "product.h"
#include "weight_numbers.h"
#include "wide_numbers.h"
#include "widened_products.h"

#if defined(FXOPT_HAS_WIDE_NUMBERS) && defined(__AVX512VNNI__)
#define FXOPT_HAS_KERNELS 1
#endif

extern "C" int fxopt_has_kernels() {
#ifdef FXOPT_HAS_KERNELS
  return 1;
#else
  return 0;
#endif
}

#ifdef FXOPT_HAS_KERNELS

namespace {

// ---- weights alone are quantized: what a code stands for is multiplied in float32 ----

// Results are finished 16 features at a time, kRows of which are computed together.
constexpr int kRows = 4;
constexpr int kBlock = 16;

// Likewise of integers.
inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Products of kRows rows of weights with T tokens, to sums[t][0 to kRows). Of codes of 4 bits: the table is
// scaled once a group, so that a weight costs one permutation.
template <int T>
void nibble_rows(const Product& p, const float* x, int64_t padded, const uint8_t* const* codes,
                 const RowNumbers* numbers, float (*sums)[kBlock]) {
  __m512 total[kRows][T];
  for (auto& row : total) {
    for (auto& each : row) each = _mm512_setzero_ps();
  }
  const __m512 table = _mm512_loadu_ps(p.table);
  for (int64_t group = 0; group < p.groups; ++group) {
    __m512 scaled[kRows];
    for (int r = 0; r < kRows; ++r) {
      scaled[r] = _mm512_fmadd_ps(table, _mm512_set1_ps(numbers[r].scales[group]),
                                  _mm512_set1_ps(numbers[r].offsets[group]));
    }
    const int64_t stop = group + 1 == p.groups ? padded : (group + 1) * p.group;
    for (int64_t k = group * p.group; k < stop; k += 32) {
      __m512 low[kRows], high[kRows];
      for (int r = 0; r < kRows; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + k / 2));
        const __m512i wide = _mm512_cvtepu8_epi32(bytes);  // a permutation looks at four bits of an index
        low[r] = _mm512_permutexvar_ps(wide, scaled[r]);
        high[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), scaled[r]);
      }
      for (int t = 0; t < T; ++t) {
        const __m512 left = _mm512_loadu_ps(x + t * padded + k);
        const __m512 right = _mm512_loadu_ps(x + t * padded + k + 16);
        for (int r = 0; r < kRows; ++r) total[r][t] = _mm512_fmadd_ps(low[r], left, total[r][t]);
        for (int r = 0; r < kRows; ++r) total[r][t] = _mm512_fmadd_ps(high[r], right, total[r][t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    _mm_storeu_ps(sums[t], sums_of(total[0][t], total[1][t], total[2][t], total[3][t]));
  }
}

template <int T, int32_t kCode>
void eight_bit_rows(const Product& p, const float* x, int64_t padded, const uint8_t* const* codes,
                    const RowNumbers* numbers, float (*sums)[kBlock]) {
  __m512 total[kRows][T];
  for (auto& row : total) {
    for (auto& each : row) each = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t stop = group + 1 == p.groups ? p.K : (group + 1) * p.group;
    __m512 scale[kRows], offset[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      scale[r] = _mm512_set1_ps(numbers[r].scales[group]);
      offset[r] = _mm512_set1_ps(numbers[r].offsets[group]);
    }
    for (int64_t k = group * p.group; k < stop; k += 16) {
      const __mmask16 live = first(stop - k);
      __m512 weights[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        weights[r] = _mm512_fmadd_ps(eight_bits(codes[r] + k, kCode, live), scale[r], offset[r]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 here = _mm512_maskz_loadu_ps(live, x + t * padded + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) total[r][t] = _mm512_fmadd_ps(weights[r], here, total[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    _mm_storeu_ps(sums[t], sums_of(total[0][t], total[1][t], total[2][t], total[3][t]));
  }
}

// Where kRows rows begin; beyond the last row it stands for those that are missing.
inline void find_rows(const Product& p, int64_t row, const uint8_t** rows) {
  const auto* all = static_cast<const uint8_t*>(p.codes);
  for (int r = 0; r < kRows; ++r) rows[r] = all + (row + r < p.N ? row + r : p.N - 1) * p.row_bytes;
}

// Products of kRows rows with T tokens, from one of them on.
template <int T>
void float_rows(const Product& p, const float* x, int64_t padded, int64_t token, const uint8_t* const* codes,
                const RowNumbers* numbers, float (*sums)[kBlock]) {
  const float* here = x + token * padded;
  if (p.code == kNibble) {
    nibble_rows<T>(p, here, padded, codes, numbers, sums + token);
  } else if (p.code == kInt8) {
    eight_bit_rows<T, kInt8>(p, here, padded, codes, numbers, sums + token);
  } else {
    eight_bit_rows<T, kFloat8>(p, here, padded, codes, numbers, sums + token);
  }
}

// The same with one token, row after row, as `rows_in_turn` below does it.
void nibble_rows_in_turn(const Product& p, const float* x, int64_t padded, const uint8_t* const* codes,
                         const RowNumbers* numbers, float* sums) {
  const __m512 table = _mm512_loadu_ps(p.table);
  __m512 total[kRows];
  for (int r = 0; r < kRows; ++r) {
    __m512 low = _mm512_setzero_ps(), high = low, next_low = low, next_high = low;
    for (int64_t group = 0; group < p.groups; ++group) {
      const __m512 scaled = _mm512_fmadd_ps(table, _mm512_set1_ps(numbers[r].scales[group]),
                                            _mm512_set1_ps(numbers[r].offsets[group]));
      const int64_t stop = group + 1 == p.groups ? padded : (group + 1) * p.group;
      for (int64_t k = group * p.group; k < stop; k += 32) {
        const __m512i wide =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes[r] + k / 2)));
        low = _mm512_fmadd_ps(_mm512_permutexvar_ps(wide, scaled), _mm512_loadu_ps(x + k), low);
        high = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), scaled),
                               _mm512_loadu_ps(x + k + 16), high);
        std::swap(low, next_low);  // so that no step waits for the one before it
        std::swap(high, next_high);
      }
    }
    total[r] = _mm512_add_ps(_mm512_add_ps(low, high), _mm512_add_ps(next_low, next_high));
  }
  _mm_storeu_ps(sums, sums_of(total[0], total[1], total[2], total[3]));
}

// Likewise of 8-bit codes without offsets: a scale is that of the sum of its group.
template <int32_t kCode>
void eight_bit_rows_in_turn(const Product& p, const float* x, const uint8_t* const* codes,
                            const RowNumbers* numbers, float* sums) {
  __m512 total[kRows];
  for (int r = 0; r < kRows; ++r) {
    total[r] = _mm512_setzero_ps();
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t stop = group + 1 == p.groups ? p.K : (group + 1) * p.group;
      __m512 part[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] = _mm512_setzero_ps();
      int64_t k = group * p.group;
      for (; k + 64 <= stop; k += 64) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          part[i] = _mm512_fmadd_ps(eight_bits(codes[r] + k + 16 * i, kCode, 0xffff),
                                    _mm512_loadu_ps(x + k + 16 * i), part[i]);
        }
      }
      for (; k < stop; k += 16) {
        const __mmask16 live = first(stop - k);
        part[0] = _mm512_fmadd_ps(eight_bits(codes[r] + k, kCode, live), _mm512_maskz_loadu_ps(live, x + k),
                                  part[0]);
      }
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
      total[r] = _mm512_fmadd_ps(sum, _mm512_set1_ps(numbers[r].scales[group]), total[r]);
    }
  }
  _mm_storeu_ps(sums, sums_of(total[0], total[1], total[2], total[3]));
}

// Products of kRows rows with the only token.
void float_rows_in_turn(const Product& p, const float* x, int64_t padded, const uint8_t* const* codes,
                        const RowNumbers* numbers, float (*sums)[kBlock]) {
  if (p.code == kNibble) {
    nibble_rows_in_turn(p, x, padded, codes, numbers, *sums);
  } else if (p.offsets != nullptr) {
    float_rows<1>(p, x, padded, 0, codes, numbers, sums);
  } else if (p.code == kInt8) {
    eight_bit_rows_in_turn<kInt8>(p, x, codes, numbers, *sums);
  } else {
    eight_bit_rows_in_turn<kFloat8>(p, x, codes, numbers, *sums);
  }
}

}  // namespace

// out = x @ w^T + bias. Every group of codes of 4 bits begins at a multiple of 32 columns.
extern "C" void fxopt_weight_only(const Product* given) {
  const Product p = *given;
  // One token: rows in turn are faster, see below, but for float8, which is widened faster to bfloat16.
  if (has_pairs(p) && (p.M > 1 || p.code == kFloat8)) {
    if (p.code == kNibble) {
      pair_products<kNibble>(p);
    } else if (p.code == kInt8) {
      pair_products<kInt8>(p);
    } else {
      pair_products<kFloat8>(p);
    }
    return;
  }
  const int64_t padded = (p.K + 31) / 32 * 32;
  std::vector<float> x(p.M * padded, 0.0f);
  for (int64_t token = 0; token < p.M; ++token) {
    to_float(p.x, token * p.K, Number(p.x_number), p.K, x.data() + token * padded);
  }
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<RowNumbers> numbers(kRows, RowNumbers(p.groups));
    std::vector<float> memory(p.M * kBlock);
    auto* sums = reinterpret_cast<float(*)[kBlock]>(memory.data());
#pragma omp for
    for (int64_t row = 0; row < p.N; row += kBlock) {
      for (int64_t r = 0; r < kBlock && row + r < p.N; r += kRows) {
        const uint8_t* codes[kRows];
        find_rows(p, row + r, codes);
        for (int64_t i = 0; i < kRows; ++i) numbers[i].read(p, row + r + i < p.N ? row + r + i : p.N - 1);
        auto* part = reinterpret_cast<float(*)[kBlock]>(&sums[0][r]);
        if (p.M == 1) {
          float_rows_in_turn(p, x.data(), padded, codes, numbers.data(), part);
          continue;
        }
        int64_t token = 0;
        for (; token + 4 <= p.M; token += 4) float_rows<4>(p, x.data(), padded, token, codes, numbers.data(), part);
        for (; token + 2 <= p.M; token += 2) float_rows<2>(p, x.data(), padded, token, codes, numbers.data(), part);
        for (; token < p.M; ++token) float_rows<1>(p, x.data(), padded, token, codes, numbers.data(), part);
      }
      for (int64_t token = 0; token < p.M; ++token) {
        finish(p, token, row, first(p.N - row), _mm512_loadu_ps(sums[token]));
      }
    }
  }
}

namespace {

inline void store_two(void* out, int64_t place, Number number, const __m512* parts) {
#ifdef __AVX512BF16__
  if (number == kBFloat16) {  // as `store`, but for numbers below 2^-126, which become 0
    const __m512bh both = _mm512_cvtne2ps_pbh(parts[1], parts[0]);
    std::memcpy(static_cast<uint16_t*>(out) + place, &both, sizeof(both));
    return;
  }
#endif
  store(out, place, number, 0xffff, parts[0]);
  store(out, place + 16, number, 0xffff, parts[1]);
}

// One row of w to `out`.
template <int32_t kCode>
void widen_row(const Product& p, int64_t row, const RowNumbers& numbers) {
  const uint8_t* codes = static_cast<const uint8_t*>(p.codes) + row * p.row_bytes;
  const __m512 table = kCode == kNibble ? _mm512_loadu_ps(p.table) : _mm512_setzero_ps();
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t stop = group + 1 == p.groups ? p.K : (group + 1) * p.group;
    const __m512 scale = _mm512_set1_ps(numbers.scales[group]);
    const __m512 offset = _mm512_set1_ps(numbers.offsets[group]);
    const __m512 scaled = _mm512_fmadd_ps(table, scale, offset);
    __m512 parts[2];
    int64_t k = group * p.group;
    for (; k + 32 <= stop; k += 32) {
      widen<kCode>(codes + (kCode == kNibble ? k / 2 : k), scaled, scale, offset, parts);
      store_two(p.out, row * p.out_stride + k, Number(p.x_number), parts);
    }
    if (k == stop) continue;
    widen<kCode>(codes + (kCode == kNibble ? k / 2 : k), scaled, scale, offset, parts, stop - k);
    const int64_t place = row * p.out_stride + k;
    store(p.out, place, Number(p.x_number), first(stop - k), parts[0]);
    if (stop - k > 16) store(p.out, place + 16, Number(p.x_number), first(stop - k - 16), parts[1]);
  }
}

}  // namespace

// out = w, (N, K) of the dtype of `x_number`; `x` and `bias` are not read.
extern "C" void fxopt_dequantize(const Product* given) {
  const Product p = *given;
  const auto of_bytes = p.code == kInt8 ? widen_row<kInt8> : widen_row<kFloat8>;
  const auto row_of = p.code == kNibble ? widen_row<kNibble> : of_bytes;
#pragma omp parallel num_threads(p.threads)
  {
    RowNumbers numbers(p.groups);
#pragma omp for
    for (int64_t row = 0; row < p.N; ++row) {
      numbers.read(p, row);
      row_of(p, row, numbers);
    }
  }
}

// out = x @ w^T + bias, for many tokens. Every group begins at a multiple of 32 columns.
extern "C" void fxopt_widened_products(const Product* given) {
  const Product p = *given;
  if (p.code == kNibble) {
    widened_products<kNibble>(p);
  } else if (p.code == kInt8) {
    widened_products<kInt8>(p);
  } else {
    widened_products<kFloat8>(p);
  }
}

namespace {

// ---- activations are quantized, too: products of 8-bit integers, added up in 32 bits ----

// One token to unsigned codes (its integers plus 128), `padded` of them. Returns the scale.
float quantize_token(const Product& p, int64_t token, int64_t padded, uint8_t* codes) {
  const auto number = Number(p.x_number);
  const int64_t start = token * p.K;
  __m512 most = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < p.K; k += 16) {
    const __m512 x = load(p.x, start + k, number, first(p.K - k));
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
  }
  const float largest = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
  const float scale = largest / 127.0f;
  const __m512 divisor = _mm512_set1_ps(scale == 0.0f ? 1.0f : scale);
  for (int64_t k = 0; k < padded; k += 16) {
    const __m512 x = k < p.K ? load(p.x, start + k, number, first(p.K - k)) : _mm512_setzero_ps();
    const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(x, divisor));
    const __m512i moved = _mm512_add_epi32(code, _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtusepi32_epi8(moved));
  }
  return scale;
}

// `_mm512_dpbusd_epi32` in place: of the intrinsic, GCC 12 copies half of the sums to memory and back.
inline void add_products(__m512i& sum, __m512i of_unsigned, __m512i of_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_unsigned), "v"(of_signed));
}

// Sums of kRows rows of weights with T tokens, to sums[t][0 to kRows); 128 times the sum of a row is in them.
template <int T, bool kSumRows>
void integer_rows(int64_t K, int64_t padded, const uint8_t* x, const uint8_t* const* rows,
                  int32_t (*sums)[kBlock], int32_t* of_rows) {
  __m512i total[kRows][T], alone[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    alone[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_si512();
  }
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t k = 0; k < K; k += 64) {
    const __mmask64 live = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
    __m512i weights[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = _mm512_maskz_loadu_epi8(live, rows[r] + k);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512i here = _mm512_loadu_si512(x + t * padded + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_products(total[r][t], here, weights[r]);
    }
    if (kSumRows) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_products(alone[r], ones, weights[r]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[t]),
                     sums_of(total[0][t], total[1][t], total[2][t], total[3][t]));
  }
  if (kSumRows) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(of_rows), sums_of(alone[0], alone[1], alone[2], alone[3]));
  }
}

// Sums of kRows rows with one token, row after row: memory is read from its beginning to its end. One core of
// a Zen 4, 8192 x 2048 from memory: 0.46x of the time of four rows side by side, whose streams are too short for
// it to foresee. Four steps of a row have sums of their own, so that none waits for another.
void rows_in_turn(int64_t K, const uint8_t* x, const uint8_t* const* rows, int32_t (*sums)[kBlock],
                  int32_t* of_rows) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i total[kRows], alone[kRows];
  for (int r = 0; r < kRows; ++r) {
    __m512i part[4], plain[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] = plain[i] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 256 <= K; k += 256) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i weights = _mm512_loadu_si512(rows[r] + k + 64 * i);
        add_products(part[i], _mm512_loadu_si512(x + k + 64 * i), weights);
        add_products(plain[i], ones, weights);
      }
    }
    for (; k < K; k += 64) {
      const __mmask64 live = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
      const __m512i weights = _mm512_maskz_loadu_epi8(live, rows[r] + k);
      add_products(part[0], _mm512_loadu_si512(x + k), weights);
      add_products(plain[0], ones, weights);
    }
    total[r] = _mm512_add_epi32(_mm512_add_epi32(part[0], part[1]), _mm512_add_epi32(part[2], part[3]));
    alone[r] = _mm512_add_epi32(_mm512_add_epi32(plain[0], plain[1]), _mm512_add_epi32(plain[2], plain[3]));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[0]), sums_of(total[0], total[1], total[2], total[3]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(of_rows), sums_of(alone[0], alone[1], alone[2], alone[3]));
}

// Sums of kRows rows with all tokens, to sums[token][0 to kRows); they stay in the first cache meanwhile.
void integer_sums(const Product& p, int64_t padded, const uint8_t* x, int64_t row, int32_t (*sums)[kBlock],
                  int32_t* of_rows) {
  const uint8_t* rows[kRows];
  find_rows(p, row, rows);
  int64_t token = 0;
  if (p.M >= 4) {
    integer_rows<4, true>(p.K, padded, x, rows, sums, of_rows);
    for (token = 4; token + 4 <= p.M; token += 4) {
      integer_rows<4, false>(p.K, padded, x + token * padded, rows, sums + token, of_rows);
    }
  } else {
    rows_in_turn(p.K, x, rows, sums, of_rows);
    token = 1;
  }
  for (; token + 2 <= p.M; token += 2) {
    integer_rows<2, false>(p.K, padded, x + token * padded, rows, sums + token, of_rows);
  }
  for (; token < p.M; ++token) {
    integer_rows<1, false>(p.K, padded, x + token * padded, rows, sums + token, of_rows);
  }
}

// ---- the same for many tokens: weights are packed, 64 features at a time, such that features are lanes ----

constexpr int64_t kDepth = 256;              // and their columns: 16 KB, which stay in the first cache
// From this many tokens on packing pays. One core of a Zen 4, 2048 x 2048: 1.13x of the time without it at 16
// tokens, 1.01x at 32; 512 x 512: 0.75x at 128.
constexpr int64_t kPackedTokens = 40;

// kPanel rows from `row` on, `depth` columns from `start` on (a multiple of 64), to `panel`: of each four
// columns one vector for each part. Adds the sums of the rows to `of_rows`.
void pack_panel(const Product& p, int64_t row, int64_t start, int64_t depth, uint8_t* panel, __m512i* of_rows) {
  const auto* all = static_cast<const uint8_t*>(p.codes);
  const __m512i ones = _mm512_set1_epi8(1);
  for (int part = 0; part < kParts; ++part) {
    for (int64_t k = 0; k < depth; k += 64) {
      const int64_t left = p.K - start - k;
      const __mmask64 live = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t here = row + part * kLanes + i;
        rows[i] = _mm512_maskz_loadu_epi8(live, all + (here < p.N ? here : p.N - 1) * p.row_bytes + start + k);
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {
        of_rows[part] = _mm512_dpbusd_epi32(of_rows[part], ones, rows[i]);
        _mm512_store_si512(panel + ((k / 4 + i) * kParts + part) * 64, rows[i]);
      }
    }
  }
}

// Adds the products of a panel with T tokens to their sums.
template <int T>
void panel_tile(const uint8_t* panel, int64_t depth, const uint8_t* x, int64_t padded, int32_t* sums) {
  __m512i total[kParts][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      total[part][t] = _mm512_loadu_si512(sums + t * kPanel + part * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; k += 4) {
    __m512i weights[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      weights[part] = _mm512_load_si512(panel + k * kPanel + part * 64);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, x + t * padded + k, sizeof(four));
      const __m512i here = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        add_products(total[part][t], here, weights[part]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      _mm512_storeu_si512(sums + t * kPanel + part * kLanes, total[part][t]);
    }
  }
}

// Scales the sums of a token with 16 features, and stores them.
inline void finish_integers(const Product& p, int64_t token, int64_t row, __m512i sums, __m512i of_rows,
                            float x_scale) {
  const __mmask16 live = first(p.N - row);
  const __m512 scales = load(p.scales, row, Number(p.scale_number), live);
  const __m512i sum = _mm512_sub_epi32(sums, _mm512_slli_epi32(of_rows, 7));
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x_scale));
  finish(p, token, row, live, _mm512_mul_ps(scaled, scales));
}

// One panel of features with all tokens. `sums` has room for kPanel a token.
void panel_products(const Product& p, int64_t padded, const uint8_t* x, const float* x_scales, int64_t row,
                    int32_t* sums) {
  alignas(64) uint8_t panel[kPanel * kDepth];
  __m512i of_rows[kParts] = {};
  std::memset(sums, 0, p.M * kPanel * sizeof(int32_t));
  for (int64_t start = 0; start < padded; start += kDepth) {
    const int64_t depth = padded - start < kDepth ? padded - start : kDepth;
    pack_panel(p, row, start, depth, panel, of_rows);
    const uint8_t* here = x + start;
    int64_t token = 0;
    for (; token + 6 <= p.M; token += 6) {
      panel_tile<6>(panel, depth, here + token * padded, padded, sums + token * kPanel);
    }
    for (; token + 2 <= p.M; token += 2) {
      panel_tile<2>(panel, depth, here + token * padded, padded, sums + token * kPanel);
    }
    for (; token < p.M; ++token) {
      panel_tile<1>(panel, depth, here + token * padded, padded, sums + token * kPanel);
    }
  }
  for (int64_t token = 0; token < p.M; ++token) {
    for (int part = 0; part < kParts && row + part * kLanes < p.N; ++part) {
      const __m512i sum = _mm512_loadu_si512(sums + token * kPanel + part * kLanes);
      finish_integers(p, token, row + part * kLanes, sum, of_rows[part], x_scales[token]);
    }
  }
}

// kBlock features with all tokens, of weights as they are stored.
void block_products(const Product& p, int64_t padded, const uint8_t* x, const float* x_scales, int64_t row,
                    int32_t (*sums)[kBlock]) {
  alignas(64) int32_t of_rows[kBlock] = {};
  for (int64_t r = 0; r < kBlock && row + r < p.N; r += kRows) {
    integer_sums(p, padded, x, row + r, reinterpret_cast<int32_t(*)[kBlock]>(&sums[0][r]), of_rows + r);
  }
  for (int64_t token = 0; token < p.M; ++token) {
    finish_integers(p, token, row, _mm512_loadu_si512(sums[token]), _mm512_load_si512(of_rows),
                    x_scales[token]);
  }
}

}  // namespace

// out = quantized(x) @ w^T + bias; one group a row, no offsets, codes of int8.
extern "C" void fxopt_int8_dynamic(const Product* given) {
  const Product p = *given;
  const int64_t padded = (p.K + 63) / 64 * 64;
  const bool packed = p.M >= kPackedTokens;
  const int64_t step = packed ? kPanel : kBlock;
  std::vector<uint8_t> x(p.M * padded);
  std::vector<float> x_scales(p.M);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<int32_t> sums(p.M * step);
#pragma omp for
    for (int64_t token = 0; token < p.M; ++token) {
      x_scales[token] = quantize_token(p, token, padded, x.data() + token * padded);
    }
#pragma omp for
    for (int64_t row = 0; row < p.N; row += step) {
      if (packed) {
        panel_products(p, padded, x.data(), x_scales.data(), row, sums.data());
      } else {
        block_products(p, padded, x.data(), x_scales.data(), row,
                       reinterpret_cast<int32_t(*)[kBlock]>(sums.data()));
      }
    }
  }
}

#endif
