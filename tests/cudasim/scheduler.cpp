// Runs the threads of a launch as fibres: block after block, in each block one thread at a time, which goes on until it
// waits for others. Who comes next depends on the launch's order and seed alone.
//
// Compiled without sanitizers, so that its own bookkeeping is not taken for the kernel's. For the same reason nothing
// here calls malloc, memcpy or another function that sanitizers intercept while fibres run.
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cudasim/scheduler.h"
#include "sanitizers.h"

namespace cudasim {

const Thread* current;
uint3 block_index;
dim3 block_shape, grid_shape;

namespace {

constexpr size_t kib = 1024;
constexpr unsigned most_threads = 1024, warp_size = 32;
constexpr size_t most_static_shared = 48 * kib, most_shared = 227 * kib;
constexpr size_t guard_bytes = 4 * kib, stack_bytes = 256 * kib;

// ---------------------------------------------------------------------------------------------------- Building blocks

// Pages straight from the kernel, zeroed.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      perror("mmap");
      __builtin_trap();
    }
    begin_ = static_cast<char*>(mapped);
  }
  ~Pages() {
    address_checker::allow(begin_, bytes_);
    munmap(begin_, bytes_);
  }
  Pages(const Pages&) = delete;

  char* begin() const { return begin_; }
  size_t size() const { return bytes_; }

 private:
  char* begin_;
  size_t bytes_;
};

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  unsigned below(unsigned bound) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<unsigned>((z ^ z >> 31) % bound);
  }

 private:
  uint64_t state_;
};

// A set of thread numbers.
class ThreadSet {
 public:
  bool empty() const { return count_ == 0; }

  void insert(unsigned i) {
    words_[i / 64] |= uint64_t{1} << i % 64;
    ++count_;
  }
  void erase(unsigned i) {
    words_[i / 64] &= ~(uint64_t{1} << i % 64);
    --count_;
  }

  unsigned pick(Order order, Random& random) const {
    if (order == Order::ascending) return nth(0);
    if (order == Order::descending) return nth(count_ - 1);
    return nth(random.below(count_));
  }

 private:
  unsigned nth(unsigned n) const {
    unsigned w = 0;
    for (unsigned here; n >= (here = __builtin_popcountll(words_[w])); ++w) n -= here;
    uint64_t word = words_[w];
    for (; n; --n) word &= word - 1;
    return 64 * w + __builtin_ctzll(word);
  }

  uint64_t words_[most_threads / 64] = {};
  unsigned count_ = 0;
};

bool same(Place a, Place b) {
  if (a.line != b.line) return false;
  const char *p = a.file, *q = b.file;
  while (*p && *p == *q) ++p, ++q;
  return *p == *q;
}

const char* file_name(const char* path) {
  const char* name = path;
  for (; *path; ++path)
    if (*path == '/') name = path + 1;
  return name;
}

// A block's shared memory: each variable poisoned, between red zones, and no better aligned than its type demands.
class SharedMemory {
 public:
  void clear() {
    address_checker::forbid(pages_.begin(), pages_.size());
    end_ = bytes_ = variable_count_ = 0;
    dynamic_ = nullptr;
  }

  void* variable(const void* identity, size_t bytes, size_t alignment, Place place) {
    for (unsigned i = 0; i < variable_count_; ++i)
      if (variables_[i].identity == identity) return variables_[i].address;
    if (variable_count_ == most_variables) fail(place, "too many shared variables");
    if (bytes > most_static_shared) fail(place, "too much shared memory", "%zu bytes, not dynamic", bytes);
    void* address = allocate(bytes, alignment, place);
    variables_[variable_count_++] = {identity, address};
    return address;
  }

  void* dynamic(size_t bytes, Place place) {
    if (!dynamic_) dynamic_ = allocate(bytes, 16, place);
    return dynamic_;
  }

 private:
  static constexpr unsigned most_variables = 64;
  static constexpr size_t redzone = 256;

