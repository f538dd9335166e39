/* Runs short pieces of machine code with every register set, where their memory operands, their stack and they
 * themselves end at pages that cannot be used, and prints a hash of all that they leave behind: signal, its code and address,
 * RIP, registers, flags, x87 and SSE state, memory. On the host and in a guest these are the same.
 *
 * `snippets` prints a line for each piece, `snippets NAME` each of its runs in full. */
#define _GNU_SOURCE
#include "snippets.h"
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define PAGE 4096
/* Far from what a process has; each area is three pages, of which the middle ones can lose their rights. */
#define CODE ((uint8_t *)0x10000000)
#define DATA ((uint8_t *)0x20000000)
#define STACK ((uint8_t *)0x30000000)

#define X(name, flags, text)                                                                  \
    __asm__(".pushsection .rodata\nbegin_" #name ":\n" text "\nint3\nend_" #name ":\n.popsection"); \
    extern const uint8_t begin_##name[], end_##name[];
SNIPPETS(X)
#undef X

static const struct snippet {
    const char *name;
    uint64_t flags; /* that the manual defines after it */
    const uint8_t *begin, *end;
} snippets[] = {
#define X(name, flags, text) { #name, flags, begin_##name, end_##name },
    SNIPPETS(X)
#undef X
};

enum { IDLE, RUNNING, STEPPING };

static volatile int state;
static ucontext_t home;
static struct _libc_fpstate home_fp;
static gregset_t start;
static struct {
    int signal, code, steps;
    uint64_t address, path;
    gregset_t regs;
    struct _libc_fpstate fp;
} result;

static uint64_t hash(uint64_t h, const void *data, size_t n)
{
    for (const uint8_t *p = data; n--; p++)
        h = (h ^ *p) * 0x100000001b3ull;
    return h;
}

/* Of whole words, for much of it. */
static uint64_t hash_words(uint64_t h, const void *data, size_t n)
{
    for (const uint64_t *p = data; n; n -= 8, p++)
        h = (h ^ *p) * 0x100000001b3ull + (h >> 47);
    return h;
}

/* A state that is the same on every CPU: x87 empty, all exceptions masked, patterns in the SSE registers. */
static void fresh_fp(struct _libc_fpstate *fp)
{
    fp->cwd = 0x37f;
    fp->swd = fp->ftw = fp->fop = 0;
    fp->rip = fp->rdp = 0;
    fp->mxcsr = 0x1f80;
    memset(fp->_st, 0, sizeof fp->_st);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 4; k++)
            fp->_xmm[i].element[k] = 0x3f800000u + (uint32_t)(i * 0x51111 + k * 0x70707);
}

static void handler(int signal, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    greg_t *regs = uc->uc_mcontext.gregs;
    if (state == IDLE) {
        home = *uc;
        home_fp = *uc->uc_mcontext.fpregs;
        /* What is not a register of the piece's stays: segments, and what the kernel tells of the fault. */
        start[REG_CSGSFS] = regs[REG_CSGSFS];
        memcpy(regs, start, sizeof(greg_t) * (REG_CSGSFS + 1));
        fresh_fp(uc->uc_mcontext.fpregs);
        state = start[REG_EFL] & 0x100 ? STEPPING : RUNNING;
        return;
    }
    if (state == STEPPING && signal == SIGTRAP && info->si_code == TRAP_TRACE && result.steps < 200) {
        /* The end of the piece is a breakpoint of its own; here its path is kept. */
        result.path = hash(result.path, &regs[REG_RIP], 8);
        result.steps++;
        return;
    }
    result.signal = signal;
    result.code = info->si_code;
    result.address = signal == SIGSEGV || signal == SIGBUS || signal == SIGFPE || signal == SIGILL
                         ? (uint64_t)info->si_addr : 0;
    memcpy(result.regs, regs, sizeof result.regs);
    result.fp = *uc->uc_mcontext.fpregs;
    memcpy(regs, home.uc_mcontext.gregs, sizeof(gregset_t));
    *uc->uc_mcontext.fpregs = home_fp;
    state = IDLE;
}

/* The areas lie in one file, mapped a second time for writing whatever the rights of the first. */
static uint8_t *writable;
static int rights_now[9];

