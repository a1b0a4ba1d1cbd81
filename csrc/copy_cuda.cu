// Moves pages over PCIe with few thread blocks. The link is the bottleneck, so all that counts is bytes in flight:
// every lane issues kUnitsInFlight independent reads before its first write, of the widest access that all addresses
// allow, and consecutive lanes touch consecutive bytes wherever both sides are contiguous.
//
// The bytes to move form one list of units (one access each), ordered pair, slab, run, offset; a warp takes
// kUnitsInFlight * 32 consecutive units at a time, whatever slab or pair they belong to, so that short slabs
// (one token, one layer) keep as many bytes in flight as long ones.
//
// An access is aligned to its own length, so it lies in one of the pieces of host memory that are registered with CUDA
// (pieces.h): a slab may lie across two of them.
#include <algorithm>
#include <cstdint>

#include "copy_cuda.h"

namespace kvpool {
namespace {

constexpr int kWarpLanes = 32;
// H100, PCIe Gen5 x16, 4 blocks, pages of 16 tokens (32 KB slabs), fraction of a contiguous cudaMemcpyAsync:
//   warps x units   8 x 4   8 x 8   8 x 16  16 x 4  16 x 8  16 x 16  32 x 4  32 x 8
//   load            0.51    0.66    0.82    0.92    0.95    0.91     0.92    0.92
//   store           0.94    0.94    0.95    0.947   0.947   0.91     0.94    0.91
// 16 blocks: load 0.93 to 0.96, store 0.945 to 0.95 for all of them.
constexpr int kWarpsPerBlock = 16;
constexpr int kUnitsInFlight = 8;
constexpr int kUnitsPerPiece = kUnitsInFlight * kWarpLanes;

// Division of n < 2^31 by a divisor that the host knows, as a multiplication (Granlund & Montgomery, 1994): the index
// arithmetic of a unit is four of them, and must hide behind the link.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  explicit Divisor(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ uint32_t Quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ uint32_t Remainder(uint32_t n, uint32_t quotient) const { return n - quotient * divisor; }
};

// How a unit's number falls into pair, slab, outer and inner run, and offset.
struct Units {
  Divisor per_pair, per_slab, per_run, num_inner;
};

// grid: any; block: kWarpsPerBlock warps. Unit: the type of one access, 16 to 1 bytes.
template <typename Unit, Direction direction>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpLanes)
    CopyPages(const __grid_constant__ PageCopy copy, const __grid_constant__ Units units) {
  const int first_slab = copy.LayerBegin();
  if (first_slab < 0) return;
  const int64_t num_units = copy.num_pairs * units.per_pair.divisor;
  const int64_t warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarpLanes;
  const int64_t num_warps = int64_t{gridDim.x} * kWarpsPerBlock;
  const uint32_t lane = threadIdx.x % kWarpLanes;

  const int64_t stride = num_warps * kUnitsPerPiece;

  for (int64_t piece = warp * kUnitsPerPiece; piece < num_units; piece += stride) {
    const int64_t first_pair = piece / units.per_pair.divisor;
    const uint32_t in_first_pair = static_cast<uint32_t>(piece - first_pair * units.per_pair.divisor);
    const uint32_t first_unit = in_first_pair + lane;
    Unit values[kUnitsInFlight];
    Unit* targets[kUnitsInFlight];
#pragma unroll
    for (int k = 0; k < kUnitsInFlight; ++k) {
      targets[k] = nullptr;
      const uint32_t unit = first_unit + k * kWarpLanes;
      const uint32_t pairs_on = units.per_pair.Quotient(unit);
      const int64_t pair = first_pair + pairs_on;
      if (pair >= copy.num_pairs) continue;
      const int32_t device_page = copy.device_pages[pair], host_page = copy.HostPage(pair);
      if (!copy.Contains(device_page, host_page)) continue;
      const uint32_t in_pair = units.per_pair.Remainder(unit, pairs_on);
      const uint32_t slab_index = units.per_slab.Quotient(in_pair);
      const uint32_t in_slab = units.per_slab.Remainder(in_pair, slab_index);
      const uint32_t run = units.per_run.Quotient(in_slab);
      const int64_t in_run_bytes = int64_t{units.per_run.Remainder(in_slab, run)} * sizeof(Unit);
      const uint32_t outer = units.num_inner.Quotient(run);
      const uint32_t inner = units.num_inner.Remainder(run, outer);
      const Slab slab = copy.slabs[first_slab + slab_index];
      char* device = At(slab.device, copy.device_strides, device_page, outer, inner) + in_run_bytes;
      char* host = At(slab.host, copy.host_strides, host_page, outer, inner) + in_run_bytes;
      // Read past the caches: a byte is used once, and the CPU may have changed host memory since the last read.
      values[k] = __ldcv(reinterpret_cast<const Unit*>(direction == Direction::kLoad ? host : device));
      targets[k] = reinterpret_cast<Unit*>(direction == Direction::kLoad ? device : host);
    }
    bool is_copied = false;
#pragma unroll
    for (int k = 0; k < kUnitsInFlight; ++k) {
      if (targets[k] == nullptr) continue;
      *targets[k] = values[k];
      is_copied = true;
    }
    // Padding is to cost little: where a piece had nothing to copy, the lanes look for the next pair that is copied, 32
    // at a time, and the warp goes on with its last piece before that.
    if (!__any_sync(~0u, is_copied)) {
      const uint32_t last_pair_on = units.per_pair.Quotient(in_first_pair + kUnitsPerPiece - 1);
      const int64_t pair = first_pair + last_pair_on + 1 + lane;
      const uint32_t found =
          __ballot_sync(~0u, pair < copy.num_pairs && copy.Contains(copy.device_pages[pair], copy.HostPage(pair)));
      const int64_t num_skipped = int64_t{last_pair_on} + (found == 0 ? 1 + kWarpLanes : __ffs(found));
      const int64_t to_skip = num_skipped * units.per_pair.divisor - in_first_pair - kUnitsPerPiece;
      if (to_skip > 0) piece += to_skip / stride * stride;
    }
  }
}

