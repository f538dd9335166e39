import ctypes, errno, os, signal, struct, sys
# bad_disk.py FOLDER MENDED COMMAND…: run COMMAND, in a mount namespace of which we are root, with a file system in FOLDER (fuse(4),
# <linux/fuse.h>) in which every name is a file of 16 MiB. Reads and writes from 9 to 10 MiB fail with EIO, writes from 11
# to 12 MiB with ENOSPC, unless the file MENDED is there. All ways to read and write meet it, io_uring's too.
folder, mended = sys.argv[1:3]
MIB = 1 << 20
SIZE = 16 * MIB
libc = ctypes.CDLL(None, use_errno=True)
dev = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={dev},rootmode=40000,user_id=0,group_id=0".encode()
assert libc.mount(b"bad", folder.encode(), b"fuse", 6, options) == 0, os.strerror(ctypes.get_errno())
parent = os.getpid()
if os.fork() != 0:
    os.close(dev)
    os.execvp(sys.argv[3], sys.argv[3:])
# The server goes when the command does.
assert libc.prctl(1, signal.SIGKILL, 0, 0, 0) == 0
if os.getppid() != parent:
    sys.exit()
null = os.open(os.devnull, os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)

names, files = {}, {}

def attributes(node):
    mode, size = (0o40755, 0) if node == 1 else (0o100644, SIZE)
    return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

def trouble(write, at, size):
    touches = lambda a, b: at < b * MIB and a * MIB < at + size
    if os.path.exists(mended):
        return 0
    return errno.EIO if touches(9, 10) else errno.ENOSPC if write and touches(11, 12) else 0

def serve(op, node, body):
    """The error and the answer; None where none is wanted."""
    if op in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET
        return None
    if op == 26:  # INIT
        return 0, struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 16, 12, 128 << 10, 1, 0, 0, *[0] * 8)
    if op == 1:  # LOOKUP
        n = names.setdefault(body.split(b"\0")[0], len(names) + 2)
        files.setdefault(n, bytearray(SIZE))
        return 0, struct.pack("<4Q2I", n, 0, 1, 1, 0, 0) + attributes(n)
    if op in (3, 4):  # GETATTR, SETATTR
        return 0, struct.pack("<Q2I", 1, 0, 0) + attributes(node)
    if op in (14, 27):  # OPEN, OPENDIR; the kernel keeps nothing of a file
        return 0, struct.pack("<Q2I", 0, 1, 0)
    if op in (15, 16):  # READ, WRITE
        at, size = struct.unpack_from("<QI", body, 8)
        failed = trouble(op == 16, at, size)
        if failed:
            return failed, b""
        if op == 15:
            return 0, bytes(files[node][at : at + size])
        files[node][at : at + size] = body[40 : 40 + size]
        return 0, struct.pack("<2I", size, 0)
    if op == 17:  # STATFS
        return 0, struct.pack("<5Q10I", 1 << 20, 1 << 19, 1 << 19, 99, 99, 4096, 255, 4096, *[0] * 7)
    if op in (18, 20, 25, 29, 34):  # RELEASE, FSYNC, FLUSH, RELEASEDIR, ACCESS
        return 0, b""
    return errno.ENOSYS, b""

while True:
    request = os.read(dev, 256 << 10)
    _, op, unique, node = struct.unpack_from("<IIQQ", request)
    answer = serve(op, node, request[40:])
    if answer is not None:
        os.write(dev, struct.pack("<IiQ", 16 + len(answer[1]), -answer[0], unique) + answer[1])
