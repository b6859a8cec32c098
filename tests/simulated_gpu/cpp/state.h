// What the simulated GPUs know: their clocks, memory, and the report. All of it is guarded by `mu`.
#pragma once
#include <torch/extension.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace py = pybind11;
using at::Tensor;
using c10::Device;
using c10::IValue;

constexpr int DEVICES = 4;
constexpr int CLOCKS = 256;  // one for each stream; clock d (below DEVICES) is device d's default stream
using Clock = std::array<uint64_t, CLOCKS>;

struct Gpu {
  size_t live = 0, peak = 0, cap = SIZE_MAX;  // bytes
  size_t total = SIZE_MAX, context = 0;       // what it has, and what CUDA itself took of it beside the allocator
  long blocks = 0;
};

struct Access {  // of a storage, by an operator on a stream, at that stream's time
  int stream = -1;
  uint64_t at = 0;
  std::string by;
};

struct Bytes {  // of a storage: who wrote it last, who has read it since, and what the allocator knows of it
  Access wrote;
  std::map<int, Access> read;
  std::set<int> recorded;  // streams named by record_stream
  int stream = 0;
  int device = 0;
  size_t size = 0;
  std::string by;
};

std::recursive_mutex mu;

// Whoever waits for `mu` lets go of Python's lock: the thread that has `mu` may need it, to free a tensor that Python knows.
struct Lock {
  explicit Lock(std::recursive_mutex& mutex) : mutex(mutex) {
    if (mutex.try_lock()) return;
    PyThreadState* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
    mutex.lock();
    if (python) PyEval_RestoreThread(python);
  }
  ~Lock() { mutex.unlock(); }
  Lock(const Lock&) = delete;

  std::recursive_mutex& mutex;
};

int devices = 1, clocks = DEVICES;
thread_local int device_now = 0;
thread_local std::array<int, DEVICES> stream_now = {0, 1, 2, 3};
thread_local std::string op_now;  // the operator that allocates
std::array<Clock, CLOCKS> clock_of{};
Clock host{};  // what the host has waited for
std::array<int, CLOCKS> device_of{0, 1, 2, 3};
std::array<Gpu, DEVICES> gpus;
std::unordered_map<void*, Bytes> bytes_at;
std::map<char*, size_t> registered, cached;  // pinned by cudaHostRegister, and by torch's caching host allocator
std::multimap<size_t, char*> idle_cached;      // of `cached`, what no tensor uses: kept for the next one of its size
size_t registered_bytes = 0, most_registered_bytes = 0, cached_bytes = 0, pin_cap = SIZE_MAX;
long registrations = 0;
bool error_at_launch = false, error_at_wait = false;  // of a refused registration, returned once more to whoever launches or waits next
std::map<std::string, size_t> context_growth;         // bytes of the GPU that the first use of an operator takes for good
std::vector<std::string> races, misplaced;
std::map<std::string, long> host_waits_at, copies, pageable, operators, contexts;
long streams_made = 0;
std::map<std::pair<std::string, size_t>, int> snapshot;
size_t snapshot_above = SIZE_MAX;
long allocations = 0, fail_at = -1, fail_count = 0;
std::string failed_in;
std::array<at::Tensor, DEVICES> rng;

// The innermost line of the project that is running, for the report. Call it without holding `mu`: it takes the GIL.
std::string where() {
  py::gil_scoped_acquire gil;
  for (auto frame = py::reinterpret_steal<py::object>((PyObject*)PyThreadState_GetFrame(PyThreadState_Get())); frame && !frame.is_none();
       frame = py::reinterpret_steal<py::object>((PyObject*)PyFrame_GetBack((PyFrameObject*)frame.ptr()))) {
    std::string file = py::str(frame.attr("f_code").attr("co_filename"));
    auto at = file.rfind("/trainers/");
    if (at != std::string::npos && file.find("/tests/") == std::string::npos)
      return file.substr(at + 10) + ":" + std::to_string(frame.attr("f_lineno").cast<int>());
  }
  return "elsewhere";
}
