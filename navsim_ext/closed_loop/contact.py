"""Contact of full boxes, exactly: separating axes on the pairs that one distance per pair and token does not exclude.

Legend: B worlds, N road users, K poses of a token, P pairs that survive the broad phase. Boxes have their full length
and width, never shrunk. A tensor of poses becomes four planes x, y, c = cos h, s = sin h: every operation is then
elementwise on contiguous reals, whose last bit depends neither on the batch nor on the place in it (that of complex
products does).

Separating axes: boxes a, b with half sizes (l, w) touch iff on the axes of a and on those of b
  |d_x| <= l_a + l_b |cos r| + w_b |sin r|,   |d_y| <= w_a + l_b |sin r| + w_b |cos r|,
d the vector between the centres in the frame of a, r the relative heading; touching counts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

MARGIN_M = 1e-3  # of the broad phase, for rounding


class Contacts(NamedTuple):
    """Who touches whom in one token."""

    touching: Bool[Tensor, "B N K"]  # touches anybody at that pose
    pairs: Int64[Tensor, "P 4"]  # world, road user, other, pose of the token; both orders of a pair are listed


class Planes(NamedTuple):
    """Poses as four tensors [...]: centre [m], cosine and sine of the heading."""

    x: Tensor
    y: Tensor
    c: Tensor
    s: Tensor

    def __getitem__(self, at):
        return Planes(*(plane[at] for plane in tuple(self)))

    def map(self, function) -> Planes:
        """The function of each plane."""
        return Planes(function(self.x), function(self.y), function(self.c), function(self.s))


def planes(poses: Float[Tensor, "*any 3"]) -> Planes:
    """Planes [...] of poses [...,3]."""
    heading = poses[..., 2].contiguous()
    return Planes(poses[..., 0].contiguous(), poses[..., 1].contiguous(), torch.cos(heading), torch.sin(heading))


def circumradius(present: Bool[Tensor, "B N"], size: Float[Tensor, "B N _"]) -> Float[Tensor, "B N"]:
    """[B,N] circumradius [m] of the boxes; NaN for those that are not there: nothing is near them."""
    radius = 0.5 * torch.hypot(size[..., 0], size[..., 1])
    return torch.where(present, radius, torch.nan)


def near_pairs(
    x: Float[Tensor, "B N K"], y: Float[Tensor, "B N K"], radius: Float[Tensor, "B N"], margin: float = MARGIN_M
) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Broad phase: (i, j) int64 [P], i < j, rows of [B*N], of pairs whose discs around the token's middle may meet.

    ``x``, ``y`` [B,N,K]. A disc has the box's circumradius plus the farthest that the centre gets from its middle
    position during the token; ``margin`` [m] covers rounding.
    """
    _B, N, K = x.shape
    mx, my = x[..., K // 2].contiguous(), y[..., K // 2].contiguous()
    reach = radius + margin
    if K > 1:
        reach = torch.hypot(x - mx[..., None], y - my[..., None]).amax(dim=-1).add_(reach)
    d = mx[:, :, None] - mx[:, None, :]
    squared = torch.addcmul(not_upper(N, x.device), d, d)
    torch.sub(my[:, :, None], my[:, None, :], out=d)
    squared.addcmul_(d, d)
    torch.add(reach[:, :, None], reach[:, None, :], out=d)
    squared.addcmul_(d, d, value=-1.0)
    found = true_rows((squared <= 0.0).view(-1))  # world, i, j in one number
    i = torch.div(found, N, rounding_mode="floor")
    j = found - i * N + torch.div(i, N, rounding_mode="floor") * N
    return i, j


@functools.lru_cache(maxsize=16)
def not_upper(N: int, device: torch.device) -> Tensor:
    """[N,N] float32: 0 above the diagonal, inf on it and below."""
    return torch.where(torch.ones(N, N, dtype=torch.bool, device=device).triu(1), 0.0, torch.inf)


def true_rows(mask: Bool[Tensor, " L"]) -> Int64[Tensor, " P"]:
    """Indices int64 of the true entries of ``mask`` [L] bool, few of many: eight at a time where L allows it."""
    if len(mask) % 8:
        return mask.nonzero()[:, 0]
    words = mask.view(torch.int64).nonzero()[:, 0]
    eights = mask.view(-1, 8).index_select(0, words)
    found = eights.nonzero()
    return words.index_select(0, found[:, 0]) * 8 + found[:, 1]


def overlap(a: Planes, half_a: tuple[Tensor, Tensor], b: Planes, half_b: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the axes of a leave boxes a and b together [...] (half of the test: call it both ways round).

    ``half_a``, ``half_b``: half length, half width.
    """
    dx, dy = b.x - a.x, b.y - a.y
    along, across = _turned(a.c, a.s, dx, dy)
    r_cos, r_sin = _turned(a.c, a.s, b.c, b.s)
    r_cos, r_sin = r_cos.abs_(), r_sin.abs_()
    (l_a, w_a), (l_b, w_b) = half_a, half_b
    longest = torch.addcmul(l_a, l_b, r_cos).addcmul_(w_b, r_sin)
    widest = torch.addcmul(w_a, l_b, r_sin).addcmul_(w_b, r_cos)
    return (along.abs_() <= longest).logical_and_(across.abs_() <= widest)


def _turned(c: Tensor, s: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) in axes turned by (c, s): (c x + s y, c y - s x)."""
    return (c * x).addcmul_(s, y), (c * y).addcmul_(s, x, value=-1.0)


def boxes_touch(
    pose_a: Float[Tensor, "... 3"],
    size_a: Float[Tensor, "... _"],
    pose_b: Float[Tensor, "... 3"],
    size_b: Float[Tensor, "... _"],
) -> Bool[Tensor, "*_"]:
    """Whether boxes touch [...]: poses [...,3], sizes [...,2+] (length, width), broadcast against each other."""
    shape = torch.broadcast_shapes(pose_a.shape[:-1], pose_b.shape[:-1])
    a, b = planes(pose_a).map(lambda p: p.expand(shape)), planes(pose_b).map(lambda p: p.expand(shape))
    half_a = [(0.5 * size_a[..., k]).expand(shape) for k in (0, 1)]
    half_b = [(0.5 * size_b[..., k]).expand(shape) for k in (0, 1)]
    return overlap(a, half_a, b, half_b) & overlap(b, half_b, a, half_a)


def find_contacts(boxes: Planes, size: Float[Tensor, "B N _"], radius: Float[Tensor, "B N"]) -> Contacts:
    """All contacts of a token: ``boxes`` [B,N,K], ``size`` [B,N,2+], ``radius`` [B,N] of :func:`circumradius`."""
    B, N, K = boxes.x.shape
    touching = torch.zeros(B, N, K, dtype=torch.bool, device=size.device)
    i, j = near_pairs(boxes.x, boxes.y, radius)
    count = len(i)
    rows = torch.stack(tuple(boxes)).view(4, B * N, K).transpose(1, 2).reshape(4 * K, B * N)
    packed = torch.cat((rows, (0.5 * size[..., :2]).view(B * N, 2).T))  # [4K+2,B*N]: planes lie side by side
    first, second = packed.index_select(1, torch.cat((i, j))), packed.index_select(1, torch.cat((j, i)))
    a, b = (Planes(*gathered[: 4 * K].view(4, K, 2 * count)) for gathered in (first, second))
    together = overlap(a, (first[-2], first[-1]), b, (second[-2], second[-1]))  # [K,2P]
    hits = (together[:, :count] & together[:, count:]).T.nonzero()
    pair, pose = hits[:, 0], hits[:, 1]
    i, j = i[pair], j[pair]
    one, other, pose = torch.cat((i, j)), torch.cat((j, i)), torch.cat((pose, pose))
    touching.view(B * N, K)[one, pose] = True
    world = torch.div(one, N, rounding_mode="floor")
    return Contacts(touching, torch.stack((world, one - world * N, other - world * N, pose), dim=-1))


def time_to_contact(
    pose: Float[Tensor, "B N 3"],
    velocity: Float[Tensor, "B N 2"],
    size: Float[Tensor, "B N _"],
    present: Bool[Tensor, "B N"],
    horizon_s: float,
) -> Float[Tensor, "B N"]:
    """[B,N] seconds until the first contact if all go on at their present velocity without turning; inf if none.

    ``pose`` [B,N,3], ``velocity`` [B,N,2] m/s, ``size`` [B,N,2+], ``present`` [B,N]. Exact for translating boxes: on
    each of the four axes the projections overlap during an interval of time, and the boxes while all four do. 0 where
    boxes touch now. Pairs that cannot meet within ``horizon_s`` are left out, so values end there.
    """
    B, N = present.shape
    boxes = planes(pose)
    speed = torch.hypot(velocity[..., 0], velocity[..., 1])
    i, j = near_pairs(boxes.x[..., None], boxes.y[..., None], circumradius(present, size) + speed * horizon_s)
    flat = boxes.map(torch.Tensor.flatten)
    v = [velocity[..., k].flatten() for k in (0, 1)]
    half = [(0.5 * size[..., k]).flatten() for k in (0, 1)]
    enter, leave = (
        torch.full(i.shape, -torch.inf, device=pose.device),
        torch.full(i.shape, torch.inf, device=pose.device),
    )
    for one, other in ((i, j), (j, i)):
        a, b = flat[one], flat[other]
        offset = _turned(a.c, a.s, b.x - a.x, b.y - a.y)
        rate = _turned(a.c, a.s, v[0][other] - v[0][one], v[1][other] - v[1][one])
        r_cos, r_sin = (value.abs() for value in _turned(a.c, a.s, b.c, b.s))
        l_b, w_b = half[0][other], half[1][other]
        bounds = (half[0][one] + l_b * r_cos + w_b * r_sin, half[1][one] + l_b * r_sin + w_b * r_cos)
        for d, dv, bound in zip(offset, rate, bounds):
            still = dv.abs() < 1e-6
            safe = torch.where(still, 1.0, dv)
            first, second = (-bound - d) / safe, (bound - d) / safe
            low = torch.where(still, -torch.inf, torch.minimum(first, second))
            high = torch.where(still, torch.inf, torch.maximum(first, second))
            enter = torch.maximum(enter, torch.where(still & (d.abs() > bound), torch.inf, low))
            leave = torch.minimum(leave, high)
    time = torch.where((enter <= leave) & (leave >= 0.0), enter.clamp_min(0.0), torch.inf)
    time = torch.where(time <= horizon_s, time, torch.inf)
    result = torch.full((B * N,), torch.inf, device=pose.device)
    result.scatter_reduce_(0, torch.cat((i, j)), torch.cat((time, time)), "amin")
    return result.view(B, N)
