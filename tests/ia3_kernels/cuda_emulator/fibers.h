// Fibers: functions that stop half-way and go on later. One stack each; who runs decides who runs next.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

namespace fibers {

constexpr size_t kStack = 64 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t entry;
  jmp_buf where;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  void (*done)() = nullptr;
};

inline std::vector<std::unique_ptr<Fiber>> all;
inline Fiber* running = nullptr;
inline jmp_buf scheduler;

inline void yield() {
  // Not swapcontext, which asks the kernel for the signal mask every time.
  if (_setjmp(running->where) == 0) _longjmp(scheduler, 1);
}

// A fiber outlives its function, for the next one.
inline void run_forever() {
  for (;;) {
    yield();
    running->body(running->argument);
    running->done();
  }
}

inline void resume(int index) {
  running = all[size_t(index)].get();
  if (_setjmp(scheduler) == 0) _longjmp(running->where, 1);
}

// Readies a fiber to run body(argument), then done(), from the next resume on.
inline void start(int index, void (*body)(const void*), const void* argument, void (*done)()) {
  while (int(all.size()) <= index) {
    all.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *all.back();
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStack;
    makecontext(&fiber.entry, run_forever, 0);
    running = &fiber;
    if (_setjmp(scheduler) == 0) setcontext(&fiber.entry);
  }
  Fiber& fiber = *all[size_t(index)];
  fiber.body = body, fiber.argument = argument, fiber.done = done;
}

}  // namespace fibers
