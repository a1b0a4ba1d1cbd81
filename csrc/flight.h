// Copies that were started and not yet waited for: what of them is enqueued, and how a wait finds its start.
//
//   XLA's stream   start ------- wait, layer 0 -- wait, layer 1 -- ...        (waits by events)
//   store stream     \ store stage 0 | store stage 1 | ...
//   load stream       \      load stage 0 | load stage 1 | ...     each after the store of the same stage
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "side_streams.h"
#include "transfer.h"

namespace kvpool {

// One start, until the last of its waits. Waits come in the order in which they stand in the program, in a loop as
// outside of one: each takes a token from the one before. So the n-th wait knows what it is for by counting, also
// where a layer's number is known to the device alone.
class Flight {
 public:
  // `wait_stages`: the last stage that the n-th wait waits for; ascending, and all stages occur.
  Flight(Transfer store, Transfer load, std::span<const int64_t> wait_stages)
      : store_(std::move(store)), load_(std::move(load)), wait_stages_(wait_stages.begin(), wait_stages.end()) {}

  // Of the device pool.
  const std::vector<Bytes>& arrays() const { return load_.arrays(); }
  size_t CountWait() { return static_cast<size_t>(wait_stages_[num_waits_++]); }
  bool IsOver() const { return num_waits_ == wait_stages_.size(); }

  // Forks the side streams off `stream`, and enqueues the first stages.
  cudaError_t Start(cudaStream_t stream, SideStreams& side);

  // Makes `stream` wait for `stage`, and enqueues the next ones. They are not enqueued all at once, so that the layers
  // behind the start need not wait for the CPU: 4,096 spans for the copy engine take it some milliseconds.
  cudaError_t Wait(size_t stage, cudaStream_t stream, SideStreams& side);

  // To be called when nobody waits any more; nothing is enqueued afterwards.
  void GiveBackEvents(SideStreams& side);

 private:
  static constexpr size_t kStagesAhead = 2;

  // Enqueues both copies of all stages before `end` that are not enqueued yet, and an event behind each.
  cudaError_t EnqueueUntil(size_t end, SideStreams& side);

  Transfer store_, load_;
  std::vector<int64_t> wait_stages_;
  size_t num_waits_ = 0;                        // so far
  std::vector<std::vector<cudaEvent_t>> done_;  // of each stage that is enqueued: for each direction that is copied
};

// By the address of each of its arrays: a pool belongs to one step at a time, so these are unique.
class Flights {
 public:
  // Returns flights over some of the arrays that were never waited for to the end: their step failed.
  std::vector<std::shared_ptr<Flight>> Start(const std::shared_ptr<Flight>& flight) {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Flight>> lost;
    for (const Bytes& array : flight->arrays()) {
      if (const auto found = by_array_.find(array.data); found != by_array_.end()) {
        lost.push_back(found->second);
        Forget(*lost.back());
      }
    }
    for (const Bytes& array : flight->arrays()) by_array_[array.data] = flight;
    return lost;
  }

  // Finds the flight of the next wait, and in `stage` what it waits for: the wait holds arrays[i], number
  // indices[i] of its start's. Forgets the flight at its last wait.
  std::optional<std::string> Wait(std::span<const void* const> arrays, std::span<const int64_t> indices,
                                  std::shared_ptr<Flight>& flight, size_t& stage) {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < arrays.size(); ++i) {
      const auto found = by_array_.find(arrays[i]);
      const size_t index = static_cast<size_t>(indices[i]);
      if (found == by_array_.end() || (flight && found->second != flight) || index >= found->second->arrays().size() ||
          found->second->arrays()[index].data != arrays[i]) {
        return "a layer is waited for in another array than it is loaded into: XLA copied an array of the device pool "
               "while it was in use";
      }
      flight = found->second;
    }
    if (!flight) return "a wait without an array";
    stage = flight->CountWait();
    if (flight->IsOver()) Forget(*flight);
    return std::nullopt;
  }

 private:
  void Forget(const Flight& flight) {
    for (const Bytes& array : flight.arrays()) by_array_.erase(array.data);
  }

  std::mutex mutex_;
  std::map<const void*, std::shared_ptr<Flight>> by_array_;
};

}  // namespace kvpool
