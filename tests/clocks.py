"""How long something took, on machines that do other things as well."""

import time


def now():
    """The clock, and the time that the processors gave to this process."""
    return time.perf_counter(), time.process_time()


def within(seconds, start):
    """Whether it is so long since now() was `start`. Of a busy machine's clock others have their
    part, of this process's own time nobody: one of the two is held to it, and the clock to ten
    times as much, for a process that only waits has no time of its own."""
    took = [end - begin for begin, end in zip(start, now(), strict=True)]
    return min(took) < seconds and took[0] < 10 * seconds
