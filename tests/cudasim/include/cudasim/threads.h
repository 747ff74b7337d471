// Indices, barriers, and what the lanes of a warp do together.
#pragma once
#include "scheduler.h"

#define threadIdx (::cudasim::current->index)
#define blockIdx (::cudasim::block_index)
#define blockDim (::cudasim::block_shape)
#define gridDim (::cudasim::grid_shape)
static constexpr int warpSize = 32;

inline void __syncthreads(CUDASIM_CALLER) { cudasim::barrier(cudasim::Vote::none, false, caller); }
inline int __syncthreads_or(int p, CUDASIM_CALLER) { return cudasim::barrier(cudasim::Vote::any, p, caller); }
inline int __syncthreads_and(int p, CUDASIM_CALLER) { return cudasim::barrier(cudasim::Vote::all, p, caller); }
inline int __syncthreads_count(int p, CUDASIM_CALLER) { return cudasim::barrier(cudasim::Vote::count, p, caller); }

inline void __syncwarp(unsigned mask = ~0u, CUDASIM_CALLER) { cudasim::meet_warp(mask, {}, 0, nullptr, caller); }

inline void __threadfence_block() { cudasim::fence(cudasim::Fence::block); }
inline void __threadfence() { cudasim::fence(cudasim::Fence::device); }
inline void __threadfence_system() { cudasim::fence(cudasim::Fence::device); }

namespace cudasim {

template <class T>
Word pack(T value) {
  static_assert(sizeof(T) <= sizeof(Word), "a lane hands on 16 bytes at most");
  Word word = {};
  __builtin_memcpy(&word, static_cast<const void*>(&value), sizeof(T));
  return word;
}

template <class T>
T unpack(const Word& word) {
  T value;
  __builtin_memcpy(static_cast<void*>(&value), &word, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
  Word received;
  meet_warp(mask, pack(value), source, &received, place);
  return unpack<T>(received);
}

// combine(so far, value) over the lanes of the mask, from the lowest up.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine combine, Place place) {
  Word received[32];
  meet_warp(mask, pack(value), every_lane, received, place);
  unsigned lane = __builtin_ctz(mask);
  T result = unpack<T>(received[lane]);
  while (++lane < 32)
    if (mask >> lane & 1) result = combine(result, unpack<T>(received[lane]));
  return result;
}

// Lanes exchange within segments of `width`; one that would reach outside its segment keeps its own value.
inline unsigned segment_begin(int width) { return current->lane & ~(width - 1); }
inline unsigned within_segment(unsigned lane, int width) {
  return lane - segment_begin(width) < static_cast<unsigned>(width) ? lane : current->lane;
}

}  // namespace cudasim

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDASIM_CALLER) {
  return cudasim::shuffle(mask, value, cudasim::segment_begin(width) + (lane & (width - 1)), caller);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CUDASIM_CALLER) {
  return cudasim::shuffle(mask, value, cudasim::within_segment(cudasim::current->lane - distance, width), caller);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CUDASIM_CALLER) {
  return cudasim::shuffle(mask, value, cudasim::within_segment(cudasim::current->lane + distance, width), caller);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDASIM_CALLER) {
  // Unlike the others it may read from an earlier segment.
  unsigned source = cudasim::current->lane ^ bits;
  bool beyond = source >= cudasim::segment_begin(width) + width;
  return cudasim::shuffle(mask, value, beyond ? cudasim::current->lane : source, caller);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  unsigned bit = predicate ? 1u << cudasim::current->lane : 0;
  return cudasim::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; }, caller);
}
inline int __any_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  return __ballot_sync(mask, predicate, caller) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDASIM_CALLER) {
  return __ballot_sync(mask, !predicate, caller) == 0;
}

#define CUDASIM_REDUCE(name, T, expression)                                                  \
  inline T __reduce_##name##_sync(unsigned mask, T value, CUDASIM_CALLER) {                  \
    return cudasim::reduce(mask, value, [](T a, T b) { return (T)(expression); }, caller);   \
  }
CUDASIM_REDUCE(add, unsigned, a + b)
CUDASIM_REDUCE(min, unsigned, a < b ? a : b)
CUDASIM_REDUCE(max, unsigned, a > b ? a : b)
CUDASIM_REDUCE(and, unsigned, a & b)
CUDASIM_REDUCE(or, unsigned, a | b)
CUDASIM_REDUCE(xor, unsigned, a ^ b)
CUDASIM_REDUCE(add, int, (unsigned)a + (unsigned)b)
CUDASIM_REDUCE(min, int, a < b ? a : b)
CUDASIM_REDUCE(max, int, a > b ? a : b)
#undef CUDASIM_REDUCE
