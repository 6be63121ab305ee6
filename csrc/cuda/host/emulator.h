// Runs kernels on the host, a block after the other: every thread of a block is a separate context that gives way at
// barriers and shuffles, so the source of a kernel needs no change. Slow, and only for tests.
//
// Blocks, and threads between two barriers, run in an order drawn from a seed: a result that depends on it is a race.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "../words.h"

#define HF_LOPT_DEVICE static inline
#define HF_LOPT_MEMBER inline
#define HF_LOPT_OUT_OF_LINE static inline
#define HF_LOPT_SHARED static
#define HF_LOPT_KERNEL(threads, blocks) static void
#define HF_LOPT_ARGUMENT const
#define HF_LOPT_LARGE_SHARED(type, name) static type name
#define HF_LOPT_LAUNCH(kernel, grid, threads, stream, args) \
    ::hf_lopt::Emulator::get().run((int)(grid), threads, [&] { kernel(args); })
#define HF_LOPT_LAUNCH_LARGE(kernel, grid, threads, bytes, stream, args) \
    HF_LOPT_LAUNCH(kernel, grid, threads, stream, args)

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace hf_lopt {

// A context of execution on a stack of its own.
#ifdef __x86_64__
// Saves the registers that a call preserves on the stack and goes on with another one; `ucontext` does the same with
// two calls of the kernel each time.
extern "C" void hf_lopt_switch(void** from, void* to);

class Context {
  public:
    void prepare(char* stack, size_t size, void (*entry)()) {
        void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) / 16 * 16);
        *--top = nullptr;  // where `entry` would return to: it never does
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack_ = top;
    }
    void switch_to(Context& other) { hf_lopt_switch(&stack_, other.stack_); }

  private:
    void* stack_ = nullptr;
};
#else
class Context {
  public:
    void prepare(char* stack, size_t size, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = size;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

  private:
    ucontext_t context_;
};
#endif

class Emulator {
  public:
    static constexpr int kWarp = 32, kSlotBytes = 64;

    static Emulator& get() {
        // One for all files that are compiled with kernels.
        extern Emulator& the_emulator();
        return the_emulator();
    }

    void set_seed(unsigned seed) { seed_ = seed; }
    int64_t launches() const { return launches_; }

    void run(int blocks, int threads, std::function<void()> body) {
        if (blocks <= 0) throw std::runtime_error("a launch without blocks is an error on a GPU");
        launches_++;
        body_ = std::move(body);
        std::mt19937 random(seed_);
        std::vector<int> order(blocks);
        std::iota(order.begin(), order.end(), 0);
        if (seed_) std::shuffle(order.begin(), order.end(), random);
        for (int b : order) run_block(b, threads, random);
    }

    int thread() const { return current_; }
    int block() const { return block_; }

    void barrier() {
        Thread& self = threads_[current_];
        self.waits_for = ++self.barriers;
        self.waits_in_warp = false;
        if (++block_arrived_ == (int)threads_.size()) {
            block_arrived_ = 0;
            block_generation_++;
        }
        give_way();
    }

    // Leaves `bytes` of `value` for the warp and waits for the others; `read` then finds them.
    void exchange(const void* value, size_t bytes) {
        Thread& self = threads_[current_];
        Warp& warp = warps_[current_ / kWarp];
        parity_ = (int)(++self.exchanges & 1);
        std::memcpy(warp.slots[parity_][current_ % kWarp], value, bytes);
        self.waits_for = self.exchanges;
        self.waits_in_warp = true;
        if (++warp.arrived == kWarp) {
            warp.arrived = 0;
            warp.generation++;
        }
        give_way();
        parity_ = (int)(self.exchanges & 1);
    }

    template <class T>
    T read(int lane) const {
        T x;
        std::memcpy(&x, warps_[current_ / kWarp].slots[parity_][lane], sizeof x);
        return x;
    }

  private:
    static constexpr size_t kStack = 1 << 16;
    struct Thread {
        Context context;
        int64_t barriers = 0, exchanges = 0, waits_for = 0;
        bool waits_in_warp = false, done = false;
    };
    struct Warp {
        int arrived = 0;
        int64_t generation = 0;
        unsigned char slots[2][kWarp][kSlotBytes];
    };

    static void start() {
        Emulator& self = get();
        self.body_();
        self.threads_[self.current_].done = true;
        self.threads_[self.current_].context.switch_to(self.scheduler_);
    }

    void give_way() { threads_[current_].context.switch_to(scheduler_); }

    bool ready(int i) const {
        const Thread& t = threads_[i];
        return t.waits_for <= (t.waits_in_warp ? warps_[i / kWarp].generation : block_generation_);
    }

    void run_block(int block, int count, std::mt19937& random) {
        block_ = block;
        block_arrived_ = 0;
        block_generation_ = 0;
        threads_.assign(count, Thread());
        warps_.assign(count / kWarp, Warp());
        if (stacks_.size() < (size_t)count) stacks_.resize(count);
        for (int i = 0; i < count; i++) {
            if (!stacks_[i]) stacks_[i].reset(new char[kStack]);
            threads_[i].context.prepare(stacks_[i].get(), kStack, &Emulator::start);
        }
        std::vector<int> order(count);
        std::iota(order.begin(), order.end(), 0);
        if (seed_) std::shuffle(order.begin(), order.end(), random);
        for (int left = count; left > 0;) {
            bool moved = false;
            for (int i : order) {
                // As far as it goes without the others.
                while (!threads_[i].done && ready(i)) {
                    moved = true;
                    current_ = i;
                    scheduler_.switch_to(threads_[i].context);
                    if (threads_[i].done) left--;
                }
            }
            if (!moved) throw std::runtime_error("threads of a block wait for each other at different barriers");
        }
    }

