// Handing out the work of a kernel to threads.
//
// A kernel that is called alone opens an OpenMP region of torch's own pool. In a `with_team`, which runs many kernels one
// after the other, the threads of one region stay together: a hand-over is a cache line that changes hands (0.4 us), not
// a region (1 us, and a millisecond where a thread was not on a core). Items go to whoever asks for one, and nobody waits
// for a thread that has none, so that a core which the system takes away for a while delays one item and not the step.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

class Team {
  public:
    // Run body(i) for i < n on all threads of the team; returns when all are done. Called by the first thread alone.
    template <typename Body>
    void run(int64_t n, const Body& body) {
        const int64_t grain = (n + kMostChunks - 1) / kMostChunks;
        const uint64_t chunks = uint64_t((n + grain - 1) / grain);
        call_ = [](const void* of, int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) (*static_cast<const Body*>(of))(i);
        };
        body_ = &body;
        items_ = n;
        grain_ = grain;
        done_.store(0, std::memory_order_relaxed);
        epoch_ += uint64_t(1) << 32;
        state_.store(epoch_ | chunks << 16, std::memory_order_release);
        while (take()) {}
        for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; spins++) pause(spins);
    }

    // Take part in every `run` until `stop`: all threads but the first.
    void serve() {
        for (int spins = 0; !stopped_.load(std::memory_order_acquire); spins++) {
            if (take()) spins = 0;
            pause(spins);
        }
    }

    void stop() { stopped_.store(true, std::memory_order_release); }

    // The team whose first thread this is, or null.
    static Team*& current() {
        thread_local Team* team = nullptr;
        return team;
    }

    static constexpr int64_t kMostChunks = 64;  // a few for each thread, so that all end at about the same time

  private:
    // Claim the next piece of the current work and do it; false if there is none left. The fields of the work stay as
    // they are as long as a piece of it is claimed and not done.
    bool take() {
        uint64_t state = state_.load(std::memory_order_acquire);
        do {
            if ((state & 0xffff) == (state >> 16 & 0xffff)) return false;
        } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire));
        const int64_t first = int64_t(state & 0xffff) * grain_;
        call_(body_, first, std::min(items_, first + grain_));
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    static void pause(int spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins > 4000) std::this_thread::yield();  // some 100 us: something else may want this core
    }

    alignas(64) std::atomic<uint64_t> state_{0};  // number of the work << 32 | its pieces << 16 | pieces claimed
    alignas(64) std::atomic<uint64_t> done_{0};
    std::atomic<bool> stopped_{false};
    uint64_t epoch_ = 0;
    void (*call_)(const void*, int64_t, int64_t) = nullptr;
    const void* body_ = nullptr;
    int64_t items_ = 0, grain_ = 1;
};

// Run program() on this thread, which has the others at hand for every parallel_for.
template <typename Program>
inline void with_team(int threads, const Program& program) {
    if (threads <= 1) return program();
    Team team;
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            Team::current() = &team;
            program();
            Team::current() = nullptr;
            team.stop();
        } else {
            team.serve();
        }
    }
}

// Run body(i) for i < n on the team, or the caller's OpenMP pool, or inline where handing out the work costs more than
// doing it.
template <typename Body>
inline void parallel_for(int64_t n, int64_t work_per_item, int threads, const Body& body) {
    constexpr int64_t kWorthARegion = 65536, kWorthATeam = 16384;  // elements; a thousand take about 0.15 us
    Team* team = Team::current();
    if (threads <= 1 || n <= 1 || n * work_per_item < (team != nullptr ? kWorthATeam : kWorthARegion)) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
    if (team != nullptr) return team->run(n, body);
    const int64_t grain = (n + Team::kMostChunks - 1) / Team::kMostChunks;
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads)
    for (int64_t i = 0; i < n; i++) body(i);
}
