/* How blocks compare: covariance scores (E4, E5), or the shares of clusters (C3-C5); float32, any CPU.
 *
 * `pack_task` writes what is remembered of the keys as the columns of a product, `scores_task` and `shares_task` take a
 * few query blocks of one head through all columns, tile by tile. All batch entries and heads are one pass.
 * `Comparison` is mirrored in cpu_scores.py. */

#include "cpu_vectors.h"

/* Columns of a tile, and rows that pass over it together: their logits stay in the first cache. */
#define TILE 128
#define TASK_ROWS 16
#define PANEL (2 * LANES)
#define PART 64

typedef struct {
  const float *query, *key;                    /* batch x heads x blocks x clusters x channels: means */
  const float *query_variance, *key_variance;  /* like the means; 0 where not compared */
  const int64_t *query_count, *key_count;      /* batch x heads x blocks x clusters: tokens; 0 for covariance */
  const int64_t *key_size;                     /* batch x key blocks: tokens */
  float *scores;                               /* batch x heads x query blocks x key blocks */
  float *packed, *scratch;                     /* baatt_packed_size; threads x baatt_comparison_scratch */
  int64_t batch, heads, groups, query_blocks, key_blocks, query_clusters, key_clusters, channels, peak, threads;
  double scale, weight;                        /* of q.k; of the compensation */
} Comparison;

/* Columns that a key block takes: whole vectors where they are added up. */
static inline int64_t block_width(const Comparison *c) { return c->key_count ? padded(c->key_clusters) : 1; }
static inline int64_t tile_blocks(const Comparison *c) { return TILE / block_width(c); }
static inline int64_t tiles_of(const Comparison *c) { return blocks_of(c->key_blocks, tile_blocks(c)); }
static inline int64_t depth_of(const Comparison *c) { return c->channels * (c->key_variance ? 3 : 1); }
/* Floats of a packed tile: panels [TILE / PANEL][depth][PANEL], and what is added to the logits of each column. */
static inline int64_t tile_size(const Comparison *c) { return (depth_of(c) + 1) * TILE; }

static void pack_task(const void *argument, int64_t task, float *scratch) {
  const Comparison *c = argument;
  (void)scratch;
  const int64_t width = block_width(c), blocks = tile_blocks(c), depth = depth_of(c), channels = c->channels;
  const int64_t first = task % tiles_of(c) * blocks, head = task / tiles_of(c);
  float *packed = c->packed + task * tile_size(c), *bias = packed + depth * TILE;
  for (int64_t column = 0; column < TILE; column++) {
    const int64_t block = first + column / width, cluster = column % width;
    const int inside = column / width < blocks && block < c->key_blocks && cluster < c->key_clusters;
    const int64_t place = (head * c->key_blocks + block) * c->key_clusters + cluster;
    float *target = packed + column / PANEL * PANEL * depth + column % PANEL;
    bias[column] = !inside ? -INFINITY : c->key_count ? logf((float)c->key_count[place]) : 0.0f;
    for (int64_t channel = 0; channel < channels; channel++, target += PANEL) {
      const float mean = inside ? c->key[place * channels + channel] : 0.0f;
      target[0] = mean;
      if (!c->key_variance) continue;
      const float variance = inside ? c->key_variance[place * channels + channel] : 0.0f;
      target[channels * PANEL] = mean * mean + variance;
      target[2 * channels * PANEL] = variance;
    }
  }
}

/* Up to TASK_ROWS rows of the product from `place` on, scaled. */
static void load_rows(const Comparison *c, int64_t place, int64_t rows, float *target) {
  const int64_t channels = c->channels, depth = depth_of(c);
  const float scale = (float)c->scale, weight = (float)c->weight;
  for (int64_t row = 0; row < rows; row++, target += depth)
    for (int64_t channel = 0, i = (place + row) * channels; channel < channels; channel++, i++) {
      target[channel] = scale * c->query[i];
      if (!c->key_variance) continue;
      target[channels + channel] = weight * c->query_variance[i];
      target[2 * channels + channel] = weight * (c->query[i] * c->query[i]);
    }
}

