"""Words that Python and compiled code share: a team's state, and the operations of a program.

A team's state, int64 words, each on a cache line of its own:

    EPOCH             counts programs begun; workers sleep on it
    ARRIVED           workers at the present barrier
    GENERATION        counts barriers passed; workers wait on it, first awake, then asleep
    SLEEPERS          how many sleep on GENERATION
    PROGRAM, LENGTH   the program of this epoch: its operations' address and their number
    COUNTERS          address of one counter an operation, each on a line
    CLOSED            not zero: workers return
    NUM_WORKERS       the caller's thread included
    THREADS           address of the system's number of each worker's thread; 0: not begun yet
    CALLED_OFF        not zero: a worker is gone, everyone returns at the next barrier

An operation is eight int64 words: the kernel's address, its arguments' address, whether a barrier follows, ticks of the
processor's time counter that worker 0 has spent in it, barrier included (added to, for profiles), and what each worker
prefetches before that barrier: an address, the bytes from it to the next worker's, and how many bytes (0: nothing);
last, the time counter when worker 0 began it.
"""

LINE = 8  # int64 words
(
    EPOCH,
    ARRIVED,
    GENERATION,
    SLEEPERS,
    PROGRAM,
    LENGTH,
    COUNTERS,
    CLOSED,
    NUM_WORKERS,
    THREADS,
    CALLED_OFF,
) = range(0, 11 * LINE, LINE)
STATE_WORDS = 11 * LINE
OPERATION_WORDS = 8
FUNCTION, ARGUMENTS, BARRIER, TICKS, AHEAD, AHEAD_STRIDE, AHEAD_BYTES, STARTED = range(OPERATION_WORDS)
