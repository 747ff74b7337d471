// Put before every .cu file: what a kernel may use of CUDA, for g++. No standard library, to keep compiling fast.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define CUDASIM 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

// module.py finds the kernels by this attribute.
#define __global__ __attribute__((used))
#define __device__
#define __host__
#define __constant__ static
#define __shared__ _Pragma("GCC error \"write FN_SHARED(type, name, [size]) or FN_DYN_SHARED(type, name)\"")
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

#include "cudasim/arithmetic.h"
#include "cudasim/half.h"
#include "cudasim/kernel.h"
#include "cudasim/memory.h"
#include "cudasim/scheduler.h"
#include "cudasim/threads.h"
#include "cudasim/vectors.h"
