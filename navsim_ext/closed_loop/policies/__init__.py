"""Policies without parameters to train; learned ones come by ``_target_``, the synthetic law from its own world."""

from navsim_ext.closed_loop.policies.constant_velocity import ConstantVelocity
from navsim_ext.closed_loop.policies.distorted import Distorted
from navsim_ext.closed_loop.policies.frenet import Frenet
from navsim_ext.closed_loop.policies.idm import Idm
from navsim_ext.closed_loop.policies.replay import Replay

__all__ = ["ConstantVelocity", "Distorted", "Frenet", "Idm", "Replay"]
