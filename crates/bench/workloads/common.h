/* Shared by the workloads: each prints its time, which leaves out its preparation, and a value that depends on all of
   its work, so that a wrong result shows as a difference between engines. */
#ifndef COMMON_H
#define COMMON_H
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* CPU time of this process and of the children that it waited for. */
static inline double cpu(void)
{
    double sum = 0;
    for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
        struct rusage u;
        getrusage(who, &u);
        sum += (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
    }
    return sum;
}

static double cpu_at_begin;

/* Preparation is over. */
static inline double begin(void)
{
    puts("@begin");
    fflush(stdout);
    cpu_at_begin = cpu();
    return now();
}

static inline void report(double seconds, uint64_t value)
{
    printf("@time %.6f\n@cpu %.6f\n%016llx\n", seconds, cpu() - cpu_at_begin, (unsigned long long)value);
}

/* A pseudo-random sequence that is the same everywhere. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

_Noreturn static inline void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline void *check(void *p, const char *what)
{
    if (!p || p == (void *)-1)
        die(what);
    return p;
}

#define RUN(name, function) \
    if (!strcmp(argv[1], name)) \
        return function, 0

#endif
