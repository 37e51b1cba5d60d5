#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

namespace vlmo {
namespace {

// Entry points of an OpenMP runtime. GCC's runtime defines them, and LLVM's and Intel's have them
// too, for programs that GCC compiled.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
  std::string name;
};

template <class F>
void find(void* library, const char* symbol, F& function) {
  function = reinterpret_cast<F>(dlsym(library, symbol));
}

// Nothing links to an OpenMP runtime: a second one beside PyTorch's would have threads of its own,
// which compete with PyTorch's for the cores and ignore torch.set_num_threads. A look-up in the
// loaded libtorch_cpu.so also searches what it depends on, so it finds the runtime that PyTorch
// calls, whatever its file is named.
Runtime find_runtime() {
  Runtime runtime;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return runtime;
  find(torch, "GOMP_parallel", runtime.parallel);
  find(torch, "omp_get_thread_num", runtime.thread_number);
  if (runtime.parallel == nullptr || runtime.thread_number == nullptr) return Runtime{};
  Dl_info info{};
  const bool known = dladdr(reinterpret_cast<void*>(runtime.parallel), &info) != 0;
  runtime.name = known && info.dli_fname != nullptr ? info.dli_fname : "unnamed";
  return runtime;
}

// The process that loaded this module, not the first one that ran a kernel: a child's first kernel
// may follow its parent's use of the threads for anything else.
const pid_t kLoadedBy = getpid();

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Task {
  const std::function<void(int)>& work;
  int (*thread_number)();
};

void run_task(void* task) {
  const Task& t = *static_cast<Task*>(task);
  t.work(t.thread_number());
}

}  // namespace

std::string thread_runtime() { return runtime().name; }

void run_on_threads(int threads, const std::function<void(int)>& work) {
  const Runtime& r = runtime();
  // A forked process has no threads but the runtime believes that it has, and would wait for them.
  if (threads <= 1 || r.parallel == nullptr || kLoadedBy != getpid()) return work(0);
  Task task{work, r.thread_number};
  r.parallel(run_task, &task, static_cast<unsigned>(threads), 0);
}

}  // namespace vlmo
