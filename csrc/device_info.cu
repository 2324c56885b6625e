#include "device_info.h"

#include "cuda_check.h"

namespace sjd {

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  check_cuda("cuda_devices", cudaGetDeviceCount(&count));
  std::vector<CudaDevice> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check_cuda("cuda_devices", cudaGetDeviceProperties(&properties, device));
    devices.push_back(
        {properties.name, properties.major, properties.minor, static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

}  // namespace sjd
