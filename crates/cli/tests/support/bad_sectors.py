import ctypes, os, struct, sys
# bad_sectors.py FROM TO COMMAND…: run COMMAND in a world where reads and writes of files by system calls that name a place fail
# with EIO if the place lies in [FROM, TO), as on a disk with bad sectors. Places are below 4 GiB.
first, end = (int(x, 0) for x in sys.argv[1:3])
LD, JEQ, JGE, JMP, RET = 0x20, 0x15, 0x35, 0x05, 0x06
# x86-64: pread64, pwrite64, preadv, pwritev, preadv2, pwritev2. The place is the fourth argument, its lower half at offset 40.
calls = [17, 18, 295, 296, 327, 328]
ins = [(LD, 0, 0, 0)]
for i, n in enumerate(calls):
    ins.append((JEQ, len(calls) - i, 0, n))
ins += [
    (JMP, 0, 0, 5),
    (LD, 0, 0, 44), (JEQ, 0, 3, 0),
    (LD, 0, 0, 40), (JGE, 0, 1, first), (JGE, 0, 1, end),
    (RET, 0, 0, 0x7fff0000),
    (RET, 0, 0, 0x00050000 | 5),
]
code = b"".join(struct.pack("HBBI", *x) for x in ins)
buf = ctypes.create_string_buffer(code)
prog = struct.pack("HxxxxxxP", len(ins), ctypes.addressof(buf))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[3], sys.argv[3:])
