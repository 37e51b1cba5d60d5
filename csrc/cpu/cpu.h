// Operations on the CPU: the choice of an instruction set and the division among threads.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "rows.h"

namespace vlmo {

// Instruction sets that the kernels are compiled for and this CPU has, the widest first.
std::vector<std::string> instruction_sets();

bool is_intel();

// Computes out and lse. Raises std::invalid_argument for an instruction set that is not available.
void attention_forward(AttentionCall call, const std::string& instructions, int threads);

// Computes dq, dk and dv, and adds the table's gradient to `dtable` [heads, entries] if not null.
// Results depend on `threads` only by the order of a few sums of the table's gradient.
void attention_backward(AttentionCall call, const std::string& instructions, int threads,
                        double* dtable);

// Computes c.
void matmul(const MatmulCall& call, const std::string& instructions, int threads);

// Runs one of the kernels; `sums` and `more_sums` [columns] are null if it has none. No result
// depends on `threads`.
void compute_rows(RowsKernel RowsKernels::*kernel, const RowsCall& call,
                  const std::string& instructions, int threads, float* sums, float* more_sums);

}  // namespace vlmo
