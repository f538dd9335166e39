/* Programs that change their own code, and each other's. Prints what came of it; a wrong result is told at once. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

static void fail(const char *what, uint64_t expected, uint64_t got, long at)
{
    printf("FAIL %s: expected %llx, got %llx (round %ld)\n", what, (unsigned long long)expected, (unsigned long long)got, at);
    exit(1);
}

static uint8_t *code_pages(int n)
{
    uint8_t *p = mmap(NULL, (size_t)n * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return p;
}

typedef uint32_t (*function)(uint32_t);

/* mov $value,%eax; ret */
static void put_constant(uint8_t *at, uint32_t value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void constants(void)
{
    uint8_t *p = code_pages(3);
    /* In the middle of a page, across lines, across pages. */
    static const int places[] = { 64, 61, PAGE - 3, PAGE - 1, 2 * PAGE - 5 };
    for (unsigned k = 0; k < sizeof places / sizeof *places; k++)
        for (long i = 0; i < 3000; i++) {
            put_constant(p + places[k], (uint32_t)i * 77);
            uint32_t got = ((function)(void *)(p + places[k]))(0);
            if (got != (uint32_t)i * 77)
                fail("constant", (uint32_t)i * 77, got, i);
        }
    puts("constants ok");
}

/* The store changes the instruction right behind itself, as old programs do: an x86 CPU sees it at once. */
static void next_instruction(void)
{
    static const uint8_t text[] = {
        0x40, 0x88, 0x3d, 0x01, 0, 0, 0, /* mov %dil,1(%rip): the immediate below */
        0xb8, 0, 0, 0, 0,                /* mov $0,%eax */
        0xc3,
    };
    uint8_t *p = code_pages(2);
    for (int place = 0; place < 2; place++) {
        uint8_t *at = p + (place ? PAGE - 9 : 128);
        memcpy(at, text, sizeof text);
        for (long i = 0; i < 20000; i++) {
            uint32_t got = ((function)(void *)at)((uint32_t)i & 0xff);
            if (got != (i & 0xff))
                fail("next instruction", i & 0xff, got, i);
        }
    }
    puts("next instruction ok");
}

/* A loop that turns its own `inc` into `dec` half-way. */
static void own_loop(void)
{
    static const uint8_t text[] = {
        0x31, 0xc0,                               /* xor %eax,%eax */
        0xb9, 0x64, 0, 0, 0,                      /* mov $100,%ecx */
        0xff, 0xc0,                               /* 7: inc %eax (ff c8: dec) */
        0x83, 0xf9, 0x29,                         /* cmp $41,%ecx */
        0x75, 0x07,                               /* jne over the store */
        0xc6, 0x05, 0xf3, 0xff, 0xff, 0xff, 0xc8, /* movb $0xc8,-13(%rip): the second byte of inc */
        0xff, 0xc9,                               /* dec %ecx */
        0x75, 0xee,                               /* jnz 7 */
        0xc3,
    };
    uint8_t *p = code_pages(1);
    for (long i = 0; i < 5000; i++) {
        memcpy(p + 512, text, sizeof text);
        uint32_t got = ((function)(void *)(p + 512))(0);
        if (got != 20)
            fail("own loop", 20, got, i);
    }
    puts("own loop ok");
}

/* Written through one mapping of the page and run through another. */
static void alias(void)
{
    int f = memfd_create("code", 0);
    if (f < 0 || ftruncate(f, 2 * PAGE))
        fail("memfd", 0, 1, 0);
    uint8_t *w = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    uint8_t *x = mmap(NULL, 2 * PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, f, 0);
    uint8_t *y = mmap(NULL, 2 * PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, f, 0);
    for (long i = 0; i < 5000; i++) {
        int at = i & 1 ? PAGE - 3 : 40;
        put_constant(w + at, (uint32_t)i);
        uint32_t a = ((function)(void *)(x + at))(0), b = ((function)(void *)(y + at))(0);
        if (a != i || b != i)
            fail("alias", (uint64_t)i, a != i ? a : b, i);
        /* By the kernel's hand as well. */
        uint32_t other = (uint32_t)~i;
        if (pwrite(f, &other, 4, at + 1) != 4)
            fail("pwrite", 4, 0, i);
        a = ((function)(void *)(x + at))(0);
        if (a != other)
            fail("alias by write", other, a, i);
    }
    puts("alias ok");
}

/* Another page comes to an address that had code. */
static void remap(void)
{
    uint8_t *p = code_pages(2);
    for (long i = 0; i < 2000; i++) {
        put_constant(p + PAGE - 3, (uint32_t)i);
        uint32_t got = ((function)(void *)(p + PAGE - 3))(0);
        if (got != i)
            fail("across pages", (uint64_t)i, got, i);
        uint8_t *fresh = mmap(p + PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        /* The second half of the constant and the return are other bytes now. */
        fresh[0] = 0x12, fresh[1] = 0x34, fresh[2] = 0xc3;
        uint32_t expected = ((uint32_t)i & 0xffff) | 0x34120000u;
        got = ((function)(void *)(p + PAGE - 3))(0);
        if (got != expected)
            fail("remapped", expected, got, i);
    }
    puts("remap ok");
}

/* Generated, called, thrown away, as a JIT does, with data beside the code. */
static void churn(void)
{
    uint8_t *p = code_pages(16);
    uint64_t sum = 0;
    for (long i = 0; i < 40000; i++) {
        uint8_t *at = p + i * 48 % (16 * PAGE - 64);
        uint32_t k = (uint32_t)i * 2654435761u;
        at[0] = 0x8d, at[1] = 0x87; /* lea k(%rdi),%eax */
        memcpy(at + 2, &k, 4);
        at[6] = 0xc3;
        (*(volatile uint32_t *)(at + 16))++;
        uint32_t got = ((function)(void *)at)((uint32_t)i);
        if (got != k + (uint32_t)i)
            fail("churn", k + (uint32_t)i, got, i);
        sum += got;
    }
    printf("churn ok %llx\n", (unsigned long long)sum);
}

/* Cross-modifying: one thread patches, another runs. */
static uint8_t *shared;
static atomic_long told, heard;
static atomic_int stop;

static void serialize(void)
{
    uint32_t a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

static void *runs(void *unused)
{
    (void)unused;
    uint32_t last = 0;
    while (!atomic_load(&stop)) {
        long before = atomic_load(&told);
        serialize();
        uint32_t got = ((function)(void *)(shared + 64))(0);
        long after = atomic_load(&told);
        /* What was told before is seen; what comes meanwhile may be, but never anything else and never backwards. */
        if (got < (uint32_t)before || got > (uint32_t)after + 1 || got < last)
            fail("cross-modified", (uint64_t)before, got, after);
        last = got;
        atomic_store(&heard, (long)got);
    }
    return NULL;
}

static void cross(void)
{
    shared = code_pages(1);
    put_constant(shared + 64, 0);
    pthread_t t;
    pthread_create(&t, NULL, runs, NULL);
    for (long i = 1; i <= 20000; i++) {
        /* Eight aligned bytes at once. */
        uint64_t text = 0xb8 | (uint64_t)(uint32_t)i << 8 | 0xc3ull << 40;
        atomic_store((_Atomic uint64_t *)(void *)(shared + 64), text);
        atomic_store(&told, i);
        if (i % 100 == 0)
            for (int spin = 0; atomic_load(&heard) < i; spin++)
                if (spin > 1000)
                    usleep(10);
    }
    atomic_store(&stop, 1);
    pthread_join(t, NULL);
    puts("cross-modified ok");
}

/* The way Linux patches its kernel: a breakpoint over the first byte, the rest, the first byte. Here the patched
 * instruction is a jump that goes one of two ways, and the breakpoint is never left standing. */
static void *jumps(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        uint32_t got = ((function)(void *)shared)(0);
        if (got != 1 && got != 2)
            fail("jump", 1, got, 0);
        atomic_fetch_add(&heard, 1);
    }
    return NULL;
}

static void jump_patching(void)
{
    shared = code_pages(1);
    atomic_store(&stop, 0);
    atomic_store(&heard, 0);
    uint64_t to_nop = 0x0000441f0full, to_jump = 0xbe9ull + 0; /* nopl 0(%rax,%rax); jmp .+5+11 */
    memcpy(shared, &to_nop, 8);
    put_constant(shared + 5, 1);
    put_constant(shared + 16, 2);
    /* Both are five bytes; the three after them belong to the constant and are kept. */
    uint64_t rest;
    memcpy(&rest, shared, 8);
    rest &= ~0xffffffffffull;
    pthread_t t;
    pthread_create(&t, NULL, jumps, NULL);
    for (long i = 0; i < 20000; i++) {
        atomic_store((_Atomic uint64_t *)(void *)shared, rest | (i & 1 ? to_nop : to_jump));
        if (i % 500 == 0) {
            long seen = atomic_load(&heard);
            while (atomic_load(&heard) < seen + 2)
                usleep(10);
        }
    }
    atomic_store(&stop, 1);
    pthread_join(t, NULL);
    puts("jump patching ok");
}

/* `modify next` stays at the one part that is most often got wrong. */
int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 0; argc > 1 && !strcmp(argv[1], "next") && i < 20; i++)
        next_instruction();
    if (argc > 1)
        return 0;
    constants();
    next_instruction();
    own_loop();
    alias();
    remap();
    churn();
    cross();
    jump_patching();
    return 0;
}
