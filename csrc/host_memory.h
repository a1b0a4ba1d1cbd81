// Host memory that is ours and that XLA borrows: mapped here, imported into JAX through DLPack, unmapped when the
// last array over it is gone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <system_error>
#include <vector>

#include "pieces.h"

namespace kvpool {

// Of what is known of memories and their buffers. One for all, so that a fork takes it: otherwise a thread that the new
// process has not might hold it there for ever.
std::mutex& BookkeepingMutex();

// The memory that handlers may use: from Map to Close. It is asked on every call and owns nothing. One a process;
// the modules share it, so it is header-only.
class LiveMemory {
 public:
  void Add(const void* data, int64_t bytes, std::shared_ptr<const Pieces> pieces) {
    const std::lock_guard lock(mutex_);
    memories_[data] = {bytes, std::move(pieces)};
  }
  void Remove(const void* data) {
    const std::lock_guard lock(mutex_);
    memories_.erase(data);
  }
  // Whether exactly the `bytes` bytes at `data` are one live memory, not a part of it.
  bool Contains(const void* data, int64_t bytes) const {
    const std::lock_guard lock(mutex_);
    const auto found = memories_.find(data);
    return found != memories_.end() && found->second.bytes == bytes;
  }
  // The pieces of the live memory that begins at `data`, which outlive it; null if there is none.
  std::shared_ptr<const Pieces> PiecesOf(const void* data) const {
    const std::lock_guard lock(mutex_);
    const auto found = memories_.find(data);
    return found == memories_.end() ? nullptr : found->second.pieces;
  }
  // Whether they are some of the bytes of one live memory.
  bool Covers(const void* data, int64_t bytes) const {
    const std::lock_guard lock(mutex_);
    const auto after = memories_.upper_bound(data);
    if (after == memories_.begin()) return false;
    const auto& [base, memory] = *std::prev(after);
    return static_cast<const char*>(data) + bytes <= static_cast<const char*>(base) + memory.bytes;
  }

 private:
  struct Memory {
    int64_t bytes;
    std::shared_ptr<const Pieces> pieces;
  };

  std::mutex& mutex_ = BookkeepingMutex();
  std::map<const void*, Memory> memories_;  // by the first byte
};

LiveMemory& GetLiveMemory();

enum class HugePages { kNone, kTransparent, kExplicit };

// A piece registered with CUDA, and how to undo that; called before the memory is unmapped, never in a deleter.
struct Pin {
  char* data;
  int device;
  // False: the device may still touch the memory, which then must stay mapped.
  bool (*unpin)(const Pin& pin);
};

class HostMemory {
 public:
  // Maps `bytes` bytes; their pages come with Populate. numa_node: preferred, -1 for none. piece_ends: see Pieces.
  // Throws std::system_error, std::invalid_argument.
  static std::shared_ptr<HostMemory> Map(int64_t bytes, HugePages huge_pages, int numa_node,
                                         std::span<const int64_t> piece_ends);

  ~HostMemory() { Unmap(); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  const Pieces& pieces() const { return *pieces_; }
  bool is_mapped() const { return mapping_ != nullptr; }

  // Makes the pages of [begin, end) present, with num_threads threads. Throws std::system_error, std::invalid_argument.
  void Populate(int64_t begin, int64_t end, int num_threads);

  // To be called before the first pin: processes that are forked from this one do not get the memory. A copy of it
  // would be of no use to them, and could make the device write beside this process's own. Throws std::system_error.
  void KeepFromForks() {
    if (madvise(mapping_, mapping_bytes_, MADV_DONTFORK) != 0) {
      throw std::system_error(errno, std::generic_category(), "keeping host memory from forks");
    }
    process_ = getpid();
  }
  // Where that was called, or -1: forks get a copy on write, as of any memory.
  pid_t process() const { return process_; }
  // Whether this process was forked from the one that has the memory.
  bool IsElsewhere() const { return process_ != -1 && process_ != getpid(); }

  void AddPin(const Pin& pin) { pins_.push_back(pin); }

  // Handlers refuse the memory from here on; arrays over it stay valid.
  void Close() { GetLiveMemory().Remove(data_); }

  // Ends the pins (which waits for their devices), then the mapping. If a pin cannot be ended, the mapping is left to
  // the end of the process. For the last owner only.
  void Unmap();

  // For the end of the process: waits for memory that is being unmapped, and leaves what arrays still own to the
  // operating system, since threads and CUDA may be gone when they go.
  static void LeaveToExit();

 private:
  HostMemory() = default;

  char* mapping_ = nullptr;  // what mmap gave
  int64_t mapping_bytes_ = 0;
  char* data_ = nullptr;  // inside it, on a huge page
  int64_t bytes_ = 0;
  std::shared_ptr<const Pieces> pieces_;
  pid_t process_ = -1;
  std::vector<Pin> pins_;
};

}  // namespace kvpool