    std::function<void()> body_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<std::unique_ptr<char[]>> stacks_;
    Context scheduler_;
    int current_ = 0, block_ = 0, block_arrived_ = 0, parity_ = 0;
    int64_t block_generation_ = 0, launches_ = 0;
    unsigned seed_ = 0;
};

HF_LOPT_DEVICE int thread() { return Emulator::get().thread(); }
HF_LOPT_DEVICE int block() { return Emulator::get().block(); }
HF_LOPT_DEVICE void barrier() { Emulator::get().barrier(); }
template <class T>
HF_LOPT_DEVICE T shuffle_xor(T x, int mask) {
    Emulator::get().exchange(&x, sizeof x);
    return Emulator::get().read<T>((thread() % Emulator::kWarp) ^ mask);
}
HF_LOPT_DEVICE void warp_barrier() { shuffle_xor(0, 1); }
HF_LOPT_DEVICE void forget_loads() {}
HF_LOPT_DEVICE void fence() {}
HF_LOPT_DEVICE unsigned take_ticket(unsigned* ticket) { return (*ticket)++; }
HF_LOPT_DEVICE void wait_for_tickets(const unsigned* ticket, unsigned count) {
    if (*ticket < count) throw std::runtime_error("a block waits for one that has not begun");
}
template <class T>
HF_LOPT_DEVICE T load_shared_result(const T* x) {
    return *x;
}
HF_LOPT_DEVICE float inverse_root(float x) { return 1.0f / std::sqrt(x); }
HF_LOPT_DEVICE float rough_root(float x) { return std::sqrt(x); }
HF_LOPT_DEVICE float reciprocal(float x) { return 1.0f / x; }
HF_LOPT_DEVICE float maximum(float x, float y) { return std::isnan(x) || x > y ? x : y; }
HF_LOPT_DEVICE float minimum(float x, float y) { return std::isnan(x) || x < y ? x : y; }

template <int bytes>
HF_LOPT_DEVICE void begin_copy(void* to, const void* from) {
    std::memcpy(to, from, bytes);
}
HF_LOPT_DEVICE void end_group() {}
template <int n>
HF_LOPT_DEVICE void wait_for_groups() {}
HF_LOPT_DEVICE void store_wide(float* to, const Float4& y) { std::memcpy(to, &y, sizeof y); }
HF_LOPT_DEVICE void store_wide(uint16_t* to, const Short4& y) { std::memcpy(to, &y, sizeof y); }
HF_LOPT_DEVICE void store_wide(void* to, const Word2& y) { std::memcpy(to, &y, sizeof y); }

HF_LOPT_DEVICE float from_half(uint16_t x) {
    _Float16 y;
    std::memcpy(&y, &x, sizeof y);
    return (float)y;
}
HF_LOPT_DEVICE uint16_t to_half(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    return bits;
}
HF_LOPT_DEVICE float from_bfloat16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
HF_LOPT_DEVICE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
HF_LOPT_DEVICE uint32_t pack_bfloat16(float low, float high) {
    return (uint32_t)to_bfloat16(low) | (uint32_t)to_bfloat16(high) << 16;
}
HF_LOPT_DEVICE float lower_number(uint32_t pair) { return from_bfloat16((uint16_t)(pair & 0xffff)); }
HF_LOPT_DEVICE float upper_number(uint32_t pair) { return from_bfloat16((uint16_t)(pair >> 16)); }

HF_LOPT_DEVICE void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    } of_lane = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    Emulator& emulator = Emulator::get();
    emulator.exchange(&of_lane, sizeof of_lane);
    const int lane = thread() % Emulator::kWarp;
    const auto number = [](uint32_t word, int half) { return from_bfloat16((uint16_t)(word >> 16 * half)); };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) {
            const Fragments of_a = emulator.read<Fragments>(row % 8 * 4 + k % 8 / 2);
            const Fragments of_b = emulator.read<Fragments>(column * 4 + k % 8 / 2);
            sum += number(of_a.a[row / 8 + 2 * (k / 8)], k % 2) * number(of_b.b[k / 8], k % 2);
        }
        d[i] += sum;
    }
}

HF_LOPT_DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Rounds to 10 bits after the first, half away from zero.
HF_LOPT_DEVICE uint32_t to_tf32(float x) {
    const uint32_t bits = bits_of(x);
    return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000u : bits;
}

HF_LOPT_DEVICE void matrix_multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint32_t a[4], b[2];
    } of_lane = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    Emulator& emulator = Emulator::get();
    emulator.exchange(&of_lane, sizeof of_lane);
    const int lane = thread() % Emulator::kWarp;
    // The units read 19 bits.
    const auto number = [](uint32_t bits) {
        bits &= 0xffffe000u;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 8; k++) {
            const Fragments of_a = emulator.read<Fragments>(row % 8 * 4 + k % 4);
            const Fragments of_b = emulator.read<Fragments>(column * 4 + k % 4);
            sum += number(of_a.a[row / 8 + 2 * (k / 4)]) * number(of_b.b[k / 4]);
        }
        d[i] += sum;
    }
}

}  // namespace hf_lopt
