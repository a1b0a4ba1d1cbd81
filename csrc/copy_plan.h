// From a call's operands and its plan to PageCopies. The plan is what jax_kvpool/plan.py made of the two layouts
// when the call was traced, as the int64 list that an FFI attribute can be:
//
//   num_device_pages, num_host_pages, host_bytes, num_arrays, bytes of each array, num_stages, then for each stage
//     is_by_slab, staged_page_bytes, num_spans, then for each span
//       offset in the host pool, page stride, bytes, offset in a staged page
//     num_copies, then for each PageCopy
//       num_outer, num_inner, run_bytes, device page, outer, inner stride, host page, outer, inner stride,
//       first_slab, slabs_per_layer, num_slabs, then for each slab
//         array, offset in it, offset in the host pool, offset in a staged page
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "page_copy.h"

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
  std::vector<Span> spans;  // what it moves through staging; none: it is not to
  std::vector<PageCopy> copies;
};

// How many arrays of the device pool a plan is for.
inline size_t NumArrays(std::span<const int64_t> plan) { return static_cast<size_t>(plan[3]); }

// Reads `plan` into `stages`. With a `staging` buffer, the copies of stages that have spans go between it and the
// device pool, and pair i is page i of it. Returns an error if the operands are not those that the plan was made for.
inline std::optional<std::string> ReadPlan(std::span<const int64_t> plan, const CopyOperands& operands,
                                           std::vector<Stage>& stages, char* staging = nullptr) {
  auto next = plan.begin();
  const auto read = [&next] { return *next++; };

  PageCopy copy;
  copy.device_pages = operands.device_pages;
  copy.layer = operands.layer;
  copy.num_pairs = operands.num_pairs;
  copy.num_device_pages = static_cast<int32_t>(read());
  copy.num_host_pages = static_cast<int32_t>(read());
  if (const int64_t expected = read(); operands.host.bytes != expected) {
    return "host pool: expected " + std::to_string(expected) + " bytes, got " + std::to_string(operands.host.bytes);
  }
  if (const int64_t expected = read(), got = static_cast<int64_t>(operands.arrays.size()); got != expected) {
    return "device pool: expected " + std::to_string(expected) + " arrays, got " + std::to_string(got);
  }
  for (size_t i = 0; i < operands.arrays.size(); ++i) {
    if (const int64_t expected = read(), got = operands.arrays[i].bytes; got != expected) {
      return "device pool: expected " + std::to_string(expected) + " bytes in array " + std::to_string(i) + ", got " +
             std::to_string(got);
    }
  }
  stages.resize(read());
  for (Stage& stage : stages) {
    stage.is_by_slab = read() != 0;
    stage.staged_page_bytes = read();
    stage.spans.resize(read());
    for (Span& span : stage.spans) {
      span.offset = read();
      span.page_stride = read();
      span.bytes = read();
      span.staged_offset = read();
    }
    const bool is_staged = staging != nullptr && !stage.spans.empty();
    copy.host_pages = is_staged ? nullptr : operands.host_pages;
    for (int64_t num_copies = read(); num_copies > 0; --num_copies) {
      copy.num_outer = static_cast<int32_t>(read());
      copy.num_inner = static_cast<int32_t>(read());
      copy.run_bytes = read();
      for (Strides* strides : {&copy.device_strides, &copy.host_strides}) {
        strides->page_bytes = read();
        strides->outer_bytes = read();
        strides->inner_bytes = read();
      }
      if (is_staged) copy.host_strides.page_bytes = stage.staged_page_bytes;
      copy.first_slab = static_cast<int32_t>(read());
      copy.slabs_per_layer = static_cast<int32_t>(read());
      copy.num_slabs = static_cast<int32_t>(read());
      for (int32_t s = 0; s < copy.num_slabs; ++s) {
        const int64_t array = read(), device_offset = read(), host_offset = read(), staged_offset = read();
        copy.slabs[s] = {operands.arrays[array].data + device_offset,
                         is_staged ? staging + staged_offset : operands.host.data + host_offset};
      }
      stage.copies.push_back(copy);
    }
  }
  return std::nullopt;
}

}  // namespace kvpool
