// A stream that forgets to wait for an event. No XLA in it: why XLA's stream waits for marks (csrc/side_streams.h).
//
//   nvcc -O2 -std=c++20 -arch=native -o lost_waits benchmarks/lost_waits.cu && ./lost_waits
//
// Two threads enqueue steps into one stream, as two threads that dispatch to one GPU do. In each step a side stream
// copies layer after layer from pinned memory, and the common stream waits for each, compares it, and overwrites it, so
// that a copy which was not waited for is seen. Each thread has memory, events and graphs of its own.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

void Check(int error) {
  if (error != 0) std::printf("error %d\n", error), std::exit(1);
}

constexpr int kLayers = 16, kInts = 64 << 10, kSteps = 150, kRuns = 60;

__global__ void Copy(int* target, const int* source) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kInts; i += gridDim.x * blockDim.x) target[i] = source[i];
}

__global__ void CountWrong(const int* layer, int expected, int* wrong) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kInts; i += gridDim.x * blockDim.x) {
    if (layer[i] != expected) atomicAdd(wrong, 1);
  }
}

__global__ void Overwrite(int* layer) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kInts; i += gridDim.x * blockDim.x) layer[i] = -1;
}

using StreamValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);
StreamValue write_value, wait_value;

struct Way {
  const char* name;
  bool by_graph, by_mark, by_turns;
};

class Thread {
 public:
  Thread(Way way, cudaStream_t common, cudaStream_t side, std::mutex& turn)
      : way_(way), common_(common), side_(side), turn_(turn) {
    Check(cudaMalloc(&pool_, kLayers * kInts * sizeof(int)));
    Check(cudaMalloc(&flag_, sizeof(int)));
    Check(cudaMallocManaged(&wrong_, sizeof(int)));
    Check(cudaMallocHost(&host_, kLayers * kInts * sizeof(int)));
    Check(cudaMemset(flag_, 0, sizeof(int)));
    *wrong_ = 0;
    for (int i = 0; i < kLayers * kInts; ++i) host_[i] = i / kInts;
    for (cudaEvent_t& event : events_) Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    for (int layer = 0; layer < kLayers; ++layer) {
      cudaGraph_t graph;
      Check(cudaStreamBeginCapture(common, cudaStreamCaptureModeThreadLocal));
      Compute(layer);
      Check(cudaStreamEndCapture(common, &graph));
      Check(cudaGraphInstantiate(&graphs_[layer], graph, 0));
    }
  }

  void Run() {
    for (int step = 0; step < kSteps; ++step) {
      InTurn([&] {
        Check(cudaEventRecord(events_[kLayers], common_));
        Check(cudaStreamWaitEvent(side_, events_[kLayers], 0));
      });
      for (int layer = 0; layer < kLayers; ++layer) {
        InTurn([&] {
          Copy<<<8, 256, 0, side_>>>(pool_ + layer * kInts, host_ + layer * kInts);
          way_.by_mark ? Check(write_value(side_, reinterpret_cast<CUdeviceptr>(flag_), ++mark_, 0))
                       : Check(cudaEventRecord(events_[layer], side_));
        });
      }
      for (int layer = 0; layer < kLayers; ++layer) {
        InTurn([&] {
          way_.by_mark
              ? Check(wait_value(common_, reinterpret_cast<CUdeviceptr>(flag_), mark_ - kLayers + 1 + layer, 0))
              : Check(cudaStreamWaitEvent(common_, events_[layer], 0));
        });
        InTurn([&] { way_.by_graph ? Check(cudaGraphLaunch(graphs_[layer], common_)) : Compute(layer); });
      }
    }
  }

  bool TakeWrong() { return std::exchange(*wrong_, 0) != 0; }

 private:
  void Compute(int layer) {
    CountWrong<<<32, 256, 0, common_>>>(pool_ + layer * kInts, layer, wrong_);
    Overwrite<<<32, 256, 0, common_>>>(pool_ + layer * kInts);
    Check(cudaGetLastError());
  }

  template <typename Call>
  void InTurn(Call call) {
    const auto lock = way_.by_turns ? std::unique_lock(turn_) : std::unique_lock<std::mutex>();
    call();
  }

  Way way_;
  cudaStream_t common_, side_;
  std::mutex& turn_;
  int *pool_, *flag_, *wrong_, *host_;
  unsigned mark_ = 0;
  cudaEvent_t events_[kLayers + 1];
  cudaGraphExec_t graphs_[kLayers];
};

}  // namespace

int main() {
  cudaStream_t common, side;
  Check(cudaStreamCreateWithFlags(&common, cudaStreamNonBlocking));
  Check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  cudaDriverEntryPointQueryResult found;
  for (const auto& [name, call] :
       {std::pair("cuStreamWriteValue32", &write_value), {"cuStreamWaitValue32", &wait_value}}) {
    Check(cudaGetDriverEntryPointByVersion(name, reinterpret_cast<void**>(call), 12000, cudaEnableDefault, &found));
  }
  for (const Way way :
       {Way{"graphs, events", true, false, false}, Way{"kernels, events", false, false, false},
        Way{"graphs, events, one thread at a time", true, false, true}, Way{"graphs, marks", true, true, false}}) {
    std::mutex turn;
    Thread first(way, common, side, turn), second(way, common, side, turn);
    Check(cudaDeviceSynchronize());
    int num_wrong = 0;
    for (int run = 0; run < kRuns; ++run) {
      std::thread other([&] { second.Run(); });
      first.Run();
      other.join();
      Check(cudaDeviceSynchronize());
      num_wrong += static_cast<int>(first.TakeWrong() | second.TakeWrong());
    }
    std::printf("%-40s wrong in %d of %d runs\n", way.name, num_wrong, kRuns);
  }
}
