// What kernels ask of the scheduler. Of the code behind it nothing is instrumented by a sanitizer.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "vectors.h"

namespace cudasim {

struct Place {
  const char* file;
  int line;
};

constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// As a function's last parameter: where that function is called.
#define CUDASIM_CALLER ::cudasim::Place caller = ::cudasim::here()

struct Thread {
  uint3 index;
  unsigned lane;
};

extern const Thread* current;
extern uint3 block_index;
extern dim3 block_shape, grid_shape;

enum class Vote { none, any, all, count };
enum class Fence { block, device };
enum class Order { ascending, descending, random };

// What one lane hands to another.
struct alignas(16) Word {
  uint64_t halves[2];
};
constexpr unsigned every_lane = 32;  // as a source

int barrier(Vote vote, bool predicate, Place place);

// Waits for the lanes of the mask. With a source, its value is put in received[0]; with every_lane, the value of lane i
// in received[i]; without `received` nothing is exchanged and the lanes see each other's memory instead.
void meet_warp(unsigned mask, Word value, unsigned source, Word* received, Place place);

void fence(Fence reach);
void before_atomic();
void* shared_memory(const void* variable, size_t bytes, size_t alignment, Place place);
void* dynamic_shared_memory(Place place);
[[noreturn]] void fail(Place place, const char* kind, const char* format = "", ...)
    __attribute__((format(printf, 3, 4)));

inline void check_aligned(const volatile void* address, size_t alignment, const char* what, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail(place, "misaligned access", "%s of %zu bytes at %p", what, alignment, const_cast<const void*>(address));
}

// A kernel as module.py and the scheduler see it.
struct Type {
  char kind;  // as in numpy.dtype.kind; 'p' for a pointer
  uint32_t size;
};
struct Kernel {
  void (*call)(void** arguments);
  const Type* types;  // ends with a kind of 0
  const char* parameters;
};
struct Launch {
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  uint64_t seed;
  int32_t order;
};

}  // namespace cudasim
