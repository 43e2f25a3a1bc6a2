"""The loop as static, sync-free steps: `sampler` is the way in, `reference` is the spec."""
