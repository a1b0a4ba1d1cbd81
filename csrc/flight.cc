#include "flight.h"

#include <algorithm>
#include <utility>

namespace kvpool {

std::optional<size_t> Flight::CountWait() {
  if (num_waits_ == wait_stages_.size()) return std::nullopt;
  return static_cast<size_t>(wait_stages_[num_waits_++]);
}

cudaError_t Flight::Start(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  if (is_abandoned_) return cudaErrorIllegalState;
  cudaError_t error = cudaSuccess;
  if (!store_.IsEmpty()) error = side_.Order(stream, side_.store());
  if (!load_.IsEmpty() && !error) error = side_.Order(stream, side_.load());
  return error ? error : EnqueueUntil(kStagesAhead);
}

cudaError_t Flight::Wait(size_t stage, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  if (is_abandoned_) return cudaErrorIllegalState;
  // The waits before this one have enqueued this stage, and made `stream` wait for the earlier ones.
  for (const Mark& mark : done_[stage]) {
    if (const cudaError_t error = side_.Wait(mark, stream)) return error;
  }
  if (const cudaError_t error = EnqueueUntil(stage + 1 + kStagesAhead)) return error;
  if (stage + 1 == num_stages()) GiveBackEvents();
  return cudaSuccess;
}

cudaError_t Flight::EnqueueUntil(size_t end) {
  cudaStream_t last = nullptr;
  cudaError_t error = cudaSuccess;
  const auto finish = [&] { return side_.SetMark(last, done_.back().emplace_back()); };
  while (done_.size() < std::min(end, num_stages()) && !error) {
    const size_t stage = done_.size();
    done_.emplace_back();
    if (!store_.IsEmpty()) {
      error = store_.Enqueue(stage, side_, last);
      if (!error) error = finish();
      for (const cudaStream_t loads : {side_.load(), side_.load_engine()}) {
        if (!error && !load_.IsEmpty()) error = side_.Wait(done_.back().back(), loads);
      }
    }
    if (!load_.IsEmpty()) {
      if (!error) error = load_.Enqueue(stage, side_, last);
      if (!error) error = finish();
    }
  }
  return error;
}

void Flight::Abandon() {
  const std::lock_guard lock(mutex_);
  if (std::exchange(is_abandoned_, true)) return;
  side_.Synchronize();
  GiveBackEvents();
}

void Flight::GiveBackEvents() {
  store_.GiveBackEvents(side_);
  load_.GiveBackEvents(side_);
}

std::shared_ptr<Flight> Flights::Find(const void* scratch, int64_t run) {
  const std::lock_guard lock(mutex_);
  for (const auto& flight : flights_) {
    if (flight->scratch().data == scratch && flight->run() == run) return flight;
  }
  return nullptr;
}

void Flights::Add(std::shared_ptr<Flight> flight) {
  const std::lock_guard lock(mutex_);
  flights_.push_back(std::move(flight));
}

void Flights::Remove(const Flight& flight) {
  const std::lock_guard lock(mutex_);
  flights_.remove_if([&](const auto& other) { return other.get() == &flight; });
}

size_t Flights::size() const {
  const std::lock_guard lock(mutex_);
  return flights_.size();
}

template <typename Predicate>
void Flights::AbandonIf(Predicate is_lost) {
  std::list<std::shared_ptr<Flight>> lost;  // takes no memory, which may be what has failed
  {
    const std::lock_guard lock(mutex_);
    for (auto at = flights_.begin(); at != flights_.end();) {
      const auto flight = at++;
      if (is_lost(**flight)) lost.splice(lost.end(), flights_, flight);
    }
  }
  for (const auto& flight : lost) flight->Abandon();
}

void Flights::AbandonOver(std::span<const Bytes> bytes) {
  const auto touches = [&](const Bytes& other) {
    return std::any_of(bytes.begin(), bytes.end(), [&](const Bytes& some) { return Overlap(some, other); });
  };
  AbandonIf([&](const Flight& flight) {
    return touches(flight.scratch()) || touches(flight.host()) ||
           std::any_of(flight.arrays().begin(), flight.arrays().end(), touches);
  });
}

void Flights::AbandonOf(int64_t run, const SideStreams& side) {
  AbandonIf([&](const Flight& flight) { return flight.run() == run && &flight.side() == &side; });
}

}  // namespace kvpool