// The widest power of two, at most 16, that divides every address and length of `copy`.
int64_t AccessBytes(const PageCopy& copy) {
  uint64_t bits = 16 | copy.run_bytes;
  for (const Strides& s : {copy.device_strides, copy.host_strides}) {
    bits |= s.page_bytes | s.outer_bytes | s.inner_bytes;
  }
  for (int s = 0; s < copy.num_slabs; ++s) {
    bits |= reinterpret_cast<uint64_t>(copy.slabs[s].device) | reinterpret_cast<uint64_t>(copy.slabs[s].host);
  }
  return static_cast<int64_t>(bits & ~(bits - 1));
}

__global__ void SetIfDifferent(const int32_t* value, int32_t expected, int32_t* is_different) {
  if (*value != expected) *is_different = 1;
}

// Calls visit(kernel of this access width and direction).
template <typename Visit>
auto VisitKernel(int64_t access_bytes, Direction direction, Visit visit) {
  const auto of_unit = [&](auto unit) {
    using Unit = decltype(unit);
    return direction == Direction::kLoad ? visit(CopyPages<Unit, Direction::kLoad>)
                                         : visit(CopyPages<Unit, Direction::kStore>);
  };
  switch (access_bytes) {
    case 16: return of_unit(uint4{});
    case 8: return of_unit(uint2{});
    case 4: return of_unit(uint32_t{});
    case 2: return of_unit(uint16_t{});
    default: return of_unit(uint8_t{});
  }
}

}  // namespace

cudaError_t LaunchCopy(const PageCopy& copy, Direction direction, int64_t max_blocks, cudaStream_t stream) {
  if (max_blocks <= 0) return cudaErrorInvalidValue;
  const int64_t access_bytes = AccessBytes(copy);
  const auto units_per_run = static_cast<uint32_t>(copy.run_bytes / access_bytes);
  const uint32_t units_per_slab = units_per_run * copy.num_outer * copy.num_inner;
  const uint32_t units_per_pair = units_per_slab * copy.slabs_per_layer;
  const int64_t num_units = copy.num_pairs * units_per_pair;
  constexpr int64_t kUnitsPerBlock = int64_t{kWarpsPerBlock} * kUnitsPerPiece;
  const int64_t num_blocks = std::min((num_units + kUnitsPerBlock - 1) / kUnitsPerBlock, max_blocks);
  if (num_blocks <= 0) return cudaSuccess;
  const Units units = {Divisor(units_per_pair), Divisor(units_per_slab), Divisor(units_per_run),
                       Divisor(copy.num_inner)};
  return VisitKernel(access_bytes, direction, [&](auto* kernel) {
    kernel<<<static_cast<unsigned>(num_blocks), kWarpsPerBlock * kWarpLanes, 0, stream>>>(copy, units);
    return cudaGetLastError();
  });
}

cudaError_t CheckEqual(const int32_t* value, int32_t expected, int32_t* is_different, cudaStream_t stream) {
  SetIfDifferent<<<1, 1, 0, stream>>>(value, expected, is_different);
  return cudaGetLastError();
}

cudaError_t PreloadCopy() {
  cudaFuncAttributes of_check;
  if (const cudaError_t error = cudaFuncGetAttributes(&of_check, SetIfDifferent)) return error;
  for (const int64_t access_bytes : {16, 8, 4, 2, 1}) {
    for (const Direction direction : {Direction::kLoad, Direction::kStore}) {
      const cudaError_t error = VisitKernel(access_bytes, direction, [](auto* kernel) {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, kernel);
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace kvpool