/* Logits [rows, TILE]. Products of PART channels are added up: one chain over all would round worse. */
static void multiply(const Comparison *c, const float *query, const float *packed, int64_t rows, float *logits) {
  const int64_t depth = depth_of(c);
  float ones[PANEL];
  for (int column = 0; column < PANEL; column++) ones[column] = 1;
  for (int64_t column = 0; column < TILE; column += PANEL, packed += depth * PANEL)
    for (int64_t i = 0; i < depth; i += PART)
      product(query + i, depth, 1, packed + i * PANEL, logits + column, TILE, rows, at_most(depth - i, PART), PANEL,
              i ? ones : 0);
}

/* E4, E5: a task is TASK_ROWS query blocks of one head. */
static void scores_task(const void *argument, int64_t task, float *scratch) {
  const Comparison *c = argument;
  const int64_t stretches = blocks_of(c->query_blocks, TASK_ROWS), head = task / stretches, entry = head / c->heads;
  const int64_t first = task % stretches * TASK_ROWS, rows = at_most(c->query_blocks - first, TASK_ROWS);
  const int64_t group = entry * c->groups + head % c->heads * c->groups / c->heads;
  float *logits = scratch + TASK_ROWS * depth_of(c);
  load_rows(c, head * c->query_blocks + first, rows, scratch);
  for (int64_t tile = 0; tile < tiles_of(c); tile++) {
    multiply(c, scratch, c->packed + (group * tiles_of(c) + tile) * tile_size(c), rows, logits);
    for (int64_t row = 0; row < rows; row++)
      for (int64_t block = tile * TILE; block < at_most((tile + 1) * TILE, c->key_blocks); block++)
        c->scores[(head * c->query_blocks + first + row) * c->key_blocks + block] =
            c->key_size[entry * c->key_blocks + block] ? logits[row * TILE + block % TILE] : -INFINITY;
  }
}

/* Sums of exp(logit - shift) of every block of a tile, shift the maximum of the row up to this tile. */
static __attribute__((noinline)) float tile_sums(const float *bias, float *logits, int64_t width, int64_t blocks,
                                                 float *maximum, float *total, float *sums) {
  vector highest = broadcast(*maximum), all = broadcast(0.0f);
  for (int64_t i = 0; i < TILE; i += LANES) {
    const vector x = load(logits + i) + load(bias + i);
    store(logits + i, x);
    highest = larger(x, highest);
  }
  const float new_maximum = maximum_of_lanes(highest), shift = new_maximum == -INFINITY ? 0.0f : new_maximum;
  for (int64_t block = 0; block < blocks; block++, logits += width) {
    vector sum = broadcast(0.0f);
    for (int64_t i = 0; i < width; i += LANES) sum += power_of_two((load(logits + i) - broadcast(shift)) * broadcast(LOG2_E));
    sums[block] = sum_of_lanes(sum);
    all += sum;
  }
  *total = *total * expf(*maximum - shift) + sum_of_lanes(all);
  *maximum = new_maximum;
  return shift;
}

/* C3, C4: shares [rows, key blocks] of query clusters from `place` on, written to `shares`, whose rows have room for
 * whole tiles. A row without any key is 0. */
