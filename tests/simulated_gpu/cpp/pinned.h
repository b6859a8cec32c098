// Pinned host memory with CUDA's rules: a limit, ranges that may not overlap, errors that come back later.
#pragma once
#include <c10/core/impl/alloc_cpu.h>

#include "order.h"

bool in(const std::map<char*, size_t>& ranges, const void* p) {
  auto it = ranges.upper_bound((char*)p);
  return it != ranges.begin() && (--it, (char*)p < it->first + it->second);
}

bool is_pinned(const void* p) {
  return in(registered, p) || in(cached, p);
}

bool may_pin(size_t n) {
  return registered_bytes + cached_bytes + n <= pin_cap;
}

int refused(int code) {
  error_at_launch = error_at_wait = true;
  return code;
}

// Hold `mu`. An operator is launched, or the host waits: an earlier error is returned here, once.
void return_error(bool launches, bool waits) {
  bool& found = launches && error_at_launch ? error_at_launch : error_at_wait;
  if (!found || (&found == &error_at_wait && !waits)) return;
  found = false;
  TORCH_CHECK(false, "CUDA error: out of memory (simulated GPU: of an earlier call)");
}

int register_host(char* p, size_t n) {  // 2: there is no memory, 712: it is registered already
  auto next = registered.lower_bound(p);
  if (!may_pin(n)) return refused(2);
  if (in(registered, p) || (next != registered.end() && next->first < p + n)) return refused(712);
  registered[p] = n;
  registered_bytes += n;
  most_registered_bytes = std::max(most_registered_bytes, registered_bytes);
  registrations++;
  return 0;
}

int unregister_host(char* p) {  // 713: it was not registered
  auto it = registered.find(p);
  if (it == registered.end()) return 713;
  for (auto& [base, b] : bytes_at)
    if ((char*)base >= it->first && (char*)base < it->first + it->second) host_access(base, true, "cudaHostUnregister");
  registered_bytes -= it->second;
  registered.erase(it);
  return 0;
}

struct PinnedMemory final : c10::Allocator {  // torch's own pinned tensors: powers of two, kept until they are asked for again
  static size_t whole(size_t n) {
    size_t size = 512;
    while (size < n) size *= 2;
    return size;
  }

  c10::DataPtr allocate(size_t n) override {
    Lock g(mu);
    const size_t size = whole(n);
    char* p = nullptr;
    if (auto idle = idle_cached.find(size); idle != idle_cached.end()) {
      p = idle->second;
      idle_cached.erase(idle);
    } else {
      TORCH_CHECK(may_pin(size), "CUDA error: out of memory");  // cudaHostAlloc's words, which are cudaMalloc's too
      p = (char*)c10::alloc_cpu(size);
      cached[p] = size;
      cached_bytes += size;
    }
    return {p, p, &keep, Device(c10::kCPU)};
  }

  static void keep(void* p) {
    Lock g(mu);
    bytes_at.erase(p);
    idle_cached.emplace(cached[(char*)p], (char*)p);
  }

  static void empty_cache() {
    for (auto& [size, p] : idle_cached) {
      cached.erase(p);
      cached_bytes -= size;
      c10::free_cpu(p);
    }
    idle_cached.clear();
  }

  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} pinned_memory;
