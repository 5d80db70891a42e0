/* Threads that share the parts of one operation.

   Whoever calls does the first share himself. The others wait for theirs, at first by looking again and again, since the
   next operation of a step follows at once, then asleep. What a part computes never depends on who computes it. */

#ifndef FASTBLT_POOL_H
#define FASTBLT_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MOST_THREADS 256
/* Looks before a thread sleeps, some tens of microseconds. */
#define LOOKS 4000
/* Multiplications that are worth a thread of their own: some ten microseconds. */
#define LEAST_WORK 200000

typedef void (*Task)(void *of, int64_t begin, int64_t end);

typedef struct {
    _Atomic unsigned asked, done;
    _Atomic int asleep;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    Task task;
    void *of;
    int64_t begin, end;
} Worker;

static Worker workers[MOST_THREADS];
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

static void *work(void *of) {
    Worker *me = of;
    for (unsigned seen = 0;; seen++) {
        for (int look = 0; look < LOOKS && me->asked == seen; look++) look_again();
        if (me->asked == seen) {
            pthread_mutex_lock(&me->lock);
            me->asleep = 1;
            while (me->asked == seen) pthread_cond_wait(&me->wake, &me->lock);
            me->asleep = 0;
            pthread_mutex_unlock(&me->lock);
        }
        me->task(me->of, me->begin, me->end);
        me->done = seen + 1;
    }
    return 0;
}

/* How many threads there are to be; 1 computes alone. */
static void set_threads(int threads) {
    if (owner != getpid()) {
        /* Threads do not survive a fork. */
        num_workers = 0;
        owner = getpid();
    }
    num_threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    while (num_workers < num_threads - 1) {
        Worker *w = &workers[num_workers];
        pthread_t thread;
        w->asked = w->done = 0;
        w->asleep = 0;
        pthread_mutex_init(&w->lock, 0);
        pthread_cond_init(&w->wake, 0);
        if (pthread_create(&thread, 0, work, w)) {
            num_threads = num_workers + 1;
            return;
        }
        pthread_detach(thread);
        num_workers++;
    }
}

/* task(of, begin, end) over all of 0..n-1, by as many threads as `multiplications` are worth. */
static void share(Task task, void *of, int64_t n, int64_t multiplications) {
    int64_t threads = multiplications / LEAST_WORK;
    if (threads > num_threads) threads = num_threads;
    if (threads > n) threads = n;
    if (threads <= 1) {
        task(of, 0, n);
        return;
    }
    for (int64_t t = 1; t < threads; t++) {
        Worker *w = &workers[t - 1];
        w->task = task;
        w->of = of;
        w->begin = n * t / threads;
        w->end = n * (t + 1) / threads;
        w->asked++;
        if (w->asleep) {
            pthread_mutex_lock(&w->lock);
            pthread_cond_signal(&w->wake);
            pthread_mutex_unlock(&w->lock);
        }
    }
    task(of, 0, n / threads);
    for (int64_t t = 1; t < threads; t++) {
        Worker *w = &workers[t - 1];
        for (int look = 0; w->done != w->asked; look++) {
            if (look < LOOKS) look_again();
            else sched_yield();
        }
    }
}

#endif
