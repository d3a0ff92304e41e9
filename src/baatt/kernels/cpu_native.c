/* Block-sparse attention (E8) for one key/value head and the query heads that share it, float32, any CPU.
 *
 * Two passes over threads: `pack_task` copies each key block into the layout the products read, in sorted order, so
 * masked keys never enter; `attend_task` carries one query block through its kept key blocks with a running softmax.
 * A query block is one task. `Problem` is mirrored in cpu_native.py. */

#include "cpu_vectors.h"

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

/* Key panels are as wide as a product's vectors; a block of 16 is one vector wide where a vector holds 16. */
static inline int64_t panel_width(int64_t block_size) { return at_most(block_size, 2 * LANES); }

/* Copies key block `block`: keys as panels [block_size / width][channels][width], values as padded rows. */
static void pack_task(const void *argument, int64_t block, float *scratch) {
  const Problem *problem = argument;
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
static void attend_task(const void *argument, int64_t task, float *scratch) {
  const Problem *problem = argument;
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

void baatt_sparse_attention(const Problem *problem) {
  const int64_t size = baatt_scratch_size(problem->block_size, problem->channels);
  const int64_t tasks = problem->heads * blocks_of(problem->queries, problem->block_size);
  run(problem, pack_task, blocks_of(problem->keys, problem->block_size), problem->threads, problem->scratch, size);
  run(problem, attend_task, tasks, problem->threads, problem->scratch, size);
}
