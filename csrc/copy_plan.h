// From a call's operands and its plan to PageCopies. The plan is what jax_kvpool/plan.py made of the two layouts
// when the call was traced, as the int64 list that an FFI attribute can be:
//
//   version, num_device_pages, num_host_pages, host_bytes, num_arrays, bytes of each array, num_stages, then for each
//   stage
//     is_by_slab, staged_page_bytes, num_spans, then for each span
//       offset in the host pool, page stride, bytes, offset in a staged page
//     num_copies, then for each PageCopy
//       num_outer, num_inner, run_bytes, device page, outer, inner stride, host page, outer, inner stride,
//       first_slab, slabs_per_layer, num_slabs, then for each slab
//         array, offset in it, offset in the host pool, offset in a staged page
//
// A plan may be older than this library, out of an exported or a cached program, or somebody's mistake. So it is read
// as what it may be, any integers: whatever they are, no copy of what ReadPlan returns touches a byte outside of the
// arrays, the host pool and (page by page) the staging.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "page_copy.h"
#include "pieces.h"

namespace kvpool {

struct Bytes {
  char* data;
  int64_t bytes;
};

inline bool Overlap(const Bytes& a, const Bytes& b) { return a.data < b.data + b.bytes && b.data < a.data + a.bytes; }

struct CopyOperands {
  Bytes host;
  std::vector<Bytes> arrays;    // of the device pool
  const int32_t* device_pages;  // [num_pairs]
  const int32_t* host_pages;    // [num_pairs]
  const int32_t* layer;         // [1], or null: 0
  int64_t num_pairs;
  std::shared_ptr<const Pieces> pieces;  // of the host pool; null: it is one
};

// The contiguous bytes of a page in the host pool that hold its slabs of one stage: the part of a record.
struct Span {
  int64_t offset;  // of page 0, in the host pool
  int64_t page_stride, bytes;
  int64_t staged_offset;  // where the bytes are put in a staged page
};

// What is copied before anybody is told: all layers, or a few.
struct Stage {
  bool is_by_slab;  // the copy engine moves slab by slab, if it knows all ids: each is one run on both sides
  int64_t staged_page_bytes;
  std::vector<Span> spans;               // what it moves through staging; none: it is not to
  std::vector<PageCopy> copies;          // one at least
  std::shared_ptr<const Pieces> pieces;  // of the host pool; null: it is one
};

// The first integer of every plan; jax_kvpool/plan.py has the same number. More than any number of pages, with which
// plans began when they had no version.
constexpr int64_t kPlanVersion = (int64_t{0x6b76706f6f6c} << 16) + 1;  // "kvpool", then what changes with the format

// How many arrays of the device pool a plan says it is for, which ReadPlan checks; 0 if it does not say.
inline size_t NumArrays(std::span<const int64_t> plan) {
  constexpr size_t kPlace = 4;
  return plan.size() > kPlace ? static_cast<size_t>(std::max<int64_t>(plan[kPlace], 0)) : 0;
}

// Reads `plan` into `stages`. With a `staging` buffer, the copies of stages that have spans go between it and the
// device pool, and pair i is page i of it. Returns an error if this is no plan, or if the operands are not those that
// it was made for.
std::optional<std::string> ReadPlan(std::span<const int64_t> plan, const CopyOperands& operands,
                                    std::vector<Stage>& stages, char* staging = nullptr);

}  // namespace kvpool
