// Products of a few tokens in bfloat16 with weights that alone are quantized: two rows of the weight at a time
// are widened in registers, and multiplied with up to 12 tokens. Columns are the lanes of vectors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "panels.h"
#include "weight_pairs.h"

#ifdef FXOPT_HAS_WIDE_NUMBERS

namespace {

constexpr int kPairRows = 2;
constexpr int kPairTokens = 12;  // with two rows their sums fill most of the registers
constexpr int kPairBlock = 16;   // rows that are finished together

// Of x, the columns that are multiplied at a time: 16 KB of it stay in the first cache.
constexpr int64_t columns_with(int tokens) { return 8192 / tokens / kWidenedBlock * kWidenedBlock; }

// Adds the products of two rows with T tokens, which are even, from column `begin` to `end`, to sums[t][0] and
// sums[t][1].
template <int32_t kCode, bool kScaledLater, int T>
void pair_rows(const Product& p, const uint16_t* x, int64_t stride, int64_t begin, int64_t end,
               const uint8_t* const* codes, const RowNumbers* numbers, float (*sums)[kPairBlock]) {
  __m512 total[kPairRows][T];
#pragma GCC unroll 2
  for (int r = 0; r < kPairRows; ++r) {
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
  }
  const int64_t ahead = kPairRows * p.row_bytes;  // the rows that come next
  int64_t group = kScaledLater ? 0 : begin / p.group, stop = begin;
  GroupNumbers of_group[kPairRows];
  for (int64_t k = begin; k < end; k += kWidenedBlock) {
    if (k == stop) {
#pragma GCC unroll 2
      for (int r = 0; r < kPairRows; ++r) of_group[r] = group_numbers<kCode, kScaledLater>(p, numbers[r], group);
      stop = kScaledLater ? end : ++group * p.group;
    }
    __m512i weights[kPairRows];
#pragma GCC unroll 2
    for (int r = 0; r < kPairRows; ++r) {
      const uint8_t* place = codes[r] + (kCode == kNibble ? k / 2 : k);
      weights[r] = widen_pairs<kCode, kScaledLater>(place, of_group[r], p.K - k);
      _mm_prefetch(reinterpret_cast<const char*>(place + ahead), _MM_HINT_T0);
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512i here = _mm512_loadu_si512(x + t * stride + k);
#pragma GCC unroll 2
      for (int r = 0; r < kPairRows; ++r) add_pairs(total[r][t], here, weights[r]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; t += 2) {
    alignas(16) float four[4];
    _mm_store_ps(four, sums_of(total[0][t], total[1][t], total[0][t + 1], total[1][t + 1]));
    for (int i = 0; i < 4; ++i) sums[t + i / 2][i % 2] += four[i];
  }
}

// Adds the products of `count` rows with T tokens.
template <int32_t kCode, bool kScaledLater, int T>
void pair_block(const Product& p, const uint16_t* x, int64_t stride, int64_t row, int64_t count,
                const std::vector<RowNumbers>& numbers, float (*sums)[kPairBlock]) {
  for (int64_t begin = 0; begin < p.K; begin += columns_with(T)) {
    const int64_t end = std::min(begin + columns_with(T), p.K);
    for (int64_t r = 0; r < count; r += kPairRows) {
      const uint8_t* codes[kPairRows];
      for (int64_t i = 0; i < kPairRows; ++i) {
        codes[i] = static_cast<const uint8_t*>(p.codes) + std::min(row + r + i, p.N - 1) * p.row_bytes;
      }
      auto* part = reinterpret_cast<float(*)[kPairBlock]>(&sums[0][r]);
      pair_rows<kCode, kScaledLater, T>(p, x, stride, begin, end, codes, &numbers[r], part);
    }
  }
}

template <int32_t kCode, bool kScaledLater>
constexpr decltype(&pair_block<kCode, kScaledLater, 2>) kPairBlocks[kPairTokens / 2] = {
    pair_block<kCode, kScaledLater, 2>, pair_block<kCode, kScaledLater, 4>,  pair_block<kCode, kScaledLater, 6>,
    pair_block<kCode, kScaledLater, 8>, pair_block<kCode, kScaledLater, 10>, pair_block<kCode, kScaledLater, 12>};

template <int32_t kCode, bool kScaledLater>
void pair_products(const Product& p) {
  // A block more than columns need: tokens whose distance is a power of two push each other out of the cache.
  const int64_t stride = ((p.K + kWidenedBlock - 1) / kWidenedBlock + 1) * kWidenedBlock;
  const int64_t tokens = (p.M + 1) / 2 * 2;
  Aligned<uint16_t> memory_of_x(tokens * stride);
  uint16_t* x = memory_of_x.data();
  for (int64_t token = 0; token < p.M; ++token) {
    std::memcpy(&x[token * stride], static_cast<const uint16_t*>(p.x) + token * p.K, p.K * sizeof(uint16_t));
  }
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<RowNumbers> numbers(kPairBlock, RowNumbers(p.groups));
    std::vector<float> memory(tokens * kPairBlock);
    auto* sums = reinterpret_cast<float(*)[kPairBlock]>(memory.data());
#pragma omp for
    for (int64_t row = 0; row < p.N; row += kPairBlock) {
      const int64_t count = std::min<int64_t>(kPairBlock, p.N - row);
      std::fill(memory.begin(), memory.end(), 0.0f);
      for (int64_t i = 0; i < count && !kScaledLater; ++i) numbers[i].read(p, row + i);
      for (int64_t token = 0; token < tokens; token += kPairTokens) {
        const int64_t pairs = std::min<int64_t>(kPairTokens, tokens - token) / 2;
        kPairBlocks<kCode, kScaledLater>[pairs - 1](p, &x[token * stride], stride, row, count, numbers, sums + token);
      }
      const __mmask16 live = first(p.N - row);
      const __m512 scales = kScaledLater ? load(p.scales, row, Number(p.scale_number), live) : _mm512_set1_ps(1.0f);
      for (int64_t token = 0; token < p.M; ++token) {
        finish(p, token, row, live, _mm512_mul_ps(_mm512_loadu_ps(sums[token]), scales));
      }
    }
  }
}

template <int32_t kCode>
void pair_products(const Product& p) {
  if (kCode != kNibble && is_scaled_later(p)) {
    pair_products<kCode, kCode != kNibble>(p);
  } else {
    pair_products<kCode, false>(p);
  }
}

}  // namespace

#endif
