// A candidate for the place of csrc/copy_cuda.cu: the same work by bulk copies (cp.async.bulk, sm_90 on). The bytes
// pass through shared memory instead of registers, and few threads suffice, since each only says what is to be copied.
//
// The bytes to move form one list, ordered pair, slab, run; a warp takes a piece of it at a time. Each warp has a ring
// of buffers of its own, a piece in each, so that no warp waits for another:
//
//              fill                      drain
//   source ----------> buffer i % num ----------> target      lane l does it for runs l, l + 32, ... of the piece
//           until `filled`           until the lane's bulk group is read
//
// Everything must be a multiple of 16 bytes.
#include <algorithm>
#include <cstdint>
#include <cuda/ptx>

#include "../csrc/page_copy.h"

namespace kvpool {
namespace {

namespace ptx = cuda::ptx;

constexpr int kWarpLanes = 32;
// Not tuned yet.
constexpr int kWarpsPerBlock = 4;
constexpr int kBuffersPerWarp = 6;
constexpr uint32_t kBufferBytes = 8 << 10;
constexpr int kRingBytes = kBuffersPerWarp * kBufferBytes;
// How many buffers are being drained while the others are filled. What takes long is the link: the filling of a load,
// the draining of a store.
constexpr int kDrainingOf[] = {/*kLoad*/ 2, /*kStore*/ kBuffersPerWarp / 2};

// How the list of bytes falls into pairs, slabs, runs, and into pieces of at most one buffer.
struct Pieces {
  int64_t count;
  uint32_t piece_bytes, run_bytes, runs_per_slab, runs_per_pair;

  explicit Pieces(const PageCopy& copy)
      : piece_bytes(kBufferBytes),
        run_bytes(static_cast<uint32_t>(copy.run_bytes)),
        runs_per_slab(copy.num_outer * copy.num_inner),
        runs_per_pair(runs_per_slab * copy.slabs_per_layer) {
    // Short runs stay whole, so that each is one copy.
    if (run_bytes <= kBufferBytes / 4) piece_bytes -= kBufferBytes % run_bytes;
    count = (copy.num_pairs * runs_per_pair * run_bytes + piece_bytes - 1) / piece_bytes;
  }
};

// Calls visit(device, host, offset in the piece, bytes) for each run of the piece that is this lane's, or for what of
// it lies in the piece.
template <typename Visit>
__device__ void VisitRuns(const PageCopy& copy, const Pieces& pieces, int first_slab, int64_t piece, Visit visit) {
  const int64_t begin = piece * pieces.piece_bytes;
  const int64_t pair_bytes = int64_t{pieces.runs_per_pair} * pieces.run_bytes;
  const int64_t first_pair = begin / pair_bytes;
  const auto in_first_pair = static_cast<uint32_t>(begin - first_pair * pair_bytes);
  for (uint32_t run = in_first_pair / pieces.run_bytes + threadIdx.x % kWarpLanes;; run += kWarpLanes) {
    const int64_t run_begin = int64_t{run} * pieces.run_bytes - in_first_pair;  // in the piece; or before it
    const int64_t pair = first_pair + run / pieces.runs_per_pair;
    if (run_begin >= pieces.piece_bytes || pair >= copy.num_pairs) return;
    const int32_t device_page = copy.device_pages[pair], host_page = copy.HostPage(pair);
    if (!copy.Contains(device_page, host_page)) continue;
    const uint32_t in_pair = run % pieces.runs_per_pair;
    const uint32_t in_slab = in_pair % pieces.runs_per_slab;
    const uint32_t outer = in_slab / copy.num_inner, inner = in_slab % copy.num_inner;
    const Slab slab = copy.slabs[first_slab + in_pair / pieces.runs_per_slab];
    const int64_t from = max(run_begin, int64_t{0});
    const int64_t to = min(run_begin + pieces.run_bytes, int64_t{pieces.piece_bytes});
    visit(At(slab.device, copy.device_strides, device_page, outer, inner) + (from - run_begin),
          At(slab.host, copy.host_strides, host_page, outer, inner) + (from - run_begin), static_cast<uint32_t>(from),
          static_cast<uint32_t>(to - from));
  }
}

// grid: any; block: kWarpsPerBlock warps, with kRingBytes of dynamic shared memory each.
template <Direction direction>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    CopyByBulk(const __grid_constant__ PageCopy copy, const __grid_constant__ Pieces pieces) {
  extern __shared__ __align__(128) char rings[];  // [kWarpsPerBlock][kBuffersPerWarp][kBufferBytes]
  __shared__ uint64_t barriers[kWarpsPerBlock][kBuffersPerWarp];

  const int first_slab = copy.LayerBegin();
  if (first_slab < 0) return;
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  char* ring = rings + warp * kRingBytes;
  uint64_t* filled = barriers[warp];
  if (lane < kBuffersPerWarp) ptx::mbarrier_init(&filled[lane], kWarpLanes);
  ptx::fence_proxy_async(ptx::space_shared);  // bulk copies are to find them so
  __syncwarp();

  const int64_t first_piece = int64_t{blockIdx.x} * kWarpsPerBlock + warp;
  const int64_t stride = int64_t{gridDim.x} * kWarpsPerBlock;
  const auto visit_runs = [&](int64_t i, auto visit) {  // of the warp's piece i
    VisitRuns(copy, pieces, first_slab, first_piece + i * stride, visit);
  };
  const int64_t num_pieces = (pieces.count - first_piece + stride - 1) / stride;

  const auto fill = [&](int64_t i) {
    char* buffer = ring + i % kBuffersPerWarp * kBufferBytes;
    uint64_t* barrier = &filled[i % kBuffersPerWarp];
    visit_runs(i, [&](char* device, char* host, uint32_t offset, uint32_t bytes) {
      ptx::mbarrier_expect_tx(ptx::sem_relaxed, ptx::scope_cta, ptx::space_shared, barrier, bytes);
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, buffer + offset,
                         direction == Direction::kLoad ? host : device, bytes, barrier);
    });
    ptx::mbarrier_arrive(barrier);
  };
  const auto drain = [&](int64_t i) {
    const char* buffer = ring + i % kBuffersPerWarp * kBufferBytes;
    const uint32_t parity = i / kBuffersPerWarp % 2;
    while (!ptx::mbarrier_try_wait_parity(&filled[i % kBuffersPerWarp], parity)) {
    }
    visit_runs(i, [&](char* device, char* host, uint32_t offset, uint32_t bytes) {
      ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, direction == Direction::kLoad ? device : host,
                         buffer + offset, bytes);
    });
    ptx::cp_async_bulk_commit_group();
  };

