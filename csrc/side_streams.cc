#include "side_streams.h"

#include <map>

namespace kvpool {

cudaError_t SideStreams::Get(SideStreams*& streams) {
  static std::mutex mutex;
  static auto* const by_device = new std::map<int, SideStreams>;  // outlives every thread of XLA's
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  streams = &(*by_device)[device];
  return streams->is_created_ ? cudaSuccess : streams->Create();
}

cudaError_t SideStreams::Create() {
  // Highest priority: a copy needs a few SMs, and needs them now, while a GEMM has thousands of blocks waiting.
  int lowest = 0, highest = 0;
  if (const cudaError_t error = cudaDeviceGetStreamPriorityRange(&lowest, &highest)) return error;
  for (cudaStream_t* stream : {&load_, &store_, &load_engine_, &store_engine_}) {
    if (*stream != nullptr) continue;  // made before an earlier attempt failed
    if (const cudaError_t error = cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, highest)) return error;
  }
  is_created_ = true;
  return cudaSuccess;
}

cudaError_t SideStreams::TakeEvent(cudaEvent_t& event) {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      event = free_.back();
      free_.pop_back();
      return cudaSuccess;
    }
  }
  return cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
}

void SideStreams::GiveBack(const std::vector<cudaEvent_t>& events) {
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), events.begin(), events.end());
}

void SideStreams::Synchronize() {
  for (const cudaStream_t stream : {load_, store_, load_engine_, store_engine_}) cudaStreamSynchronize(stream);
}

cudaError_t SideStreams::Order(cudaStream_t before, cudaStream_t after) {
  cudaEvent_t event;
  if (const cudaError_t error = TakeEvent(event)) return error;
  cudaError_t error = cudaEventRecord(event, before);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(after, event, 0);
  GiveBack({event});
  return error;
}

}  // namespace kvpool
