// From a call's operands and its plan to PageCopies. The plan is what jax_kvpool/plan.py made of the two layouts
// when the call was traced, as the int64 list that an FFI attribute can be:
//
//   num_device_pages, num_host_pages, host_bytes, num_arrays, bytes of each array, num_copies, then for each PageCopy
//     num_outer, num_inner, run_bytes, device page, outer, inner stride, host page, outer, inner stride,
//     first_slab, slabs_per_layer, num_slabs, then for each slab
//       array, offset in it, offset in the host pool
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "page_copy.h"

namespace kvpool {

struct Bytes {
  char* data;
  int64_t bytes;
};

struct CopyOperands {
  Bytes host;
  int64_t num_arrays;           // of the device pool
  const int32_t* device_pages;  // [num_pairs]
  const int32_t* host_pages;    // [num_pairs]
  const int32_t* layer;         // [1]
  int64_t num_pairs;
};

// Calls run(const PageCopy&) for every copy of `plan`; run returns a std::optional<std::string> error.
// array(i) -> Bytes is array i of the device pool.
// Returns the first error, also if the operands are not those that the plan was made for.
template <typename Array, typename Run>
std::optional<std::string> RunPlan(std::span<const int64_t> plan, const CopyOperands& operands, Array array, Run run) {
  auto next = plan.begin();
  const auto read = [&next] { return *next++; };

  PageCopy copy;
  copy.device_pages = operands.device_pages;
  copy.host_pages = operands.host_pages;
  copy.layer = operands.layer;
  copy.num_pairs = operands.num_pairs;
  copy.num_device_pages = static_cast<int32_t>(read());
  copy.num_host_pages = static_cast<int32_t>(read());
  if (const int64_t expected = read(); operands.host.bytes != expected) {
    return "host pool: expected " + std::to_string(expected) + " bytes, got " + std::to_string(operands.host.bytes);
  }
  if (const int64_t expected = read(); operands.num_arrays != expected) {
    return "device pool: expected " + std::to_string(expected) + " arrays, got " + std::to_string(operands.num_arrays);
  }
  for (int64_t i = 0; i < operands.num_arrays; ++i) {
    if (const int64_t expected = read(), bytes = array(i).bytes; bytes != expected) {
      return "device pool: expected " + std::to_string(expected) + " bytes in array " + std::to_string(i) + ", got " +
             std::to_string(bytes);
    }
  }
  if (operands.num_pairs == 0) return std::nullopt;

  for (int64_t num_copies = read(); num_copies > 0; --num_copies) {
    copy.num_outer = static_cast<int32_t>(read());
    copy.num_inner = static_cast<int32_t>(read());
    copy.run_bytes = read();
    for (Strides* strides : {&copy.device_strides, &copy.host_strides}) {
      strides->page_bytes = read();
      strides->outer_bytes = read();
      strides->inner_bytes = read();
    }
    copy.first_slab = static_cast<int32_t>(read());
    copy.slabs_per_layer = static_cast<int32_t>(read());
    copy.num_slabs = static_cast<int32_t>(read());
    for (int32_t s = 0; s < copy.num_slabs; ++s) {
      const int64_t index = read(), device_offset = read(), host_offset = read();
      copy.slabs[s] = {array(index).data + device_offset, operands.host.data + host_offset};
    }
    if (auto error = run(copy)) return error;
  }
  return std::nullopt;
}

}  // namespace kvpool
