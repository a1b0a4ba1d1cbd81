#include "copy_cpu.h"

#include <cstring>

namespace kvpool {
namespace {

void Copy(const PageCopy& copy, Direction direction) {
  const int begin = copy.LayerBegin();
  if (begin < 0) return;
  for (int64_t pair = 0; pair < copy.num_pairs; ++pair) {
    const int32_t device_page = copy.device_pages[pair], host_page = copy.HostPage(pair);
    if (!copy.Contains(device_page, host_page)) continue;
    for (int s = begin; s < begin + copy.slabs_per_layer; ++s) {
      for (int outer = 0; outer < copy.num_outer; ++outer) {
        for (int inner = 0; inner < copy.num_inner; ++inner) {
          char* device = At(copy.slabs[s].device, copy.device_strides, device_page, outer, inner);
          char* host = At(copy.slabs[s].host, copy.host_strides, host_page, outer, inner);
          if (direction == Direction::kLoad) {
            std::memcpy(device, host, copy.run_bytes);
          } else {
            std::memcpy(host, device, copy.run_bytes);
          }
        }
      }
    }
  }
}

}  // namespace

std::optional<std::string> CopyOnCpu(std::span<const int64_t> plan, const CopyOperands& operands, Direction direction) {
  std::vector<Stage> stages;
  if (auto error = ReadPlan(plan, operands, stages)) return error;
  for (const Stage& stage : stages) {
    for (const PageCopy& copy : stage.copies) Copy(copy, direction);
  }
  return std::nullopt;
}

}  // namespace kvpool
