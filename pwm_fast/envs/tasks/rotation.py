"""Rotations as ``wxyz`` unit quaternions ``[N, 4]``, batched and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """Vectors ``v`` ``[N, 3]`` turned by ``q``: from the body's frame to the world's."""
    t = 2.0 * torch.linalg.cross(q[:, 1:], v)
    return v + q[:, :1] * t + torch.linalg.cross(q[:, 1:], t)


def rotate_back(q: Tensor, v: Tensor) -> Tensor:
    """Vectors ``v`` ``[N, 3]`` turned by ``q`` backwards: from the world's frame to the body's."""
    t = 2.0 * torch.linalg.cross(q[:, 1:], v)
    return v - q[:, :1] * t + torch.linalg.cross(q[:, 1:], t)


def from_axis_angle(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotations by ``angle`` ``[N, 1]`` (rad) about ``axis`` ``[N, 3]`` of any length above 0."""
    axis = torch.nn.functional.normalize(axis, dim=-1)
    half = 0.5 * angle
    return torch.cat((half.cos(), half.sin() * axis), dim=-1)
