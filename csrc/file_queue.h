// Work on files by several threads that never ask for the GIL, for the one thread of Python that makes a call:
//
//   Python's thread    submit ... take a result, check or seal its record, submit ... (work) ... take a result ...
//   the others         open, read, close, open, read, close, ...
//
// Where threads of Python did it, each call of the system gave the GIL up and waited for it again: eight of them put
// records of 260 KiB at 0.5 of fio's speed, and two got them from the page cache no faster than one
// (benchmarks/files.py).
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "record_file.h"

namespace kvpool {

class FileQueue {
 public:
  using Call = std::function<FileResult()>;
  struct Done {
    int64_t index;
    FileResult result;
  };

  // depth: how many work at once. One of them is Take, which works rather than wait, so one thread less is started, as
  // there is work for it; fewer, if the system gives none.
  explicit FileQueue(size_t depth) : depth_(depth) {}
  ~FileQueue() { Close(); }
  FileQueue(const FileQueue&) = delete;
  FileQueue& operator=(const FileQueue&) = delete;

  // `is_urgent`: before all that is not. What `call` throws becomes its result, an errno. Throws std::bad_alloc, and
  // nothing is submitted then.
  void Submit(int64_t index, Call call, bool is_urgent = false);

  // Moves a result, in the order in which they come, to `done`. False: none came in time, or none will.
  bool Take(Done& done, std::chrono::milliseconds patience);
  bool IsEmpty() const;  // none will

  // Drops what has not begun and all results, and waits for what has: nothing touches any file or record afterwards.
  void Close();

 private:
  struct Task {
    Call call;
    Done done;
  };

  void Run();
  void Work(std::unique_lock<std::mutex>& lock);  // the first task, without the lock

  const size_t depth_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable has_work_, has_done_;
  std::list<Task> todo_, done_;  // lists: a task moves from one to the other where there is no memory
  size_t num_working_ = 0, num_idle_ = 0;
  bool is_closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvpool
