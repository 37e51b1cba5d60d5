// The kernels of rows.h for the instruction set VLMO_INSTRUCTIONS. All compute in float32.
#include "rows.h"

#include "simd.h"

namespace vlmo {
namespace {

// Elements of a row, in vectors; the last one may be shorter.
struct Row {
  char* data;
  Type type;

  Floats load(std::int64_t at, std::int64_t count) const {
    if (type == Type::kFloat32) return load_some(floats() + at, count);
    return widen(type, load_bits(halves() + at, count));
  }

  void store(std::int64_t at, Floats x, std::int64_t count) const {
    if (type == Type::kFloat32) return store_some(floats() + at, x, count);
    store_bits(halves() + at, narrow(type, x), count);
  }

 private:
  float* floats() const { return reinterpret_cast<float*>(data); }
  std::uint16_t* halves() const { return reinterpret_cast<std::uint16_t*>(data); }
};

Row row_of(const Matrix& m, std::int64_t row) {
  const std::int64_t bytes = m.type == Type::kFloat32 ? 4 : 2;
  return {static_cast<char*>(m.data) + row * m.row * bytes, m.type};
}

std::int64_t token_of(const Tokens& t, std::int64_t row) {
  return t.index != nullptr ? t.index[row] : row / t.length * t.period + t.start + row % t.length;
}

// Calls f(at, count) for the vectors of a row.
template <class F>
inline void for_vectors(std::int64_t columns, F&& f) {
  for (std::int64_t at = 0; at < columns; at += kLanes) {
    f(at, smaller(kLanes, columns - at));
  }
}

inline void add_to(float* sums, std::int64_t at, Floats x, std::int64_t count) {
  store_some(sums + at, load_some(sums + at, count) + x, count);
}

void norm(const RowsCall& call, std::int64_t first, std::int64_t last, float*, float*) {
  const float size = static_cast<float>(call.columns);
  for (std::int64_t r = first; r < last; ++r) {
    const Row x = row_of(call.x, token_of(call.tokens, r)), to = row_of(call.normed, r);
    float mean = 0;
    if (call.mean != nullptr) {
      Floats total{};
      for_vectors(call.columns, [&](auto at, auto count) { total += x.load(at, count); });
      mean = call.mean[r] = sum(total) / size;
    }
    Floats squares{};
    for_vectors(call.columns, [&](auto at, auto count) {
      const Floats off = first_lanes(x.load(at, count) - splat(mean), count);
      squares += off * off;
    });
    const float deviation = 1 / __builtin_sqrtf(sum(squares) / size + call.eps);
    call.deviation[r] = deviation;
    for_vectors(call.columns, [&](auto at, auto count) {
      Floats value = (x.load(at, count) - splat(mean)) * splat(deviation);
      value *= load_some(call.weight + at, count);
      if (call.bias != nullptr) value += load_some(call.bias + at, count);
      to.store(at, value, count);
    });
  }
}

void norm_backward(const RowsCall& call, std::int64_t first, std::int64_t last, float* dweight,
                   float* dbias) {
  const float size = static_cast<float>(call.columns);
  for (std::int64_t r = first; r < last; ++r) {
    const Row x = row_of(call.x, token_of(call.tokens, r)), d = row_of(call.d, r);
    const Floats mean = splat(call.mean == nullptr ? 0 : call.mean[r]);
    const Floats deviation = splat(call.deviation[r]);
    Floats total{}, with_x{};
    for_vectors(call.columns, [&](auto at, auto count) {
      const Floats dy = d.load(at, count), unit = (x.load(at, count) - mean) * deviation;
      const Floats dunit = dy * load_some(call.weight + at, count);  // 0 beyond the columns
      total += dunit;
      with_x += dunit * unit;
      add_to(dweight, at, dy * unit, count);
      add_to(dbias, at, dy, count);
    });
    if (call.dx.data == nullptr) continue;
    const Row dx = row_of(call.dx, token_of(call.tokens, r));
    const Floats offset = splat(call.mean == nullptr ? 0 : sum(total) / size);
    const Floats slope = splat(sum(with_x) / size);
    for_vectors(call.columns, [&](auto at, auto count) {
      const Floats unit = (x.load(at, count) - mean) * deviation;
      const Floats dunit = d.load(at, count) * load_some(call.weight + at, count);
      dx.store(at, (dunit - offset - unit * slope) * deviation, count);
    });
  }
}

void branch(const RowsCall& call, std::int64_t first, std::int64_t last, float*, float*) {
  for (std::int64_t r = first; r < last; ++r) {
    const std::int64_t token = token_of(call.tokens, r);
    const Row from = row_of(call.branch, r), y = row_of(call.y, token);
    const Floats factor = splat(call.token_scale == nullptr ? 1 : call.token_scale[token]);
    for_vectors(call.columns, [&](auto at, auto count) {
      Floats value = from.load(at, count);
      if (call.bias != nullptr) value += load_some(call.bias + at, count);
      if (call.scale != nullptr) value *= load_some(call.scale + at, count);
      value *= factor;
      if (call.residual.data != nullptr) value += row_of(call.residual, token).load(at, count);
      y.store(at, value, count);
    });
  }
}

void branch_backward(const RowsCall& call, std::int64_t first, std::int64_t last, float* sums,
                     float* dscale) {
  for (std::int64_t r = first; r < last; ++r) {
    const std::int64_t token = token_of(call.tokens, r);
    const Row dy = row_of(call.dy, token), d = row_of(call.d, r);
    const Floats factor = splat(call.token_scale == nullptr ? 1 : call.token_scale[token]);
    for_vectors(call.columns, [&](auto at, auto count) {
      const Floats before = dy.load(at, count) * factor;
      if (call.branch.data != nullptr) {
        add_to(dscale, at, before * row_of(call.branch, r).load(at, count), count);
      }
      const Floats value =
          call.scale == nullptr ? before : before * load_some(call.scale + at, count);
      add_to(sums, at, value, count);
      d.store(at, value, count);
    });
  }
}

void column_sums(const RowsCall& call, std::int64_t first, std::int64_t last, float* sums,
                 float*) {
  for (std::int64_t r = first; r < last; ++r) {
    const Row d = row_of(call.d, r);
    for_vectors(call.columns, [&](auto at, auto count) {
      add_to(sums, at, d.load(at, count), count);
    });
  }
}

}  // namespace

namespace VLMO_INSTRUCTIONS {
extern const RowsKernels rows;
const RowsKernels rows{norm, norm_backward, branch, branch_backward, column_sums};
}  // namespace VLMO_INSTRUCTIONS

}  // namespace vlmo
