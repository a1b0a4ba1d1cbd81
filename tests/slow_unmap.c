// To be preloaded into a process: `munmap` of large mappings that takes as long as a test wants, and who called it.
// tests/test_unmapping.py has the same struct.
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

struct {
  int64_t min_bytes, max_bytes;  // of the mappings that it is about
  int32_t is_gated;              // do not unmap before this is 0, or some seconds have passed
  int32_t pause_us;              // nor before that
  int32_t num_begun, num_ended;
  int32_t thread;  // the last one
} unmaps = {.min_bytes = INT64_MAX};

int munmap(void* data, size_t bytes) {
  const int is_meant = (int64_t)bytes >= unmaps.min_bytes && (int64_t)bytes < unmaps.max_bytes;
  if (is_meant) {
    unmaps.thread = (int32_t)syscall(SYS_gettid);
    __atomic_fetch_add(&unmaps.num_begun, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 5000 && __atomic_load_n(&unmaps.is_gated, __ATOMIC_SEQ_CST); ++i) usleep(1000);
    usleep(unmaps.pause_us);
  }
  const int result = (int)syscall(SYS_munmap, data, bytes);
  if (is_meant) __atomic_fetch_add(&unmaps.num_ended, 1, __ATOMIC_SEQ_CST);
  return result;
}
