#include "paged_kv.h"

#include <cuda_runtime.h>

#include "cuda_check.h"

namespace sjd {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 8;

// One warp for each work item: neighbouring lanes move neighbouring 16 bytes.
template <class Op>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 4) each_item(Op op) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (item < op.count()) op(item, threadIdx.x % kWarp, kWarp);
}

// The runtime linked into this module need not know what another one, torch's, has made the current device.
class CurrentDevice {
 public:
  CurrentDevice(const char* op, int device) {
    check_cuda(op, cudaGetDevice(&before_));
    check_cuda(op, cudaSetDevice(device));
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_;
};

template <class Op>
void launch(const char* name, const Op& op, int device, void* stream) {
  const int64_t blocks = (op.count() + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks == 0) return;
  const CurrentDevice current(name, device);
  each_item<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream)>>>(op);
  check_cuda(name, cudaGetLastError());
}

}  // namespace

void run_cuda(const AppendKV& op, int device, void* stream) { launch("append_kv", op, device, stream); }
void run_cuda(const AdvanceRollback& op, int device, void* stream) { launch("advance_rollback", op, device, stream); }
void run_cuda(const CompactKV& op, int device, void* stream) { launch("compact_kv", op, device, stream); }
void run_cuda(const CopyPages& op, int device, void* stream) { launch("copy_pages", op, device, stream); }
void run_cuda(const GatherKV& op, int device, void* stream) { launch("gather_kv", op, device, stream); }
void run_cuda(const PoisonKV& op, int device, void* stream) { launch("poison_kv", op, device, stream); }

}  // namespace sjd
