// Host memory that is ours and that XLA borrows: mapped here, imported into JAX through DLPack, unmapped when the
// last array over it is gone.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace kvpool {

// The memory that handlers may use: from Map to Close. It is asked on every call and owns nothing. One a process;
// the modules share it, so it is header-only.
class LiveMemory {
 public:
  void Add(const void* data, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_[data] = bytes;
  }
  void Remove(const void* data) {
    const std::lock_guard lock(mutex_);
    bytes_.erase(data);
  }
  // Whether exactly the `bytes` bytes at `data` are one live memory, not a part of it.
  bool Contains(const void* data, int64_t bytes) const {
    const std::lock_guard lock(mutex_);
    const auto found = bytes_.find(data);
    return found != bytes_.end() && found->second == bytes;
  }
  // Whether they are some of the bytes of one live memory.
  bool Covers(const void* data, int64_t bytes) const {
    const std::lock_guard lock(mutex_);
    const auto after = bytes_.upper_bound(data);
    if (after == bytes_.begin()) return false;
    const auto& [base, size] = *std::prev(after);
    return static_cast<const char*>(data) + bytes <= static_cast<const char*>(base) + size;
  }

 private:
  mutable std::mutex mutex_;
  std::map<const void*, int64_t> bytes_;
};

LiveMemory& GetLiveMemory();

enum class HugePages { kNone, kTransparent, kExplicit };

// A piece registered with CUDA, and how to undo that; called before the memory is unmapped, never in a deleter.
struct Pin {
  char* data;
  int device;
  void (*unpin)(const Pin& pin);
};

class HostMemory {
 public:
  // Maps `bytes` bytes; their pages come with Populate. numa_node: preferred, -1 for none.
  // Throws std::system_error.
  static std::shared_ptr<HostMemory> Map(int64_t bytes, HugePages huge_pages, int numa_node);

  ~HostMemory() { Unmap(); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool is_mapped() const { return mapping_ != nullptr; }

  // Makes the pages of [begin, end) present, with num_threads threads. Throws std::system_error.
  void Populate(int64_t begin, int64_t end, int num_threads);

  void AddPin(const Pin& pin) { pins_.push_back(pin); }

  // Handlers refuse the memory from here on; arrays over it stay valid.
  void Close() { GetLiveMemory().Remove(data_); }

  // Ends the pins (which waits for their devices), then the mapping. For the last owner only.
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
  std::vector<Pin> pins_;
};

}  // namespace kvpool
