#include "copy_plan.h"

#include <limits>
#include <utility>

namespace kvpool {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

// Thrown and caught in this file.
struct BadPlan {
  std::string what;
};

class Reader {
 public:
  explicit Reader(std::span<const int64_t> plan) : plan_(plan) {}

  // The next integer.
  int64_t Next(const char* name, int64_t least, int64_t most) {
    if (next_ == plan_.size()) RefuseEnd(name);
    const int64_t value = plan_[next_++];
    if (value < least || value > most) Refuse(name, least, most, value);
    return value;
  }
  int32_t Next32(const char* name, int64_t least, int64_t most = kMaxInt32) {
    return static_cast<int32_t>(Next(name, least, most));
  }
  int64_t NextBytes(const char* name) { return Next(name, 0, kMaxInt64); }
  // How many things come next, of so many integers each or more.
  int64_t NextCount(const char* name, int64_t least, int64_t integers_each) {
    return Next(name, least, static_cast<int64_t>(plan_.size()) / integers_each);
  }

  bool IsAtEnd() const { return next_ == plan_.size(); }

 private:
  [[noreturn, gnu::cold]] void RefuseEnd(const char* name) const {
    throw BadPlan{std::string("plan: ends before ") + name};
  }
  [[noreturn, gnu::cold]] void Refuse(const char* name, int64_t least, int64_t most, int64_t value) const {
    throw BadPlan{std::string("plan: ") + name + " at " + std::to_string(next_ - 1) + ": expected " +
                  std::to_string(least) + " to " + std::to_string(most) + ", got " + std::to_string(value)};
  }

