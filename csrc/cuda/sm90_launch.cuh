// Host side of the fused kernel: what it can do, tensor maps, launches in clusters.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../ops.h"

namespace vllm_score::cuda::sm90 {

constexpr int kMostDevices = 64;

inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

inline bool is_sm90() {
  static int known[kMostDevices] = {};  // 0: not asked yet
  const int device = current_device();
  if (device < 0 || device >= kMostDevices) return false;
  if (known[device] == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    known[device] = 10 * major + minor;
  }
  return known[device] == 90;
}

// cuTensorMapEncodeTiled, found through the runtime so that nothing links to the driver's library.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

// A 16-bit matrix [rows, depth], read in boxes of box_rows x box_depth (128 bytes), with the
// 128-byte swizzle.
inline cudaError_t make_map(CUtensorMap* map, const void* data, Dtype dtype, int64_t rows,
                            int64_t depth, int64_t stride, int box_depth, int box_rows) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t bytes[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_depth), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto type =
      dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode_tiled()(
      map, type, 2, const_cast<void*>(data), size, bytes, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline const char* refusal(const HeadOperands& p, const RowOut& out) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  if (!is_sm90()) return "it is written for compute capability 9.0";
  if (p.dtype != Dtype::bf16 && p.dtype != Dtype::f16) return "it takes bfloat16 or float16";
  if (!aligned(p.hidden) || p.hidden_stride % 8 != 0) {
    return "rows of the hidden states do not start at multiples of 16 bytes";
  }
  if (!aligned(p.weight) || p.weight_stride % 8 != 0) {
    return "rows of the weights do not start at multiples of 16 bytes";
  }
  if (p.H < 1 || p.H > (1 << 20)) return "the hidden size is beyond 1..1048576";
  if (p.n >= (1 << 24)) return "the vocabulary has 2^24 entries or more";
  if (p.rows >= (1 << 30) || (p.rows / 128 + 2) * (p.n / 256 + 1) >= (1ll << 31)) {
    return "there are too many rows";
  }
  if ((out.statistics & kVarentropy) != 0) return "it does not compute the varentropy";
  if ((out.statistics & kRankOfTarget) != 0 && out.threshold == nullptr) {
    return "the rank needs a threshold";
  }
  if (encode_tiled() == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  return nullptr;
}

template <class Kernel>
cudaLaunchConfig_t cluster_config(cudaLaunchAttribute* attribute, int clusters, int blocks,
                                  int threads, int shared_bytes, cudaStream_t stream) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = blocks;
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

// How many clusters of `blocks` blocks run at once on the current device.
template <class Kernel>
int resident_clusters(Kernel kernel, int blocks, int threads, int shared_bytes) {
  static int known[kMostDevices][3] = {};
  const int device = current_device();
  if (device < 0 || device >= kMostDevices) return 1;
  int& count = known[device][blocks];
  if (count == 0) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = cluster_config<Kernel>(&attribute, 1, blocks, threads,
                                                       shared_bytes, nullptr);
    int found = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) ==
        cudaSuccess) {
      cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    }
    count = found > 0 ? found : 1;
  }
  return count;
}

template <class Kernel, class... Arguments>
cudaError_t launch_clusters(Kernel kernel, int clusters, int blocks, int threads, int shared_bytes,
                            cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config =
      cluster_config<Kernel>(&attribute, clusters, blocks, threads, shared_bytes, stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace vllm_score::cuda::sm90
