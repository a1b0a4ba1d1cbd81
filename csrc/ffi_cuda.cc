#include "ffi_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "copy_cuda.h"
#include "copy_engine.h"
#include "ffi_copy.h"
#include "flight.h"
#include "side_streams.h"

namespace kvpool {
namespace {

const LiveMemory* live_memory = nullptr;
std::atomic<int64_t> num_handler_calls{0};

ffi::Error CudaFailed(const char* what, cudaError_t error) {
  cudaGetLastError();  // a pending error would be taken for one of the next launch
  return FailedPrecondition(std::string(what) + ": " + cudaGetErrorString(error));
}

cudaError_t LaunchAll(const Stage& stage, Direction direction, int64_t max_blocks, cudaStream_t stream) {
  for (const PageCopy& copy : stage.copies) {
    if (const cudaError_t error = LaunchCopy(copy, direction, max_blocks, stream)) return error;
  }
  return cudaSuccess;
}

template <Direction direction>
ffi::Error CopyCuda(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer,
                    ffi::RemainingArgs arrays, ffi::RemainingRets results, Integers plan, int64_t max_blocks) {
  num_handler_calls.fetch_add(1, std::memory_order_relaxed);
  auto operands =
      CheckOperands(*live_memory, host, device_pages, host_pages, layer.typed_data(), arrays, results, plan);
  if (operands.has_error()) return operands.error();
  std::vector<Stage> stages;
  if (const auto error = ReadPlan(AsSpan(plan), *operands, stages)) return FailedPrecondition(*error);
  for (const Stage& stage : stages) {
    if (const cudaError_t error = LaunchAll(stage, direction, max_blocks, stream)) {
      return CudaFailed("launching the copy", error);
    }
  }
  return ffi::Error::Success();
}

// ---- Ids that the CPU can read, and copies beside the compute stream ----

// One direction of a call: its pairs, and how they are moved.
class Transfer {
 public:
  // `scratch`: of device memory, for staging and behind it the ids; none if all ids are in device memory.
  Transfer(Direction direction, CopyOperands operands, Bytes scratch, int64_t max_blocks)
      : direction_(direction), operands_(std::move(operands)), scratch_(scratch), max_blocks_(max_blocks) {}

  bool IsEmpty() const { return operands_.num_pairs == 0; }
  const std::vector<Bytes>& arrays() const { return operands_.arrays; }
  size_t num_stages() const { return stages_.size(); }

