// The streams beside XLA's on which copies travel while the model computes, and what orders them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

namespace kvpool {

// A point on a side stream: reached when the number at `flag`, in device memory, is `value`, or has gone past it.
struct Mark {
  CUdeviceptr flag;
  uint32_t value;
};

// Of one device; made on first use, kept for good. Loads and stores have streams of their own, since the link carries
// both directions at once: one for kernels, one for the copy engine.
//
// XLA's stream waits for marks, never for events. A driver (580.159.04) forgets that a stream is to wait for an event
// if another thread launches a CUDA graph into that stream at the same moment (benchmarks/lost_waits.cu), as every
// thread that dispatches does in XLA's. Into our own streams nobody launches graphs, and between those events are
// faster. CUDA's scheduler does not see what waits for a mark, and may put two streams into one queue: so a mark is
// always enqueued before what waits for it.
class SideStreams {
 public:
  // Of the thread's current device.
  static cudaError_t Get(SideStreams*& streams);

  cudaStream_t load() const { return sides_[0].stream; }
  cudaStream_t store() const { return sides_[1].stream; }
  cudaStream_t load_engine() const { return sides_[2].stream; }
  cudaStream_t store_engine() const { return sides_[3].stream; }

  // Sets `mark` to the point behind what is now on `stream`, one of these.
  cudaError_t SetMark(cudaStream_t stream, Mark& mark);
  // Makes `after`, any stream of the device, wait for it.
  cudaError_t Wait(const Mark& mark, cudaStream_t after);

  // Makes `after`, one of these streams, wait for what is now in `before`.
  cudaError_t Order(cudaStream_t before, cudaStream_t after);

  // An event that nobody else has, until it is given back. What waits for it then goes on to wait for what it was
  // recorded at.
  cudaError_t TakeEvent(cudaEvent_t& event);
  void GiveBack(const std::vector<cudaEvent_t>& events);

  // In pinned memory: a kernel sets it to 1 when layers are waited for in another order than theirs.
  int32_t* is_out_of_order() const { return is_out_of_order_; }
  // Whether one has; not again.
  bool WasOutOfOrder() { return __atomic_exchange_n(is_out_of_order_, 0, __ATOMIC_RELAXED) != 0; }

  // Waits, on the host, for all streams: when a step has failed, what still runs must not outlive its buffers.
  void Synchronize();

 private:
  struct Side {
    cudaStream_t stream = nullptr;
    Mark newest = {};
  };

  cudaError_t Create();

  bool is_created_ = false;
  std::array<Side, 4> sides_;
  void* flags_ = nullptr;
  int32_t* is_out_of_order_ = nullptr;
  std::mutex mutex_;  // of free_ and the newest marks: these are in the order of their streams
  std::vector<cudaEvent_t> free_;
};

}  // namespace kvpool
