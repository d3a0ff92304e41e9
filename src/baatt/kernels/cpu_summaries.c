/* What scores remember of blocks: mean and variance (E3), or clusters (C1, C2); float32 inside, any CPU.
 *
 * One block of one head is one task, all batch entries and heads are one pass. Clusters keep a block in two layouts:
 * tokens as rows, to be added up with vectors of channels, and as columns, whose distances to a centre are vectors of
 * tokens. `Summary` is mirrored in cpu_scores.py. */

#include "cpu_vectors.h"

typedef struct {
  const void *source;     /* batch x heads x tokens x channels, strides in elements, channels contiguous */
  const int64_t *order;   /* batch x heads x tokens: sorted place -> token, places contiguous */
  const int64_t *length;  /* batch: places from it on are masked */
  float *mean;            /* batch x heads x blocks x clusters x channels; one cluster for moments */
  float *variance;        /* like mean, for moments only */
  int64_t *count;         /* batch x heads x blocks x clusters, for clusters only */
  float *scratch;         /* threads x scratch size */
  int64_t source_batch_stride, source_head_stride, source_row_stride, order_batch_stride, order_head_stride;
  int64_t batch, heads, tokens, channels, block_size, clusters, refinements, kind, threads;
} Summary;

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* `kind` */

/* One block; rows and points are padded to whole vectors of channels; columns are panels [channels, width] of tokens,
 * one of which stays in the first cache while all clusters pass over it. */
typedef struct {
  float *rows, *columns, *points, *sums, *nearest, *owner;
  int64_t present, size, width, channels, stride, clusters;
} Block;

