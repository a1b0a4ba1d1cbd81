// jax_kvpool._cuda: the CUDA handlers, and the registration of host memory with CUDA.
#include <cuda_runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cctype>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "copy_cuda.h"
#include "ffi_cuda.h"
#include "host_memory.h"
#include "released_gil.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvpool {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a pending error would be taken for one of the next launch
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` the thread's current device for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    Check(cudaGetDevice(&previous_), "cudaGetDevice");
    Check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(previous_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

// Runs on whatever thread unmaps the memory. After an error nobody knows what the device still does (or, at the end of
// the process, whether the driver is still there): then the memory stays mapped.
bool Unpin(const Pin& pin) {
  try {
    const CurrentDevice current(pin.device);
    // XLA may drop an array before the program that reads it has run.
    Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    Check(cudaHostUnregister(pin.data), "cudaHostUnregister");
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

// Pins [begin, end), one piece of the memory behind `handle` (jax_kvpool._cpu.HostMemory.handle()), for `device`. The
// memory is kept from forks already.
void PinMemory(const nb::capsule& handle, int64_t begin, int64_t end, int device) {
  auto* memory = static_cast<HostMemory*>(handle.data("jax_kvpool.HostMemory"));
  if (begin < 0 || end > memory->bytes() || !memory->pieces().Contains(memory->data() + begin, memory->data() + end)) {
    throw std::invalid_argument("pin: [" + std::to_string(begin) + ", " + std::to_string(end) + ") is not a piece");
  }
  const ReleasedGil released;
  const CurrentDevice current(device);
  int same_address = 0;
  Check(cudaDeviceGetAttribute(&same_address, cudaDevAttrCanUseHostPointerForRegisteredMem, device),
        "cudaDeviceGetAttribute");
  // A copy needs pinned memory first, so this is before any; an initialize stage would cost every call.
  Check(PreloadCopy(), "loading the kernels");
  if (!same_address) throw std::runtime_error("this GPU cannot use registered host memory at its host address");
  char* data = memory->data() + begin;
  Check(cudaHostRegister(data, end - begin, cudaHostRegisterPortable | cudaHostRegisterMapped), "cudaHostRegister");
  memory->AddPin({data, device, Unpin});
}

// What the driver supports (0: there is none) and what this module was built with, as CUDA numbers them: 12080 is 12.8.
std::pair<int, int> Versions() {
  int driver = 0;
  Check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return {driver, CUDART_VERSION};
}

// "0000:1b:00.0", as the kernel names the device under /sys/bus/pci/devices.
std::string PciAddress(int device) {
  char address[32];
  Check(cudaDeviceGetPCIBusId(address, sizeof(address), device), "cudaDeviceGetPCIBusId");
  for (char* c = address; *c != '\0'; ++c) *c = static_cast<char>(std::tolower(*c));
  return address;
}

}  // namespace
}  // namespace kvpool

NB_MODULE(_cuda, m) {
  using namespace kvpool;

  const auto handler = [](const char* target, XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*)) {
    return std::pair(std::string(target), nb::capsule(reinterpret_cast<void*>(call)));
  };
  m.def("handlers", [handler] {
    return std::map<std::string, nb::capsule>{handler("jax_kvpool_load", KvPoolLoadCuda),
                                              handler("jax_kvpool_store", KvPoolStoreCuda),
                                              handler("jax_kvpool_load_by_engine", KvPoolLoadByEngineCuda),
                                              handler("jax_kvpool_store_by_engine", KvPoolStoreByEngineCuda),
                                              handler("jax_kvpool_scratch", KvPoolScratchCuda),
                                              handler("jax_kvpool_start", KvPoolStartCuda),
                                              handler("jax_kvpool_wait", KvPoolWaitCuda)};
  });
  m.def(
      "set_live_memory",
      [](const nb::capsule& live) {
        SetLiveMemory(static_cast<const LiveMemory*>(live.data("jax_kvpool.LiveMemory")));
      },
      "live"_a);
  m.def("versions", &Versions);
  m.def("pin", &PinMemory, "handle"_a, "begin"_a, "end"_a, "device"_a);
  m.def("pci_address", &PciAddress, "device"_a);
  m.def(
      "abandon_flights",
      [](intptr_t address, int64_t num_bytes) { AbandonFlights(reinterpret_cast<void*>(address), num_bytes); },
      "address"_a, "num_bytes"_a, nb::call_guard<ReleasedGil>());
  m.def("num_flights", &NumFlights);
  m.def("num_handler_calls", &NumHandlerCalls);
  m.def("num_engine_calls", &NumEngineCalls);
}
