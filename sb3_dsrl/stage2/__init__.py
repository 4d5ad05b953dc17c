"""Stage 2, online: the latent policy, and what stock SB3 needs to train it."""
