#include "ffi_cpu.h"

#include "copy_cpu.h"
#include "ffi_copy.h"

namespace kvpool {
namespace {

template <Direction direction>
ffi::Error CopyCpu(ffi::Buffer<ffi::U8, 2> host, ffi::Buffer<ffi::S32, 1> device_pages,
                   ffi::Buffer<ffi::S32, 1> host_pages, ffi::Buffer<ffi::S32, 0> layer, ffi::RemainingArgs arrays,
                   ffi::RemainingRets results, ffi::Span<const int64_t> plan, int64_t /*max_blocks*/) {
  return RunCopy(GetLiveMemory(), host, device_pages, host_pages, layer, arrays, results, plan,
                 [](const PageCopy& copy) -> std::optional<std::string> {
                   CopyOnCpu(copy, direction);
                   return std::nullopt;
                 });
}

}  // namespace
}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCpu, kvpool::CopyCpu<kvpool::Direction::kLoad>,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCpu, kvpool::CopyCpu<kvpool::Direction::kStore>,
                              kvpool::BindCopy(xla::ffi::Ffi::Bind()));
