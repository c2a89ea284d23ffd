// Attention of a few queries over keys and values of 8 bits, on processors with AVX-512: each row is read
// once, as it is stored, and widened in registers. Called through fxopt/runtime/quantized_rows.py.
//
// Letters: B sequences, H heads, Q queries, G groups of heads that share keys, R rows of a group (those of its
// first head, of its second one, ...), S keys, D numbers of a row. Softmax over blocks of keys: Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018; parts of the keys by several threads, put together behind: Dao et al., "Flash-Decoding", 2023.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "wide_numbers.h"

extern "C" int fxopt_has_kernels() {
#ifdef FXOPT_HAS_WIDE_NUMBERS
  return 1;
#else
  return 0;
#endif
}

#ifdef FXOPT_HAS_WIDE_NUMBERS

// Where rows of 8 bits and their scales are; strides of B, G and S, in entries. Entries of a row are neighbours.
struct Rows {
  const uint8_t* codes;
  const float* scales;
  int64_t code_strides[3], scale_strides[3];
  int64_t width;
  int64_t code;
};

// What is passed for each call; strides are those of B, H and Q.
struct Attention {
  const void* query;    // numbers of a row are neighbours
  const uint8_t* mask;  // bool, keys are neighbours; or null
  void* out;            // of query's dtype, numbers of a row are neighbours
  Rows key, value;
  int64_t query_strides[3], mask_strides[3], out_strides[3];
  int64_t batch, groups, heads, queries, keys, threads;  // heads: of a group
  int64_t number;                                        // of query and out
  double scale;

  int64_t rows() const { return heads * queries; }

  // Where a row of a group of a sequence is.
  int64_t at(const int64_t* strides, int64_t b, int64_t g, int64_t row) const {
    return b * strides[0] + (g * heads + row / queries) * strides[1] + row % queries * strides[2];
  }
};

namespace {

constexpr int kKeys = 64;  // of a block: as many as bits of a word
constexpr int kTogether = 4;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// exp(x) for x <= 0, within 2 units in the last place; -inf gives 0, NaN stays NaN. Cody and Waite's reduction,
// and the polynomial of degree 5 of Cephes' expf.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  }
  sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), sum, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(sum, whole);
}

// One part of the keys of one group: running maxima and sums, and what the values add up to.
struct Part {
  std::vector<float> most, sum, total;
  Part(int64_t rows, int64_t padded) : most(rows, kLowest), sum(rows, 0.0f), total(rows * padded, 0.0f) {}
};

// A group of one sequence; its queries are scaled, in float32, one row behind the other.
struct Group {
  int64_t b, g;
  std::vector<float> query;
  const uint8_t *keys, *values;
  const float *key_scales, *value_scales;
};

int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

Group group_of(const Attention& p, int64_t b, int64_t g) {
  const auto at = [&](const int64_t* strides) { return b * strides[0] + g * strides[1]; };
  const int64_t width = p.key.width;
  std::vector<float> query(p.rows() * width);
  const __m512 scale = _mm512_set1_ps(static_cast<float>(p.scale));
  for (int64_t row = 0; row < p.rows(); ++row) {
    const int64_t place = p.at(p.query_strides, b, g, row);
    for (int64_t d = 0; d < width; d += 16) {
      const __mmask16 live = first(width - d);
      const __m512 here = load(p.query, place + d, static_cast<Number>(p.number), live);
      _mm512_mask_storeu_ps(query.data() + row * width + d, live, _mm512_mul_ps(here, scale));
    }
  }
  return {b,
          g,
          std::move(query),
          p.key.codes + at(p.key.code_strides),
          p.value.codes + at(p.value.code_strides),
          p.key.scales + at(p.key.scale_strides),
          p.value.scales + at(p.value.scale_strides)};
}

// Bits of up to 64 keys that a row sees.
inline uint64_t seen_by(const Attention& p, const Group& group, int64_t row, int64_t start, int64_t count) {
  const uint64_t there = count >= kKeys ? ~0ull : (1ull << count) - 1;
  if (p.mask == nullptr) return there;
  const uint8_t* mask = p.mask + p.at(p.mask_strides, group.b, group.g, row);
  const __m512i loaded = _mm512_maskz_loadu_epi8(there, mask + start);
  return _mm512_test_epi8_mask(loaded, loaded);
}

