// A simulated CUDA GPU in host memory, for a CPU build of PyTorch. See README.md.
//
// It takes the dispatch key CUDA, which a CPU build leaves empty: every operator without a kernel of its own here runs on the CPU,
// over the same bytes. What a GPU has and a CPU does not is kept as numbers: streams and events are vector clocks, memory is
// counted for each device, pinned host memory is a table of ranges. Nothing runs late: a missing order is found by the clocks.
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "kernels.h"

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("view", TORCH_FN(static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(at::native::view)));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("_fused_rms_norm", TORCH_FN(rms_norm));
  m.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
  m.impl("_scaled_dot_product_efficient_attention", TORCH_FN(attention));
  m.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(attention_backward));
}

// As cuDNN does them: no columns of an unfolded video.
const std::set<std::string> WHOLE = {"aten::convolution", "aten::convolution_backward"};

// An operator that has both a CPU kernel and a composition of other operators is not composed here, as on a GPU: the parts take memory.
void run_whole() {
  static torch::Library whole(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    bool composed = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
                    op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional);
    if ((composed && op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) || WHOLE.count(name.name))
      whole.impl((name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name)).c_str(),
                 torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

// An operator of another library, which has a kernel for CUDA and composes others elsewhere.
void run_whole_of(const std::string& library, const std::string& name) {
  static std::vector<torch::Library> libraries;
  libraries.emplace_back(torch::Library::IMPL, library, c10::DispatchKey::CUDA, __FILE__, __LINE__);
  libraries.back().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

std::vector<uint64_t> as_list(const Clock& c) {
  return {c.begin(), c.end()};
}

Clock clock_from(const std::vector<uint64_t>& v) {
  Clock c;
  std::copy(v.begin(), v.end(), c.begin());
  return c;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  run_whole();
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  m.def("run_whole", &run_whole_of);
  m.def("there", [] { return at::detail::getCUDAHooks().hasCUDA(); });
  m.def("devices", [] { return devices; });
  m.def("set_devices", [](int n) { devices = n; });
  m.def("get_device", [] { return device_now; });
  m.def("set_device", [](int d) { use(d); });
  m.def("maybe_set_device", [](int d) { device_now = d; });  // as CUDA's: makes no context
  m.def("new_stream", [](int d) {
    Lock g(mu);
    streams_made++;
    int s = clocks < CLOCKS ? clocks++ : DEVICES + clocks++ % (CLOCKS - DEVICES);
    device_of[s] = d;
    return s;
  });
  m.def("get_stream", [](int d) { return stream_now[d]; });
  m.def("set_stream", [](int s) {
    use(device_of[s]);
    stream_now[device_of[s]] = s;
  });
  m.def("stream_device", [](int s) { return device_of[s]; });
  m.def("record", [](int s) {
    Lock g(mu);
    tick(s);
    return as_list(clock_of[s]);
  });
  m.def("wait", [](int s, const std::vector<uint64_t>& e) {
    Lock g(mu);
    join(clock_of[s], clock_from(e));
  });
  m.def("host_waits_event", [](const std::vector<uint64_t>& e) {
    Lock g(mu);
    return_error(false, true);
    join(host, clock_from(e));
  });
  m.def("host_waits_all", [](int d) {
    auto line = where();
    Lock g(mu);
    host_waits_at["synchronize @" + line]++;
    return_error(false, true);
    for (int s = 0; s < CLOCKS; s++)
      if (d < 0 || device_of[s] == d) host_waits(s);
  });
  m.def("host_access", [](const Tensor& t, bool write, const std::string& by) {
    Lock g(mu);
    host_access(base_of(t), write, by);
  });
  m.def("register_host", [](size_t p, size_t n) {
    Lock g(mu);
    return register_host((char*)p, n);
  });
  m.def("unregister_host", [](size_t p) {
    Lock g(mu);
    return unregister_host((char*)p);
  });
  m.def("memory", [](int d) {
    Lock g(mu);
    return std::vector<size_t>{gpus[d].live, gpus[d].peak, gpus[d].cap, (size_t)gpus[d].blocks};
  });
  m.def("reset_peak", [](int d) {
    Lock g(mu);
    gpus[d].peak = gpus[d].live;
  });
  m.def("cap", [](size_t n, int d) {
    Lock g(mu);
    gpus[d].cap = n;
  });
  m.def("fail_allocations", [](long after, long count) {
    Lock g(mu);
    allocations = 0;
    fail_at = after;
    fail_count = count;
    failed_in = "";
  });
  m.def("allocations", [] { return allocations; });
  m.def("failed_in", [] { return failed_in; });
  m.def("pinned", [] {
    Lock g(mu);
    return std::vector<size_t>{registered_bytes, cached_bytes, (size_t)registrations, most_registered_bytes};
  });
  m.def("limit_pinned", [](size_t n) { pin_cap = n; });
  m.def("empty_host_cache", [] {
    Lock g(mu);
    PinnedMemory::empty_cache();
  });
  m.def("grow_context", [](const std::map<std::string, size_t>& bytes_of) {
    Lock g(mu);
    context_growth = bytes_of;
    for (auto& gpu : gpus) gpu.context = 0;
  });
  m.def("context", [](int d) { return gpus[d].context; });
  m.def("set_total", [](size_t n, int d) { gpus[d].total = n; });
  m.def("live_blocks", [](int d) {
    Lock g(mu);
    return blocks_of(d);
  });
  m.def("snapshot_above", [](size_t n) { snapshot_above = n; });
  m.def("snapshot", [] {
    Lock g(mu);
    return snapshot;
  });
  m.def("rng",
        [](int d) { return rng[d].defined() ? rng[d].clone() : at::globalContext().defaultGenerator(Device(c10::kCPU)).get_state(); });
  m.def("set_rng", [](const Tensor& state, int d) { rng[d] = state.clone(); });
  m.def("report", [] {
    Lock g(mu);
    py::dict all;
    all["races"] = races;
    all["misplaced"] = misplaced;
    all["host_waits"] = host_waits_at;
    all["copies"] = copies;
    all["pageable"] = pageable;
    all["streams_made"] = streams_made;
    all["operators"] = operators;
    all["contexts"] = contexts;
    return all;
  });
  m.def("clear_report", [] {
    Lock g(mu);
    races.clear();
    misplaced.clear();
    host_waits_at.clear();
    copies.clear();
    pageable.clear();
    streams_made = 0;
    operators.clear();
    contexts.clear();
    registrations = 0;
    most_registered_bytes = registered_bytes;
    error_at_launch = error_at_wait = false;
  });
}
