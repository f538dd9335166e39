/* Compute workloads. Work is fixed, so that time compares. */
#include "common.h"
#include <immintrin.h>

static void xorshift(void)
{
    uint64_t x = 88172645463325252ull;
    double t = begin();
    for (uint64_t i = 0; i < 200000000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    report(now() - t, x);
}

static int compare(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static void sort_integers(void)
{
    enum { N = 1000000 };
    int *v = check(malloc(N * sizeof *v), "malloc");
    uint64_t seed = 42, sum = 0;
    for (int i = 0; i < N; i++)
        v[i] = (int)next_random(&seed);
    double t = begin();
    qsort(v, N, sizeof *v, compare);
    t = now() - t;
    for (int i = 0; i < N; i++)
        sum = sum * 31 + (uint32_t)v[i];
    report(t, sum);
}

static void crc_table(void)
{
    enum { N = 1 << 20 };
    static uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        table[i] = c;
    }
    uint8_t *data = check(malloc(N), "malloc");
    uint64_t seed = 7;
    for (int i = 0; i < N; i++)
        data[i] = (uint8_t)next_random(&seed);
    double t = begin();
    uint32_t crc = ~0u;
    for (int round = 0; round < 80; round++)
        for (int i = 0; i < N; i++)
            crc = table[(crc ^ data[i]) & 0xff] ^ crc >> 8;
    report(now() - t, ~crc);
}

__attribute__((noinline, noclone, optimize("no-optimize-sibling-calls", "no-inline"))) static uint64_t fib(unsigned n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static void calls(void)
{
    double t = begin();
    uint64_t v = fib(35);
    report(now() - t, v);
}

#define OPERATION(n, expression) \
    __attribute__((noinline)) static uint64_t operation##n(uint64_t x) { return expression; }
OPERATION(0, x + 0x9e3779b97f4a7c15ull)
OPERATION(1, x ^ x >> 29)
OPERATION(2, x * 5 + 1)
OPERATION(3, x << 7 | x >> 57)
OPERATION(4, x - 0x123456789ull)
OPERATION(5, ~x)
OPERATION(6, x ^ x << 11)
OPERATION(7, x + (x >> 5))

static void indirect_calls(void)
{
    uint64_t (*volatile table[8])(uint64_t) = {
        operation0, operation1, operation2, operation3, operation4, operation5, operation6, operation7,
    };
    /* A pattern that a predictor can learn but that is not the same call again and again. */
    static uint8_t order[1024];
    uint64_t seed = 99, x = 1;
    for (int i = 0; i < 1024; i++)
        order[i] = next_random(&seed) & 7;
    double t = begin();
    for (int i = 0; i < 20000000; i++)
        x = table[order[i & 1023]](x);
    report(now() - t, x);
}

static uint64_t bits(double d)
{
    uint64_t v;
    memcpy(&v, &d, sizeof v);
    return v;
}

static void matmul(void)
{
    enum { N = 192 };
    static double a[N][N], b[N][N], c[N][N];
    uint64_t seed = 5;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = (double)(next_random(&seed) & 0xffff) / 256;
            b[i][j] = (double)(next_random(&seed) & 0xffff) / 256;
        }
    double t = begin();
    for (int round = 0; round < 12; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double sum = c[i][j] / 2;
                for (int k = 0; k < N; k++)
                    sum += a[i][k] * b[k][j];
                c[i][j] = sum;
            }
    t = now() - t;
    uint64_t sum = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            sum = sum * 31 + bits(c[i][j]);
    report(t, sum);
}

struct body {
    double x, y, z, vx, vy, vz, mass;
};

/* The Jovian planets with masses and speeds in solar masses and years (the well-known benchmark's data). */
static void n_body(void)
{
    static struct body b[5] = {
        { 0, 0, 0, 0, 0, 0, 39.47841760435743 },
        { 4.84143144246472090, -1.16032004402742839, -0.103622044471123109, 0.606326392995832, 2.81198684491626,
          -0.02521836165988763, 0.03769367487038949 },
        { 8.34336671824457987, 4.12479856412430479, -0.403523417114321381, -1.0107743461787924, 1.8256623712304119,
          0.008415761376584154, 0.011286326131968767 },
        { 12.8943695621391310, -15.1111514016986312, -0.223307578892655734, 1.0827910064415354, 0.8687130181696082,
          -0.010832637401363636, 0.0017237240570597112 },
        { 15.3796971148509165, -25.9193146099879641, 0.179258772950371181, 0.979090732243898, 0.5946989986476762,
          -0.034755955504078104, 0.0020336868699246304 },
    };
    double t = begin();
    for (int step = 0; step < 250000; step++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double dx = b[i].x - b[j].x, dy = b[i].y - b[j].y, dz = b[i].z - b[j].z;
                double d2 = dx * dx + dy * dy + dz * dz;
                double mag = 0.001 / (d2 * _mm_cvtsd_f64(_mm_sqrt_sd(_mm_set_sd(d2), _mm_set_sd(d2))));
                b[i].vx -= dx * b[j].mass * mag;
                b[i].vy -= dy * b[j].mass * mag;
                b[i].vz -= dz * b[j].mass * mag;
                b[j].vx += dx * b[i].mass * mag;
                b[j].vy += dy * b[i].mass * mag;
                b[j].vz += dz * b[i].mass * mag;
            }
        for (int i = 0; i < 5; i++) {
            b[i].x += 0.001 * b[i].vx;
            b[i].y += 0.001 * b[i].vy;
            b[i].z += 0.001 * b[i].vz;
        }
    }
    t = now() - t;
    report(t, bits(b[0].x) ^ bits(b[4].y) ^ bits(b[2].vz));
}

