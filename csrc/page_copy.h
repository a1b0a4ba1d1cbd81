// What one copy between a device pool and a host pool moves, as plain data that a CUDA kernel can take as its
// parameter. Every offset of every layout is decided in Python (jax_kvpool/layout.py); here is only arithmetic.
//
//   slab of a page = outer x inner runs of run_bytes contiguous bytes, at the same place for every slab:
//
//     address(slab, page, o, i) = slab + page * page_stride + o * outer_stride + i * inner_stride
//
// One PageCopy holds the slabs that share these strides; a pool of unequal slabs is a few PageCopies.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KVPOOL_HOST_DEVICE __host__ __device__
#else
#define KVPOOL_HOST_DEVICE
#endif

namespace kvpool {

enum class Direction { kLoad, kStore };  // host to device; device to host

struct Strides {
  int64_t page_bytes, outer_bytes, inner_bytes;
};

struct Slab {
  char* device;  // its bytes in page 0 of the device pool
  char* host;    // its bytes in page 0 of the host pool
};

struct PageCopy {
  // A kernel's parameters end at 4096 bytes on every driver we support; more slabs take more launches.
  static constexpr int kMaxSlabs = 232;

  const int32_t* device_pages;  // [num_pairs]
  const int32_t* host_pages;    // [num_pairs]; null: pair i is page i
  const int32_t* layer;         // [1]: the slabs from *layer * slabs_per_layer on; null: as if 0
  int64_t num_pairs;
  int32_t num_device_pages, num_host_pages;  // a pair with an id outside is skipped
  int32_t first_slab;                        // the place of slabs[0] among all slabs of this shape
  int32_t num_slabs;                         // in use in slabs[]: whole layers
  int32_t slabs_per_layer;
  int32_t num_outer, num_inner;
  int64_t run_bytes;
  Strides device_strides, host_strides;
  Slab slabs[kMaxSlabs];

  // Where the slabs of *layer begin in slabs[]; -1 if they are not here.
  KVPOOL_HOST_DEVICE int LayerBegin() const {
    const int64_t begin = (layer ? int64_t{*layer} : 0) * slabs_per_layer - first_slab;
    return begin >= 0 && begin + slabs_per_layer <= num_slabs ? static_cast<int>(begin) : -1;
  }
  KVPOOL_HOST_DEVICE int32_t HostPage(int64_t pair) const {
    return host_pages ? host_pages[pair] : static_cast<int32_t>(pair);
  }
  KVPOOL_HOST_DEVICE bool Contains(int32_t device_page, int32_t host_page) const {
    return device_page >= 0 && device_page < num_device_pages && host_page >= 0 && host_page < num_host_pages;
  }
};
static_assert(sizeof(PageCopy) <= 4096 - 64);  // and the rest of the kernel's parameters

KVPOOL_HOST_DEVICE inline char* At(char* slab, const Strides& strides, int64_t page, int64_t outer, int64_t inner) {
  return slab + page * strides.page_bytes + outer * strides.outer_bytes + inner * strides.inner_bytes;
}

}  // namespace kvpool
