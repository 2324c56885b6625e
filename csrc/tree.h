// The frontier tree: the C++ twin of the topology in kernels/tree.py, where the words are explained.
#pragma once

#include <cstdint>

namespace sjd {

constexpr int kMostCandidates = 5;

// A node's level, and its path of candidates from 0 as digits of base K. The chain is path 0.
struct Node {
  int64_t level, path;
};

struct Tree {
  int64_t candidates, depth;  // 1, 1 where there is no tree

  // Extra slots of the levels before `level`.
  int64_t first_extra(int64_t level) const {
    int64_t count = 0, nodes = 1;
    for (int64_t i = 1; i < level; ++i) count += (nodes *= candidates) - 1;
    return count;
  }
  int64_t num_extra() const { return first_extra(depth); }

  // Of a node, behind a chain of `window` slots.
  int64_t slot(Node node, int64_t window) const {
    return node.path == 0 ? node.level : window + first_extra(node.level) + node.path - 1;
  }
  Node node(int64_t slot, int64_t window) const {
    if (slot < window) return {slot, 0};
    int64_t level = 1;
    while (slot - window >= first_extra(level + 1)) ++level;
    return {level, slot - window - first_extra(level) + 1};
  }
};

}  // namespace sjd
