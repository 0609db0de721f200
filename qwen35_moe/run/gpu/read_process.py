"""A process that reads: `read_pool.ReadPool` runs it as a script, since threads of Python would wait for each other.

Asked on stdin for bytes of files that its parent has open, it puts them into a slot of the memory that both share: of a
slot, each of the processes fills its part. It answers for which slot it has read, and whether all bytes were there,
and ends when nobody can ask any more.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

ASK = struct.Struct("2q")  # slot, bytes of tasks that follow
TASK = struct.Struct("4q")  # descriptor, first byte in the file, first byte in the slot, bytes
ANSWER = struct.Struct("2q")  # slot, whether


def main(memory: int, slots: int, size: int, which: int, processes: int, answers: int, parent: int) -> None:
    shared = memoryview(mmap.mmap(memory, slots * size))
    own = range(which * size // processes, (which + 1) * size // processes)
    while asked := sys.stdin.buffer.read(ASK.size):
        slot, tasks = ASK.unpack(asked)
        complete = True
        for descriptor, at, begin, count in TASK.iter_unpack(sys.stdin.buffer.read(tasks)):
            first, end = max(begin, own.start), min(begin + count, own.stop)
            if first < end:
                into = shared[slot * size + first : slot * size + end]
                complete &= read(into, parent, descriptor, at + first - begin)
        os.write(answers, ANSWER.pack(slot, complete))


def read(into: memoryview, parent: int, descriptor: int, at: int) -> bool:
    """Whether all bytes were there."""
    try:
        file = os.open(f"/proc/{parent}/fd/{descriptor}", os.O_RDONLY)
        try:
            while into and (count := os.preadv(file, [into], at)):
                into, at = into[count:], at + count
        finally:
            os.close(file)
    except OSError:
        pass  # the parent tries again, and says what it met
    return not into


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
