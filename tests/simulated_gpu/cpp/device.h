// What autograd and torch's core ask of a device: the device guard and CUDA's hooks.
#pragma once
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

void use(int d) {
  if (d >= 0 && d != device_now) {
    device_now = d;
    Lock g(mu);
    contexts["cuda:" + std::to_string(d) + " current"]++;
  }
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }

  Device exchangeDevice(Device d) const override {
    Device o = getDevice();
    use(d.index());
    return o;
  }

  Device getDevice() const override { return Device(c10::kCUDA, device_now); }

  void setDevice(Device d) const override { use(d.index()); }

  void uncheckedSetDevice(Device d) const noexcept override { use(d.index()); }

  c10::Stream getStream(Device d) const override {
    int i = d.has_index() ? d.index() : device_now;
    return c10::Stream(c10::Stream::UNSAFE, Device(c10::kCUDA, i), stream_now[i]);
  }

  c10::Stream getDefaultStream(Device d) const override { return c10::Stream(c10::Stream::UNSAFE, d, d.index()); }

  c10::Stream exchangeStream(c10::Stream s) const override {
    auto o = getStream(s.device());
    stream_now[s.device_index()] = (int)s.id();
    return o;
  }

  c10::DeviceIndex deviceCount() const noexcept override { return devices; }

  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock g(mu);
    if (!*e) *e = new Clock();
    tick((int)s.id());
    *(Clock*)*e = clock_of[s.id()];
  }

  void block(void* e, const c10::Stream& s) const override {
    Lock g(mu);
    if (e) join(clock_of[s.id()], *(Clock*)e);
  }

  bool queryEvent(void*) const override { return true; }

  void synchronizeEvent(void* e) const override {
    Lock g(mu);
    if (e) join(host, *(Clock*)e);
  }

  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete (Clock*)e; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
struct SimulatedHooks : CUDAHooksInterface {
  SimulatedHooks(CUDAHooksArgs) {}

  void init() const override {}

  bool hasCUDA() const override { return true; }

  bool isBuilt() const override { return true; }

  bool isAvailable() const override { return true; }

  bool hasPrimaryContext(DeviceIndex) const override { return true; }

  DeviceIndex deviceCount() const override { return devices; }

  int getNumGPUs() const override { return devices; }

  DeviceIndex current_device() const override { return device_now; }

  DeviceIndex getCurrentDevice() const override { return device_now; }

  void setCurrentDevice(DeviceIndex d) const override { use(d); }

  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    auto o = device_now;
    use(d);
    return o;
  }

  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override {
    auto o = device_now;
    device_now = d;
    return o;
  }

  bool isPinnedPtr(const void* p) const override {
    Lock g(mu);
    return is_pinned(p);
  }

  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }

  Device getDeviceFromPtr(void* p) const override {
    Lock g(mu);
    auto it = bytes_at.find(p);
    return Device(kCUDA, it == bytes_at.end() ? 0 : it->second.device);
  }
};

using CUDAHooks = SimulatedHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", SimulatedHooks);
}  // namespace at
