#include "copy_engine.h"

#include "copy_cuda.h"

namespace kvpool {
namespace {

// Copies for one submission. That matters: on an H100 128 KB each move at 0.98 of the roof so (benchmarks/transfer.py
// --ways host_ids), and at 0.43 one by one.
class Copies {
 public:
  Copies(Direction direction, const Pieces* pieces) : direction_(direction), pieces_(pieces) {}

  size_t size() const { return sizes_.size(); }

  // One copy, or more where the host's bytes lie in several pieces.
  void Add(char* device, char* host, int64_t bytes) {
    const auto add = [&](int64_t offset, int64_t part_bytes) {
      device_.push_back(device + offset);
      host_.push_back(host + offset);
      sizes_.push_back(part_bytes);
    };
    pieces_ == nullptr ? add(0, bytes) : pieces_->ForEachPart(host, bytes, add);
  }

  // Enqueues them, and starts a new list.
  cudaError_t Submit(cudaStream_t engine) {
    const bool is_load = direction_ == Direction::kLoad;
    std::vector<void*>&targets = is_load ? device_ : host_, &sources = is_load ? host_ : device_;
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t all = 0;
#if CUDART_VERSION >= 13000
    const cudaError_t error =
        cudaMemcpyBatchAsync(const_cast<const void**>(targets.data()), const_cast<const void**>(sources.data()),
                             sizes_.data(), size(), &attributes, &all, 1, engine);
#else
    size_t failed = 0;
    const cudaError_t error = cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes_.data(), size(), &attributes,
                                                   &all, 1, &failed, engine);
#endif
    device_.clear();
    host_.clear();
    sizes_.clear();
    return error;
  }

 private:
  Direction direction_;
  const Pieces* pieces_;  // of the host pool; null: it is one
  std::vector<void*> device_, host_;
  std::vector<size_t> sizes_;
};

// The copies between the host pool and one half: a few pages that follow each other in the list, and are all valid.
cudaError_t MoveRecords(const Stage& stage, char* host, const int32_t* host_pages, int64_t num_pages,
                        Direction direction, char* half, cudaStream_t engine) {
  Copies copies(direction, stage.pieces.get());
  for (const Span& span : stage.spans) {
    for (int64_t i = 0; i < num_pages; ++i) {
      copies.Add(half + i * stage.staged_page_bytes + span.staged_offset,
                 host + span.offset + host_pages[i] * span.page_stride, span.bytes);
    }
  }
  return copies.Submit(engine);
}

}  // namespace

cudaError_t CopySlabs(const Stage& stage, const ReadableIds& ids, Direction direction, cudaStream_t stream,
                      cudaStream_t engine, SideStreams& side) {
  constexpr size_t kEnoughCopies = 64;  // the first ones travel while the CPU, 1 us each, goes on with the next
  if (const cudaError_t error = side.Order(stream, engine)) return error;
  Copies copies(direction, stage.pieces.get());
  for (size_t pair = 0; pair < ids.host_pages.size(); ++pair) {
    for (const PageCopy& copy : stage.copies) {
      if (!ids.Contains(copy, pair)) continue;
      for (int s = 0; s < copy.num_slabs; ++s) {
        copies.Add(At(copy.slabs[s].device, copy.device_strides, ids.device_pages[pair], 0, 0),
                   At(copy.slabs[s].host, copy.host_strides, ids.host_pages[pair], 0, 0), copy.run_bytes);
      }
    }
    if (copies.size() >= kEnoughCopies) {
      if (const cudaError_t error = copies.Submit(engine)) return error;
    }
  }
  return copies.size() == 0 ? cudaSuccess : copies.Submit(engine);
}

cudaError_t Staging::Copy(const Stage& stage, char* host, const ReadableIds& ids, Direction direction,
                          int64_t max_blocks, cudaStream_t stream, cudaStream_t engine, SideStreams& side) {
  const int64_t max_pages = half_bytes_ / stage.staged_page_bytes;
  if (max_pages == 0) return cudaErrorInvalidValue;
  const auto num_pairs = static_cast<int64_t>(ids.host_pages.size());
  const auto is_valid = [&](int64_t pair) { return ids.Contains(stage.copies[0], pair); };
  const bool is_load = direction == Direction::kLoad;
  const auto move_records = [&](int64_t begin, int64_t end, char* half) {
    return MoveRecords(stage, host, ids.host_pages.data() + begin, end - begin, direction, half, engine);
  };
  const auto launch = [&](int64_t begin, int64_t end, char* half) {
    for (PageCopy copy : stage.copies) {
      copy.device_pages += begin;
      copy.num_pairs = end - begin;
      copy.num_host_pages = static_cast<int32_t>(end - begin);
      for (int s = 0; s < copy.num_slabs; ++s) copy.slabs[s].host += half - data_;
      if (const cudaError_t error = LaunchCopy(copy, direction, max_blocks, stream)) return error;
    }
    return cudaSuccess;
  };

  // In the direction of the bytes: one stream fills a half, the other empties it.
  const cudaStream_t fills = is_load ? engine : stream, empties = is_load ? stream : engine;
  if (num_batches_ == 0) {  // the buffer may still be somebody else's, in the order of `stream`
    if (const cudaError_t error = side.Order(stream, engine)) return error;
  }
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; begin < num_pairs && !error;) {
    int64_t end = begin;
    while (end < num_pairs && end - begin < max_pages && is_valid(end)) ++end;
    if (end == begin) {
      ++begin;
      continue;
    }
    const int64_t index = num_batches_++ % 2;
    char* half = data_ + index * half_bytes_;
    if (index < static_cast<int64_t>(empty_.size())) {
      error = cudaStreamWaitEvent(fills, empty_[index], 0);
    } else {
      cudaEvent_t event = nullptr;
      error = side.TakeEvent(event);
      if (!error) empty_.push_back(event);
    }
    if (!error) error = is_load ? move_records(begin, end, half) : launch(begin, end, half);
    if (!error) error = side.Order(fills, empties);
    if (!error) error = is_load ? launch(begin, end, half) : move_records(begin, end, half);
    if (!error) error = cudaEventRecord(empty_[index], empties);
    begin = end;
  }
  return error;
}

}  // namespace kvpool
