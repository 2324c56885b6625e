#include <cuda_runtime_api.h>

#include <stdexcept>

#include "device_info.h"

namespace sjd {
namespace {

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("cuda_devices: ") + cudaGetErrorString(status));
}

}  // namespace

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count));
  std::vector<CudaDevice> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, device));
    devices.push_back(
        {properties.name, properties.major, properties.minor, static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

}  // namespace sjd
