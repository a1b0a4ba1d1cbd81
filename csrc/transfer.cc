#include "transfer.h"

#include <tuple>

#include "copy_cuda.h"

namespace kvpool {

cudaError_t LaunchAll(const Stage& stage, Direction direction, int64_t max_blocks, cudaStream_t stream) {
  for (const PageCopy& copy : stage.copies) {
    if (const cudaError_t error = LaunchCopy(copy, direction, max_blocks, stream)) return error;
  }
  return cudaSuccess;
}

std::optional<std::string> Transfer::Read(std::span<const int64_t> plan, const LiveMemory& live, cudaStream_t stream) {
  if (IsEmpty()) return std::nullopt;
  const int64_t ids_bytes = operands_.num_pairs * static_cast<int64_t>(sizeof(int32_t));
  const int64_t staging_bytes = scratch_.bytes - 2 * ids_bytes;
  if (staging_bytes < 0) return ReadPlan(plan, operands_, stages_);
  char* copies = scratch_.data + staging_bytes;
  for (const auto [pages, readable, copy] :
       {std::tuple(&operands_.host_pages, &ids_.host_pages, copies),
        std::tuple(&operands_.device_pages, &ids_.device_pages, copies + ids_bytes)}) {
    // Only in our own memory: ids elsewhere may still be written by somebody.
    if (!live.Covers(*pages, ids_bytes)) continue;
    // A kernel reads ids later, when their memory may be in use again, so it gets a copy. From memory that CUDA has
    // not pinned, that is made before the call returns.
    readable->assign(*pages, *pages + operands_.num_pairs);
    const cudaError_t error = cudaMemcpyAsync(copy, readable->data(), ids_bytes, cudaMemcpyHostToDevice, stream);
    if (error != cudaSuccess) return std::string("copying page ids: ") + cudaGetErrorString(error);
    *pages = reinterpret_cast<const int32_t*>(copy);
  }
  if (!ids_.host_pages.empty() && (direction_ == Direction::kLoad || !ids_.device_pages.empty())) {
    staging_.emplace(scratch_.data, staging_bytes);
  }
  return ReadPlan(plan, operands_, stages_, staging_ ? scratch_.data : nullptr);
}

cudaError_t Transfer::Enqueue(size_t stage, cudaStream_t stream, SideStreams& side, cudaStream_t& last) {
  const bool is_load = direction_ == Direction::kLoad;
  const cudaStream_t engine = is_load ? side.load_engine() : side.store_engine();
  const Stage& current = stages_[stage];
  if (current.is_by_slab && !ids_.host_pages.empty() && !ids_.device_pages.empty()) {
    last = engine;
    return CopySlabs(current, ids_, direction_, stream, engine, side);
  }
  if (staging_ && !current.spans.empty()) {
    last = is_load ? stream : engine;
    return staging_->Copy(current, operands_.host.data, ids_, direction_, max_blocks_, stream, engine, side);
  }
  last = stream;
  return LaunchAll(current, direction_, max_blocks_, stream);
}

}  // namespace kvpool
