// What the load and store handlers of every platform share: operands in, checks, copies out.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "copy_plan.h"
#include "host_memory.h"
#include "xla/ffi/api/ffi.h"

namespace kvpool {

namespace ffi = ::xla::ffi;

inline ffi::Error FailedPrecondition(std::string message) {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_kvpool: " + std::move(message));
}

// Binds the operands of a call to a platform's own (a stream, or nothing).
// A store changes the host pool although it is an operand. What orders the calls is the arrays of the device pool:
// each call takes them and returns them, aliased, and the bytes of a slab in the host pool are touched only by calls
// on the array that holds the same slab.
template <typename Binding>
auto BindCopy(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::Buffer<ffi::U8, 2>>()   // host, (num_pages, page_bytes), in host memory
      .template Arg<ffi::Buffer<ffi::S32, 1>>()  // device_pages, (num_pairs,)
      .template Arg<ffi::Buffer<ffi::S32, 1>>()  // host_pages, (num_pairs,)
      .template Arg<ffi::Buffer<ffi::S32, 0>>()  // layer, ()
      .RemainingArgs()                           // the arrays of the device pool
      .RemainingRets()                           // the same arrays
      .template Attr<ffi::Span<const int64_t>>("plan")
      .template Attr<int64_t>("max_blocks");
}

// run(const PageCopy&) -> std::optional<std::string> error.
template <typename Run>
ffi::Error RunCopy(const LiveMemory& live, const ffi::Buffer<ffi::U8, 2>& host,
                   const ffi::Buffer<ffi::S32, 1>& device_pages, const ffi::Buffer<ffi::S32, 1>& host_pages,
                   const ffi::Buffer<ffi::S32, 0>& layer, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                   ffi::Span<const int64_t> plan, Run run) {
  if (!live.Contains(host.untyped_data(), static_cast<int64_t>(host.size_bytes()))) {
    return FailedPrecondition(
        "the host pool of this call is not the memory of an open HostMemory. It was closed, or the array was copied "
        "(donated, returned from a jit, or changed by another op): pass HostPool as a plain argument of the jitted "
        "function, never donated and never returned.");
  }
  if (device_pages.element_count() != host_pages.element_count()) {
    return FailedPrecondition("device_pages and host_pages differ in length");
  }
  if (arrays.size() != results.size()) return FailedPrecondition("device pool: as many results as arrays expected");
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto array = arrays.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    if (result.has_error()) return result.error();
    if (array->untyped_data() != (*result)->untyped_data()) {
      return FailedPrecondition("device pool: array " + std::to_string(i) +
                                " was not updated in place: XLA broke the alias of this call");
    }
  }
  const CopyOperands operands = {
      .host = {reinterpret_cast<char*>(host.typed_data()), static_cast<int64_t>(host.size_bytes())},
      .num_arrays = static_cast<int64_t>(arrays.size()),
      .device_pages = device_pages.typed_data(),
      .host_pages = host_pages.typed_data(),
      .layer = layer.typed_data(),
      .num_pairs = static_cast<int64_t>(device_pages.element_count()),
  };
  const auto array = [&](int64_t i) -> Bytes {
    const auto buffer = arrays.get<ffi::AnyBuffer>(i);
    return {static_cast<char*>(buffer->untyped_data()), static_cast<int64_t>(buffer->size_bytes())};
  };
  const auto error = RunPlan(std::span<const int64_t>(plan.begin(), plan.size()), operands, array, run);
  return error ? FailedPrecondition(*error) : ffi::Error::Success();
}

}  // namespace kvpool
