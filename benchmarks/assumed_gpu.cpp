// A CUDA device that torch believes in, on a machine and with a build of torch that have none.
// Tensors of it have shapes and no memory: forward and backward can be traced, nothing can be computed.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

extern "C" int assumed_arch = 90;

namespace {
constexpr auto kType = c10::DeviceType::CUDA;

// Autograd's engine asks for devices, streams and events.
struct Guard : c10::impl::NoOpDeviceGuardImpl<kType> {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(kType, 0)); }
  Device exchangeDevice(Device) const override { return Device(kType, 0); }
  Device getDevice() const override { return Device(kType, 0); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Which attention torch runs there, by what each of them takes.
int64_t choose_attention(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
    std::optional<double>, bool grouped) {
  enum { MATH, FLASH, EFFICIENT, CUDNN };
  const bool narrow = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const bool masked = mask.has_value() && mask->defined();
  if (masked && mask->requires_grad()) return grouped ? MATH : EFFICIENT;
  if (narrow && (assumed_arch == 90 || assumed_arch == 100)) return CUDNN;
  if (narrow && !masked) return FLASH;
  return grouped ? MATH : EFFICIENT;
}
} // namespace

namespace at::native {
static RegisterCUDADispatch<std::remove_reference_t<decltype(_fused_sdp_choice_stub)>> attention_choice(
    _fused_sdp_choice_stub, &choose_attention);
}

// torch finds it by this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void init() const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
