/* Block-sparse attention (E8) for one key/value head and the query heads that share it, float32, any CPU.
 *
 * Two passes over threads: `pack_task` copies each key block into the layout the products read, in sorted order, so
 * masked keys never enter; `attend_task` carries one query block through its kept key blocks with a running softmax.
 * A query block is one task and belongs to one thread, so results do not depend on the number of threads.
 * Vectors are those of the GCC/Clang vector extension; `Problem` is mirrored in cpu_native.py. */

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

typedef struct {
  const float *query;          /* heads x queries x channels, strides in elements, channels contiguous */
  const float *key;            /* one head: keys x channels */
  const float *value;          /* one head: keys x channels */
  const int64_t *query_order;  /* heads x queries: sorted place -> row of query and output */
  const int64_t *key_order;    /* sorted place -> row of key and value; the first `keys` entries are read */
  const int32_t *kept;         /* heads x query blocks x kept_slots: ids of kept key blocks */
  const int32_t *count;        /* heads x query blocks: slots in use */
  float *output;               /* heads x queries x channels, contiguous */
  float *lse;                  /* heads x queries, contiguous */
  float *packed_key;           /* key blocks x block_size x channels */
  float *packed_value;         /* key blocks x block_size x padded channels */
  float *scratch;              /* threads x scratch_size */
  int64_t query_head_stride, query_row_stride, key_row_stride, value_row_stride;
  int64_t heads, queries, keys, channels, block_size, kept_slots, threads;
  double scale;
} Problem;

typedef struct {
  const Problem *problem;
  void (*task)(const Problem *, int64_t, float *);
  int64_t tasks, next_task, next_thread;
} Job;

static inline int64_t blocks_of(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }
static inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
static inline int64_t padded(int64_t channels) { return (channels + LANES - 1) / LANES * LANES; }
/* Key panels are as wide as a product's vectors; a block of 16 is one vector wide where a vector holds 16. */
static inline int64_t panel_width(int64_t block_size) { return at_most(block_size, 2 * LANES); }

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

/* Copies key block `block`: keys as panels [block_size / width][channels][width], values as padded rows. */
static void pack_task(const Problem *problem, int64_t block, float *scratch) {
  (void)scratch;
  const int64_t block_size = problem->block_size, channels = problem->channels, width = panel_width(block_size);
  const int64_t value_stride = padded(channels);
  float *packed_key = problem->packed_key + block * block_size * channels;
  float *packed_value = problem->packed_value + block * block_size * value_stride;
  for (int64_t offset = 0; offset < block_size; offset++) {
    const int64_t place = block * block_size + offset;
    float *key_column = packed_key + offset / width * width * channels + offset % width;
    float *value_row = packed_value + offset * value_stride;
    if (place >= problem->keys) { /* absent: its scores are computed and masked, its value is never read */
      for (int64_t channel = 0; channel < channels; channel++) key_column[channel * width] = 0;
      continue;
    }
    const float *key = problem->key + problem->key_order[place] * problem->key_row_stride;
    const float *value = problem->value + problem->key_order[place] * problem->value_row_stride;
    for (int64_t channel = 0; channel < channels; channel++) key_column[channel * width] = key[channel];
    memcpy(value_row, value, sizeof(float) * channels);
    memset(value_row + channels, 0, sizeof(float) * (value_stride - channels));
  }
}

/* Turns ROWS rows of scores into weights exp(score - maximum) and updates the running maximum and sum of each row. */
static __attribute__((noinline)) void softmax_rows(float *scores, int64_t block_size, int64_t present, float *maximum, float *sum,
                                float *rescale) {
  for (int row = 0; row < ROWS; row++, scores += block_size) {
    for (int64_t i = present; i < block_size; i++) scores[i] = -INFINITY;
    vector highest = load(scores);
    for (int64_t i = LANES; i < block_size; i += LANES) {
      vector x = load(scores + i);
      highest = choose(x > highest, x, highest);
    }
    const float block_maximum = maximum_of_lanes(highest);
    const float new_maximum = block_maximum > maximum[row] ? block_maximum : maximum[row];
    /* Where every score so far is -inf, subtracting 0 gives weights of 0 instead of NaN. */
    const float shift = new_maximum == -INFINITY ? 0.0f : new_maximum;
    vector total = broadcast(0.0f);
    for (int64_t i = 0; i < block_size; i += LANES) {
      vector weight = exponential(load(scores + i) - broadcast(shift));
      store(scores + i, weight);
      total += weight;
    }
    rescale[row] = expf(maximum[row] - shift);
    sum[row] = sum[row] * rescale[row] + sum_of_lanes(total);
    maximum[row] = new_maximum;
  }
}

