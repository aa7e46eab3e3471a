"""The shapes that kernels are tested, tuned and timed at, and inputs for them, by op family."""
