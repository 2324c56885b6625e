"""Which drafts are accepted, beside the plain test r q(d) < p(d) of each draft by itself. Reference backend only.

An acceptance takes the place of that test and of its residual in `reference.verify`; everything else of a pass stays.

    Block       lossless. Drafts are accepted as a block: a prefix that is more likely under p than under q vouches for
                tokens that would fail by themselves. Needs drafts that are independent given the passes before, as
                those of the refresh "fresh" are.
    Group       lossy (GSD). A draft is judged by the mass of tokens like it: near in rank, probability and codebook.
    Neighbours  lossy (LANTERN). p(d) gains the mass of the draft's neighbours in the codebook, up to a share of p(d).

Sources: Sun et al., "Block verification accelerates speculative decoding" (arXiv 2403.10444), algorithm 2; So et al.,
"Grouped speculative decoding for autoregressive image generation" (arXiv 2508.07747) and its code, which measures the
distance in the transformer's token embedding; Jang et al., "LANTERN" (arXiv 2410.03355), with the relative bound of
Park et al., "LANTERN++" (arXiv 2502.06352), and their code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .arithmetic import residual


@dataclass(frozen=True)
class Drafted:
    """The drafts of a pass. target_probs, draft_probs: [B, W, V] float32, p and q of each row. tokens: [B, W] int64.
    uniforms: [B, W] float64, r. has_draft, forced: [B, W] bool; forced drafts are accepted by their grammar.
    """

    target_probs: Tensor
    draft_probs: Tensor
    tokens: Tensor
    uniforms: Tensor
    has_draft: Tensor
    forced: Tensor

    @property
    def p(self) -> Tensor:
        """[B, W]: p(d)."""
        return self.target_probs.gather(-1, self.tokens[..., None]).squeeze(-1)

    @property
    def q(self) -> Tensor:
        """[B, W]: q(d)."""
        return self.draft_probs.gather(-1, self.tokens[..., None]).squeeze(-1)

    @property
    def residual(self) -> Tensor:
        """[B, W, V]: max(p - q, 0), unnormalised."""
        return residual(self.target_probs, self.draft_probs)


# What takes the place of the plain test: (passed [B, W] bool, what a rejected draft is replaced from [B, W, V]).
Acceptance = Callable[[Drafted], tuple[Tensor, Tensor]]


def accept_block(drafted: Drafted) -> tuple[Tensor, Tensor]:
    """The longest accepted prefix of n drafts, n the last with r_n < h_n:

        g_0 = 1,  g_n = min(1, g_{n-1} p_n(d_n) / q_n(d_n))
        h_n = S_n / (S_n + 1 - g_n),  S_n = sum(max(g_n p_{n+1} - q_{n+1}, 0));  h_n = g_n for the last draft
        the token behind it is drawn from norm(max(g_n p_{n+1} - q_{n+1}, 0))

    A row r holds draft r + 1: `passed[r]` says that the prefix reaches it.
    """
    ratio = drafted.p.double() / drafted.q.double().clamp_min(1e-300)
    ratio = torch.where(drafted.forced, 1.0, ratio)
    likely = [torch.ones_like(ratio[:, 0])]
    for row in ratio.unbind(1):
        likely.append((likely[-1] * row).clamp_max(1.0))
    g = torch.stack(likely, 1)  # [B, W + 1], g[:, r] before the draft of row r
    left_over = residual(g[:, :-1, None].float() * drafted.target_probs, drafted.draft_probs)
    mass = torch.where(drafted.forced, 0.0, left_over.sum(-1, dtype=torch.float64))
    reach = mass / (mass + 1 - g[:, :-1])
    reach = torch.where(drafted.has_draft, torch.where(g[:, :-1] == 1, 1.0, reach), g[:, :-1])[:, 1:]
    accepted = drafted.has_draft[:, :-1] & (drafted.uniforms[:, :-1] < reach)
    passed = accepted.flip(1).cummax(1).values.flip(1)  # every draft before an accepted one
    return torch.cat((passed, torch.zeros_like(passed[:, :1])), 1), left_over


@dataclass(frozen=True)
class Group:
    """r sum(q over G) < sum(p over G), G the draft and the tokens like it.

    codebook: [V, E] float32. ranks: how many places up and down the order of p count as near.
    """

    codebook: Tensor
    ranks: int
    probability: float = 0.15  # |p(g) - p(d)| below it
    distance: float = 0.5  # squared, below it

    def __call__(self, drafted: Drafted) -> tuple[Tensor, Tensor]:
        order = drafted.target_probs.argsort(dim=-1, descending=True, stable=True)
        rank = (order == drafted.tokens[..., None]).int().argmax(-1, keepdim=True)
        near = rank + torch.arange(-self.ranks, self.ranks + 1, device=order.device)
        tokens = order.gather(-1, near.clamp(0, order.shape[-1] - 1))
        p = drafted.target_probs.gather(-1, tokens)
        apart = (self.codebook[tokens] - self.codebook[drafted.tokens][:, :, None]).square().sum(-1)
        like = (near >= 0) & (near < order.shape[-1]) & (apart < self.distance)
        like &= (p - drafted.p[..., None]).abs() < self.probability
        p_group = (p * like).sum(-1)
        q_group = (drafted.draft_probs.gather(-1, tokens) * like).sum(-1)
        return drafted.uniforms * q_group < p_group, drafted.residual


@dataclass(frozen=True)
class Neighbours:
    """r q(d) < p(d) + m, m the mass of the nearest tokens, as many as keep it at most (relaxation - 1) p(d).

    nearest: [V, N] int64, the nearest codes of each code, nearest first, itself left out.
    """

    nearest: Tensor
    relaxation: float

    @classmethod
    def of(cls, codebook: Tensor, relaxation: float, count: int = 1000) -> "Neighbours":
        """codebook: [V, E] float32. count: neighbours that are looked at, as in the authors' code."""
        count = min(count, len(codebook) - 1)
        nearest = []
        for first, part in enumerate(codebook.split(1024)):
            apart = torch.cdist(part, codebook)
            rows = torch.arange(len(part), device=apart.device)
            apart[rows, 1024 * first + rows] = torch.inf
            nearest.append(apart.topk(count, largest=False).indices)
        return cls(torch.cat(nearest), relaxation)

    def __call__(self, drafted: Drafted) -> tuple[Tensor, Tensor]:
        p = drafted.p
        gained = drafted.target_probs.gather(-1, self.nearest[drafted.tokens]).cumsum(-1)
        gained = torch.where(gained <= (self.relaxation - 1) * p[..., None], gained, 0.0).amax(-1)
        return drafted.uniforms * drafted.q < p + gained, drafted.residual


def acceptance(name: str, codebook: Tensor | None, relaxation: float | None) -> Acceptance | None:
    """What judges drafts: "token" is the plain test, which needs none.

    Args:
        name: token, block, group or neighbours.
        codebook: [V, E], for the last two. Raises: ValueError where it is missing.
        relaxation: ranks of a group, bound of the neighbours.
    """
    if name == "token":
        return None
    if name == "block":
        return accept_block
    if codebook is None or relaxation is None:
        raise ValueError(
            f"codebook: acceptance by {name} compares the vectors of codes; give [V, E] of the detokenizer"
        )
    return Group(codebook, int(relaxation)) if name == "group" else Neighbours.of(codebook, relaxation)