  std::span<const int64_t> plan_;
  size_t next_ = 1;  // behind the version
};

// Throws unless the last byte of what begins at `offset`, and goes on for these strides, is inside of `bytes` bytes.
// Wide: the product of 31 and 63 bits, and the sum of a few.
void CheckExtent(const char* what, int64_t bytes, int64_t offset, int64_t length,
                 std::initializer_list<std::pair<int64_t, int64_t>> counts_and_strides) {
  __extension__ using Wide = __int128;
  Wide end = Wide{offset} + length;
  for (const auto& [count, stride] : counts_and_strides) end += Wide{count - 1} * stride;
  if (end > bytes) throw BadPlan{std::string("plan: ") + what + " beyond its " + std::to_string(bytes) + " bytes"};
}

void ReadOperands(Reader& reader, const CopyOperands& operands, PageCopy& copy) {
  copy.device_pages = operands.device_pages;
  copy.layer = operands.layer;
  copy.num_pairs = operands.num_pairs;
  copy.num_device_pages = reader.Next32("num_device_pages", 1);
  copy.num_host_pages = reader.Next32("num_host_pages", 1);
  if (const int64_t expected = reader.NextBytes("host_bytes"); operands.host.bytes != expected) {
    throw BadPlan{"host pool: expected " + std::to_string(expected) + " bytes, got " +
                  std::to_string(operands.host.bytes)};
  }
  const auto num_arrays = static_cast<int64_t>(operands.arrays.size());
  if (const int64_t expected = reader.NextCount("num_arrays", 0, 1); num_arrays != expected) {
    throw BadPlan{"device pool: expected " + std::to_string(expected) + " arrays, got " + std::to_string(num_arrays)};
  }
  for (size_t i = 0; i < operands.arrays.size(); ++i) {
    if (const int64_t expected = reader.NextBytes("bytes of an array"), got = operands.arrays[i].bytes;
        got != expected) {
      throw BadPlan{"device pool: expected " + std::to_string(expected) + " bytes in array " + std::to_string(i) +
                    ", got " + std::to_string(got)};
    }
  }
}

Span ReadSpan(Reader& reader, const CopyOperands& operands, const PageCopy& copy, int64_t staged_page_bytes) {
  Span span;
  span.offset = reader.NextBytes("offset of a span");
  span.page_stride = reader.NextBytes("page stride of a span");
  span.bytes = reader.Next("bytes of a span", 1, kMaxInt64);
  span.staged_offset = reader.NextBytes("staged offset of a span");
  CheckExtent("a span of the host pool", operands.host.bytes, span.offset, span.bytes,
              {{copy.num_host_pages, span.page_stride}});
  CheckExtent("a span of a staged page", staged_page_bytes, span.staged_offset, span.bytes, {});
  return span;
}

// The numbers of a PageCopy, without its slabs.
void ReadShape(Reader& reader, PageCopy& copy) {
  copy.num_outer = reader.Next32("num_outer", 1);
  copy.num_inner = reader.Next32("num_inner", 1);
  copy.run_bytes = reader.Next("run_bytes", 1, kMaxInt32);
  for (Strides* strides : {&copy.device_strides, &copy.host_strides}) {
    strides->page_bytes = reader.NextBytes("page stride");
    strides->outer_bytes = reader.NextBytes("outer stride");
    strides->inner_bytes = reader.NextBytes("inner stride");
  }
  copy.first_slab = reader.Next32("first_slab", 0);
  copy.slabs_per_layer = reader.Next32("slabs_per_layer", 1, PageCopy::kMaxSlabs);
  copy.num_slabs = reader.Next32("num_slabs", 1, PageCopy::kMaxSlabs);
  if (copy.first_slab % copy.slabs_per_layer != 0 || copy.num_slabs % copy.slabs_per_layer != 0) {
    throw BadPlan{"plan: slabs that are not whole layers"};
  }
  constexpr int64_t kMaxBytes = int64_t{1} << 30;  // a kernel numbers the accesses of a pair in 31 bits
  __extension__ using Wide = __int128;
  if (Wide{copy.run_bytes} * copy.num_outer * copy.num_inner * copy.slabs_per_layer >= kMaxBytes) {
    throw BadPlan{"plan: a layer of a page of 1 GiB or more"};
  }
}

void ReadStage(Reader& reader, const CopyOperands& operands, PageCopy& copy, char* staging, Stage& stage) {
  stage.pieces = operands.pieces;
  stage.is_by_slab = reader.Next("is_by_slab", 0, 1) != 0;
  stage.staged_page_bytes = reader.NextBytes("staged_page_bytes");
  int64_t span_bytes = 0, slab_bytes = 0;  // of a page; each less than 2^63, since they are bounded one by one
  for (int64_t n = reader.NextCount("num_spans", 0, 4); n > 0; --n) {
    stage.spans.push_back(ReadSpan(reader, operands, copy, stage.staged_page_bytes));
    span_bytes += stage.spans.back().bytes;
  }
  if (stage.is_by_slab && !stage.spans.empty()) throw BadPlan{"plan: a stage that goes by slab and by span"};
  const bool is_spanned = !stage.spans.empty(), is_staged = staging != nullptr && is_spanned;
  copy.host_pages = is_staged ? nullptr : operands.host_pages;
  for (int64_t n = reader.NextCount("num_copies", 1, 16); n > 0; --n) {
    ReadShape(reader, copy);
    if (stage.is_by_slab && (copy.num_outer != 1 || copy.num_inner != 1)) {
      throw BadPlan{"plan: a slab for the copy engine of more than one run"};
    }
    if ((stage.is_by_slab || is_spanned) && (copy.first_slab != 0 || copy.slabs_per_layer != copy.num_slabs)) {
      throw BadPlan{"plan: slabs for the copy engine of which an operand tells the layer"};
    }
    const std::pair<int64_t, int64_t> device_outer = {copy.num_outer, copy.device_strides.outer_bytes},
                                      device_inner = {copy.num_inner, copy.device_strides.inner_bytes},
                                      host_outer = {copy.num_outer, copy.host_strides.outer_bytes},
                                      host_inner = {copy.num_inner, copy.host_strides.inner_bytes};
    for (int32_t s = 0; s < copy.num_slabs; ++s) {
      const int64_t array = reader.Next("array of a slab", 0, static_cast<int64_t>(operands.arrays.size()) - 1);
      const int64_t device_offset = reader.NextBytes("offset of a slab in its array");
      const int64_t host_offset = reader.NextBytes("offset of a slab in the host pool");
      const int64_t staged_offset = reader.NextBytes("offset of a slab in a staged page");
      CheckExtent("a slab of an array", operands.arrays[array].bytes, device_offset, copy.run_bytes,
                  {{copy.num_device_pages, copy.device_strides.page_bytes}, device_outer, device_inner});
      CheckExtent("a slab of the host pool", operands.host.bytes, host_offset, copy.run_bytes,
                  {{copy.num_host_pages, copy.host_strides.page_bytes}, host_outer, host_inner});
      if (is_spanned) {
        CheckExtent("a slab of a staged page", stage.staged_page_bytes, staged_offset, copy.run_bytes,
                    {host_outer, host_inner});
      }
      copy.slabs[s] = {operands.arrays[array].data + device_offset,
                       is_staged ? staging + staged_offset : operands.host.data + host_offset};
    }
    slab_bytes += copy.run_bytes * copy.num_outer * copy.num_inner * copy.num_slabs;
    stage.copies.push_back(copy);
    if (is_staged) stage.copies.back().host_strides.page_bytes = stage.staged_page_bytes;
  }
  // A store writes whole spans, so all their bytes must come from slabs.
  if (is_spanned && span_bytes != slab_bytes) throw BadPlan{"plan: spans of other bytes than the slabs"};
}

}  // namespace

std::optional<std::string> ReadPlan(std::span<const int64_t> plan, const CopyOperands& operands,
                                    std::vector<Stage>& stages, char* staging) {
  try {
    if (plan.empty() || plan[0] != kPlanVersion) {
      return "plan: expected format " + std::to_string(kPlanVersion) + ", got " +
             (plan.empty() ? "nothing" : std::to_string(plan[0])) +
             ": the program was traced with another version of jax_kvpool, trace it again";
    }
    Reader reader(plan);
    PageCopy copy;
    ReadOperands(reader, operands, copy);
    int64_t num_stages = reader.NextCount("num_stages", 1, 4);
    stages.reserve(num_stages);
    for (; num_stages > 0; --num_stages) {
      stages.emplace_back();
      ReadStage(reader, operands, copy, staging, stages.back());
    }
    if (!reader.IsAtEnd()) return "plan: more integers than the stages have";
  } catch (const BadPlan& bad) {
    stages.clear();
    return bad.what;
  }
  return std::nullopt;
}

}  // namespace kvpool