/* One query block: q rows gathered and scaled, then every kept key block, then the rows written back in order. */
static void attend_task(const Problem *problem, int64_t task, float *scratch) {
  const int64_t block_size = problem->block_size, channels = problem->channels, width = panel_width(block_size);
  const int64_t query_blocks = blocks_of(problem->queries, block_size), out_stride = padded(channels);
  const int64_t head = task / query_blocks, first = task % query_blocks * block_size;
  const int64_t rows = at_most(problem->queries - first, block_size);
  const int64_t *order = problem->query_order + head * problem->queries + first;
  const int32_t *kept = problem->kept + task * problem->kept_slots;
  float *query = scratch, *accumulator = query + block_size * channels;
  float *maximum = accumulator + block_size * out_stride, *sum = maximum + block_size;
  float *scores = sum + block_size, rescale[ROWS];

  memset(query, 0, sizeof(float) * block_size * channels); /* the rows beyond a ragged end are computed too */
  memset(accumulator, 0, sizeof(float) * block_size * out_stride);
  for (int64_t row = 0; row < block_size; row++) maximum[row] = -INFINITY, sum[row] = 0;
  for (int64_t row = 0; row < rows; row++) {
    const float *source = problem->query + head * problem->query_head_stride + order[row] * problem->query_row_stride;
    for (int64_t channel = 0; channel < channels; channel++)
      query[row * channels + channel] = source[channel] * (float)problem->scale;
  }
  for (int64_t slot = 0; slot < at_most(problem->count[task], problem->kept_slots); slot++) {
    const int64_t present = at_most(problem->keys - (int64_t)kept[slot] * block_size, block_size);
    if (kept[slot] < 0 || present <= 0) continue; /* a block of masked keys only */
    const float *key = problem->packed_key + kept[slot] * block_size * channels;
    const float *value = problem->packed_value + kept[slot] * block_size * out_stride;
    for (int64_t row = 0; row < rows; row += ROWS) {
      const float *left = query + row * channels;
      float *out = accumulator + row * out_stride;
      for (int64_t i = 0; i < block_size; i += width)
        wide_product(left, channels, key + i * channels, width, scores + i, block_size, channels, width, 0);
      softmax_rows(scores, block_size, present, maximum + row, sum + row, rescale);
      wide_product(scores, block_size, value, out_stride, out, out_stride, present, out_stride, rescale);
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t place = head * problem->queries + order[row];
    const float inverse = sum[row] == 0 ? 0 : 1 / sum[row];
    for (int64_t channel = 0; channel < channels; channel++)
      problem->output[place * channels + channel] = accumulator[row * out_stride + channel] * inverse;
    problem->lse[place] = sum[row] == 0 ? -INFINITY : maximum[row] + logf(sum[row]);
  }
}

/* Floats of `scratch` per thread, and the row length of `packed_value`: what the caller must allocate. */
int64_t baatt_scratch_size(int64_t block_size, int64_t channels) {
  return block_size * (channels + padded(channels) + 2 + ROWS);
}
int64_t baatt_padded_channels(int64_t channels) { return padded(channels); }

static void *work(void *argument) {
  Job *job = argument;
  float *scratch = job->problem->scratch;
  scratch += __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED) *
             baatt_scratch_size(job->problem->block_size, job->problem->channels);
  for (int64_t task; (task = __atomic_fetch_add(&job->next_task, 1, __ATOMIC_RELAXED)) < job->tasks;)
    job->task(job->problem, task, scratch);
  return 0;
}

/* Runs all tasks on up to `threads` threads, this one among them; a thread that cannot start is done without. */
static void run(const Problem *problem, void (*task)(const Problem *, int64_t, float *), int64_t tasks) {
  Job job = {problem, task, tasks, 0, 0};
  pthread_t thread[MAX_THREADS];
  int64_t started = 0, wanted = at_most(at_most(problem->threads, tasks), MAX_THREADS) - 1;
  while (started < wanted && pthread_create(thread + started, 0, work, &job) == 0) started++;
  work(&job);
  while (started > 0) pthread_join(thread[--started], 0);
}

void baatt_sparse_attention(const Problem *problem) {
  run(problem, pack_task, blocks_of(problem->keys, problem->block_size));
  run(problem, attend_task, problem->heads * blocks_of(problem->queries, problem->block_size));
}
