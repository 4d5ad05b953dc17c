"""Playing and measuring: evaluation, rollouts, free controls, steerability."""
