// To be preloaded into a process: calls of the system on records' files that fail, do less than they are asked to, or
// take long, as `faults` says; and what was called. tests/test_file_faults.py has the same struct.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct {
  int64_t max_bytes;       // of a transfer; 0: any
  int64_t fails_at;        // transfers fail from this offset in a file on; -1: never
  int64_t num_spared;      // files that are transferred all the same, before
  int64_t num_interrupts;  // transfers that a signal ends, before
  int32_t transfer_errno;  // 0: nothing is transferred
  int32_t open_errno;
  int32_t refuses_direct_flag, refuses_direct;
  int32_t is_not_cached;
  int32_t removes_before_lock;  // files, one by one
  int32_t pause_us;             // of a transfer
  int32_t refuses_threads;      // and counts them
  int32_t refuses_memory;       // to what makes a record, one by one
  int32_t num_direct, num_buffered, num_at_once, max_at_once;
  char order[16];  // of calls: f(sync), l(ink)
} faults = {.fails_at = -1};

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int Fail(int number) {
  errno = number;
  return -1;
}

static __thread int makes_record;  // this thread has looked whether there is one, and takes memory next

static void Note(char call) { strncat(faults.order, &call, strlen(faults.order) + 1 < sizeof faults.order); }

static int IsDirect(int fd) { return (REAL(fcntl)(fd, F_GETFL) & O_DIRECT) != 0; }

// Returns how many bytes may be transferred, or -1.
static ssize_t Begin(int fd, size_t bytes, off_t offset) {
  __atomic_fetch_add(IsDirect(fd) ? &faults.num_direct : &faults.num_buffered, 1, __ATOMIC_SEQ_CST);
  const int at_once = __atomic_add_fetch(&faults.num_at_once, 1, __ATOMIC_SEQ_CST);
  int most = __atomic_load_n(&faults.max_at_once, __ATOMIC_SEQ_CST);
  while (at_once > most &&
         !__atomic_compare_exchange_n(&faults.max_at_once, &most, at_once, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  if (faults.pause_us > 0) usleep(faults.pause_us);
  if (faults.num_interrupts > 0 && faults.num_interrupts--) return Fail(EINTR);
  if (faults.refuses_direct && IsDirect(fd)) return Fail(EINVAL);
  if (faults.max_bytes > 0 && (int64_t)bytes > faults.max_bytes) bytes = faults.max_bytes;
  if (faults.fails_at < 0 || (offset == 0 && faults.num_spared-- > 0)) return bytes;
  if (offset >= faults.fails_at) return faults.transfer_errno ? Fail(faults.transfer_errno) : 0;
  return (int64_t)bytes > faults.fails_at - offset ? faults.fails_at - offset : (int64_t)bytes;
}

static ssize_t End(ssize_t moved, ssize_t allowed) {
  const int number = errno;
  __atomic_fetch_sub(&faults.num_at_once, 1, __ATOMIC_SEQ_CST);
  errno = number;
  return moved < allowed ? moved : allowed;
}

// What is really transferred, for O_DIRECT in whole blocks, where no more than `allowed` bytes shall seem to be.
static size_t RoundUp(ssize_t allowed, size_t bytes) {
  const size_t rounded = (allowed + 4095) / 4096 * 4096;
  return rounded < bytes ? rounded : bytes;
}

ssize_t pread(int fd, void* data, size_t bytes, off_t offset) {
  const ssize_t allowed = Begin(fd, bytes, offset);
  return End(allowed <= 0 ? allowed : REAL(pread)(fd, data, RoundUp(allowed, bytes), offset), allowed);
}

ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  const ssize_t allowed = Begin(fd, bytes, offset);
  return End(allowed <= 0 ? allowed : REAL(pwrite)(fd, data, RoundUp(allowed, bytes), offset), allowed);
}

ssize_t preadv2(int fd, const struct iovec* buffers, int count, off_t offset, int flags) {
  if ((flags & RWF_NOWAIT) && faults.is_not_cached) return Fail(EAGAIN);
  return REAL(preadv2)(fd, buffers, count, offset, flags);
}

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  const int is_record = O_NOFOLLOW | O_NONBLOCK;
  if (faults.open_errno && (flags & is_record) == is_record) return Fail(faults.open_errno);
  return REAL(open)(path, flags, mode);
}

int lstat(const char* path, struct stat* status) {
  const int found = REAL(lstat)(path, status);
  const char* name = strrchr(path, '/');
  makes_record = found < 0 && faults.refuses_memory > 0 && name != NULL && strlen(name) > 32;
  return found;
}

void* malloc(size_t bytes) {
  extern void* __libc_malloc(size_t);
  if (makes_record) {
    makes_record = 0;
    if (__atomic_fetch_sub(&faults.refuses_memory, 1, __ATOMIC_SEQ_CST) > 0) return NULL;
  }
  return __libc_malloc(bytes);
}

int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  if (command == F_SETFL && ((intptr_t)argument & O_DIRECT) && faults.refuses_direct_flag) return Fail(EINVAL);
  return REAL(fcntl)(fd, command, argument);
}

int flock(int fd, int operation) {
  char link[64], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const int is_known = faults.removes_before_lock > 0 && readlink(link, path, sizeof path - 1) > 0;
  if (is_known && strlen(strrchr(path, '/')) == 1 + 32) {  // in tmp/
    --faults.removes_before_lock;
    unlink(path);
  }
  return REAL(flock)(fd, operation);
}

int fsync(int fd) {
  Note('f');
  return REAL(fsync)(fd);
}

int link(const char* source, const char* target) {
  Note('l');
  return REAL(link)(source, target);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  if (faults.refuses_threads > 0 && faults.refuses_threads++) return EAGAIN;
  return REAL(pthread_create)(thread, attributes, run, argument);
}
