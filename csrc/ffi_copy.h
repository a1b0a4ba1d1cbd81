// What the handlers of every platform share: operands in, checks, copies out.
#pragma once

#include <algorithm>
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
using Scratch = ffi::Buffer<ffi::U8, 1>;  // device memory: staging, and behind it copies of ids
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

// Binds the memory that later calls take in place: an operand, uninitialised but for what a platform says.
template <typename Binding>
auto BindScratch(Binding binding) {
  return std::move(binding)
      .RemainingArgs()  // what tells two of them apart
      .template Ret<Scratch>();
}

// Binds the operands of a load or store to a platform's own (a stream, or nothing).
// A store changes the host pool although it is an operand. What orders the calls is the arrays of the device pool: each
// call takes all that it concerns, and the pool's last one. A load returns those that it concerns, aliased, and a store
// the last of them. So a call comes after all calls that touched the same bytes of the host pool. (A store that only
// reads returns something else that it is given.)
template <typename Binding>
auto BindOperands(Binding& binding) {
  return std::move(binding)
      .template Arg<HostArray>()
      .template Arg<PageIds>()  // device_pages
      .template Arg<PageIds>()  // host_pages
      .template Arg<Scalar>();  // layer
}

template <typename Binding>
auto BindCopy(Binding binding) {
  return BindOperands(binding)
      .RemainingArgs()  // the arrays of the device pool that it concerns, then what comes before the call
      .RemainingRets()  // some of these, in a row
      .template Attr<Integers>("plan")
      .template Attr<int64_t>("first_result")  // which of these is the first result
      .template Attr<int64_t>("max_blocks");
}

// For page ids in host memory, which may be read when the call is made. The layer is not: it is 0.
template <typename Binding>
auto BindCopyByEngine(Binding binding) {
  return BindOperands(binding)
      .template Arg<Scratch>()
      .RemainingArgs()  // as above
      .template Ret<Scratch>()
      .RemainingRets()
      .template Attr<Integers>("plan")
      .template Attr<int64_t>("first_result")
      .template Attr<int64_t>("max_blocks")          // of a kernel between the pools
      .template Attr<int64_t>("max_staging_blocks")  // of one between staging and layers
      .template Attr<int64_t>("min_engine_pairs");   // that are not skipped, for the copy engine; fewer: by kernel
}

// Binds the start of a load and a store, of which either may be empty. The call is made twice: see flight.py.
template <typename Binding>
auto BindStart(Binding binding) {
  return std::move(binding)
      .template Arg<HostArray>()
      .template Arg<PageIds>()  // device_pages and host_pages of the load
      .template Arg<PageIds>()
      .template Arg<PageIds>()  // of the store
      .template Arg<PageIds>()
      .template Arg<Scratch>()  // whose address the waits know the start by, so that they are all done or none
      .RemainingArgs()          // the arrays of the device pool, then what must not be computed with before
      .template Ret<Scratch>()
      .RemainingRets()  // the same
      .template Attr<Integers>("load_plan")
      .template Attr<Integers>("store_plan")          // of the same stages
      .template Attr<Integers>("wait_stages")         // the last stage that each wait waits for
      .template Attr<int64_t>("load_scratch_bytes")   // at the beginning of the scratch
      .template Attr<int64_t>("store_scratch_bytes")  // behind it
      .template Attr<int64_t>("max_load_blocks")
      .template Attr<int64_t>("max_store_blocks");
}

// Binds a wait: what it returns are its first operands, the others are there for order.
//
// An end waits for whatever is still waited for. Waits for one layer each, in a loop, are made twice, as the start is.
template <typename Binding>
auto BindWait(Binding binding) {
  return std::move(binding)
      .template Arg<Scratch>()
      .RemainingArgs()  // arrays of the device pool, then what comes before the wait
      .template Ret<Scratch>()
      .RemainingRets()                          // the arrays
      .template Attr<Integers>("arrays")        // which of the start's they are
      .template Attr<int64_t>("layer_operand")  // which operand behind the scratch is a layer's number, or -1
      .template Attr<int64_t>("num_ends");      // 0, or how often this end is called
}

// The number of a layer that a wait was given: null if it was given none.
inline ffi::ErrorOr<const int32_t*> LayerOf(ffi::RemainingArgs operands, int64_t layer_operand) {
  if (layer_operand < 0) return static_cast<const int32_t*>(nullptr);
  const auto layer = operands.get<Scalar>(static_cast<size_t>(layer_operand));
  if (layer.has_error()) return ffi::Unexpected(layer.error());
  return layer->typed_data();
}

inline constexpr char kWaitedOutOfOrder[] =
    "a flight: layers were waited for in another order than theirs, so that what was computed is wrong";

inline Bytes AsBytes(const Scratch& scratch) {
  return {reinterpret_cast<char*>(scratch.typed_data()), static_cast<int64_t>(scratch.size_bytes())};
}

inline std::span<const int64_t> AsSpan(Integers integers) { return {integers.begin(), integers.size()}; }

// The arrays of a call. Each result is an operand at the same address, from number `first` on.
inline ffi::ErrorOr<std::vector<Bytes>> InPlace(ffi::RemainingArgs arrays, ffi::RemainingRets results,
                                                size_t first = 0) {
  if (arrays.size() < results.size() || arrays.size() - results.size() < first) {
    return ffi::Unexpected(FailedPrecondition("more results than operands"));
  }
  std::vector<Bytes> all;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto array = arrays.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return ffi::Unexpected(array.error());
    all.push_back({static_cast<char*>(array->untyped_data()), static_cast<int64_t>(array->size_bytes())});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (result.has_error()) return ffi::Unexpected(result.error());
    if (all[first + i].data != (*result)->untyped_data()) {
      return ffi::Unexpected(FailedPrecondition("device pool: array " + std::to_string(first + i) +
                                                " was not updated in place: XLA broke the alias of this call"));
    }
  }
  return all;
}

// The scratch of a call, which is its result at the same address.
inline ffi::ErrorOr<Bytes> InPlace(const Scratch& scratch, ffi::Result<Scratch>& result) {
  if (scratch.untyped_data() != result->untyped_data()) {
    return ffi::Unexpected(FailedPrecondition("the scratch of a call was copied: XLA broke the alias of this call"));
  }
  return AsBytes(scratch);
}

// The operands of a call as the copies need them, checked.
inline ffi::ErrorOr<CopyOperands> CheckOperands(const LiveMemory& live, const HostArray& host,
                                                const PageIds& device_pages, const PageIds& host_pages,
                                                const int32_t* layer, ffi::RemainingArgs arrays,
                                                ffi::RemainingRets results, Integers plan, int64_t first_result = 0) {
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
  const size_t num_arrays = NumArrays(AsSpan(plan));
  auto in_place = InPlace(arrays, results, static_cast<size_t>(first_result));
  if (in_place.has_error()) return ffi::Unexpected(in_place.error());
  if (in_place->size() > num_arrays) in_place->resize(num_arrays);  // without what is there for order
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
