#include "side_streams.h"

#include <algorithm>
#include <map>

namespace kvpool {
namespace {

// Calls of the driver, which the runtime does not offer.
using StreamValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);
StreamValue write_value = nullptr, wait_value = nullptr;

cudaError_t FindDriverCall(const char* name, StreamValue& call) {
  constexpr unsigned kCudaVersion = 11070;
  cudaDriverEntryPointQueryResult found;
  void* address = nullptr;
  if (const auto error = cudaGetDriverEntryPointByVersion(name, &address, kCudaVersion, cudaEnableDefault, &found)) {
    return error;
  }
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  call = reinterpret_cast<StreamValue>(address);
  return cudaSuccess;
}

// The runtime's errors have the driver's numbers.
cudaError_t AsRuntimeError(CUresult result) { return static_cast<cudaError_t>(result); }

}  // namespace

cudaError_t SideStreams::Get(SideStreams*& streams) {
  static std::mutex mutex;
  static auto* const by_device = new std::map<int, SideStreams>;  // outlives every thread of XLA's
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  streams = &(*by_device)[device];
  return streams->is_created_ ? cudaSuccess : streams->Create();
}

// What was made before an earlier attempt failed is not made again.
cudaError_t SideStreams::Create() {
  if (const cudaError_t error = FindDriverCall("cuStreamWriteValue32", write_value)) return error;
  if (const cudaError_t error = FindDriverCall("cuStreamWaitValue32", wait_value)) return error;
  // Highest priority: a copy needs a few SMs, and needs them now, while a GEMM has thousands of blocks waiting.
  int lowest = 0, highest = 0;
  if (const cudaError_t error = cudaDeviceGetStreamPriorityRange(&lowest, &highest)) return error;
  for (Side& side : sides_) {
    if (side.stream != nullptr) continue;
    if (const cudaError_t error = cudaStreamCreateWithPriority(&side.stream, cudaStreamNonBlocking, highest)) {
      return error;
    }
  }
  constexpr size_t kFlagBytes = 256;  // apart from each other: a line of the L2 cache is shorter
  const size_t bytes = kFlagBytes * sides_.size();
  if (flags_ == nullptr) {
    if (const cudaError_t error = cudaMalloc(&flags_, bytes)) return error;
  }
  if (is_out_of_order_ == nullptr) {
    if (const cudaError_t error = cudaMallocHost(&is_out_of_order_, sizeof(*is_out_of_order_))) return error;
    *is_out_of_order_ = 0;
  }
  if (const cudaError_t error = cudaMemsetAsync(flags_, 0, bytes, load())) return error;
  if (const cudaError_t error = cudaStreamSynchronize(load())) return error;
  for (size_t i = 0; i < sides_.size(); ++i) {
    sides_[i].newest = {reinterpret_cast<CUdeviceptr>(flags_) + i * kFlagBytes, 0};
  }
  is_created_ = true;
  return cudaSuccess;
}

cudaError_t SideStreams::SetMark(cudaStream_t stream, Mark& mark) {
  const auto side = std::find_if(sides_.begin(), sides_.end(), [&](const Side& some) { return some.stream == stream; });
  if (side == sides_.end()) return cudaErrorInvalidValue;
  const std::lock_guard lock(mutex_);
  mark = side->newest;
  ++mark.value;  // may begin again at 0: the comparison is cyclic
  if (const auto error = AsRuntimeError(write_value(stream, mark.flag, mark.value, CU_STREAM_WRITE_VALUE_DEFAULT))) {
    return error;
  }
  side->newest = mark;
  return cudaSuccess;
}

cudaError_t SideStreams::Wait(const Mark& mark, cudaStream_t after) {
  return AsRuntimeError(wait_value(after, mark.flag, mark.value, CU_STREAM_WAIT_VALUE_GEQ));
}

cudaError_t SideStreams::Order(cudaStream_t before, cudaStream_t after) {
  cudaEvent_t event;
  if (const cudaError_t error = TakeEvent(event)) return error;
  cudaError_t error = cudaEventRecord(event, before);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(after, event, 0);
  GiveBack({event});
  return error;
}

cudaError_t SideStreams::TakeEvent(cudaEvent_t& event) {
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      event = free_.back();
      free_.pop_back();
      return cudaSuccess;
    }
  }
  return cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
}

void SideStreams::GiveBack(const std::vector<cudaEvent_t>& events) {
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), events.begin(), events.end());
}

void SideStreams::Synchronize() {
  for (const Side& side : sides_) cudaStreamSynchronize(side.stream);
}

}  // namespace kvpool