  char* allocate(size_t bytes, size_t alignment, Place place) {
    if (alignment < 8) alignment = 8;  // what the address checker can tell apart
    size_t begin = (end_ + redzone) / (2 * alignment) * (2 * alignment) + alignment;
    end_ = begin + bytes;
    bytes_ += bytes;
    if (bytes_ > most_shared || end_ + redzone > pages_.size())
      fail(place, "too much shared memory", "%zu bytes", bytes_);
    address_checker::allow(pages_.begin() + begin, bytes);
    // A byte of ones everywhere: NaN as a floating-point number.
    for (size_t i = begin; i < end_; ++i) pages_.begin()[i] = static_cast<char>(0xff);
    return pages_.begin() + begin;
  }

  struct Variable {
    const void* identity;
    void* address;
  };

  Pages pages_{512 * kib};
  size_t end_ = 0, bytes_ = 0;
  Variable variables_[most_variables];
  unsigned variable_count_ = 0;
  void* dynamic_ = nullptr;
};

// ------------------------------------------------------------------------------------------------------ Fibres, blocks

enum class State { ready, at_barrier, at_warp, exited };

struct Fibre : Thread {
  unsigned number = 0;  // within the block
  State state = State::ready;
  Place place = {};  // where it waits

  Vote vote = {};  // at a barrier
  bool predicate = false;
  int outcome = 0;

  unsigned mask = 0, source = 0;  // at a warp operation
  Word value = {};
  Word* received = nullptr;

  bool started = false;
  char* stack = nullptr;
  void* left_at[5] = {};  // for __builtin_setjmp
  void* race_context = nullptr;
  void* address_context = nullptr;
};

struct Block {
  explicit Block(unsigned threads) : fibres(threads), stacks(threads * (guard_bytes + stack_bytes)) {
    for (unsigned i = 0; i < threads; ++i) {
      char* guard = stacks.begin() + i * (guard_bytes + stack_bytes);
      mprotect(guard, guard_bytes, PROT_NONE);
      fibres[i].stack = guard + guard_bytes;
    }
  }
  ~Block() {
    for (Fibre& fibre : fibres) race_detector::destroy_fibre(fibre.race_context);
  }

  void begin() {
    shared.clear();
    waiting = exited = 0;
    unsigned i = 0;
    for (Fibre& fibre : fibres) {
      fibre.number = i;
      fibre.lane = i % warp_size;
      fibre.index = {i % block_shape.x, i / block_shape.x % block_shape.y, i / (block_shape.x * block_shape.y)};
      fibre.state = State::ready;
      fibre.started = false;
      prepare_for_race_detector(fibre);
      ready.insert(i++);
    }
  }

