#include "file_queue.h"

#include <cerrno>
#include <exception>
#include <new>
#include <utility>

namespace kvpool {
namespace {

// An exception that left a thread would end the process.
FileResult ResultOf(const FileQueue::Call& call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return {.error = ENOMEM};
  } catch (...) {
    return {.error = EIO};
  }
}

}  // namespace

void FileQueue::Submit(int64_t index, Call call, bool is_urgent) {
  {
    const std::lock_guard lock(mutex_);
    todo_.insert(is_urgent ? todo_.begin() : todo_.end(), {std::move(call), {.index = index, .result = {}}});
    if (num_idle_ < todo_.size() && threads_.size() + 1 < depth_) {
      try {
        threads_.emplace_back(&FileQueue::Run, this);
      } catch (const std::exception&) {  // no more threads to be had: then with those that there are
      }
    }
  }
  has_work_.notify_one();
}

void FileQueue::Work(std::unique_lock<std::mutex>& lock) {
  std::list<Task> task;
  task.splice(task.end(), todo_, todo_.begin());
  ++num_working_;
  lock.unlock();
  task.front().done.result = ResultOf(task.front().call);
  task.front().call = nullptr;
  lock.lock();
  --num_working_;
  done_.splice(done_.end(), task);
}

void FileQueue::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    ++num_idle_;
    has_work_.wait(lock, [this] { return is_closing_ || !todo_.empty(); });
    --num_idle_;
    if (todo_.empty()) return;
    Work(lock);
    has_done_.notify_one();
  }
}

bool FileQueue::Take(Done& done, std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  if (done_.empty() && !todo_.empty()) Work(lock);
  const auto is_over = [this] { return !done_.empty() || (todo_.empty() && num_working_ == 0); };
  if (!has_done_.wait_for(lock, patience, is_over) || done_.empty()) return false;
  done = std::move(done_.front().done);
  done_.pop_front();
  return true;
}

bool FileQueue::IsEmpty() const {
  const std::lock_guard lock(mutex_);
  return done_.empty() && todo_.empty() && num_working_ == 0;
}

void FileQueue::Close() {
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
    todo_.clear();
  }
  has_work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  done_.clear();  // and the files that nobody took
}

}  // namespace kvpool
