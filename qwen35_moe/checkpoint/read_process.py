"""A process that reads: `ahead.Feed` runs it as a script, since threads of Python would wait for each other.

Asked on stdin for bytes of files that its parent has open, it puts them into a slot of the memory that both share, and
answers for which slot it has read, and whether all bytes were there. It ends when nobody can ask any more.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys

ASK = struct.Struct("2q")  # slot, bytes of tasks that follow
TASK = struct.Struct("4q")  # descriptor, first byte in the file, first byte in the slot, bytes
ANSWER = struct.Struct("2q")  # slot, whether


def main(memory: int, slots: int, size: int, answers: int, parent: int) -> None:
    shared = memoryview(mmap.mmap(memory, slots * size))
    while asked := sys.stdin.buffer.read(ASK.size):
        slot, tasks = ASK.unpack(asked)
        complete = True
        for descriptor, at, begin, left in TASK.iter_unpack(sys.stdin.buffer.read(tasks)):
            begin += slot * size
            try:
                file = os.open(f"/proc/{parent}/fd/{descriptor}", os.O_RDONLY)
                try:
                    while left and (read := os.preadv(file, [shared[begin : begin + left]], at)):
                        at, begin, left = at + read, begin + read, left - read
                finally:
                    os.close(file)
            except OSError:
                pass  # the parent tries again, and says what it met
            complete = complete and not left
        os.write(answers, ANSWER.pack(slot, complete))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
