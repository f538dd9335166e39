/* A 32-bit program without a library: system calls by int 0x80, instructions that 64-bit mode has not, a segment of its own,
 * and the way into 64-bit code and back. Prints a hash of each part. */
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

static int call(int n, u32 a, u32 b, u32 c)
{
    int r;
    __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
    return r;
}

static void say(const char *text)
{
    u32 n = 0;
    while (text[n])
        n++;
    call(4, 1, (u32)text, n);
}

static void tell(const char *name, u32 value)
{
    char text[9];
    for (int i = 0; i < 8; i++)
        text[i] = "0123456789abcdef"[value >> (28 - 4 * i) & 15];
    text[8] = 0;
    say(name), say(" "), say(text), say("\n");
}

static u32 hash;

static void mix(u32 v)
{
    hash = (hash ^ v) * 16777619u;
}

#define DECIMAL(op, mask)                                                                                            \
    for (u32 al = 0; al < 256; al++)                                                                                 \
        for (u32 f = 0; f < 4; f++) {                                                                                \
            u32 a = al | 0x1200, flags = (f & 1) | (f & 2) << 3;                                                     \
            __asm__ volatile("pushfl; andl $~0x11,(%%esp); orl %1,(%%esp); popfl; " op "; pushfl; popl %1"           \
                             : "+a"(a), "+r"(flags) : : "cc");                                                       \
            mix(a), mix(flags & mask);                                                                               \
        }

static void decimals(void)
{
    DECIMAL("daa", 0xd5)
    DECIMAL("das", 0xd5)
    DECIMAL("aaa", 0x11)
    DECIMAL("aas", 0x11)
    DECIMAL("aam", 0xc4)
    DECIMAL("aad", 0xc4)
    tell("decimal", hash);
}

static void stack(void)
{
    u32 a, b, c;
    __asm__ volatile("mov $0x11,%%ecx; mov $0x22,%%edx; pushal; mov 24(%%esp),%0; addl $5,20(%%esp); popal; mov %%ecx,%1; mov %%edx,%2"
                     : "=&a"(a), "=&S"(b), "=&D"(c) : : "ecx", "edx", "memory");
    mix(b), mix(c);
    __asm__ volatile("pushw $0x1234; pushw $0x5678; popl %0" : "=r"(a));
    mix(a);
    __asm__ volatile("push %%ds; popl %0; push %%cs; popl %1" : "=r"(b), "=r"(c));
    mix(b & 0xffff), mix(c & 0xffff);
    tell("stack", hash);
}

/* Addresses wrap at 4 GiB; 16-bit addressing wraps at 64 KiB. */
static void addresses(void)
{
    static u32 value = 0x12345678;
    u32 a, big = 0x80000000u, p = (u32)&value;
    __asm__ volatile("mov (%1,%2,1),%0" : "=r"(a) : "r"(p - 0x80000000u), "r"(big));
    mix(a);
    __asm__ volatile("mov $0xffff,%%ebx; mov $2,%%esi; addr16 lea (%%bx,%%si),%0" : "=r"(a) : : "ebx", "esi");
    mix(a);
    u8 small = 0x7f;
    __asm__ volatile("addb $1,%0; seto %b1" : "+r"(small), "=q"(a));
    mix(small), mix(a & 1);
    tell("addresses", hash);
}

static void arithmetic(void)
{
    u32 x = 1;
    for (int i = 0; i < 100000; i++) {
        x ^= x << 13, x ^= x >> 17, x ^= x << 5;
        u64 wide = (u64)x * (x | 3);
        u32 low = (u32)wide, high = (u32)(wide >> 32), q, r;
        __asm__ volatile("divl %4" : "=a"(q), "=d"(r) : "a"(low), "d"(high % (x | 0x80000000u)), "r"(x | 0x80000000u));
        __asm__ volatile("rcl $7,%0; shld %%cl,%1,%0; bswap %0" : "+r"(q) : "r"(r), "c"(i & 31));
        mix(q), mix(r);
    }
    double d = 1;
    for (int i = 1; i < 2000; i++)
        d += 1.0 / i / d;
    union { double d; u32 u[2]; } bits = { d };
    mix(bits.u[0]), mix(bits.u[1]);
    tell("arithmetic", hash);
}

/* A segment with a base and a limit, as a C library has for its threads: set_thread_area(2). */
static void segment(void)
{
    static u8 area[64] = { 9, 8, 7, 6, 5, 4, 3, 2, 1 };
    struct { u32 entry, base, limit, flags; } d = { ~0u, (u32)area, 31, 1 | 0x40 };
    mix((u32)call(243, (u32)&d, 0, 0));
    u32 a, b, selector = d.entry << 3 | 3;
    __asm__ volatile("mov %w2,%%gs; mov %%gs:4,%0; lsl %w2,%1" : "=&r"(a), "=&r"(b) : "r"(selector));
    mix(a), mix(b);
    __asm__ volatile("movl $0xabcdef,%%gs:8; incl %%gs:8; mov %%gs:8,%0" : "=r"(a) : : "memory");
    mix(a), mix(area[8]);
    /* A signal for the access past its end: SIGSEGV by rt_sigaction would need a frame; the child dies of it. */
    int child = call(2, 0, 0, 0), status = 0;
    if (child == 0) {
        __asm__ volatile("mov %%gs:29,%0" : "=r"(a)); /* four bytes from 29 end past 31 */
        call(1, 0, 0, 0);
    }
    call(7, (u32)child, (u32)&status, 0);
    mix((u32)status & 0x7f);
    tell("segment", hash);
}

/* Bounds, overflow and string instructions. */
static void odd(void)
{
    int child, status = 0, limits[2] = { 3, 10 };
    u32 a;
    __asm__ volatile("bound %1,%0" : : "m"(limits), "r"(7));
    child = call(2, 0, 0, 0);
    if (child == 0) {
        __asm__ volatile("bound %1,%0" : : "m"(limits), "r"(11));
        call(1, 0, 0, 0);
    }
    call(7, (u32)child, (u32)&status, 0);
    mix((u32)status & 0x7f);
    child = call(2, 0, 0, 0);
    if (child == 0) {
        __asm__ volatile("mov $0x7fffffff,%%eax; inc %%eax; into" : : : "eax");
        call(1, 0, 0, 0);
    }
    call(7, (u32)child, (u32)&status, 0);
    mix((u32)status & 0x7f);
    __asm__ volatile("stc; .byte 0xd6" : "=a"(a)); /* salc */
    mix(a & 0xff);
    __asm__ volatile("mov $0x8001,%%eax; sahf; lahf" : "=a"(a));
    mix(a);
    tell("odd", hash);
}

/* Into 64-bit code by a far call to the kernel's selector, and back. */
static void sixty_four(void)
{
    u32 low, high;
    __asm__ volatile("lcall $0x33,$1f; jmp 2f\n"
                     "1: .byte 0x48,0xb8; .quad 0x1122334455667788\n" /* mov $imm64,%rax */
                     ".byte 0x48,0xc1,0xc0,0x0c\n"                    /* rol $12,%rax */
                     ".byte 0x48,0x89,0xc2\n"                         /* mov %rax,%rdx */
                     ".byte 0x48,0xc1,0xea,0x20\n"                    /* shr $32,%rdx */
                     ".byte 0xcb\n"                                   /* lret */
                     "2:" : "=a"(low), "=d"(high) : : "memory");
    mix(low), mix(high);
    tell("64-bit", hash);
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
    decimals();
    stack();
    addresses();
    arithmetic();
    segment();
    odd();
    sixty_four();
    call(1, 0, 0, 0);
}
