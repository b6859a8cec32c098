// A simulated CUDA GPU in host memory, for a CPU build of PyTorch. See README.md.
//
// It takes the dispatch key CUDA, which a CPU build leaves empty: every operator without a kernel of its own here runs on the CPU,
// over the same bytes. What a GPU has and a CPU does not is kept as numbers: streams and events are vector clocks, memory is
// counted for each device, pinned host memory is a table of ranges. Nothing runs late: an order that is not given is found by the
// clocks, not by luck.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace py = pybind11;
using at::Tensor;
using c10::Device;
using c10::IValue;
using Lock = std::lock_guard<std::recursive_mutex>;

constexpr int DEVICES = 4, CLOCKS = 256;  // clock d (below DEVICES) is device d's default stream
using Clock = std::array<uint64_t, CLOCKS>;
struct Gpu { size_t live = 0, peak = 0, cap = SIZE_MAX; long blocks = 0; };
struct Access { int stream = -1; uint64_t at = 0; std::string by; };
struct Bytes {  // of a storage that a stream may use: who wrote last, who read since, and what the allocator knows
  Access wrote; std::map<int, Access> read; std::set<int> recorded; int stream = 0; int device = 0; size_t size = 0; std::string by;
};

std::recursive_mutex mu;
int devices = 1, clocks = DEVICES;
thread_local int device_now = 0;
thread_local std::array<int, DEVICES> stream_now = {0, 1, 2, 3};
thread_local std::string op_now;
std::array<Clock, CLOCKS> clock_of{}; Clock host{};
std::array<int, CLOCKS> device_of{0, 1, 2, 3};
std::array<Gpu, DEVICES> gpus;
std::unordered_map<void*, Bytes> bytes_at;
std::map<char*, size_t> registered, cached;  // by cudaHostRegister, and by torch's caching host allocator
size_t registered_bytes = 0, cached_bytes = 0, pin_cap = SIZE_MAX;
std::vector<std::string> races, misplaced;
std::map<std::string, long> syncs, pageable, ops, contexts;
std::map<std::pair<std::string, size_t>, int> snapshot; size_t snapshot_above = SIZE_MAX;
long allocations = 0, fail_at = -1, fail_count = 0; std::string failed_in;
std::array<at::Tensor, DEVICES> rng;

std::string where() {  // the innermost line of the project that is being run; asked without `mu` held
  py::gil_scoped_acquire gil;
  for (auto frame = py::reinterpret_steal<py::object>((PyObject*)PyThreadState_GetFrame(PyThreadState_Get())); frame && !frame.is_none();
       frame = py::reinterpret_steal<py::object>((PyObject*)PyFrame_GetBack((PyFrameObject*)frame.ptr()))) {
    std::string file = py::str(frame.attr("f_code").attr("co_filename")); auto at = file.rfind("/trainers/");
    if (at != std::string::npos && file.find("/tests/") == std::string::npos)
      return file.substr(at + 10) + ":" + std::to_string(frame.attr("f_lineno").cast<int>());
  }
  return "elsewhere";
}

// ---- order ----
void tick(int s) { for (int i = 0; i < CLOCKS; i++) clock_of[s][i] = std::max(clock_of[s][i], host[i]); clock_of[s][s]++; }
void join(Clock& into, const Clock& from) { for (int i = 0; i < CLOCKS; i++) into[i] = std::max(into[i], from[i]); }
void race(std::string told) { if (races.size() < 200) races.push_back(std::move(told)); }
bool before(const Access& a, const Clock& now) { return a.stream < 0 || now[a.stream] >= a.at; }
std::string named(const Access& a) { return a.by + " (stream " + std::to_string(a.stream) + ")"; }

