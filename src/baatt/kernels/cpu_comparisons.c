/* How blocks compare: covariance scores (E4, E5), or the shares of clusters (C3-C5); float32, any CPU.
 *
 * As in attention queries are the lanes of all vectors: a task takes a panel of WIDTH query blocks, or of their
 * clusters, of one head through all key blocks, tile by tile. All batch entries and heads are one pass. `Comparison` is
 * mirrored in cpu_scores.py. */

#include "cpu_vectors.h"

#define TILE 128 /* rows of keys whose logits stay in the first cache */
#define PART 64

typedef struct {
  const float *query, *key;                    /* batch x heads x blocks x clusters x channels: means */
  const float *query_variance, *key_variance;  /* like the means; 0 where not compared */
  const int64_t *query_count, *key_count;      /* batch x heads x blocks x clusters: tokens; 0 for covariance */
  const int64_t *key_size;                     /* batch x key blocks: tokens */
  const int32_t *spans;                        /* batch x query blocks x 4: the last is key blocks seen; 0: all are */
  float *scores;                               /* batch x heads x query blocks x key blocks */
  float *scratch;                              /* threads x baatt_comparison_scratch */
  int64_t batch, heads, groups, query_blocks, key_blocks, query_clusters, key_clusters, channels, peak, threads;
  double scale, weight;                        /* of q.k; of the compensation */
} Comparison;

static inline int64_t tile_blocks(const Comparison *c) { return TILE / c->key_clusters; }
static inline int64_t depth_of(const Comparison *c) { return c->channels * (c->key_variance ? 3 : 1); }
/* Head of the keys of a head of queries, over all batch entries. */
static inline int64_t group_of(const Comparison *c, int64_t head) {
  return head / c->heads * c->groups + head % c->heads * c->groups / c->heads;
}

/* Queries from `place` on as lanes [depth, WIDTH], scaled; the rest is 0. */
static void load_panel(const Comparison *c, int64_t place, int64_t lanes, float *panel) {
  const int64_t channels = c->channels, size = channels * WIDTH;
  const float scale = (float)c->scale, weight = (float)c->weight;
  memset(panel, 0, sizeof(float) * depth_of(c) * WIDTH);
  for (int64_t lane = 0; lane < lanes; lane++)
    for (int64_t channel = 0, i = (place + lane) * channels; channel < channels; channel++, i++) {
      float *target = panel + channel * WIDTH + lane;
      target[0] = scale * c->query[i];
      if (!c->key_variance) continue;
      target[size] = weight * c->query_variance[i];
      target[2 * size] = weight * (c->query[i] * c->query[i]);
    }
}

/* Products of PART channels are added up: one chain over all would round worse. */
static void add_product(const float *keys, int64_t rows, int64_t channels, const float *panel, float *logits,
                        int first) {
  float ones[WIDTH];
  for (int lane = 0; lane < WIDTH; lane++) ones[lane] = 1;
  for (int64_t i = 0; i < channels; i += PART, first = 0)
    product(keys + i, channels, 1, panel + i * WIDTH, logits, WIDTH, rows, at_most(channels - i, PART), WIDTH,
            first ? 0 : ones);
}

/* Logits [rows, WIDTH] of keys from `place` on; `moments` has room for the rows. */
static void multiply(const Comparison *c, int64_t place, int64_t rows, const float *panel, float *logits,
                     float *moments) {
  const int64_t channels = c->channels, size = channels * WIDTH;
  const float *mean = c->key + place * channels;
  add_product(mean, rows, channels, panel, logits, 1);
  if (!c->key_variance) return;
  const float *variance = c->key_variance + place * channels;
  for (int64_t i = 0; i < rows * channels; i++) moments[i] = mean[i] * mean[i] + variance[i];
  add_product(moments, rows, channels, panel + size, logits, 0);
  add_product(variance, rows, channels, panel + 2 * size, logits, 0);
}

/* E4, E5: a task is WIDTH query blocks of one head. */
static void scores_task(const void *argument, int64_t task, float *scratch) {
  const Comparison *c = argument;
  const int64_t panels = blocks_of(c->query_blocks, WIDTH), head = task / panels;
  const int64_t keys = group_of(c, head) * c->key_blocks;
  const int64_t first = task % panels * WIDTH, lanes = at_most(c->query_blocks - first, WIDTH);
  const int64_t *size = c->key_size + head / c->heads * c->key_blocks;
  float *logits = scratch + depth_of(c) * WIDTH, *scores = c->scores + (head * c->query_blocks + first) * c->key_blocks;
  load_panel(c, head * c->query_blocks + first, lanes, scratch);
  for (int64_t start = 0; start < c->key_blocks; start += TILE) {
    const int64_t rows = at_most(c->key_blocks - start, TILE);
    multiply(c, keys + start, rows, scratch, logits, logits + TILE * WIDTH);
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t row = 0; row < rows; row++)
        scores[lane * c->key_blocks + start + row] = size[start + row] ? logits[row * WIDTH + lane] : -INFINITY;
  }
}

/* Sums [blocks, WIDTH] of exp(logit - shift), each as often as its cluster has tokens, of the maximum up to here. */
static __attribute__((noinline)) void tile_sums(const float *logits, const int64_t *count, int64_t clusters,
                                                int64_t blocks, float *maximum, float *total, float *shifts,
                                                float *sums) {
  const vector lowest = broadcast(-INFINITY);
  for (int64_t column = 0; column < WIDTH; column += LANES) {
    vector highest = lowest, all = broadcast(0.0f);
    for (int64_t row = 0; row < blocks * clusters; row++)
      if (count[row]) highest = larger(load(logits + row * WIDTH + column), highest);
    const vector before = load(maximum + column), after = larger(highest, before);
    const vector shift = choose(after == lowest, broadcast(0.0f), after);
    for (int64_t block = 0; block < blocks; block++) {
      vector sum = broadcast(0.0f);
      for (int64_t row = block * clusters; row < (block + 1) * clusters; row++)
        if (count[row])
          sum += broadcast((float)count[row]) * exponential(load(logits + row * WIDTH + column) - shift);
      store(sums + block * WIDTH + column, sum);
      all += sum;
    }
    store(total + column, load(total + column) * exponential(before - shift) + all);
    store(maximum + column, after);
    store(shifts + column, shift);
  }
}

