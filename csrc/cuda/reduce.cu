// One pass over rows of logits: max, sum of exponentials and the statistics of the row state.
//
// A group of threads owns a row: a warp if the row is short, else a block. Each thread keeps the
// running sums of its own columns relative to its own maximum; the group then agrees on the
// maximum, rescales and adds, always in the same order. Nothing but the row length decides how the
// columns are dealt out, so a row gets the same bits whatever else is in the batch.
#include "elements.cuh"
#include "reduce_sums.cuh"

namespace vllm_score::cuda {
namespace {

constexpr int kChunk = 16;             // elements a thread reads at a time
constexpr int kWarpRows = 4;           // rows a block, where a warp owns a row
constexpr int64_t kWarpLimit = 1024;   // the longest row that one warp reads
constexpr int64_t kPairLimit = 16384;  // and that two warps read

// Add the sums of a tile's row to the row state, whose first two columns are given. One thread a
// row.
template <int kStatistics>
__device__ void merge_state(Sums<kStatistics> s, int64_t row, int64_t n, float shift,
                            float state_max, float state_exp, const RowOut& out) {
  float* state = out.state + row * kStateColumns;
  Sums<kStatistics> before = Sums<kStatistics>::none();
  before.max = state_max;
  before.exp = state_exp;
  // What is computed may be more than what is asked for.
  const int asked = kStatistics & out.statistics;
  const bool entropy = asked & kEntropy, collision = asked & kCollision;
  const bool varentropy = asked & kVarentropy;
  if (entropy) before.exp_x = state[kSumExpX];
  if (collision) before.exp2 = state[kSumExp2];
  if (varentropy) before.exp_dev2 = state[kSumExpDev2];
  if (asked & kTop) {
    const float id = state[kArgmax];
    const float own = static_cast<float>(out.first_id + s.argmax);
    if (s.max > before.max || id < 0.0f || (s.max == before.max && own < id)) {
      state[kArgmax] = own;
    }
    state[kSecond] = fmaxf(fmaxf(state[kSecond], s.second), fminf(before.max, s.max));
  }
  const float largest = fmaxf(before.max, s.max);
  before.rescale(largest);
  s.rescale(largest);
  if (varentropy) {
    before.merge_deviations(s.exp, __fdividef(s.exp_x, s.exp), s.exp_dev2);
    state[kSumExpDev2] = before.exp_dev2;
  }
  state[kMax] = largest;
  state[kSumExp] = before.exp + s.exp;
  if (entropy) state[kSumExpX] = before.exp_x + s.exp_x;
  if (collision) state[kSumExp2] = before.exp2 + s.exp2;
  if (asked & kMoments) {
    // Chan, Golub, LeVeque: mean and sum of squared differences of two sets together.
    const float count = static_cast<float>(n);
    const float mean_shifted = s.shifted / count;
    const float difference = s.shifted2 - s.shifted * mean_shifted;
    const float m2 = difference < 0.0f ? 0.0f : difference;  // NaN stays
    const float mean = shift + mean_shifted;
    const float old_count = state[kCount];
    const float total = old_count + count;
    const float delta = mean - state[kMean];
    state[kMean] += delta * (count / total);
    state[kM2] += m2 + delta * delta * (old_count * (count / total));
    state[kCount] = total;
  }
  if (asked & kRankOfTarget) {
    state[kRank] += static_cast<float>(s.above);
  }
}

// Of a block: a warp owns a row, or the whole block does.
template <int kThreads>
constexpr int kBlock = kThreads == kWarp ? kWarp * kWarpRows : kThreads;

// Threads that are to fit into a multiprocessor, to hide the latency of memory: that bounds their
// registers. The varentropy's second pass would spill within that of 1024.
template <int kStatistics>
constexpr int kResident = kStatistics & kVarentropy ? 512 : 1024;

// kThreads of one row.
template <class T, int kThreads, int kStatistics>
__global__ void __launch_bounds__(kBlock<kThreads>, kResident<kStatistics> / kBlock<kThreads>)
    reduce_rows(const T* __restrict__ logits, int64_t rows, unsigned n, int64_t row_stride,
                RowOut out) {
#if __CUDA_ARCH__ >= 900
  // The blocks may be on their places before the product that writes the logits is complete.
  cudaGridDependencySynchronize();
#endif
  const unsigned thread = threadIdx.x % kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) +
                      threadIdx.x / kThreads;
  if (row >= rows) return;  // whole warps; blocks never
  const T* x = logits + row * row_stride;
  const Transform t = out.transform;
  const bool identity = t.soft_cap <= 0.0f && t.scale == 1.0f;

  float shift = 0.0f;
  float threshold = 0.0f;
  if constexpr (kStatistics & kMoments) {
    const float first = transformed(to_float(x[0]), t);
    shift = isfinite(first) ? first : 0.0f;
  }
  if constexpr (kStatistics & kRankOfTarget) {
    threshold = out.statistics & kRankOfTarget ? out.threshold[row] : -kMinusInfinity;
  }

  // Columns before the first 16-byte boundary, whole vectors, and what is left.
  constexpr unsigned V = kVector<T>;
  const unsigned misaligned =
      static_cast<unsigned>(reinterpret_cast<uintptr_t>(x) % 16) / sizeof(T);
  const unsigned head = min(n, misaligned ? V - misaligned : 0);
  const unsigned vectors = (n - head) / V;
  const unsigned tail = head + vectors * V;

