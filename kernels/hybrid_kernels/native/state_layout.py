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

An operation is four int64 words: the kernel's address, its arguments' address, whether a barrier follows, and ticks of
the processor's time counter that worker 0 has spent in it, barrier included (added to, for profiles).
"""

LINE = 8  # int64 words
EPOCH, ARRIVED, GENERATION, SLEEPERS, PROGRAM, LENGTH, COUNTERS, CLOSED, NUM_WORKERS = range(0, 9 * LINE, LINE)
STATE_WORDS = 9 * LINE
OPERATION_WORDS = 4
FUNCTION, ARGUMENTS, BARRIER, TICKS = range(OPERATION_WORDS)
