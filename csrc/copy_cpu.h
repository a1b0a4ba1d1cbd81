#pragma once

#include "page_copy.h"

namespace kvpool {

// Does what `copy` says on the calling thread. All pointers are in host memory.
void CopyOnCpu(const PageCopy& copy, Direction direction);

}  // namespace kvpool
