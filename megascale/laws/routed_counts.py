"""What N and P count in the runs behind the routed laws (arXiv 2202.01169): the sizes to put into them for a model of that architecture.

d width, L blocks, H heads, k width of a head, E experts, R share of the blocks that are routed.
"""

from __future__ import annotations

from typing import Literal

Router = Literal["s_base", "rl_r", "hash"]


def dense_parameters(width: int, blocks: int, heads: int, head_dim: int) -> int:
    """N = L (5 d H k + 8 d^2 + 4 d): five attention matrices (query, key, value, output, relative position), a feed-forward of width 4 d
    and two layer norms with a bias a block; no embeddings. It stays the same whatever is routed.
    """
    return blocks * (5 * width * heads * head_dim + 8 * width**2 + 4 * width)


def all_parameters(
    width: int, blocks: int, heads: int, head_dim: int, experts: int, frequency: float = 0.5, router: Router = "s_base"
) -> int:
    """P = N + R L ((E - 1) 8 d^2 + router): d E of a linear router, also in the counts of HASH models, which have none; rl_r has the
    baseline d -> d/8 -> 1 beside it. Embeddings are left out. Without experts P = N.
    """
    dense = dense_parameters(width, blocks, heads, head_dim)
    if experts == 1:
        return dense
    routing = width * experts + (width * (width // 8) + width // 8) * (router == "rl_r")
    return dense + round(frequency * blocks) * ((experts - 1) * 8 * width**2 + routing)