static void share_rows(const Comparison *c, int64_t place, int64_t rows, const float *packed, float *scratch,
                       float *shares) {
  const int64_t tiles = tiles_of(c), blocks = tile_blocks(c), row_size = tiles * blocks;
  float *logits = scratch + TASK_ROWS * depth_of(c), *shifts = logits + TASK_ROWS * TILE;
  float maximum[TASK_ROWS], total[TASK_ROWS];
  for (int64_t row = 0; row < TASK_ROWS; row++) maximum[row] = -INFINITY, total[row] = 0;
  load_rows(c, place, rows, scratch);
  for (int64_t tile = 0; tile < tiles; tile++, packed += tile_size(c)) {
    multiply(c, scratch, packed, rows, logits);
    for (int64_t row = 0; row < rows; row++)
      shifts[row * tiles + tile] =
          tile_sums(packed + TILE * depth_of(c), logits + row * TILE, block_width(c), blocks, maximum + row,
                    total + row, shares + row * row_size + tile * blocks);
  }
  for (int64_t row = 0; row < rows; row++)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const float factor = total[row] == 0 ? 0 : expf(shifts[row * tiles + tile] - maximum[row]) / total[row];
      for (int64_t block = 0; block < blocks; block++) shares[row * row_size + tile * blocks + block] *= factor;
    }
}

/* C5, or the mean: a task is as many query blocks of one head as TASK_ROWS clusters hold, one at least. */
static inline int64_t shares_step(const Comparison *c) {
  return c->query_clusters < TASK_ROWS ? TASK_ROWS / c->query_clusters : 1;
}
static void shares_task(const void *argument, int64_t task, float *scratch) {
  const Comparison *c = argument;
  const int64_t stretches = blocks_of(c->query_blocks, shares_step(c)), head = task / stretches;
  const int64_t entry = head / c->heads, group = entry * c->groups + head % c->heads * c->groups / c->heads;
  const int64_t first = head * c->query_blocks + task % stretches * shares_step(c);
  const int64_t end = at_most(first + shares_step(c), (head + 1) * c->query_blocks);
  const int64_t row_size = tiles_of(c) * tile_blocks(c), clusters = c->query_clusters;
  const float *packed = c->packed + group * tiles_of(c) * tile_size(c);
  float *shares = scratch + TASK_ROWS * (depth_of(c) + TILE + tiles_of(c));
  memset(c->scores + first * c->key_blocks, 0, sizeof(float) * (end - first) * c->key_blocks);
  for (int64_t place = first * clusters; place < end * clusters; place += TASK_ROWS) {
    const int64_t rows = at_most(end * clusters - place, TASK_ROWS);
    share_rows(c, place, rows, packed, scratch, shares);
    for (int64_t row = 0; row < rows; row++) {
      float *scores = c->scores + (place + row) / clusters * c->key_blocks, *share = shares + row * row_size;
      const float count = (float)c->query_count[place + row];
      if (count == 0) continue;
      for (int64_t block = 0; block < c->key_blocks; block++)
        scores[block] = !c->peak ? scores[block] + share[block] * count
                        : share[block] > scores[block] ? share[block] : scores[block];
    }
  }
  for (int64_t row = first; row < end; row++) {
    float count = 0;
    for (int64_t cluster = 0; cluster < clusters; cluster++) count += (float)c->query_count[row * clusters + cluster];
    const float divisor = c->peak || count == 0 ? 1 : count;
    for (int64_t block = 0; block < c->key_blocks; block++) {
      float *score = c->scores + row * c->key_blocks + block;
      *score = c->key_size[entry * c->key_blocks + block] ? *score / divisor : -INFINITY;
    }
  }
}

/* Floats of `packed`, and of `scratch` per thread: what the caller must allocate. */
int64_t baatt_packed_size(const Comparison *c) { return c->batch * c->groups * tiles_of(c) * tile_size(c); }
int64_t baatt_comparison_scratch(const Comparison *c) {
  return TASK_ROWS * (depth_of(c) + TILE + tiles_of(c) + tiles_of(c) * tile_blocks(c));
}

void baatt_compare(const Comparison *c) {
  const int64_t size = baatt_comparison_scratch(c), heads = c->batch * c->heads;
  const int64_t step = c->key_count ? shares_step(c) : TASK_ROWS;
  run(c, pack_task, c->batch * c->groups * tiles_of(c), c->threads, c->scratch, size);
  run(c, c->key_count ? shares_task : scores_task, heads * blocks_of(c->query_blocks, step), c->threads, c->scratch,
      size);
}
