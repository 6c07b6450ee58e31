"""The kinds of policy that stage 3 reinforces, each behind the protocol of ``stage3_grpo/policy.py``."""