void access(void* base, bool write, int s, const std::string& by) {
  if (!base) return;
  Bytes& b = bytes_at[base];
  if (!before(b.wrote, clock_of[s])) race(by + " (stream " + std::to_string(s) + ") not ordered after write by " + named(b.wrote));
  if (!write) { b.read[s] = {s, clock_of[s][s], by}; return; }
  for (auto& [t, a] : b.read) if (!before(a, clock_of[s])) race(by + " (stream " + std::to_string(s) + ") writes what " + named(a) + " may still read");
  b.read.clear(); b.wrote = {s, clock_of[s][s], by};
}
void host_access(void* base, bool write, const std::string& by) {
  auto it = bytes_at.find(base);
  if (it == bytes_at.end()) return;
  if (!before(it->second.wrote, host)) race("host's " + by + " while " + named(it->second.wrote) + " may write");
  if (write) for (auto& [t, a] : it->second.read) if (!before(a, host)) race("host's " + by + " while " + named(a) + " may read");
}
void freed(void* base) {  // the caching allocator gives the memory to its own stream again, at once
  auto it = bytes_at.find(base);
  if (it == bytes_at.end()) return;
  Bytes& b = it->second; Clock now = clock_of[b.stream]; join(now, host);
  auto told = [&](const Access& a, const char* how) {
    if (a.stream != b.stream && !before(a, now) && !b.recorded.count(a.stream)) race(std::string("memory of ") + b.by + " is freed while " + named(a) + how);
  };
  told(b.wrote, " may write");
  for (auto& [t, a] : b.read) told(a, " may read");
  bytes_at.erase(it);
}
void host_waits(int s) { join(host, clock_of[s]); }
bool in(const std::map<char*, size_t>& ranges, const void* p) {
  auto it = ranges.upper_bound((char*)p);
  return it != ranges.begin() && (--it, (char*)p < it->first + it->second);
}
bool is_pinned(const void* p) { return in(registered, p) || in(cached, p); }

// ---- memory ----
std::map<std::pair<std::string, size_t>, int> blocks_of(int d) {  // (the operator that made it, bytes) -> how many
  std::map<std::pair<std::string, size_t>, int> found;
  for (auto& [p, b] : bytes_at) if (b.size && b.device == d) found[{b.by, b.size}]++;
  return found;
}
struct Block { void* p; size_t n; int device; Tensor keep; };
void charge(size_t n, int d) {
  Gpu& gpu = gpus[d]; bool injected = fail_at >= 0 && ++allocations > fail_at && allocations <= fail_at + fail_count;
  if (injected) failed_in = op_now;
  if (injected || gpu.live + n > gpu.cap)
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " + std::to_string(n) + " bytes (simulated GPU)");
  gpu.live += n; gpu.blocks++; gpu.peak = std::max(gpu.peak, gpu.live); contexts["cuda:" + std::to_string(d) + " memory"]++;
}
void drop(void* context) {
  Lock g(mu); auto* b = (Block*)context; freed(b->p); gpus[b->device].live -= b->n; gpus[b->device].blocks--;
  if (!b->keep.defined()) c10::free_cpu(b->p);
  delete b;
}
c10::DataPtr counted(void* p, size_t n, int d, Tensor keep) {
  Lock g(mu); Bytes b; b.stream = stream_now[d]; b.device = d; b.size = n; b.by = op_now; bytes_at[p] = std::move(b);
  if (gpus[d].live > snapshot_above) { snapshot_above = SIZE_MAX; snapshot = blocks_of(d); }
  return {p, new Block{p, n, d, std::move(keep)}, &drop, Device(c10::kCUDA, d)};
}
size_t rounded(size_t n) { return (n + 511) / 512 * 512; }
struct GpuMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, Device(c10::kCUDA, device_now)};
    { Lock g(mu); charge(rounded(n), device_now); }
    void* p = c10::alloc_cpu(rounded(n)); memset(p, 0xFF, rounded(n));  // not-a-number: reading what nobody wrote shows
    return counted(p, rounded(n), device_now, {});
  }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} gpu_memory;
