/* A guest of 32-bit flat code that counts, hashes and tells time by every clock it has, one line each round. Built as a flat Multiboot
   image. */
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

__asm__(".section .boot,\"a\"\n"
        ".align 4\n"
        ".long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000)\n"
        ".long 0x100000, 0x100000, 0, 0, start\n"
        ".text\n"
        "start: mov $0x180000, %esp\n"
        "call run\n");

static inline void outb(unsigned short port, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline u8 inb(unsigned short port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(unsigned short port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 rdtsc(void) { u64 v; __asm__ volatile("rdtsc" : "=A"(v)); return v; }
static inline void wrmsr(u32 n, u64 v) { __asm__ volatile("wrmsr" ::"c"(n), "A"(v)); }

static void put(char c) { while (!(inb(0x3fd) & 0x20)); outb(0x3f8, c); }
static void text(const char *s) { while (*s) put(*s++); }
static void hex(u64 v, int digits) { while (digits--) put("0123456789abcdef"[(u32)(v >> (4 * digits)) & 15]); }

/* SHA-256 (FIPS 180-4, section 6.2). */
static const u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
static u32 ror(u32 x, int n) { return x >> n | x << (32 - n); }
static void block(u32 *h, const u32 *m) {
    u32 w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = m[i];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3)
             + (ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10);
    for (int i = 0; i < 8; i++) s[i] = h[i];
    for (int i = 0; i < 64; i++) {
        u32 a = s[7] + (ror(s[4], 6) ^ ror(s[4], 11) ^ ror(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
        u32 b = (ror(s[0], 2) ^ ror(s[0], 13) ^ ror(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        for (int j = 7; j > 0; j--) s[j] = s[j - 1];
        s[4] += a;
        s[0] = a + b;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

/* KVM's clock page (Linux Documentation/virt/kvm/x86/msr.rst). */
static volatile struct { u32 version, pad; u64 tsc, system; u32 mul; signed char shift; u8 flags; } clock __attribute__((aligned(64)));
static u64 kvmclock(void) {
    u32 version; u64 t;
    do {
        version = clock.version;
        u64 d = rdtsc() - clock.tsc;
        if (clock.shift < 0) d >>= -clock.shift; else d <<= clock.shift;
        t = clock.system + (((d >> 32) * clock.mul) + (((d & 0xffffffff) * clock.mul) >> 32));
    } while (version & 1 || version != clock.version);
    return t;
}

#define HPET(at) (*(volatile u32 *)(0xfed00000 + (at)))
static u64 hpet(void) {
    u32 high, low;
    do { high = HPET(0xf4); low = HPET(0xf0); } while (high != HPET(0xf4));
    return (u64)high << 32 | low;
}

void run(void) {
    static const u32 H[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    u32 m[16], h[8];
    for (int i = 0; i < 16; i++) m[i] = 0;
    m[8] = 0x80000000;
    m[15] = 256;
    wrmsr(0x4b564d01, (u32)&clock | 1);
    HPET(0x10) = 1;
    text("period ");
    hex(HPET(4), 8);
    text(" end\n");
    for (u32 n = 1;; n++) {
        for (int i = 0; i < 8; i++) h[i] = H[i];
        block(h, m);
        for (int i = 0; i < 8; i++) m[i] = h[i];
        u64 tsc = rdtsc(), kvm = kvmclock(), ticks = hpet();
        u32 pm = inl(0x608);
        text("count "); hex(n, 8);
        put(' '); hex(tsc, 16);
        put(' '); hex(kvm, 16);
        put(' '); hex(ticks, 16);
        put(' '); hex(pm, 8);
        put(' '); for (int i = 0; i < 8; i++) hex(h[i], 8);
        text(" end\n");
    }
}
