"""From noise to reward: envs whose step is a chunk, and envs whose action is flow noise."""
