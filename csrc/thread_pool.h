// Threads for the rows of a pass: made at the first large call, asleep between calls, made again after a fork.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace sjd {

class ThreadPool {
 public:
  // task(i) for every i in 0..count-1 on at most `num_threads` threads, the caller's among them. Returns when all are
  // done. Runs on the caller's thread alone where another caller has the pool.
  static void run(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
    static std::atomic_flag taken = ATOMIC_FLAG_INIT;
    if (num_threads < 2 || count < 2 || taken.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    // A child of fork has none of its parent's threads. The parent's pool is left alone there, as it is at exit:
    // its sleeping threads may not find it destroyed.
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    if (owner != getpid()) {
      pool = new ThreadPool;
      owner = getpid();
    }
    pool->run_job(count, num_threads - 1, task);
    taken.clear(std::memory_order_release);
  }

 private:
  void run_job(int64_t count, int helpers, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      for (; num_workers_ < helpers; ++num_workers_) std::thread(&ThreadPool::work, this).detach();
    } catch (const std::system_error&) {
      // The system allows no more threads; those there are do the work.
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    seats_ = helpers;
    lock.unlock();
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    take_all();
    lock.lock();
    seats_ = 0;  // who wakes only now finds nothing to do, and is not waited for
    idle_.wait(lock, [this] { return active_ == 0; });
  }

  void take_all() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++active_;
      lock.unlock();
      take_all();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  int num_workers_ = 0, seats_ = 0, active_ = 0;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace sjd