  void prepare_for_race_detector(Fibre& fibre) {
    if (!race_detector::loaded()) return;
    fibre.race_context = race_detector::create_fibre();
    char name[64];
    uint3 b = block_index, t = fibre.index;
    snprintf(name, sizeof name, "block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    race_detector::name_fibre(fibre.race_context, name);
  }

  // The fibre at a lane of the same warp, null where the block ends before it.
  Fibre* in_warp_of(const Fibre& fibre, unsigned lane) {
    unsigned i = fibre.number - fibre.lane + lane;
    return i < fibres.size() ? &fibres[i] : nullptr;
  }

  std::vector<Fibre> fibres;
  Pages stacks;
  SharedMemory shared;
  ThreadSet ready;
  unsigned waiting = 0, exited = 0;  // at the barrier, for good
  char fence_object = 0, barrier_object = 0;
};

struct Running {
  const Kernel* kernel;
  void** arguments;
  size_t shared_bytes;
  Order order;
  Random random;
  Block* block;
  bool failed;
  char message[1024];
} running;

struct Scheduler {
  void* left_at[5];
  ucontext_t first_entry;
  void* race_context;
  void* address_context;
  const void* stack;
  size_t stack_bytes;
} scheduler;

char device_fence_object, launch_object;

Fibre& self() { return *const_cast<Fibre*>(static_cast<const Fibre*>(current)); }

// ----------------------------------------------------------------------------------------------- From fibre to fibre

void run_thread();

__attribute__((noinline)) void enter(Fibre& fibre) {
  current = &fibre;
  address_checker::before_switch(&scheduler.address_context, fibre.stack, stack_bytes);
  race_detector::act_as(fibre.race_context);
  if (!__builtin_setjmp(scheduler.left_at)) {
    if (self().started) __builtin_longjmp(self().left_at, 1);
    self().started = true;
    scheduler.first_entry.uc_stack.ss_sp = self().stack;
    scheduler.first_entry.uc_stack.ss_size = stack_bytes;
    makecontext(&scheduler.first_entry, run_thread, 0);
    setcontext(&scheduler.first_entry);
  }
  address_checker::after_switch(scheduler.address_context);
}

__attribute__((noinline)) void return_to_scheduler(bool for_good) {
  address_checker::before_switch(for_good ? nullptr : &self().address_context, scheduler.stack, scheduler.stack_bytes);
  race_detector::act_as(scheduler.race_context);
  if (!__builtin_setjmp(self().left_at)) __builtin_longjmp(scheduler.left_at, 1);
  address_checker::after_switch(self().address_context);
}

[[noreturn]] void leave_for_good() {
  return_to_scheduler(true);
  __builtin_unreachable();
}

void park(Fibre& fibre, State state, Place place) {
  fibre.state = state;
  fibre.place = place;
  running.block->ready.erase(fibre.number);
}

void wake(Fibre& fibre) {
  fibre.state = State::ready;
  running.block->ready.insert(fibre.number);
}

void record(Place place, const char* kind, const char* format, va_list values) {
  running.failed = true;
  char* text = running.message;
  size_t room = sizeof running.message;
  uint3 b = block_index, t = current->index;
  int used = snprintf(text, room, "%s", kind);
  if (place.file) used += snprintf(text + used, room - used, " at %s:%d", file_name(place.file), place.line);
  used += snprintf(text + used, room - used, ", block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
  if (!*format) return;
  used += snprintf(text + used, room - used, ": ");
  vsnprintf(text + used, room - used, format, values);
}

// ------------------------------------------------------------------------------------------------ Barriers and warps

// Everything that any of the threads did so far happened before everything that any of them does from here on.
template <class Visit>
void order_memory(Visit for_each, const void* object) {
  if (!race_detector::loaded()) return;
  for_each([&](Fibre& fibre) {
    race_detector::act_as(fibre.race_context);
    race_detector::release(object);
  });
  for_each([&](Fibre& fibre) {
    race_detector::act_as(fibre.race_context);
    race_detector::acquire(object);
  });
  race_detector::act_as(self().race_context);
}

int count_votes(Vote vote) {
  unsigned yes = 0;
  for (Fibre& fibre : running.block->fibres) yes += fibre.predicate;
  if (vote == Vote::any) return yes != 0;
  if (vote == Vote::all) return yes == running.block->fibres.size();
  return static_cast<int>(yes);
}

void check_same_barrier(const Fibre& one, const Fibre& other) {
  if (same(one.place, other.place) && one.vote == other.vote) return;
  uint3 t = other.index;
  fail(one.place, "divergent barrier", "thread (%u, %u, %u) waits at %s:%d", t.x, t.y, t.z, file_name(other.place.file),
       other.place.line);
}

void open_barrier_if_all_arrived() {
  Block& block = *running.block;
  if (block.waiting == 0 || block.waiting + block.exited < block.fibres.size()) return;
  const Fibre* first = nullptr;
  for (Fibre& fibre : block.fibres) {
    if (fibre.state != State::at_barrier) continue;
    if (!first) first = &fibre;
    check_same_barrier(*first, fibre);
  }
  if (block.exited)
    fail(first->place, "divergent barrier", "%u of %zu threads have exited", block.exited, block.fibres.size());
  int outcome = count_votes(first->vote);
  order_memory([&](auto visit) { for (Fibre& fibre : block.fibres) visit(fibre); }, &block.barrier_object);
  for (Fibre& fibre : block.fibres) {
    fibre.outcome = outcome;
    wake(fibre);
  }
  block.waiting = 0;
}

bool has_lane(unsigned mask, unsigned lane) { return mask >> lane & 1; }

void check_same_operation(const Fibre& me, const Fibre& other) {
  if (other.mask != me.mask)
    fail(me.place, "warp mask mismatch", "lane %u has mask %08x, lane %u has %08x at %s:%d", me.lane, me.mask,
         other.lane, other.mask, file_name(other.place.file), other.place.line);
  if (!same(me.place, other.place))
    fail(me.place, "divergent warp operation", "lane %u waits at %s:%d", other.lane, file_name(other.place.file),
         other.place.line);
}

bool warp_has_met(const Fibre& me) {
  bool met = true;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (!has_lane(me.mask, lane)) continue;
    Fibre* other = running.block->in_warp_of(me, lane);
    if (!other) fail(me.place, "bad warp mask", "mask %08x names lane %u, which the block lacks", me.mask, lane);
    if (other->state == State::exited) fail(me.place, "exited lane in warp mask", "lane %u of %08x", lane, me.mask);
    // One that waits for others and not for this lane may still come.
    bool waits_for_me = other->state == State::at_warp && has_lane(other->mask, me.lane);
    if (waits_for_me) check_same_operation(me, *other);
    met = met && waits_for_me;
  }
  return met;
}

template <class Action>
void for_each_in_mask(const Fibre& me, Action action) {
  for (unsigned lane = 0; lane < warp_size; ++lane)
    if (has_lane(me.mask, lane)) action(*running.block->in_warp_of(me, lane));
}

void hand_over(Fibre& receiver) {
  if (receiver.source == every_lane) {
    for_each_in_mask(receiver, [&](Fibre& other) { receiver.received[other.lane] = other.value; });
    return;
  }
  if (!has_lane(receiver.mask, receiver.source))
    fail(receiver.place, "bad warp mask", "lane %u reads from lane %u, which is not in mask %08x", receiver.lane,
         receiver.source, receiver.mask);
  *receiver.received = running.block->in_warp_of(receiver, receiver.source)->value;
}

void complete_warp_operation(Fibre& me) {
  if (me.received) {
    for_each_in_mask(me, hand_over);
  } else {
    // An object that lanes at another operation do not share.
    const Fibre* lowest = running.block->in_warp_of(me, __builtin_ctz(me.mask));
    order_memory([&](auto visit) { for_each_in_mask(me, visit); }, lowest);
  }
  for_each_in_mask(me, wake);
}

// --------------------------------------------------------------------------------------------- Threads, blocks, launch

void check_nobody_waits_for(const Fibre& me) {
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const Fibre* other = running.block->in_warp_of(me, lane);
    if (other && other->state == State::at_warp && has_lane(other->mask, me.lane))
      fail(other->place, "exited lane in warp mask", "lane %u of %08x", me.lane, other->mask);
  }
}

