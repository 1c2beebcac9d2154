"""Hyper-parameter search: Ray Tune runs trials, Optuna proposes them, ASHA stops the poor ones early."""

from __future__ import annotations
