#include "ffi_cpu.h"

#include <algorithm>

#include "copy_cpu.h"
#include "ffi_copy.h"

namespace kvpool {
namespace {

ffi::Error CopyNow(const CopyOperands& operands, Direction direction, Integers plan) {
  const auto error = CopyOnCpu(AsSpan(plan), operands, direction);
  return error ? FailedPrecondition(*error) : ffi::Error::Success();
}

template <Direction direction>
ffi::Error CopyCpu(HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer, ffi::RemainingArgs arrays,
                   ffi::RemainingRets results, Integers plan, int64_t first_result, int64_t /*max_blocks*/) {
  auto operands = CheckOperands(GetLiveMemory(), host, device_pages, host_pages, layer.typed_data(), arrays, results,
                                plan, first_result);
  if (operands.has_error()) return operands.error();
  return CopyNow(*operands, direction, plan);
}

// There is no copy engine: ids in host memory are ids. The scratch is not used, but must be as a GPU needs it.
template <Direction direction>
ffi::Error CopyByEngineCpu(HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer, Scratch scratch,
                           ffi::RemainingArgs arrays, ffi::Result<Scratch> same, ffi::RemainingRets results,
                           Integers plan, int64_t first_result, int64_t max_blocks, int64_t /*max_staging_blocks*/,
                           int64_t /*min_engine_pairs*/) {
  const auto memory = InPlace(scratch, same);
  if (memory.has_error()) return memory.error();
  const auto ids_bytes = static_cast<int64_t>(device_pages.size_bytes() + host_pages.size_bytes());
  if (memory->bytes < ids_bytes) return FailedPrecondition("the scratch is too small");
  return CopyCpu<direction>(host, device_pages, host_pages, layer, arrays, results, plan, first_result, max_blocks);
}

// What a flight's scratch begins with: how often it was started, and waited for.
struct Counts {
  int64_t num_starts, num_waits;
};
Counts& CountsOf(const Bytes& scratch) { return *reinterpret_cast<Counts*>(scratch.data); }

ffi::Error ScratchCpu(ffi::RemainingArgs /*operands*/, ffi::Result<Scratch> scratch) {
  const Bytes bytes = AsBytes(*scratch);
  if (bytes.bytes < static_cast<int64_t>(sizeof(Counts))) return FailedPrecondition("the scratch is too small");
  CountsOf(bytes) = {};
  return ffi::Error::Success();
}

// Copies at once, the first time.
ffi::Error StartCpu(HostArray host, PageIds load_device_pages, PageIds load_host_pages, PageIds store_device_pages,
                    PageIds store_host_pages, Scratch scratch, ffi::RemainingArgs arrays, ffi::Result<Scratch> same,
                    ffi::RemainingRets results, Integers load_plan, Integers store_plan, Integers /*wait_stages*/,
                    int64_t load_scratch_bytes, int64_t store_scratch_bytes, int64_t /*max_load_blocks*/,
                    int64_t /*max_store_blocks*/) {
  auto stored =
      CheckOperands(GetLiveMemory(), host, store_device_pages, store_host_pages, nullptr, arrays, results, store_plan);
  if (stored.has_error()) return stored.error();
  auto loaded =
      CheckOperands(GetLiveMemory(), host, load_device_pages, load_host_pages, nullptr, arrays, results, load_plan);
  if (loaded.has_error()) return loaded.error();
  const auto flight = InPlace(scratch, same);
  if (flight.has_error()) return flight.error();
  if (flight->bytes < std::max<int64_t>(load_scratch_bytes + store_scratch_bytes, sizeof(Counts))) {
    return FailedPrecondition("the scratch is too small");
  }
  if (CountsOf(*flight).num_starts++ > 0) return ffi::Error::Success();
  if (auto error = CopyNow(*stored, Direction::kStore, store_plan); error.failure()) return error;
  return CopyNow(*loaded, Direction::kLoad, load_plan);
}

ffi::Error WaitCpu(Scratch scratch, ffi::RemainingArgs operands, ffi::Result<Scratch> same, ffi::RemainingRets results,
                   Integers /*arrays*/, int64_t layer_operand, int64_t /*num_ends*/) {
  const auto flight = InPlace(scratch, same);
  if (flight.has_error()) return flight.error();
  if (flight->bytes < static_cast<int64_t>(sizeof(Counts))) return FailedPrecondition("the scratch is too small");
  const auto layer = LayerOf(operands, layer_operand);
  if (layer.has_error()) return layer.error();
  const int64_t expected = CountsOf(*flight).num_waits++ / 2;  // of a layer, each wait is made twice
  if (*layer != nullptr && **layer != expected) return FailedPrecondition(kWaitedOutOfOrder);
  const auto in_place = InPlace(operands, results);
  return in_place.has_error() ? in_place.error() : ffi::Error::Success();
}

}  // namespace
}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCpu, kvpool::Guarded<kvpool::CopyCpu<kvpool::Direction::kLoad>>::Call,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCpu, kvpool::Guarded<kvpool::CopyCpu<kvpool::Direction::kStore>>::Call,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolScratchCpu, kvpool::Guarded<kvpool::ScratchCpu>::Call,
                              kvpool::BindScratch(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStartCpu, kvpool::Guarded<kvpool::StartCpu>::Call,
                              kvpool::BindStart(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolWaitCpu, kvpool::Guarded<kvpool::WaitCpu>::Call,
                              kvpool::BindWait(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadByEngineCpu,
                              kvpool::Guarded<kvpool::CopyByEngineCpu<kvpool::Direction::kLoad>>::Call,
                              kvpool::BindCopyByEngine(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreByEngineCpu,
                              kvpool::Guarded<kvpool::CopyByEngineCpu<kvpool::Direction::kStore>>::Call,
                              kvpool::BindCopyByEngine(xla::ffi::Ffi::Bind()));
