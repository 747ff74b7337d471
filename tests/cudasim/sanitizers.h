// What the scheduler tells the sanitizers. The functions are absent (null) where a sanitizer is not loaded.
#pragma once
#include <stddef.h>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fibre);
__attribute__((weak)) void __tsan_set_fiber_name(void* fibre, const char* name);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fibre, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** left, const void* stack, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* entered, const void** stack, size_t* bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
}

namespace cudasim::race_detector {

inline bool loaded() { return __tsan_create_fiber; }
inline void* this_fibre() { return loaded() ? __tsan_get_current_fiber() : nullptr; }
inline void* create_fibre() { return loaded() ? __tsan_create_fiber(0) : nullptr; }

// The name that reports give it.
inline void name_fibre(void* fibre, const char* name) {
  if (loaded()) __tsan_set_fiber_name(fibre, name);
}

inline void destroy_fibre(void* fibre) {
  if (loaded()) __tsan_destroy_fiber(fibre);
}

// From here on what happens is done by that fibre; going from one to the other orders nothing.
inline void act_as(void* fibre) {
  constexpr unsigned without_ordering = 1;
  if (loaded()) __tsan_switch_to_fiber(fibre, without_ordering);
}

// What came before a release of an object happened before what comes after a later acquire of it.
inline void release(const void* object) {
  if (loaded()) __tsan_release(const_cast<void*>(object));
}
inline void acquire(const void* object) {
  if (loaded()) __tsan_acquire(const_cast<void*>(object));
}

}  // namespace cudasim::race_detector

namespace cudasim::address_checker {

inline bool loaded() { return __asan_poison_memory_region; }

inline void forbid(void* address, size_t bytes) {
  if (loaded()) __asan_poison_memory_region(address, bytes);
}
inline void allow(void* address, size_t bytes) {
  if (loaded()) __asan_unpoison_memory_region(address, bytes);
}

// Around a change of stack. `left` keeps what belongs to the stack being left; null where that one is left for good.
inline void before_switch(void** left, const void* stack, size_t bytes) {
  if (loaded()) __sanitizer_start_switch_fiber(left, stack, bytes);
}
inline void after_switch(void* entered, const void** came_from = nullptr, size_t* bytes = nullptr) {
  if (loaded()) __sanitizer_finish_switch_fiber(entered, came_from, bytes);
}

}  // namespace cudasim::address_checker
