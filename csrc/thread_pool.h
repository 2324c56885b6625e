// Threads for the rows of a pass. Those of the OpenMP runtime that the process has loaded, where there is one: torch's
// spin for a while after its last op, so that they begin at once, and others beside them would share their cores. Else
// a pool of our own, made at the first large call, asleep between calls, made again after a fork.
#pragma once

#include <unistd.h>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace sjd {

// GNU's OpenMP runtime, which runs fn(data) on every thread of a team, the caller's among them.
class LoadedOpenMP {
 public:
  using Parallel = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

  // Null where no runtime is loaded, and in the child of a fork, which has none of its parent's threads.
  static Parallel parallel() {
    static const LoadedOpenMP found;
    return found.owner_ == getpid() ? found.parallel_ : nullptr;
  }

 private:
  LoadedOpenMP() : owner_(getpid()) {
#if defined(__linux__)
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          const char* name = std::strrchr(info->dlpi_name, '/');
          if (name == nullptr || std::strncmp(name, "/libgomp", 8) != 0) return 0;
          void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
          if (library == nullptr) return 0;
          auto& found = static_cast<LoadedOpenMP*>(self)->parallel_;
          found = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
          return found == nullptr ? 0 : 1;
        },
        this);
#endif
  }

  pid_t owner_;
  Parallel parallel_ = nullptr;
};

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
    if (const auto parallel = LoadedOpenMP::parallel()) {
      run_team(parallel, count, num_threads, task);
      taken.clear(std::memory_order_release);
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
  static void run_team(LoadedOpenMP::Parallel parallel, int64_t count, int num_threads,
                       const std::function<void(int64_t)>& task) {
    struct Job {
      const std::function<void(int64_t)>& task;
      int64_t count;
      std::atomic<int64_t> next{0};
    } job{task, count};
    const auto work = [](void* data) {
      auto& mine = *static_cast<Job*>(data);
      for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) mine.task(i);
    };
    parallel(work, &job, static_cast<unsigned>(num_threads), 0);
  }

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
