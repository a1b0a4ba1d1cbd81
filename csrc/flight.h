// Copies that were started and not yet waited for: what of them is enqueued, and how a wait finds its start.
//
//   XLA's stream   start ------- wait, layer 0 -- wait, layer 1 -- ...        (waits for marks)
//   store stream     \ store stage 0 | store stage 1 | ...
//   load stream       \      load stage 0 | load stage 1 | ...     each after the store of the same stage
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <list>
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

// One start, until its end, which waits for what is left. Waits come in the order in which they stand in the program,
// in a loop as outside of one: each takes the scratch from the one before. So the n-th wait knows what it is for by
// counting, also where a layer's number is known to the device alone.
class Flight {
 public:
  // `scratch`: what all calls of the flight pass on. `run`: which execution of a program it belongs to. `wait_stages`:
  // the last stage that the n-th wait waits for; ascending, and all stages occur.
  Flight(Bytes scratch, int64_t run, SideStreams& side, Transfer store, Transfer load,
         std::span<const int64_t> wait_stages)
      : scratch_(scratch),
        run_(run),
        side_(side),
        store_(std::move(store)),
        load_(std::move(load)),
        wait_stages_(wait_stages.begin(), wait_stages.end()) {}

  const Bytes& scratch() const { return scratch_; }
  const SideStreams& side() const { return side_; }
  int64_t run() const { return run_; }
  const std::vector<Bytes>& arrays() const { return load_.arrays(); }  // of the device pool
  const Bytes& host() const { return load_.host(); }

  // How often the start was called before.
  int CountStart() { return num_starts_++; }
  // What the next wait waits for; none if there were enough.
  std::optional<size_t> CountWait();
  // How many waits there were before.
  size_t num_waits() const { return num_waits_; }
  // How often an end was called, with this time.
  int64_t CountEnd() { return ++num_ends_; }

  // Forks the side streams off `stream`, and enqueues the first stages.
  cudaError_t Start(cudaStream_t stream);

  // Makes `stream` wait for `stage`, and enqueues the next ones. They are not enqueued all at once, so that the layers
  // behind the start need not wait for the CPU: 4,096 spans for the copy engine take it some milliseconds.
  cudaError_t Wait(size_t stage, cudaStream_t stream);

  // Waits, on the host, for what was enqueued: when a step has failed, it must not outlive its buffers. Nothing is
  // enqueued afterwards: starts and waits fail.
  void Abandon();

 private:
  static constexpr size_t kStagesAhead = 2;

  size_t num_stages() const { return static_cast<size_t>(wait_stages_.back()) + 1; }

  // These are called with mutex_ held.
  // Enqueues both copies of all stages before `end` that are not enqueued yet, and a mark behind each.
  cudaError_t EnqueueUntil(size_t end);
  void GiveBackEvents();

  std::mutex mutex_;  // one thread runs the step, another one may close the host pool
  bool is_abandoned_ = false;
  Bytes scratch_;
  int64_t run_;
  SideStreams& side_;
  Transfer store_, load_;
  std::vector<int64_t> wait_stages_;
  int num_starts_ = 0;
  int64_t num_ends_ = 0;
  size_t num_waits_ = 0;                 // so far
  std::vector<std::vector<Mark>> done_;  // of each stage that is enqueued: for each direction that is copied
};

// The flights that are not over. A pool and a scratch belong to one step at a time; where another one has them, the
// step that had them before has failed between its start and its last wait, and what it left is abandoned before
// anything else touches them.
class Flights {
 public:
  // The flight that this execution has started with this scratch; null if there is none.
  std::shared_ptr<Flight> Find(const void* scratch, int64_t run);
  void Add(std::shared_ptr<Flight> flight);
  void Remove(const Flight& flight);

  size_t size() const;

  // Abandons all flights that touch some of these bytes, or that an execution has started which failed on a device.
  void AbandonOver(std::span<const Bytes> bytes);
  void AbandonOf(int64_t run, const SideStreams& side);

 private:
  template <typename Predicate>
  void AbandonIf(Predicate is_lost);

  mutable std::mutex mutex_;
  std::list<std::shared_ptr<Flight>> flights_;  // a few
};

}  // namespace kvpool
