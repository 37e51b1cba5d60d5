#include "cubins.h"

#include <cstdlib>

// table.inc is generated: one VLMO_CUBIN(name, target, "path of the cubin") per line. The first
// inclusion places the files in read-only data, the second lists them. They are embedded in the
// module because an editable install keeps no other file of the build.
#define VLMO_LABEL(symbol) ".globl " symbol "\n.hidden " symbol "\n" symbol ":\n"
#define VLMO_FILE(path) ".incbin \"" path "\"\n"
#define VLMO_HIDDEN extern "C" __attribute__((visibility("hidden"))) const char
// clang-format off
#define VLMO_CUBIN(name, target, path)                                       \
  VLMO_HIDDEN vlmo_image_##name##_##target[];                                \
  VLMO_HIDDEN vlmo_json_##name##_##target[];                                 \
  VLMO_HIDDEN vlmo_end_##name##_##target[];                                  \
  __asm__(".pushsection .rodata\n.balign 64\n"                               \
          VLMO_LABEL("vlmo_image_" #name "_" #target) VLMO_FILE(path)        \
          VLMO_LABEL("vlmo_json_" #name "_" #target) VLMO_FILE(path ".json") \
          VLMO_LABEL("vlmo_end_" #name "_" #target)                          \
          ".popsection\n");
// clang-format on
#include "table.inc"
#undef VLMO_CUBIN

namespace vlmo {
namespace {

std::string_view between(const char* first, const char* last) {
  return {first, static_cast<size_t>(last - first)};
}

}  // namespace

const std::vector<Cubin>& cubins() {
#define VLMO_CUBIN(name, target, path)                                                 \
  {#name, #target, between(vlmo_image_##name##_##target, vlmo_json_##name##_##target), \
   between(vlmo_json_##name##_##target, vlmo_end_##name##_##target)},
  static const std::vector<Cubin> table = {
#include "table.inc"
  };
#undef VLMO_CUBIN
  return table;
}

const Cubin* find_cubin(std::string_view name, int major, int minor) {
  const Cubin* best = nullptr;
  int best_minor = -1;
  for (const Cubin& cubin : cubins()) {
    char* suffix = nullptr;
    const int version = static_cast<int>(std::strtol(cubin.target + 3, &suffix, 10));
    const int built_minor = version % 10;
    if (name != cubin.name || version / 10 != major || built_minor > minor) continue;
    // A target such as sm_90a runs on exactly that capability.
    if (*suffix != '\0' && built_minor != minor) continue;
    if (built_minor > best_minor) {
      best = &cubin;
      best_minor = built_minor;
    }
  }
  return best;
}

}  // namespace vlmo