  // Decides who moves the pages: the copy engine those stages that have spans, if the CPU can read the ids it needs.
  std::optional<std::string> Read(Integers plan, cudaStream_t stream) {
    if (IsEmpty()) return std::nullopt;
    const int64_t ids_bytes = operands_.num_pairs * static_cast<int64_t>(sizeof(int32_t));
    const int64_t staging_bytes = scratch_.bytes - 2 * ids_bytes;
    if (staging_bytes < 0) return ReadPlan(AsSpan(plan), operands_, stages_);
    char* copies = scratch_.data + staging_bytes;
    for (const auto [pages, readable, copy] :
         {std::tuple(&operands_.host_pages, &ids_.host_pages, copies),
          std::tuple(&operands_.device_pages, &ids_.device_pages, copies + ids_bytes)}) {
      // Only in our own memory: ids elsewhere may still be written by somebody.
      if (!live_memory->Covers(*pages, ids_bytes)) continue;
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
    return ReadPlan(AsSpan(plan), operands_, stages_, staging_ ? scratch_.data : nullptr);
  }

  // Returns in `last` the stream on which the stage is done.
  cudaError_t Enqueue(size_t stage, cudaStream_t stream, SideStreams& side, cudaStream_t& last) {
    const bool is_load = direction_ == Direction::kLoad;
    last = stream;
    if (!staging_ || stages_[stage].spans.empty()) {
      return LaunchAll(stages_[stage], direction_, max_blocks_, stream);
    }
    const cudaStream_t engine = is_load ? side.load_engine() : side.store_engine();
    if (!is_load) last = engine;
    return staging_->Copy(stages_[stage], operands_.host.data, ids_, direction_, max_blocks_, stream, engine, side);
  }

  void GiveBackEvents(SideStreams& side) {
    if (staging_) staging_->GiveBackEvents(side);
  }

 private:
  Direction direction_;
  CopyOperands operands_;
  Bytes scratch_;
  int64_t max_blocks_;
  std::vector<Stage> stages_;
  ReadableIds ids_;
  std::optional<Staging> staging_;  // if the copy engine has a part in it
};

template <Direction direction>
ffi::Error CopyByEngineCuda(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages,
                            Scalar /*layer*/, ffi::RemainingArgs arrays, ffi::Result<Scratch> scratch,
                            ffi::RemainingRets results, Integers plan, int64_t max_blocks) {
  auto operands = CheckOperands(*live_memory, host, device_pages, host_pages, nullptr, arrays, results, plan);
  if (operands.has_error()) return operands.error();
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  Transfer transfer(direction, *std::move(operands), AsBytes(*scratch), max_blocks);
  if (const auto error = transfer.Read(plan, stream)) return FailedPrecondition(*error);
  cudaError_t error = cudaSuccess;
  cudaStream_t last = stream;
  for (size_t stage = 0; stage < transfer.num_stages() && !error; ++stage) {
    error = transfer.Enqueue(stage, stream, *side, last);
  }
  if (!error && last != stream) error = side->Order(last, stream);
  transfer.GiveBackEvents(*side);
  if (error == cudaSuccess) return ffi::Error::Success();
  side->Synchronize();  // the step has failed, and what runs already must not outlive its buffers
  return CudaFailed("copying", error);
}

//   XLA's stream   start ------- wait, layer 0 -- wait, layer 1 -- ...        (waits by events)
//   store stream     \ store stage 0 | store stage 1 | ...
//   load stream       \      load stage 0 | load stage 1 | ...     each after the store of the same stage

Flights flights;

// Enqueues both copies of all stages; an event behind each lands in flight.done.
cudaError_t EnqueueStages(Transfer& store, Transfer& load, cudaStream_t stream, SideStreams& side, Flight& flight) {
  const auto finish = [&](cudaStream_t on, cudaEvent_t& event) {
    if (const cudaError_t error = side.TakeEvent(event)) return error;
    flight.done.push_back(event);
    return cudaEventRecord(event, on);
  };
  cudaEvent_t event = nullptr;
  cudaStream_t last = nullptr;
  cudaError_t error = cudaSuccess;
  if (!store.IsEmpty()) error = side.Order(stream, side.store());
  if (!load.IsEmpty() && !error) error = side.Order(stream, side.load());
  for (size_t i = 0; i < flight.num_stages && !error; ++i) {
    if (!store.IsEmpty()) {
      error = store.Enqueue(i, side.store(), side, last);
      if (!error) error = finish(last, event);
      for (const cudaStream_t loads : {side.load(), side.load_engine()}) {
        if (!error && !load.IsEmpty()) error = cudaStreamWaitEvent(loads, event, 0);
      }
    }
    if (!load.IsEmpty()) {
      if (!error) error = load.Enqueue(i, side.load(), side, last);
      if (!error) error = finish(last, event);
    }
  }
  store.GiveBackEvents(side);
  load.GiveBackEvents(side);
  return error;
}

ffi::Error StartCuda(cudaStream_t stream, HostArray host, PageIds load_device_pages, PageIds load_host_pages,
                     PageIds store_device_pages, PageIds store_host_pages, ffi::RemainingArgs arrays,
                     ffi::Result<Scratch> scratch, ffi::Result<Scalar> /*token*/, ffi::RemainingRets results,
                     Integers load_plan, Integers store_plan, Integers wait_stages, int64_t load_scratch_bytes,
                     int64_t store_scratch_bytes, int64_t max_blocks) {
  auto stored =
      CheckOperands(*live_memory, host, store_device_pages, store_host_pages, nullptr, arrays, results, store_plan);
  if (stored.has_error()) return stored.error();
  auto loaded =
      CheckOperands(*live_memory, host, load_device_pages, load_host_pages, nullptr, arrays, results, load_plan);
  if (loaded.has_error()) return loaded.error();
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  const auto [data, bytes] = AsBytes(*scratch);
  if (load_scratch_bytes + store_scratch_bytes > bytes) return FailedPrecondition("the scratch is too small");
  Transfer load(Direction::kLoad, *std::move(loaded), {data, load_scratch_bytes}, max_blocks);
  Transfer store(Direction::kStore, *std::move(stored), {data + load_scratch_bytes, store_scratch_bytes}, max_blocks);
  if (const auto error = load.Read(load_plan, stream)) return FailedPrecondition(*error);
  if (const auto error = store.Read(store_plan, stream)) return FailedPrecondition(*error);

  auto flight = std::make_shared<Flight>();
  flight->num_stages = wait_stages.back() + 1;
  for (const Bytes& array : load.arrays()) flight->arrays.push_back(array.data);
  flight->wait_stages.assign(wait_stages.begin(), wait_stages.end());
  for (const auto& lost : flights.Start(flight)) side->GiveBack(lost->done);
  if (const cudaError_t error = EnqueueStages(store, load, stream, *side, *flight)) {
    side->Synchronize();
    return CudaFailed("starting the copies", error);
  }
  return ffi::Error::Success();
}

// Makes `stream` wait for the next stage of the copies into these arrays of the device pool.
ffi::Error WaitForStage(cudaStream_t stream, const std::vector<const void*>& arrays, Integers indices,
                        SideStreams& side) {
  std::shared_ptr<Flight> flight;
  int64_t stage = 0;
  if (const auto error = flights.Wait(arrays, AsSpan(indices), flight, stage)) return FailedPrecondition(*error);
  // Every stage has a wait of its own, and waits come in order.
  const size_t per_stage = flight->done.size() / flight->num_stages;
  for (size_t i = stage * per_stage; i < (stage + 1) * per_stage; ++i) {
    if (const cudaError_t error = cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(flight->done[i]), 0)) {
      return CudaFailed("waiting for the copies", error);
    }
  }
  if (flight->IsOver()) side.GiveBack(flight->done);
  return ffi::Error::Success();
}

ffi::Error WaitCuda(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers indices) {
  const auto in_place = InPlace(operands, results);
  if (in_place.has_error()) return in_place.error();
  if (indices.size() == 0) return ffi::Error::Success();
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  std::vector<const void*> arrays;
  for (size_t i = 0; i < std::min(indices.size(), in_place->size()); ++i) arrays.push_back((*in_place)[i].data);
  auto waited = WaitForStage(stream, arrays, indices, *side);
  if (waited.failure()) side->Synchronize();  // the step has failed, and what runs must not outlive its buffers
  return waited;
}

auto BindCuda() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace

void SetLiveMemory(const LiveMemory* live) { live_memory = live; }

int64_t NumHandlerCalls() { return num_handler_calls.load(std::memory_order_relaxed); }

}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCuda, kvpool::CopyCuda<kvpool::Direction::kLoad>,
                              kvpool::BindCopy(kvpool::BindCuda()), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCuda, kvpool::CopyCuda<kvpool::Direction::kStore>,
                              kvpool::BindCopy(kvpool::BindCuda()), {xla::ffi::Traits::kCmdBufferCompatible});
// Not for command buffers: ids are read, and waits counted, on the host, every time a handler runs.
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadByEngineCuda, kvpool::CopyByEngineCuda<kvpool::Direction::kLoad>,
                              kvpool::BindCopyByEngine(kvpool::BindCuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreByEngineCuda, kvpool::CopyByEngineCuda<kvpool::Direction::kStore>,
                              kvpool::BindCopyByEngine(kvpool::BindCuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStartCuda, kvpool::StartCuda, kvpool::BindStart(kvpool::BindCuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolWaitCuda, kvpool::WaitCuda, kvpool::BindWait(kvpool::BindCuda()));
