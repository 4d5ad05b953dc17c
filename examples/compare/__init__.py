"""The comparison of latent steering with its controls and with SB3 baselines: ``python examples/compare/run.py``."""
