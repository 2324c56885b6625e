// What CUDA refuses becomes an exception.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sjd {

// Throws std::runtime_error with CUDA's own message.
inline void check_cuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

}  // namespace sjd
