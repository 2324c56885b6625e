// The CUDA devices of this machine, for `sjd doctor`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sjd {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int64_t memory_bytes;
};

// Throws std::runtime_error with CUDA's own message, for example where there is no driver.
std::vector<CudaDevice> cuda_devices();

}  // namespace sjd
