// Products of many tokens with weights that alone are quantized: 48 rows of the weight are widened into the
// first cache, some columns at a time, and multiplied with all tokens from there. Their next columns are widened
// meanwhile: products keep only the units busy that multiply.
//
// Tokens are the lanes of vectors, and are packed so once. Weights need no other order then: each is given to
// all lanes. Both consist of slots of 32 bits: one float32, or two columns in bfloat16 where x is and the
// processor multiplies such pairs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "panels.h"
#include "weight_pairs.h"

#ifdef FXOPT_HAS_WIDE_NUMBERS

namespace {

constexpr int64_t kSlots = 64;        // of a row at a time
constexpr int64_t kWidenedRows = 48;  // 12 KB of them stay in the first cache
constexpr int64_t kStep = 4;          // slots that are multiplied for each 32 columns that are widened

using Rows = float[kWidenedRows][kSlots];

// Rows that are multiplied together with so many vectors of tokens: their sums fill most of the registers.
constexpr int rows_with(int vectors) { return vectors == 1 ? 16 : 24 / vectors; }

// `_mm512_fmadd_ps` or `_mm512_dpbf16_ps` in place, see `add_products` in quantized_linear.cpp.
template <bool kPairs>
inline void add_slots(__m512& sum, __m512 left, __m512 right) {
  if (kPairs) {
    add_pairs(sum, _mm512_castps_si512(left), _mm512_castps_si512(right));
  } else {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  }
}

// body(0), body(1), to body(N - 1), each a constant: of loops GCC unrolls too late to keep an array in registers.
template <class Body, int... I>
inline __attribute__((always_inline)) void each_of(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}

template <int N, class Body>
inline __attribute__((always_inline)) void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, N>());
}

// ---- tokens ----

// 16 tokens from `token` on, as vectors of slots; beyond the last token they are 0. `out`: of the first slot;
// from one slot to the next it is `stride` numbers.
template <bool kPairs>
void pack_tokens(const Product& p, int64_t token, int64_t slots, float* out, int64_t stride) {
  constexpr int64_t kColumns = kPairs ? 2 : 1;  // of a slot
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    __m512i square[kLanes];
    const int64_t column = slot * kColumns, left = p.K - column;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t place = (token + i) * p.K + column;
      square[i] = _mm512_setzero_si512();
      if (token + i >= p.M || left <= 0) continue;
      if (kPairs) {
        const __mmask32 live = left >= 32 ? ~0u : (1u << left) - 1;
        square[i] = _mm512_maskz_loadu_epi16(live, static_cast<const uint16_t*>(p.x) + place);
      } else {
        square[i] = _mm512_castps_si512(load(p.x, place, Number(p.x_number), first(left)));
      }
    }
    transpose(square);
    for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(out + (slot + i) * stride, square[i]);
  }
}

// ---- weights ----

// 32 columns to slots. `left`: of them, how many there are.
template <int32_t kCode, bool kPairs, bool kScaledLater>
inline void widen_slots(const uint8_t* codes, const GroupNumbers& group, int64_t left, float* out) {
  if (kPairs) {
    _mm512_storeu_si512(out, widen_pairs<kCode, kScaledLater>(codes, group, left));
    return;
  }
  __m512 parts[2];
  widen_parts<kCode, kScaledLater>(codes, group, left, parts);
  _mm512_storeu_ps(out, parts[0]);
  _mm512_storeu_ps(out + kLanes, parts[1]);
}

// `count` rows from `row` on, some columns of which are widened at a time: 32 with each step.
template <int32_t kCode, bool kPairs, bool kScaledLater>
class Widening {
 public:
  Widening(const Product& p, const std::vector<RowNumbers>& numbers, int64_t row, int64_t count)
      : p_(p), numbers_(numbers.data()), count_(count) {
    first_ = static_cast<const uint8_t*>(p.codes) + row * p.row_bytes;
  }

