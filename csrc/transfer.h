// One direction of a call whose ids the CPU may read, or which runs beside the model: its pairs, and how they are
// moved.
#pragma once

#include <cuda_runtime.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "copy_engine.h"
#include "copy_plan.h"
#include "host_memory.h"
#include "side_streams.h"

namespace kvpool {

// Enqueues all copies of a stage as kernels.
cudaError_t LaunchAll(const Stage& stage, Direction direction, int64_t max_blocks, cudaStream_t stream);

class Transfer {
 public:
  // `scratch`: of device memory, for staging and behind it the ids.
  Transfer(Direction direction, CopyOperands operands, Bytes scratch, int64_t max_blocks)
      : direction_(direction),
        operands_(std::move(operands)),
        scratch_(scratch),
        max_blocks_(max_blocks),
        max_staging_blocks_(max_blocks) {}

  // Other blocks for the kernels between staging and layers; and the copy engine only for so many pairs that are not
  // skipped: however long a list is padded, a few pages are sooner moved by a kernel.
  void SetEngine(int64_t max_staging_blocks, int64_t min_engine_pairs) {
    max_staging_blocks_ = max_staging_blocks;
    min_engine_pairs_ = min_engine_pairs;
  }

  bool IsEmpty() const { return operands_.num_pairs == 0; }
  bool HasStaging() const { return staging_.has_value(); }
  const std::vector<Bytes>& arrays() const { return operands_.arrays; }
  const Bytes& host() const { return operands_.host; }
  size_t num_stages() const { return stages_.size(); }

  // Decides who moves the pages: the copy engine what the plan says, if the CPU can read the ids it needs.
  // Returns an error if the operands are not the plan's.
  std::optional<std::string> Read(std::span<const int64_t> plan, const LiveMemory& live, cudaStream_t stream);

  // Enqueues a stage behind what is in the direction's stream for kernels. Returns in `last` the side stream on which
  // the stage is done. Stages are enqueued in order.
  cudaError_t Enqueue(size_t stage, SideStreams& side, cudaStream_t& last);

  // To be called when no more stages come.
  void GiveBackEvents(SideStreams& side) {
    if (staging_) staging_->GiveBackEvents(side);
  }

 private:
  Direction direction_;
  CopyOperands operands_;
  Bytes scratch_;
  int64_t max_blocks_, max_staging_blocks_;
  int64_t min_engine_pairs_ = 0;
  std::vector<Stage> stages_;
  ReadableIds ids_;
  std::optional<Staging> staging_;  // if the copy engine has a part in it
};

}  // namespace kvpool
