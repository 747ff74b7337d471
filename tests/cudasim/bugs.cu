// A reduction in one launch, each macro BUG_… planting one mistake in it.
// Every block sums its share of x; the block that finishes last adds up the blocks' sums.

__device__ double warp_sum(double value) {
#ifdef BUG_MASK
  const unsigned mask = 0x0000ffffu;
#else
  const unsigned mask = 0xffffffffu;
#endif
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(mask, value, distance);
  return value;
}

__device__ double share(const float* x, long long n) {
  const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long threads = (long long)gridDim.x * blockDim.x;
  double sum = 0;
  for (long long i = thread; i < n / 4; i += threads) {
#if defined BUG_MISALIGNED
    const float4 v = __ldg(reinterpret_cast<const float4*>(x + 1) + i);
#elif defined BUG_MISALIGNED_PLAIN
    const float4 v = reinterpret_cast<const float4*>(x + 1)[i];
#else
    const float4 v = __ldg(reinterpret_cast<const float4*>(x) + i);
#endif
    sum += (double)v.x + v.y + v.z + v.w;
  }
#ifdef BUG_TAIL
  const long long end = n + 1;
#else
  const long long end = n;
#endif
  for (long long i = n / 4 * 4 + thread; i < end; i += threads) sum += x[i];
  return sum;
}

// Thread 0 returns the sum over the block.
__device__ double block_sum(double value) {
  FN_SHARED(double, warps, [THREADS / 32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_sum(value);
#ifdef BUG_UNINITIALISED
  if (lane == 0 && warp > 0) warps[warp] = value;
#else
  if (lane == 0) warps[warp] = value;
#endif
#ifndef BUG_SYNCTHREADS
  __syncthreads();
#endif
#ifdef BUG_SHARED_BOUNDS
  const int count = THREADS / 32 + 1;
#else
  const int count = THREADS / 32;
#endif
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) sum += warps[i];
#ifdef BUG_BARRIER
    __syncthreads();  // for one thread only
#endif
  }
  return sum;
}

// Thread 0 returns the sum over the first warp, which goes through 32 numbers of dynamic shared memory.
__device__ double first_warp_sum(double value) {
  FN_DYN_SHARED(double, lanes);
  const int lane = threadIdx.x;
  lanes[lane] = value;
  for (int distance = 16; distance > 0; distance /= 2) {
    __syncwarp();
    const double other = lane < distance ? lanes[lane + distance] : 0;
#ifndef BUG_SYNCWARP
    __syncwarp();
#endif
    lanes[lane] += other;
  }
  return lanes[lane];
}

extern "C" __global__ void __launch_bounds__(THREADS) sum(const float* __restrict__ x, long long n, double* partial,
                                                         unsigned* ticket, double* result) {
  FN_SHARED(bool, last);
#ifdef BUG_EXIT
  if ((long long)blockIdx.x * THREADS + threadIdx.x >= n / 4) return;
#endif
  const double sum = block_sum(share(x, n));
#ifdef BUG_REUSE
  const double again = block_sum(sum);
  if (threadIdx.x == 0 && again < 0) result[0] = 0;
#endif
  if (threadIdx.x == 0) {
#ifdef BUG_ONE_PARTIAL
    partial[0] = sum;
#else
    partial[blockIdx.x] = sum;
#endif
#if defined BUG_BLOCK_FENCE
    __threadfence_block();
#elif !defined BUG_THREADFENCE
    __threadfence();
#endif
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // which leaves 0 for the next launch
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  __threadfence();
  double total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) total += partial[i];
  total = first_warp_sum(total);
  if (threadIdx.x == 0) *result = total;
}
