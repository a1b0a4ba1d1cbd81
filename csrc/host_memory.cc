#include "host_memory.h"

#include <linux/mman.h>
#include <pthread.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>

namespace kvpool {
namespace {

constexpr int64_t kSmallPageBytes = 4096;
constexpr int64_t kHugePageBytes = int64_t{2} << 20;
// 16 GiB by 16 threads take 0.44-0.49 s in stripes of this size and 1.7-2.0 s in one long range a thread, on an H100
// machine with 16 cores (Linux 6.18).
constexpr int64_t kStripeBytes = int64_t{32} << 20;

std::atomic<bool> leave_to_exit{false};
std::atomic<int> num_retiring{0};  // threads that unmap
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { BookkeepingMutex().lock(); }, [] { BookkeepingMutex().unlock(); },
                   [] {
                     BookkeepingMutex().unlock();
                     num_retiring = 0;  // the new process has none of them, and must not wait for them at its end
                   });

[[noreturn]] void ThrowErrno(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where memory is missing on the node, another node's is better than none: preferred, not bound.
void PreferNode(char* data, int64_t bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED; the system call spares us libnuma
  constexpr int kBits = 8 * sizeof(unsigned long);
  unsigned long mask[16] = {};
  if (node >= 16 * kBits) ThrowErrno(EINVAL, "numa_node");
  mask[node / kBits] = 1ul << (node % kBits);
  if (syscall(SYS_mbind, data, bytes, kPreferred, mask, 16 * kBits + 1, 0) != 0) ThrowErrno(errno, "mbind");
}

// Returns 0 or an errno.
int PopulateOnThisThread(char* data, int64_t bytes) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE (Linux 5.14): an error where a touch would be a SIGBUS
  while (madvise(data, bytes, kPopulateWrite) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    for (int64_t offset = 0; offset < bytes; offset += kSmallPageBytes) {
      static_cast<volatile char*>(data)[offset] = 0;
    }
    break;
  }
  return 0;
}

// The last owner may be an array that XLA drops on any thread, under its own locks: only hand over.
void Retire(HostMemory* memory) {
  if (!memory->is_mapped() || memory->IsElsewhere()) {
    delete memory;
  } else if (!leave_to_exit) {
    try {
      ++num_retiring;
      std::thread([memory] {
        delete memory;
        --num_retiring;
        num_retiring.notify_all();
      }).detach();
    } catch (...) {  // no thread to be had: rather a leak than a CUDA call here
      --num_retiring;
    }
  }
}

}  // namespace

std::mutex& BookkeepingMutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

LiveMemory& GetLiveMemory() {
  static LiveMemory* const live = new LiveMemory;
  return *live;
}

std::shared_ptr<HostMemory> HostMemory::Map(int64_t bytes, HugePages huge_pages, int numa_node,
                                            std::span<const int64_t> piece_ends) {
  // Room to start on a huge page; an explicit mapping does so by itself and must be whole huge pages.
  constexpr int kHuge = MAP_HUGETLB | (21 << MAP_HUGE_SHIFT);  // of 2 MiB, whatever the machine's default is
  const bool is_explicit = huge_pages == HugePages::kExplicit;
  const int64_t mapping_bytes = RoundUp(bytes, kHugePageBytes) + (is_explicit ? 0 : kHugePageBytes);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (is_explicit ? kHuge : 0);
  void* mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping == MAP_FAILED) ThrowErrno(errno, "mmap");

  std::shared_ptr<HostMemory> memory(new HostMemory, Retire);
  memory->mapping_ = static_cast<char*>(mapping);
  memory->mapping_bytes_ = mapping_bytes;
  memory->data_ = reinterpret_cast<char*>(RoundUp(reinterpret_cast<intptr_t>(mapping), kHugePageBytes));
  memory->bytes_ = bytes;
  try {
    // Advice that a kernel may not know; without it pages are small, and the memory as good.
    if (huge_pages == HugePages::kTransparent) madvise(mapping, mapping_bytes, MADV_HUGEPAGE);
    if (huge_pages == HugePages::kNone) madvise(mapping, mapping_bytes, MADV_NOHUGEPAGE);
    if (numa_node >= 0) PreferNode(memory->mapping_, mapping_bytes, numa_node);
    memory->pieces_ = std::make_shared<const Pieces>(memory->data_, bytes, piece_ends);
    memory->pins_.reserve(piece_ends.size());  // what is pinned must be noted without fail
  } catch (...) {
    memory->Unmap();
    throw;
  }
  GetLiveMemory().Add(memory->data_, bytes, memory->pieces_);
  return memory;
}

void HostMemory::Populate(int64_t begin, int64_t end, int num_threads) {
  if (begin < 0 || begin > end || end > bytes_ || begin % kSmallPageBytes != 0) {
    throw std::invalid_argument("populate: expected a range of the memory from a multiple of 4096 on, got [" +
                                std::to_string(begin) + ", " + std::to_string(end) + ")");
  }
  if (num_threads < 1) throw std::invalid_argument("num_threads: expected a positive number");
  std::atomic<int64_t> next{begin};
  std::atomic<int> error{0};
  const auto work = [&] {
    for (int64_t from; (from = next.fetch_add(kStripeBytes)) < end && error == 0;) {
      if (const int e = PopulateOnThisThread(data_ + from, std::min(kStripeBytes, end - from))) error = e;
    }
  };
  {
    std::vector<std::jthread> threads;  // joined at the end of this block
    for (int i = 0; i < num_threads; ++i) threads.emplace_back(work);
  }
  if (error != 0) ThrowErrno(error, "populating host memory");
}

void HostMemory::Unmap() {
  if (mapping_ == nullptr) return;
  // In a forked process this address may be somebody else's, and CUDA is the parent's.
  bool is_free = !IsElsewhere();
  if (is_free) {
    Close();
    for (const Pin& pin : pins_) is_free = pin.unpin(pin) && is_free;
  }
  pins_.clear();
  if (is_free) munmap(mapping_, mapping_bytes_);
  mapping_ = nullptr;
}

void HostMemory::LeaveToExit() {
  leave_to_exit = true;
  for (int n; (n = num_retiring) != 0;) num_retiring.wait(n);
}

}  // namespace kvpool