static uint8_t *const areas[] = { CODE, DATA, STACK };

static void map(void)
{
    int f = memfd_create("areas", 0);
    if (f < 0 || ftruncate(f, 9 * PAGE)) {
        perror("memfd");
        exit(1);
    }
    writable = mmap(NULL, 9 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    for (int i = 0; i < 3; i++)
        if (mmap(areas[i], 3 * PAGE, PROT_NONE, MAP_SHARED | MAP_FIXED_NOREPLACE, f, i * 3 * PAGE) != areas[i]) {
            perror("mmap");
            exit(1);
        }
}

static void protect(int area, int page, int rights)
{
    int *now = &rights_now[area * 3 + page];
    if (*now != rights && mprotect(areas[area] + page * PAGE, PAGE, rights)) {
        perror("mprotect");
        exit(1);
    }
    *now = rights;
}

struct run {
    unsigned code_before; /* bytes of code before the end of its first page, 0: all of it */
    unsigned data_before; /* bytes of data before the end of the first data page */
    int first, second;    /* rights of the data pages */
    int code_second;      /* rights of the second code page */
    unsigned stack;       /* bytes of stack above the start of its middle page */
    int stack_below;      /* rights of the page below */
    int step;
};

static uint64_t run(const struct snippet *s, const struct run *r, int verbose)
{
    size_t length = (size_t)(s->end - s->begin);
    uint8_t *code = CODE + (r->code_before ? PAGE - r->code_before : 64);
    uint8_t *const code_bytes = writable, *const data_bytes = writable + 3 * PAGE, *const stack_bytes = writable + 6 * PAGE;
    memset(code_bytes, 0xcc, 2 * PAGE);
    memcpy(code_bytes + (code - CODE), s->begin, length);
    for (int i = 0; i < 2 * PAGE; i++) {
        data_bytes[i] = (uint8_t)(i * 37 + (i >> 6) + 1);
        stack_bytes[i] = (uint8_t)(i * 11 + 5);
    }
    protect(0, 0, PROT_READ | PROT_EXEC);
    protect(0, 1, r->code_second);
    protect(1, 0, r->first);
    protect(1, 1, r->second);
    protect(2, 0, r->stack_below);
    protect(2, 1, PROT_READ | PROT_WRITE);
    uint8_t *data = DATA + PAGE - r->data_before;
    memset(start, 0, sizeof start);
    for (int i = REG_R8; i <= REG_R15; i++)
        start[i] = (greg_t)(0x1111111111111111ull * (unsigned)(i + 1));
    start[REG_RAX] = 0x0123456789abcdef;
    start[REG_RBX] = 0x00000000fedcba98;
    start[REG_RCX] = 5;
    start[REG_RDX] = 0x7fffffff80000001;
    start[REG_RBP] = (greg_t)(uintptr_t)(STACK + PAGE + r->stack + 32);
    start[REG_RSP] = (greg_t)(uintptr_t)(STACK + PAGE + r->stack);
    start[REG_RDI] = (greg_t)(uintptr_t)data;
    start[REG_RSI] = (greg_t)(uintptr_t)(DATA + 256);
    start[REG_RIP] = (greg_t)(uintptr_t)code;
    start[REG_EFL] = 0x202 | (r->step ? 0x100 : 0);
    memset(&result, 0, sizeof result);
    state = IDLE;
    __asm__ volatile("int3" : : : "memory");
    uint64_t h = 0xcbf29ce484222325ull, memory = hash_words(hash_words(h, data_bytes, 2 * PAGE), stack_bytes, 2 * PAGE), fp = h;
    /* RF is seen in faults; TF, IF and the fixed bit as well. */
    uint64_t flags = (uint64_t)result.regs[REG_EFL] & ((s->flags & 0xffff) | 0x10700), regs = h;
    regs = hash(regs, result.regs, sizeof(greg_t) * (REG_RSP + 1));
    fp = hash(fp, &result.fp.cwd, 6); /* control, status, tags */
    fp = hash(fp, &result.fp.mxcsr, 4);
    for (int i = 0; i < 8; i++)
        fp = hash(fp, &result.fp._st[i], 10);
    fp = hash(fp, result.fp._xmm, sizeof result.fp._xmm);
    if (s->flags & WIDE)
        result.address &= ~(uint64_t)(PAGE - 1);
    if (s->flags & FRAME && result.address)
        memory = 0;
    if (s->flags & REPEATED)
        flags &= result.signal == SIGTRAP ? ~0x10000ull : ~0x8d5ull;
    if (s->flags & STOPS)
        result.steps = 0, result.path = 0;
    uint64_t all[] = { (uint64_t)result.signal, (uint64_t)result.code, result.address, (uint64_t)result.regs[REG_RIP],
                       regs, flags, fp, memory, (uint64_t)result.steps, result.path };
    if (verbose) {
        printf("code@%u data@%u,%d,%d stack@%u,%d step%d: signal %d code %d address %llx rip %llx flags %llx", r->code_before,
               r->data_before, r->first, r->second, r->stack, r->stack_below, r->step, result.signal, result.code,
               (unsigned long long)result.address, (unsigned long long)(result.regs[REG_RIP] - (greg_t)(uintptr_t)code),
               (unsigned long long)flags);
        static const char *const names[] = { "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx",
                                             "rdx", "rax", "rcx", "rsp" };
        for (int i = 0; i <= REG_RSP; i++)
            if (result.regs[i] != start[i])
                printf(" %s=%llx", names[i], (unsigned long long)result.regs[i]);
        printf(" fcw %x fsw %x ftw %x mxcsr %x fp %llx memory %llx steps %d path %llx\n", result.fp.cwd, result.fp.swd,
               result.fp.ftw, result.fp.mxcsr, (unsigned long long)fp, (unsigned long long)memory, result.steps,
               (unsigned long long)result.path);
    }
    return hash(h, all, sizeof all);
}

static uint64_t all_runs(const struct snippet *s, int verbose)
{
    static const unsigned before[] = { 0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 64, 513 };
    const int rw = PROT_READ | PROT_WRITE, rx = PROT_READ | PROT_EXEC;
    uint64_t h = 0xcbf29ce484222325ull, one;
#define DO(...) one = run(s, &(struct run){ __VA_ARGS__ }, verbose), h = hash(h, &one, 8)
    for (unsigned i = 0; i < sizeof before / sizeof *before; i++) {
        DO(0, before[i], rw, PROT_NONE, rx, 512, rw, 0);
        DO(0, before[i], rw, PROT_READ, rx, 512, rw, 0);
        if (i % 4 == 0) {
            DO(0, before[i], PROT_READ, rw, rx, 512, rw, 0);
            DO(0, before[i], rw, rw, rx, 512, rw, 0);
            DO(0, before[i], rw, PROT_NONE, rx, 512, rw, 1);
        }
    }
    for (unsigned stack = 0; stack <= 24; stack += 6) {
        DO(0, 1024, rw, rw, rx, stack, PROT_NONE, 0);
        DO(0, 1024, rw, rw, rx, stack, PROT_READ, 0);
    }
    for (unsigned n = 1; n <= (unsigned)(s->end - s->begin) && n < 24; n++) {
        DO(n, 1024, rw, rw, PROT_NONE, 512, rw, 0);
        DO(n, 1024, rw, rw, PROT_READ, 512, rw, 0);
        DO(n, 1024, rw, rw, rx, 512, rw, n & 1);
    }
    DO(0, 1024, rw, rw, rx, 512, rw, 1);
    return h;
}

int main(int argc, char **argv)
{
    static uint8_t other[65536];
    stack_t alternate = { .ss_sp = other, .ss_size = sizeof other };
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    sigaltstack(&alternate, NULL);
    static const int signals[] = { SIGSEGV, SIGBUS, SIGTRAP, SIGFPE, SIGILL };
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++)
        sigaction(signals[i], &action, NULL);
    map();
    for (unsigned i = 0; i < sizeof snippets / sizeof *snippets; i++) {
        if (argc > 1 && strcmp(argv[1], snippets[i].name))
            continue;
        uint64_t h = all_runs(&snippets[i], argc > 1);
        printf("%s %016llx\n", snippets[i].name, (unsigned long long)h);
    }
    return 0;
}
