"""Layer 3: one round after another, without Ray or MLflow."""
