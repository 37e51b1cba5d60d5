// Matrix products of the tensor cores. They accumulate in float32, one product after the other; the
// hardware rounds differently in the last bits.
#pragma once
#include "arithmetic.h"

enum OperandType { F16, BF16, TF32 };

inline f32 operand(u32 bits, OperandType type) {
  return type == F16 ? from_half(bits) : type == BF16 ? from_bfloat(bits) : as_float(bits & 0xffffe000u);
}

// Fragments: lane l holds, of the left operand [16, K], rows l / 4 and l / 4 + 8; of the right
// operand [K, 8], column l / 4; of the accumulators [16, 8], the rows of the left operand and columns
// 2 (l % 4) and the next. A register holds two 16-bit operands that are neighbours along K.
template <OperandType TYPE, int K> void load_left(Warp& w, const s64* registers, f32 (&to)[16][16]) {
  for (int k = 0; k < 4; k++) {
    const u32* from = w.at<u32>(registers[k]);
    for (int l = 0; l < LANES; l++) {
      const int row = l / 4 + (k & 1) * 8;
      if (TYPE == TF32) {
        to[row][l % 4 + (k >> 1) * 4] = operand(from[l], TYPE);
      } else {
        const int column = l % 4 * 2 + (k >> 1) * 8;
        to[row][column] = operand(from[l] & 0xffff, TYPE);
        to[row][column + 1] = operand(from[l] >> 16, TYPE);
      }
    }
  }
}

// operands of mma.sync.m16n8: 4 registers of the result, 4 of the left operand, 2 of the right one, 4 of
// the accumulators
template <OperandType TYPE> void multiply(Warp& w, const Instruction& i) {
  constexpr int K = TYPE == TF32 ? 8 : 16;
  if (!whole_warp(w, i)) return;
  f32 left[16][16], right[K][8], sums[16][8];
  load_left<TYPE, K>(w, i.operands + 4, left);
  for (int k = 0; k < 2; k++) {
    const u32* from = w.at<u32>(i.operands[8 + k]);
    for (int l = 0; l < LANES; l++)
      if (TYPE == TF32) {
        right[l % 4 + k * 4][l / 4] = operand(from[l], TYPE);
      } else {
        right[l % 4 * 2 + k * 8][l / 4] = operand(from[l] & 0xffff, TYPE);
        right[l % 4 * 2 + k * 8 + 1][l / 4] = operand(from[l] >> 16, TYPE);
      }
  }
  const auto sum_of = [&](int l, int k) -> f32& { return sums[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)]; };
  for (int k = 0; k < 4; k++)
    for (int l = 0; l < LANES; l++) sum_of(l, k) = w.at<f32>(i.operands[10 + k])[l];
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      for (int c = 0; c < 8; c++) sums[r][c] += left[r][k] * right[k][c];
  for (int k = 0; k < 4; k++)
    for (int l = 0; l < LANES; l++) w.at<f32>(i.operands[k])[l] = sum_of(l, k);
}