struct PinnedMemory final : c10::Allocator {  // torch's own pinned tensors: powers of two, kept until they are asked for again
  c10::DataPtr allocate(size_t n) override {
    Lock g(mu); void* p = c10::alloc_cpu(std::max<size_t>(n, 1)); cached[(char*)p] = std::max<size_t>(n, 1); cached_bytes += std::max<size_t>(n, 1);
    return {p, p, [](void* q) { Lock g(mu); cached_bytes -= cached[(char*)q]; cached.erase((char*)q); bytes_at.erase(q); c10::free_cpu(q); }, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} pinned_memory;

// ---- what autograd and torch's core ask of a device ----
void use(int d) { if (d >= 0 && d != device_now) { device_now = d; Lock g(mu); contexts["cuda:" + std::to_string(d) + " current"]++; } }
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device d) const override { Device o = getDevice(); use(d.index()); return o; }
  Device getDevice() const override { return Device(c10::kCUDA, device_now); } void setDevice(Device d) const override { use(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { use(d.index()); }
  c10::Stream getStream(Device d) const override { int i = d.has_index() ? d.index() : device_now; return c10::Stream(c10::Stream::UNSAFE, Device(c10::kCUDA, i), stream_now[i]); }
  c10::Stream getDefaultStream(Device d) const override { return c10::Stream(c10::Stream::UNSAFE, d, d.index()); }
  c10::Stream exchangeStream(c10::Stream s) const override { auto o = getStream(s.device()); stream_now[s.device_index()] = (int)s.id(); return o; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override { Lock g(mu); if (!*e) *e = new Clock(); tick((int)s.id()); *(Clock*)*e = clock_of[s.id()]; }
  void block(void* e, const c10::Stream& s) const override { Lock g(mu); if (e) join(clock_of[s.id()], *(Clock*)e); }
  bool queryEvent(void*) const override { return true; } void synchronizeEvent(void* e) const override { Lock g(mu); if (e) join(host, *(Clock*)e); }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete (Clock*)e; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
namespace at {
struct SimulatedHooks : CUDAHooksInterface {
  SimulatedHooks(CUDAHooksArgs) {} void init() const override {} bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; } bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; } DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; } DeviceIndex current_device() const override { return device_now; }
  DeviceIndex getCurrentDevice() const override { return device_now; } void setCurrentDevice(DeviceIndex d) const override { use(d); }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto o = device_now; use(d); return o; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { auto o = device_now; use(d); return o; }
  bool isPinnedPtr(const void* p) const override { Lock g(mu); return is_pinned(p); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Device getDeviceFromPtr(void* p) const override { Lock g(mu); auto it = bytes_at.find(p); return Device(kCUDA, it == bytes_at.end() ? 0 : it->second.device); }
};
using CUDAHooks = SimulatedHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", SimulatedHooks);
}  // namespace at

// ---- operators ----
const c10::DispatchKeySet CUDA_KEY(c10::DispatchKey::CUDA);
void* base_of(const Tensor& t) { return t.has_storage() ? (void*)t.storage().data() : nullptr; }
Tensor on_cpu(const Tensor& t) {  // the same bytes as a CPU tensor
  if (!t.defined() || !t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(c10::kCPU);
  return t.numel() ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options) : at::empty_strided(t.sizes(), t.strides(), options);
}
Tensor view_of(const c10::Storage& storage, const Tensor& like, int64_t offset) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), CUDA_KEY, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return out;
}
Tensor on_gpu(const Tensor& made, int d) {  // what an operator made on the CPU becomes the GPU's memory
  size_t n = made.storage().nbytes(); void* p = (void*)made.storage().data(); c10::DataPtr data(nullptr, Device(c10::kCUDA, d));
  if (p && n) { { Lock g(mu); charge(rounded(n), d); } data = counted(p, rounded(n), d, made); }
  return view_of(c10::Storage(c10::Storage::use_byte_size_t(), n, std::move(data), &gpu_memory, true), made, made.storage_offset());
}
const std::set<std::string> WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"};
const std::set<std::string> WHOLE = {"aten::convolution", "aten::convolution_backward"};  // as by cuDNN: no columns of an unfolded video
const std::set<std::string> MIXES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::set_", "aten::is_set_to"};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema(); const std::string name = schema.name();
  const size_t given = schema.arguments().size(), first = stack->size() - given; struct Used { Tensor gpu, cpu; bool written; };
  std::vector<Used> used; int d = -1; bool by_mask = false; std::string stranger;
  auto one = [&](const Tensor& t, bool written) -> Tensor {
    if (!t.defined()) return t;
    if (!t.is_cuda()) { if (t.is_cpu() && t.dim()) stranger = "cpu"; return t; }
    if (d < 0) d = t.get_device(); else if (d != t.get_device()) stranger = t.device().str();
    for (auto& u : used) if (u.gpu.is_same(t)) { u.written |= written; return u.cpu; }
    used.push_back({t, on_cpu(t), written});
    return used.back().cpu;
  };
  for (size_t i = 0; i < given; i++) {
    IValue& v = (*stack)[first + i]; auto* alias = schema.arguments()[i].alias_info(); bool written = alias && alias->isWrite();
    if (v.isTensor()) v = one(v.toTensor(), written);
    else if (v.isTensorList()) { auto list = v.toTensorVector(); for (auto& t : list) t = one(t, written); v = list; }
    else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : v.toOptionalTensorList()) { if (t && t->defined()) { by_mask |= t->scalar_type() == at::kBool; t = one(*t, written); } list.push_back(t); }
      v = list;
    } else if (v.isDevice() && v.toDevice().is_cuda()) { if (d < 0 && v.toDevice().has_index()) d = v.toDevice().index(); v = Device(c10::kCPU); }
  }
  if (d < 0) d = device_now;
  TORCH_CHECK(stranger.empty() || MIXES.count(name), "Expected all tensors to be on the same device, but found at least two devices, cuda:", d, " and ", stranger, " (", name, ", simulated GPU)");
  const bool waits = WAITS.count(name) || by_mask; const std::string line = waits ? where() : ""; std::optional<at::Tensor> host_rng;
  std::unique_lock<std::recursive_mutex> draws(mu, std::defer_lock);
  { Lock g(mu);
    op_now = name; ops[name]++; const int s = stream_now[d]; tick(s);
    if (d != device_now && misplaced.size() < 50) misplaced.push_back(name + " on cuda:" + std::to_string(d) + " while the thread's device is cuda:" + std::to_string(device_now));
    for (auto& u : used) if (!u.written) access(base_of(u.gpu), false, s, name);
    for (auto& u : used) if (u.written) access(base_of(u.gpu), true, s, name);
    if (waits) { syncs[name + " @" + line]++; host_waits(s); } }
  if (op.hasTag(at::Tag::nondeterministic_seeded)) {  // the device draws from a generator of its own
    draws.lock(); auto generator = at::globalContext().defaultGenerator(Device(c10::kCPU));
    host_rng = generator.get_state(); if (rng[d].defined()) generator.set_state(rng[d]);
  }
  try { op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack); }
  catch (...) { if (host_rng) { auto generator = at::globalContext().defaultGenerator(Device(c10::kCPU)); generator.set_state(*host_rng); } throw; }
  if (host_rng) { auto generator = at::globalContext().defaultGenerator(Device(c10::kCPU)); rng[d] = generator.get_state(); generator.set_state(*host_rng); draws.unlock(); }
  for (auto& u : used) if (u.written && (u.cpu.sizes() != u.gpu.sizes() || (u.gpu.numel() && u.cpu.data_ptr() != u.gpu.data_ptr()))) {  // resized
    Tensor moved = on_gpu(u.cpu, d); auto* impl = u.gpu.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(moved.storage()); impl->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  }
  auto back = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& u : used) if (u.cpu.is_same(t)) return u.gpu;
    for (auto& u : used) if (u.cpu.has_storage() && t.has_storage() && u.cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
      return view_of(u.gpu.storage(), t, u.gpu.storage_offset() * (int64_t)u.gpu.itemsize() / (int64_t)t.itemsize() + t.storage_offset());
    Tensor out = on_gpu(t, d); Lock g(mu); access(base_of(out), true, stream_now[d], name); return out;
  };
  const size_t returned = schema.returns().size(), last = stack->size() - returned;
  for (size_t i = 0; i < returned; i++) {
    IValue& v = (*stack)[last + i];
    if (v.isTensor()) v = back(v.toTensor());
    else if (v.isTensorList()) { auto list = v.toTensorVector(); for (auto& t : list) t = back(t); v = list; }
  }
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool up = source.is_cpu() && self.is_cuda(), down = source.is_cuda() && self.is_cpu();
  const int d = self.is_cuda() ? self.get_device() : source.get_device();
  const std::string name = up ? "copy to GPU" : down ? "copy to host" : "copy on GPU";
  const Tensor& mem = up ? source : self; const bool crosses = (up || down) && mem.numel();
  bool pinned; { Lock g(mu); pinned = crosses && is_pinned(mem.data_ptr()); }
  const bool cast = crosses && (!mem.is_contiguous() || self.scalar_type() != source.scalar_type());
  const std::string line = crosses && (!non_blocking || !pinned || cast) ? where() : "";
  { Lock g(mu);
    op_now = "aten::copy_"; ops[name]++; const int s = stream_now[d]; tick(s);
    if (source.is_cuda() || pinned) access(base_of(source), false, s, name);
    if (self.is_cuda() || pinned) access(base_of(self), true, s, name);
    if (crosses && !non_blocking) { syncs["blocking " + name + " @" + line]++; host_waits(s); }
    else if (crosses && !pinned) { pageable[name + (mem.numel() == 1 ? " of one number @" : " @") + line]++; host_waits(s); }
    else if (cast) { pageable["pinned, but strided or cast: " + name + " @" + line]++; host_waits(s); } }
  Tensor to = on_cpu(self); to.copy_(on_cpu(source));
  return self;
}
using Dtype = std::optional<at::ScalarType>; using Place = std::optional<Device>; using Form = std::optional<at::MemoryFormat>;
Tensor empty(at::IntArrayRef size, Dtype dtype, std::optional<at::Layout>, Place place, std::optional<bool>, Form form) {
  c10::DeviceGuard g(place ? *place : Device(c10::kCUDA, device_now)); op_now = "aten::empty";
  return at::detail::empty_generic(size, &gpu_memory, CUDA_KEY, dtype.value_or(c10::get_default_dtype_as_scalartype()), form);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, std::optional<at::Layout>, Place place, std::optional<bool>) {
  c10::DeviceGuard g(place ? *place : Device(c10::kCUDA, device_now)); op_now = "aten::empty_strided";
  return at::detail::empty_strided_generic(size, stride, &gpu_memory, CUDA_KEY, dtype.value_or(c10::get_default_dtype_as_scalartype()));
}
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, Form) {
  auto* impl = self.unsafeGetTensorImpl(); c10::DeviceGuard g(self.device());
  if ((int64_t)self.storage().nbytes() < (c10::multiply_integers(size) + self.storage_offset()) * (int64_t)self.itemsize()) {
    Tensor more = at::detail::empty_generic(size, &gpu_memory, CUDA_KEY, self.scalar_type(), std::nullopt);
    impl->set_storage_keep_dtype(more.storage()); impl->set_storage_offset(0);
  }
  impl->set_sizes_contiguous(size);
  return self;
}
void record_stream(Tensor& self, c10::Stream s) { Lock g(mu); bytes_at[base_of(self)].recorded.insert((int)s.id()); }

