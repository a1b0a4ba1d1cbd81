// What the handlers of every platform share: operands in, checks, copies out.
#pragma once

#include <exception>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "copy_plan.h"
#include "host_memory.h"
#include "xla/ffi/api/ffi.h"

namespace kvpool {

namespace ffi = ::xla::ffi;

using HostArray = ffi::Buffer<ffi::U8, 2>;  // (num_pages, page_bytes), in host memory
using PageIds = ffi::Buffer<ffi::S32, 1>;   // (num_pairs,)
using Scalar = ffi::Buffer<ffi::S32, 0>;
using Scratch = ffi::Buffer<ffi::U8, 1>;  // device memory for the time of the call: staging, or a copy of ids
using Integers = ffi::Span<const int64_t>;

inline ffi::Error FailedPrecondition(std::string message) {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_kvpool: " + std::move(message));
}

// A handler as XLA may call it. XLA is behind a C interface, where an exception would end the process: Guarded<f>::Call
// is `f`, but what it throws becomes the error of the call. For every handler.
template <auto handler>
struct Guarded;

template <typename... Args, ffi::Error (*handler)(Args...)>
struct Guarded<handler> {
  static ffi::Error Call(Args... args) {
    try {
      return handler(std::forward<Args>(args)...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_kvpool: out of host memory");
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_kvpool: ") + error.what());
    } catch (...) {
      return ffi::Error(ffi::ErrorCode::kInternal, "jax_kvpool: an exception of unknown type");
    }
  }
};

// Binds the operands of a load or store to a platform's own (a stream, or nothing).
// A store changes the host pool although it is an operand. What orders the calls is the arrays of the device pool:
// each call takes them and returns them, aliased, and the bytes of a slab in the host pool are touched only by calls
// on the array that holds the same slab.
template <typename Binding>
auto BindOperands(Binding& binding) {
  return std::move(binding)
      .template Arg<HostArray>()
      .template Arg<PageIds>()  // device_pages
      .template Arg<PageIds>()  // host_pages
      .template Arg<Scalar>()   // layer
      .RemainingArgs();         // the arrays of the device pool
}

template <typename Binding>
auto BindCopy(Binding binding) {
  return BindOperands(binding)
      .RemainingRets()  // the same arrays
      .template Attr<Integers>("plan")
      .template Attr<int64_t>("max_blocks");
}

// For page ids in host memory, which may be read when the call is made. The layer is not: it is 0.
template <typename Binding>
auto BindCopyByEngine(Binding binding) {
  return BindOperands(binding)
      .template Ret<Scratch>()
      .RemainingRets()  // the same arrays
      .template Attr<Integers>("plan")
      .template Attr<int64_t>("max_blocks");
}

// Binds the start of a load and a store, of which either may be empty.
template <typename Binding>
auto BindStart(Binding binding) {
  return std::move(binding)
      .template Arg<HostArray>()
      .template Arg<PageIds>()  // device_pages and host_pages of the load
      .template Arg<PageIds>()
      .template Arg<PageIds>()  // of the store
      .template Arg<PageIds>()
      .RemainingArgs()  // the arrays of the device pool, then what must not be computed with before
      .template Ret<Scratch>()
      .template Ret<Scalar>()  // a token that the waits pass on, so that they keep their order and are all done or none
      .RemainingRets()         // the same arrays
      .template Attr<Integers>("load_plan")
      .template Attr<Integers>("store_plan")          // of the same stages
      .template Attr<Integers>("wait_stages")         // the last stage that each wait waits for
      .template Attr<int64_t>("load_scratch_bytes")   // at the beginning of the scratch, the store's at its end; 0 if
      .template Attr<int64_t>("store_scratch_bytes")  // their ids are in device memory
      .template Attr<int64_t>("max_load_blocks")
      .template Attr<int64_t>("max_store_blocks");
}

// Binds a wait: its last operands are its results, the others are there for order, or to stay alive until here. One
// without arrays of the device pool is the end: all that it does is to make whoever uses a result use all waits.
template <typename Binding>
auto BindWait(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()                     // arrays of the device pool first
      .template Attr<Integers>("arrays");  // which of the start's they are
}

inline Bytes AsBytes(Scratch& scratch) {
  return {reinterpret_cast<char*>(scratch.typed_data()), static_cast<int64_t>(scratch.size_bytes())};
}

inline std::span<const int64_t> AsSpan(Integers integers) { return {integers.begin(), integers.size()}; }

// The arrays of the device pool, each of them operand and result of the call at the same address.
inline ffi::ErrorOr<std::vector<Bytes>> InPlace(ffi::RemainingArgs arrays, ffi::RemainingRets results) {
  if (arrays.size() < results.size()) return ffi::Unexpected(FailedPrecondition("more results than operands"));
  std::vector<Bytes> in_place;
  const size_t skipped = arrays.size() - results.size();
  for (size_t i = 0; i < results.size(); ++i) {
    const auto array = arrays.get<ffi::AnyBuffer>(skipped + i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return ffi::Unexpected(array.error());
    if (result.has_error()) return ffi::Unexpected(result.error());
    if (array->untyped_data() != (*result)->untyped_data()) {
      return ffi::Unexpected(FailedPrecondition("device pool: array " + std::to_string(i) +
                                                " was not updated in place: XLA broke the alias of this call"));
    }
    in_place.push_back({static_cast<char*>(array->untyped_data()), static_cast<int64_t>(array->size_bytes())});
  }
  return in_place;
}

// The operands of a call as the copies need them, checked.
inline ffi::ErrorOr<CopyOperands> CheckOperands(const LiveMemory& live, const HostArray& host,
                                                const PageIds& device_pages, const PageIds& host_pages,
                                                const int32_t* layer, ffi::RemainingArgs arrays,
                                                ffi::RemainingRets results, Integers plan) {
  auto pieces = live.PiecesOf(host.untyped_data());
  if (!live.Contains(host.untyped_data(), static_cast<int64_t>(host.size_bytes()))) {
    return ffi::Unexpected(FailedPrecondition(
        "the host pool of this call is not the memory of an open HostMemory. It was closed, or the array was copied "
        "(donated, returned from a jit, or changed by another op): pass HostPool as a plain argument of the jitted "
        "function, never donated and never returned."));
  }
  if (device_pages.element_count() != host_pages.element_count()) {
    return ffi::Unexpected(FailedPrecondition("device_pages and host_pages differ in length"));
  }
  auto in_place = InPlace(arrays, results);
  if (in_place.has_error()) return ffi::Unexpected(in_place.error());
  if (in_place->size() > NumArrays(AsSpan(plan))) in_place->resize(NumArrays(AsSpan(plan)));
  return CopyOperands{
      .host = {reinterpret_cast<char*>(host.typed_data()), static_cast<int64_t>(host.size_bytes())},
      .arrays = *std::move(in_place),
      .device_pages = device_pages.typed_data(),
      .host_pages = host_pages.typed_data(),
      .layer = layer,
      .num_pairs = static_cast<int64_t>(device_pages.element_count()),
      .pieces = std::move(pieces),
  };
}

}  // namespace kvpool
