#include "ffi_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "copy_cuda.h"
#include "ffi_copy.h"
#include "flight.h"
#include "side_streams.h"
#include "transfer.h"

namespace kvpool {
namespace {

const LiveMemory* live_memory = nullptr;
std::atomic<int64_t> num_handler_calls{0};
std::atomic<int64_t> num_engine_calls{0};

ffi::Error CudaFailed(const char* what, cudaError_t error) {
  cudaGetLastError();  // a pending error would be taken for one of the next launch
  return FailedPrecondition(std::string(what) + ": " + cudaGetErrorString(error));
}

Flights flights;

// Does something at the end of a handler that fails, however it does.
template <typename Action>
class UnlessDone {
 public:
  explicit UnlessDone(Action action) : action_(std::move(action)) {}
  ~UnlessDone() {
    if (is_done_) return;
    try {
      action_();  // waits first; what may fail for want of memory is giving events back
    } catch (const std::bad_alloc&) {
    }
  }
  UnlessDone(const UnlessDone&) = delete;
  UnlessDone& operator=(const UnlessDone&) = delete;

  void Done() { is_done_ = true; }

 private:
  Action action_;
  bool is_done_ = false;
};

template <Direction direction>
ffi::Error CopyCuda(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages, Scalar layer,
                    ffi::RemainingArgs arrays, ffi::RemainingRets results, Integers plan, int64_t first_result,
                    int64_t max_blocks) {
  num_handler_calls.fetch_add(1, std::memory_order_relaxed);
  auto operands = CheckOperands(*live_memory, host, device_pages, host_pages, layer.typed_data(), arrays, results, plan,
                                first_result);
  if (operands.has_error()) return operands.error();
  flights.AbandonOver(operands->arrays);
  std::vector<Stage> stages;
  if (const auto error = ReadPlan(AsSpan(plan), *operands, stages)) return FailedPrecondition(*error);
  for (const Stage& stage : stages) {
    if (const cudaError_t error = LaunchAll(stage, direction, max_blocks, stream)) {
      return CudaFailed("launching the copy", error);
    }
  }
  return ffi::Error::Success();
}

// Memory of XLA's is all that is asked for.
ffi::Error ScratchCuda(cudaStream_t /*stream*/, ffi::RemainingArgs /*operands*/, ffi::Result<Scratch> /*scratch*/) {
  return ffi::Error::Success();
}

// ---- Ids that the CPU can read, and copies beside the compute stream ----

template <Direction direction>
ffi::Error CopyByEngineCuda(cudaStream_t stream, HostArray host, PageIds device_pages, PageIds host_pages,
                            Scalar /*layer*/, Scratch scratch, ffi::RemainingArgs arrays, ffi::Result<Scratch> same,
                            ffi::RemainingRets results, Integers plan, int64_t first_result, int64_t max_blocks,
                            int64_t max_staging_blocks, int64_t min_engine_pairs) {
  auto operands =
      CheckOperands(*live_memory, host, device_pages, host_pages, nullptr, arrays, results, plan, first_result);
  if (operands.has_error()) return operands.error();
  const auto staging = InPlace(scratch, same);
  if (staging.has_error()) return staging.error();
  flights.AbandonOver(operands->arrays);
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  Transfer transfer(direction, *std::move(operands), *staging, max_blocks);
  transfer.SetEngine(max_staging_blocks, min_engine_pairs);
  if (const auto error = transfer.Read(AsSpan(plan), *live_memory, stream)) return FailedPrecondition(*error);
  num_engine_calls.fetch_add(transfer.HasStaging(), std::memory_order_relaxed);
  if (transfer.IsEmpty()) return ffi::Error::Success();
  std::vector<int64_t> wait_stages(transfer.num_stages());
  std::iota(wait_stages.begin(), wait_stages.end(), 0);
  Transfer none(direction, {}, {}, max_blocks);
  constexpr bool is_load = direction == Direction::kLoad;
  constexpr int64_t kNoRun = 0;  // nobody looks for this flight
  Flight flight(*staging, kNoRun, *side, std::move(is_load ? none : transfer), std::move(is_load ? transfer : none),
                wait_stages);
  UnlessDone abandon([&] { flight.Abandon(); });
  if (const cudaError_t error = flight.Start(stream)) return CudaFailed("starting the copies", error);
  for (const int64_t stage : wait_stages) {
    if (const cudaError_t error = flight.Wait(stage, stream)) return CudaFailed("copying", error);
  }
  abandon.Done();
  return ffi::Error::Success();
}

// Whether waits for these stages, in this order, are for all of `num_stages`, or for no copy at all.
bool AreStages(std::span<const int64_t> wait_stages, size_t num_stages) {
  if (wait_stages.empty() || wait_stages.front() < 0 || !std::is_sorted(wait_stages.begin(), wait_stages.end())) {
    return false;
  }
  return num_stages == 0 || static_cast<size_t>(wait_stages.back()) + 1 == num_stages;
}

ffi::Error StartCuda(cudaStream_t stream, ffi::RunId run, HostArray host, PageIds load_device_pages,
                     PageIds load_host_pages, PageIds store_device_pages, PageIds store_host_pages, Scratch scratch,
                     ffi::RemainingArgs arrays, ffi::Result<Scratch> same, ffi::RemainingRets results,
                     Integers load_plan, Integers store_plan, Integers wait_stages, int64_t load_scratch_bytes,
                     int64_t store_scratch_bytes, int64_t max_load_blocks, int64_t max_store_blocks) {
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  UnlessDone abandon([&] { flights.AbandonOf(run.run_id, *side); });  // the step has failed
  auto stored =
      CheckOperands(*live_memory, host, store_device_pages, store_host_pages, nullptr, arrays, results, store_plan);
  if (stored.has_error()) return stored.error();
  auto loaded =
      CheckOperands(*live_memory, host, load_device_pages, load_host_pages, nullptr, arrays, results, load_plan);
  if (loaded.has_error()) return loaded.error();
  const auto memory = InPlace(scratch, same);
  if (memory.has_error()) return memory.error();
  if (const auto flight = flights.Find(memory->data, run.run_id); flight && flight->CountStart() == 1) {
    const auto is_same = [](const Bytes& a, const Bytes& b) { return a.data == b.data; };
    if (!std::equal(loaded->arrays.begin(), loaded->arrays.end(), flight->arrays().begin(), flight->arrays().end(),
                    is_same)) {
      return FailedPrecondition("XLA copied an array of the device pool while pages travelled to it");
    }
    abandon.Done();
    return ffi::Error::Success();
  }
  if (side->WasOutOfOrder()) return FailedPrecondition(std::string(kWaitedOutOfOrder) + ", in an earlier step");
  flights.AbandonOver({{*memory}});
  flights.AbandonOver(loaded->arrays);
  const auto [data, bytes] = *memory;
  if (load_scratch_bytes < 0 || store_scratch_bytes < 0 || load_scratch_bytes > bytes ||
      store_scratch_bytes > bytes - load_scratch_bytes) {
    return FailedPrecondition("the scratch is too small");
  }
  Transfer load(Direction::kLoad, *std::move(loaded), {data, load_scratch_bytes}, max_load_blocks);
  Transfer store(Direction::kStore, *std::move(stored), {data + load_scratch_bytes, store_scratch_bytes},
                 max_store_blocks);
  if (const auto error = load.Read(AsSpan(load_plan), *live_memory, stream)) return FailedPrecondition(*error);
  if (const auto error = store.Read(AsSpan(store_plan), *live_memory, stream)) return FailedPrecondition(*error);

  const size_t num_stages = std::max(store.num_stages(), load.num_stages());
  if (!AreStages(AsSpan(wait_stages), num_stages) || (!load.IsEmpty() && load.num_stages() != num_stages) ||
      (!store.IsEmpty() && store.num_stages() != num_stages)) {
    return FailedPrecondition("the stages of the load, the store and the waits differ");
  }
  auto flight =
      std::make_shared<Flight>(*memory, run.run_id, *side, std::move(store), std::move(load), AsSpan(wait_stages));
  flight->CountStart();
  flights.Add(flight);
  if (const cudaError_t error = flight->Start(stream)) return CudaFailed("starting the copies", error);
  abandon.Done();
  return ffi::Error::Success();
}

// Makes `stream` wait for the next stage of the copies into these arrays of the device pool, number `indices` of the
// start's; or, at the end, for all that are left.
ffi::Error WaitForStage(cudaStream_t stream, Flight& flight, std::span<const Bytes> arrays,
                        std::span<const int64_t> indices, bool is_end) {
  if (arrays.size() != indices.size()) return FailedPrecondition("a wait for other arrays than its plan says");
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto index = static_cast<size_t>(indices[i]);
    if (index >= flight.arrays().size() || flight.arrays()[index].data != arrays[i].data) {
      return FailedPrecondition(
          "a layer is waited for in another array than it is loaded into: XLA copied an array of the device pool while "
          "it was in use");
    }
  }
  auto stage = flight.CountWait();
  if (!stage && !is_end) return FailedPrecondition("more waits than the start was told of");
  for (; stage; stage = is_end ? flight.CountWait() : std::nullopt) {
    if (const cudaError_t error = flight.Wait(*stage, stream)) return CudaFailed("waiting for the copies", error);
  }
  return ffi::Error::Success();
}

ffi::Error WaitCuda(cudaStream_t stream, ffi::RunId run, Scratch scratch, ffi::RemainingArgs operands,
                    ffi::Result<Scratch> same, ffi::RemainingRets results, Integers indices, int64_t layer_operand,
                    int64_t num_ends) {
  SideStreams* side = nullptr;
  if (const cudaError_t error = SideStreams::Get(side)) return CudaFailed("side streams", error);
  UnlessDone abandon([&] { flights.AbandonOf(run.run_id, *side); });  // the step has failed
  const auto flight = flights.Find(scratch.untyped_data(), run.run_id);
  if (!flight) {
    return FailedPrecondition("a wait without a start: XLA copied the scratch of the copies while it was in use");
  }
  if (const auto memory = InPlace(scratch, same); memory.has_error()) return memory.error();
  auto in_place = InPlace(operands, results);
  if (in_place.has_error()) return in_place.error();
  in_place->resize(results.size());
  const auto layer = LayerOf(operands, layer_operand);
  if (layer.has_error()) return layer.error();
  if (*layer != nullptr) {  // which the device alone knows: a layer's wait is made twice
    const auto expected = static_cast<int32_t>(flight->num_waits() / 2);
    if (const auto error = CheckEqual(*layer, expected, side->is_out_of_order(), stream)) {
      return CudaFailed("checking the order of layers", error);
    }
  }
  if (auto waited = WaitForStage(stream, *flight, *in_place, AsSpan(indices), num_ends > 0); waited.failure()) {
    return waited;
  }
  if (num_ends > 0 && flight->CountEnd() == num_ends) flights.Remove(*flight);
  abandon.Done();
  return ffi::Error::Success();
}

auto BindCuda() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace

void SetLiveMemory(const LiveMemory* live) { live_memory = live; }

void AbandonFlights(const void* data, int64_t bytes) {
  const Bytes memory = {static_cast<char*>(const_cast<void*>(data)), bytes};
  flights.AbandonOver({{memory}});
}

int64_t NumFlights() { return static_cast<int64_t>(flights.size()); }

int64_t NumHandlerCalls() { return num_handler_calls.load(std::memory_order_relaxed); }
int64_t NumEngineCalls() { return num_engine_calls.load(std::memory_order_relaxed); }

}  // namespace kvpool

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadCuda, kvpool::Guarded<kvpool::CopyCuda<kvpool::Direction::kLoad>>::Call,
                              kvpool::BindCopy(kvpool::BindCuda()), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreCuda, kvpool::Guarded<kvpool::CopyCuda<kvpool::Direction::kStore>>::Call,
                              kvpool::BindCopy(kvpool::BindCuda()), {xla::ffi::Traits::kCmdBufferCompatible});
// Not for command buffers: ids are read, and waits counted, on the host, every time a handler runs.
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolLoadByEngineCuda,
                              kvpool::Guarded<kvpool::CopyByEngineCuda<kvpool::Direction::kLoad>>::Call,
                              kvpool::BindCopyByEngine(kvpool::BindCuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStoreByEngineCuda,
                              kvpool::Guarded<kvpool::CopyByEngineCuda<kvpool::Direction::kStore>>::Call,
                              kvpool::BindCopyByEngine(kvpool::BindCuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolScratchCuda, kvpool::Guarded<kvpool::ScratchCuda>::Call,
                              kvpool::BindScratch(kvpool::BindCuda()), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolStartCuda, kvpool::Guarded<kvpool::StartCuda>::Call,
                              kvpool::BindStart(kvpool::BindCuda().Ctx<xla::ffi::RunId>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(KvPoolWaitCuda, kvpool::Guarded<kvpool::WaitCuda>::Call,
                              kvpool::BindWait(kvpool::BindCuda().Ctx<xla::ffi::RunId>()));