  // What is next: slots from slot `start` on, to `rows`.
  void begin(int64_t start, Rows& rows) {
    begin_ = start * kColumns;
    end_ = std::min(begin_ + kSlots * kColumns, p_.K);
    column_ = begin_;
    row_ = begin_ < end_ ? 0 : count_;
    codes_ = first_ + bytes(begin_);
    out_ = rows[0];
  }

  inline __attribute__((always_inline)) void step() {
    if (row_ >= count_) return;
    const int64_t group = kScaledLater ? 0 : column_ / p_.group, done = column_ - begin_;
    const GroupNumbers numbers = group_numbers<kCode, kScaledLater>(p_, numbers_[row_], group);
    const uint8_t* codes = codes_ + bytes(done);
    widen_slots<kCode, kPairs, kScaledLater>(codes, numbers, p_.K - column_, out_ + done / kColumns);
    // What comes next of this row.
    _mm_prefetch(reinterpret_cast<const char*>(codes + bytes(kSlots * kColumns)), _MM_HINT_T1);
    column_ += kWidenedBlock;
    if (column_ < end_) return;
    column_ = begin_;
    ++row_;
    codes_ += p_.row_bytes;
    out_ += kSlots;
  }

  void finish() {
    while (row_ < count_) step();
  }

 private:
  static constexpr int64_t kColumns = kPairs ? 2 : 1;  // of a slot
  static constexpr int64_t bytes(int64_t columns) { return kCode == kNibble ? columns / 2 : columns; }

  const Product& p_;
  const RowNumbers* numbers_;
  const uint8_t *first_, *codes_ = nullptr;
  float* out_ = nullptr;
  int64_t count_, row_ = 0, begin_ = 0, end_ = 0, column_ = 0;
};

// ---- products ----

// Adds the products of R rows with V vectors of tokens to their sums, which are `stride` apart for a row.
template <bool kPairs, int V, class Beside, int R = rows_with(V)>
void tile(const float (*rows)[kSlots], int64_t slots, const float* x, float* sums, int64_t stride, Beside& beside) {
  __m512 total[R * V];
  each<R * V>([&](auto i) __attribute__((always_inline)) { total[i] = _mm512_setzero_ps(); });
  for (int64_t begin = 0; begin < slots; begin += kStep) {
    beside.step();
    for (int64_t slot = begin; slot < begin + kStep; ++slot) {
      asm volatile("" ::: "memory");  // loads of later slots would take registers from sums
      __m512 here[V];
      each<V>([&](auto v) __attribute__((always_inline)) { here[v] = _mm512_loadu_ps(x + (slot * V + v) * kLanes); });
      each<R>([&](auto r) __attribute__((always_inline)) {
        const __m512 weight = _mm512_set1_ps(rows[r][slot]);
        each<V>([&](auto v) __attribute__((always_inline)) {
          __m512 sum = total[r * V + v];
          add_slots<kPairs>(sum, weight, here[v]);
          total[r * V + v] = sum;
        });
      });
    }
  }
  each<R * V>([&](auto i) __attribute__((always_inline)) {  // columns are added up in parts: sums err less
    float* place = sums + i / V * stride + i % V * kLanes;
    _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), total[i]));
  });
}

// All tiles of `count` rows with V vectors of tokens.
template <bool kPairs, int V, class Beside>
void tiles(const Rows& rows, int64_t count, int64_t slots, const float* x, float* sums, int64_t stride,
           Beside& beside) {
  for (int64_t r = 0; r < count; r += rows_with(V)) {
    tile<kPairs, V>(rows + r, slots, x, sums + r * stride, stride, beside);
  }
}

// The sums of up to 16 rows with up to 16 tokens, scaled if they are not yet, to the result.
template <bool kScaledLater>
void finish_square(const Product& p, int64_t token, int64_t row, const float* sums, int64_t stride) {
  const __mmask16 live = first(p.N - row);
  __m512i square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = _mm512_loadu_si512(sums + i * stride);
  transpose(square);
  const __m512 scales =
      kScaledLater ? load(p.scales, row, Number(p.scale_number), live) : _mm512_setzero_ps();
  for (int i = 0; i < kLanes && token + i < p.M; ++i) {
    const __m512 sum = _mm512_castsi512_ps(square[i]);
    finish(p, token + i, row, live, kScaledLater ? _mm512_mul_ps(sum, scales) : sum);
  }
}