/* Key blocks that the query block of number `block` sees, over all batch entries and heads. */
static inline int64_t seen_by(const Comparison *c, int64_t block) {
  const int64_t entry = block / c->query_blocks / c->heads;
  return c->spans ? c->spans[(entry * c->query_blocks + block % c->query_blocks) * 4 + 3] : c->key_blocks;
}

/* C3, C4: shares [key blocks, WIDTH] of query clusters from `place` on. Without any key they are 0.
 * Returns how many key blocks any of them sees; shares beyond are not written. */
static int64_t share_panel(const Comparison *c, int64_t place, int64_t lanes, int64_t group, float *scratch,
                        float *shares) {
  const int64_t blocks = tile_blocks(c), clusters = c->key_clusters;
  float *logits = scratch + depth_of(c) * WIDTH, *shifts = logits + TILE * WIDTH;
  float maximum[WIDTH], total[WIDTH] = {0};
  int64_t seen[WIDTH], end = 0;
  for (int64_t lane = 0; lane < lanes; lane++) {
    seen[lane] = seen_by(c, (place + lane) / c->query_clusters);
    end = seen[lane] > end ? seen[lane] : end;
  }
  for (int lane = 0; lane < WIDTH; lane++) maximum[lane] = -INFINITY;
  load_panel(c, place, lanes, scratch);
  for (int64_t block = 0; block < end; block += blocks) {
    const int64_t first = (group * c->key_blocks + block) * clusters, some = at_most(end - block, blocks);
    multiply(c, first, some * clusters, scratch, logits, 0);
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t row = (seen[lane] > block ? seen[lane] - block : 0) * clusters; row < some * clusters; row++)
        logits[row * WIDTH + lane] = -INFINITY;
    tile_sums(logits, c->key_count + first, clusters, some, maximum, total, shifts + block / blocks * WIDTH,
              shares + block * WIDTH);
  }
  for (int64_t block = 0; block < end; block++)
    for (int64_t column = 0; column < WIDTH; column += LANES) {
      const vector sum = load(total + column), shift = load(shifts + block / blocks * WIDTH + column);
      const vector factor = exponential(shift - load(maximum + column)) / sum;
      float *share = shares + block * WIDTH + column;
      store(share, choose(sum == broadcast(0.0f), broadcast(0.0f), load(share) * factor));
    }
  return end;
}

/* C5, or the mean: a task is as many query blocks of one head as WIDTH clusters hold, one at least. */
static inline int64_t shares_step(const Comparison *c) {
  return c->query_clusters < WIDTH ? WIDTH / c->query_clusters : 1;
}
static void shares_task(const void *argument, int64_t task, float *scratch) {
  const Comparison *c = argument;
  const int64_t stretches = blocks_of(c->query_blocks, shares_step(c)), head = task / stretches;
  const int64_t first = head * c->query_blocks + task % stretches * shares_step(c), clusters = c->query_clusters;
  const int64_t end = at_most(first + shares_step(c), (head + 1) * c->query_blocks);
  const int64_t *size = c->key_size + head / c->heads * c->key_blocks;
  float *shares = scratch + (depth_of(c) + TILE + blocks_of(c->key_blocks, tile_blocks(c))) * WIDTH;
  memset(c->scores + first * c->key_blocks, 0, sizeof(float) * (end - first) * c->key_blocks);
  for (int64_t place = first * clusters; place < end * clusters; place += WIDTH) {
    const int64_t lanes = at_most(end * clusters - place, WIDTH);
    const int64_t seen = share_panel(c, place, lanes, group_of(c, head), scratch, shares);
    for (int64_t lane = 0; lane < lanes; lane++) {
      float *scores = c->scores + (place + lane) / clusters * c->key_blocks;
      const float *share = shares + lane, count = (float)c->query_count[place + lane];
      if (count == 0) continue;
      for (int64_t block = 0; block < seen; block++, share += WIDTH)
        scores[block] = !c->peak ? scores[block] + *share * count : *share > scores[block] ? *share : scores[block];
    }
  }
  for (int64_t row = first; row < end; row++) {
    float count = 0;
    for (int64_t cluster = 0; cluster < clusters; cluster++) count += (float)c->query_count[row * clusters + cluster];
    const float divisor = c->peak || count == 0 ? 1 : count;
    for (int64_t block = 0; block < c->key_blocks; block++) {
      float *score = c->scores + row * c->key_blocks + block;
      *score = size[block] ? *score / divisor : -INFINITY;
    }
  }
}

/* Floats of `scratch` per thread: what the caller must allocate. */
int64_t baatt_comparison_scratch(const Comparison *c) {
  const int64_t shares = blocks_of(c->key_blocks, tile_blocks(c)) + c->key_blocks;
  return (depth_of(c) + TILE) * WIDTH + (c->key_count ? shares * WIDTH : TILE * c->channels);
}

void baatt_compare(const Comparison *c) {
  const int64_t step = c->key_count ? shares_step(c) : WIDTH;
  run(c, c->key_count ? shares_task : scores_task, c->batch * c->heads * blocks_of(c->query_blocks, step), c->threads,
      c->scratch, baatt_comparison_scratch(c));
}
