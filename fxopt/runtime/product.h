// A product with a quantized weight, as the functions of quantized_linear.cpp take it.
//
// Letters: M tokens, N output features, K input features.

#pragma once

#include <cstdint>

// What is passed for each product.
struct Product {
  const void* x;         // (M, K)
  const void* codes;     // (N, bytes of a row)
  const void* scales;    // (N, groups)
  const void* offsets;   // likewise, or null
  const void* bias;      // (N,) or null
  const float* table;    // 16 values of codes of 4 bits
  void* out;             // (M, N), of the dtype of x
  int64_t M, N, K, group, groups, row_bytes;
  int64_t out_stride;    // between rows of `out`
  int32_t x_number, scale_number, offset_number, bias_number, code, threads;
};