// Attention without a matrix of all pairs, as on a GPU: the CPU's flash kernel under the name of the memory-efficient one.
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double dropout, bool, std::optional<double>, bool) {
  return dropout > 0 ? 0 : 2;  // math, efficient_attention
}
void touch(std::initializer_list<Tensor> read, const std::string& name, int d) {
  Lock g(mu); op_now = name; ops[name]++; tick(stream_now[d]);
  for (auto& t : read) if (t.defined() && t.is_cuda()) access(base_of(t), false, stream_now[d], name);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, bool, double dropout, bool causal, std::optional<double> scale) {
  const int d = q.get_device(); touch({q, k, v, bias.value_or(Tensor())}, "attention", d); std::optional<Tensor> mask; if (bias) mask = on_cpu(*bias);
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(q), on_cpu(k), on_cpu(v), dropout, causal, mask, scale);
  Tensor none = at::empty({}, q.options().dtype(at::kLong));
  return {on_gpu(out, d), on_gpu(lse, d), none, none};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out, const Tensor& lse,
                                                              const Tensor&, const Tensor&, double dropout, std::array<bool, 4>, bool causal, std::optional<double> scale) {
  const int d = q.get_device(); touch({grad, q, k, v, bias, out, lse}, "attention backward", d);
  std::optional<Tensor> mask; if (bias.defined()) mask = on_cpu(bias);
  // A GPU's kernels add up the query's gradient in float32, in tiles of 128 rows, unless it is float32 itself, and keep a number for each row.
  const auto tile = [](int64_t n, int64_t by) { return (n + by - 1) / by * by; }; const auto more = q.options().dtype(at::kFloat);
  Tensor sums, rows = at::empty({q.size(0), q.size(1), q.size(2)}, more);
  if (q.scalar_type() != at::kFloat) sums = at::empty({q.size(0), q.size(1), tile(q.size(2), 128), tile(q.size(3), 32)}, more);
  op_now = "attention backward";
  auto [a, b, c] = at::_scaled_dot_product_flash_attention_for_cpu_backward(on_cpu(grad), on_cpu(q), on_cpu(k), on_cpu(v), on_cpu(out), on_cpu(lse), dropout, causal, mask, scale);
  return {on_gpu(a, d), on_gpu(b, d), on_gpu(c, d), Tensor()};
}
// RMS norm, which is one kernel on a GPU and many operators on a CPU.
std::vector<int64_t> dims_of(const Tensor& x, at::IntArrayRef shape, bool last) {
  std::vector<int64_t> found; const int64_t split = x.dim() - (int64_t)shape.size();
  for (int64_t i = last ? split : 0; i < (last ? x.dim() : split); i++) found.push_back(i);
  return found;
}
std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, at::IntArrayRef shape, const std::optional<Tensor>& weight, std::optional<double> eps) {
  const int d = input.get_device(); touch({input, weight.value_or(Tensor())}, "rms norm", d);
  Tensor x = on_cpu(input).to(at::kFloat), rstd = (x.square().mean(dims_of(x, shape, true), true) + eps.value_or(1.2e-7)).rsqrt(), y = x * rstd;
  if (weight && weight->defined()) y = y * on_cpu(*weight).to(at::kFloat);
  return {on_gpu(y.to(input.scalar_type()), d), on_gpu(rstd, d)};
}
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, at::IntArrayRef shape, const Tensor& rstd, const std::optional<Tensor>& weight, std::array<bool, 2> mask) {
  const int d = input.get_device(); touch({grad, input, rstd, weight.value_or(Tensor())}, "rms norm backward", d);
  const bool weighted = weight && weight->defined();
  Tensor go = on_cpu(grad).to(at::kFloat), r = on_cpu(rstd), n = on_cpu(input).to(at::kFloat) * r, g = weighted ? go * on_cpu(*weight).to(at::kFloat) : go, dx, dw;
  if (mask[0]) dx = on_gpu((r * (g - n * (g * n).mean(dims_of(n, shape, true), true))).to(input.scalar_type()), d);
  if (mask[1] && weighted) { auto rows = dims_of(n, shape, false); dw = on_gpu((rows.empty() ? go * n : (go * n).sum(rows)).to(weight->scalar_type()), d); }
  return {dx, dw};
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty)); m.impl("empty_strided", TORCH_FN(empty_strided)); m.impl("resize_", TORCH_FN(resize_));
  m.impl("copy_", TORCH_FN(copy_)); m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("view", TORCH_FN(static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(at::native::view)));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl)); m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold)); m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("_fused_rms_norm", TORCH_FN(rms_norm)); m.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
  m.impl("_scaled_dot_product_efficient_attention", TORCH_FN(attention));
  m.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(attention_backward));
}

