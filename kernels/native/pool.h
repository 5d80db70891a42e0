/* Threads that share the parts of one operation.

   The caller takes parts itself, and never waits for a thread that has not started: on a busy machine that may take
   long. The others spin for a moment, since the next operation of a step follows at once. Then they sleep; but as many as a
   step is worth only yield the processor until it ends. A part's result never depends on the thread that computes it. */

#ifndef FASTBLT_POOL_H
#define FASTBLT_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MOST_THREADS 256
/* Polls before a thread yields the processor between polls (about ten microseconds), and before it sleeps (about a hundred,
   about the work of one thread between two products of a large layer). */
#define LOOKS 300
#define LAST_LOOK 500
/* Multiplications that justify another thread (about ten microseconds), and those that justify waking one that sleeps. */
#define LEAST_WORK 200000
#define LEAST_TO_WAKE 2000000
#define PARTS_PER_THREAD 4
#define NO_PART 0xffffffffu

typedef void (*Task)(void *of, int64_t begin, int64_t end);

/* The current operation. `turn` holds its number in the upper half and the next part in the lower. A thread that
   increments it owns that part, and the operation lasts until that part is done. */
static struct {
    _Atomic(Task) task;
    _Atomic(void *) of;
    _Atomic int64_t n, parts;
    _Atomic uint64_t turn;
    _Atomic int64_t done;
} now;

static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake[MOST_THREADS] = {[0 ... MOST_THREADS - 1] = PTHREAD_COND_INITIALIZER};
static _Atomic int asleep[MOST_THREADS], num_awake;
static int num_workers, num_threads = 1;
static pid_t owner;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

static inline void look_again(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Set while this thread computes a part: what is shared inside it then runs on this thread alone. */
static _Thread_local int inside;

/* Takes one part, if there is one. */
static int take_part(void) {
    uint64_t turn = now.turn;
    int64_t part = turn & NO_PART, parts = now.parts, n = now.n;
    Task task = now.task;
    void *of = now.of;
    if (part >= parts || !atomic_compare_exchange_strong(&now.turn, &turn, turn + 1)) return part < parts;
    inside = 1;
    task(of, n * part / parts, n * (part + 1) / parts);
    inside = 0;
    now.done++;
    return 1;
}

static void *work(void *number_of) {
    int number = (int)(intptr_t)number_of;
    for (int look = 0;;) {
        if (take_part()) look = 0;
        else if (++look < LOOKS) look_again();
        else if (look < LAST_LOOK || number < num_awake) sched_yield();
        else {
            uint64_t turn = now.turn;
            pthread_mutex_lock(&bed);
            asleep[number] = 1;
            while (now.turn == turn && number >= num_awake) pthread_cond_wait(wake + number, &bed);
            asleep[number] = 0;
            pthread_mutex_unlock(&bed);
            look = 0;
        }
    }
    return 0;
}

/* Number of threads; 1 computes alone. */
static void set_threads(int threads) {
    if (owner != getpid()) {
        /* Threads do not survive a fork, and their state is unknown. */
        for (int t = 0; t < num_workers; t++) {
            pthread_cond_init(wake + t, 0);
            asleep[t] = 0;
        }
        num_workers = num_awake = 0;
        pthread_mutex_init(&bed, 0);
        owner = getpid();
    }
    num_threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    while (num_workers < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, 0, work, (void *)(intptr_t)num_workers)) {
            num_threads = num_workers + 1;
            return;
        }
        pthread_detach(thread);
        num_workers++;
    }
}

/* Wakes those of the first `count` threads that sleep; the first are always woken first. */
static void wake_up(int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        if (!asleep[t]) continue;
        pthread_mutex_lock(&bed);
        pthread_cond_signal(wake + t);
        pthread_mutex_unlock(&bed);
    }
}

/* Before many operations, none of which would be worth waking a thread for: as many threads as all of them are worth stay
   awake until `may_sleep`. */
static void stay_awake(int64_t multiplications) {
    int64_t worth = multiplications / LEAST_TO_WAKE;
    num_awake = worth < num_threads ? (int)worth : num_threads - 1;
    wake_up(num_awake);
}

static void may_sleep(void) { num_awake = 0; }

static int64_t num_useful(int64_t multiplications) {
    int64_t threads = multiplications / LEAST_WORK;
    return threads < num_threads ? threads : num_threads;
}

/* task(of, begin, end) over all of 0..n-1 in so many parts, by as many threads as `multiplications` are worth. */
static void share_parts(Task task, void *of, int64_t n, int64_t parts, int64_t multiplications) {
    int64_t threads = num_useful(multiplications);
    int is_alone = num_workers && asleep[0] && multiplications < LEAST_TO_WAKE;
    if (inside || threads <= 1 || parts <= 1 || is_alone) {
        task(of, 0, n);
        return;
    }
    /* First, no thread may take a part: not even one of the last operation under this one's numbers. */
    uint64_t number = (now.turn >> 32) + 1;
    now.turn = number << 32 | NO_PART;
    now.task = task;
    now.of = of;
    now.n = n;
    now.parts = parts;
    now.done = 0;
    now.turn = number << 32;
    if (multiplications >= LEAST_TO_WAKE) wake_up(threads - 1);
    while (take_part());
    for (int look = 0; now.done != parts; look++) {
        if (look < LOOKS) look_again();
        else sched_yield();
    }
}

/* In parts small enough that no thread waits long for another. */
static void share(Task task, void *of, int64_t n, int64_t multiplications) {
    int64_t parts = num_useful(multiplications) * PARTS_PER_THREAD;
    share_parts(task, of, n, parts < n ? parts : n, multiplications);
}

#endif
