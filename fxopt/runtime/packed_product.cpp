// ``fxopt::packed_product`` on a processor without Python in between, which takes longer than a small product.
//
// Once Python has computed a kind of product by a function of quantized_linear.cpp, it allows that kind
// (`Kind`). Calls of these kinds come from torch's dispatcher here, and go to that function. All others, and
// tensors that do not lie in memory as the function wants them, go to ``fxopt::packed_linear``, which is the
// same in Python.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "product.h"

// What is allowed. `whole`: one scale a row, and no offsets. `in_blocks`: groups begin at multiples of kBlock.
struct Kind {
  const char* format;
  const char* activation;
  const float* table;
  void (*compute)(const Product*);
  int64_t least_tokens, most_tokens;
  int32_t x_number, code, bits, whole, in_blocks;
};

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kBlock = 32;  // columns that codes of 4 bits are padded to, and that panels widen at once

struct Allowed : Kind {
  std::string format_name, activation_name;
};

// Kinds are added, never changed: what is in front of `count` can be read without the lock.
std::array<Allowed, 64> kinds;
std::atomic<size_t> count{0};
std::mutex adding;

// `Number` of wide_numbers.h; -1: none of them.
int32_t number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: return -1;
  }
}

at::ScalarType storage_of(int32_t code) {
  return code == 0 ? at::kByte : code == 1 ? at::kChar : at::kFloat8_e4m3fn;
}

const Kind* find(const Tensor& x, std::string_view format, std::string_view activation, int64_t tokens) {
  const int32_t number = number_of(x);
  for (size_t i = 0, all = count.load(std::memory_order_acquire); i < all; ++i) {
    const Allowed& each = kinds[i];
    const bool within = each.least_tokens <= tokens && tokens <= each.most_tokens;
    if (within && each.x_number == number && each.format_name == format && each.activation_name == activation) {
      return &each;
    }
  }
  return nullptr;
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous();
}

// The tensors lie in memory as `quantized_weight.py` and the function want it.
bool fits(const Kind& kind, const Tensor& x, const Tensor& codes, const Tensor& scales, const Maybe& offsets,
          const Maybe& bias, int64_t group) {
  if (!x.is_contiguous() || codes.dim() != 2 || scales.dim() != 2 || group <= 0) return false;
  const int64_t K = x.size(-1), N = codes.size(0), groups = (K + group - 1) / group;
  const int64_t bytes = kind.bits == 4 ? (K + kBlock - 1) / kBlock * kBlock / 2 : K;
  const bool aligned = !kind.in_blocks || group % kBlock == 0 || groups == 1;
  if (!aligned || codes.scalar_type() != storage_of(kind.code) || !is_matrix(codes, N, bytes)) return false;
  if (kind.whole && (groups != 1 || offsets.has_value())) return false;
  if (number_of(scales) < 0 || !is_matrix(scales, N, groups)) return false;
  if (offsets.has_value() && (number_of(*offsets) < 0 || !is_matrix(*offsets, N, groups))) return false;
  const bool plain = !bias.has_value() || (bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous());
  return plain && (!bias.has_value() || number_of(*bias) >= 0);
}

Tensor in_python(const Tensor& x, const Tensor& codes, const Tensor& scales, const Maybe& offsets,
                 const Maybe& columns, const Maybe& bias, std::string_view format, int64_t group,
                 std::string_view activation) {
  using Op = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                    std::string_view, int64_t, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fxopt::packed_linear", "").typed<Op>();
  at::AutoDispatchBelowADInplaceOrView below;  // as here: nothing is differentiated
  return op.call(x, codes, scales, offsets, columns, bias, format, group, activation);
}

Tensor packed_product(const Tensor& x, const Tensor& codes, const Tensor& scales, const Maybe& offsets,
                      const Maybe& columns, const Maybe& bias, std::string_view format, int64_t group,
                      std::string_view activation) {
  const int64_t K = x.dim() > 0 ? x.size(-1) : 0;
  const int64_t tokens = K > 0 ? x.numel() / K : 0;
  const Kind* kind = tokens > 0 && !columns.has_value() ? find(x, format, activation, tokens) : nullptr;
  if (kind == nullptr || !fits(*kind, x, codes, scales, offsets, bias, group)) {
    return in_python(x, codes, scales, offsets, columns, bias, format, group, activation);
  }
  const int64_t N = codes.size(0);
  auto sizes = x.sizes().vec();
  sizes.back() = N;
  Tensor out(at::detail::empty_cpu(sizes, x.scalar_type()));
  if (N == 0) return out;
  const auto data = [](const Maybe& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; };
  const auto number = [](const Maybe& tensor) { return tensor.has_value() ? number_of(*tensor) : 0; };
  const Product product{
      x.const_data_ptr(), codes.const_data_ptr(), scales.const_data_ptr(), data(offsets), data(bias), kind->table,
      out.mutable_data_ptr(), tokens, N, K, group, scales.size(1), codes.size(1), N,
      kind->x_number, number_of(scales), number(offsets), number(bias), kind->code, at::get_num_threads()};
  kind->compute(&product);
  return out;
}

}  // namespace

extern "C" void fxopt_allow(const Kind* given) {
  const std::lock_guard<std::mutex> lock(adding);
  const size_t next = count.load();
  if (next == kinds.size()) return;
  Allowed& kind = kinds[next];
  static_cast<Kind&>(kind) = *given;
  kind.format_name = given->format;
  kind.activation_name = given->activation;
  count.store(next + 1, std::memory_order_release);
}

TORCH_LIBRARY_IMPL(fxopt, CPU, library) { library.impl("packed_product", packed_product); }
