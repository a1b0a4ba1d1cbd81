#pragma once

#include "copy_plan.h"

namespace kvpool {

// Copies now. Returns an error if the operands are not those that the plan was made for.
std::optional<std::string> CopyOnCpu(std::span<const int64_t> plan, const CopyOperands& operands, Direction direction);

}  // namespace kvpool
