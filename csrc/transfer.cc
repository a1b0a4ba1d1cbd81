#include "transfer.h"

#include <algorithm>
#include <utility>

#include "copy_cuda.h"

namespace kvpool {

cudaError_t LaunchAll(const Stage& stage, Direction direction, int64_t max_blocks, cudaStream_t stream) {
  for (const PageCopy& copy : stage.copies) {
    if (const cudaError_t error = LaunchCopy(copy, direction, max_blocks, stream)) return error;
  }
  return cudaSuccess;
}

namespace {

constexpr int64_t kStagingAlignment = 2 * 256;  // of two halves

// Enqueues a copy of ids that are in the CPU's own memory, and may be gone when it is executed. CUDA takes at most 64
// KB of such memory before the call returns; with more it would wait for the stream.
cudaError_t CopyIds(char* target, const std::vector<int32_t>& ids, cudaStream_t stream) {
  constexpr size_t kMaxIds = (64 << 10) / sizeof(int32_t);
  for (size_t begin = 0; begin < ids.size(); begin += kMaxIds) {
    const size_t bytes = std::min(kMaxIds, ids.size() - begin) * sizeof(int32_t);
    if (const cudaError_t error = cudaMemcpyAsync(target + begin * sizeof(int32_t), ids.data() + begin, bytes,
                                                  cudaMemcpyHostToDevice, stream)) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

std::optional<std::string> Transfer::Read(std::span<const int64_t> plan, const LiveMemory& live, cudaStream_t stream) {
  if (IsEmpty()) return std::nullopt;
  const int64_t ids_bytes = operands_.num_pairs * static_cast<int64_t>(sizeof(int32_t));
  if (scratch_.bytes < 2 * ids_bytes) return "the scratch is too small";
  const int64_t staging_bytes = (scratch_.bytes - 2 * ids_bytes) / kStagingAlignment * kStagingAlignment;
  char* copy = scratch_.data + staging_bytes;
  for (const auto& [pages, readable] :
       {std::pair(&operands_.host_pages, &ids_.host_pages), std::pair(&operands_.device_pages, &ids_.device_pages)}) {
    cudaError_t error = cudaSuccess;
    if (live.Covers(*pages, ids_bytes)) {
      readable->assign(*pages, *pages + operands_.num_pairs);
      error = CopyIds(copy, *readable, stream);
    } else {  // on the device, or in memory of the CPU that is not ours, which somebody may still be writing
      error = cudaMemcpyAsync(copy, *pages, ids_bytes, cudaMemcpyDefault, stream);
    }
    if (error != cudaSuccess) return std::string("copying page ids: ") + cudaGetErrorString(error);
    *pages = reinterpret_cast<const int32_t*>(copy);
    copy += ids_bytes;
  }
  if (ids_.NumReal() < min_engine_pairs_) ids_ = {};
  if (!ids_.host_pages.empty() && (direction_ == Direction::kLoad || !ids_.device_pages.empty())) {
    staging_.emplace(scratch_.data, staging_bytes);
  }
  return ReadPlan(plan, operands_, stages_, staging_ ? scratch_.data : nullptr);
}

cudaError_t Transfer::Enqueue(size_t stage, SideStreams& side, cudaStream_t& last) {
  const bool is_load = direction_ == Direction::kLoad;
  const cudaStream_t stream = is_load ? side.load() : side.store();
  const cudaStream_t engine = is_load ? side.load_engine() : side.store_engine();
  const Stage& current = stages_[stage];
  if (current.is_by_slab && !ids_.host_pages.empty() && !ids_.device_pages.empty()) {
    last = engine;
    return CopySlabs(current, ids_, direction_, stream, engine, side);
  }
  if (staging_ && !current.spans.empty()) {
    last = is_load ? stream : engine;
    return staging_->Copy(current, operands_.host.data, ids_, direction_, max_staging_blocks_, stream, engine, side);
  }
  last = stream;
  return LaunchAll(current, direction_, max_blocks_, stream);
}

}  // namespace kvpool