// ---- wgmma: each warp of a warpgroup of four has 16 rows of a product [64, N]. Descriptors define the
// layout of operands in shared memory (PTX ISA, "Asynchronous warpgroup matrix multiply-accumulate").
struct Descriptor {
  u32 start, leading, stride;  // bytes
  int swizzle;                 // bytes of a swizzled row; 16: none
  explicit Descriptor(u64 bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
        swizzle((bits >> 62) == 1 ? 128 : (bits >> 62) == 2 ? 64 : (bits >> 62) == 3 ? 32 : 16) {}

  // The address of the element of row (or column) r at depth k. `across`: elements of the same depth
  // are contiguous (MN-major), else those of the same row (K-major).
  u32 place(int r, int k, bool across, int size) const {
    u32 at;
    if (across) {
      const int per_row = swizzle / size;
      if (swizzle > 16) at = r / per_row * leading + r % per_row * size + k / 8 * stride + k % 8 * swizzle;
      else at = r / 8 * stride + r % 8 * size + k / 8 * leading + k % 8 * 16;
    } else {
      if (swizzle > 16) at = r / 8 * stride + r % 8 * swizzle + k * size;
      else at = r / 8 * stride + r % 8 * 16 + k * size / 16 * leading + k * size % 16;
    }
    at += start;
    return swizzle > 16 ? at ^ (at >> 3 & (swizzle - 16)) : at;
  }
};

// operands: type, N, whether the left operand is in registers, whether each operand is MN-major, predicate
// whether to accumulate (or -1), the same as a constant, the left operand (4 registers or a
// descriptor), the descriptor of the right one, registers of the accumulators
constexpr int WG_LEFT = 7;

inline f32 shared_operand(Warp& w, const Instruction& i, u32 address, OperandType type) {
  const u32 size = type == TF32 ? 4 : 2;
  const u8* from = shared_at(w, i, address, size, size);
  if (!from) return 0;
  const SharedShadow* s = &w.cta->shadow[address];
  if (w.cta->machine->options.races && s->write.thread && !fenced(w, s->write, SHARED))
    w.cta->machine->report(Finding::NO_PROXY_FENCE, w, 0, i.number, address, s->write.thread, s->write.at);
  read_shared(w, 0, i.number, address, size);
  u32 bits = 0;
  memcpy(&bits, from, size);
  return operand(bits, type);
}

// The hardware may read the operands at any time from the issue to the wait. If they are read at the
// wait, the issue also checks the accesses (only_look), so that both ends are covered.
template <OperandType TYPE> void multiply_group(Warp& w, const Product& product, bool only_look) {
  constexpr int K = TYPE == TF32 ? 8 : 16, SIZE = TYPE == TF32 ? 4 : 2;
  const Instruction& i = *product.instruction;
  Machine& m = *w.cta->machine;
  const int columns = i.operands[1];
  const bool in_registers = i.operands[2];
  const s64* results = i.operands + WG_LEFT + (in_registers ? 5 : 2);
  f32 left[16][16];
  std::vector<f32> right(K * columns), sums(16 * columns, 0.f);
  if (in_registers) {
    load_left<TYPE, K>(w, i.operands + WG_LEFT, left);
  } else {
    const Descriptor a(product.a);
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < K; k++)
        left[r][k] = shared_operand(w, i, a.place(w.id % 4 * 16 + r, k, i.operands[3], SIZE), TYPE);
  }
  const Descriptor b(product.b);
  for (int k = 0; k < K; k++)
    for (int n = 0; n < columns; n++)
      right[k * columns + n] = shared_operand(w, i, b.place(n, k, i.operands[4], SIZE), TYPE);
  if (only_look || !m.error.empty()) return;
  const auto sum_of = [&](int j, int l, int k) -> f32& {
    return sums[(l / 4 + (k >> 1) * 8) * columns + j * 8 + l % 4 * 2 + (k & 1)];
  };
  const auto each = [&](auto f) {
    for (int j = 0; j < columns / 8; j++)
      for (int k = 0; k < 4; k++)
        for (int l = 0; l < LANES; l++) f(w.at<f32>(results[j * 4 + k])[l], sum_of(j, l, k));
  };
  if (product.accumulate) each([](f32& in_register, f32& sum) { sum = in_register; });
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < columns; n++) sums[r * columns + n] += left[r][k] * right[k * columns + n];
  each([](f32& in_register, f32& sum) { in_register = sum; });
}

inline void run_product(Warp& w, const Product& product, bool only_look = false) {
  const s64 type = product.instruction->operands[0];
  if (type == F16) multiply_group<F16>(w, product, only_look);
  else if (type == BF16) multiply_group<BF16>(w, product, only_look);
  else multiply_group<TF32>(w, product, only_look);
}

// The accumulators, and the left operand if it is in registers.
inline std::vector<s64> registers_of(const Instruction& i) {
  const bool in_registers = i.operands[2];
  std::vector<s64> places(i.operands + WG_LEFT + (in_registers ? 5 : 2), i.operands + i.size);
  if (in_registers) places.insert(places.end(), i.operands + WG_LEFT, i.operands + WG_LEFT + 4);
  return places;
}

inline void start_product(Warp& w, const Instruction& i) {
  if (!whole_warp(w, i)) return;
  const s64* o = i.operands;
  const bool in_registers = o[2];
  const Product product = {&i, o[5] >= 0 ? (bool)(*w.at<u32>(o[5]) & 1) : (bool)o[6],
                           in_registers ? 0 : w.at<u64>(o[WG_LEFT])[0], w.at<u64>(o[WG_LEFT + (in_registers ? 4 : 1)])[0]};
  for (const s64 place : registers_of(i)) w.used_by_products[place]++;
  w.products.push_back(product);
  run_product(w, product, /* only_look */ w.cta->machine->options.late);
}

// Only other products may access the registers of a product in flight.
inline void check_registers(Warp& w, const Instruction& i) {
  if (i.run == start_product) return;
  for (int k = 0; k < i.touches; k++)
    if (w.used_by_products.count(i.touched[k])) {
      const auto& [groups, open] = std::tie(w.product_groups, w.products);
      const Instruction* other = open.empty() ? nullptr : open.front().instruction;
      for (auto& group : groups)
        if (!group.empty()) other = group.front().instruction;
      w.cta->machine->report(Finding::REGISTER_IN_FLIGHT, w, 0, i.number, 0, 0, other ? other->number : -1);
    }
}

inline void commit_products(Warp& w, const Instruction&) {
  w.product_groups.push_back(std::move(w.products));
  w.products.clear();
}

// operand of wgmma.wait_group: the number of groups that may still be in flight
inline void wait_products(Warp& w, const Instruction& i) {
  while (w.product_groups.size() > (size_t)i.operands[0]) {
    for (auto& product : w.product_groups.front()) {
      if (w.cta->machine->options.late) run_product(w, product);
      for (const s64 place : registers_of(*product.instruction))
        if (!--w.used_by_products[place]) w.used_by_products.erase(place);
    }
    w.product_groups.pop_front();
  }
}
