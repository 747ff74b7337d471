// Shared memory, cached loads and stores, atomics.
#pragma once
#include "scheduler.h"

// The address of the static byte tells one variable, of one instance of a template, from all others.
#define FN_SHARED(T, name, ...)                                                                     \
  typedef T name##_type __VA_ARGS__;                                                                \
  static char name##_identity;                                                                      \
  name##_type& name = *static_cast<name##_type*>(                                                   \
      ::cudasim::shared_memory(&name##_identity, sizeof(name##_type), alignof(name##_type), ::cudasim::here()))
#define FN_DYN_SHARED(T, name) T* name = static_cast<T*>(::cudasim::dynamic_shared_memory(::cudasim::here()))

#define CUDASIM_LOAD(name)                                                                          \
  template <class T>                                                                                \
  T name(const T* address, CUDASIM_CALLER) {                                                        \
    cudasim::check_aligned(address, alignof(T), #name, caller);                                     \
    return *address;                                                                                \
  }
CUDASIM_LOAD(__ldg)
CUDASIM_LOAD(__ldca)
CUDASIM_LOAD(__ldcg)
CUDASIM_LOAD(__ldcs)
CUDASIM_LOAD(__ldcv)
CUDASIM_LOAD(__ldlu)
#undef CUDASIM_LOAD

namespace cudasim {
template <class T>
struct Given {  // as a parameter's type: converts to T, takes no part in deducing it
  using type = T;
};
}  // namespace cudasim
#define CUDASIM_GIVEN(T) typename cudasim::Given<T>::type

#define CUDASIM_STORE(name)                                                                         \
  template <class T>                                                                                \
  void name(T* address, CUDASIM_GIVEN(T) value, CUDASIM_CALLER) {                                   \
    cudasim::check_aligned(address, alignof(T), #name, caller);                                     \
    *address = value;                                                                               \
  }
CUDASIM_STORE(__stcg)
CUDASIM_STORE(__stcs)
CUDASIM_STORE(__stwb)
CUDASIM_STORE(__stwt)
#undef CUDASIM_STORE

namespace cudasim {

// Relaxed, as on the GPU: an atomic orders nothing but itself.
template <class T, class Change>
T atomic(T* address, Change change, Place place) {
  check_aligned(address, sizeof(T), "atomic", place);
  before_atomic();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

}  // namespace cudasim

#define CUDASIM_ATOMIC(name, expression)                                                            \
  template <class T>                                                                                \
  T name(T* address, CUDASIM_GIVEN(T) value, CUDASIM_CALLER) {                                      \
    return cudasim::atomic(address, [=](T old) { return (T)(expression); }, caller);                \
  }
CUDASIM_ATOMIC(atomicAdd, old + value)
CUDASIM_ATOMIC(atomicSub, old - value)
CUDASIM_ATOMIC(atomicMin, value < old ? value : old)
CUDASIM_ATOMIC(atomicMax, value > old ? value : old)
CUDASIM_ATOMIC(atomicAnd, old & value)
CUDASIM_ATOMIC(atomicOr, old | value)
CUDASIM_ATOMIC(atomicXor, old ^ value)
CUDASIM_ATOMIC(atomicExch, value)
CUDASIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDASIM_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDASIM_ATOMIC

template <class T>
T atomicCAS(T* address, CUDASIM_GIVEN(T) expected, CUDASIM_GIVEN(T) value, CUDASIM_CALLER) {
  return cudasim::atomic(address, [=](T old) { return old == expected ? value : old; }, caller);
}
#undef CUDASIM_GIVEN
