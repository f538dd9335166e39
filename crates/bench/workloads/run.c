/* Runs rows of the benchmark one after the other and says how long each took:
 *
 *   rfb-begin NAME                         its preparation is over
 *   rfb-stop NAME                          it has its result
 *   rfb-end NAME SECONDS CPU STATUS HASH   wall time and CPU time of the row, exit status, FNV-1a hash of what it printed
 *   rfb-skip NAME REASON
 *   rfb-done
 *
 * A row is a shell script /bench/rows/NAME.sh, with its preparation in NAME.prep if it has any. A row's program may say
 * itself when its preparation is over (a line `@begin`), how long it took (`@time SECONDS`, `@cpu SECONDS`; `@rate SECONDS`
 * for work that it did not do but knows the speed of, whose CPU time is then `-`), or that it cannot run here
 * (`@skip REASON`). Started as the first process of a guest, the rows are those of `rfb.rows=a,b` on the kernel command
 * line, and the guest is switched off afterwards; `rfb.shell` gives a shell instead. Otherwise they are the arguments. */
#include "common.h"
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { LINE = 4096 };

static pid_t start(const char *script, int output)
{
    pid_t child = fork();
    if (child == 0) {
        if (output >= 0)
            dup2(output, 1);
        execl("/bin/sh", "sh", "-eu", script, (char *)NULL);
        _exit(127);
    }
    return child;
}

static void row(const char *name)
{
    char path[300], line[LINE], skip[LINE] = "";
    int status = 0, pipes[2], rate = 0;
    snprintf(path, sizeof path, "/bench/rows/%s.prep", name);
    if (access(path, R_OK) == 0) {
        pid_t child = start(path, open("/dev/null", O_WRONLY | O_CLOEXEC));
        if (child < 0 || waitpid(child, &status, 0) != child || status) {
            printf("rfb-skip %s its preparation failed with status %#x\n", name, (unsigned)status);
            return;
        }
    }
    snprintf(path, sizeof path, "/bench/rows/%s.sh", name);
    if (access(path, R_OK) != 0) {
        printf("rfb-skip %s there is no such row\n", name);
        return;
    }
    if (pipe2(pipes, O_CLOEXEC))
        die("pipe");
    printf("rfb-begin %s\n", name);
    double started = now(), cpu_started = cpu(), inner = -1, inner_cpu = -1;
    pid_t child = start(path, pipes[1]);
    close(pipes[1]);
    FILE *out = check(fdopen(pipes[0], "r"), "fdopen");
    uint64_t hash = 0xcbf29ce484222325ull;
    while (fgets(line, sizeof line, out)) {
        if (!strncmp(line, "@begin", 6))
            printf("rfb-begin %s\n", name);
        else if (!strncmp(line, "@time ", 6)) {
            inner = strtod(line + 6, NULL);
            printf("rfb-stop %s\n", name);
        } else if (!strncmp(line, "@cpu ", 5))
            inner_cpu = strtod(line + 5, NULL);
        else if (!strncmp(line, "@rate ", 6)) {
            inner = strtod(line + 6, NULL);
            rate = 1;
        } else if (!strncmp(line, "@skip ", 6))
            strcpy(skip, line + 6);
        else
            for (const char *c = line; *c; c++)
                hash = (hash ^ (uint8_t)*c) * 0x100000001b3ull;
    }
    fclose(out);
    if (child < 0 || waitpid(child, &status, 0) != child)
        status = -1;
    double seconds = now() - started, used = cpu() - cpu_started;
    if (inner < 0 || rate)
        printf("rfb-stop %s\n", name);
    if (*skip)
        printf("rfb-skip %s %s", name, skip);
    else if (rate)
        printf("rfb-end %s %.6f - %#x %016llx\n", name, inner, (unsigned)status, (unsigned long long)hash);
    else
        printf("rfb-end %s %.6f %.6f %#x %016llx\n", name, inner >= 0 ? inner : seconds,
               inner_cpu >= 0 ? inner_cpu : used, (unsigned)status, (unsigned long long)hash);
}

static void rows(char *list)
{
    for (char *name = strtok(list, ", \n"); name; name = strtok(NULL, ", \n"))
        row(name);
    puts("rfb-done");
}

static void first_process(void)
{
    static char words[LINE];
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755), mkdir("/tmp", 01777);
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("sys", "/sys", "sysfs", 0, NULL)
        || mount("dev", "/dev", "devtmpfs", 0, NULL) || mount("tmp", "/tmp", "tmpfs", 0, NULL))
        die("mount");
    /* The console as the kernel gave it to us is of the time before /dev was there: the same device. */
    symlink("/proc/self/fd", "/dev/fd");
    int f = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = read(f, words, sizeof words - 1);
    words[n > 0 ? n : 0] = 0;
    close(f);
    if (chdir("/tmp"))
        die("/tmp");
    if (strstr(words, "rfb.shell")) {
        pid_t child = fork();
        if (child == 0) {
            execl("/bin/sh", "sh", "-c", "exec setsid -c sh <>/dev/ttyS0 >&0 2>&1", (char *)NULL);
            _exit(127);
        }
        waitpid(child, NULL, 0);
    }
    char *list = strstr(words, "rfb.rows=");
    if (list) {
        list += strlen("rfb.rows=");
        list[strcspn(list, " \n")] = 0;
        rows(list);
    }
    sync();
    reboot(RB_POWER_OFF);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, LINE);
    setenv("PATH", "/bench:/usr/bin:/usr/sbin:/bin:/sbin", 1);
    setenv("HOME", "/tmp", 1);
    setenv("LC_ALL", "C.UTF-8", 1);
    umask(022);
    if (getpid() == 1) {
        first_process();
        return 1;
    }
    if (chdir("/tmp"))
        die("/tmp");
    for (int i = 1; i < argc; i++)
        row(argv[i]);
    puts("rfb-done");
    return 0;
}
