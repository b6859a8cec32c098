// Device memory with a limit. New device memory is not-a-number.
#pragma once
#include <c10/core/impl/alloc_cpu.h>

#include "pinned.h"

std::map<std::pair<std::string, size_t>, int> blocks_of(int d) {  // (the operator that made it, bytes) -> how many
  std::map<std::pair<std::string, size_t>, int> found;
  for (auto& [p, b] : bytes_at)
    if (b.size && b.device == d) found[{b.by, b.size}]++;
  return found;
}

struct Block {
  void* p;
  size_t n;
  int device;
  Tensor keep;
};

void charge(size_t n, int d) {
  Gpu& gpu = gpus[d];
  bool injected = fail_at >= 0 && ++allocations > fail_at && allocations <= fail_at + fail_count;
  if (injected) failed_in = op_now;
  if (injected || gpu.live + n > gpu.cap || gpu.live + n + gpu.context > gpu.total)
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " + std::to_string(n) + " bytes (simulated GPU)");
  gpu.live += n;
  gpu.blocks++;
  gpu.peak = std::max(gpu.peak, gpu.live);
  contexts["cuda:" + std::to_string(d) + " memory"]++;
}

void drop(void* context) {
  Lock g(mu);
  auto* b = (Block*)context;
  freed(b->p);
  gpus[b->device].live -= b->n;
  gpus[b->device].blocks--;
  if (!b->keep.defined()) c10::free_cpu(b->p);
  delete b;
}

c10::DataPtr counted(void* p, size_t n, int d, Tensor keep) {
  Lock g(mu);
  Bytes b;
  b.stream = stream_now[d];
  b.device = d;
  b.size = n;
  b.by = op_now;
  bytes_at[p] = std::move(b);
  if (gpus[d].live > snapshot_above) {
    snapshot_above = SIZE_MAX;
    snapshot = blocks_of(d);
  }
  return {p, new Block{p, n, d, std::move(keep)}, &drop, Device(c10::kCUDA, d)};
}

size_t rounded(size_t n) {
  return (n + 511) / 512 * 512;
}

struct GpuMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, Device(c10::kCUDA, device_now)};
    {
      Lock g(mu);
      charge(rounded(n), device_now);
    }
    void* p = c10::alloc_cpu(rounded(n));
    memset(p, 0xFF, rounded(n));  // not-a-number: reading what nobody wrote shows
    return counted(p, rounded(n), device_now, {});
  }

  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} gpu_memory;
