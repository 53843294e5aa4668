// As much of CUDA as csrc/*.cu uses, on threads of the CPU: a kernel's code runs as it is, where there is no GPU.
//
// A CUDA thread is an OS thread, so that barriers left out are races a sanitizer can see. Blocks run one after
// another, the last first. Shared memory is poisoned before each.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__ &  // no copy a thread
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

using std::isfinite;

namespace cuda_emulation {

class Barrier {
 public:
  explicit Barrier(unsigned n) { pthread_barrier_init(&barrier_, nullptr, n); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint64_t values[32];
};

inline thread_local Barrier* block_barrier;
inline thread_local Warp* warp;

// What a kernel may have, and what it may have without asking for more.
constexpr size_t kSharedMemory = 64 << 10, kDefaultSharedMemory = 48 << 10;

// Defined beside the kernel: its `extern __shared__` array.
unsigned char* shared_memory();

// Kernel launches since the library was loaded.
inline int launches = 0;

// What a warp's accesses to memory move: each takes the sectors that its lanes touch together.
struct Access {
  uintptr_t address;
  size_t bytes;
  bool written;
};
constexpr uintptr_t kSector = 32;
inline thread_local std::vector<Access>* accesses;  // null where they are not counted
inline bool counting = false;
inline int64_t bytes_moved = 0;

inline void note_access(const void* address, size_t bytes, bool written) {
  if (accesses) accesses->push_back({reinterpret_cast<uintptr_t>(address), bytes, written});
}

// Adds what the lanes of a warp have moved. They take the same path where sizes are whole, so that their n-th accesses
// are one instruction.
inline void count_bytes(std::vector<Access>* lanes) {
  for (size_t n = 0;; ++n) {
    std::set<uintptr_t> sectors;
    for (int lane = 0; lane < 32; ++lane)
      if (n < lanes[lane].size()) {
        const Access& access = lanes[lane][n];
        for (uintptr_t at = access.address / kSector; at <= (access.address + access.bytes - 1) / kSector; ++at)
          sectors.insert(at);
      }
    if (sectors.empty()) break;
    bytes_moved += static_cast<int64_t>(sectors.size() * kSector);
  }
  for (int lane = 0; lane < 32; ++lane) lanes[lane].clear();
}

// What a kernel has asked for by cudaFuncSetAttribute.
inline std::map<const void*, size_t> shared_memory_asked;

}  // namespace cuda_emulation

#define SPARSE_CL_NOTE_ACCESS(address, bytes, written) cuda_emulation::note_access(address, bytes, written)

inline thread_local dim3 threadIdx, blockIdx;

inline void __syncthreads() {
  cuda_emulation::block_barrier->wait();
}
inline void __syncwarp() {
  cuda_emulation::warp->barrier.wait();
}
inline void __threadfence() {}  // atomicInc is sequentially consistent here

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp hands over at most eight bytes a lane");
  cuda_emulation::Warp& warp = *cuda_emulation::warp;
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  warp.barrier.wait();
  T result;
  std::memcpy(&result, &warp.values[lane], sizeof(T));
  warp.barrier.wait();
  return result;
}
inline int __shfl_up_sync(unsigned mask, int value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}

inline uint32_t atomicInc(uint32_t* address, uint32_t limit) {
  uint32_t old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(address, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST)) {
  }
  return old;
}

inline int __popcll(uint64_t x) {
  return __builtin_popcountll(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_emulation::kSharedMemory);
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > cuda_emulation::kSharedMemory) return 1;
  cuda_emulation::shared_memory_asked[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "emulated";
}

template <typename Kernel, typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel* kernel, const Argument& argument) {
  using namespace cuda_emulation;
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  const auto asked = shared_memory_asked.find(reinterpret_cast<const void*>(kernel));
  const size_t most =
      asked == shared_memory_asked.end() ? kDefaultSharedMemory : std::max(asked->second, kDefaultSharedMemory);
  if (threads % 32 || config->dynamicSmemBytes > most) return 1;
  ++launches;
  Barrier barrier(threads);
  std::vector<Warp> warps(threads / 32);
  std::vector<std::vector<Access>> noted(threads);
  auto run = [&](unsigned thread) {
    threadIdx = dim3(thread, 0, 0);
    block_barrier = &barrier;
    warp = &warps[thread / 32];
    accesses = counting ? &noted[thread] : nullptr;
    for (unsigned block = blocks; block-- > 0;) {
      if (thread == 0) std::memset(shared_memory(), 0xFF, kSharedMemory);
      barrier.wait();
      blockIdx = dim3(block, 0, 0);
      kernel(argument);
      barrier.wait();
      if (counting && thread == 0)
        for (unsigned first = 0; first < threads; first += 32) count_bytes(&noted[first]);
    }
  };
  std::vector<std::thread> pool;
  for (unsigned thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
  for (std::thread& t : pool) t.join();
  return cudaSuccess;
}
