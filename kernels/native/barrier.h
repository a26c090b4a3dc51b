// Where the threads of a team wait for one another.
#pragma once
#include <atomic>
#include <sched.h>

// Where a team meets after every operation. Whoever waits spins for as long as an even share of work may differ, then
// lets others have the core: one of them may be the very thread that is waited for. (OpenMP's own barrier spins for
// milliseconds, which on a busy machine makes a step ten times slower, or sleeps at once, which costs an idle one more
// than the operation.)
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait()
    {
        const int generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int turn = 0; generation_.load(std::memory_order_acquire) == generation; turn++) {
            if (turn > SPINS)
                sched_yield();
#if defined(__x86_64__)
            else
                __builtin_ia32_pause();
#endif
        }
    }

  private:
    static constexpr int SPINS = 1000;
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
};
