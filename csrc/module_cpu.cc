// jax_kvpool._cpu: host memory, the CPU handlers, and a direct entry to the copy for tests below XLA.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>

#include "copy_cpu.h"
#include "copy_plan.h"
#include "ffi_cpu.h"
#include "host_memory.h"
#include "id_buffers.h"
#include "released_gil.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpool {
namespace {

// ---- DLPack, as https://dmlc.github.io/dlpack specifies it (unversioned) ----

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct Export {
  DLManagedTensor managed;
  std::vector<int64_t> shape;
  std::shared_ptr<const void> owner;
};

enum class Type { kInteger, kUnsigned };  // DLPack's codes

// The capsule of an array at `data`, which keeps `owner` as long as it lives. The deleter runs wherever the last array
// is dropped, without the GIL.
nb::object ExportDlpack(std::shared_ptr<const void> owner, void* data, std::vector<int64_t> shape, Type type,
                        uint8_t bits, std::pair<int, int> device) {
  auto* exported = new Export{.managed = {}, .shape = std::move(shape), .owner = std::move(owner)};
  exported->managed = {
      .tensor = {.data = data,
                 .device_type = device.first,
                 .device_id = device.second,
                 .ndim = static_cast<int32_t>(exported->shape.size()),
                 .type_code = static_cast<uint8_t>(type),
                 .type_bits = bits,
                 .type_lanes = 1,
                 .shape = exported->shape.data(),
                 .strides = nullptr,  // row-major
                 .byte_offset = 0},
      .context = exported,
      .deleter = [](DLManagedTensor* self) { delete static_cast<Export*>(self->context); },
  };
  PyObject* capsule = PyCapsule_New(&exported->managed, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;  // consumed: its array calls the deleter
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    managed->deleter(managed);
  });
  if (capsule == nullptr) {
    delete exported;
    nb::raise_python_error();
  }
  return nb::steal(capsule);
}

// ---- HostMemory ----

// Where memory that is kept from forks is not, a touch would be a SIGSEGV.
void RefuseAfterFork(const HostMemory& memory) {
  if (!memory.IsElsewhere()) return;
  throw std::runtime_error("HostMemory: pinned for a GPU by process " + std::to_string(memory.process()) +
                           ", from which this one, " + std::to_string(getpid()) +
                           ", was forked, and pinned memory is not in forked processes: make one in each, best in "
                           "processes that are spawned");
}

// What Python holds: one owner of the memory beside the arrays over it.
struct PyHostMemory {
  std::shared_ptr<HostMemory> memory;

  const std::shared_ptr<HostMemory>& Get() const {
    if (!memory) throw nb::value_error("HostMemory is closed");
    RefuseAfterFork(*memory);
    return memory;
  }
};

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> View(const PyHostMemory& self) {
  auto* owner = new std::shared_ptr<HostMemory>(self.Get());
  const nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<HostMemory>*>(p); });
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>((*owner)->data(), {size_t((*owner)->bytes())}, capsule);
}

void Close(PyHostMemory& self) {
  if (!self.memory) return;
  const std::shared_ptr<HostMemory> memory = std::move(self.memory);
  self.memory = nullptr;
  memory->Close();
  const ReleasedGil released;
  if (memory.use_count() == 1) memory->Unmap();
}

// ---- The copy without XLA ----

using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using ByteArray = nb::ndarray<uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

void CopyPages(const std::vector<int64_t>& plan, bool is_load, ByteArray host, const std::vector<ByteArray>& arrays,
               Ids device_pages, Ids host_pages, int32_t layer) {
  if (device_pages.size() != host_pages.size()) throw nb::value_error("ids differ in length");
  CopyOperands operands = {
      .host = {reinterpret_cast<char*>(host.data()), static_cast<int64_t>(host.size())},
      .arrays = {},
      .device_pages = device_pages.data(),
      .host_pages = host_pages.data(),
      .layer = &layer,
      .num_pairs = static_cast<int64_t>(device_pages.size()),
      .pieces = nullptr,
  };
  for (const ByteArray& array : arrays) {
    operands.arrays.push_back({reinterpret_cast<char*>(array.data()), static_cast<int64_t>(array.size())});
  }
  const Direction direction = is_load ? Direction::kLoad : Direction::kStore;
  if (const auto error = CopyOnCpu(plan, operands, direction)) throw nb::value_error(error->c_str());
}

// The copies that the copy engine makes of one, as `(offset, bytes)`, in a memory at address 0.
std::vector<std::pair<int64_t, int64_t>> PartsInPieces(const std::vector<int64_t>& piece_ends, int64_t offset,
                                                       int64_t num_bytes) {
  std::vector<std::pair<int64_t, int64_t>> parts;
  const Pieces pieces(nullptr, piece_ends.empty() ? 0 : piece_ends.back(), piece_ends);
  pieces.ForEachPart(static_cast<const char*>(nullptr) + offset, num_bytes,
                     [&](int64_t begin, int64_t bytes) { parts.emplace_back(begin, bytes); });
  return parts;
}

// ---- Page ids that the CPU can read ----