// The first key that a row of the group sees, and the one behind the last.
void live_keys(const Attention& p, const Group& group, int64_t* from, int64_t* to) {
  *from = 0, *to = p.keys;
  if (p.mask == nullptr) return;
  *from = p.keys, *to = 0;
  const int64_t rows = p.mask_strides[1] == 0 && p.mask_strides[2] == 0 ? 1 : p.rows();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t start = 0; start < p.keys; start += kKeys) {
      const uint64_t seen = seen_by(p, group, row, start, p.keys - start);
      if (seen == 0) continue;
      *from = std::min(*from, start + __builtin_ctzll(seen));
      *to = std::max(*to, start + kKeys - __builtin_clzll(seen));
    }
  }
}

// Products of T queries with up to 64 keys, to scores[t][key].
template <int T, int32_t kCode>
void score(const Rows& rows, const float* query, const uint8_t* keys, int64_t count, float (*scores)[kKeys]) {
  for (int64_t first_key = 0; first_key < count; first_key += kTogether) {
    const uint8_t* codes[kTogether];
    for (int k = 0; k < kTogether; ++k) {
      codes[k] = keys + std::min(first_key + k, count - 1) * rows.code_strides[2];
    }
    __m512 total[kTogether][T];
    for (auto& each : total) {
      for (auto& sum : each) sum = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < rows.width; d += 16) {
      const __mmask16 live = first(rows.width - d);
      __m512 here[kTogether];
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) here[k] = eight_bits(codes[k] + d, kCode, live);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 x = _mm512_maskz_loadu_ps(live, query + t * rows.width + d);
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) total[k][t] = _mm512_fmadd_ps(here[k], x, total[k][t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      _mm_storeu_ps(scores[t] + first_key, sums_of(total[0][t], total[1][t], total[2][t], total[3][t]));
    }
  }
}

// Adds up to 64 values, weighed, to what T rows have: total[t][d]. They are added up by themselves first, so
// that a rounding error is one of a short sum.
template <int T, int32_t kCode>
void weigh(const Rows& rows, const uint8_t* values, int64_t count, const float (*weights)[kKeys],
           float* total, int64_t stride) {
  constexpr int kWide = 4;
  for (int64_t start = 0; start < rows.width; start += kWide * 16) {
    const int wide = static_cast<int>(std::min<int64_t>(kWide, (rows.width - start + 15) / 16));
    __mmask16 live[kWide];
    __m512 sums[T][kWide];
#pragma GCC unroll 4
    for (int d = 0; d < kWide; ++d) {
      live[d] = d < wide ? first(rows.width - start - d * 16) : 0;
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[t][d] = _mm512_setzero_ps();
    }
    for (int64_t key = 0; key < count; ++key) {
      const uint8_t* codes = values + key * rows.code_strides[2] + start;
      __m512 here[kWide];
#pragma GCC unroll 4
      for (int d = 0; d < kWide; ++d) here[d] = eight_bits(codes + d * 16, kCode, live[d]);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512 weight = _mm512_set1_ps(weights[t][key]);
#pragma GCC unroll 4
        for (int d = 0; d < kWide; ++d) sums[t][d] = _mm512_fmadd_ps(here[d], weight, sums[t][d]);
      }
    }
#pragma GCC unroll 4
    for (int d = 0; d < kWide; ++d) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        float* place = total + t * stride + start + d * 16;
        const __m512 before = _mm512_maskz_loadu_ps(live[d], place);
        _mm512_mask_storeu_ps(place, live[d], _mm512_add_ps(before, sums[t][d]));
      }
    }
  }
}

inline void read_scales(const float* scales, int64_t stride, int64_t count, float* out) {
  for (int64_t key = 0; key < count; ++key) out[key] = scales[key * stride];
}

// Scores of one row over a block to its weights, times the scales of the values; what the row has so far is
// brought to the new maximum.
void normalize(Part& part, int64_t row, int64_t stride, uint64_t seen, int64_t count, const float* key_scales,
               const float* value_scales, float* scores) {
  __m512 largest = _mm512_set1_ps(kLowest);
  for (int64_t key = 0; key < count; key += 16) {
    const auto live = static_cast<__mmask16>(seen >> key);
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + key), _mm512_loadu_ps(key_scales + key));
    const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(kLowest), live, scaled);
    _mm512_storeu_ps(scores + key, masked);
    largest = _mm512_max_ps(largest, masked);
  }
  const float before = part.most[row], now = std::max(before, _mm512_reduce_max_ps(largest));
  const bool none = now == kLowest;
  const __m512 top = _mm512_set1_ps(none ? 0.0f : now);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t key = 0; key < count; key += 16) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + key), top));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(scores + key, _mm512_mul_ps(weight, _mm512_loadu_ps(value_scales + key)));
  }
  const float shrunk = none ? 1.0f : std::exp(before - now);
  part.sum[row] = part.sum[row] * shrunk + _mm512_reduce_add_ps(sum);
  part.most[row] = now;
  if (shrunk == 1.0f) return;
  for (int64_t d = 0; d < stride; ++d) part.total[row * stride + d] *= shrunk;
}

