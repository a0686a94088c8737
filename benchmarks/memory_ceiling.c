/* What two cores can get from memory when they read as the sparse feed-forward network does: an upper limit for kernels.

       cc -O3 -march=native -pthread benchmarks/memory_ceiling.c -o memory_ceiling && ./memory_ceiling [THREADS [GIGABYTES]]

   Bundles of three q4 rows of 4096 columns (6912 bytes) lie one after another in huge pages, as a store has them. GB/s,
   medians of PASSES passes in turns, of

       stream            every byte in order, nothing but reading
       gather            random bundles, ACTIVE of all, in ascending order, nothing but reading
       gather ahead      the same, each line prefetched a bundle before it is read
       arithmetic        gate and up products, down rows added, of bundles that lie in the second-level cache
       network           the same of random bundles, prefetched as hybrid_kernels/sparse_ffn/cpu.py does
       dense network     the same of all bundles

   AVX2 only. Written in C so that nobody can blame the compiler of the kernels. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { GROUPS = 128, VALUES = 2048, ROW = 2304, BUNDLE = 3 * ROW, COLUMNS = 4096, SHARE = 54, WAITING = 16, PASSES = 9 };
enum { STREAM, GATHER, GATHER_AHEAD, ARITHMETIC, NETWORK, DENSE_NETWORK, MODES };
static const char *const NAMES[] = {"stream", "gather", "gather ahead", "arithmetic", "network", "dense network"};
static const double ACTIVE = 0.12;
#define MOST_THREADS 64

typedef struct {
    int mode;
    long count, ahead;
    int *bundles;
    float *y;
    double start, end, result;
} Worker;

static char *memory;
static pthread_barrier_t barrier;
static int8_t levels[COLUMNS] __attribute__((aligned(64)));
static float scales[GROUPS], offsets[GROUPS];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static inline void prefetch(const char *line) { _mm_prefetch(line, _MM_HINT_T1); }

/* A q4 row times an int8 vector, prefetching another row meanwhile: simd/int8_rows.py's int8_dot. */
static __attribute__((noinline)) float dot(const char *row, const char *ahead) {
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, offset = _mm256_setzero_ps();
    const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int block = 0; block < GROUPS / 8; block++) {
        const __m256 row_scales = _mm256_cvtph_ps(_mm_loadu_si128((void *)(row + VALUES + 16 * block)));
        const __m256 both = _mm256_mul_ps(row_scales, _mm256_loadu_ps(scales + 8 * block));
        offset = _mm256_fmadd_ps(row_scales, _mm256_loadu_ps(offsets + 8 * block), offset);
        prefetch(ahead + 128 * block);
        prefetch(ahead + 128 * block + 64);
        if (block % 4 == 0) prefetch(ahead + VALUES + 16 * block);
        for (int pair = 0; pair < 4; pair++) {
            const __m256i values = _mm256_loadu_si256((void *)(row + 128 * block + 32 * pair));
            const __m256i *x = (void *)(levels + 256 * block + 64 * pair);
            const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(values, low_bits), _mm256_load_si256(x));
            const __m256i high =
                _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(values, 4), low_bits), _mm256_load_si256(x + 1));
            const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_add_epi16(low, high), ones));
            const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32(2 * pair), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
            sums[pair % 2] = _mm256_fmadd_ps(whole, _mm256_permutevar8x32_ps(both, lanes), sums[pair % 2]);
        }
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), offset));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

/* y += factor * row for an even number of rows, prefetching as many others: simd/int8_add.py's int8_add_rows, without
   its rounding of factors. */
