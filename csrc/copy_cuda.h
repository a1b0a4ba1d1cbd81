#pragma once

#include <cuda_runtime.h>

#include "page_copy.h"

namespace kvpool {

// Enqueues `copy` on `stream` as one kernel of at most `max_blocks` thread blocks.
// Does not wait, allocate or read device memory, so that it may be captured into a CUDA graph.
cudaError_t LaunchCopy(const PageCopy& copy, Direction direction, int64_t max_blocks, cudaStream_t stream);

// Enqueues a kernel that sets `*is_different`, in pinned memory, to 1 if `*value` is not `expected`.
cudaError_t CheckEqual(const int32_t* value, int32_t expected, int32_t* is_different, cudaStream_t stream);

// Loads the kernels into the current device's context: a CUDA graph capture must not meet a lazy load. To be called
// once for each device, before its first copy.
cudaError_t PreloadCopy();

}  // namespace kvpool