// Up to kTogether rows over one block of keys.
template <int T>
void rows_over(const Attention& p, const Group& group, Part& part, int64_t row, int64_t start, int64_t count,
               const float* key_scales, const float* value_scales) {
  uint64_t seen[T], any = 0;
  for (int t = 0; t < T; ++t) any |= seen[t] = seen_by(p, group, row + t, start, count);
  if (any == 0) return;
  float scores[T][kKeys] = {};
  const float* query = group.query.data() + row * p.key.width;
  const uint8_t* keys = group.keys + start * p.key.code_strides[2];
  p.key.code == kInt8 ? score<T, kInt8>(p.key, query, keys, count, scores)
                      : score<T, kFloat8>(p.key, query, keys, count, scores);
  const int64_t stride = padded(p.value.width);
  for (int t = 0; t < T; ++t) {
    normalize(part, row + t, stride, seen[t], count, key_scales, value_scales, scores[t]);
  }
  const uint8_t* values = group.values + start * p.value.code_strides[2];
  float* total = part.total.data() + row * stride;
  p.value.code == kInt8 ? weigh<T, kInt8>(p.value, values, count, scores, total, stride)
                        : weigh<T, kFloat8>(p.value, values, count, scores, total, stride);
}

void attend(const Attention& p, const Group& group, int64_t from, int64_t to, Part& part) {
  for (int64_t start = from; start < to; start += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, to - start);
    float key_scales[kKeys] = {}, value_scales[kKeys] = {};
    read_scales(group.key_scales + start * p.key.scale_strides[2], p.key.scale_strides[2], count, key_scales);
    read_scales(group.value_scales + start * p.value.scale_strides[2], p.value.scale_strides[2], count,
                value_scales);
    int64_t row = 0;
    for (; row + 4 <= p.rows(); row += 4) rows_over<4>(p, group, part, row, start, count, key_scales, value_scales);
    for (; row + 2 <= p.rows(); row += 2) rows_over<2>(p, group, part, row, start, count, key_scales, value_scales);
    for (; row < p.rows(); ++row) rows_over<1>(p, group, part, row, start, count, key_scales, value_scales);
  }
}

// Rows of a group from its parts; zeros where a row sees no key.
void finish(const Attention& p, const Part* parts, int64_t count, int64_t b, int64_t g) {
  const int64_t stride = padded(p.value.width);
  std::vector<float> here(stride);
  for (int64_t row = 0; row < p.rows(); ++row) {
    float most = kLowest, sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, parts[i].most[row]);
    std::fill(here.begin(), here.end(), 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float share = most == kLowest ? 0.0f : std::exp(parts[i].most[row] - most);
      sum += parts[i].sum[row] * share;
      for (int64_t d = 0; d < stride; ++d) here[d] += parts[i].total[row * stride + d] * share;
    }
    const __m512 divisor = _mm512_set1_ps(sum == 0.0f ? 1.0f : sum);
    const int64_t place = p.at(p.out_strides, b, g, row);
    for (int64_t d = 0; d < p.value.width; d += 16) {
      const __m512 values = _mm512_div_ps(_mm512_loadu_ps(here.data() + d), divisor);
      store(p.out, place + d, static_cast<Number>(p.number), first(p.value.width - d), values);
    }
  }
}

}  // namespace

extern "C" void fxopt_attend_rows(const Attention* given) {
  const Attention p = *given;
  const int64_t groups = p.batch * p.groups;
  // As many parts of the keys as keep all threads busy, none of them shorter than a block.
  const int64_t blocks = (p.keys + kKeys - 1) / kKeys;
  const int64_t cuts = std::max<int64_t>(1, std::min(blocks, (p.threads + groups - 1) / groups));
  std::vector<Part> parts(groups * cuts, Part(p.rows(), padded(p.value.width)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t place = 0; place < groups * cuts; ++place) {
    const int64_t number = place / cuts, cut = place % cuts;
    const Group group = group_of(p, number / p.groups, number % p.groups);
    int64_t from, to;
    live_keys(p, group, &from, &to);
    const int64_t step = (to - from + cuts - 1) / cuts;
    attend(p, group, from + cut * step, std::min(to, from + (cut + 1) * step), parts[place]);
  }
  for (int64_t number = 0; number < groups; ++number) {
    finish(p, parts.data() + number * cuts, cuts, number / p.groups, number % p.groups);
  }
}

#endif
