// What else a user could call from an FFI handler, for the same work and with the same operands as
// jax_kvpool_load_by_engine and jax_kvpool_store_by_engine. Both page-id arrays must be in host memory, but for `bulk`.
//   slabs:   cudaMemcpyBatchAsync, an entry for each slab, straight between the pools
//   records: one cudaMemcpyAsync for each record, to or from a staging buffer for all, and one scatter or gather
//   raw:     only the copies of `records`: nothing arrives in the layers
//   bulk:    no rival, but a candidate of ours: the kernel of bulk.cu; page ids in device memory
#include <cuda_runtime.h>

#include "../csrc/copy_cuda.h"
#include "../csrc/ffi_copy.h"

namespace kvpool {

// As LaunchCopy, in bulk.cu. An error unless everything is a multiple of 16 bytes.
cudaError_t LaunchBulk(const PageCopy& copy, Direction direction, int64_t max_blocks, cudaStream_t stream);

namespace {

std::string Say(cudaError_t error) { return cudaGetErrorString(error); }

CopyOperands Operands(const HostArray& host, const PageIds& device_pages, const PageIds& host_pages,
                      std::vector<Bytes> arrays) {
  return {.host = {reinterpret_cast<char*>(host.typed_data()), static_cast<int64_t>(host.size_bytes())},
          .arrays = std::move(arrays),
          .device_pages = device_pages.typed_data(),
          .host_pages = host_pages.typed_data(),
          .layer = nullptr,
          .num_pairs = static_cast<int64_t>(device_pages.element_count())};
}

template <Direction direction>
ffi::Error Slabs(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages, Scalar,
                 ffi::RemainingArgs arrays, ffi::Result<Scratch>, ffi::RemainingRets results, Integers plan, int64_t) {
  auto in_place = InPlace(arrays, results);
  if (in_place.has_error()) return in_place.error();
  const CopyOperands operands = Operands(host, device_pages, host_pages, *std::move(in_place));
  std::vector<Stage> stages;
  if (const auto error = ReadPlan(AsSpan(plan), operands, stages)) return FailedPrecondition(*error);
  std::vector<void*> in_device, in_host;
  std::vector<size_t> sizes;
  for (const PageCopy& copy : stages[0].copies) {
    if (copy.num_outer * copy.num_inner != 1) return FailedPrecondition("slabs must be contiguous");
    for (int64_t pair = 0; pair < copy.num_pairs; ++pair) {
      for (int s = 0; s < copy.num_slabs; ++s) {
        in_device.push_back(At(copy.slabs[s].device, copy.device_strides, copy.device_pages[pair], 0, 0));
        in_host.push_back(At(copy.slabs[s].host, copy.host_strides, copy.host_pages[pair], 0, 0));
        sizes.push_back(copy.run_bytes);
      }
    }
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t all = 0;
  auto& targets = direction == Direction::kLoad ? in_device : in_host;
  auto& sources = direction == Direction::kLoad ? in_host : in_device;
  const cudaError_t error =
      cudaMemcpyBatchAsync(const_cast<const void**>(targets.data()), const_cast<const void**>(sources.data()),
                           sizes.data(), sizes.size(), &attributes, &all, 1, stream);
  return error ? FailedPrecondition("slabs: " + Say(error)) : ffi::Error::Success();
}

template <Direction direction, bool is_raw>
ffi::Error Records(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages, Scalar,
                   ffi::RemainingArgs arrays, ffi::Result<Scratch> scratch, ffi::RemainingRets results, Integers plan,
                   int64_t max_blocks) {
  auto in_place = InPlace(arrays, results);
  if (in_place.has_error()) return in_place.error();
  const CopyOperands operands = Operands(host, device_pages, host_pages, *std::move(in_place));
  const Bytes staging = AsBytes(*scratch);
  std::vector<Stage> stages;
  if (const auto error = ReadPlan(AsSpan(plan), operands, stages, staging.data)) return FailedPrecondition(*error);
  const auto launch = [&] {
    for (const PageCopy& copy : stages[0].copies) LaunchCopy(copy, direction, max_blocks, stream);
  };
  if (direction == Direction::kStore && !is_raw) launch();
  for (int64_t pair = 0; pair < operands.num_pairs; ++pair) {
    for (const Span& span : stages[0].spans) {
      char* staged = staging.data + pair * stages[0].staged_page_bytes + span.staged_offset;
      char* record = operands.host.data + span.offset + operands.host_pages[pair] * span.page_stride;
      const bool is_load = direction == Direction::kLoad;
      cudaMemcpyAsync(is_load ? staged : record, is_load ? record : staged, span.bytes, cudaMemcpyDefault, stream);
    }
  }
  if (direction == Direction::kLoad && !is_raw) launch();
  const cudaError_t error = cudaGetLastError();
  return error ? FailedPrecondition("records: " + Say(error)) : ffi::Error::Success();
}

template <Direction direction>
ffi::Error Bulk(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer,
                ffi::RemainingArgs arrays, ffi::Result<Scratch>, ffi::RemainingRets results, Integers plan,
                int64_t max_blocks) {
  auto in_place = InPlace(arrays, results);
  if (in_place.has_error()) return in_place.error();
  CopyOperands operands = Operands(host, device_pages, host_pages, *std::move(in_place));
  operands.layer = layer.typed_data();  // as our kernel has it
  std::vector<Stage> stages;
  if (const auto error = ReadPlan(AsSpan(plan), operands, stages)) return FailedPrecondition(*error);
  for (const PageCopy& copy : stages[0].copies) {
    const cudaError_t error = LaunchBulk(copy, direction, max_blocks, stream);
    if (error != cudaSuccess) return FailedPrecondition("bulk: " + Say(error));
  }
  return ffi::Error::Success();
}

auto Bind() { return BindCopyByEngine(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()); }

}  // namespace
}  // namespace kvpool

#define PEER(name, function, ...) XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, kvpool::Bind(), ##__VA_ARGS__)
PEER(load_slabs, kvpool::Slabs<kvpool::Direction::kLoad>);
PEER(store_slabs, kvpool::Slabs<kvpool::Direction::kStore>);
PEER(load_records, (kvpool::Records<kvpool::Direction::kLoad, false>));
PEER(store_records, (kvpool::Records<kvpool::Direction::kStore, false>));
PEER(load_raw, (kvpool::Records<kvpool::Direction::kLoad, true>));
PEER(store_raw, (kvpool::Records<kvpool::Direction::kStore, true>));
PEER(load_bulk, kvpool::Bulk<kvpool::Direction::kLoad>, {xla::ffi::Traits::kCmdBufferCompatible});  // as ours
PEER(store_bulk, kvpool::Bulk<kvpool::Direction::kStore>, {xla::ffi::Traits::kCmdBufferCompatible});
