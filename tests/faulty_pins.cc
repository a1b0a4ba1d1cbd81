// Stands in for the CUDA module where memory is pinned: what ends a pin may fail, or take long. tests/test_memory.py
// has the same struct.
#include <unistd.h>

#include <atomic>

#include "host_memory.h"

extern "C" {
struct {
  std::atomic<int32_t> device_that_fails, is_blocked, num_unpinned;
} faults;
}

namespace {

bool Unpin(const kvpool::Pin& pin) {
  while (faults.is_blocked) usleep(1000);
  ++faults.num_unpinned;
  return pin.device != faults.device_that_fails;
}

}  // namespace

// `memory`: what a capsule of HostMemory.handle() points to.
extern "C" void AddFaultyPin(void* memory, int64_t begin, int device) {
  auto* host = static_cast<kvpool::HostMemory*>(memory);
  host->AddPin({host->data() + begin, device, Unpin});
}
