// Operators: those without a kernel of their own run on the CPU over the same bytes, ordered and counted as on a GPU.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "device.h"

const c10::DispatchKeySet CUDA_KEY(c10::DispatchKey::CUDA);

void* base_of(const Tensor& t) {
  return t.has_storage() ? (void*)t.storage().data() : nullptr;
}

// A CPU tensor over the same bytes.
Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(c10::kCPU);
  return t.numel() ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options) : at::empty_strided(t.sizes(), t.strides(), options);
}

Tensor view_of(const c10::Storage& storage, const Tensor& like, int64_t offset) {
  Tensor out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), CUDA_KEY, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return out;
}

// What an operator made on the CPU becomes memory of GPU d.
Tensor on_gpu(const Tensor& made, int d) {
  size_t n = made.storage().nbytes();
  void* p = (void*)made.storage().data();
  c10::DataPtr data(nullptr, Device(c10::kCUDA, d));
  if (p && n) {
    {
      Lock g(mu);
      charge(rounded(n), d);
    }
    data = counted(p, rounded(n), d, made);
  }
  return view_of(c10::Storage(c10::Storage::use_byte_size_t(), n, std::move(data), &gpu_memory, true), made, made.storage_offset());
}

// Hold `mu`. What every operator meets before it runs: errors of earlier calls, and what CUDA loads for its first use.
void launched(const std::string& name, int d, bool waits) {
  return_error(true, waits);
  if (auto it = context_growth.find(name); it != context_growth.end()) {
    gpus[d].context += it->second;
    context_growth.erase(it);
  }
}

// The host waits for the result's size or value.
const std::set<std::string> WAITS = {"aten::_local_scalar_dense", "aten::nonzero",  "aten::equal",   "aten::is_nonzero",
                                     "aten::masked_select",       "aten::_unique2", "aten::bincount"};
// Take tensors of the CPU and of a GPU together.
const std::set<std::string> MIXES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::set_", "aten::is_set_to"};

// While it lives, random numbers come from the device's own generator.
struct DeviceRandomness {
  Lock lock{mu};
  int device;
  at::Generator generator = at::globalContext().defaultGenerator(Device(c10::kCPU));
  Tensor of_host = generator.get_state();

  explicit DeviceRandomness(int device) : device(device) {
    if (rng[device].defined()) generator.set_state(rng[device]);
  }

  ~DeviceRandomness() {
    rng[device] = generator.get_state();
    generator.set_state(of_host);
  }
};

// One call of an operator: its GPU tensors are replaced by CPU tensors over the same bytes, and its results become the GPU's.
struct Call {
  struct Used {
    Tensor gpu, cpu;
    bool written;
  };

  const c10::OperatorHandle& op;
  torch::jit::Stack* stack;
  const std::string name = op.schema().name();
  std::vector<Used> used;
  int device = -1;
  bool waits = WAITS.count(name) > 0;
  std::string stranger;  // another device among the arguments

  Tensor argument(const Tensor& t, bool written) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      if (t.is_cpu() && t.dim()) stranger = "cpu";
      return t;
    }
    if (device < 0)
      device = t.get_device();
    else if (device != t.get_device())
      stranger = t.device().str();
    for (auto& u : used)
      if (u.gpu.is_same(t)) {
        u.written |= written;
        return u.cpu;
      }
    used.push_back({t, on_cpu(t), written});
    return used.back().cpu;
  }

  void take_argument(IValue& v, bool written) {
    if (v.isTensor()) {
      v = argument(v.toTensor(), written);
    } else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (auto& t : list) t = argument(t, written);
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : v.toOptionalTensorList()) {
        if (t && t->defined()) {
          waits |= t->scalar_type() == at::kBool;  // indexing by a mask: how many are true decides the size
          t = argument(*t, written);
        }
        list.push_back(t);
      }
      v = list;
    } else if (v.isDevice() && v.toDevice().is_cuda()) {
      if (device < 0 && v.toDevice().has_index()) device = v.toDevice().index();
      v = Device(c10::kCPU);
    }
  }

  void take_arguments() {
    const auto& arguments = op.schema().arguments();
    const size_t first = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) {
      auto* alias = arguments[i].alias_info();
      take_argument((*stack)[first + i], alias && alias->isWrite());
    }
    if (device < 0) device = device_now;
    TORCH_CHECK(stranger.empty() || MIXES.count(name),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:", device, " and ", stranger, " (",
                name, ", simulated GPU)");
  }

  void order() {
    const std::string line = waits ? where() : "";
    Lock g(mu);
    launched(name, device, waits);
    op_now = name;
    operators[name]++;
    const int s = stream_now[device];
    tick(s);
    if (device != device_now && misplaced.size() < 50)
      misplaced.push_back(name + " on cuda:" + std::to_string(device) + " while the thread's device is cuda:" + std::to_string(device_now));
    for (bool written : {false, true})
      for (auto& u : used)
        if (u.written == written) access(base_of(u.gpu), written, s, name);
    if (waits) {
      host_waits_at[name + " @" + line]++;
      host_waits(s);
    }
  }

  void run() {
    std::optional<DeviceRandomness> random;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) random.emplace(device);
    // XPU stands for any device: it gives a library's composition of other operators, where its kernel for the CPU is another matter.
    const bool composed = name.rfind("aten::", 0) != 0 && op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
    op.redispatchBoxed(c10::DispatchKeySet(composed ? c10::DispatchKey::XPU : c10::DispatchKey::CPU), stack);
  }

  // An operator that resized a tensor it wrote gave its CPU stand-in other memory.
  void take_resized() {
    for (auto& u : used) {
      if (!u.written || (u.cpu.sizes() == u.gpu.sizes() && (!u.gpu.numel() || u.cpu.data_ptr() == u.gpu.data_ptr()))) continue;
      Tensor moved = on_gpu(u.cpu, device);
      auto* impl = u.gpu.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(moved.storage());
      impl->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
    }
  }

  // What was returned: an argument, a view of one, or new memory.
  Tensor result(const Tensor& t) {
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& u : used)
      if (u.cpu.is_same(t)) return u.gpu;
    for (auto& u : used)
      if (u.cpu.has_storage() && t.has_storage() && u.cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return view_of(u.gpu.storage(), t, u.gpu.storage_offset() * (int64_t)u.gpu.itemsize() / (int64_t)t.itemsize() + t.storage_offset());
    Tensor out = on_gpu(t, device);
    Lock g(mu);
    access(base_of(out), true, stream_now[device], name);
    return out;
  }

  void give_results() {
    const size_t count = op.schema().returns().size(), first = stack->size() - count;
    for (size_t i = 0; i < count; i++) {
      IValue& v = (*stack)[first + i];
      if (v.isTensor()) {
        v = result(v.toTensor());
      } else if (v.isTensorList()) {
        auto list = v.toTensorVector();
        for (auto& t : list) t = result(t);
        v = list;
      }
    }
  }
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op, stack};
  call.take_arguments();
  call.order();
  call.run();
  call.take_resized();
  call.give_results();
}

