/* Block-sparse attention (E8) for one key/value head and the query heads that share it, float32, any CPU.
 *
 * A task carries one query block through its kept key blocks with a running softmax. Queries are the lanes of all
 * vectors: scores [keys, queries] and outputs [channels, queries] are products whose left side is keys or values as
 * they lie in memory, and maxima, sums and factors of queries are vectors. `Problem` is mirrored in cpu_native.py. */

#include "cpu_vectors.h"

typedef struct {
  const float *query;          /* heads x queries x channels, strides in elements, channels contiguous */
  const float *key, *value;    /* one head: keys x channels, in sorted order */
  const int64_t *query_order;  /* heads x queries: sorted place -> row of query and output */
  const int32_t *kept;         /* heads x query blocks x kept_slots: ids of kept key blocks */
  const int32_t *count;        /* heads x query blocks: slots in use */
  const int32_t *limit;        /* query blocks x block_size: keys that a query sees, from the front; 0 where all do */
  float *output;               /* heads x queries x channels, contiguous */
  float *lse;                  /* heads x queries, contiguous */
  float *scratch;              /* threads x scratch_size */
  int64_t query_head_stride, query_row_stride;
  int64_t heads, queries, keys, channels, block_size, kept_slots, threads;
  double scale;
} Problem;

/* Turns scores [keys, width] into weights exp(score - maximum) and updates the running maximum and sum of each query.
 * Keys are taken four at a time, for four chains of sums; `scores` has room for that. */
static __attribute__((noinline)) void softmax(float *scores, int64_t keys, int64_t width, float *maximum, float *sum,
                                              float *rescale) {
  int64_t end = keys;
  for (; end % 4; end++)
    for (int64_t i = 0; i < width; i++) scores[end * width + i] = -INFINITY;
  for (int64_t column = 0; column < width; column += LANES, scores += LANES) {
    const vector before = load(maximum + column), lowest = broadcast(-INFINITY);
    vector highest[4] = {lowest, lowest, lowest, lowest}, total[4] = {{0}};
    for (int64_t key = 0; key < end; key += 4)
      for (int i = 0; i < 4; i++) highest[i] = larger(load(scores + (key + i) * width), highest[i]);
    const vector block = larger(larger(highest[0], highest[1]), larger(highest[2], highest[3]));
    const vector after = larger(block, before);
    /* Where every score so far is -inf, subtracting 0 gives weights of 0 instead of NaN. */
    const vector shift = choose(after == lowest, broadcast(0.0f), after);
    for (int64_t key = 0; key < end; key += 4)
      for (int i = 0; i < 4; i++) {
        const vector weight = exponential(load(scores + (key + i) * width) - shift);
        store(scores + (key + i) * width, weight);
        total[i] += weight;
      }
    const vector factor = exponential(before - shift);
    store(rescale + column, factor);
    store(maximum + column, after);
    store(sum + column, load(sum + column) * factor + ((total[0] + total[1]) + (total[2] + total[3])));
  }
}

/* Adds the weighted values to outputs [channels, width]; meanwhile asks for as many floats from `next` on of the keys
 * and values of the next block, which would come too late when they are needed. */
static void add_values(const Problem *problem, const float *value, const float *weights, float *output, int64_t keys,
                       int64_t width, const float *rescale, int64_t next) {
  const int64_t channels = problem->channels;
  for (int64_t channel = 0; channel < channels; channel += 2 * ROWS) {
    const int64_t rows = at_most(channels - channel, 2 * ROWS);
    for (int64_t i = next; i < next + rows * width; i += 64 / sizeof(float)) {
      __builtin_prefetch(problem->key + i);
      __builtin_prefetch(problem->value + i);
    }
    product(value, 1, channels, weights, output, width, rows, keys, width, rescale);
    next += rows * width, value += rows, output += rows * width;
  }
}

/* Scores [keys, width] of the keys from `start` on that a query does not see become -inf. */
static void hide(float *scores, int64_t start, int64_t keys, int64_t width, const int32_t *limit, int64_t rows) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t key = limit[row] > start ? limit[row] - start : 0; key < keys; key++)
      scores[key * width + row] = -INFINITY;
}

