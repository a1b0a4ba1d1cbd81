#include "ffi_cpu.h"

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
                   ffi::RemainingRets results, Integers plan, int64_t /*max_blocks*/) {
  auto operands =
      CheckOperands(GetLiveMemory(), host, device_pages, host_pages, layer.typed_data(), arrays, results, plan);
  if (operands.has_error()) return operands.error();
  return CopyNow(*operands, direction, plan);
}

// There is no copy engine: ids in host memory are ids.
template <Direction direction>
ffi::Error CopyByEngineCpu(HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer,
                           ffi::RemainingArgs arrays, ffi::Result<Scratch> /*scratch*/, ffi::RemainingRets results,
                           Integers plan, int64_t max_blocks) {
  return CopyCpu<direction>(host, device_pages, host_pages, layer, arrays, results, plan, max_blocks);
}

// Copies at once.
ffi::Error StartCpu(HostArray host, PageIds load_device_pages, PageIds load_host_pages, PageIds store_device_pages,
                    PageIds store_host_pages, ffi::RemainingArgs arrays, ffi::Result<Scratch> /*scratch*/,
                    ffi::Result<Scalar> token, ffi::RemainingRets results, Integers load_plan, Integers store_plan,
                    Integers /*wait_stages*/, int64_t /*load_scratch_bytes*/, int64_t /*store_scratch_bytes*/,
                    int64_t /*max_load_blocks*/, int64_t /*max_store_blocks*/) {
  auto stored =
      CheckOperands(GetLiveMemory(), host, store_device_pages, store_host_pages, nullptr, arrays, results, store_plan);
  if (stored.has_error()) return stored.error();
  auto loaded =
      CheckOperands(GetLiveMemory(), host, load_device_pages, load_host_pages, nullptr, arrays, results, load_plan);
  if (loaded.has_error()) return loaded.error();
  *token->typed_data() = 0;
  if (auto error = CopyNow(*stored, Direction::kStore, store_plan); error.failure()) return error;
  return CopyNow(*loaded, Direction::kLoad, load_plan);
}

ffi::Error WaitCpu(ffi::RemainingArgs operands, ffi::RemainingRets results, Integers /*arrays*/) {
  const auto in_place = InPlace(operands, results);
  return in_place.has_error() ? in_place.error() : ffi::Error::Success();
}

}  // namespace
}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCpu, kvpool::Guarded<kvpool::CopyCpu<kvpool::Direction::kLoad>>::Call,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCpu, kvpool::Guarded<kvpool::CopyCpu<kvpool::Direction::kStore>>::Call,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
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
