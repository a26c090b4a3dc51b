// One thread's view of an operation that all threads of a team run together.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include "barrier.h"

// On a cache line of its own: every thread of the team writes to it.
struct alignas(64) Counter {
    std::atomic<int> value{0};
    std::atomic<void *> shared{nullptr};
    ~Counter() { std::free(shared.load()); }
};

class Worker {
  public:
    Worker(int thread, int threads, Barrier &barrier, std::atomic<bool> &failed)
        : thread(thread), threads(threads), barrier_(barrier), failed_(failed)
    {
    }
    ~Worker() { std::free(scratch_); }
    Worker(const Worker &) = delete;
    Worker &operator=(const Worker &) = delete;

    const int thread, threads;

    void begin(Counter &counter) { counter_ = &counter; }

    // The next item of this operation that nobody has claimed, counted from 0; past the last one there is nothing to do.
    // Items are claimed and not dealt out, so that a thread that another process holds up does not hold up the team.
    int claim() { return counter_->value.fetch_add(1, std::memory_order_relaxed); }

    struct Run {
        int first, end;
    };

    // The next items of `items` in all, at most `longest`: half of an even share of what is left, so that the last are
    // claimed one by one. For what is faster in a row, as memory that is read. None if `first` is `end`.
    Run claim_run(int items, int longest)
    {
        int first = counter_->value.load(std::memory_order_relaxed), count;
        do {
            if (first >= items)
                return {items, items};
            count = (items - first) / (2 * threads);
            count = count > longest ? longest : count < 1 ? 1 : count;
        } while (!counter_->value.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
        return {first, first + count};
    }

    // Wait for the others of the team; all threads call it equally often in an operation.
    void meet() { barrier_.wait(); }

    // `bytes` of memory of this thread's own, aligned to 64, until the next call; null (and the run fails) if there is
    // none.
    template <typename T> T *scratch(size_t count)
    {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(scratch_);
            scratch_ = std::aligned_alloc(64, bytes);
            size_ = scratch_ ? bytes : 0;
            if (!scratch_)
                failed_.store(true, std::memory_order_relaxed);
        }
        return static_cast<T *>(scratch_);
    }

    // `bytes` of memory that all threads share during this operation, aligned to 64, the first `zeroed` of them 0 at the
    // beginning; null (and the run fails) if there is none. All threads ask for the same.
    void *shared(size_t bytes, size_t zeroed)
    {
        void *memory = counter_->shared.load(std::memory_order_acquire);
        if (memory)
            return memory;
        void *fresh = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!fresh) {
            failed_.store(true, std::memory_order_relaxed);
            return nullptr;
        }
        std::memset(fresh, 0, zeroed);
        if (counter_->shared.compare_exchange_strong(memory, fresh, std::memory_order_acq_rel))
            return fresh;
        std::free(fresh); // another thread was first
        return memory;
    }

  private:
    Barrier &barrier_;
    std::atomic<bool> &failed_;
    Counter *counter_ = nullptr;
    void *scratch_ = nullptr;
    size_t size_ = 0;
};

using KernelFunction = void (*)(const struct Operation &, const struct Step &, Worker &);