  constexpr int kDraining = kDrainingOf[static_cast<int>(direction)];
  constexpr int kFilling = kBuffersPerWarp - kDraining;
  for (int64_t i = 0; i < num_pieces + kFilling; ++i) {
    if (i >= kFilling) {
      drain(i - kFilling);
      // All but the last kDraining pieces are out of their buffers, and so is the one where piece i goes. A lane knows
      // that of its own bulk groups only.
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<kDraining>());
      __syncwarp();
    }
    if (i < num_pieces) fill(i);
  }
  ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());  // written, not only read: what comes next on the stream sees it
}

bool IsAligned(const PageCopy& copy) {
  uint64_t bits = copy.run_bytes;
  for (const Strides& s : {copy.device_strides, copy.host_strides}) {
    bits |= s.page_bytes | s.outer_bytes | s.inner_bytes;
  }
  for (int s = 0; s < copy.num_slabs; ++s) {
    bits |= reinterpret_cast<uint64_t>(copy.slabs[s].device) | reinterpret_cast<uint64_t>(copy.slabs[s].host);
  }
  return bits % 16 == 0;
}

}  // namespace

cudaError_t LaunchBulk(const PageCopy& copy, Direction direction, int64_t max_blocks, cudaStream_t stream) {
  if (!IsAligned(copy)) return cudaErrorMisalignedAddress;
  const Pieces pieces(copy);
  const int64_t num_blocks = std::min((pieces.count + kWarpsPerBlock - 1) / kWarpsPerBlock, max_blocks);
  if (num_blocks <= 0) return cudaSuccess;
  const auto kernel = direction == Direction::kLoad ? CopyByBulk<Direction::kLoad> : CopyByBulk<Direction::kStore>;
  kernel<<<static_cast<unsigned>(num_blocks), kWarpsPerBlock * kWarpLanes, kWarpsPerBlock * kRingBytes, stream>>>(
      copy, pieces);
  return cudaGetLastError();
}

}  // namespace kvpool

// To be called once, before the first copy: more than 48 KB of shared memory must be asked for, and a CUDA graph
// capture must not meet a lazy load.
extern "C" cudaError_t preload_bulk() {
  using namespace kvpool;
  for (const auto kernel : {CopyByBulk<Direction::kLoad>, CopyByBulk<Direction::kStore>}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWarpsPerBlock * kRingBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
