// The pieces of a host memory: the ranges that were registered with CUDA one by one, since CUDA refuses much at once.
//
// A copy by the copy engine must not cross from one piece to the next: CUDA refuses it ("invalid argument"). A kernel
// may read and write what it likes, access by access: an access is at most 16 bytes, aligned to its own length, and
// pieces end on multiples of kPieceAlignment, so no access lies in two of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace kvpool {

constexpr int64_t kPieceAlignment = 4096;

class Pieces {
 public:
  // `ends`: of each piece, in bytes from `data`; ascending, multiples of kPieceAlignment, `bytes` last. Throws
  // std::invalid_argument.
  Pieces(const char* data, int64_t bytes, std::span<const int64_t> ends) : begin_(data) {
    int64_t begin = 0;
    for (const int64_t end : ends) {
      if (end <= begin || end > bytes) throw std::invalid_argument("piece_ends: not ascending from 1 to the last byte");
      if (end % kPieceAlignment != 0 && end != bytes) throw std::invalid_argument("piece_ends: not multiples of 4096");
      ends_.push_back(data + end);
      begin = end;
    }
    if (begin != bytes) throw std::invalid_argument("piece_ends: the last one is not the end of the memory");
  }

  // Whether exactly these bytes are one piece.
  bool Contains(const char* begin, const char* end) const {
    const auto found = std::lower_bound(ends_.begin(), ends_.end(), end);
    return found != ends_.end() && *found == end && begin == (found == ends_.begin() ? begin_ : *(found - 1));
  }

  // Calls visit(offset, bytes) for each part of the `bytes` bytes at `data` that lies in one piece, in order; `offset`
  // is from `data`.
  template <typename Visit>
  void ForEachPart(const char* data, int64_t bytes, Visit visit) const {
    int64_t done = 0;
    if (ends_.size() > 1) {
      for (auto end = std::upper_bound(ends_.begin(), ends_.end(), data); end != ends_.end() && *end < data + bytes;
           ++end) {
        visit(done, *end - data - done);
        done = *end - data;
      }
    }
    visit(done, bytes - done);
  }

 private:
  const char* begin_;
  std::vector<const char*> ends_;
};

}  // namespace kvpool
