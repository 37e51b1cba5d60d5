#include "cpu/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace vlmo {
namespace {

using Address = std::uintptr_t;
using Strided = std::array<std::int64_t, 4>;  // address; strides of sequences, tokens, heads
using Inputs = std::array<Address, 6>;  // table, matrix, key_mask, key_lengths, offsets, positions
using Sizes = std::array<std::int64_t, 7>;  // see call_of

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(const Strided& t) {
  return {pointer<const void>(static_cast<Address>(t[0])), t[1], t[2], t[3]};
}

AttentionCall call_of(int type, const std::array<Strided, 3>& qkv, const Inputs& inputs,
                      const Sizes& sizes, bool causal, float scale) {
  AttentionCall call{};
  call.type = static_cast<Type>(type);
  call.q = rows_of(qkv[0]), call.k = rows_of(qkv[1]), call.v = rows_of(qkv[2]);
  call.table = pointer<const float>(inputs[0]);
  call.matrix = pointer<const std::int32_t>(inputs[1]);
  call.key_mask = pointer<const bool>(inputs[2]);
  call.key_lengths = pointer<const std::int64_t>(inputs[3]);
  call.offsets = pointer<const std::int64_t>(inputs[4]);
  call.positions = pointer<const std::int64_t>(inputs[5]);
  call.sequences = sizes[0], call.length = sizes[1], call.heads = sizes[2], call.dim = sizes[3];
  call.entries = sizes[4], call.size = sizes[5], call.matrix_row = sizes[6];
  call.causal = causal, call.scale = scale;
  return call;
}

void forward(const std::string& instructions, int threads, int type,
             const std::array<Strided, 3>& qkv, const Inputs& inputs, const Sizes& sizes,
             bool causal, float scale, Address out, Address lse) {
  AttentionCall call = call_of(type, qkv, inputs, sizes, causal, scale);
  call.result_row = call.heads * call.dim;
  call.out_result = pointer<void>(out);
  call.lse_result = pointer<float>(lse);
  const py::gil_scoped_release release;
  attention_forward(call, instructions, threads);
}

void backward(const std::string& instructions, int threads, int type,
              const std::array<Strided, 3>& qkv, const Inputs& inputs, const Sizes& sizes,
              bool causal, float scale, const Strided& out, const Strided& dout, Address lse,
              const std::array<Address, 3>& gradients, std::int64_t gradient_row, Address dtable) {
  AttentionCall call = call_of(type, qkv, inputs, sizes, causal, scale);
  call.out = rows_of(out), call.dout = rows_of(dout);
  call.lse = pointer<const float>(lse);
  call.result_row = gradient_row;
  call.dq = pointer<void>(gradients[0]);
  call.dk = pointer<void>(gradients[1]);
  call.dv = pointer<void>(gradients[2]);
  const py::gil_scoped_release release;
  attention_backward(call, instructions, threads, pointer<double>(dtable));
}

void multiply(const std::string& instructions, int threads, const std::array<Address, 4>& addresses,
              const std::array<bool, 2>& transposed, const std::array<std::int64_t, 3>& row_strides,
              const std::array<std::int64_t, 3>& sizes) {
  MatmulCall call{};
  call.a = pointer<const float>(addresses[0]), call.b = pointer<const float>(addresses[1]);
  call.c = pointer<float>(addresses[2]), call.bias = pointer<const float>(addresses[3]);
  call.a_transposed = transposed[0], call.b_transposed = transposed[1];
  call.a_row = row_strides[0], call.b_row = row_strides[1], call.c_row = row_strides[2];
  call.rows = sizes[0], call.columns = sizes[1], call.depth = sizes[2];
  const py::gil_scoped_release release;
  matmul(call, instructions, threads);
}

using Typed = std::array<std::int64_t, 3>;  // address (0 for none), type, stride of rows

Matrix matrix_of(const Typed& t) {
  return {pointer<void>(static_cast<Address>(t[0])), static_cast<Type>(t[1]), t[2]};
}

RowsKernel RowsKernels::*rows_kernel(const std::string& name) {
  if (name == "norm") return &RowsKernels::norm;
  if (name == "norm_backward") return &RowsKernels::norm_backward;
  if (name == "branch") return &RowsKernels::branch;
  if (name == "branch_backward") return &RowsKernels::branch_backward;
  if (name == "column_sums") return &RowsKernels::column_sums;
  throw std::invalid_argument("no kernel of rows is named '" + name + "'");
}

void rows(const std::string& name, const std::string& instructions, int threads,
          const std::array<std::int64_t, 2>& sizes, const std::array<std::int64_t, 4>& tokens,
          const std::array<Typed, 8>& matrices, const std::array<Address, 6>& vectors, float eps,
          const std::array<Address, 2>& sums) {
  RowsCall call{};
  call.rows = sizes[0], call.columns = sizes[1];
  call.tokens = {pointer<const std::int32_t>(static_cast<Address>(tokens[0])), tokens[1], tokens[2],
                 tokens[3]};
  call.x = matrix_of(matrices[0]), call.residual = matrix_of(matrices[1]);
  call.y = matrix_of(matrices[2]), call.dy = matrix_of(matrices[3]);
  call.dx = matrix_of(matrices[4]), call.normed = matrix_of(matrices[5]);
  call.branch = matrix_of(matrices[6]), call.d = matrix_of(matrices[7]);
  call.weight = pointer<const float>(vectors[0]), call.bias = pointer<const float>(vectors[1]);
  call.scale = pointer<const float>(vectors[2]);
  call.token_scale = pointer<const float>(vectors[3]);
  call.mean = pointer<float>(vectors[4]), call.deviation = pointer<float>(vectors[5]);
  call.eps = eps;
  const py::gil_scoped_release release;
  compute_rows(rows_kernel(name), call, instructions, threads, pointer<float>(sums[0]),
               pointer<float>(sums[1]));
}

}  // namespace