void run_thread() {
  address_checker::after_switch(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  running.kernel->call(running.arguments);
  park(self(), State::exited, {});
  ++running.block->exited;
  check_nobody_waits_for(self());
  open_barrier_if_all_arrived();
  race_detector::release(&launch_object);
  leave_for_good();
}

void record_deadlock(const char* format, ...) {
  va_list values;
  va_start(values, format);
  record(self().place, "deadlock", format, values);
  va_end(values);
}

void run_block() {
  Block& block = *running.block;
  block.begin();
  while (!block.ready.empty()) {
    enter(block.fibres[block.ready.pick(running.order, running.random)]);
    if (running.failed) return;
  }
  unsigned threads = block.fibres.size();
  if (block.exited == threads) return;
  for (Fibre& fibre : block.fibres)
    if (fibre.state == State::at_warp) current = &fibre;
  record_deadlock("%u threads wait for their warp, %u for the block, %u have exited",
                  threads - block.waiting - block.exited, block.waiting, block.exited);
}

// While it lives, a signal that a kernel's mistake raises ends the launch and not the process. Sanitizers have handlers
// of their own, which say more.
class SignalGuard {
 public:
  SignalGuard() {
    if (race_detector::loaded() || address_checker::loaded()) return;
    stack_t stack = {};  // the fibre's own may be what overflowed
    stack.ss_sp = stack_.begin();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = end_launch;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (unsigned i = 0; i < count; ++i) sigaction(signals[i], &action, &before_[i]);
    active_ = true;
  }
  ~SignalGuard() {
    if (!active_) return;
    for (unsigned i = 0; i < count; ++i) sigaction(signals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr unsigned count = 3;
  static constexpr int signals[count] = {SIGSEGV, SIGBUS, SIGFPE};

  static void end_launch(int signal, siginfo_t* info, void*) {
    if (signal == SIGFPE) fail({}, "integer division by zero");
    fail({}, "segmentation fault", "address %p", info->si_addr);
  }

  Pages stack_{64 * kib};
  stack_t stack_before_ = {};
  struct sigaction before_[count] = {};
  bool active_ = false;
};

const char* reject(const Launch& launch) {
  const uint32_t *g = launch.grid, *b = launch.block;
  if (!g[0] || !g[1] || !g[2] || g[0] > 0x7fffffff || g[1] > 0xffff || g[2] > 0xffff) return "invalid grid";
  if (!b[0] || !b[1] || !b[2] || b[0] > 1024 || b[1] > 1024 || b[2] > 64) return "invalid block";
  if (b[0] * b[1] * b[2] > most_threads) return "more than 1024 threads a block";
  if (launch.shared_bytes > most_shared) return "more than 227 KiB of dynamic shared memory";
  return nullptr;
}

std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = running.order == Order::descending ? blocks - 1 - i : i;
  if (running.order == Order::random)
    for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[running.random.below(i)]);
  return order;
}

void run_blocks() {
  unsigned threads = block_shape.x * block_shape.y * block_shape.z;
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i : block_order(grid_shape.x * grid_shape.y * grid_shape.z)) {
    block_index = {i % grid_shape.x, i / grid_shape.x % grid_shape.y, i / (grid_shape.x * grid_shape.y)};
    // For the race detector every block has memory and fibres of its own, to the end: it would take a second use of an
    // address for a race, and forgets what a fibre did once that is gone.
    if (blocks.empty() || race_detector::loaded()) blocks.push_back(std::make_unique<Block>(threads));
    running.block = blocks.back().get();
    run_block();
    if (running.failed) break;
  }
  race_detector::acquire(&launch_object);
}

}  // namespace

