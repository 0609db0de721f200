"""A process that reads: `ahead.Feed` runs it as a script, since threads of Python would wait for each other.

Asked on stdin for bytes of a file that its parent has open, it puts them into the memory that both share, and answers
which task is done and whether all bytes were there. It ends when nobody can ask any more.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys

ASK = struct.Struct("5q")  # task, descriptor, first byte in the file, first byte in the memory, bytes
ANSWER = struct.Struct("2q")  # task, whether


def main(memory: int, size: int, answers: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    shared = memoryview(mmap.mmap(memory, size))
    while asked := os.read(0, ASK.size):
        task, descriptor, at, begin, left = ASK.unpack(asked)
        try:
            file = os.open(f"/proc/{parent}/fd/{descriptor}", os.O_RDONLY)
            while left and (count := os.preadv(file, [shared[begin : begin + left]], at)):
                at, begin, left = at + count, begin + count, left - count
            os.close(file)
        except OSError:
            pass  # the parent tries again, and says what it met
        os.write(answers, ANSWER.pack(task, not left))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
