#include "ffi_cuda.h"

#include <cuda_runtime.h>

#include <atomic>

#include "copy_cuda.h"
#include "ffi_copy.h"

namespace kvpool {
namespace {

const LiveMemory* live_memory = nullptr;
std::atomic<int64_t> num_handler_calls{0};

template <Direction direction>
ffi::Error CopyCuda(cudaStream_t stream, ffi::Buffer<ffi::U8, 2> host, ffi::Buffer<ffi::S32, 1> device_pages,
                    ffi::Buffer<ffi::S32, 1> host_pages, ffi::Buffer<ffi::S32, 0> layer, ffi::RemainingArgs arrays,
                    ffi::RemainingRets results, ffi::Span<const int64_t> plan, int64_t max_blocks) {
  num_handler_calls.fetch_add(1, std::memory_order_relaxed);
  return RunCopy(*live_memory, host, device_pages, host_pages, layer, arrays, results, plan,
                 [&](const PageCopy& copy) -> std::optional<std::string> {
                   const cudaError_t error = LaunchCopy(copy, direction, max_blocks, stream);
                   if (error == cudaSuccess) return std::nullopt;
                   return std::string("launching the copy: ") + cudaGetErrorString(error);
                 });
}

auto BindCopyCuda() { return BindCopy(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()); }

}  // namespace

void SetLiveMemory(const LiveMemory* live) { live_memory = live; }

int64_t NumHandlerCalls() { return num_handler_calls.load(std::memory_order_relaxed); }

}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCuda, kvpool::CopyCuda<kvpool::Direction::kLoad>, kvpool::BindCopyCuda(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCuda, kvpool::CopyCuda<kvpool::Direction::kStore>, kvpool::BindCopyCuda(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
