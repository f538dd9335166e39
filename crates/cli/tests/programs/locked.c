/* Locked operations of two threads on the same bytes, within a line, across two lines and across two pages: no
 * update is lost. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROUNDS = 20000, KINDS = 9 };

static uint8_t *memory;
static int kind;
static uint8_t *at;
static volatile int ready;

static void operate(int which)
{
    for (int i = 0; i < ROUNDS; i++)
        switch (kind) {
        case 0: __asm__ volatile("lock addq $1,%0" : "+m"(*(uint64_t *)(void *)at)); break;
        case 1: __asm__ volatile("lock incl %0" : "+m"(*(uint32_t *)(void *)at)); break;
        case 2: {
            uint64_t one = 1;
            __asm__ volatile("lock xaddq %0,%1" : "+r"(one), "+m"(*(uint64_t *)(void *)at));
            break;
        }
        case 3: {
            uint64_t old = *(volatile uint64_t *)(void *)at;
            uint8_t done;
            do {
                uint64_t new = old + 1;
                __asm__ volatile("lock cmpxchgq %3,%0; sete %2"
                                 : "+m"(*(uint64_t *)(void *)at), "+a"(old), "=q"(done) : "r"(new) : "cc");
            } while (!done);
            break;
        }
        case 4: {
            uint32_t a = 0, d = 0;
            uint8_t done;
            do
                __asm__ volatile("mov %%eax,%%ebx; add $1,%%ebx; mov %%edx,%%ecx; adc $0,%%ecx; lock cmpxchg8b %0; sete %3"
                                 : "+m"(*(uint64_t *)(void *)at), "+a"(a), "+d"(d), "=q"(done) : : "ebx", "ecx", "cc");
            while (!done);
            break;
        }
        case 5: __asm__ volatile("lock subw $-1,%0" : "+m"(*(uint16_t *)(void *)at)); break;
        case 6: { /* A lock of one bit around a plain sum. */
            uint8_t held;
            do
                __asm__ volatile("lock btsl $0,%0; setc %1" : "+m"(*(uint32_t *)(void *)at), "=q"(held) : : "memory", "cc");
            while (held && !sched_yield());
            ++*(volatile uint64_t *)(void *)(memory + 256);
            __asm__ volatile("lock btrl $0,%0" : "+m"(*(uint32_t *)(void *)at) : : "memory", "cc");
            break;
        }
        case 7: { /* The same by an exchange, which locks without saying so. */
            uint32_t held;
            do {
                held = 1;
                __asm__ volatile("xchgl %0,%1" : "+r"(held), "+m"(*(uint32_t *)(void *)at) : : "memory");
            } while (held && !sched_yield());
            ++*(volatile uint64_t *)(void *)(memory + 256);
            __asm__ volatile("movl $0,%0" : "=m"(*(uint32_t *)(void *)at) : : "memory");
            break;
        }
        case 8: { /* Sixteen bytes; only aligned ones can be. */
            uint64_t a = 0, d = 0;
            uint8_t done;
            do
                __asm__ volatile("mov %%rax,%%rbx; add $1,%%rbx; mov %%rdx,%%rcx; adc $3,%%rcx; lock cmpxchg16b %0; sete %3"
                                 : "+m"(*(__int128 *)(void *)at), "+a"(a), "+d"(d), "=q"(done) : : "rbx", "rcx", "cc");
            while (!done);
            break;
        }
        }
    (void)which;
}

static void *other(void *unused)
{
    (void)unused;
    ready = 1;
    operate(1);
    return NULL;
}

int main(void)
{
    static const struct {
        const char *name;
        int offset;
    } places[] = { { "aligned", 64 }, { "unaligned", 67 }, { "across lines", 126 }, { "across lines by one", 127 },
                   { "across pages", 4094 }, { "across pages by one", 4095 } };
    setvbuf(stdout, NULL, _IOLBF, 0);
    memory = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned p = 0; p < sizeof places / sizeof *places; p++)
        for (kind = 0; kind < KINDS; kind++) {
            if (kind == 8 && places[p].offset % 16)
                continue;
            /* An exchange that is split is given back by a plain store, which other CPUs may see in two halves. */
            if (kind == 7 && places[p].offset % 64 > 60)
                continue;
            memset(memory, 0, 3 * 4096);
            at = memory + places[p].offset;
            pthread_t t;
            ready = 0;
            pthread_create(&t, NULL, other, NULL);
            while (!ready)
                sched_yield();
            operate(0);
            pthread_join(t, NULL);
            uint64_t got, high = 0, expected = 2 * ROUNDS;
            memcpy(&got, kind == 6 || kind == 7 ? memory + 256 : at, 8);
            if (kind == 8)
                memcpy(&high, at + 8, 8), got += high, expected *= 4;
            if (kind == 5)
                got &= 0xffff;
            if (got != expected) {
                printf("FAIL operation %d %s: expected %llu, got %llu\n", kind, places[p].name,
                       (unsigned long long)expected, (unsigned long long)got);
                return 1;
            }
        }
    puts("locked ok");
    return 0;
}
