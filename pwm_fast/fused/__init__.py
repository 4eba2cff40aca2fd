"""The algebra of rollouts with hand-written backward passes, on exchangeable element kernels."""
