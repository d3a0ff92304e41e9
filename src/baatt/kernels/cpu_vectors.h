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
#define ROWS 4
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 8
#else
#define LANES 4
#define ROWS 4
#endif
#define MAX_THREADS 256

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

/* exp(x) for x <= 0: 2^n times a polynomial on |r| <= ln 2 / 2, within 2 ulp; below exp(-87) it is 0. */
static inline vector exponential(vector x) {
  const vector lowest = broadcast(-87.0f), round_to_integer = broadcast(12582912.0f);
  bits underflow = x < lowest;
  x = choose(underflow, lowest, x);
  vector n = (x * broadcast(1.44269504f) + round_to_integer) - round_to_integer;
  vector r = x - n * broadcast(0.693359375f) - n * broadcast(-2.12194440e-4f);
  vector p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * r * r + r + broadcast(1.0f);
  bits power = (__builtin_convertvector(n, bits) + 127) << 23;
  return choose(underflow, broadcast(0.0f), p * (vector)power);
}

/* c [ROWS, columns * LANES] = rescale * c + a [ROWS, depth] b [depth, columns * LANES]; no rescale: c is not read.
 * The products of one block are summed apart and then added: one chain over all keys would round three times worse. */
static inline __attribute__((always_inline)) void product(const float *a, int64_t a_stride, const float *b,
                                                          int64_t b_stride, float *c, int64_t c_stride, int64_t depth,
                                                          const float *rescale, const int columns) {
  vector accumulator[ROWS][2];
  for (int row = 0; row < ROWS; row++)
    for (int column = 0; column < columns; column++) accumulator[row][column] = broadcast(0.0f);
  for (int64_t i = 0; i < depth; i++, a++, b += b_stride) {
    const vector right_0 = load(b), right_1 = load(b + (columns - 1) * LANES);
    for (int row = 0; row < ROWS; row++) {
      const vector left = broadcast(a[row * a_stride]);
      accumulator[row][0] += left * right_0;
      if (columns == 2) accumulator[row][1] += left * right_1;
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int column = 0; column < columns; column++) {
      float *target = c + row * c_stride + column * LANES;
      vector before = rescale ? load(target) * broadcast(rescale[row]) : broadcast(0.0f);
      store(target, before + accumulator[row][column]);
    }
}

/* c [ROWS, width] from b [depth, width], two vectors of columns at a time while they last. Not inlined: constants that
 * the compiler keeps in registers for the softmax would push accumulators out of them, at a third of the speed. */
static __attribute__((noinline)) void wide_product(const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                                                   float *c, int64_t c_stride, int64_t depth, int64_t width,
                                                   const float *rescale) {
  int64_t column = 0;
  for (; column + 2 * LANES <= width; column += 2 * LANES)
    product(a, a_stride, b + column, b_stride, c + column, c_stride, depth, rescale, 2);
  for (; column < width; column += LANES)
    product(a, a_stride, b + column, b_stride, c + column, c_stride, depth, rescale, 1);
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
