// The streams beside XLA's on which copies travel while the model computes, and the events that order them.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <vector>

namespace kvpool {

// Of one device; made on first use, kept for good. Loads and stores have streams of their own, since the link carries
// both directions at once: one for kernels, one for the copy engine.
class SideStreams {
 public:
  // Of the thread's current device.
  static cudaError_t Get(SideStreams*& streams);

  cudaStream_t load() const { return load_; }
  cudaStream_t store() const { return store_; }
  cudaStream_t load_engine() const { return load_engine_; }
  cudaStream_t store_engine() const { return store_engine_; }

  // An event that nobody else has, until it is given back. What waits for it then goes on to wait for what it was
  // recorded at.
  cudaError_t TakeEvent(cudaEvent_t& event);
  void GiveBack(const std::vector<cudaEvent_t>& events);

  // Waits, on the host, for all streams: when a step has failed, what still runs must not outlive its buffers.
  void Synchronize();

  // Makes `after` wait for what is now in `before`.
  cudaError_t Order(cudaStream_t before, cudaStream_t after);

 private:
  cudaError_t Create();

  bool is_created_ = false;
  cudaStream_t load_ = nullptr, store_ = nullptr, load_engine_ = nullptr, store_engine_ = nullptr;
  std::mutex mutex_;  // of free_
  std::vector<cudaEvent_t> free_;
};

}  // namespace kvpool