// ------------------------------------------------------------------------------------------------ What kernels call

int barrier(Vote vote, bool predicate, Place place) {
  Fibre& me = self();
  me.vote = vote;
  me.predicate = predicate;
  park(me, State::at_barrier, place);
  ++running.block->waiting;
  open_barrier_if_all_arrived();
  return_to_scheduler(false);
  return me.outcome;
}

void meet_warp(unsigned mask, Word value, unsigned source, Word* received, Place place) {
  Fibre& me = self();
  if (!has_lane(mask, me.lane)) fail(place, "bad warp mask", "lane %u is not in its own mask %08x", me.lane, mask);
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.received = received;
  park(me, State::at_warp, place);
  if (warp_has_met(me)) complete_warp_operation(me);
  return_to_scheduler(false);
}

// Fences of the same reach are ordered among each other as they were executed (CUDA's are sequentially consistent).
void fence(Fence reach) {
  void* object = reach == Fence::block ? &running.block->fence_object : &device_fence_object;
  race_detector::acquire(object);
  race_detector::release(object);
}

// Where threads may overtake each other without waiting.
void before_atomic() {
  if (running.order == Order::random && running.random.below(2)) return_to_scheduler(false);
}

void* shared_memory(const void* variable, size_t bytes, size_t alignment, Place place) {
  return running.block->shared.variable(variable, bytes, alignment, place);
}

void* dynamic_shared_memory(Place place) { return running.block->shared.dynamic(running.shared_bytes, place); }

void fail(Place place, const char* kind, const char* format, ...) {
  va_list values;
  va_start(values, format);
  record(place, kind, format, values);
  va_end(values);
  leave_for_good();
}

// Runs a launch to its end. Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* cudasim_launch(const Kernel* kernel, void** arguments,
                                                                             const Launch* launch) {
  if (const char* reason = reject(*launch)) return reason;
  grid_shape = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
  block_shape = dim3(launch->block[0], launch->block[1], launch->block[2]);
  running.kernel = kernel;
  running.arguments = arguments;
  running.shared_bytes = launch->shared_bytes;
  running.order = static_cast<Order>(launch->order);
  running.random = Random(launch->seed);
  running.failed = false;
  scheduler.race_context = race_detector::this_fibre();
  getcontext(&scheduler.first_entry);
  SignalGuard guard;
  run_blocks();
  return running.failed ? running.message : nullptr;
}

}  // namespace cudasim