/* Floating point, integer and permute work on 256-bit vectors in the first-level cache. */
__attribute__((target("avx2"))) static void avx2_kernel(void)
{
    enum { N = 4096 };
    if (!__builtin_cpu_supports("avx2")) {
        puts("@skip the CPU has no AVX2");
        return;
    }
    static float f[N] __attribute__((aligned(32)));
    static int32_t n[N] __attribute__((aligned(32)));
    uint64_t seed = 3;
    for (int i = 0; i < N; i++) {
        f[i] = (float)(next_random(&seed) & 0xfff) / 64;
        n[i] = (int32_t)next_random(&seed);
    }
    const __m256i turn = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    __m256 sum = _mm256_setzero_ps();
    __m256i mix = _mm256_setzero_si256();
    double t = begin();
    for (int round = 0; round < 8000; round++) {
        const __m256 scale = _mm256_set1_ps(1.0f + (float)(round & 7) / 16);
        for (int i = 0; i < N; i += 8) {
            __m256 v = _mm256_mul_ps(_mm256_load_ps(f + i), scale);
            sum = _mm256_add_ps(_mm256_mul_ps(sum, _mm256_set1_ps(0.5f)), _mm256_max_ps(v, _mm256_set1_ps(3.0f)));
            __m256i w = _mm256_load_si256((const __m256i *)(n + i));
            w = _mm256_add_epi32(_mm256_mullo_epi32(w, _mm256_set1_epi32(31)), _mm256_slli_epi32(mix, 3));
            mix = _mm256_xor_si256(_mm256_permutevar8x32_epi32(mix, turn), w);
        }
    }
    t = now() - t;
    uint64_t out[4], value = 0;
    _mm256_storeu_si256((__m256i *)out, _mm256_xor_si256(mix, _mm256_castps_si256(sum)));
    for (int i = 0; i < 4; i++)
        value = value * 31 + out[i];
    report(t, value);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    RUN("xorshift", xorshift());
    RUN("qsort", sort_integers());
    RUN("crc", crc_table());
    RUN("fib", calls());
    RUN("indirect", indirect_calls());
    RUN("matmul", matmul());
    RUN("nbody", n_body());
    RUN("avx2", avx2_kernel());
    fprintf(stderr, "no workload %s\n", argv[1]);
    return 2;
}
