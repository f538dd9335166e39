/* Makes the input of the workloads, the same everywhere: text, a C file, a tree of files. */
#include "common.h"
#include <sys/stat.h>

static uint64_t seed = 20240229;

static uint64_t below(uint64_t n)
{
    return next_random(&seed) % n;
}

/* Words whose frequencies fall as in language, in lines of some 60 letters. */
static void text(size_t bytes)
{
    static char words[4096][12];
    for (int i = 0; i < 4096; i++) {
        int n = 2 + (int)below(8);
        for (int k = 0; k < n; k++)
            words[i][k] = (char)("etaoinshrdlucmfw"[below(16)]);
    }
    size_t column = 0;
    for (size_t done = 0; done < bytes;) {
        uint64_t r = below(4096);
        const char *w = words[r * below(4096) / 4096 * below(4096) / 4096];
        size_t n = strlen(w);
        column += n + 1;
        done += n + 1;
        printf("%s%c", w, column > 60 ? '\n' : ' ');
        if (column > 60)
            column = 0;
    }
    putchar('\n');
}

/* Some 5,000 lines of C without headers: structures, branches, loops, calls and floating point. */
static void c_file(void)
{
    puts("typedef unsigned long u64; typedef struct { u64 a, b, c; double d; int n[8]; } thing;");
    for (int f = 0; f < 84; f++) {
        printf("static int state%d;\nu64 f%d(thing *t, u64 x)\n{\n    u64 y = x + %lu;\n    double d = t->d;\n", f, f, below(1000));
        for (int k = 0; k < 8; k++) {
            printf("    t->%c += y * %lu;\n", (char)('a' + below(3)), below(100000));
            printf("    if (t->%c & %lu) {\n        y ^= t->a << %lu;\n", (char)('a' + below(3)), 1ul << below(20), 1 + below(30));
            printf("    } else {\n        d += %lu.5;\n    }\n", below(100));
        }
        printf("    for (int i = 0; i < %lu; i++)\n        t->n[i & 7] += (int)(y >> i);\n", 9 + below(20));
        if (f > 0)
            printf("    y += f%lu(t, y >> %lu);\n", below((uint64_t)f), 4 + below(8));
        printf("    state%d += (int)d;\n    t->d = d / %lu.25;\n    return y ^ t->b ^ (u64)state%d;\n}\n", f, 2 + below(30), f);
    }
}

/* `files` small text files in folders of 50. */
static void tree(const char *root, int files)
{
    char name[256];
    mkdir(root, 0755);
    for (int i = 0; i < files; i++) {
        if (i % 50 == 0) {
            snprintf(name, sizeof name, "%s/part%03d", root, i / 50);
            mkdir(name, 0755);
        }
        snprintf(name, sizeof name, "%s/part%03d/file%02d.c", root, i / 50, i % 50);
        if (!freopen(name, "w", stdout))
            die(name);
        text(1000 + below(7000));
    }
}

/* Lines with few distinct values, for sort and uniq. */
static void lines(int n)
{
    for (int i = 0; i < n; i++)
        printf("user%04lu /path/%02lu/index %lu\n", below(500), below(20), 200 + below(4));
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    RUN("text", text((size_t)atol(argc > 2 ? argv[2] : "0")));
    RUN("c", c_file());
    RUN("tree", tree(argc > 2 ? argv[2] : "tree", atoi(argc > 3 ? argv[3] : "0")));
    RUN("lines", lines(atoi(argc > 2 ? argv[2] : "0")));
    return 2;
}
