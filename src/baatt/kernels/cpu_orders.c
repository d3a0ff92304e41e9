/* Norm-based segment sorting (E2), any CPU: `mask_task` moves the masked tokens of an entry behind all others,
 * `sort_task` then sorts one segment of one head by given norms. `Order` is mirrored in cpu_orders.py. */

#include "cpu_vectors.h"

typedef struct {
  const float *norm;    /* batch x heads x tokens */
  const uint8_t *mask;  /* batch x tokens, 0 = masked; 0 where all count */
  int64_t *places;      /* batch x tokens: the tokens, masked ones behind the others */
  int64_t *length;      /* batch: how many are not masked */
  int64_t *index;       /* batch x heads x tokens: the result */
  float *scratch;       /* threads x 4 x segment */
  int64_t batch, heads, tokens, segment, threads;
} Order;

static void mask_task(const void *argument, int64_t entry, float *scratch) {
  const Order *order = argument;
  (void)scratch;
  const uint8_t *mask = order->mask ? order->mask + entry * order->tokens : 0;
  int64_t *places = order->places + entry * order->tokens, count = 0;
  for (int64_t token = 0; token < order->tokens; token++)
    if (!mask || mask[token]) places[count++] = token;
  order->length[entry] = count;
  for (int64_t token = 0; token < order->tokens; token++)
    if (mask && !mask[token]) places[count++] = token;
}

/* By the upper half of the keys, byte by byte from the lowest; equal ones keep their order. `other` is as large. */
static void sort_upper(uint64_t *keys, uint64_t *other, int64_t count) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t start[257] = {0};
    for (int64_t i = 0; i < count; i++) start[(keys[i] >> shift & 255) + 1]++;
    for (int byte = 0; byte < 255; byte++) start[byte + 1] += start[byte];
    for (int64_t i = 0; i < count; i++) other[start[keys[i] >> shift & 255]++] = keys[i];
    uint64_t *sorted = other;
    other = keys, keys = sorted;
  }
}

/* The bits of norms, which are not negative, are in the order of the norms; a key is these and the place. What is not a
 * number is infinite, and so are masked tokens, which stand behind all others and stay there. */
static void sort_task(const void *argument, int64_t task, float *scratch) {
  const Order *order = argument;
  const int64_t tokens = order->tokens, segments = blocks_of(tokens, order->segment), head = task / segments;
  const int64_t entry = head / order->heads, first = task % segments * order->segment;
  const int64_t count = at_most(tokens - first, order->segment);
  const int64_t *places = order->places + entry * tokens + first;
  uint64_t *keys = (uint64_t *)scratch;
  for (int64_t i = 0; i < count; i++) {
    const float norm = first + i < order->length[entry] ? order->norm[head * tokens + places[i]] : INFINITY;
    const float number = norm == norm ? norm : INFINITY;
    uint32_t pattern;
    memcpy(&pattern, &number, sizeof pattern);
    keys[i] = (uint64_t)pattern << 32 | (uint64_t)i;
  }
  sort_upper(keys, keys + order->segment, count);
  for (int64_t i = 0; i < count; i++) order->index[head * tokens + first + i] = places[keys[i] & 0xffffffff];
}

void baatt_sort(const Order *order) {
  const int64_t size = 4 * order->segment, segments = blocks_of(order->tokens, order->segment);
  run(order, mask_task, order->batch, order->threads, order->scratch, size);
  run(order, sort_task, order->batch * order->heads * segments, order->threads, order->scratch, size);
}
