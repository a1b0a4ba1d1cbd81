// Moves pages with the GPU's copy engine, which reaches the link's full speed and uses no SM: whole parts of records
// between host memory and a staging buffer, and a short kernel between that and the layers; beside a model, slabs that
// are long enough straight between the pools. Page-first is what makes the parts large. The addresses must be known
// when the copy is enqueued, so the page ids must lie where the CPU can read them: the host's, and for slabs the
// device's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "copy_plan.h"
#include "side_streams.h"

namespace kvpool {

// Page ids that the CPU can read, as they were when the call was made.
struct ReadableIds {
  std::vector<int32_t> host_pages;
  std::vector<int32_t> device_pages;  // none: only the device knows them. A store must know which it is to skip

  // Pairs without padding, as far as the CPU can see it.
  int64_t NumReal() const {
    int64_t num = 0;
    for (size_t i = 0; i < host_pages.size(); ++i) {
      num += host_pages[i] >= 0 && (device_pages.empty() || device_pages[i] >= 0);
    }
    return num;
  }

  bool Contains(const PageCopy& copy, size_t pair) const {
    return copy.Contains(device_pages.empty() ? 0 : device_pages[pair], host_pages[pair]);
  }
};

// Enqueues the copies of a stage that goes by slab on `engine`, behind what is on `stream`.
cudaError_t CopySlabs(const Stage& stage, const ReadableIds& ids, Direction direction, cudaStream_t stream,
                      cudaStream_t engine, SideStreams& side);

// A buffer of two halves: one is filled while the other is emptied. Serves the stages of a call, one after another.
class Staging {
 public:
  Staging(char* data, int64_t bytes) : data_(data), half_bytes_(bytes / 2) {}

  // Enqueues the copies of `stage`, which was read for this buffer: its kernels on `stream`, its records on `engine`.
  // They are done when that is which comes last in the direction of the bytes: a load's on `stream`, a store's on
  // `engine`.
  cudaError_t Copy(const Stage& stage, char* host, const ReadableIds& ids, Direction direction, int64_t max_blocks,
                   cudaStream_t stream, cudaStream_t engine, SideStreams& side);

  // To be called behind the last stage, also after an error.
  void GiveBackEvents(SideStreams& side) { side.GiveBack(std::exchange(empty_, {})); }

 private:
  char* data_;
  int64_t half_bytes_;
  int64_t num_batches_ = 0;
  std::vector<cudaEvent_t> empty_;  // an event for each half that was used
};

}  // namespace kvpool
