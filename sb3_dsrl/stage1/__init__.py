"""Stage 1, offline: the latent policy by advantage-weighted maximum likelihood (AW-MLE)."""
