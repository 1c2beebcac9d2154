"""From a prepared setup to a running experiment: Ray, server, tracking run and run directory put together."""

from __future__ import annotations