// Copies between host and GPU: one that is not asynchronous, though asked to be, is reported as pageable.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool up = source.is_cpu() && self.is_cuda(), down = source.is_cuda() && self.is_cpu();
  const int d = self.is_cuda() ? self.get_device() : source.get_device();
  const std::string name = up ? "copy to GPU" : down ? "copy to host" : "copy on GPU";
  const Tensor& mem = up ? source : self;
  const bool crosses = (up || down) && mem.numel();
  bool pinned;
  {
    Lock g(mu);
    pinned = crosses && is_pinned(mem.data_ptr());
  }
  const bool cast = crosses && (!mem.is_contiguous() || self.scalar_type() != source.scalar_type());
  const std::string line = crosses ? where() : "";
  {
    Lock g(mu);
    launched("aten::copy_", d, crosses && !non_blocking);
    op_now = "aten::copy_";
    operators[name]++;
    if (crosses) copies[name + " @" + line]++;
    const int s = stream_now[d];
    tick(s);
    if (source.is_cuda() || pinned) access(base_of(source), false, s, name);
    if (self.is_cuda() || pinned) access(base_of(self), true, s, name);
    if (crosses && !non_blocking) {
      host_waits_at["blocking " + name + " @" + line]++;
      host_waits(s);
    } else if (crosses && !pinned) {
      pageable[name + (mem.numel() == 1 ? " of one number @" : " @") + line]++;
      host_waits(s);
    } else if (cast) {
      pageable["pinned, but strided or cast: " + name + " @" + line]++;
      host_waits(s);
    }
  }
  Tensor to = on_cpu(self);
  to.copy_(on_cpu(source));
  return self;
}

using Dtype = std::optional<at::ScalarType>;
using Place = std::optional<Device>;
using Form = std::optional<at::MemoryFormat>;

Tensor empty(at::IntArrayRef size, Dtype dtype, std::optional<at::Layout>, Place place, std::optional<bool>, Form form) {
  c10::DeviceGuard g(place ? *place : Device(c10::kCUDA, device_now));
  op_now = "aten::empty";
  return at::detail::empty_generic(size, &gpu_memory, CUDA_KEY, dtype.value_or(c10::get_default_dtype_as_scalartype()), form);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, std::optional<at::Layout>, Place place,
                     std::optional<bool>) {
  c10::DeviceGuard g(place ? *place : Device(c10::kCUDA, device_now));
  op_now = "aten::empty_strided";
  return at::detail::empty_strided_generic(size, stride, &gpu_memory, CUDA_KEY, dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, Form) {
  auto* impl = self.unsafeGetTensorImpl();
  c10::DeviceGuard g(self.device());
  if ((int64_t)self.storage().nbytes() < (c10::multiply_integers(size) + self.storage_offset()) * (int64_t)self.itemsize()) {
    Tensor more = at::detail::empty_generic(size, &gpu_memory, CUDA_KEY, self.scalar_type(), std::nullopt);
    impl->set_storage_keep_dtype(more.storage());
    impl->set_storage_offset(0);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

void record_stream(Tensor& self, c10::Stream s) {
  Lock g(mu);
  bytes_at[base_of(self)].recorded.insert((int)s.id());
}
