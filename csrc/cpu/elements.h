// The type of a tensor's elements.
#pragma once

namespace vlmo {

enum class Type { kFloat32, kBfloat16, kFloat16 };

}  // namespace vlmo