  // What is needed last is asked for first: the state, and each thread's target.
  float state_max = 0.0f, state_exp = 0.0f;
  if (thread == 0) {
    state_max = load_now(out.state + row * kStateColumns + kMax);
    state_exp = load_now(out.state + row * kStateColumns + kSumExp);
  }
  const auto column_of = [&](int64_t j) {
    const int64_t column = out.targets[row * out.k + j] - out.first_id;
    return column >= 0 && column < n ? column : -1;
  };
  const int64_t own_column = thread < out.k ? column_of(thread) : -1;
  const float own = own_column >= 0 ? transformed(to_float(x[own_column]), t) : 0.0f;

  Sums<kStatistics> sums = Sums<kStatistics>::none();
  const auto add_one = [&](unsigned column) {
    const float one[1] = {transformed(to_float(x[column]), t)};
    sums.add(one, 1, [=](int) { return column; }, shift, threshold);
  };
  if (thread < head) add_one(thread);

  // A thread takes kStep vectors at a time, kThreads vectors apart, and has asked for the next ones
  // before it looks at these.
  constexpr unsigned kStep = kChunk / V;
  const T* aligned = x + head;
  uint4 next[kStep];
  const auto load = [&](unsigned first) {
#pragma unroll
    for (unsigned u = 0; u < kStep; ++u) {
      if (first + u * kThreads < vectors) {
        next[u] = load_16_bytes(aligned + (first + u * kThreads) * V);
      }
    }
  };
  load(thread);
  for (unsigned first = thread; first < vectors; first += kStep * kThreads) {
    float values[kChunk];
#pragma unroll
    for (unsigned u = 0; u < kStep; ++u) unpack(next[u], values + u * V, aligned);
    load(first + kStep * kThreads);
    if (!identity) {
#pragma unroll
      for (float& value : values) value = transformed(value, t);
    }
    const auto column = [=](int i) { return head + (first + i / V * kThreads) * V + i % V; };
    if (first + (kStep - 1) * kThreads < vectors) {
      sums.add(values, kChunk, column, shift, threshold);
    } else {
      const int valid = (vectors - first + kThreads - 1) / kThreads * V;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = i < valid ? values[i] : kMinusInfinity;
      sums.add(values, valid, column, shift, threshold);
    }
  }
  if (thread < n - tail) add_one(tail + thread);

  merge_warp(sums);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ Sums<kStatistics> shared[kWarps];
    if (thread % kWarp == 0) shared[thread / kWarp] = sums;
    __syncthreads();
    if (thread < kWarp) {
      sums = thread < kWarps ? shared[thread] : Sums<kStatistics>::none();
      merge_warp(sums);
    }
  }

  if (own_column >= 0) {
    out.target_logits[row * out.k + thread] = own;
    // The rank leaves the first target itself out.
    if (kStatistics && thread == 0 && own > threshold) --sums.above;
  }
  for (int64_t j = thread + kThreads; j < out.k; j += kThreads) {
    const int64_t column = column_of(j);
    if (column >= 0) out.target_logits[row * out.k + j] = transformed(to_float(x[column]), t);
  }
  if (thread == 0) merge_state(sums, row, n, shift, state_max, state_exp, out);
}

template <class T, int kThreads>
cudaError_t launch(const void* logits, int64_t rows, int64_t n, int64_t row_stride,
                   const RowOut& out, cudaStream_t stream) {
  constexpr int kRows = kBlock<kThreads> / kThreads;
  const unsigned blocks = static_cast<unsigned>((rows + kRows - 1) / kRows);
  const T* x = static_cast<const T*>(logits);
  const unsigned columns = static_cast<unsigned>(n);
  // Five of the 48 sets of statistics are compiled; the smallest that holds what is asked for runs.
  constexpr int kCommon = kEntropy | kTop | kRankOfTarget;
  constexpr int kMost = kCommon | kCollision | kMoments;
  const int rest = out.statistics & ~kCommon;
  const auto kernel = out.statistics == 0      ? &reduce_rows<T, kThreads, 0>
                      : rest == 0              ? &reduce_rows<T, kThreads, kCommon>
                      : rest == kVarentropy    ? &reduce_rows<T, kThreads, kCommon | kVarentropy>
                      : !(rest & kVarentropy)  ? &reduce_rows<T, kThreads, kMost>
                                               : &reduce_rows<T, kThreads, kMost | kVarentropy>;

  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  // Needs code for 9.0 or later, which waits for the kernel before it (see CMakeLists.txt).
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kBlock<kThreads>);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, x, rows, columns, row_stride, out);
}

template <class T>
cudaError_t launch(const void* logits, int64_t rows, int64_t n, int64_t row_stride,
                   const RowOut& out, cudaStream_t stream) {
  if (n <= kWarpLimit) return launch<T, kWarp>(logits, rows, n, row_stride, out, stream);
  if (n <= kPairLimit) return launch<T, 2 * kWarp>(logits, rows, n, row_stride, out, stream);
  return launch<T, 512>(logits, rows, n, row_stride, out, stream);
}

}  // namespace

cudaError_t reduce_logits(const void* logits, Dtype dtype, int64_t rows, int64_t n,
                          int64_t row_stride, const RowOut& out, cudaStream_t stream) {
  if (rows <= 0 || n <= 0) return cudaSuccess;
  if (n >= (1 << 24) || rows > 0x7fffffff) return cudaErrorInvalidValue;  // ids are float32
  switch (dtype) {
    case Dtype::f32:
      return launch<float>(logits, rows, n, row_stride, out, stream);
    case Dtype::bf16:
      return launch<__nv_bfloat16>(logits, rows, n, row_stride, out, stream);
    case Dtype::f16:
      return launch<__half>(logits, rows, n, row_stride, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_score::cuda