static inline float from_bits(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
/* Scaling by 2^112 moves the exponent from half precision's place, subnormal numbers included. */
static inline float from_half(uint16_t x) {
  const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
  const float finite = from_bits(magnitude) * 0x1p112f;
  uint32_t pattern;
  memcpy(&pattern, &finite, sizeof pattern);
  return from_bits(sign | (magnitude < 0x7c00u << 13 ? pattern : magnitude | 0x7f800000u));
}

/* The tokens of block `task` that are there, as rows; returns how many. */
static int64_t gather(const Summary *summary, int64_t task, float *rows) {
  const int64_t channels = summary->channels, stride = padded(channels);
  const int64_t blocks = blocks_of(summary->tokens, summary->block_size);
  const int64_t head = task / blocks % summary->heads, entry = task / blocks / summary->heads;
  const int64_t first = task % blocks * summary->block_size;
  const int64_t *order =
      summary->order + entry * summary->order_batch_stride + head * summary->order_head_stride + first;
  const int64_t start = entry * summary->source_batch_stride + head * summary->source_head_stride;
  const int64_t present = at_most(summary->length[entry] - first, summary->block_size);
  for (int64_t token = 0; token < present; token++, rows += stride) {
    const int64_t place = start + order[token] * summary->source_row_stride;
    const uint16_t *narrow = (const uint16_t *)summary->source + place;
    if (summary->kind == FLOAT32)
      memcpy(rows, (const float *)summary->source + place, sizeof(float) * channels);
    else if (summary->kind == BFLOAT16)
      for (int64_t channel = 0; channel < channels; channel++)
        rows[channel] = from_bits((uint32_t)narrow[channel] << 16);
    else
      for (int64_t channel = 0; channel < channels; channel++) rows[channel] = from_half(narrow[channel]);
    memset(rows + channels, 0, sizeof(float) * (stride - channels));
  }
  return present > 0 ? present : 0;
}

/* Mean over the tokens of LANES channels, of their squared distance from `centre` where `squared`. Sums of 16 tokens
 * are added up: one chain over all would round worse. */
static inline vector mean_of(const float *rows, int64_t stride, int64_t present, vector centre, int squared) {
  vector total = broadcast(0.0f);
  for (int64_t first = 0; first < present; first += 16) {
    vector part = broadcast(0.0f);
    for (int64_t token = first; token < at_most(first + 16, present); token++) {
      const vector x = load(rows + token * stride) - centre;
      part += squared ? x * x : x;
    }
    total += part;
  }
  return present ? total / broadcast((float)present) : total;
}

static void moments_task(const void *argument, int64_t task, float *scratch) {
  const Summary *summary = argument;
  const int64_t channels = summary->channels, stride = padded(channels), present = gather(summary, task, scratch);
  float lanes[LANES];
  for (int64_t channel = 0; channel < channels; channel += LANES) {
    const size_t bytes = sizeof(float) * at_most(channels - channel, LANES);
    const vector mean = mean_of(scratch + channel, stride, present, broadcast(0.0f), 0);
    store(lanes, mean);
    memcpy(summary->mean + task * channels + channel, lanes, bytes);
    store(lanes, mean_of(scratch + channel, stride, present, mean, 1));
    memcpy(summary->variance + task * channels + channel, lanes, bytes);
  }
}

/* Nobody is near any point yet. -1 is below every distance, so absent tokens stay out. */
static void forget(const Block *block) {
  for (int64_t token = 0; token < block->size; token++) {
    block->nearest[token] = token < block->present ? INFINITY : -1.0f;
    block->owner[token] = 0; /* read as an integer */
  }
}

/* Hands some vectors of tokens over to a cluster where its point is nearer; of equal ones the earlier keeps them. */
static inline __attribute__((always_inline)) void claim(const Block *block, int64_t token, int64_t cluster,
                                                        const int vectors) {
  const float *point = block->points + cluster * block->stride, *column = block->columns + token * block->channels;
  vector distance[8];
  for (int i = 0; i < vectors; i++) distance[i] = broadcast(0.0f);
#pragma GCC unroll 4
  for (int64_t channel = 0; channel < block->channels; channel++, column += vectors * LANES) {
    const vector centre = broadcast(point[channel]);
    for (int i = 0; i < vectors; i++) {
      const vector difference = load(column + i * LANES) - centre;
      distance[i] += difference * difference;
    }
  }
  const vector name = (vector)((bits){0} + (int32_t)cluster);
  for (int i = 0; i < vectors; i++) {
    float *nearest = block->nearest + token + i * LANES, *owner = block->owner + token + i * LANES;
    const bits nearer = distance[i] < load(nearest);
    store(nearest, choose(nearer, distance[i], load(nearest)));
    store(owner, choose(nearer, name, load(owner)));
  }
}

/* Lets clusters claim all tokens. */
static __attribute__((noinline)) void claim_all(const Block *block, int64_t first, int64_t end) {
  for (int64_t token = 0; token < block->size; token += block->width)
    for (int64_t cluster = first; cluster < end; cluster++)
      switch (block->width / LANES) {
        case 8: claim(block, token, cluster, 8); break;
        case 4: claim(block, token, cluster, 4); break;
        case 2: claim(block, token, cluster, 2); break;
        default: claim(block, token, cluster, 1);
      }
}

/* Moves every point to the mean of the tokens it owns, if any, and counts them. As in `mean_of` sums of 16 tokens are
 * added up: `sums` holds the one under way and the total of each cluster. */
static void average(const Block *block, int64_t *count) {
  const int64_t stride = block->stride;
  memset(block->sums, 0, sizeof(float) * block->clusters * 2 * stride);
  memset(count, 0, sizeof(int64_t) * block->clusters);
  for (int64_t token = 0; token < block->present; token++) {
    int32_t owner;
    memcpy(&owner, block->owner + token, sizeof owner);
    const float *row = block->rows + token * stride;
    float *part = block->sums + owner * 2 * stride, *total = part + stride;
    const int full = ++count[owner] % 16 == 0;
    for (int64_t channel = 0; channel < stride; channel += LANES) {
      const vector sum = load(part + channel) + load(row + channel);
      store(part + channel, full ? broadcast(0.0f) : sum);
      if (full) store(total + channel, load(total + channel) + sum);
    }
  }
  for (int64_t cluster = 0; cluster < block->clusters; cluster++) {
    const float *part = block->sums + cluster * 2 * stride, *total = part + stride;
    for (int64_t channel = 0; count[cluster] && channel < stride; channel += LANES)
      store(block->points + cluster * stride + channel,
            (load(total + channel) + load(part + channel)) / broadcast((float)count[cluster]));
  }
}

/* The first token of the largest distance to all points so far. */
static int64_t farthest(const Block *block) {
  vector highest = load(block->nearest);
  for (int64_t token = LANES; token < block->size; token += LANES) {
    highest = larger(load(block->nearest + token), highest);
  }
  const float distance = maximum_of_lanes(highest);
  int64_t token = 0;
  while (block->nearest[token] != distance) token++;
  return token;
}

/* C1: the token nearest to the mean, then each time the one farthest from all before; C2 begins on the way. */
static void spread(const Block *block, int64_t *count) {
  const size_t row_bytes = sizeof(float) * block->stride;
  forget(block);
  average(block, count); /* of one cluster, the first */
  claim_all(block, 0, 1);
  int64_t chosen = 0;
  for (int64_t token = 1; token < block->present; token++)
    if (block->nearest[token] < block->nearest[chosen]) chosen = token;
  forget(block);
  for (int64_t cluster = 0; cluster < block->clusters; cluster++) {
    memcpy(block->points + cluster * block->stride, block->rows + chosen * block->stride, row_bytes);
    claim_all(block, cluster, cluster + 1);
    chosen = farthest(block);
  }
}

static void clusters_task(const void *argument, int64_t task, float *scratch) {
  const Summary *summary = argument;
  const int64_t channels = summary->channels, stride = padded(channels);
  const int64_t size = summary->block_size, clusters = summary->clusters;
  int64_t *count = summary->count + task * clusters;
  float *mean = summary->mean + task * clusters * channels, *columns = scratch + size * stride;
  float *points = columns + size * channels, *sums = points + clusters * stride;
  float *nearest = sums + clusters * 2 * stride, *owner = nearest + size;
  const int64_t present = gather(summary, task, scratch);
  const int64_t width = at_most(size, 8 * LANES);
  const Block block = {scratch, columns, points, sums,     nearest, owner,
                       present, size,    width,  channels, stride,  clusters};
  if (present == 0) {
    memset(count, 0, sizeof(int64_t) * clusters);
    memset(mean, 0, sizeof(float) * clusters * channels);
    return;
  }
  memset(scratch + present * stride, 0, sizeof(float) * (size - present) * stride);
  for (int64_t token = 0; token < size; token += LANES)
    for (int64_t channel = 0; channel < channels; channel++) {
      vector x;
      for (int i = 0; i < LANES; i++) x[i] = scratch[(token + i) * stride + channel];
      store(columns + token / width * width * channels + channel * width + token % width, x);
    }
  spread(&block, count);
  average(&block, count);
  for (int64_t round = 0; round < summary->refinements; round++) {
    forget(&block);
    claim_all(&block, 0, clusters);
    average(&block, count);
  }
  for (int64_t cluster = 0; cluster < clusters; cluster++)
    for (int64_t channel = 0; channel < channels; channel++)
      mean[cluster * channels + channel] = count[cluster] ? points[cluster * stride + channel] : 0.0f;
}

/* Floats of `scratch` per thread: what the caller must allocate. */
int64_t baatt_summary_scratch(const Summary *summary) {
  const int64_t stride = padded(summary->channels), size = summary->block_size;
  return size * (stride + summary->channels + 2) + 3 * summary->clusters * stride;
}

static void summarise(const Summary *summary, void (*task)(const void *, int64_t, float *)) {
  const int64_t tasks = summary->batch * summary->heads * blocks_of(summary->tokens, summary->block_size);
  run(summary, task, tasks, summary->threads, summary->scratch, baatt_summary_scratch(summary));
}
void baatt_moments(const Summary *summary) { summarise(summary, moments_task); }
void baatt_clusters(const Summary *summary) { summarise(summary, clusters_task); }
