#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "paged_kv.h"

namespace sjd {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 8;

// One warp for each work item: neighbouring lanes move neighbouring 16 bytes.
template <class Op>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 4) each_item(Op op) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (item < op.count()) op(item, threadIdx.x % kWarp, kWarp);
}

template <class Op>
void launch(const char* name, const Op& op, void* stream) {
  const int64_t blocks = (op.count() + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks == 0) return;
  each_item<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(op);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

}  // namespace

void run_cuda(const AppendKV& op, void* stream) { launch("append_kv", op, stream); }
void run_cuda(const AdvanceRollback& op, void* stream) { launch("advance_rollback", op, stream); }
void run_cuda(const CopyPages& op, void* stream) { launch("copy_pages", op, stream); }
void run_cuda(const GatherKV& op, void* stream) { launch("gather_kv", op, stream); }
void run_cuda(const PoisonKV& op, void* stream) { launch("poison_kv", op, stream); }

}  // namespace sjd
