import ctypes, os, struct, sys
# refuse.py REQUEST ARGUMENT ERRNO COMMAND…: run COMMAND in a world where ioctl(…, REQUEST, ARGUMENT) fails with ERRNO (0: gives 0);
# ARGUMENT -1 is any.
request, argument, errno = (int(x, 0) for x in sys.argv[1:4])
BPF_LD, BPF_JEQ, BPF_RET = 0x20, 0x15, 0x06
allow, refuse = 0x7fff0000, 0x00050000 | errno
ins = []
def load(off): ins.append((BPF_LD, 0, 0, off))
tests = [(0, 16), (24, request)] + ([] if argument < 0 else [(32, argument)])
n = len(tests)
for i, (off, value) in enumerate(tests):
    load(off)
    left = 2 * (n - i - 1)
    ins.append((BPF_JEQ, 0, left + 1, value))
ins += [(BPF_RET, 0, 0, refuse), (BPF_RET, 0, 0, allow)]
code = b"".join(struct.pack("HBBI", *x) for x in ins)
buf = ctypes.create_string_buffer(code)
prog = struct.pack("HxxxxxxP", len(ins), ctypes.addressof(buf))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[4], sys.argv[4:])