/* One query block: q rows gathered and scaled, then every kept key block, then the rows written back in order. */
static void attend_task(const void *argument, int64_t task, float *scratch) {
  const Problem *problem = argument;
  const int64_t block_size = problem->block_size, channels = problem->channels;
  const int64_t query_blocks = blocks_of(problem->queries, block_size);
  const int64_t head = task / query_blocks, first = task % query_blocks * block_size;
  const int64_t rows = at_most(problem->queries - first, block_size), places = blocks_of(rows, LANES) * LANES;
  const int64_t *order = problem->query_order + head * problem->queries + first;
  const int32_t *kept = problem->kept + task * problem->kept_slots;
  const int64_t slots = at_most(problem->count[task], problem->kept_slots);
  /* Panels of [channels, WIDTH] each; the last may have one vector. */
  float *query = scratch, *accumulator = query + places * channels;
  float *maximum = accumulator + places * channels, *sum = maximum + places, *scores = sum + places;
  float rescale[WIDTH];
  const int32_t *limit = problem->limit ? problem->limit + task % query_blocks * block_size : 0;
  int64_t whole = problem->keys, seen = limit ? 0 : problem->keys;
  for (int64_t row = 0; limit && row < rows; row++) {
    whole = at_most(whole, limit[row]);
    seen = limit[row] > seen ? limit[row] : seen;
  }

  memset(query, 0, sizeof(float) * 2 * places * channels); /* the places beyond a ragged end are computed too */
  for (int64_t place = 0; place < places; place++) maximum[place] = -INFINITY, sum[place] = 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t panel = row / WIDTH * WIDTH, width = at_most(places - panel, WIDTH);
    const float *source = problem->query + head * problem->query_head_stride + order[row] * problem->query_row_stride;
    float *target = query + panel * channels + row % WIDTH;
    for (int64_t channel = 0; channel < channels; channel++)
      target[channel * width] = source[channel] * (float)problem->scale;
  }
  for (int64_t slot = 0; slot < slots; slot++) {
    const int64_t start = kept[slot] * block_size, present = at_most(at_most(problem->keys, seen) - start, block_size);
    if (kept[slot] < 0 || present <= 0) continue; /* a block of masked keys only */
    const float *key = problem->key + start * channels, *value = problem->value + start * channels;
    const int64_t next = slot + 1 < slots ? kept[slot + 1] * block_size : start;
    for (int64_t place = 0; place < places; place += WIDTH) {
      const int64_t width = at_most(places - place, WIDTH);
      product(key, channels, 1, query + place * channels, scores, width, present, channels, width, 0);
      if (start + present > whole) hide(scores, start, present, width, limit + place, at_most(rows - place, width));
      softmax(scores, present, width, maximum + place, sum + place, rescale);
      add_values(problem, value, scores, accumulator + place * channels, present, width, rescale,
                 (next + place) * channels);
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t panel = row / WIDTH * WIDTH, width = at_most(places - panel, WIDTH);
    const int64_t target = head * problem->queries + order[row];
    const float *source = accumulator + panel * channels + row % WIDTH, inverse = sum[row] == 0 ? 0 : 1 / sum[row];
    for (int64_t channel = 0; channel < channels; channel++)
      problem->output[target * channels + channel] = source[channel * width] * inverse;
    problem->lse[target] = sum[row] == 0 ? -INFINITY : maximum[row] + logf(sum[row]);
  }
}

/* Floats of `scratch` per thread: what the caller must allocate. */
int64_t baatt_scratch_size(int64_t block_size, int64_t channels) {
  return blocks_of(block_size, LANES) * LANES * 2 * (channels + 1) + block_size * WIDTH;
}

void baatt_sparse_attention(const Problem *problem) {
  const int64_t size = baatt_scratch_size(problem->block_size, problem->channels);
  const int64_t tasks = problem->heads * blocks_of(problem->queries, problem->block_size);
  run(problem, attend_task, tasks, problem->threads, problem->scratch, size);
}
