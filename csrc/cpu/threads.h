// Runs functions on the threads of PyTorch's OpenMP runtime.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace vlmo {

// The name of the OpenMP runtime whose threads are used, or an empty string if PyTorch has none.
std::string thread_runtime();

// Calls work(thread) on each of `threads` threads, all at once, and waits for them. Without a
// runtime, and in a process that was forked, it calls work(0) only.
void run_on_threads(int threads, const std::function<void(int)>& work);

}  // namespace vlmo
