"""Layer 1: encoders, adapters, generators."""
