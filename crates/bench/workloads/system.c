/* Workloads of memory and of the kernel. */
#include "common.h"
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { MIB = 1 << 20 };

static uint8_t *fresh(size_t bytes)
{
    uint8_t *p = check(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
    /* Pages of 4 KiB on every kernel. */
    madvise(p, bytes, MADV_NOHUGEPAGE);
    return p;
}

static uint64_t sum_of(const uint8_t *p, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i += 509)
        sum = sum * 31 + p[i];
    return sum;
}

/* Called through a volatile pointer, so that the compiler makes nothing else of it. */
static void *(*volatile copy)(void *, const void *, size_t) = memcpy;
static void *(*volatile fill)(void *, int, size_t) = memset;

static void libc_memcpy(void)
{
    uint8_t *a = fresh(4 * MIB), *b = fresh(4 * MIB);
    for (int i = 0; i < 4 * MIB; i++)
        a[i] = (uint8_t)(i * 7 >> 3);
    copy(b, a, 4 * MIB);
    double t = begin();
    for (int i = 0; i < 200; i++) {
        a[i * 4099] ^= 0x55;
        copy(b, a, 4 * MIB);
    }
    report(now() - t, sum_of(b, 4 * MIB));
}

static void libc_memset(void)
{
    uint8_t *a = fresh(4 * MIB);
    fill(a, 1, 4 * MIB);
    double t = begin();
    for (int i = 0; i < 300; i++)
        fill(a, i, 4 * MIB - (size_t)i);
    report(now() - t, sum_of(a, 4 * MIB));
}

static void rep_movsb(void)
{
    uint8_t *a = fresh(65536), *b = fresh(65536);
    for (int i = 0; i < 65536; i++)
        a[i] = (uint8_t)(i * 13 >> 2);
    memset(b, 0, 65536);
    double t = begin();
    for (int i = 0; i < 8000; i++) {
        void *from = a, *to = b;
        size_t n = 65536;
        a[i] ^= 0x11;
        __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(n) : : "memory");
    }
    report(now() - t, sum_of(b, 65536));
}

static void rep_stosb(void)
{
    uint8_t *b = fresh(65536);
    memset(b, 0, 65536);
    double t = begin();
    for (int i = 0; i < 8000; i++) {
        void *to = b;
        size_t n = 65536 - (size_t)(i & 63);
        __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(i) : "memory");
    }
    report(now() - t, sum_of(b, 65536));
}

/* One dependent load per cache line, in an order that no prefetcher knows: one circle through all lines. */
static void chase(size_t bytes, long loads)
{
    const size_t lines = bytes / 64;
    uint64_t *p = (uint64_t *)fresh(bytes);
    uint64_t seed = 11;
    for (size_t i = 0; i < lines; i++)
        p[i * 8] = i;
    for (size_t i = lines - 1; i > 0; i--) {
        size_t j = next_random(&seed) % i;
        uint64_t other = p[j * 8];
        p[j * 8] = p[i * 8];
        p[i * 8] = other;
    }
    uint64_t at = 0;
    double t = begin();
    for (long i = 0; i < loads; i++)
        at = p[at * 8];
    report(now() - t, at);
}

static void system_calls(void)
{
    double t = begin();
    for (int i = 0; i < 1000000; i++)
        syscall(SYS_getppid);
    report(now() - t, 0);
}

static void faults(void)
{
    const size_t bytes = 64 * MIB;
    double t = begin();
    for (int round = 0; round < 3; round++) {
        uint8_t *p = fresh(bytes);
        for (size_t i = 0; i < bytes; i += 4096)
            p[i] = 1;
        munmap(p, bytes);
    }
    report(now() - t, 0);
}

static void wait_for(pid_t child)
{
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status)
        die("child");
}

static void forks(void)
{
    double t = begin();
    for (int i = 0; i < 1000; i++) {
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        wait_for(child);
    }
    report(now() - t, 0);
}

static void execs(void)
{
    char self[] = "/proc/self/exe", nothing[] = "nothing";
    char *const argv[] = { self, nothing, NULL };
    double t = begin();
    for (int i = 0; i < 400; i++) {
        pid_t child = fork();
        if (child == 0) {
            execv(self, argv);
            _exit(1);
        }
        wait_for(child);
    }
    report(now() - t, 0);
}

static void maps(void)
{
    double t = begin();
    for (int i = 0; i < 100000; i++) {
        void *p = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || munmap(p, 65536))
            die("mmap");
    }
    report(now() - t, 0);
}

static void ping_pong(void)
{
    int to[2], from[2];
    char c = 0;
    if (pipe(to) || pipe(from))
        die("pipe");
    pid_t child = fork();
    if (child == 0) {
        close(to[1]);
        while (read(to[0], &c, 1) == 1)
            if (write(from[1], &c, 1) != 1)
                _exit(1);
        _exit(0);
    }
    close(to[0]);
    double t = begin();
    for (int i = 0; i < 20000; i++)
        if (write(to[1], &c, 1) != 1 || read(from[0], &c, 1) != 1)
            die("ping-pong");
    t = now() - t;
    close(to[1]);
    wait_for(child);
    report(t, 0);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    RUN("nothing", (void)0);
    RUN("memcpy", libc_memcpy());
    RUN("memset", libc_memset());
    RUN("movsb", rep_movsb());
    RUN("stosb", rep_stosb());
    RUN("chase-4m", chase(4 * MIB, 4000000));
    RUN("chase-256m", chase((size_t)256 * MIB, 1500000));
    RUN("getppid", system_calls());
    RUN("faults", faults());
    RUN("fork", forks());
    RUN("exec", execs());
    RUN("mmap", maps());
    RUN("ping-pong", ping_pong());
    fprintf(stderr, "no workload %s\n", argv[1]);
    return 2;
}
