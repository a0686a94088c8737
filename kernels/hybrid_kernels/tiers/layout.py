"""Words of `split_neurons` and `run_down`, and of the memory that they share with everyone who waits for the disk.

Where a neuron's bundle is, one int64 says, its *home*: the bundle's address, whose lowest bits are its tier's. A bundle
on disk has the address 0, or that of the cache's slot that holds it.
"""

from hybrid_kernels.sparse_ffn.layout import NUM_WORDS as NEURON_WORDS

GPU, RAM, DISK = range(3)
TIER_BITS = 3

(
    SPLIT_NUM_SLOTS,  # feed-forward networks of the token: 1, or its experts
    SPLIT_CHOSEN,  # address of int64 [slots]: which; 0: the first
    SPLIT_NUM_NEURONS,
    SPLIT_SELECTED,  # address of int32 [slots, NUM_NEURONS] from `project`'s SELECT; 0: every neuron
    SPLIT_COUNTS,  # address of int64 [slots, blocks]
    SPLIT_BLOCK,
    SPLIT_HOMES,  # address of int64 [networks]: addresses of each network's homes, int64 [NUM_NEURONS]
    SPLIT_OFFSETS,  # address of int64 [networks]: where each network's bundles begin in the layer's file
    SPLIT_FILE,  # its descriptor
    SPLIT_BUNDLE_BYTES,
    SPLIT_HOT,  # address of int32 [slots, NUM_NEURONS], written: active neurons on the GPU, in their order
    SPLIT_HOT_COUNTS,  # address of int64 [slots], written
    SPLIT_COLD,  # the same of all others
    SPLIT_COLD_COUNTS,
    SPLIT_READS,  # address of int32 [slots, NUM_NEURONS], written: misses of the layer up to each cold neuron
    SPLIT_NUM_SHARES,  # into which a network's cold neurons are cut
    SPLIT_NEEDED,  # address of int64 [slots, NUM_SHARES], written: misses that must have arrived before the share
    SPLIT_DISK,  # address of the words below
) = range(18)
SPLIT_WORDS = 18

(
    # bundles in RAM that lie on disk: slots, the oldest that nobody asked for given away first
    SLOTS,  # address of NUM_SLOTS bundles
    SLOT_BYTES,
    NUM_SLOTS,
    OWNERS,  # address of int64 [NUM_SLOTS]: address of the home of who is in it; 0: nobody
    ASKED,  # address of int64 [NUM_SLOTS]: how often its bundle was asked for lately, MOST_ASKED at most
    LAST_USED,  # address of int64 [NUM_SLOTS]: in which layer of which token, so that it stays until that is over
    HAND,  # the slot that is looked at next when one is needed
    EPOCH,  # counts layers of tokens
    # reading
    CONTEXT,  # of Linux's asynchronous reads; 0: they are read one by one, by whoever waits
    BUFFERS,  # address of NUM_BUFFERS * BUFFER_BYTES, from a page's start
    BUFFER_BYTES,
    NUM_BUFFERS,
    FREE,  # address of int64 [NUM_BUFFERS]: a stack of free buffers
    NUM_FREE,
    BLOCKS,  # address of NUM_BUFFERS * 64 bytes, Linux's struct iocb
    POINTERS,  # address of int64 [NUM_BUFFERS]: addresses of those that are handed in
    EVENTS,  # address of NUM_BUFFERS * 32 bytes, Linux's struct io_event
    TIMEOUT,  # address of int64 [2]: seconds and nanoseconds that a look for arrived reads may take
    MISSES,  # address of int64 [most misses, 2]: place in the file, address of the slot
    READS,  # address of int64 [most misses, READ_WORDS]
    NUM_MISSES,  # of this layer
    NUM_READS,  # of this layer; one reads several bundles where they lie side by side
    NUM_SUBMITTED,
    FIRST_OPEN,  # all reads before it have arrived
    LOCK,  # who increases it from 0 hands in reads and looks for arrived ones
    ARRIVED,  # misses that have arrived, all before them too: what shares wait for
    SLEEPERS,
    TEAM,  # address of the state of the team whose workers wait here
    FAILED,  # 0, or what went wrong: a negative errno, or 1 for a file that ends too early
    FAILED_FILE,  # the descriptor whose read it was; 0: no read's
    # counted since the last reset
    HITS,
    TOTAL_MISSES,
    TOTAL_READS,
    TOTAL_BYTES,  # that were read
    STALL_TICKS,  # of the processor's time counter, waited for reads, all workers together
    HOT_NEURONS,  # active ones on the GPU
    COLD_NEURONS,
) = range(37)
DISK_WORDS = 37

READ_WORDS = 6
READ_FILE, READ_OFFSET, READ_BYTES, READ_FIRST, READ_COUNT, READ_DONE = range(READ_WORDS)
MISS_OFFSET, MISS_SLOT = range(2)

PAGE = 4096  # bytes: where direct reads begin and end
MOST_ASKED = 7
NO_SLOT = -1

(
    DOWN_HOMES,  # address of int64 [networks]: addresses of int64 [NUM_NEURONS]: addresses of down rows
    DOWN_SELECTED,  # address of int32 [slots, NUM_NEURONS]
    DOWN_COUNTS,  # address of int64 [slots]
) = range(NEURON_WORDS, NEURON_WORDS + 3)
"""Behind the words of `run_neurons`, of which `run_down` reads what is about vectors, slots and shares."""
DOWN_WORDS = NEURON_WORDS + 3