// An operator that has a kernel for the CPU and a composition of others too is not composed here, nor on a GPU: parts take memory.
void run_whole() {
  static torch::Library whole(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    bool composed = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) || op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
    if ((composed && op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) || WHOLE.count(name.name))
      whole.impl((name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name)).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

std::vector<uint64_t> listed(const Clock& c) { return {c.begin(), c.end()}; }
Clock clock_from(const std::vector<uint64_t>& v) { Clock c; std::copy(v.begin(), v.end(), c.begin()); return c; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  run_whole(); at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  m.def("there", [] { return at::detail::getCUDAHooks().hasCUDA(); }); m.def("devices", [] { return devices; });
  m.def("set_devices", [](int n) { devices = n; }); m.def("get_device", [] { return device_now; }); m.def("set_device", [](int d) { use(d); });
  m.def("new_stream", [](int d) { Lock g(mu); int s = clocks < CLOCKS ? clocks++ : DEVICES + clocks++ % (CLOCKS - DEVICES); device_of[s] = d; return s; });
  m.def("get_stream", [](int d) { return stream_now[d]; }); m.def("set_stream", [](int s) { use(device_of[s]); stream_now[device_of[s]] = s; });
  m.def("stream_device", [](int s) { return device_of[s]; }); m.def("record", [](int s) { Lock g(mu); tick(s); return listed(clock_of[s]); });
  m.def("wait", [](int s, const std::vector<uint64_t>& e) { Lock g(mu); join(clock_of[s], clock_from(e)); });
  m.def("host_waits_event", [](const std::vector<uint64_t>& e) { Lock g(mu); join(host, clock_from(e)); });
  m.def("host_waits_all", [](int d) { auto line = where(); Lock g(mu); syncs["synchronize @" + line]++; for (int s = 0; s < CLOCKS; s++) if (d < 0 || device_of[s] == d) host_waits(s); });
  m.def("host_access", [](const Tensor& t, bool write, const std::string& by) { Lock g(mu); host_access(base_of(t), write, by); });
  m.def("register_host", [](size_t p, size_t n) {
    Lock g(mu); auto next = registered.lower_bound((char*)p);
    if (registered_bytes + n > pin_cap) return 2;
    if (in(registered, (void*)p) || (next != registered.end() && next->first < (char*)p + n)) return 712;
    registered[(char*)p] = n; registered_bytes += n; return 0; });
  m.def("unregister_host", [](size_t p) {
    Lock g(mu); auto it = registered.find((char*)p); if (it == registered.end()) return 713;
    for (auto& [base, b] : bytes_at) if ((char*)base >= it->first && (char*)base < it->first + it->second) host_access(base, true, "cudaHostUnregister");
    registered_bytes -= it->second; registered.erase(it); return 0; });
  m.def("memory", [](int d) { Lock g(mu); return std::vector<size_t>{gpus[d].live, gpus[d].peak, gpus[d].cap, (size_t)gpus[d].blocks}; });
  m.def("reset_peak", [](int d) { Lock g(mu); gpus[d].peak = gpus[d].live; }); m.def("cap", [](size_t n, int d) { Lock g(mu); gpus[d].cap = n; });
  m.def("fail_allocations", [](long after, long count) { Lock g(mu); allocations = 0; fail_at = after; fail_count = count; failed_in = ""; });
  m.def("allocations", [] { return allocations; }); m.def("failed_in", [] { return failed_in; });
  m.def("pinned", [] { Lock g(mu); return std::vector<size_t>{registered_bytes, cached_bytes}; }); m.def("limit_pinned", [](size_t n) { pin_cap = n; });
  m.def("live_blocks", [](int d) { Lock g(mu); return blocks_of(d); });
  m.def("snapshot_above", [](size_t n) { snapshot_above = n; }); m.def("snapshot", [] { Lock g(mu); return snapshot; });
  m.def("rng", [](int d) { return rng[d].defined() ? rng[d].clone() : at::globalContext().defaultGenerator(Device(c10::kCPU)).get_state(); });
  m.def("set_rng", [](const Tensor& state, int d) { rng[d] = state.clone(); });
  m.def("report", [] { Lock g(mu); py::dict all; all["races"] = races; all["misplaced"] = misplaced; all["host_waits"] = syncs; all["pageable"] = pageable; all["operators"] = ops; all["contexts"] = contexts; return all; });
  m.def("clear_report", [] { Lock g(mu); races.clear(); misplaced.clear(); syncs.clear(); pageable.clear(); ops.clear(); contexts.clear(); });
}
