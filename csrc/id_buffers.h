// Small buffers in one host memory, each taken by an array of page ids and free again when the array is gone.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "host_memory.h"

namespace kvpool {

class IdBuffers : public std::enable_shared_from_this<IdBuffers> {
 public:
  IdBuffers(std::shared_ptr<HostMemory> memory, int64_t buffer_bytes)
      : memory_(std::move(memory)), buffer_bytes_(buffer_bytes) {
    if (buffer_bytes < 1) throw std::invalid_argument("buffer_bytes: expected a positive number");
    for (int64_t at = 0; at + buffer_bytes <= memory_->bytes(); at += buffer_bytes)
      free_.push_back(memory_->data() + at);
  }

  const HostMemory& memory() const { return *memory_; }
  int64_t buffer_bytes() const { return buffer_bytes_; }

  // A buffer, taken until the last copy of the pointer is gone, on whatever thread that is; null if all are taken.
  std::shared_ptr<char> Take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return nullptr;
    char* buffer = free_.back();
    free_.pop_back();
    return {buffer, [self = shared_from_this()](char* taken) {
              const std::lock_guard lock(self->mutex_);
              self->free_.push_back(taken);
            }};
  }

 private:
  std::shared_ptr<HostMemory> memory_;
  int64_t buffer_bytes_;
  std::mutex& mutex_ = BookkeepingMutex();
  std::vector<char*> free_;
};

}  // namespace kvpool
