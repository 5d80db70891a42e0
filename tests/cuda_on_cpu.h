// As much of CUDA as `ring.cu` needs, on a CPU. Every thread of every block is a fiber. One of them runs at a time, until
// it waits for something; which one is next is drawn from a seed. Copies land late, and their target holds NaNs until
// then, so that a read that does not wait for them is seen.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

typedef uint32_t u32;
typedef uint64_t u64;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int block, thread;
    bool done = false;
};
// Threads that meet: how many are there, and how often all of them were.
struct Meeting {
    int arrived = 0, times = 0;
};
struct Block {
    std::vector<unsigned char> shared;
    Meeting all, consumers;
};
struct Warp {
    Meeting meeting;
    u32 a[32][2], b[32][2];
};
struct Barrier {
    int count, pending, bytes;
    u32 phase;
};
struct Copy {
    void *to;
    const void *from;
    u32 bytes;
    u64 *bar;
};

static const int MOST_WARPS = 32;
static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static std::vector<Warp> warps;
static std::vector<Copy> copies;
static std::map<u64 *, Barrier> barriers;
static std::mt19937 draw;
static ucontext_t scheduler;
static Fiber *current;
static int threads_per_block;
struct Index {
    int x;
};
static Index gridDim;
#define threadIdx (Index{current->thread})
#define blockIdx (Index{current->block})

static void pause() { swapcontext(&current->context, &scheduler); }
static void meet(Meeting &meeting, int count) {
    const int times = meeting.times;
    if (++meeting.arrived == count) {
        meeting.arrived = 0;
        meeting.times++;
    }
    while (meeting.times == times) pause();
}
static Block &block() { return blocks[current->block]; }
static Warp &warp_of() { return warps[current->block * MOST_WARPS + current->thread / 32]; }
static void __syncthreads() { meet(block().all, threads_per_block); }
static void __syncwarp() { meet(warp_of().meeting, 32); }
#define PAUSE() pause()
#define CONSUMERS_SYNC() meet(block().consumers, WARPS * 32)
#define SHARED unsigned char *shared = block().shared.data();

static void turn(Barrier &barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.count;
        barrier.phase ^= 1;
    }
}
static void barrier_init(u64 *bar, u32 count) { barriers[bar] = Barrier{(int)count, (int)count, 0, 0}; }
static void barriers_are_set() {}
static void barrier_arrive(u64 *bar) {
    barriers[bar].pending--;
    turn(barriers[bar]);
}
static void barrier_expect(u64 *bar, u32 bytes) {
    barriers[bar].bytes += bytes;
    barrier_arrive(bar);
}
static bool barrier_passed(u64 *bar, u32 parity) { return barriers[bar].phase != parity; }
static void copy_bulk(void *to, const void *from, u32 bytes, u64 *bar) {
    memset(to, 0xff, bytes);
    copies.push_back({to, from, bytes, bar});
}
static void land_one() {
    if (copies.empty()) return;
    const size_t i = draw() % copies.size();
    const Copy copy = copies[i];
    copies.erase(copies.begin() + i);
    memcpy(copy.to, copy.from, copy.bytes);
    barriers[copy.bar].bytes -= copy.bytes;
    turn(barriers[copy.bar]);
}

static u32 __float_as_uint(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
static float half_of(u32 pair, int which) {
    const u32 bits = which ? pair & 0xffff0000u : pair << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
// c (16 x 8) += a (16 x 16) b (16 x 8) across a warp; of a, rows 8 to 15 are zero (PTX ISA, mma.m16n8k16 fragments).
static void multiply(float *c, u32 a0, u32 a2, u32 b0, u32 b1) {
    Warp &warp = warp_of();
    const int lane = current->thread % 32;
    warp.a[lane][0] = a0, warp.a[lane][1] = a2, warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    __syncwarp();
    for (int e = 0; e < 2; e++) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const u32 a = warp.a[row * 4 + k % 8 / 2][k / 8], b = warp.b[column * 4 + k % 8 / 2][k / 8];
            sum += half_of(a, k % 2) * half_of(b, k % 2);
        }
        c[e] += sum;
    }
    __syncwarp();
}
static void peek_two(const u32 *p, u32 *first, u32 *second) { *first = p[0], *second = p[1]; }
static void poke(u32 *p, u32 word) { *p = word; }

static std::vector<Fiber *> order;
static void (*body)();
static void run_body() {
    body();
    current->done = true;
}
// Runs `of` in every thread of `count` blocks. Returns whether all of them came to their end.
static bool launch(int count, int threads, size_t shared, unsigned seed, void (*of)()) {
    gridDim.x = count, threads_per_block = threads, body = of;
    blocks.assign(count, Block());
    for (Block &b : blocks) b.shared.assign(shared, 0xff);
    warps.assign(count * MOST_WARPS, Warp());
    barriers.clear(), copies.clear(), fibers.clear(), order.clear();
    draw.seed(seed);
    fibers.resize(count * threads);
    for (size_t i = 0; i < fibers.size(); i++) {
        Fiber &fiber = fibers[i];
        fiber.block = i / threads, fiber.thread = i % threads;
        fiber.stack.reset(new char[32 << 10]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 32 << 10;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_body, 0);
        order.push_back(&fiber);
    }
    for (int round = 0; round < 20000; round++) {
        std::shuffle(order.begin(), order.end(), draw);
        bool waits = false;
        for (Fiber *fiber : order) {
            if (fiber->done) continue;
            waits = true;
            current = fiber;
            swapcontext(&scheduler, &fiber->context);
        }
        if (!waits) return true;
        if (draw() % 3 == 0) land_one();
    }
    return false;
}