// Up to 48 rows with all tokens. `x`: packed, 64 tokens after 64 others.
template <int32_t kCode, bool kPairs, bool kScaledLater>
void widened_block(const Product& p, std::vector<RowNumbers>& numbers, const float* x, int64_t all_slots,
                   int64_t row, std::vector<float>& sums) {
  alignas(64) Rows both[2];
  const int64_t tokens = (p.M + kLanes - 1) / kLanes * kLanes, count = std::min(kWidenedRows, p.N - row);
  std::fill(sums.begin(), sums.end(), 0.0f);
  for (int64_t i = 0; i < count && !kScaledLater; ++i) numbers[i].read(p, row + i);
  Widening<kCode, kPairs, kScaledLater> widening(p, numbers, row, count);
  widening.begin(0, both[0]);
  for (int64_t start = 0; start < all_slots; start += kSlots) {
    const int64_t slots = std::min(kSlots, all_slots - start);
    const Rows& rows = both[start / kSlots % 2];
    widening.finish();
    widening.begin(start + slots, both[(start / kSlots + 1) % 2]);
    for (int64_t token = 0; token < tokens; token += kPanel) {
      const int64_t vectors = std::min<int64_t>(kParts, (tokens - token) / kLanes);
      const float* here = x + token * all_slots + start * vectors * kLanes;
      float* place = sums.data() + token;
      switch (vectors) {
        case 1: tiles<kPairs, 1>(rows, count, slots, here, place, tokens, widening); break;
        case 2: tiles<kPairs, 2>(rows, count, slots, here, place, tokens, widening); break;
        case 3: tiles<kPairs, 3>(rows, count, slots, here, place, tokens, widening); break;
        default: tiles<kPairs, 4>(rows, count, slots, here, place, tokens, widening);
      }
    }
  }
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t token = 0; token < tokens; token += kLanes) {
      finish_square<kScaledLater>(p, token, row + r, sums.data() + r * tokens + token, tokens);
    }
  }
}

template <int32_t kCode, bool kPairs, bool kScaledLater>
void widened_products(const Product& p) {
  constexpr int64_t kColumns = kPairs ? 2 : 1;
  const int64_t all_slots = (p.K + kWidenedBlock - 1) / kWidenedBlock * kWidenedBlock / kColumns;
  const int64_t tokens = (p.M + kLanes - 1) / kLanes * kLanes;
  Aligned<float> memory_of_x(tokens * all_slots);
  float* x = memory_of_x.data();
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<RowNumbers> numbers(kWidenedRows, RowNumbers(p.groups));
    std::vector<float> sums(kWidenedRows * tokens);
#pragma omp for
    for (int64_t token = 0; token < tokens; token += kLanes) {
      const int64_t begin = token / kPanel * kPanel;  // of the up to 64 tokens that are packed together
      const int64_t vectors = std::min<int64_t>(kParts, (tokens - begin) / kLanes);
      pack_tokens<kPairs>(p, token, all_slots, &x[begin * all_slots + (token - begin)], vectors * kLanes);
    }
#pragma omp for
    for (int64_t row = 0; row < p.N; row += kWidenedRows) {
      widened_block<kCode, kPairs, kScaledLater>(p, numbers, x, all_slots, row, sums);
    }
  }
}

template <int32_t kCode, bool kScaledLater>
void widened_products(const Product& p) {
  if (kHasPairs && p.x_number == kBFloat16) {
    widened_products<kCode, kHasPairs, kScaledLater>(p);
  } else {
    widened_products<kCode, false, kScaledLater>(p);
  }
}

template <int32_t kCode>
void widened_products(const Product& p) {
  if (kCode != kNibble && is_scaled_later(p)) {
    widened_products<kCode, kCode != kNibble>(p);
  } else {
    widened_products<kCode, false>(p);
  }
}

}  // namespace

#endif
