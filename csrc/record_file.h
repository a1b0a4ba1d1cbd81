// A page record and the file that it is kept in (jax_kvpool/stores/file.py): what is done to the file, without Python.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace kvpool {

// O_DIRECT wants memory and lengths in such multiples, as page records are.
constexpr int64_t kDirectAlignment = 4096;

// A descriptor, closed by whoever is first.
class OpenFile {
 public:
  explicit OpenFile(int descriptor = -1) : descriptor_(descriptor) {}
  ~OpenFile() { Close(); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int descriptor() const { return descriptor_; }
  // To one that is closed.
  void Take(int descriptor) { descriptor_ = descriptor; }
  void Close();

 private:
  std::atomic<int> descriptor_;  // -1: closed
};

struct FileResult {
  int error = 0;           // an errno
  int64_t file_bytes = 0;  // -1: it is not a regular file
  bool is_direct_refused = false;
  std::shared_ptr<OpenFile> file = nullptr;
};

// How long a file is.
FileResult StatRecord(const std::string& path);

// The same, and if it is exactly as long as `record`, it is read and marked as used just now.
FileResult ReadRecord(const std::string& path, std::span<char> record, bool is_direct);

// Makes an empty file and locks it: what is not locked was left behind by somebody who died. EEXIST: `path` is a
// regular file of `bytes` bytes, so there is no need for one, and it is marked as used just now. ESTALE: another name,
// please, since this one is taken, or somebody who cleans took it for left behind before the lock.
FileResult CreateRecord(const std::string& temporary, const std::string& path, int64_t bytes);

// Writes `record` to a file of CreateRecord, flushes it if `sync`, and gives it the name `path`; then its temporary
// name is gone and it is closed. After an error both are still there, unless it was flushing the new name.
FileResult WriteRecord(OpenFile& file, const std::string& temporary, const std::string& path, std::span<char> record,
                       bool is_direct, bool sync);

FileResult RemoveRecord(const std::string& path);

// Whether a file can be read without the disk; also if it cannot be read at all.
bool IsCached(const std::string& path);

}  // namespace kvpool