void bind_cpu(py::module_& module) {
  module.def("instruction_sets", &instruction_sets,
             "Instruction sets that the CPU kernels are compiled for and this CPU has, the widest "
             "first.");
  module.def("is_intel", &is_intel, "Whether the CPU is made by Intel.");
  module.def("thread_runtime", &thread_runtime,
             "The file of the OpenMP runtime that PyTorch loaded and the CPU kernels use, or ''.");
  module.def("attention_forward", &forward, py::arg("instructions"), py::arg("threads"),
             py::arg("type"), py::arg("qkv"), py::arg("inputs"), py::arg("sizes"),
             py::arg("causal"), py::arg("scale"), py::arg("out"), py::arg("lse"),
             "Compute out [tokens, heads, dim] and lse [tokens, heads] on the CPU.\n\n"
             "type: 0 float32, 1 bfloat16, 2 float16.\n"
             "qkv: address and strides (sequence, token, head) in elements of q, k and v.\n"
             "inputs: addresses, 0 for none, of table [heads, entries] float32, matrix int32,\n"
             "key_mask, and int64 key_lengths, offsets and positions.\n"
             "sizes: sequences, (largest) length, heads, dim, entries, rows of matrix, its "
             "stride.");
  module.def("attention_backward", &backward, py::arg("instructions"), py::arg("threads"),
             py::arg("type"), py::arg("qkv"), py::arg("inputs"), py::arg("sizes"),
             py::arg("causal"), py::arg("scale"), py::arg("out"), py::arg("dout"),
             py::arg("lse"), py::arg("gradients"), py::arg("gradient_row"), py::arg("dtable"),
             "Compute dq, dk and dv [tokens, heads, dim], whose tokens are gradient_row elements\n"
             "apart, and add the table's gradient to dtable\n"
             "[heads, entries] float64 unless it is 0. The other arguments are as in the forward.");
  module.def("matmul", &multiply, py::arg("instructions"), py::arg("threads"),
             py::arg("addresses"), py::arg("transposed"), py::arg("row_strides"), py::arg("sizes"),
             "Compute c = a b + bias in float32 on the CPU.\n\n"
             "addresses: of a, b, c and bias (0 for none).\n"
             "transposed: whether a is [depth, rows], and b [columns, depth].\n"
             "row_strides: of a, b and c, in elements.\n"
             "sizes: rows, columns, depth.");
  module.def("rows", &rows, py::arg("name"), py::arg("instructions"), py::arg("threads"),
             py::arg("sizes"), py::arg("tokens"), py::arg("matrices"), py::arg("vectors"),
             py::arg("eps"), py::arg("sums"),
             "Run a kernel of csrc/cpu/rows.h, which says what each reads and writes.\n\n"
             "sizes: rows, columns.\n"
             "tokens: address of the int32 index, or 0; period, start and length of a run.\n"
             "matrices: (address, type, stride of rows) of x, residual, y, dy, dx, normed, branch "
             "and d.\n"
             "vectors: addresses of weight, bias, scale, token_scale, mean and deviation.\n"
             "sums: addresses of two vectors, or 0.");
}

}  // namespace vlmo
