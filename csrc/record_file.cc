#include "record_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace kvpool {
namespace {

constexpr int kOpenFlags = O_NOFOLLOW | O_NONBLOCK;  // no link leads elsewhere, and a pipe does not block

int64_t Size(std::span<char> record) { return static_cast<int64_t>(record.size()); }

FileResult Failed(int error) { return {.error = error}; }

int64_t Length(const struct stat& status) { return S_ISREG(status.st_mode) ? status.st_size : -1; }

// The same call again, if a signal ended it.
template <typename Call>
auto Retry(Call call) {
  while (true) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

int Open(const std::string& path, int flags) {
  return Retry([&] { return open(path.c_str(), flags | O_CLOEXEC, 0600); });
}

int Sync(int fd) {
  return Retry([&] { return fsync(fd); });
}

// All of the record, from or to the beginning of the file, directly as long as the system takes it.
template <typename Call>
FileResult Transfer(Call call, int fd, std::span<char> record, bool is_direct) {
  FileResult result;
  is_direct = is_direct && reinterpret_cast<uintptr_t>(record.data()) % kDirectAlignment == 0;
  if (is_direct && fcntl(fd, F_SETFL, O_DIRECT) < 0) {
    result.is_direct_refused = true;
    is_direct = false;
  }
  for (int64_t done = 0; done < Size(record);) {
    const ssize_t moved = Retry([&] { return call(fd, record.data() + done, Size(record) - done, done); });
    if (moved < 0 && errno == EINVAL && is_direct) {
      result.is_direct_refused = true;
    } else if (moved <= 0) {
      result.error = moved < 0 ? errno : EIO;  // no bytes: the file ends early
      return result;
    } else {
      done += moved;
    }
    if (is_direct && (result.is_direct_refused || done % kDirectAlignment != 0)) {
      fcntl(fd, F_SETFL, 0);
      is_direct = false;
    }
  }
  return result;
}

int SyncDirectory(const std::string& directory_path) {
  const OpenFile directory(Open(directory_path, O_RDONLY | O_DIRECTORY));
  return directory.descriptor() < 0 || Sync(directory.descriptor()) < 0 ? errno : 0;
}

}  // namespace

void OpenFile::Close() {
  const int descriptor = descriptor_.exchange(-1);
  if (descriptor < 0) return;
  flock(descriptor, LOCK_UN);  // a process that was forked meanwhile has the file open, too, and would keep it locked
  close(descriptor);
}

FileResult StatRecord(const std::string& path) {
  struct stat status;
  return lstat(path.c_str(), &status) < 0 ? Failed(errno) : FileResult{.file_bytes = Length(status)};
}

FileResult ReadRecord(const std::string& path, std::span<char> record, bool is_direct) {
  const OpenFile file(Open(path, O_RDONLY | kOpenFlags));
  const int fd = file.descriptor();
  struct stat status;
  if (fd < 0 || fstat(fd, &status) < 0) return Failed(errno);
  if (Length(status) != Size(record)) return {.file_bytes = Length(status)};
  FileResult result = Transfer(pread, fd, record, is_direct);
  result.file_bytes = Length(status);
  if (!result.error) futimens(fd, nullptr);  // may fail: of a file that is somebody else's, they see to the time
  return result;
}

FileResult CreateRecord(const std::string& temporary, const std::string& path, int64_t bytes) {
  struct stat status;
  if (lstat(path.c_str(), &status) == 0 && Length(status) == bytes) {
    utimensat(AT_FDCWD, path.c_str(), nullptr, AT_SYMLINK_NOFOLLOW);  // may fail: then it counts as older
    return Failed(EEXIST);
  }
  auto file = std::make_shared<OpenFile>();  // before there is a file that an exception would leave behind
  const int fd = Open(temporary, O_RDWR | O_CREAT | O_EXCL | kOpenFlags);
  if (fd < 0) return Failed(errno == EEXIST ? ESTALE : errno);
  file->Take(fd);
  int error = Retry([&] { return flock(fd, LOCK_EX | LOCK_NB); }) < 0 || fstat(fd, &status) < 0 ? errno : 0;
  if (error == EWOULDBLOCK || (!error && status.st_nlink == 0)) error = ESTALE;
  if (!error) return {.file = std::move(file)};
  unlink(temporary.c_str());
  return Failed(error);
}

FileResult WriteRecord(OpenFile& file, const std::string& temporary, const std::string& path, std::span<char> record,
                       bool is_direct, bool sync) {
  const std::string directory = path.substr(0, path.rfind('/'));  // while an exception leaves all as it was
  const int fd = file.descriptor();
  FileResult result = Transfer(pwrite, fd, record, is_direct);
  if (!result.error && sync && Sync(fd) < 0) result.error = errno;
  if (!result.error && link(temporary.c_str(), path.c_str()) < 0) result.error = errno;
  if (result.error) return result;
  unlink(temporary.c_str());
  file.Close();
  if (sync) result.error = SyncDirectory(directory);
  return result;
}

FileResult RemoveRecord(const std::string& path) { return unlink(path.c_str()) < 0 ? Failed(errno) : FileResult(); }

bool IsCached(const std::string& path) {
  const OpenFile file(Open(path, O_RDONLY | kOpenFlags));
  if (file.descriptor() < 0) return true;
  char byte;
  const iovec buffer = {&byte, 1};
  return preadv2(file.descriptor(), &buffer, 1, 0, RWF_NOWAIT) >= 0;  // not: it would wait, or nobody can tell
}

}  // namespace kvpool
