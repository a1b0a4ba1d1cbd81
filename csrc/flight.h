// Copies that were started and not yet waited for, so that a wait finds its start.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kvpool {

// One start, until the last of its waits. Waits come in the order in which they stand in the program, in a loop as
// outside of one: each takes a token from the one before. So the n-th wait knows what it is for by counting, also
// where a layer's number is known to the device alone.
struct Flight {
  std::vector<const void*> arrays;   // of the device pool
  std::vector<int64_t> wait_stages;  // the last stage that the n-th wait waits for; all of them occur
  size_t num_waits = 0;              // so far
  size_t num_stages = 1;
  std::vector<void*> done;  // by stage: an event for each direction that is copied

  bool IsOver() const { return num_waits == wait_stages.size(); }
};

// By the address of each of its arrays: a pool belongs to one step at a time, so these are unique.
class Flights {
 public:
  // Returns flights over some of the arrays that were never waited for to the end: their step failed.
  std::vector<std::shared_ptr<Flight>> Start(const std::shared_ptr<Flight>& flight) {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<Flight>> lost;
    for (const void* array : flight->arrays) {
      if (const auto found = by_array_.find(array); found != by_array_.end()) {
        lost.push_back(found->second);
        Forget(*lost.back());
      }
    }
    for (const void* array : flight->arrays) by_array_[array] = flight;
    return lost;
  }

  // Finds the flight of the next wait, and in `stage` what it waits for: the wait holds arrays[i], number
  // indices[i] of its start's. Forgets the flight at its last wait.
  std::optional<std::string> Wait(std::span<const void* const> arrays, std::span<const int64_t> indices,
                                  std::shared_ptr<Flight>& flight, int64_t& stage) {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < arrays.size(); ++i) {
      const auto found = by_array_.find(arrays[i]);
      const size_t index = static_cast<size_t>(indices[i]);
      if (found == by_array_.end() || (flight && found->second != flight) || index >= found->second->arrays.size() ||
          found->second->arrays[index] != arrays[i]) {
        return "a layer is waited for in another array than it is loaded into: XLA copied an array of the device pool "
               "while it was in use";
      }
      flight = found->second;
    }
    if (!flight) return "a wait without an array";
    stage = flight->wait_stages[flight->num_waits++];
    if (flight->IsOver()) Forget(*flight);
    return std::nullopt;
  }

 private:
  void Forget(const Flight& flight) {
    for (const void* array : flight.arrays) by_array_.erase(array);
  }

  std::mutex mutex_;
  std::map<const void*, std::shared_ptr<Flight>> by_array_;
};

}  // namespace kvpool
