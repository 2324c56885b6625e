"""The frontier tree: several candidates for each of the next tokens, and a slot for every way through them.

    tree (K, D)       the D - 1 positions behind the anchor have up to K candidates each; level l is the l-th of them.
    candidate 1       the chain's own draft x_1, drawn from its law q.
    candidates 2..K   siblings x_2.., drawn from q without the candidates before them: "without replacement".
    node              a path of candidates (a_1 .. a_l). Those of ones alone are the window's chain; the others stand in
                      extra slots behind it, level by level, in the order of their paths. All nodes of a level are for
                      the same position, and the last one's candidates are the same under every parent.

A node's row tries the candidates of the next level in their order. Both laws move on with every one it rejects:

    accept x_j where u_j q_j(x_j) < p_j(x_j);   p_j+1 = norm(max(p_j - q_j, 0)),   q_j+1 = norm(q_j without x_j)

and where all are rejected, the recovered token is drawn from the last p. For K = 3, D = 3 and a chain of W = 5 slots:

    slot      0   1   2   3   4 |  5   6 |  7   8   9  10  11  12  13  14
    path          1   11        |  2   3 | 12  13  21  22  23  31  32  33
    level     0   1   2   3   4 |  1   1 |  2   2   2   2   2   2   2   2

A path that leaves the chain ends at its leaf with a token drawn from the leaf's law; one that stays on it goes on as a
chain. Drafts right of the committed tokens are refreshed from rows of the chain, as ever.

Source: proactive drafting (arXiv 2603.18599), with another law of siblings: drawn from the residual of p, as published,
they bend the law of the committed token by up to 0.5 in total variation; without replacement they leave it as it is.
Miao et al., "SpecInfer" (arXiv 2305.09781), and Yang et al., "Multi-candidate speculative decoding" (arXiv 2401.06706),
prove it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .arithmetic import draw, fixed_point, normalise, residual

MOST_CANDIDATES = 5  # the words of one Philox block are for four siblings


class Tree(NamedTuple):
    """Candidates of each position, K >= 2, and levels with the anchor's, D >= 2."""

    candidates: int
    depth: int

    @property
    def num_extra(self) -> int:
        """Slots behind the chain."""
        return self.first_extra(self.depth)

    @property
    def least_window(self) -> int:
        """Slots of the least window: the chain has every level."""
        return self.depth + self.num_extra

    def first_extra(self, level: int) -> int:
        """Extra slots of the levels before `level`."""
        return sum(self.candidates**i - 1 for i in range(1, level))

    def slot(self, level: int, path: int, window_size: int) -> int:
        """Of a node, behind a chain of `window_size` slots. `path`: its candidates from 0 as digits of base K."""
        return level if path == 0 else window_size + self.first_extra(level) + path - 1

    def nodes(self, window_size: int) -> list[tuple[int, int]]:
        """(level, path) of every slot."""
        chain = [(level, 0) for level in range(window_size)]
        levels = range(1, self.depth)
        return chain + [(level, path) for level in levels for path in range(1, self.candidates**level)]

    def parents(self, window_size: int) -> list[int]:
        """The slot before each slot; -1 before the anchor."""
        return [self.slot(level - 1, path // self.candidates, window_size) for level, path in self.nodes(window_size)]

    def offsets(self, window_size: int) -> Tensor:
        """[N] int64: positions of the slots relative to the anchor's."""
        return torch.tensor([level for level, _ in self.nodes(window_size)])

    def ranks(self, window_size: int) -> Tensor:
        """[N] int64: which candidate of its position each slot holds, from 0."""
        return torch.tensor([path % self.candidates for _, path in self.nodes(window_size)])

    def window_bias(self, window_size: int) -> Tensor:
        """[N, N] float32: 0 where the slot of the column is an ancestor of the row's or itself, -inf elsewhere."""
        parents = self.parents(window_size)
        bias = torch.full((len(parents), len(parents)), float("-inf"))
        for slot, parent in enumerate(parents):
            if parent >= 0:
                bias[slot] = bias[parent]
            bias[slot, slot] = 0
        return bias

    def inner(self, window_size: int) -> list[int]:
        """The slots whose rows try siblings."""
        return [slot for slot, (level, _) in enumerate(self.nodes(window_size)) if level < self.depth - 1]

    def has_child(self, window_size: int) -> Tensor:
        """[N] bool: a candidate for the row's position stands in the window."""
        slots = torch.arange(window_size + self.num_extra)
        on_chain = slots < window_size - 1
        return on_chain.index_fill(0, torch.tensor(self.inner(window_size)), True)

    def of_rows(self, siblings: Tensor, window_size: int) -> Tensor:
        """[B, N, K - 1]: those of `WindowState.siblings` that each row tries; -1 where it tries none."""
        level = torch.full((window_size + self.num_extra,), self.depth - 1)
        inner = torch.tensor(self.inner(window_size))
        level[inner] = self.offsets(window_size)[inner]
        return F.pad(siblings, (0, 0, 0, 1), value=-1)[:, level.to(siblings.device)]

    def children(self, window_size: int) -> Tensor:
        """[N, K] int64: the slots of each inner slot's children; 0 elsewhere."""
        nodes = self.nodes(window_size)
        children = torch.zeros(len(nodes), self.candidates, dtype=torch.int64)
        for slot in self.inner(window_size):
            level, path = nodes[slot]
            paths = range(path * self.candidates, (path + 1) * self.candidates)
            children[slot] = torch.tensor([self.slot(level + 1, child, window_size) for child in paths])
        return children


# ------------------------------------------------------------------------------------------------------- verification


class Trial(NamedTuple):
    """child: [B, N] int64, the candidate that each row accepted, from 1; 0 where none. tokens: [B, N] int64, that
    candidate's. left_over: [B, N, V] float32 weights of the law that the recovered token has where there is none."""

    child: Tensor
    tokens: Tensor
    left_over: Tensor


def try_siblings(
    left_over: Tensor, draft_weights: Tensor, drafts: Tensor, passed: Tensor, siblings: Tensor, words: Tensor
) -> Trial:
    """Go on where candidate 1 was rejected.

    Args:
        left_over: [B, N, V] float32, max(p - q, 0) of candidate 1.
        draft_weights: [B, N, V] float32, q before it is scaled to sum to 1.
        drafts, passed: [B, N], candidate 1, and whether it was accepted.
        siblings: [B, N, K - 1] int64, candidates 2..K; -1 where there is none.
        words: [4, B, N] int64, of which K - 1 decide about them.
    """
    child, tokens = passed.long(), drafts
    untried = draft_weights.scatter(-1, drafts[..., None], 0)
    for j, sibling in enumerate(siblings.unbind(-1)):
        p, q = normalise(left_over), normalise(untried)
        exists, ids = sibling >= 0, sibling.clamp_min(0)[..., None]
        p_token, q_token = (law.gather(-1, ids).squeeze(-1) for law in (p, q))
        accepted = exists & (child == 0) & (philox.uniform(words[j]) * q_token < p_token)
        child, tokens = torch.where(accepted, j + 2, child), torch.where(accepted, sibling, tokens)
        left_over = torch.where(exists[..., None], residual(p, q), left_over)
        untried.scatter_(-1, ids, 0)
    return Trial(child, tokens, left_over)


class Path(NamedTuple):
    """num_accepted: [B] its nodes. last_row: [B] the row behind the last of them. slots: [B, D - 1], of the node of
    each level, or of the chain's where the path is shorter. rows: [B, D - 1], the parents of these."""

    num_accepted: Tensor
    last_row: Tensor
    slots: Tensor
    rows: Tensor


def walk(tree: Tree, child: Tensor, num_accepted: Tensor, window_size: int) -> Path:
    """The accepted path.

    Args:
        child: [B, N], what every row accepted; 0 where that is nothing. Read in rows that try siblings.
        num_accepted: [B], drafts of the chain that are accepted.
    """
    children = tree.children(window_size).to(child.device)
    slot, length = torch.zeros_like(num_accepted), torch.zeros_like(num_accepted)
    slots, rows = [], []
    for level in range(1, tree.depth):
        accepted = child.gather(1, slot[:, None]).squeeze(1)
        goes_on = (length == level - 1) & (accepted > 0)
        rows.append(slot)
        slot = torch.where(goes_on, children[slot, (accepted - 1).clamp_min(0)], slot)
        slots.append(torch.where(goes_on, slot, level))
        length += goes_on
    on_chain = slot < window_size
    return Path(
        torch.where(on_chain, num_accepted, length),
        torch.where(on_chain, num_accepted, slot),
        torch.stack(slots, 1),
        torch.stack(rows, 1),
    )


# ----------------------------------------------------------------------------------------------------------- siblings


def draw_siblings(
    positions: Tensor,
    drafts: Tensor,
    weights: Tensor,
    exists: Tensor,
    seeds: Tensor,
    iterations: Tensor,
    num_siblings: int,
) -> Tensor:
    """Candidates 2..K of positions whose draft is candidate 1, from the same law without the candidates before them.

    Args:
        positions, drafts: [B, N] int64.
        weights: [B, N, V] float32, the laws of the drafts, unscaled.
        exists: [B, N] bool, whether there are siblings at all.
        seeds, iterations: [B] int64.
        num_siblings: K - 1.
    Returns: [B, N, K - 1] int64; -1 where there is none, or the law has no more tokens.
    """
    words = philox.draw_words(seeds, positions, iterations, philox.DRAW_SIBLINGS).squeeze(-1)
    untried = weights.scatter(-1, drafts.clamp(0, weights.shape[-1] - 1)[..., None], 0)
    siblings = []
    for j in range(num_siblings):
        some = exists & (fixed_point(untried).sum(-1) > 0)
        siblings.append(torch.where(some, draw(untried, words[j]), -1))
        untried.scatter_(-1, siblings[-1].clamp_min(0)[..., None], 0)
    return torch.stack(siblings, -1)
