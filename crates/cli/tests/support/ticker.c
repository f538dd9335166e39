/* A program for a guest that is saved and goes on elsewhere. A thread on each CPU computes a chain of SHA-256; every thread holds every
   reading of both clocks against the latest one that any other has had before. Each line tells how far all of it is:
       tick NUMBER CLOCK_MONOTONIC CLOCK_REALTIME LONGEST-SLEEP {COUNT HASH} end
   in nanoseconds; HASH is the first 8 bytes of link COUNT of the chain, which begins with 32 bytes that are the CPU's number and zeroes.
   Whatever is not as it has to be is told as WRONG. It ends by SIGTERM. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_CPUS 8
#define NAP 10000000

/* SHA-256 of 32 bytes (FIPS 180-4, section 6.2): one block. */
static const uint32_t H[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
static uint32_t K[64];
static uint32_t ror(uint32_t x, int n) { return x >> n | x << (32 - n); }
static void link_of(uint32_t *m) {
    uint32_t w[64], s[8];
    memcpy(w, m, 32);
    memset(w + 8, 0, 32);
    w[8] = 0x80000000;
    w[15] = 256;
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3)
             + (ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, H, 32);
    for (int i = 0; i < 64; i++) {
        uint32_t a = s[7] + (ror(s[4], 6) ^ ror(s[4], 11) ^ ror(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
        uint32_t b = (ror(s[0], 2) ^ ror(s[0], 13) ^ ror(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 28);
        s[4] += a;
        s[0] = a + b;
    }
    for (int i = 0; i < 8; i++) m[i] = H[i] + s[i];
}

/* The round constants: the first 32 bits behind the point of the cube roots of the first 64 primes, reckoned with floating point, which
   thereby is a part of what must survive. A long double's 64 bits are just enough. */
static void constants(void) {
    int found = 0;
    for (int p = 2; found < 64; p++) {
        int prime = 1;
        for (int d = 2; d * d <= p; d++) prime &= p % d != 0;
        if (!prime) continue;
        long double x = p;
        for (int i = 0; i < 60; i++) x -= (x * x * x - p) / (3 * x * x);
        K[found++] = (uint32_t)(uint64_t)((x - (int)x) * 4294967296.0L);
    }
}

static struct { pthread_mutex_t lock; uint64_t count; uint32_t hash[8]; } workers[MAX_CPUS];
static volatile sig_atomic_t over;
static const clockid_t CLOCKS[2] = { CLOCK_MONOTONIC, CLOCK_REALTIME };
static uint64_t latest[2];

/* Read a clock; nobody may have seen a later time before. */
static uint64_t now(int clock) {
    struct timespec t;
    uint64_t before = __atomic_load_n(&latest[clock], __ATOMIC_SEQ_CST);
    clock_gettime(CLOCKS[clock], &t);
    uint64_t ns = t.tv_sec * 1000000000ull + t.tv_nsec;
    if (ns < before)
        printf("WRONG clock %d: %llu after %llu on CPU %d\n", clock, (unsigned long long)ns, (unsigned long long)before, sched_getcpu());
    while (ns > before && !__atomic_compare_exchange_n(&latest[clock], &before, ns, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return ns;
}

/* Vector registers in their whole width, live while time passes: whoever takes the CPU away meanwhile keeps them. False if they change. */
__attribute__((target("avx2"))) static int wide(uint64_t seed) {
    uint64_t in[4] = { seed, ~seed, seed * 3, seed << 32 }, out[4];
    __asm__ volatile("vmovdqu %1, %%ymm13\n"
                     "mov $3000, %%ecx\n"
                     "1: dec %%ecx\n"
                     "jnz 1b\n"
                     "vmovdqu %%ymm13, %0\n"
                     "vzeroupper"
                     : "=m"(out)
                     : "m"(in)
                     : "ecx", "xmm13", "memory", "cc");
    return !memcmp(in, out, sizeof in);
}

/* INT3 comes to the thread that has executed it, and goes on behind it. */
static _Thread_local volatile uint64_t traps;
static void trapped(int signal) { traps += signal == SIGTRAP; }

static void *work(void *arg) {
    long n = (long)arg;
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(n, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
    uint32_t h[8] = { (uint32_t)n << 24 };
    double part = 0, sum = 0;
    for (uint64_t count = 1; !over; count++) {
        link_of(h);
        pthread_mutex_lock(&workers[n].lock);
        workers[n].count = count;
        memcpy(workers[n].hash, h, sizeof h);
        pthread_mutex_unlock(&workers[n].lock);
        now(0);
        now(1);
        /* Floating point: exact in this range. */
        part += 0.5;
        sum += part;
        if (part != 0.5 * count || sum != 0.25 * count * (count + 1)) printf("WRONG sum %f after %llu rounds\n", sum, (unsigned long long)count);
        if (__builtin_cpu_supports("avx2") && !wide(count * 0x9e3779b97f4a7c15)) printf("WRONG vector after %llu rounds\n", (unsigned long long)count);
        if (count % 64 == 0) {
            __asm__ volatile("int3" ::: "memory");
            if (traps != count / 64) printf("WRONG traps: %llu after %llu rounds\n", (unsigned long long)traps, (unsigned long long)count);
        }
        if (sched_getcpu() != n) printf("WRONG CPU %d instead of %ld\n", sched_getcpu(), n);
    }
    return 0;
}

static void end(int signal) { over = signal; }

int main(void) {
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus > MAX_CPUS) cpus = MAX_CPUS;
    constants();
    signal(SIGTERM, end);
    signal(SIGTRAP, trapped);
    setvbuf(stdout, 0, _IOLBF, 1024);
    pthread_t threads[MAX_CPUS];
    for (long i = 0; i < cpus; i++) {
        pthread_mutex_init(&workers[i].lock, 0);
        workers[i].hash[0] = (uint32_t)i << 24;
        pthread_create(&threads[i], 0, work, (void *)i);
    }
    uint64_t longest = 0;
    for (unsigned long tick = 1; !over; tick++) {
        char line[512];
        uint64_t mono = now(0), real = now(1);
        int at = snprintf(line, sizeof line, "tick %lu %llu %llu %llu", tick, (unsigned long long)mono, (unsigned long long)real, (unsigned long long)longest);
        for (long i = 0; i < cpus; i++) {
            pthread_mutex_lock(&workers[i].lock);
            at += snprintf(line + at, sizeof line - at, " %llu %08x%08x", (unsigned long long)workers[i].count, workers[i].hash[0], workers[i].hash[1]);
            pthread_mutex_unlock(&workers[i].lock);
        }
        printf("%s end\n", line);
        uint64_t asleep = now(0);
        struct timespec nap = { 0, NAP };
        while (nanosleep(&nap, &nap) && !over);
        asleep = now(0) - asleep;
        if (asleep < NAP && !over) printf("WRONG sleep of %llu ns\n", (unsigned long long)asleep);
        longest = asleep;
    }
    for (long i = 0; i < cpus; i++) pthread_join(threads[i], 0);
    printf("ticker done\n");
    return 0;
}
