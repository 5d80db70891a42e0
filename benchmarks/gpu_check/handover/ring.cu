// A chain of square products, one a phase. A loader warp streams the weights of all phases through a ring of shared
// memory and never looks at data, so that weights are on the chip before their inputs are. Programs hand over to each
// other by 32-bit words, a bfloat16 above and a tag below: the tag marks the word as valid.
//
// DIM: rows and columns, a multiple of 16 * WARPS. A program owns 8 outputs. STAGES: tiles that the ring holds.
#ifdef ON_CPU
#include "cuda_on_cpu.h"
#else
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u64 *bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count) : "memory");
}
// The copy engine must see barriers that a thread has set up.
__device__ __forceinline__ void barriers_are_set() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u64 *bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64 *bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}
__device__ __forceinline__ bool barrier_passed(u64 *bar, u32 parity) {
    u32 passed;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(passed) : "r"(address(bar)), "r"(parity) : "memory");
    return passed;
}
__device__ __forceinline__ void copy_bulk(void *to, const void *from, u32 bytes, u64 *bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(bar)) : "memory");
}
// c (16 x 8) += a (16 x 16) b (16 x 8); of a, rows 8 to 15 are zero.
__device__ __forceinline__ void multiply(float *c, u32 a0, u32 a2, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void peek_two(const u32 *p, u32 *first, u32 *second) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(*first), "=r"(*second) : "l"(p) : "memory");
}
__device__ __forceinline__ void poke(u32 *p, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}
#define PAUSE()
#define CONSUMERS_SYNC() asm volatile("bar.sync 1, %0;" ::"r"(WARPS * 32) : "memory")
#define SHARED extern __shared__ __align__(128) unsigned char shared[];
#endif

#define OUT 8
#define STEPS (DIM / WARPS / 16)
#define TILE (OUT * DIM / 2)
// After this many polls a program continues without its input: a wrong result, not a hung device.
#define MOST_POLLS (1 << 20)

__device__ __forceinline__ void barrier_wait(u64 *bar, u32 parity) {
    for (u32 polls = 0; !barrier_passed(bar, parity) && polls < MOST_POLLS; polls++) PAUSE();
}

// w: phases x programs x TILE words of two bfloat16, as the lanes take them: [warp][step][lane][half].
// x: 2 x 8 x DIM words. Phase p reads those of x[p % 2] that are tagged tag + p, and writes x[(p + 1) % 2].
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 1)
chain(const u32 *w, u32 *x, int phases, int rows, int tag) {
    SHARED
    u32 *ring = (u32 *)shared;
    float *part = (float *)(ring + STAGES * TILE);  // WARPS x 8 rows x OUT
    u64 *full = (u64 *)(part + WARPS * 8 * OUT), *empty = full + STAGES;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, program = blockIdx.x, programs = gridDim.x;
    if (thread == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, WARPS);
        }
        barriers_are_set();
    }
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0) {
            for (int p = 0; p < phases; p++) {
                const int s = p % STAGES;
                barrier_wait(empty + s, ((p / STAGES) & 1) ^ 1);
                barrier_expect(full + s, TILE * 4);
                copy_bulk(ring + s * TILE, w + ((u64)p * programs + program) * TILE, TILE * 4, full + s);
            }
        }
        return;
    }
    const int row = lane / 4, pair = lane % 4;
    for (int p = 0; p < phases; p++) {
        const int s = p % STAGES;
        const u32 *from = x + (p % 2) * 8 * DIM + row * DIM + warp * STEPS * 16 + pair * 2;
        u32 *to = x + ((p + 1) % 2) * 8 * DIM;
        const u32 wanted = (tag + p) & 0xffff;
        u32 a[STEPS][2];
        // Loads all of a lane's words at once, and again until the last of them is there.
        for (u32 polls = 0, there = row >= rows; polls < MOST_POLLS; polls++) {
            u32 words[STEPS][2][2], differs = 0;
            for (int i = 0; i < STEPS; i++)
                for (int h = 0; h < 2; h++) {
                    words[i][h][0] = words[i][h][1] = wanted;
                    if (!there) peek_two(from + i * 16 + h * 8, &words[i][h][0], &words[i][h][1]);
                }
            for (int i = 0; i < STEPS; i++)
                for (int h = 0; h < 2; h++) {
                    differs |= (words[i][h][0] ^ wanted) | (words[i][h][1] ^ wanted);
                    a[i][h] = (words[i][h][0] >> 16) | (words[i][h][1] & 0xffff0000u);
                }
            if (there || !(differs & 0xffff)) break;
            PAUSE();
        }
        barrier_wait(full + s, (p / STAGES) & 1);
        float total[4] = {0, 0, 0, 0};
        const u32 *tile = ring + s * TILE + warp * STEPS * 64 + lane * 2;
        for (int i = 0; i < STEPS; i++) multiply(total, a[i][0], a[i][1], tile[i * 64], tile[i * 64 + 1]);
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + s);
        part[(warp * 8 + row) * OUT + pair * 2] = total[0];
        part[(warp * 8 + row) * OUT + pair * 2 + 1] = total[1];
        CONSUMERS_SYNC();
        if (thread < 8 * OUT && thread / OUT < rows) {
            float sum = part[thread];
            for (int q = 1; q < WARPS; q++) sum += part[q * 8 * OUT + thread];  // in order, whatever the rows
            u32 bits = __float_as_uint(sum);
            bits += 0x7fff + ((bits >> 16) & 1);
            poke(to + thread / OUT * DIM + program * OUT + thread % OUT, (bits & 0xffff0000u) | ((tag + p + 1) & 0xffff));
        }
        CONSUMERS_SYNC();
    }
}