static __attribute__((noinline)) void add_rows(const char **rows, const char **aheads, int count, float *y) {
    const __m256i low_bits = _mm256_set1_epi8(15);
    for (int piece = 0; piece < VALUES / 32; piece++) {
        __m256i totals[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        const long offset = 32 * piece;
        for (int idx = 0; idx < count; idx += 2) {
            const __m256i a = _mm256_loadu_si256((void *)(rows[idx] + offset));
            const __m256i b = _mm256_loadu_si256((void *)(rows[idx + 1] + offset));
            prefetch(aheads[idx + piece % 2] + (offset & ~63L));
            const __m256i factors = _mm256_set1_epi16(0x0101 * (idx / 2 + 1));
            const __m256i parts[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
            for (int half = 0; half < 2; half++) {
                const __m256i low = _mm256_and_si256(parts[half], low_bits);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(parts[half], 4), low_bits);
                totals[2 * half] = _mm256_add_epi16(totals[2 * half], _mm256_maddubs_epi16(low, factors));
                totals[2 * half + 1] = _mm256_add_epi16(totals[2 * half + 1], _mm256_maddubs_epi16(high, factors));
            }
        }
        for (int part = 0; part < 8; part++) {
            const __m256i total = totals[part / 2];
            const __m128i half = part % 2 ? _mm256_extracti128_si256(total, 1) : _mm256_castsi256_si128(total);
            float *place = y + 64 * piece + 8 * part;
            const __m256 whole = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
            _mm256_store_ps(place, _mm256_fmadd_ps(whole, _mm256_set1_ps(0.01f), _mm256_load_ps(place)));
        }
    }
    for (int idx = 0; idx < count; idx++)
        for (int line = 0; line < ROW - VALUES; line += 64) prefetch(aheads[idx] + VALUES + line);
}

static const char *next_row(Worker *worker, long passed) {
    if (worker->ahead < passed) worker->ahead = passed;
    const long row = worker->ahead++, last = worker->count - 1, bundle = row / 3 < last ? row / 3 : last;
    return memory + (long)worker->bundles[bundle] * BUNDLE + row % 3 * ROW;
}

static void run_network(Worker *worker) {
    const char *rows[WAITING], *aheads[WAITING];
    int waiting = 0;
    worker->ahead = 0;
    for (long idx = 0; idx < worker->count; idx++) {
        const char *gate = memory + (long)worker->bundles[idx] * BUNDLE;
        worker->result += dot(gate, next_row(worker, 3 * idx + 1));
        if (worker->ahead < 3 * idx + 3) {
            const char *row = next_row(worker, 3 * idx + 2);
            for (int line = 0; line < ROW; line += 64) prefetch(row + line);
        }
        worker->result += dot(gate + ROW, next_row(worker, 3 * idx + 2));
        rows[waiting++] = gate + 2 * ROW;
        if (waiting == WAITING) {
            for (int k = 0; k < waiting; k++) aheads[k] = next_row(worker, 3 * idx + 3);
            add_rows(rows, aheads, waiting, worker->y);
            waiting = 0;
        }
    }
}

static void only_read(Worker *worker) {
    __m256i folded = _mm256_setzero_si256();
    for (long idx = 0; idx < worker->count; idx++) {
        const long next = worker->bundles[idx + 1 < worker->count ? idx + 1 : idx];
        const char *bundle = memory + (long)worker->bundles[idx] * BUNDLE, *ahead = memory + next * BUNDLE;
        for (int line = 0; line < BUNDLE; line += 64) {
            if (worker->mode == GATHER_AHEAD) prefetch(ahead + line);
            folded = _mm256_xor_si256(folded, _mm256_loadu_si256((void *)(bundle + line)));
            folded = _mm256_xor_si256(folded, _mm256_loadu_si256((void *)(bundle + line + 32)));
        }
    }
    worker->result += _mm256_extract_epi64(folded, 0);
}

static void *work(void *argument) {
    Worker *worker = argument;
    pthread_barrier_wait(&barrier);
    worker->start = now();
    if (worker->mode >= ARITHMETIC) run_network(worker);
    else only_read(worker);
    worker->end = now();
    return NULL;
}

static int ascending(const void *a, const void *b) {
    return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

/* GB/s of one pass: shares of SHARE bundles go to workers in turn. */
static double pass(int mode, int num_threads, long num_bundles, Worker *workers) {
    pthread_t threads[MOST_THREADS];
    const int is_sparse = mode == GATHER || mode == GATHER_AHEAD || mode == NETWORK;
    long chosen = 0;
    for (int t = 0; t < num_threads; t++) workers[t].mode = mode, workers[t].count = 0;
    for (long idx = 0; idx < num_bundles; idx++) {
        if (is_sparse && rand() >= ACTIVE * RAND_MAX) continue;
        Worker *worker = &workers[chosen++ / SHARE % num_threads];
        worker->bundles[worker->count++] = mode == ARITHMETIC ? idx % 24 : idx;
    }
    pthread_barrier_init(&barrier, NULL, num_threads);
    for (int t = 0; t < num_threads; t++) pthread_create(&threads[t], NULL, work, &workers[t]);
    for (int t = 0; t < num_threads; t++) pthread_join(threads[t], NULL);
    double start = workers[0].start, end = workers[0].end;
    for (int t = 1; t < num_threads; t++) {
        if (workers[t].start < start) start = workers[t].start;
        if (workers[t].end > end) end = workers[t].end;
    }
    return (double)chosen * BUNDLE / (end - start) / 1e9;
}

int main(int argc, char **argv) {
    const int num_threads = argc > 1 ? atoi(argv[1]) : 2;
    const size_t huge_page = 2 << 20, num_bytes = (argc > 2 ? atof(argv[2]) : 3.0) * 1e9;
    if (num_threads < 1 || num_threads > MOST_THREADS || num_bytes < 100u << 20) {
        fprintf(stderr, "expected 1 to %d threads and at least 0.1 GB\n", MOST_THREADS);
        return 2;
    }
    char *mapped = mmap(NULL, num_bytes + 2 * huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return perror("mmap"), 2;
    memory = (char *)(((uintptr_t)mapped + huge_page - 1) & ~(uintptr_t)(huge_page - 1));
    madvise(memory, num_bytes, MADV_HUGEPAGE);
    memset(memory, 0x35, num_bytes);
    for (int idx = 0; idx < COLUMNS; idx++) levels[idx] = rand() % 255 - 127;
    for (int idx = 0; idx < GROUPS; idx++) scales[idx] = offsets[idx] = 1;
    const long num_bundles = num_bytes / BUNDLE;
    Worker workers[MOST_THREADS] = {0};
    for (int t = 0; t < num_threads; t++) {
        workers[t].bundles = malloc(num_bundles * sizeof(int));
        workers[t].y = aligned_alloc(64, COLUMNS * sizeof(float));
        memset(workers[t].y, 0, COLUMNS * sizeof(float));
    }
    static double rates[MODES][PASSES];
    for (int idx = 0; idx < PASSES; idx++)
        for (int mode = 0; mode < MODES; mode++) rates[mode][idx] = pass(mode, num_threads, num_bundles, workers);
    for (int mode = 0; mode < MODES; mode++) qsort(rates[mode], PASSES, sizeof(double), ascending);
    for (int mode = 0; mode < MODES; mode++)
        printf("%-14s %5.1f GB/s, %.2f of stream\n", NAMES[mode], rates[mode][PASSES / 2], rates[mode][PASSES / 2] / rates[STREAM][PASSES / 2]);
    return 0;
}
