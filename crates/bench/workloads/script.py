# Dictionaries, strings and big integers.
import hashlib
import re


def words(n):
    x = 12345
    for _ in range(n):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
        yield "w%d" % (x >> 16 & 0xFFF)


def count(n):
    counts = {}
    for w in words(n):
        counts[w] = counts.get(w, 0) + 1
    return sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:10]


def strings(n):
    lines = ["%06d: %s" % (i, "-".join(words(i % 7))) for i in range(n)]
    text = "\n".join(lines).replace("w1", "v1").upper()
    return len(re.findall(r"V1\d+-W2\d*", text)), hashlib.md5(text.encode()).hexdigest()


def big(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return hashlib.md5(str(a * b % 10**200).encode()).hexdigest()


class Shape:
    def __init__(self, w, h):
        self.w, self.h = w, h

    def area(self):
        return self.w * self.h


def objects(n):
    return sum(Shape(i & 15, i >> 4).area() for i in range(n))


print(count(60000), strings(8000), big(12000), objects(60000), sum(x * x for x in range(100000)))
