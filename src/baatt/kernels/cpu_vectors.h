/* What the C kernels share: vectors of the GCC/Clang vector extension, products of matrices, threads.
 *
 * A task belongs to one thread, so no result depends on the number of threads. All tasks of a pass run in one region:
 * beside other busy processes every start and every barrier may wait for a time slice of the scheduler. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

/* Accumulators of a product are ROWS x 2 vectors: as many registers as the instruction set has, less a few. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 8
#else
#define LANES 4
#define ROWS 4
#endif
#define WIDTH (2 * LANES) /* queries of a panel */
#define MAX_THREADS 256
#define LOG2_E 1.44269504f

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));

static inline int64_t blocks_of(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }
static inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
static inline int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }

static inline vector load(const float *source) { return *(const unaligned_vector *)source; }
static inline void store(float *target, vector x) { *(unaligned_vector *)target = x; }
/* x - 0 is x even for x = -0, so no instruction is spent on the subtraction. */
static inline vector broadcast(float x) { return x - (vector){0}; }
static inline vector choose(bits condition, vector x, vector y) {
  return (vector)(((bits)x & condition) | ((bits)y & ~condition));
}
/* y where one is not a number. Compilers do not find the instruction, and its header takes longer than the build. */
static inline vector larger(vector x, vector y) {
#ifdef __AVX__
  __asm__("vmaxps %2, %1, %0" : "=v"(x) : "v"(x), "vm"(y));
  return x;
#else
  return choose(x > y, x, y);
#endif
}

/* By halves: adding lane after lane would wait sixteen times for the one before. */
static inline float sum_of_lanes(vector x) {
  float lane[LANES];
  store(lane, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
static inline float maximum_of_lanes(vector x) {
  float lane[LANES];
  store(lane, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

/* 2^x for x <= 0, within 2 ulp: 2^n times a polynomial on |r| <= 1/2; from -127 down it is 0. The last bits of
 * `shifted` are n + 127, the exponent of 2^n. */
static inline vector power_of_two(vector x) {
  const vector shift = broadcast(12582912.0f + 127.0f);
  x = larger(broadcast(-127.0f), x);
  const vector shifted = x + shift, r = x - (shifted - shift);
  vector p = broadcast(1.5353362e-4f);
  p = p * r + broadcast(0.0013398875f);
  p = p * r + broadcast(0.009618437f);
  p = p * r + broadcast(0.055503324f);
  p = p * r + broadcast(0.24022648f);
  p = p * r + broadcast(0.6931472f);
  p = p * r + broadcast(1.0f);
  return p * (vector)((bits)shifted << 23);
}

/* e^x for x <= 0. Of two large numbers the difference is taken before it is multiplied: a product that is rounded for one
 * and, fused with the difference, exact for the other may leave the largest score hundreds below itself. */
static inline vector exponential(vector x) { return power_of_two(x * broadcast(LOG2_E)); }

/* c [rows, columns * LANES] = rescale * c + a [rows, depth] b [depth, columns * LANES], rescale one factor a column; no
 * rescale: c is not read. The products of one block are summed apart and then added: one chain over all keys would
 * round three times worse. */
static inline __attribute__((always_inline)) void tile(const float *a, int64_t a_row, int64_t a_step, const float *b,
                                                       float *c, int64_t c_stride, int64_t depth, const float *rescale,
                                                       const int rows, const int columns) {
  vector accumulator[ROWS][2];
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) accumulator[row][column] = broadcast(0.0f);
#pragma GCC unroll 4 /* 80 % of the peak become 95 */
  for (int64_t i = 0; i < depth; i++, a += a_step, b += columns * LANES) {
    const vector right_0 = load(b), right_1 = load(b + (columns - 1) * LANES);
    for (int row = 0; row < rows; row++) {
      const vector left = broadcast(a[row * a_row]);
      accumulator[row][0] += left * right_0;
      if (columns == 2) accumulator[row][1] += left * right_1;
    }
  }
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      float *target = c + row * c_stride + column * LANES;
      /* One expression, so that all tiles round alike. */
      if (rescale) accumulator[row][column] += load(target) * load(rescale + column * LANES);
      store(target, accumulator[row][column]);
    }
}

/* The same for any rows and `width`, one or two vectors. Of `a` neighbours in a row are `a_step` apart, in a column
 * `a_row`. Not inlined: constants that the compiler keeps in registers for the softmax would push accumulators out of
 * them, at a third of the speed. */
static __attribute__((noinline)) void product(const float *a, int64_t a_row, int64_t a_step, const float *b, float *c,
                                              int64_t c_stride, int64_t rows, int64_t depth, int64_t width,
                                              const float *rescale) {
#define TILE_OF(ROWS, COLUMNS) tile(a, a_row, a_step, b, c, c_stride, depth, rescale, ROWS, COLUMNS)
#define TILES_OF(COLUMNS) \
  step == ROWS ? TILE_OF(ROWS, COLUMNS) : step == 4 ? TILE_OF(4, COLUMNS) : TILE_OF(1, COLUMNS)
  for (int64_t step; rows > 0; rows -= step, a += step * a_row, c += step * c_stride) {
    /* A rest of less than 4 rows would go one by one. */
    step = rows == ROWS || rows >= ROWS + 4 ? ROWS : rows >= 4 ? 4 : 1;
    width > LANES ? TILES_OF(2) : TILES_OF(1);
  }
}

typedef struct {
  const void *problem;
  void (*task)(const void *, int64_t, float *);
  float *scratch;
  int64_t scratch_size, tasks, next_task, next_thread;
} Job;

static void *work(void *argument) {
  Job *job = argument;
  float *scratch = job->scratch + __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED) * job->scratch_size;
  for (int64_t task; (task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED)) < job->tasks;)
    job->task(job->problem, task, scratch);
  return 0;
}

/* Runs all tasks on up to `threads` threads, this one among them; a thread that cannot start is done without. Each has
 * `scratch_size` floats of `scratch` for itself. */
static void run(const void *problem, void (*task)(const void *, int64_t, float *), int64_t tasks, int64_t threads,
                float *scratch, int64_t scratch_size) {
  Job job = {problem, task, scratch, scratch_size, tasks, 0, 0};
  pthread_t thread[MAX_THREADS];
  int64_t started = 0, wanted = at_most(at_most(threads, tasks), MAX_THREADS) - 1;
  while (started < wanted && pthread_create(thread + started, 0, work, &job) == 0) started++;
  work(&job);
  while (started > 0) pthread_join(thread[--started], 0);
}
