// To PyTorch, a GPU: it is named and counted, has streams, and computes nothing. Tensors of FakeTensorMode can then be on
// it, and autograd runs over them as on a real one. PyTorch built for CUDA has both of its own: hooks are kept by
// priority, and of guards the last one.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

const Device GPU(c10::DeviceType::CUDA, 0);
const Stream STREAM(Stream::DEFAULT, GPU);

struct PretendGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return GPU.type(); }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return STREAM; }
  Stream getDefaultStream(Device) const override { return STREAM; }
  Stream exchangeStream(Stream) const override { return STREAM; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
extern "C" void guard() {
  static const PretendGuard guard;
  c10::impl::DeviceGuardImplRegistrar registered(GPU.type(), &guard);
}

namespace at {
struct PretendHooks final : CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
};
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, PretendHooks)
}  // namespace at
