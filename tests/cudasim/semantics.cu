// Small kernels whose results are compared with NumPy's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef T
#define T int
#endif
#ifndef SHUFFLE
#define SHUFFLE __shfl_sync
#endif

extern "C" __global__ void shuffle(const T* in, T* out, int argument, int width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = SHUFFLE(0xffffffffu, in[i], argument, width);
}

// Only the lanes of the mask take part.
extern "C" __global__ void votes(const int* in, unsigned mask, unsigned* ballot, int* any, int* all) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  ballot[lane] = __ballot_sync(mask, in[lane]);
  any[lane] = __any_sync(mask, in[lane]);
  all[lane] = __all_sync(mask, in[lane]);
}

extern "C" __global__ void reductions(const int* in, unsigned mask, int* out) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const unsigned bits = in[lane];
  const int results[] = {__reduce_add_sync(mask, in[lane]), __reduce_min_sync(mask, in[lane]),
                         __reduce_max_sync(mask, in[lane]), (int)__reduce_and_sync(mask, bits),
                         (int)__reduce_or_sync(mask, bits), (int)__reduce_xor_sync(mask, bits)};
  for (int i = 0; i < 6; ++i) out[i * 32 + lane] = results[i];
}

extern "C" __global__ void block_votes(const int* in, int* out) {
  const int results[] = {__syncthreads_or(in[threadIdx.x]), __syncthreads_and(in[threadIdx.x]),
                         __syncthreads_count(in[threadIdx.x])};
  for (int i = 0; i < 3; ++i) out[i * blockDim.x + threadIdx.x] = results[i];
}

extern "C" __global__ void half_to_float(const __half* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __half2float(in[i]);
}

extern "C" __global__ void float_to_half(const float* in, __half* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __float2half_rn(in[i]);
}

extern "C" __global__ void bfloat16_to_float(const __nv_bfloat16* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __bfloat162float(in[i]);
}

extern "C" __global__ void float_to_bfloat16(const float* in, __nv_bfloat16* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __float2bfloat16_rn(in[i]);
}

extern "C" __global__ void atomics(const int* in, int* out, unsigned* wrapped, float* sum) {
  const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(out + 0, value);
  atomicSub(out + 1, value);
  atomicMin(out + 2, value);
  atomicMax(out + 3, value);
  atomicAnd(out + 4, value);
  atomicOr(out + 5, value);
  atomicXor(out + 6, value);
  if (atomicExch(out + 7, value) == value) atomicAdd(out + 8, 1);
  for (int seen = out[9]; seen < value;) {  // a maximum again
    const int found = atomicCAS(out + 9, seen, value);
    if (found == seen) break;
    seen = found;
  }
  atomicInc(wrapped + 0, 9);
  atomicDec(wrapped + 1, 9);
  atomicAdd(sum, (float)value);
}

extern "C" __global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  const int block_digits = (blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x;
  out[i] = block_digits * 1000 + (threadIdx.z * 10 + threadIdx.y) * 10 + threadIdx.x;
}

// The order in which threads arrive.
extern "C" __global__ void arrivals(int* count, int* out) {
  out[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ float* tile_of(int which) {
  if (which) {
    FN_SHARED(float, tile, [4][36]);
    return &tile[0][0];
  }
  FN_SHARED(float4, tile, [9]);
  return &tile[0].x;
}

// Reverses a block's values in dynamic shared memory; tells what fresh shared memory holds, and where.
extern "C" __global__ void shared(const double* in, double* out, float* fresh, unsigned long long* addresses) {
  FN_DYN_SHARED(double, values);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
  if (threadIdx.x == 0) {
    for (int which = 0; which < 2; ++which) {
      fresh[which] = tile_of(which)[35];
      addresses[which] = (unsigned long long)tile_of(which);
    }
    tile_of(0)[35] = tile_of(1)[35] = 0;
  }
}

struct Pair {
  const float* first;
  const float* second;
};

extern "C" __global__ void take(const Pair pair, double a, signed char b, unsigned long long c, bool d, __half e,
                                __nv_bfloat16 f, float* out) {
  const float4 v = make_float4(*pair.first, *pair.second, (float)a, b);
  reinterpret_cast<float4*>(out)[0] = v;
  __stcs(out + 4, c);
  __stcg(reinterpret_cast<float2*>(out + 6), make_float2(__half2float(e), __bfloat162float(f)));
  if (d) out[5] = max(1.0f, min(2, 3));
}
