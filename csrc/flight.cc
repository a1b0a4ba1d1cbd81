#include "flight.h"

#include <algorithm>

namespace kvpool {

cudaError_t Flight::Start(cudaStream_t stream, SideStreams& side) {
  cudaError_t error = cudaSuccess;
  if (!store_.IsEmpty()) error = side.Order(stream, side.store());
  if (!load_.IsEmpty() && !error) error = side.Order(stream, side.load());
  return error ? error : EnqueueUntil(kStagesAhead, side);
}

cudaError_t Flight::Wait(size_t stage, cudaStream_t stream, SideStreams& side) {
  // The waits before this one have enqueued this stage, and made `stream` wait for the earlier ones.
  for (const cudaEvent_t event : done_[stage]) {
    if (const cudaError_t error = cudaStreamWaitEvent(stream, event, 0)) return error;
  }
  if (const cudaError_t error = EnqueueUntil(stage + 1 + kStagesAhead, side)) return error;
  if (IsOver()) GiveBackEvents(side);
  return cudaSuccess;
}

cudaError_t Flight::EnqueueUntil(size_t end, SideStreams& side) {
  const size_t num_stages = static_cast<size_t>(wait_stages_.back()) + 1;
  cudaEvent_t event = nullptr;
  cudaStream_t last = nullptr;
  cudaError_t error = cudaSuccess;
  const auto finish = [&] {
    if (const cudaError_t failed = side.TakeEvent(event)) return failed;
    done_.back().push_back(event);
    return cudaEventRecord(event, last);
  };
  while (done_.size() < std::min(end, num_stages) && !error) {
    const size_t stage = done_.size();
    done_.emplace_back();
    if (!store_.IsEmpty()) {
      error = store_.Enqueue(stage, side.store(), side, last);
      if (!error) error = finish();
      for (const cudaStream_t loads : {side.load(), side.load_engine()}) {
        if (!error && !load_.IsEmpty()) error = cudaStreamWaitEvent(loads, event, 0);
      }
    }
    if (!load_.IsEmpty()) {
      if (!error) error = load_.Enqueue(stage, side.load(), side, last);
      if (!error) error = finish();
    }
  }
  return error;
}

void Flight::GiveBackEvents(SideStreams& side) {
  for (const auto& events : done_) side.GiveBack(events);
  store_.GiveBackEvents(side);
  load_.GiveBackEvents(side);
}

}  // namespace kvpool
