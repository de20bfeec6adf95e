// What a library gives to those that load it: one network of layers.
#pragma once

#include "step.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define LIBRARY(...)                                                                                                \
  using Chosen = kernels::Network<__VA_ARGS__>;                                                                     \
  EXPORTED void* make() { return new Chosen; }                                                                      \
  EXPORTED void drop(void* network) { delete static_cast<Chosen*>(network); }                                       \
  EXPORTED void run(void* network, const kernels::Arguments* given) { static_cast<Chosen*>(network)->run(*given); } \
  EXPORTED int64_t correct(void* network, const kernels::Arguments* given) {                                        \
    return static_cast<Chosen*>(network)->correct(*given);                                                          \
  }