struct PyIdBuffers {
  std::shared_ptr<IdBuffers> buffers;
};

struct PyIdBuffer {
  std::shared_ptr<char> buffer;
  int64_t num_ids;
};

// A buffer with these ids; None if all are taken.
std::optional<PyIdBuffer> TakeBuffer(const PyIdBuffers& self, Ids ids) {
  RefuseAfterFork(self.buffers->memory());
  if (static_cast<int64_t>(ids.nbytes()) > self.buffers->buffer_bytes()) {
    throw nb::value_error("ids: more than a buffer holds");
  }
  PyIdBuffer taken = {self.buffers->Take(), static_cast<int64_t>(ids.size())};
  if (!taken.buffer) return std::nullopt;
  std::copy_n(ids.data(), ids.size(), reinterpret_cast<int32_t*>(taken.buffer.get()));
  return taken;
}

}  // namespace
}  // namespace kvpool

NB_MODULE(_cpu, m) {
  using namespace kvpool;

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const std::system_error& e) {
      errno = e.code().value();
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, e.what());
    }
  });

  m.def("ffi_api_version", [] { return std::pair<int, int>(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.attr("MAX_SLABS") = PageCopy::kMaxSlabs;
  const auto handler = [](const char* target, XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*)) {
    return std::pair(std::string(target), nb::capsule(reinterpret_cast<void*>(call)));
  };
  m.def("handlers", [handler] {
    return std::map<std::string, nb::capsule>{handler("jax_kvpool_load", KvPoolLoadCpu),
                                              handler("jax_kvpool_store", KvPoolStoreCpu),
                                              handler("jax_kvpool_load_by_engine", KvPoolLoadByEngineCpu),
                                              handler("jax_kvpool_store_by_engine", KvPoolStoreByEngineCpu),
                                              handler("jax_kvpool_scratch", KvPoolScratchCpu),
                                              handler("jax_kvpool_start", KvPoolStartCpu),
                                              handler("jax_kvpool_wait", KvPoolWaitCpu)};
  });
  m.def("live_memory", [] { return nb::capsule(&GetLiveMemory(), "jax_kvpool.LiveMemory"); });
  m.def("leave_to_exit", &HostMemory::LeaveToExit, nb::call_guard<ReleasedGil>());

  nb::enum_<HugePages>(m, "HugePages")
      .value("NONE", HugePages::kNone)
      .value("TRANSPARENT", HugePages::kTransparent)
      .value("EXPLICIT", HugePages::kExplicit);

  nb::class_<PyHostMemory>(m, "HostMemory")
      .def(
          "__init__",
          [](PyHostMemory* self, int64_t num_bytes, HugePages huge_pages, int numa_node,
             const std::vector<int64_t>& piece_ends) {
            new (self) PyHostMemory{HostMemory::Map(num_bytes, huge_pages, numa_node, piece_ends)};
          },
          "num_bytes"_a, "huge_pages"_a, "numa_node"_a, "piece_ends"_a)
      .def_prop_ro("address", [](const PyHostMemory& self) { return reinterpret_cast<intptr_t>(self.Get()->data()); })
      .def(
          "populate",
          [](const PyHostMemory& self, int64_t begin, int64_t end, int num_threads) {
            self.Get()->Populate(begin, end, num_threads);
          },
          "begin"_a, "end"_a, "num_threads"_a, nb::call_guard<ReleasedGil>())
      .def("keep_from_forks", [](const PyHostMemory& self) { self.Get()->KeepFromForks(); })
      .def("handle", [](const PyHostMemory& self) { return nb::capsule(self.Get().get(), "jax_kvpool.HostMemory"); })
      .def("view", &View)
      .def(
          "dlpack",
          [](const PyHostMemory& self, int64_t num_rows, std::pair<int, int> device) {
            const auto& memory = self.Get();
            return ExportDlpack(memory, memory->data(), {num_rows, memory->bytes() / num_rows}, Type::kUnsigned, 8,
                                device);
          },
          "num_rows"_a, "device"_a)
      .def("close", &Close);

  nb::class_<PyIdBuffer>(m, "IdBuffer")
      .def(
          "dlpack",
          [](const PyIdBuffer& self, std::pair<int, int> device) {
            return ExportDlpack(self.buffer, self.buffer.get(), {self.num_ids}, Type::kInteger, 32, device);
          },
          "device"_a);
  nb::class_<PyIdBuffers>(m, "IdBuffers")
      .def(
          "__init__",
          [](PyIdBuffers* self, const PyHostMemory& memory, int64_t buffer_bytes) {
            new (self) PyIdBuffers{std::make_shared<IdBuffers>(memory.Get(), buffer_bytes)};
          },
          "memory"_a, "buffer_bytes"_a)
      .def("take", &TakeBuffer, "ids"_a);

  m.def("copy_pages", &CopyPages, "plan"_a, "is_load"_a, "host"_a, "arrays"_a, "device_pages"_a, "host_pages"_a,
        "layer"_a);
  m.def("parts_in_pieces", &PartsInPieces, "piece_ends"_a, "offset"_a, "num_bytes"_a);
}
